"""The teacher on disk: the loss from draws is right on average, and a cache is whole, fits, or is refused."""
import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from workshop import ROOT, call, difference, flags, log_rows, weights

import distill
from data import examples_at, target_offsets
from model import GPT2
from support import teacher_cache
from support.chunked_loss import chunked_loss
from support.cli import InputError
from support.files import locked
from support.ranks import Ranks
from support.teacher_cache import Draws, TeacherCache, answers_to, draw_tokens, draws_loss

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------ the loss from draws
def loss_inputs(N=50, C=24, V=97):
    """Hidden states and heads of student and teacher, and targets, of which 42 count."""
    torch.manual_seed(0)
    student = [torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)]
    teacher = [0.7 * torch.randn(N, C), 0.7 * torch.randn(V, C)]
    targets = torch.randint(V, (N,))
    targets[::7] = -100
    return *student, *teacher, targets


def teachers_answers(inputs, T):
    """Of the counted tokens: the teacher's p at T (n, V), its entropy (n,), its CLM (n,)."""
    _, _, teacher_hidden, teacher_head, targets = inputs
    counted = targets != -100
    logits = (teacher_hidden @ teacher_head.T)[counted]
    p = (logits / T).softmax(-1)
    return p, torch.special.entr(p).sum(-1), F.cross_entropy(logits, targets[counted], reduction="none")


def random_draws(inputs, T, K, seed):
    p, entropy, clm = teachers_answers(inputs, T)
    offsets = 1 - torch.rand(len(p), 1, generator=torch.Generator().manual_seed(seed))
    return Draws(draw_tokens(p, offsets, K), torch.full((len(p), K), 1 / K), entropy, clm)


def loss_and_gradients(inputs, answers, **settings):
    """Losses, and the gradients of the student's hidden states and head. answers: Draws; None: the teacher's
    whole distribution."""
    student_hidden, student_head, teacher_hidden, teacher_head, targets = inputs
    teacher = (distill.plain_loss, teacher_hidden, teacher_head)
    loss_function, hidden, head = teacher if answers is None else (draws_loss, answers, None)
    losses = chunked_loss(
        loss_function, student_hidden, student_head, hidden, head, targets, distill.LossSettings(**settings))
    return losses, torch.autograd.grad(losses.loss, inputs[:2])


def deviation(samples, expected):
    """Mean square of (mean - expected), in standard errors: about 1 if only chance is between them."""
    samples = torch.stack(samples).double()
    error = samples.std(0) / len(samples)**0.5
    some = error > 1e-9
    return ((samples.mean(0) - expected)[some] / error[some]).square().mean().item()


def test_the_mean_gradient_is_that_of_the_whole_distribution():
    """Over 400 seeds, within its standard error."""
    inputs = loss_inputs()
    settings = {"temperature": 2.0, "kd_weight": 1.0, "clm_weight": 0.5, "chunk_size": 16}
    losses, (expected, expected_head) = loss_and_gradients(inputs, None, **settings)

    found = [loss_and_gradients(inputs, random_draws(inputs, 2.0, 4, seed), **settings)
             for seed in range(400)]
    hidden = [gradient for _, (gradient, _) in found]
    assert deviation(hidden, expected) < 1.3
    assert deviation([gradient for _, (_, gradient) in found], expected_head) < 1.3
    assert deviation([losses.kl for losses, _ in found], losses.kl) < 9  # one number: three standard errors
    assert found[0][0].clm.item() == pytest.approx(losses.clm.item(), rel=1e-6)
    assert found[0][0].teacher_clm.item() == pytest.approx(losses.teacher_clm.item(), rel=1e-5)
    assert found[0][0].tokens == losses.tokens == 42

    # The measure sees a missing factor T.
    _, (clm_alone, _) = loss_and_gradients(inputs, None, **settings | {"kd_weight": 0.0})
    assert deviation([clm_alone + 0.5 * (g - clm_alone) for g in hidden], expected) > 20


