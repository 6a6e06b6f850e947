"""distill.py: the loss against float64 autograd, the loop against itself, the command line."""
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill
from model import GPT2, GPTNeoX, load
from support import chunked_loss, options, runtime, state
from support.chunked_loss import LossSettings
from support.cli import InputError, run_cli

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "demo" / "teacher" / "tokenizer.json"


# ------------------------------------------------------------------------------------ the loss
def reference_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, T, kd, clm, cos):
    """The definition, on whole logits in float64; returns (loss, kl, clm) with an autograd graph."""
    s = student_hidden.double() @ student_head.double().T
    t = teacher_hidden.double() @ teacher_head.double().T
    loss, kl, ce = distill.plain_loss(s, t, targets, LossSettings(T, kd, clm))
    if cos:
        similarity = F.cosine_similarity(student_hidden.double(), teacher_hidden.double(), dim=-1)
        loss = loss + cos * (1 - similarity)[targets != -100].sum()
    return loss, kl, ce


def test_the_plain_loss_is_that_of_the_paper():
    """Two tokens, worked out by hand: T² * sum p ln(p / q), and -ln softmax(s)[y]."""
    t, s = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 0.0]]).double()
    p = math.e / (math.e + 1)  # softmax of (2, 0) / 2
    expected = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    loss, kl, clm = distill.plain_loss(s, t, torch.tensor([1]), LossSettings(2.0, 0.25, 3.0))
    assert kl.item() == pytest.approx(expected) and clm.item() == pytest.approx(math.log(2))
    assert loss.item() == pytest.approx(0.25 * 4 * expected + 3 * math.log(2))


def loss_inputs(N=50, C_s=24, C_t=24, V=97, scale=1.0):
    torch.manual_seed(0)
    student = [torch.randn(N, C_s, requires_grad=True), torch.randn(V, C_s, requires_grad=True)]
    teacher = [torch.randn(N, C_t), torch.randn(V, C_t)]
    targets = torch.randint(V, (N,))
    targets[::7] = -100
    return [scale * x if not x.requires_grad else x for x in student + teacher] + [targets]


def close(a, b, relative=1e-5):
    a, b = a.double(), b.double()
    return (a - b).norm() <= relative * b.norm()


@pytest.mark.parametrize("T", [0.1, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (5.0, 2.0, 1.0)])
def test_loss_and_gradients_equal_float64_autograd(T, chunk_size, weights):
    kd, clm, cos = weights
    inputs = loss_inputs()
    loss, kl, ce = distill.distillation_loss(*inputs, temperature=T, kd_weight=kd, clm_weight=clm,
                                             cos_weight=cos, chunk_size=chunk_size)
    expected = reference_loss(*inputs, T, kd, clm, cos)
    for ours, theirs in zip((loss, kl, ce), expected, strict=True):
        assert close(ours, theirs)
    ours = torch.autograd.grad(3 * loss, inputs[:2])  # not 1, so that the incoming gradient is used
    theirs = torch.autograd.grad(3 * expected[0], inputs[:2])
    assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))


def test_widths_may_differ():
    inputs = loss_inputs(C_s=16, C_t=40)
    assert close(distill.distillation_loss(*inputs)[0], reference_loss(*inputs, 2.0, 0.5, 0.5, 0.0)[0])


def test_tied_head_gets_the_gradient_of_both_its_uses():
    """The embedding is also the head, as in GPT-2."""
    embedding = torch.randn(97, 24, requires_grad=True)
    _, _, teacher_hidden, teacher_head, targets = loss_inputs()
    ids = torch.arange(50)
    def gradient(loss_of):
        loss = loss_of(torch.tanh(embedding[ids]), embedding, teacher_hidden, teacher_head, targets)
        return torch.autograd.grad(loss, embedding)[0]
    ours = gradient(lambda *x: distill.distillation_loss(*x, chunk_size=16)[0])
    assert close(ours, gradient(lambda *x: reference_loss(*x, 2.0, 0.5, 0.5, 0.0)[0]))


@pytest.mark.parametrize("T", [1.0, 2.0])
def test_a_perfect_student_scores_zero(T):
    hidden, head = torch.randn(50, 24, requires_grad=True), torch.randn(97, 24)
    targets = torch.zeros(50, dtype=torch.long)
    loss, kl, _ = distill.distillation_loss(hidden, head, hidden.detach(), head, targets, temperature=T,
                                            kd_weight=1.0, clm_weight=0.0)
    assert abs(kl) < 1e-5
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-6


def test_nothing_counted_is_zero_with_zero_gradients():
    inputs = loss_inputs()
    inputs[-1][:] = -100
    loss, kl, ce = distill.distillation_loss(*inputs)
    assert loss == kl == ce == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs[:2]))


