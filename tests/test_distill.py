"""distill.py: the loop against the definition and against itself, the command line, many processes."""
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from workshop import ROOT, TOKENIZER, difference, flags, log_rows, weights

import distill
from data import batch_at, load_tokenizer, prepare
from distill import LossSettings
from model import GPT2, load, student_from
from support import ranks as devices
from support.cli import InputError
from support.flags import check_ranks

ON_POLICY = {"on_policy": 0.5, "kd_weight": 1, "clm_weight": 0, "divergence": "reverse"}


# ------------------------------------------------------------------------------------ what a run does
def test_the_log_has_the_means_of_the_definition(workshop, distil, tmp_path):
    """First step, before any update: all terms of the loss and its gradient, summed up over all micro-batches
    and divided once by the tokens that count. The plan and args.json have the formula."""
    printed = distil(tmp_path / "out", packing="padded", cos_weight=0.25, steps=1)
    formula = "loss = 0.5 * 2² * KL(teacher || student, T = 2) + 0.5 * CLM + 0.25 * (1 - cos)"
    assert "layers 0,3 of" in printed and formula in " ".join(printed.split())
    assert json.loads((tmp_path / "out" / "args.json").read_text())["objective"] == formula
    assert len(load(tmp_path / "out").blocks) == 2

    corpus = prepare(str(workshop / "text"), load_tokenizer(workshop / "teacher"), workshop / "corpora")
    teacher = load(workshop / "teacher")
    student = student_from(teacher, [0, 3])
    sums = torch.zeros(5)
    tokens = 0
    for micro in range(4):
        ids, targets = map(torch.from_numpy, batch_at(corpus.train, 0, micro, 2, 16, "padded", corpus.eot))
        y = targets.flatten()
        h_s, h_t = (network.hidden(ids).flatten(0, 1).double() for network in (student, teacher))
        s, t = h_s @ student.head_weight.T.double(), h_t @ teacher.head_weight.T.double()
        loss, kl, clm = distill.plain_loss(s, t, y, LossSettings(2.0, 0.5, 0.5))
        cos = (1 - F.cosine_similarity(h_s, h_t))[y != -100].sum()
        bar = F.cross_entropy(t, y, reduction="sum")
        loss = loss + 0.25 * cos
        loss.backward()
        sums += torch.stack([loss, kl, clm, cos, bar]).detach()
        tokens += (y != -100).sum().item()
    row, = log_rows(tmp_path / "out")
    assert int(row["tokens"]) == tokens < 4 * 2 * 16
    norm = torch.stack([parameter.grad.norm() for parameter in student.parameters()]).norm()
    logged = [float(row[name]) for name in ("loss", "kl", "clm", "cos", "teacher_clm", "grad_norm")]
    assert logged == pytest.approx((torch.stack([*sums, norm]) / tokens).tolist(), rel=1e-4)