def test_the_loss_is_its_formula():
    """kd * T² * (-H - sum w * log q) + clm * CLM, whatever the weights of the draws: value and gradient in
    float64, and the same in any chunks."""
    inputs = loss_inputs()
    student_hidden, student_head, _, _, targets = inputs
    counted = targets != -100
    s = (student_hidden.double() @ student_head.double().T)[counted]
    clm = F.cross_entropy(s, targets[counted], reduction="sum")
    for T in (0.1, 1.0, 2.0, 4.0):
        draws = random_draws(inputs, T, 5, 0)
        any_weights = torch.rand(draws.ids.shape, generator=torch.manual_seed(1))
        for answers in (draws, draws._replace(weights=any_weights)):
            log_q = (s / T).log_softmax(-1).gather(1, answers.ids)
            kl = -answers.entropy.double().sum() - (answers.weights.double() * log_q).sum()
            loss = 5 * T**2 * kl + 2 * clm
            expected = torch.autograd.grad(loss, inputs[:2], retain_graph=True)
            for chunk_size in (7, 50):
                losses, gradients = loss_and_gradients(
                    inputs, answers, temperature=T, kd_weight=5.0, clm_weight=2.0, chunk_size=chunk_size)
                for ours, theirs in ((losses.loss, loss), (losses.kl, kl), (losses.clm, clm)):
                    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
                for ours, theirs in zip(gradients, expected, strict=True):
                    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_draws():
    """Each token K * p times, rounded down or up; what has no probability is never drawn."""
    p = torch.tensor([[0.5, 0.3, 0.2]])
    assert draw_tokens(p, torch.tensor([[0.1]]), 4).tolist() == [[0, 0, 1, 1]]

    torch.manual_seed(0)
    p = torch.randn(200, 50).mul(3).softmax(-1)
    p[:, [0, 7, 49]] = 0
    p /= p.sum(-1, keepdim=True)
    for offset in (2.0**-24, 0.5, 1.0):
        counts = F.one_hot(draw_tokens(p, torch.full((200, 1), offset), 12), 50).sum(1)
        assert ((counts - 12 * p).abs() < 1.001).all() and (counts[:, [0, 7, 49]] == 0).all()
    counts = sum(F.one_hot(draw_tokens(p, 1 - torch.rand(200, 1), 12), 50).sum(1) for _ in range(400))
    assert (counts / 400 / 12 - p).abs().max() < 0.01


def test_draws_must_fit_the_targets():
    inputs = loss_inputs()
    draws = random_draws(inputs, 2.0, 4, 0)
    with pytest.raises(ValueError, match="40 tokens, but 42 have a target"):
        loss_and_gradients(inputs, Draws(*(x[:40] for x in draws)))
    inputs[-1][:] = -100
    losses, gradients = loss_and_gradients(inputs, Draws(*(x[:0] for x in draws)))
    assert losses.loss == 0 and all((gradient == 0).all() for gradient in gradients)