def test_logits_of_ten_thousand_stay_finite_and_right():
    inputs = loss_inputs()
    inputs[0] = (inputs[0].detach() * 1e3).requires_grad_()
    inputs[2] = inputs[2] * 1e3
    logits = inputs[0] @ inputs[1].T
    assert logits.abs().max() > 1e4
    loss, _, _ = distill.distillation_loss(*inputs, chunk_size=16)
    assert close(loss, reference_loss(*inputs, 2.0, 0.5, 0.5, 0.0)[0])
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs[:2]))


def test_heads_of_different_vocabularies_are_refused():
    inputs = loss_inputs()
    with pytest.raises(ValueError, match="97 and 90"):
        distill.distillation_loss(*inputs[:3], inputs[3][:90], inputs[4])


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_all_tokens_by_the_vocabulary_exists():
    inputs = loss_inputs(N=512, V=1000)
    with LargestTensor() as largest:
        distill.distillation_loss(*inputs, chunk_size=32, cos_weight=1.0)[0].backward()
    assert largest.numel == max(2 * 32 * 1000, 1000 * 24)  # the teacher's and the student's logits


# ------------------------------------------------------------------------------------ other divergences
DIVERGENCES = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


@pytest.mark.parametrize("divergence, w", DIVERGENCES)
def test_divergences_worked_out_by_hand(divergence, w):
    """Two tokens: p = (3/4, 1/4), q = (1/2, 1/2)."""
    p, q = (0.75, 0.25), (0.5, 0.5)
    m = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    jsd = w * kl(p, m) + (1 - w) * kl(q, m)
    expected = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[divergence]
    t, s = (torch.tensor([x]).double().log() for x in (p, q))
    settings = LossSettings(1.0, 1.0, 0.0, 0.0, divergence, w)
    loss, logged, _ = distill.plain_loss(s, t, torch.tensor([0]), settings)
    assert loss.item() == pytest.approx(expected) and logged.item() == pytest.approx(kl(p, q))


@pytest.mark.parametrize("divergence, w", DIVERGENCES)
@pytest.mark.parametrize("T", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_divergences_in_chunks_equal_float64_autograd(divergence, w, T, scale):
    """At the larger scale logits reach 1e4, and probabilities are exactly 0 in float32."""
    inputs = loss_inputs()
    inputs[0] = (inputs[0].detach() * scale).requires_grad_()
    inputs[2] = inputs[2] * scale
    settings = LossSettings(T, 1.0, 0.5, 0.0, divergence, w, chunk_size=16)
    found = distill.chunked_losses(*inputs, settings)
    s, t = (hidden.double() @ head.double().T for hidden, head in (inputs[:2], inputs[2:4]))
    loss, kl, clm = distill.plain_loss(s, t, inputs[4], settings)
    for ours, theirs in ((found.loss, loss), (found.kl, kl), (found.clm, clm)):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(x, inputs[:2]) for x in (found.loss, loss))
    assert all(close(a, b, relative=1e-5 if scale == 1 else 1e-3) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("divergence, w", DIVERGENCES)
@pytest.mark.parametrize("T", [0.5, 2.0])
def test_a_perfect_student_scores_zero_by_each_divergence(divergence, w, T):
    hidden, head = torch.randn(50, 24, requires_grad=True), torch.randn(97, 24)
    targets = torch.zeros(50, dtype=torch.long)
    settings = LossSettings(T, 1.0, 0.0, 0.0, divergence, w)
    for losses_of in distill.LOSSES.values():
        losses = losses_of(hidden, head, hidden.detach(), head, targets, settings)
        assert abs(losses.loss) < 1e-4 > abs(losses.kl)
        assert torch.autograd.grad(losses.loss, hidden)[0].abs().max() < 1e-5


def test_jsd_lies_between_the_two_directions():
    """With a small weight its gradient points where the forward KL's does, with a large one the reverse's."""
    gradients = {}
    for divergence, w in (("forward", 0.5), ("reverse", 0.5), ("jsd", 0.001), ("jsd", 0.999)):
        inputs = loss_inputs(scale=0.1)
        inputs[0] = (inputs[0].detach() * 0.1).requires_grad_()
        settings = LossSettings(1.0, 1.0, 0.0, 0.0, divergence, w)
        loss = distill.chunked_losses(*inputs, settings).loss
        gradients[divergence, w] = torch.autograd.grad(loss, inputs[0])[0].flatten()

    def alike(a, b):
        return F.cosine_similarity(gradients[a], gradients[b], dim=0).item()

    assert alike(("jsd", 0.001), ("forward", 0.5)) > 0.99 > alike(("jsd", 0.001), ("reverse", 0.5))
    assert alike(("jsd", 0.999), ("reverse", 0.5)) > 0.99 > alike(("jsd", 0.999), ("forward", 0.5))


# ------------------------------------------------------------------------------------ runs in miniature
@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Documents of very different lengths, and two small untrained models that share a tokenizer."""
    folder = tmp_path_factory.mktemp("workshop")
    words = (ROOT / "model.py").read_text().split()
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=rng.choice([3, 20, 200]))))
    torch.manual_seed(0)
    gpt2 = GPT2.config(vocab_size=4096, context=64, width=32, n_layer=4, n_head=2, eos=4095)
    neox = GPTNeoX.config(vocab_size=4200, context=64, width=16, n_layer=2,
                         n_head=2, mlp_width=64)
    for name, model in (("teacher", GPT2(gpt2)), ("small", GPTNeoX(neox))):
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)  # so that the answers are not all alike
        model.save(folder / name)
        (folder / name / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return folder


def flags(workshop, out, **changes):
    settings = {"teacher": workshop / "teacher", "student-layers": 2, "data": workshop / "text",
                "seq-len": 16, "batch-size": 2, "grad-accum": 4, "steps": 3, "lr": 1e-3, "precision": "fp32",
                "device": "cpu", "data-folder": workshop / "corpora", "workers": 1, "out": out,
                "kd-weight": 0.5, "clm-weight": 0.5, "eval-tokens": 500, **changes}
    return [part for name, value in settings.items() if value is not None
            for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def call(monkeypatch, capsys, argv):
    """Run the command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, argv)])
    try:
        run_cli(distill.main)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, *capsys.readouterr()