def test_an_edited_plain_loss_is_what_trains(workshop, distil, tmp_path, monkeypatch):
    """The README's exercise: one line changed makes it the reverse KL, and the run follows."""
    source = (ROOT / "distill.py").read_text(encoding="utf-8")
    forward = "kl = (log_p.exp() * (log_p - log_q)).sum()"
    reverse = "kl = (log_q.exp() * (log_q - log_p)).sum()"
    assert source.count(forward) == 1
    edited = {"__name__": "edited"}
    monkeypatch.setitem(sys.modules, "edited", SimpleNamespace(**edited))  # where dataclasses look
    exec(compile(source.replace(forward, reverse), "distill.py", "exec"), edited)
    monkeypatch.setitem(distill.LOSSES, "forward", edited["plain_loss"])

    settings = {"grad_accum": 1, "kd_weight": 1, "clm_weight": 0, "temperature": 1, "steps": 3}
    distil(tmp_path / "edited", **settings)
    monkeypatch.undo()
    distil(tmp_path / "reverse", **settings, divergence="reverse")
    for a, b in zip(log_rows(tmp_path / "edited"), log_rows(tmp_path / "reverse"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    assert difference(weights(tmp_path / "edited"), weights(tmp_path / "reverse")) < 1e-5


def test_accumulation_does_not_change_the_step(distil, tmp_path):
    """8 x 1, 4 x 2 and 1 x 8 examples with unequal numbers of counted tokens are the same step."""
    found = []
    for accum in (1, 4, 8):
        out = tmp_path / str(accum)
        distil(out, grad_accum=accum, batch_size=8 // accum, packing="padded", eps=1e-3)
        found.append((weights(out), [int(row["tokens"]) for row in log_rows(out)]))
    assert found[0][1] == found[1][1] == found[2][1] and len(set(found[0][1])) > 1
    assert difference(found[0][0], found[1][0]) < 1e-6 > difference(found[0][0], found[2][0])


def test_a_larger_corpus_changes_nothing(distil, tmp_path, monkeypatch):
    """Another run may have left more tokens behind than this one uses."""
    monkeypatch.setattr(distill, "LEAST_TOKENS", 1)
    losses = {}
    for name, steps in (("before", 2), ("larger", 9), ("after", 2)):
        distil(tmp_path / name, steps=steps, data_folder=tmp_path / "corpora")
        losses[name] = [row["loss"] for row in log_rows(tmp_path / name)]
    assert losses["before"] == losses["after"]


def test_a_step_reads_little_back_from_the_device(distil, tmp_path, monkeypatch):
    """On a GPU each read waits until all is done. Allowed are two per micro-batch (which targets count, and
    that all of a chunk's do) and one per step, for the log."""
    reads = []

    def count(name, real):
        def counted(*args, **kwargs):
            reads.append(name)
            return real(*args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__"):
        count(name, getattr(torch.Tensor, name))

    def reads_of(steps, micro_batches):
        reads.clear()
        distil(tmp_path / f"{steps}x{micro_batches}", steps=steps, grad_accum=micro_batches, save_interval=99)
        return len(reads)

    few = reads_of(2, 2)
    assert reads_of(2, 4) - few <= 2 * 2 * 2
    assert reads_of(4, 2) - few <= 2 * (2 * 2 + 1)


# ------------------------------------------------------------------------------------ students and teachers
def test_warm_start_from_another_architecture_width_and_tokenizer(workshop, distil, tmp_path):
    """A GPT-NeoX student with 4,200 embeddings learns from a GPT-2 teacher with 4,096. Its tokenizer also
    knows [PAD], which it keeps; only the tokens that both have are compared."""
    from transformers import AutoTokenizer
    student = tmp_path / "padded"
    shutil.copytree(workshop / "small", student)
    spec = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 4096, "content": "[PAD]"})
    (student / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")

    distil(tmp_path / "out", student=student, student_layers=None, steps=20, lr=1e-2)
    rows = log_rows(tmp_path / "out")
    assert float(rows[-1]["kl"]) < 0.8 * float(rows[0]["kl"])
    before, after = load(student).state_dict(), weights(tmp_path / "out")
    assert (after["head.weight"][4096:] == before["head.weight"][4096:]).all()  # padding gets no gradient
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("[PAD]")["input_ids"] == [4096]


def test_precisions_and_a_random_start(workshop, distil, tmp_path):
    """Mixed precision keeps weights of float32. A student from scratch has the shape, not the weights."""
    for precision, dtype in (("bf16", torch.float32), ("bf16-pure", torch.bfloat16)):
        distil(tmp_path / precision, precision=precision, student_init="random", steps=1)
        tensors = load_file(tmp_path / precision / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
        assert tensors["transformer.wte.weight"].std() < 0.05 < load(workshop / "teacher").embed.weight.std()


def test_the_control_is_the_same_run_without_the_teacher(distil, tmp_path):
    """With its own rate, on the same number of tokens: otherwise the comparison is not fair."""
    distil(tmp_path / "a", control=True, control_lr=2e-3)
    distil(tmp_path / "b", kd_weight=0, clm_weight=1, lr=2e-3)
    a, b = log_rows(tmp_path / "a" / "control"), log_rows(tmp_path / "b")
    assert [row["clm"] for row in a] == [row["clm"] for row in b]


# ------------------------------------------------------------------------------------ on-policy
def test_what_the_student_writes(workshop):
    """Drawn from its own distribution after the first half; only that is counted; the same each time."""
    student, args = load(workshop / "teacher").train(), SimpleNamespace(seed=3)
    ids = torch.randint(4096, (2, 16), generator=torch.Generator().manual_seed(0))
    written, targets = distill.students_text(student, ids, 5, args)
    again, _ = distill.students_text(student, ids, 5, args)
    other, _ = distill.students_text(student, ids, 6, args)
    assert torch.equal(written, again) and not torch.equal(written, other) and student.training
    assert torch.equal(written[:, :8], ids[:, :8]) and not torch.equal(written[:, 8:], ids[:, 8:])
    targets = targets.view(2, 16)
    assert (targets[:, :7] == -100).all() and torch.equal(targets[:, 7:15], written[:, 8:])
    assert (targets[:, 15] >= 0).all()

    for share, expected in ((0.0, []), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (1.0, [*range(8)])):
        args = SimpleNamespace(on_policy=share)
        assert [index for index in range(8) if distill.is_on_policy(index, args)] == expected


def test_an_on_policy_run(distil, tmp_path):
    """Half of the micro-batches count half of their tokens; the control reads text only."""
    distil(tmp_path / "out", control=True, **ON_POLICY)
    assert {row["tokens"] for row in log_rows(tmp_path / "out")} == {str(2 * 2 * 16 + 2 * 2 * 9)}
    assert {row["tokens"] for row in log_rows(tmp_path / "out" / "control")} == {str(4 * 2 * 16)}


# ------------------------------------------------------------------------------------ the command line
def test_learning_rate():
    """A published recipe is only reproduced with its schedule."""
    args = distill.parse_args("--teacher gpt2 --student-layers 2 --steps 100 --warmup 0.1 --lr 1 "
                              "--schedule linear".split())
    rates = [round(distill.lr_at(step, args), 6) for step in (0, 4, 9, 10, 55, 99)]
    assert rates == [0.1, 0.5, 1, 1, 0.5, 0.011111]
    args.schedule = "cosine"
    assert distill.lr_at(55, args) == pytest.approx(0.5) and distill.lr_at(99, args) < 0.001
    args.schedule, args.warmup = "constant", 0
    assert {distill.lr_at(step, args) for step in range(100)} == {1}


def test_recipes_and_flags(monkeypatch):
    """Flags win over the recipe, the recipe over the defaults."""
    monkeypatch.chdir(ROOT)
    for recipe in [name for name in distill.RECIPES if name != "plain"]:
        student = ["--student", "gpt2"] if recipe == "finetune-wikitext103" else []
        args = distill.parse_args(["--recipe", recipe, "--steps", "7", "--seed", "3", *student])
        assert (args.recipe, args.steps, args.epochs, args.seed) == (recipe, 7, None, 3)
        assert distill.RECIPES[recipe].keys() <= vars(args).keys()
    assert distill.parse_args([]).is_demo and not distill.parse_args(["--lr", "1"]).is_demo
    assert distill.parse_args(["--teacher", "gpt2", "--student-layers", "6"]).recipe == "plain"
    args = distill.parse_args(["--recipe", "distilpythia", "--student-layers", "3"])
    assert args.student is None and args.student_layers == "3"
    assert distill.parse_args(["--recipe", "distilgpt2"]).epochs == 3


BAD = [  # flags, part of the message
    ({"student_layers": 9}, "choose 1 to 4"),
    ({"student_layers": "0,7"}, "layers are 0 to 3"),
    ({"student_layers": "first"}, "expected a number, or a list"),
    ({"student_layers": None}, "name one student"),
    ({"temperature": 0}, "--temperature 0"),
    ({"lr": "nan"}, "--lr nan"),
    ({"kd_weight": 0, "clm_weight": 0}, "all weights of the loss are 0"),
    ({"steps": 2, "epochs": 1}, "--steps and --epochs"),
    ({"control_lr": 1e-3}, "means nothing without --control"),
    ({"jsd_weight": 0.3}, "means nothing without --divergence jsd"),
    ({"cache_draws": 3}, "means nothing without --teacher-cache"),
    ({"on_policy": 1}, "add --kd-weight 1 --clm-weight 0"),
    ({**ON_POLICY, "packing": "padded"}, "use --packing constant"),
    ({**ON_POLICY, "seq_len": 1}, "2 or more"),
    ({"batch_size": 10**8, "seq_len": 64}, "a micro-batch of 6,400,000,000 tokens"),
    ({"data": "nothing-like-it"}, "openwebtext"),
    ({"device": "tpu"}, "--device tpu does not work here"),
    ({"seq_len": 65}, "64 positions"),
    ({"student": "small", "student_layers": None, "cos_weight": 1}, "needs one width"),
    ({"student": "stranger", "student_layers": None}, "different tokenizers"),
    ({"teacher": "short"}, "do not belong together"),
    ({"teacher": "./nowhere"}, "nowhere"),
    ({"resume": True}, "there is no run in"),
]


@pytest.fixture(scope="module")
def strangers(workshop):
    """Models that do not fit."""
    for name in ("stranger", "short"):
        shutil.copytree(workshop / "teacher", workshop / name)
    spec = json.loads(TOKENIZER.read_text())
    vocab = spec["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (workshop / "stranger" / "tokenizer.json").write_text(json.dumps(spec))
    GPT2(GPT2.config(vocab_size=4000, context=64, width=32, n_layer=4, n_head=2)).save(workshop / "short")
    return workshop


def test_bad_input_is_one_clear_line_and_exit_code_2(strangers, refused, tmp_path, monkeypatch):
    """And it leaves no folder behind."""
    monkeypatch.chdir(strangers)
    for changes, message in BAD:
        refused(tmp_path / "out", message, **changes)
        assert not (tmp_path / "out").exists(), changes


def test_compile_without_a_compiler_is_one_line(refused, tmp_path, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C++ compiler\n" * 100)
    monkeypatch.setattr(torch, "compile", no_compiler)
    refused(tmp_path / "out", "--compile does not work here", compile=True)


def test_a_loss_that_is_not_finite_stops_the_run(refused, tmp_path, monkeypatch):
    """Before the weights are touched; what was saved before it can be resumed."""
    honest = distill.losses_of
    micro_batches = itertools.count()

    def poisoned(*given):
        losses = honest(*given)
        return losses._replace(loss=losses.loss * (math.nan if next(micro_batches) == 9 else 1))

    monkeypatch.setattr(distill, "losses_of", poisoned)
    refused(tmp_path / "out", "step 3: loss nan", "--lr", save_interval=1)
    saved = torch.load(tmp_path / "out" / "train_state.pt", weights_only=True)
    assert saved["step"] == 2 and all(t.isfinite().all() for t in saved["student"].values())


def test_which_precision_auto_is(monkeypatch):
    """bf16 unless it is clearly slower, however busy the machine is for a moment. A resumed run keeps its
    own, because a measurement can change between two starts."""
    alone = devices.Ranks("cpu")
    for bf16, picked in ((0.3, "bf16"), (1.2, "bf16"), (4.0, "fp32")):
        durations = (0.0, bf16, 0.0, 1.0)  # of a product in bf16, and one in float32
        busy = (0.0, 100.0, 0.0, 100.0)
        clock = itertools.accumulate([*busy, *durations * 18, *busy])
        monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=clock.__next__))
        assert devices.pick_precision("auto", None, alone) == picked
    assert devices.pick_precision("auto", "bf16", alone) == "bf16"
    assert devices.pick_precision("bf16-pure", "fp32", alone) == "bf16-pure"


# ------------------------------------------------------------------------------------ many processes
def start(argv):
    """distill.py in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "distill.py"), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_step(out, step, process):
    """Until `step` is in the log."""
    for _ in range(1200):
        if (out / "log.csv").exists() and len(log_rows(out)) >= step:
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("too slow")


def kill_family(pid):
    """SIGKILL a process and all that it started: torchrun's workers would outlive it."""
    listing = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    table = [tuple(map(int, line.split())) for line in listing.splitlines()]
    family = [pid]
    for member in family:
        family += [child for child, parent in table if parent == member]
    for member in family:
        os.kill(member, signal.SIGKILL)


def test_ranks_and_kills_change_nothing(workshop, distil, tmp_path):
    """Two processes have the losses of one: the same data, dropout and student's texts, though only one of
    them gets those texts. Killed, stopped and resumed, they end with the same bits as an untouched run."""
    long = {"steps": 16, "grad_accum": 4, "dropout": 0.1, "save_interval": 3, **ON_POLICY}
    whole = start(flags(workshop, tmp_path / "whole", **long))
    distil(tmp_path / "one", **long)
    assert whole.wait(120) == 0, whole.stdout.read()
    pairs = zip(log_rows(tmp_path / "one"), log_rows(tmp_path / "whole"), strict=True)
    for one, two in itertools.islice(pairs, 5):  # later, rounding adds up
        for name in ("loss", "kl", "tokens"):
            assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-5)

    out = tmp_path / "killed"
    for step, number in ((5, signal.SIGKILL), (9, signal.SIGTERM)):
        process = start(flags(workshop, out, **long, resume=True if step > 5 else None))
        wait_for_step(out, step, process)
        kill_family(process.pid) if number == signal.SIGKILL else process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
    assert "--resume" in printed and process.returncode != 0
    last = start(flags(workshop, out, **long, resume=True))
    assert last.wait(120) == 0, last.stdout.read()
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [int(row["step"]) for row in log_rows(out)] == [*range(1, 17)]


def test_several_processes_refuse_in_one_line(workshop, tmp_path):
    """What one of them says is not drowned in a traceback of the others, which wait for it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "args.json").write_text("{}")
    process = start(flags(workshop, tmp_path / "out"))
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and printed.count("contains args.json, but no") == 1, printed
    assert "rank1]: Traceback" not in printed


def test_micro_batches_that_cannot_be_shared():
    """The first process says so, with a number that works; the others end quietly."""
    args = SimpleNamespace(grad_accum=3)
    with pytest.raises(InputError, match="take a multiple of 2"):
        check_ranks(args, SimpleNamespace(world=2, is_first=True))
    with pytest.raises(SystemExit):
        check_ranks(args, SimpleNamespace(world=2, is_first=False))