# ------------------------------------------------------------------------------------ a cache on disk
EOT = 99
TOKENS = np.random.default_rng(0).integers(0, 99, 5000).astype(np.uint16)
TOKENS[::37] = EOT


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = GPT2(GPT2.config(vocab_size=110, context=16, width=16, n_head=2, n_layer=1)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.requires_grad_(False)


def settings(**changes):
    return Namespace(**{"teacher": "t", "data": "d", "packing": "constant", "seq_len": 16, "temperature": 2.0,
                        "cache_draws": 4, "precision": "fp32"} | changes)


def make(path, teacher, tokens=TOKENS, before=lambda numbers: None, **changes):
    """Have the cache at `path`, of a vocabulary of 100. before: called with each chunk to be answered."""
    args = settings(**changes)
    cut = args.seq_len, args.packing, EOT
    offsets = target_offsets(tokens, *cut)
    wanted = teacher_cache.wanted_header(args, teacher, Namespace(train=tokens), 100, offsets)

    def answers_of(numbers):
        before(numbers)
        ids, targets = examples_at(tokens, numbers, *cut)
        return answers_to(teacher, ids, targets, numbers, args, wanted)

    teacher_cache.make(path, wanted, answers_of, offsets, Ranks("cpu"), reads=len(tokens))
    return TeacherCache(path, offsets)


def content(folder):
    """{name: bytes} of all files in a folder; of a file, its bytes."""
    if folder.is_file():
        return folder.read_bytes()
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(*_):
    raise AssertionError("the teacher has answered before")


def test_draws_from_the_disk_are_those_of_the_teacher(teacher, tmp_path):
    """Of each example in any order, with both packings; one that was made before is used as it is."""
    for packing in ("constant", "padded"):
        make(tmp_path / packing, teacher, packing=packing)
        cache = make(tmp_path / packing, teacher, before=refuse, packing=packing)
        numbers = [5, 0, 130]
        ids, targets = examples_at(TOKENS, numbers, 16, packing, EOT)
        counted = targets != -100
        draws = cache.draws(numbers, CPU)
        logits = teacher(torch.from_numpy(ids))[torch.from_numpy(counted)][:, :100]
        p = (logits / 2).softmax(-1)
        clm = F.cross_entropy(logits, torch.from_numpy(targets[counted]), reduction="none")
        assert torch.allclose(draws.entropy, torch.special.entr(p).sum(-1), atol=1e-4)
        assert torch.allclose(draws.clm, clm, atol=1e-4)

        # The offset of an example's draws follows from its number.
        u = np.concatenate([np.random.default_rng(number).random(n, np.float32)
                            for number, n in zip(numbers, counted.sum(1), strict=True)])
        assert (draw_tokens(p, torch.from_numpy(1 - u[:, None]), 4) == draws.ids).float().mean() > 0.99
        assert (draws.weights == 0.25).all()


def test_the_format_of_older_caches(teacher, tmp_path):
    """32 bytes at 12 draws; what an older version wrote is read."""
    assert teacher_cache.row_type({"vocab_size": 2**16, "draws": 12}).itemsize == 32
    assert teacher_cache.row_type({"vocab_size": 2**16 + 1, "draws": 12}).itemsize == 56
    assert teacher_cache.fingerprint(distill.load(ROOT / "demo" / "teacher")) == "9197ad2a02cad35e"
    (tmp_path / "cache").mkdir()
    header = {
        "version": 1, "teacher": "elsewhere", "weights": teacher_cache.fingerprint(teacher), "data": "d",
        "corpus": hashlib.sha256(TOKENS.tobytes()).hexdigest()[:16], "packing": "constant", "seq_len": 16,
        "temperature": 2.0, "draws": 2, "vocab_size": 100, "precision": "fp32", "examples": 312,
        "tokens": 4992}
    (tmp_path / "cache" / "header.json").write_text(json.dumps(header))
    row = b"\x07\x00\x63\x00" + np.array([1.5, 2.5], "<f4").tobytes()
    (tmp_path / "cache" / "answers.bin").write_bytes(row * 4992)
    draws = make(tmp_path / "cache", teacher, before=refuse, cache_draws=2).draws([0], CPU)
    assert draws.ids.tolist() == [[7, 99]] * 16
    assert draws.entropy.tolist() == [1.5] * 16 and draws.clm.tolist() == [2.5] * 16


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_build_goes_on_and_has_the_same_bytes(teacher, tmp_path, monkeypatch):
    """Killed as SIGKILL does it: each chunk that is answered is kept."""
    monkeypatch.setattr(teacher_cache, "CHUNK_TOKENS", 512)  # 10 chunks
    make(tmp_path / "whole", teacher)
    for last in (2, 8):
        if os.fork() == 0:
            try:
                make(tmp_path / "killed", teacher,
                     before=lambda numbers, last=last: numbers.start // 32 == last and os._exit(9))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 9
        assert not (tmp_path / "killed").exists()
        assert (tmp_path / "killed.part" / "done.bin").read_bytes().count(1) == last

    answered = []
    make(tmp_path / "killed", teacher, before=lambda numbers: answered.append(numbers.start // 32))
    assert answered == [8, 9]
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert content(tmp_path / "killed").keys() == {"header.json", "answers.bin"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_two_at_once_wait_for_each_other(teacher, tmp_path):
    """The second waits for the lock, finds the cache made, and uses it."""
    seen = []
    with locked(tmp_path, "a test", name="cache"):
        second = threading.Thread(target=make, args=(tmp_path / "cache", teacher, TOKENS, seen.append))
        second.start()
        time.sleep(0.3)
        assert not seen and not (tmp_path / "cache.part").exists()
        (tmp_path / "elsewhere").mkdir()
        make(tmp_path / "elsewhere" / "cache", teacher)
        (tmp_path / "elsewhere" / "cache").rename(tmp_path / "cache")
    second.join(30)
    assert not seen and (tmp_path / "cache" / "answers.bin").exists()


def test_names_of_the_user_are_left_alone(teacher, tmp_path):
    (tmp_path / "mine.txt").write_text("a week's notes")
    (tmp_path / "cache.lock").symlink_to("mine.txt")
    (tmp_path / "cache.tmp").write_text("mine, too")
    (tmp_path / "cache4").write_text("a file")
    for name in ("cache2.part", "cache3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "answers.bin").write_text("mine")
    before = content(tmp_path)
    for name in ("cache2", "cache3", "cache4"):
        with pytest.raises(InputError, match=f"{name}.* is not a teacher's cache"):
            make(tmp_path / name, teacher)
    assert content(tmp_path) == before
    (tmp_path / "cache").mkdir()  # an empty folder becomes a cache
    make(tmp_path / "cache", teacher)
    assert {name: content(tmp_path)[name] for name in before} == before


def test_a_cache_that_does_not_fit_is_refused_and_kept(teacher, tmp_path):
    make(tmp_path / "cache", teacher)
    before = content(tmp_path)
    other_text = TOKENS.copy()
    other_text[1] += 1
    other_teacher = GPT2(teacher.config)
    for changes, message in (
        ({"temperature": 4.0}, "temperature 2.0 there, 4.0 here"),
        ({"cache_draws": 5}, "draws 4 there, 5 here"),
        ({"packing": "padded"}, "version 1 there, 2 here; packing constant there, padded here"),
        ({"seq_len": 8}, "seq_len 16 there, 8 here"),
        ({"precision": "bf16"}, "precision fp32 there, bf16 here"),
        ({"teacher": other_teacher}, "on d: weights "),
        ({"tokens": other_text}, "corpus "),
    ):
        with pytest.raises(InputError, match=message):
            make(tmp_path / "cache", before=refuse, **{"teacher": teacher, **changes})
    assert content(tmp_path) == before


def test_a_run_that_needs_less_text_uses_the_beginning(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "HEAD_TOKENS", 64)
    large = make(tmp_path / "cache", teacher).draws([7], CPU)
    small = make(tmp_path / "cache", teacher, TOKENS[:1000], before=refuse).draws([7], CPU)
    assert all(torch.equal(a, b) for a, b in zip(large, small, strict=True))
    make(tmp_path / "small", teacher, TOKENS[:1000])
    with pytest.raises(InputError, match="answers for 992 tokens of this text, and this run reads 4,992"):
        make(tmp_path / "small", teacher)


def test_damage_is_one_line_and_nothing_is_lost(teacher, tmp_path):
    make(tmp_path / "cache", teacher)
    for file, change, message in (
        ("answers.bin", lambda old: old[:-1], "instead of 79,872. Delete the folder"),
        ("answers.bin", lambda old: b"\x64\x00" + old[2:], "values that no teacher gives. Delete the folder"),
        ("answers.bin", lambda old: old[:8] + b"\xff" * 8 + old[16:], "values that no teacher gives."),
        ("header.json", lambda old: b"[]", "is not the header of a teacher's cache"),
        ("header.json", lambda old: old.replace(b"4992", b'"many"'), "is not the header"),
        ("header.json", lambda old: old.replace(b"packing", b"unpacking"), "packing None there, constant"),
    ):
        path = tmp_path / "cache" / file
        before = path.read_bytes()
        path.write_bytes(change(before))
        damaged = path.read_bytes()
        with pytest.raises(InputError, match=message):
            make(tmp_path / "cache", teacher, before=refuse).draws([0], CPU)
        assert path.read_bytes() == damaged
        path.write_bytes(before)


def test_a_full_disk(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "CHUNK_TOKENS", 512)

    def full(numbers):
        if numbers.start == 96:
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="cache: No space left on device. The answers so far are kept"):
        make(tmp_path / "cache", teacher, before=full)
    answered = []
    make(tmp_path / "cache", teacher, before=lambda numbers: answered.append(numbers.start))
    assert answered[0] == 96


def test_an_unfinished_cache_of_other_settings_is_kept(teacher, tmp_path):
    def killed(numbers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cache", teacher, before=killed)
    before = content(tmp_path)
    for changes, message in (({"temperature": 3.0}, "cache.part .*temperature 2.0 there"),
                             ({"tokens": TOKENS[:-32]}, "cache.part .*corpus")):
        with pytest.raises(InputError, match=message):
            make(tmp_path / "cache", teacher, **changes)
    assert content(tmp_path) == before


def test_a_teacher_that_answers_with_nan_makes_no_cache(teacher, tmp_path):
    broken = GPT2(teacher.config)
    broken.norm.weight.data.fill_(float("inf"))
    with pytest.raises(InputError, match="answers with NaN or infinity"):
        make(tmp_path / "cache", broken)
    assert not (tmp_path / "cache").exists()


# ------------------------------------------------------------------------------------ distill.py with a cache
def cached(folder, **changes):
    """Settings of a run with the cache folder/cache, for the functions of workshop.py."""
    return {"teacher_cache": folder / "cache", "cache_draws": 4, "control": None, **changes}


def test_a_second_run_uses_the_cache(workshop, distil, tmp_path, monkeypatch):
    """Another student, rate, seed and batch; no teacher answers, and none is in memory while it trains."""
    distil(tmp_path / "a", **cached(tmp_path, steps=1))
    before = content(tmp_path / "cache")
    honest = distill.train

    def watched(args, student, teacher, *rest):
        gc.collect()
        assert teacher is None
        assert not [x for x in gc.get_objects() if type(x) is GPT2 and len(x.blocks) == 4]
        return honest(args, student, teacher, *rest)

    monkeypatch.setattr(teacher_cache, "answers_to", refuse)
    monkeypatch.setattr(distill, "train", watched)
    printed = distil(tmp_path / "b", **cached(
        tmp_path, student=workshop / "small", student_layers=None, kd_weight=1, clm_weight=0, lr=1e-2, seed=3,
        batch_size=4, grad_accum=2, steps=30, control=True))
    kl = [float(row["kl"]) for row in log_rows(tmp_path / "b")]
    assert sum(kl[-5:]) < 0.95 * sum(kl[:5])
    assert content(tmp_path / "cache") == before
    assert "KL(teacher || student, T = 1, 4 draws)" in printed
    assert {float(row["kl"]) for row in log_rows(tmp_path / "b" / "control")} == {0}


def test_a_killed_run_goes_on_with_the_same_bits(workshop, distil, tmp_path, monkeypatch, capsys):
    changes = cached(tmp_path, steps=6, save_interval=2, dropout=0.1)
    distil(tmp_path / "whole", **changes)
    honest = distill.Run.finish_step

    def killed(run, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        honest(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(distill.Run, "finish_step", killed)
        assert call(patch, capsys, flags(workshop, tmp_path / "killed", **changes)).code == 130
    distil(tmp_path / "killed", **changes, resume=True)
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0


def test_two_ranks_make_the_same_cache_and_learn_the_same(workshop, distil, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "distill.py"), *flags(workshop, two / "out", **cached(two))]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        distil(one / "out", **cached(one))
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
    assert content(two / "cache") == content(one / "cache")
    for by_one, by_two in zip(log_rows(one / "out"), log_rows(two / "out"), strict=True):
        for name in ("loss", "kl", "teacher_clm", "tokens"):
            assert float(by_one[name]) == pytest.approx(float(by_two[name]), rel=1e-5)


def test_what_draws_cannot_give(workshop, refused, tmp_path):
    no_teacher = {"teacher": "none", "student": workshop / "small", "student_layers": None}
    on_policy = {"on_policy": 0.5, "kd_weight": 1, "clm_weight": 0}
    for changes in ({"divergence": "reverse"}, {"cos_weight": 1}, no_teacher, on_policy):
        refused(tmp_path / "out", "--teacher-cache needs", **cached(tmp_path, **changes))