def weights(out):
    return load(out).state_dict()


def log_rows(out):
    return list(csv.DictReader((Path(out) / "log.csv").open()))


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_a_run_leaves_a_model_its_log_and_its_settings(workshop, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    code, printed, _ = call(monkeypatch, capsys, flags(workshop, out, control=True))
    assert code == 0
    assert "layers 0,3 of" in printed
    assert "loss = 0.5 * 2² * KL(teacher || student, T = 2) + 0.5 * CLM" in printed
    assert [row["step"] for row in log_rows(out)] == ["1", "2", "3"]
    table = [line for line in printed.splitlines() if re.match(r"\| \w", line)]
    assert [line.split()[1] for line in table] == ["model", "teacher", "student", "control"]
    assert json.loads((out / "args.json").read_text())["steps"] == 3
    card = (out / "README.md").read_text()
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert all(f" {cell} |" in card for cell in cells)  # which also has the number of parameters
    assert "KL(teacher || student" in card
    assert len(load(out).blocks) == 2
    assert difference(weights(out), load(workshop / "teacher").state_dict() | weights(out)) == 0


def test_the_log_has_the_sums_of_the_definition(workshop, tmp_path, monkeypatch, capsys):
    """First step, before any update: loss, KL, CLM and the teacher's CLM as means over all counted tokens."""
    out = tmp_path / "out"
    call(monkeypatch, capsys, flags(workshop, out, packing="padded", steps=1))
    from data import batch_at, load_tokenizer, prepare
    corpus = prepare(str(workshop / "text"), load_tokenizer(workshop / "teacher"), workshop / "corpora")
    teacher = load(workshop / "teacher")
    from model import student_from
    student, sums, tokens = student_from(teacher, [0, 3]), torch.zeros(4), 0
    for micro in range(4):
        batch = batch_at(corpus.train, 0, micro, 2, 16, "padded", corpus.meta["eot"])
        ids, targets = map(torch.from_numpy, batch)
        s, t = student.hidden(ids).flatten(0, 1), teacher.hidden(ids).flatten(0, 1)
        targets = targets.flatten()
        parts = reference_loss(s, student.head_weight, t, teacher.head_weight, targets, 2.0, 0.5, 0.5, 0)
        bar = F.cross_entropy(teacher(ids).flatten(0, 1), targets, ignore_index=-100, reduction="sum")
        sums += torch.stack([*parts, bar]).detach()
        tokens += (targets != -100).sum().item()
    row = log_rows(out)[0]
    assert int(row["tokens"]) == tokens < 4 * 2 * 16
    logged = [float(row[name]) for name in ("loss", "kl", "clm", "teacher_clm")]
    assert logged == pytest.approx((sums / tokens).tolist(), rel=1e-4)


READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__")


def test_a_step_reads_little_back_from_the_device(workshop, tmp_path, monkeypatch, capsys):
    """On a GPU each of these waits until all is done: one a micro-batch, and one a step for the log."""
    reads = []

    def count(name, real):
        def counted(*args, **kwargs):
            reads.append(name)
            return real(*args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, counted)

    for name in READS:
        count(name, getattr(torch.Tensor, name))

    def reads_of(steps, micro_batches):
        reads.clear()
        changes = {"steps": steps, "grad-accum": micro_batches, "save-interval": 100}
        call(monkeypatch, capsys, flags(workshop, tmp_path / f"{steps}x{micro_batches}", **changes))
        return len(reads)

    assert reads_of(3, 6) - reads_of(3, 4) <= 3 * 2 * 1
    assert reads_of(5, 2) - reads_of(3, 2) <= 2 * (2 * 1 + 1)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_compiled_loss_is_the_loss(monkeypatch, divergence):
    """Traced as for a GPU, though run without its compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    chunked_loss.compiled_rows_function.cache_clear()
    inputs = loss_inputs()
    found = []
    for compiled in (False, True):
        settings = LossSettings(divergence=divergence, chunk_size=16, compile=compiled)
        losses = chunked_loss.chunked_losses(*inputs, settings)
        found.append([*losses, *torch.autograd.grad(losses.loss, inputs[:2])])
    chunked_loss.compiled_rows_function.cache_clear()
    assert all(close(a, b) for a, b in zip(*found, strict=True))


def test_accumulation_does_not_change_the_step(workshop, tmp_path, monkeypatch, capsys):
    """8 x 1, 4 x 2 and 1 x 8 examples with unequal numbers of counted tokens are the same step."""
    results = []
    for accum in (1, 4, 8):
        out = tmp_path / str(accum)
        call(monkeypatch, capsys, flags(workshop, out, **{"grad-accum": accum, "batch-size": 8 // accum},
                                        packing="padded", eps=1e-3))
        results.append((weights(out), [int(row["tokens"]) for row in log_rows(out)]))
    assert results[0][1] == results[1][1] == results[2][1] and len(set(results[0][1])) > 1
    assert difference(results[0][0], results[1][0]) < 1e-6 > difference(results[0][0], results[2][0])


def test_warm_start_from_another_architecture_width_and_padding(workshop, tmp_path, monkeypatch, capsys):
    """A GPT-NeoX student with 4,200 embeddings learns from a GPT-2 teacher with 4,096, the real ones."""
    out = tmp_path / "out"
    code, printed, error = call(monkeypatch, capsys, flags(workshop, out, student=workshop / "small",
                                                           **{"student-layers": None}, steps=30, lr=1e-2))
    assert code == 0, error
    rows = log_rows(out)
    assert float(rows[-1]["kl"]) < 0.8 * float(rows[0]["kl"])
    before, after = load(workshop / "small").state_dict(), weights(out)
    assert (after["head.weight"][4096:] == before["head.weight"][4096:]).all()  # padding gets no gradient


def test_one_more_special_token(workshop, tmp_path, monkeypatch, capsys):
    """A student whose tokenizer also knows [PAD] is compared over the tokens that its teacher has."""
    from transformers import AutoTokenizer
    student = tmp_path / "padded"
    shutil.copytree(workshop / "small", student)
    spec = json.loads((student / "tokenizer.json").read_text(encoding="utf-8"))
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 4096, "content": "[PAD]"})
    (student / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")

    argv = flags(workshop, tmp_path / "out", student=student, **{"student-layers": None})
    code, _, error = call(monkeypatch, capsys, argv)
    assert code == 0, error
    assert float(log_rows(tmp_path / "out")[0]["kl"]) > 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("[PAD]")["input_ids"] == [4096]
    before, after = load(student).state_dict(), weights(tmp_path / "out")
    assert (after["head.weight"][4096:] == before["head.weight"][4096:]).all()


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.float32), ("bf16-pure", torch.bfloat16)])
def test_precisions(workshop, tmp_path, monkeypatch, capsys, precision, dtype):
    code, printed, _ = call(monkeypatch, capsys, flags(workshop, tmp_path / "out", precision=precision))
    assert code == 0 and ("warning" in printed) == (precision == "bf16-pure")
    assert load(tmp_path / "out", dtype=torch.float64).embed.weight.dtype == torch.float64
    from safetensors.torch import load_file
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}


def test_student_from_scratch_has_the_shape_but_not_the_weights(workshop, tmp_path, monkeypatch, capsys):
    argv = flags(workshop, tmp_path / "out", steps=1, **{"student-init": "random"})
    code, _, _ = call(monkeypatch, capsys, argv)
    assert code == 0
    teacher = load(workshop / "teacher").embed.weight
    assert weights(tmp_path / "out")["embed.weight"].std() < 0.05 < teacher.std()


def test_no_teacher_is_plain_language_modelling(workshop, tmp_path, monkeypatch, capsys):
    changes = {"teacher": "none", "student": workshop / "small", "student-layers": None}
    argv = flags(workshop, tmp_path / "out", **changes)
    code, printed, _ = call(monkeypatch, capsys, argv)
    assert code == 0 and "loss = 0.5 * CLM" in printed
    assert all(float(row["kl"]) == 0 for row in log_rows(tmp_path / "out"))


def test_cosine_term(workshop, tmp_path, monkeypatch, capsys):
    argv = flags(workshop, tmp_path / "out", **{"cos-weight": 1, "steps": 20})
    code, printed, _ = call(monkeypatch, capsys, argv)
    rows = log_rows(tmp_path / "out")
    assert code == 0 and "1 * (1 - cos)" in printed and 0 < float(rows[-1]["cos"]) < float(rows[0]["cos"])


def test_control_is_the_same_run_without_the_teacher(workshop, tmp_path, monkeypatch, capsys):
    call(monkeypatch, capsys, flags(workshop, tmp_path / "a", control=True))
    call(monkeypatch, capsys, flags(workshop, tmp_path / "b", **{"kd-weight": 0, "clm-weight": 1}))
    a, b = log_rows(tmp_path / "a" / "control"), log_rows(tmp_path / "b")
    assert [row["clm"] for row in a] == [row["clm"] for row in b]


def test_learning_rate():
    args = distill.parse_args(["--teacher", "t", "--student-layers", "2", "--steps", "100", "--warmup", "0.1",
                               "--lr", "1", "--schedule", "linear"])
    rates = [round(distill.lr_at(step, args), 6) for step in (0, 4, 9, 10, 55, 99)]
    assert rates == [0.1, 0.5, 1, 1, 0.5, 0.011111]
    args.schedule = "cosine"
    assert distill.lr_at(55, args) == pytest.approx(0.5) and distill.lr_at(99, args) < 0.001
    args.schedule, args.warmup = "constant", 0
    assert {distill.lr_at(step, args) for step in range(100)} == {1}


def test_recipes_and_flags():
    for recipe in distill.RECIPES:
        args = distill.parse_args(["--recipe", recipe, "--steps", "7", "--seed", "3"])
        assert (args.recipe, args.steps, args.epochs, args.seed) == (recipe, 7, None, 3)
        assert set(distill.RECIPES[recipe]) <= set(vars(args))
    assert distill.parse_args([]).recipe == "demo"
    assert distill.parse_args(["--teacher", "gpt2", "--student-layers", "6"]).recipe == "plain"
    args = distill.parse_args(["--recipe", "distilpythia", "--student-layers", "3"])
    assert args.student is None and args.student_layers == "3"
    assert distill.parse_args(["--recipe", "distilgpt2"]).epochs == 3


# ------------------------------------------------------------------------------------ plain and chunked
@pytest.mark.parametrize("settings", [
    LossSettings(), LossSettings(1.0, 1.0, 0.0), LossSettings(4.0, 0.0, 1.0),
    LossSettings(2.0, 1.0, 2.0, 3.0)])
def test_plain_and_chunked_are_one_loss(settings):
    """All that the log shows, and the gradient, from the same hidden states."""
    found = {}
    for name, losses_of in distill.LOSSES.items():
        inputs = loss_inputs()
        losses = losses_of(*inputs, settings)
        found[name] = losses, torch.autograd.grad(losses.loss, inputs[:2])
    for plain, chunked in zip(*(losses for losses, _ in found.values()), strict=True):
        assert plain.item() == pytest.approx(chunked.item(), rel=1e-5)
    assert all(close(a, b) for a, b in zip(found["plain"][1], found["chunked"][1], strict=True))
    assert found["plain"][0].tokens == 42  # 50 less the eight without a target


def test_plain_and_chunked_without_a_teacher():
    student_hidden, student_head, _, _, targets = loss_inputs()
    for losses_of in distill.LOSSES.values():
        losses = losses_of(student_hidden, student_head, None, None, targets, LossSettings(2.0, 0.0, 3.0))
        assert losses.loss.item() == pytest.approx(3 * losses.clm.item()) and losses.clm > 0
        assert losses.kl == losses.teacher_clm == losses.cos == 0


def test_a_run_with_each_loss_ends_the_same(workshop, tmp_path, monkeypatch, capsys):
    for loss in distill.LOSSES:
        argv = flags(workshop, tmp_path / loss, loss=loss, steps=8, packing="padded", control=True, eps=1e-4)
        code, _, error = call(monkeypatch, capsys, argv)
        assert code == 0, error
    for folder in ("", "control"):
        plain, chunked = (log_rows(tmp_path / loss / folder) for loss in ("plain", "chunked"))
        for a, b in zip(plain, chunked, strict=True):
            for column in ("loss", "kl", "clm", "teacher_clm", "grad_norm", "tokens"):
                assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-4), column
        assert difference(weights(tmp_path / "plain" / folder), weights(tmp_path / "chunked" / folder)) < 1e-5


def test_what_stands_in_plain_loss_is_what_trains(workshop, tmp_path, monkeypatch, capsys):
    """The README's exercise: one line changed makes it the reverse KL, and the run follows."""
    source = (ROOT / "distill.py").read_text(encoding="utf-8")
    forward, reverse = "(log_p.exp() * (log_p - log_q)).sum()", "(log_q.exp() * (log_q - log_p)).sum()"
    assert source.count(forward) == 1
    changed = {}
    exec(compile(source.replace(forward, reverse), "distill.py", "exec"), changed)  # as an edit would
    monkeypatch.setattr(distill, "plain_loss", changed["plain_loss"])
    argv = flags(workshop, tmp_path / "out", loss="plain", steps=1, **{"grad-accum": 1, "kd-weight": 1,
                                                                       "clm-weight": 0, "temperature": 1})
    assert call(monkeypatch, capsys, argv)[0] == 0

    from data import batch_at, load_tokenizer, prepare
    from model import student_from
    corpus = prepare(str(workshop / "text"), load_tokenizer(workshop / "teacher"), workshop / "corpora")
    ids = torch.from_numpy(batch_at(corpus.train, 0, 0, 2, 16)[0])
    teacher = load(workshop / "teacher")
    with torch.no_grad():
        p, q = (network(ids).double().softmax(-1) for network in (teacher, student_from(teacher, [0, 3])))
    expected = (q * (q / p).log()).sum(-1).mean().item()
    assert float(log_rows(tmp_path / "out")[0]["loss"]) == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------ on-policy
@pytest.mark.parametrize("share, expected", [
    (0.0, []), (0.25, [3, 7]), (0.5, [1, 3, 5, 7]), (1.0, [*range(8)])])
def test_which_micro_batches_the_student_writes(share, expected):
    args = SimpleNamespace(on_policy=share)
    assert [index for index in range(8) if distill.is_on_policy(index, args)] == expected


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


ON_POLICY = {"on-policy": 0.5, "kd-weight": 1, "clm-weight": 0, "divergence": "reverse"}


def test_on_policy_run(workshop, tmp_path, monkeypatch, capsys):
    """Half of the micro-batches count half of their tokens; the control reads text only."""
    argv = flags(workshop, tmp_path / "out", control=True, **ON_POLICY)
    code, printed, error = call(monkeypatch, capsys, argv)
    assert code == 0, error
    assert "KL(student || teacher, T = 2)" in printed
    assert {row["tokens"] for row in log_rows(tmp_path / "out")} == {str(2 * 2 * 16 + 2 * 2 * 9)}
    assert {row["tokens"] for row in log_rows(tmp_path / "out" / "control")} == {str(4 * 2 * 16)}


def test_on_policy_needs_no_length():
    """What the models can take is not known yet when settings are checked."""
    options.check(distill.parse_args(["--teacher", str(ROOT / "demo" / "teacher"), "--student-layers", "3",
                                      "--on-policy", "0.5", "--kd-weight", "1", "--clm-weight", "0"]))


# ------------------------------------------------------------------------------------ bad input
BAD = {
    "9 of 4 layers": ({"student-layers": 9}, "choose 1 to 4"),
    "0 layers": ({"student-layers": 0}, "choose 1 to 4"),
    "a layer out of range": ({"student-layers": "0,7"}, "layers are 0 to 3"),
    "layers that are no numbers": ({"student-layers": "first"}, "expected a number, or a list"),
    "temperature 0": ({"temperature": 0}, "--temperature 0: must be from 0.001 to 1000"),
    "negative steps": ({"steps": -1}, "--steps -1: must be a whole number from 1"),
    "learning rate nan": ({"lr": "nan"}, "--lr nan: must be above 0"),
    "negative seed": ({"seed": -1}, "--seed -1: must be a whole number from 0"),
    "dropout 1": ({"dropout": 1}, "--dropout 1: must be at least 0 and below 1"),
    "no weights": ({"kd-weight": 0, "clm-weight": 0}, "all weights of the loss are 0"),
    "the student's text as its own target": ({"on-policy": 1}, "add --kd-weight 1 --clm-weight 0"),
    "the student's text, padded": ({**ON_POLICY, "packing": "padded"}, "use --packing constant"),
    "all of a mixture": ({"jsd-weight": 1}, "--jsd-weight 1: must be above 0 and below 1"),
    "no student": ({"student-layers": None}, "name one student"),
    "unknown data": ({"data": "nothing-like-it"}, "openwebtext"),
    "sequence longer than the context": ({"seq-len": 65}, "64 positions"),
    "another width with the cosine": ({"student": "small", "student-layers": None, "cos-weight": 1},
                                      "needs one width"),
    "another tokenizer": ({"student": "stranger", "student-layers": None}, "different tokenizers"),
    "a teacher smaller than its tokenizer": ({"teacher": "short"}, "do not belong together"),
    "no such folder": ({"teacher": "./nowhere"}, "nowhere"),
    "a folder without config.json": ({"teacher": "text"}, "config.json"),
    "a truncated model": ({"teacher": "cut"}, "damaged"),
    "resume of nothing": ({"resume": True}, "there is no run in"),
}


@pytest.fixture(scope="module")
def strangers(workshop):
    """Models that do not fit."""
    for name in ("stranger", "short", "cut"):
        shutil.copytree(workshop / "teacher", workshop / name)
    spec = json.loads(TOKENIZER.read_text())
    vocab = spec["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (workshop / "stranger" / "tokenizer.json").write_text(json.dumps(spec))
    GPT2(GPT2.config(vocab_size=4000, context=64, width=32, n_layer=4, n_head=2)).save(workshop / "short")
    whole = (workshop / "cut" / "model.safetensors").read_bytes()
    (workshop / "cut" / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    (workshop / "text" / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    yield workshop
    (workshop / "text" / "tokenizer.json").unlink()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(strangers, tmp_path, monkeypatch, capsys, name):
    changes, message = BAD[name]
    monkeypatch.chdir(strangers)
    code, _, error = call(monkeypatch, capsys, flags(strangers, tmp_path / "out", **changes))
    last = error.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last and "Traceback" not in error


def test_out_that_cannot_be_written(workshop, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("not a folder")
    code, _, error = call(monkeypatch, capsys, flags(workshop, tmp_path / "file" / "out"))
    assert code == 2 and "cannot be written" in error


def test_another_run_is_not_overwritten_unasked(workshop, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    call(monkeypatch, capsys, flags(workshop, out))
    before = weights(out)
    code, _, error = call(monkeypatch, capsys, flags(workshop, out, seed=1))
    assert code == 2 and "--overwrite" in error and difference(before, weights(out)) == 0
    code, _, error = call(monkeypatch, capsys, flags(workshop, out, seed=1, resume=True))
    assert code == 2 and "--seed was 0, now 1" in error
    code, _, _ = call(monkeypatch, capsys, flags(workshop, out, seed=1, overwrite=True))
    assert code == 0 and difference(before, weights(out)) > 0


def test_two_processes_do_not_share_out(workshop, tmp_path, monkeypatch, capsys):
    folder = state.RunFolder(distill.parse_args(flags(workshop, tmp_path / "out")), runtime.Ranks("cpu"))
    folder.claim()
    code, _, error = call(monkeypatch, capsys, flags(workshop, tmp_path / "out"))
    assert code == 2 and "in use by another process" in error
    folder.release()
    assert not (tmp_path / "out").exists(), "a start that failed leaves nothing behind"


def test_a_gradient_that_is_not_finite_stops_the_run(workshop, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    honest = distill.micro_batch
    optimizers = []

    def watched(student, args):
        optimizers.append(student)
        return honest_optimizer(student, args)

    def poisoned(corpus, index, args, device):
        if index == 9:  # of step 3
            for parameter in optimizers[0].parameters():
                parameter.data[0] = math.nan
        return honest(corpus, index, args, device)

    honest_optimizer = distill.make_optimizer
    monkeypatch.setattr(distill, "make_optimizer", watched)
    monkeypatch.setattr(distill, "micro_batch", poisoned)
    code, _, error = call(monkeypatch, capsys, flags(workshop, out, **{"save-interval": 1}))
    assert code == 2 and "step 3: loss nan" in error and "--lr" in error
    saved = torch.load(out / "train_state.pt", weights_only=True)
    assert saved["step"] == 2 and all(t.isfinite().all() for t in saved["student"].values())


# -------------------------------------------------------------------------------- surviving, and many ranks
def command(ranks, *argv):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / "distill.py"), *map(str, argv)]


def start(ranks, argv):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(ranks, *argv), env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


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


LONG = {"steps": 40, "grad-accum": 4, "dropout": 0.1, "save-interval": 5, **ON_POLICY}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_ends_with_the_same_bits(workshop, tmp_path, ranks):
    """SIGKILL at one or two moments and SIGTERM later, resumed each time, against an untouched run."""
    whole = start(ranks, flags(workshop, tmp_path / "whole", **LONG))
    assert whole.wait(120) == 0, whole.stdout.read()
    out, argv = tmp_path / "killed", flags(workshop, tmp_path / "killed", **LONG)
    moments = (3, signal.SIGKILL), (12, signal.SIGKILL), (21, signal.SIGTERM)
    for step, number in moments[ranks - 1:]:
        process = start(ranks, argv)
        wait_for_step(out, step, process)
        kill_family(process.pid) if number == signal.SIGKILL else process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
        if number == signal.SIGTERM:
            assert "--resume" in printed and process.returncode != 0
        argv = flags(workshop, out, **LONG, resume=True)
    last = start(ranks, argv)
    assert last.wait(120) == 0, last.stdout.read()
    a, b = weights(tmp_path / "whole"), weights(out)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [int(row["step"]) for row in log_rows(out)] == list(range(1, 41))


def test_the_number_of_ranks_changes_nothing(workshop, tmp_path):
    """Same flags, 1, 2 and 4 processes: the same data and dropout, losses equal to 1e-5 in float32."""
    curves = []
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        process = start(ranks, flags(workshop, out, steps=5, dropout=0.1, packing="padded"))
        assert process.wait(120) == 0, process.stdout.read()
        curves.append([(float(row["loss"]), float(row["kl"]), int(row["tokens"])) for row in log_rows(out)])
    for step in range(5):
        assert curves[0][step] == pytest.approx(curves[1][step], rel=1e-5)
        assert curves[0][step] == pytest.approx(curves[2][step], rel=1e-5)


def test_micro_batches_that_cannot_be_shared_are_refused(workshop, tmp_path):
    process = start(2, flags(workshop, tmp_path / "out", **{"grad-accum": 3}))
    assert "cannot be shared evenly by 2" in process.communicate(timeout=60)[0] and process.returncode != 0


# ------------------------------------------------------------------------------------ the README's command
def test_the_demo_in_a_few_steps(tmp_path, monkeypatch, capsys):
    """`python distill.py`, offline, with the shipped teacher, in 3 steps; it may replace its own output."""
    monkeypatch.setattr(runtime, "bf16_is_fast", lambda device: False)
    argv = ["--steps", "3", "--batch-size", "2", "--eval-tokens", "2000", "--out", tmp_path / "out",
            "--data-folder", tmp_path / "corpora", "--workers", "2"]
    for replaced in (False, True):
        code, printed, error = call(monkeypatch, capsys, argv)
        assert code == 0, error
        assert ("has a finished demo, which goes" in printed) == replaced
    names = [line.split()[1] for line in printed.splitlines() if re.match(r"\| \w", line)]
    assert names == ["model", "teacher", "student", "control"]


@pytest.mark.parametrize("bf16, fast", [(0.3, True), (1.2, True), (4.0, False)])
def test_bf16_is_fast_unless_it_is_clearly_slower(monkeypatch, bf16, fast):
    """A machine that is busy for a moment must not decide between two precisions."""
    now = 0.0
    durations = (0.0, bf16, 0.0, 1.0)  # of a product in bf16, and one in float32
    busy = (0.0, 100.0, 0.0, 100.0)
    disturbed = iter([*busy, *durations * 18, *busy])

    def clock():
        nonlocal now
        now += next(disturbed)
        return now

    monkeypatch.setattr(runtime.time, "perf_counter", clock)
    assert runtime.bf16_is_fast(torch.device("cpu")) == fast


def test_a_resumed_run_keeps_its_precision(monkeypatch):
    """What is fast is measured, so the answer can change between two starts."""
    ranks = runtime.Ranks("cpu")
    monkeypatch.setattr(runtime, "bf16_is_fast", lambda device: True)
    assert runtime.pick_precision("auto", "fp32", ranks) == "fp32"
    assert runtime.pick_precision("auto", None, ranks) == "bf16"
    assert runtime.pick_precision("bf16-pure", "fp32", ranks) == "bf16-pure"


def test_an_unfinished_demo_is_not_overwritten(tmp_path):
    """A finished one is, as everyone tries the first command twice."""
    (tmp_path / "args.json").write_text('{"recipe": "demo", "teacher": "t", "kd_weight": 1}')
    folder = state.RunFolder(distill.parse_args(["--out", str(tmp_path)]), runtime.Ranks("cpu"))
    with pytest.raises(InputError, match="holds another run"):
        folder.claim()
    (tmp_path / "README.md").write_text("the card, written last")
    folder.claim()
    folder.release()


def test_a_larger_corpus_changes_nothing(workshop, tmp_path, monkeypatch, capsys):
    """Another run may have left more tokens behind than this one uses."""
    monkeypatch.setattr(distill, "LEAST_TOKENS", 1)
    losses = {}
    for name, steps in (("before", 2), ("larger", 9), ("after", 2)):
        argv = flags(workshop, tmp_path / name, steps=steps, **{"data-folder": tmp_path / "corpora"})
        code, _, error = call(monkeypatch, capsys, argv)
        assert code == 0, error
        losses[name] = [row["loss"] for row in log_rows(tmp_path / name)]
    assert losses["before"] == losses["after"]
