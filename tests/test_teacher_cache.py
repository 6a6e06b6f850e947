"""The teacher on disk: the loss from draws is right on average, and a cache is whole, fits, or is refused."""
import argparse
import gc
import json
import shutil

import numpy as np
import pytest
import torch
from test_distill import call, close, difference, flags, log_rows, loss_inputs, start, weights
from test_distill import workshop as workshop  # the fixture
from test_run import content, refused
from torch.nn import functional as F

import distill
from data import Corpus, batch_at, cut, examples_at, numbers_at, target_offsets
from model import GPT2
from support import card, outlook, teacher_cache
from support import run as run_module
from support.chunked_loss import LossSettings, chunked_losses
from support.cli import InputError
from support.sparse_loss import Draws, draw_tokens
from support.teacher_cache import TeacherCache, row_type


# ------------------------------------------------------------------------------------ the loss from draws
def distributions(inputs, T):
    """Of the counted tokens: the teacher's p at T (n, V), its entropy (n,), its CLM (n,)."""
    _, _, teacher_hidden, teacher_head, targets = inputs
    counted = targets != -100
    logits = (teacher_hidden @ teacher_head.T)[counted]
    p = (logits / T).softmax(-1)
    entropy = torch.distributions.Categorical(p).entropy()
    return p, entropy, F.cross_entropy(logits, targets[counted], reduction="none")


def random_draws(inputs, T, K, seed):
    p, entropy, clm = distributions(inputs, T)
    offsets = 1 - torch.rand(len(p), 1, generator=torch.Generator().manual_seed(seed))
    return Draws(draw_tokens(p, offsets, K), torch.full((len(p), K), 1 / K), entropy, clm)


def likeliest(inputs, T, K):
    """What others keep: the K likeliest tokens, which then share all of the probability."""
    p, entropy, clm = distributions(inputs, T)
    top, ids = p.topk(K)
    return Draws(ids, top / top.sum(-1, keepdim=True), entropy, clm)


def loss_and_gradients(inputs, answers, settings):
    student_hidden, student_head, _, teacher_head, targets = inputs
    head = None if isinstance(answers, Draws) else teacher_head
    losses = chunked_losses(student_hidden, student_head, answers, head, targets, settings)
    return losses, torch.autograd.grad(losses.loss, inputs[:2])


def deviation(samples, expected):
    """Mean square of (mean - expected), in standard errors: about 1 where only chance is between them."""
    samples = torch.stack(samples).double()
    error = samples.std(0) / len(samples)**0.5
    some = error > 1e-9
    return ((samples.mean(0) - expected)[some] / error[some]).square().mean().item()


def test_the_mean_gradient_is_that_of_the_whole_distribution():
    """Over 400 seeds, within its standard error; and the measure sees what is wrong."""
    T, K = 2.0, 4
    inputs = loss_inputs(scale=0.7)
    settings = LossSettings(T, 1.0, 0.5, chunk_size=16)
    losses, (expected, expected_head) = loss_and_gradients(inputs, inputs[2], settings)

    found = [loss_and_gradients(inputs, random_draws(inputs, T, K, seed), settings) for seed in range(400)]
    hidden = [gradient for _, (gradient, _) in found]
    assert deviation(hidden, expected) < 1.3
    assert deviation([gradient for _, (_, gradient) in found], expected_head) < 1.3
    assert deviation([losses.kl for losses, _ in found], losses.kl) < 9  # one number: three standard errors
    for losses_found, _ in found[:3]:
        assert losses_found.clm == losses.clm and losses_found.tokens == losses.tokens == 42
        assert losses_found.teacher_clm.item() == pytest.approx(losses.teacher_clm.item(), rel=1e-5)

    # Without the factor T, with it twice, and with one draw that is taken for another.
    clm_alone = loss_and_gradients(inputs, inputs[2], LossSettings(T, 0.0, 0.5))[1][0]
    for wrong in (1 / T, T):
        assert deviation([clm_alone + wrong * (g - clm_alone) for g in hidden], expected) > 20
    shifted = []
    for seed in range(100):
        draws = random_draws(inputs, T, K, seed)
        ids = draws.ids.clone()
        ids[:, 0] = (ids[:, 0] + 1) % 97
        shifted.append(loss_and_gradients(inputs, draws._replace(ids=ids), settings)[1][0])
    assert deviation(shifted, expected) > 5


def test_the_likeliest_tokens_are_not_right_however_many_steps_are_made():
    """Why there are draws: they have noise, which averages out; the top K have an error, which does not."""
    inputs = loss_inputs(scale=0.7)
    settings = LossSettings(2.0, 1.0, 0.0)
    expected = loss_and_gradients(inputs, inputs[2], settings)[1][0]
    found = [loss_and_gradients(inputs, random_draws(inputs, 2.0, 12, seed), settings)[1][0]
             for seed in range(100)]
    of_top = loss_and_gradients(inputs, likeliest(inputs, 2.0, 12), settings)[1][0]
    assert (torch.stack(found).mean(0) - expected).norm() < 0.3 * (of_top - expected).norm()


@pytest.mark.parametrize("T", [0.5, 2.0])
def test_many_draws_are_the_whole_distribution(T):
    inputs = loss_inputs(scale=0.7)
    settings = LossSettings(T, 0.9, 0.1, chunk_size=16)
    losses, gradients = loss_and_gradients(inputs, inputs[2], settings)
    found, found_gradients = loss_and_gradients(inputs, random_draws(inputs, T, 20_000, 0), settings)
    assert found.loss.item() == pytest.approx(losses.loss.item(), rel=1e-3)
    assert found.kl.item() == pytest.approx(losses.kl.item(), rel=1e-3)
    assert all(close(a, b, relative=1e-3) for a, b in zip(found_gradients, gradients, strict=True))


@pytest.mark.parametrize("T", [0.1, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 16, 50, 1000])
@pytest.mark.parametrize("weights_of", ["draws", "likeliest", "any"])
def test_loss_and_gradients_equal_float64_autograd(T, chunk_size, weights_of):
    """kd * T² * (-H - sum w * log q) + clm * CLM, whatever the weights."""
    inputs = loss_inputs()
    draws = likeliest(inputs, T, 5) if weights_of == "likeliest" else random_draws(inputs, T, 5, 0)
    if weights_of == "any":
        draws = draws._replace(weights=torch.rand(draws.ids.shape, generator=torch.manual_seed(1)))
    settings = LossSettings(T, 5.0, 2.0, chunk_size=chunk_size)
    losses, gradients = loss_and_gradients(inputs, draws, settings)

    student_hidden, student_head, _, _, targets = inputs
    counted = targets != -100
    s = (student_hidden.double() @ student_head.double().T)[counted]
    log_q = (s / T).log_softmax(-1).gather(1, draws.ids)
    kl = -draws.entropy.double().sum() - (draws.weights.double() * log_q).sum()
    clm = F.cross_entropy(s, targets[counted], reduction="sum")
    loss = 5 * T**2 * kl + 2 * clm
    expected = torch.autograd.grad(loss, inputs[:2])
    for ours, theirs in ((losses.loss, loss), (losses.kl, kl), (losses.clm, clm)):
        assert close(ours, theirs)
    assert all(close(a, b) for a, b in zip(gradients, expected, strict=True))


def test_draws():
    """Each token K * p times, rounded down or up; what has no probability never comes."""
    p = torch.tensor([[0.5, 0.3, 0.2]])
    assert draw_tokens(p, torch.tensor([[0.1]]), 4).tolist() == [[0, 0, 1, 1]]

    torch.manual_seed(0)
    p = torch.randn(200, 50).mul(3).softmax(-1)
    p[:, [0, 7, 49]] = 0
    p /= p.sum(-1, keepdim=True)
    for offset in (2.0**-24, 0.5, 1.0):
        ids = draw_tokens(p, torch.full((200, 1), offset), 12)
        counts = F.one_hot(ids, 50).sum(1)
        assert ((counts - 12 * p).abs() < 1.001).all() and (counts[:, [0, 7, 49]] == 0).all()
    counts = sum(F.one_hot(draw_tokens(p, 1 - torch.rand(200, 1), 12), 50).sum(1) for _ in range(400))
    assert (counts / 400 / 12 - p).abs().max() < 0.01


def test_draws_fit_the_targets_and_the_loss():
    inputs = loss_inputs()
    draws = random_draws(inputs, 2.0, 4, 0)
    with pytest.raises(ValueError, match="draws for 40 tokens, but 42 have a target"):
        loss_and_gradients(inputs, Draws(*(x[:40] for x in draws)), LossSettings())
    for settings in (LossSettings(divergence="reverse"), LossSettings(cos_weight=1.0)):
        with pytest.raises(ValueError, match="no other term"):
            loss_and_gradients(inputs, draws, settings)
    inputs[-1][:] = -100
    losses, gradients = loss_and_gradients(inputs, Draws(*(x[:0] for x in draws)), LossSettings())
    assert losses.loss == 0 and all((gradient == 0).all() for gradient in gradients)


# ------------------------------------------------------------------------------------ a cache on disk
def cached(workshop, folder, **changes):
    """Flags of a run with the cache in folder/cache."""
    return flags(workshop, changes.pop("out", folder / "out"),
                 **{"teacher-cache": folder / "cache", "cache-draws": 4, **changes})


def corpus_of(workshop):
    return Corpus(next(path for path in (workshop / "corpora").iterdir() if (path / "meta.json").exists()))


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory):
    """A finished cache, of the flags of `cached`; each test that changes it gets a copy."""
    folder = tmp_path_factory.mktemp("finished")
    process = start(1, cached(workshop, folder, steps=1))
    assert process.wait(120) == 0, process.stdout.read()
    return folder / "cache"


@pytest.fixture
def cache(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "cache")
    return tmp_path / "cache"


def test_rows_are_32_bytes_at_12_draws(finished):
    assert row_type({"vocab_size": 2**16, "draws": 12}).itemsize == 32
    assert row_type({"vocab_size": 2**16 + 1, "draws": 12}).itemsize == 56
    header = json.loads((finished / "header.json").read_text())
    assert (finished / "answers.bin").stat().st_size == header["tokens"] * 16
    assert sorted(path.name for path in finished.iterdir()) == ["answers.bin", "header.json"]


@pytest.mark.parametrize("packing", ["constant", "padded"])
def test_what_is_on_disk_is_what_the_teacher_says(workshop, tmp_path, monkeypatch, capsys, packing):
    """A run's first step, with 2,000 draws, is that of the teacher; and so is each row."""
    changes = {"packing": packing, "steps": 1, "cache-draws": 2000}
    assert call(monkeypatch, capsys, cached(workshop, tmp_path, **changes))[0] == 0
    live = flags(workshop, tmp_path / "live", packing=packing, steps=1)
    assert call(monkeypatch, capsys, live)[0] == 0
    ours, theirs = log_rows(tmp_path / "out")[0], log_rows(tmp_path / "live")[0]
    assert ours["tokens"] == theirs["tokens"] and ours["clm"] == theirs["clm"]
    assert float(ours["teacher_clm"]) == pytest.approx(float(theirs["teacher_clm"]), rel=1e-5)
    for name in ("kl", "loss", "grad_norm"):
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=0.01), name

    corpus = corpus_of(workshop)
    offsets = target_offsets(corpus.train, 16, packing, corpus.eot)
    cache = TeacherCache(tmp_path / "cache", offsets)
    teacher = distill.load(workshop / "teacher")
    numbers = [3, 0, len(offsets) - 2]
    draws = cache.draws(numbers, torch.device("cpu"))
    ids, targets = map(torch.from_numpy, examples_at(corpus.train, numbers, 16, packing, corpus.eot))
    counted = targets.flatten() != -100
    with torch.no_grad():
        logits = teacher(ids).flatten(0, 1)[counted, :4096]
    p = (logits / 2).softmax(-1)
    assert len(draws.ids) == counted.sum() and len(cache.rows) == offsets[-1]
    assert torch.allclose(draws.entropy, torch.distributions.Categorical(p).entropy(), atol=1e-4)
    assert torch.allclose(draws.clm, F.cross_entropy(logits, targets.flatten()[counted], reduction="none"),
                          atol=1e-4)
    counts = torch.zeros_like(p).scatter_add_(1, draws.ids, draws.weights)
    assert (counts - p).abs().max() < 1.1 / 2000


def test_where_targets_stand():
    tokens = np.array([0, 5, 6, 7, 0, 8, 0, 1, 2, 3, 4, 9], np.uint16)
    assert [*target_offsets(tokens, 4, "padded", 0)] == [0, 3, 4, 8]
    assert [*target_offsets(tokens, 4, "constant", 0)] == [0, 4, 8]
    for packing in ("constant", "padded"):
        offsets = target_offsets(tokens, 4, packing, 0)
        n = len(cut(tokens, 4, packing, 0)[0])
        _, targets = examples_at(tokens, range(n), 4, packing, 0)
        assert [*(targets != -100).sum(1)] == [*np.diff(offsets)]
        numbers = numbers_at(5, 1, 2, n)
        for a, b in zip(batch_at(tokens, 5, 1, 2, 4, packing, 0),
                        examples_at(tokens, numbers, 4, packing, 0), strict=True):
            assert (a == b).all()


def test_a_second_run_uses_it_at_once(cache, workshop, tmp_path, monkeypatch, capsys):
    """Another student, weights, rate, seed and batch; no teacher answers, and none is in memory."""
    def refuse(*_):
        raise AssertionError("the teacher has answered before")

    honest = distill.train

    def watched(args, student, teacher, *rest):
        gc.collect()
        alive = [x for x in gc.get_objects() if type(x) is GPT2 and len(x.blocks) == 4]
        assert teacher is None and not alive
        return honest(args, student, teacher, *rest)

    monkeypatch.setattr(teacher_cache, "answers_to", refuse)
    monkeypatch.setattr(distill, "train", watched)
    before = content(cache)
    changes = {"student": workshop / "small", "student-layers": None, "kd-weight": 1, "clm-weight": 0,
               "lr": 1e-2, "seed": 3, "batch-size": 4, "grad-accum": 2, "steps": 30, "control": True}
    code, printed, error = call(monkeypatch, capsys, cached(workshop, tmp_path, **changes))
    assert code == 0, error
    kl = [float(row["kl"]) for row in log_rows(tmp_path / "out")]
    assert sum(kl[-5:]) < 0.95 * sum(kl[:5]) and content(cache) == before
    assert "KL(teacher || student, T = 2, 4 draws)" in printed and "it is there" in printed
    assert "T = 2, 4 draws" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    table = [line.split()[1] for line in printed.splitlines() if line.startswith("| ")]
    assert [name for name in table if name.isalpha()] == ["model", "teacher", "student", "control"]
    assert {row["kl"] for row in log_rows(tmp_path / "out" / "control")} == {"0"}


def test_a_killed_build_goes_on_and_has_the_same_bytes(finished, workshop, tmp_path, monkeypatch, capsys):
    """Killed after some chunks, once before they are noted, twice after."""
    monkeypatch.setattr(teacher_cache, "CHUNK_TOKENS", 1024)
    assert call(monkeypatch, capsys, cached(workshop, tmp_path / "whole", steps=1))[0] == 0
    honest = teacher_cache.answers_to
    answered = []

    def killed(teacher, ids, targets, numbers, *rest):
        if len(answered) in (3, 6, 9):
            answered.append(None)
            raise KeyboardInterrupt
        answered.append(numbers)
        return honest(teacher, ids, targets, numbers, *rest)

    def lost(build):
        raise KeyboardInterrupt

    monkeypatch.setattr(teacher_cache, "answers_to", killed)
    argv = cached(workshop, tmp_path / "killed", steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.Build, "save", lost)
        assert call(patch, capsys, argv)[0] == 130
    for _ in range(2):
        assert call(monkeypatch, capsys, argv)[0] == 130
        assert not (tmp_path / "killed" / "cache").exists()
    assert call(monkeypatch, capsys, argv)[0] == 0
    chunks = [numbers.start // 64 for numbers in answered if numbers]
    assert chunks[:9] == [0, 1, 2, 0, 1, 2, 3, 4, 5]  # of the first three nothing was noted, then all was
    assert content(tmp_path / "killed" / "cache") == content(tmp_path / "whole" / "cache")
    assert not (tmp_path / "killed" / "cache.part").exists()


def test_two_ranks_make_the_same_cache_and_learn_the_same(cache, workshop, tmp_path, monkeypatch, capsys):
    changes = {"steps": 4, "dropout": 0.1}
    process = start(2, cached(workshop, tmp_path / "two", **changes))
    assert call(monkeypatch, capsys, cached(workshop, tmp_path, **changes))[0] == 0
    assert process.wait(120) == 0, process.stdout.read()

    header = teacher_cache.read_header(cache)
    assert header["examples"] > teacher_cache.examples_of_chunk(header), "one for each rank"
    assert content(tmp_path / "two" / "cache") == content(cache)
    columns = ("loss", "kl", "teacher_clm", "tokens")
    curves = [[[float(row[name]) for name in columns] for row in log_rows(out)]
              for out in (tmp_path / "out", tmp_path / "two" / "out")]
    for one, two in zip(*curves, strict=True):
        assert one == pytest.approx(two, rel=1e-5)


def test_a_killed_run_ends_with_the_same_bits(cache, workshop, tmp_path, monkeypatch, capsys):
    changes = {"steps": 6, "save-interval": 2, "dropout": 0.1, "packing": "constant"}
    assert call(monkeypatch, capsys, cached(workshop, tmp_path, out=tmp_path / "whole", **changes))[0] == 0
    honest = run_module.Run.finish_step

    def killed(run, step, *rest):
        if step == 3:
            raise KeyboardInterrupt
        honest(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "finish_step", killed)
        assert call(patch, capsys, cached(workshop, tmp_path, **changes))[0] == 130
    for other, message in (({"cache-draws": 5}, "--cache-draws was 4, now 5"),
                           ({"teacher-cache": None}, "--teacher-cache was")):
        argv = cached(workshop, tmp_path, **changes, resume=True, **other)
        refused(call(monkeypatch, capsys, argv), message)
    assert call(monkeypatch, capsys, cached(workshop, tmp_path, **changes, resume=True))[0] == 0
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "out")) == 0
    assert [row["step"] for row in log_rows(tmp_path / "out")] == [*"123456"]


# ------------------------------------------------------------------------------------ what does not fit
OTHERS = {
    "temperature": ({"temperature": 4}, "--temperature 2.0 there, 4.0 here"),
    "draws": ({"cache-draws": 5}, "--cache-draws 4 there, 5 here"),
    "packing": ({"packing": "padded"}, "--packing constant there, padded here"),
    "length": ({"seq-len": 8}, "--seq-len 16 there, 8 here"),
    "precision": ({"precision": "bf16"}, "--precision fp32 there, bf16 here"),
    "text": ({"data": "other-text"}, "text to train on"),
    "teacher": ({"teacher": "other-teacher"}, ": teacher "),
    "too few": ({}, "has answers for 160 tokens of this text, and this run reads"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_cache_is_refused_and_kept(cache, workshop, tmp_path, monkeypatch, capsys, name):
    changes, message = OTHERS[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workshop / "text", tmp_path / "other-text")
    (tmp_path / "other-text" / "00.txt").write_text("another first document " * 50)
    shutil.copytree(workshop / "teacher", tmp_path / "other-teacher")
    teacher = distill.load(workshop / "teacher")
    teacher.blocks[3].mlp.down.weight.data[0, 0] += 0.01
    teacher.save(tmp_path / "other-teacher")
    if name == "too few":
        header = json.loads((cache / "header.json").read_text())
        (cache / "header.json").write_text(json.dumps({**header, "examples": 10, "tokens": 160}))
        (cache / "answers.bin").write_bytes((cache / "answers.bin").read_bytes()[:160 * 16])
    before = content(cache)
    code, printed, error = call(monkeypatch, capsys, cached(workshop, tmp_path, **changes))
    refused((code, printed, error), message, "cache")
    assert "it is there" not in printed
    assert (": teacher " in error) == (name == "teacher")  # rounded weights are no other teacher
    assert content(cache) == before and not (tmp_path / "out").exists()


def test_the_same_teacher_by_another_name_fits(cache, workshop, tmp_path, monkeypatch, capsys):
    shutil.copytree(workshop / "teacher", tmp_path / "moved")
    argv = cached(workshop, tmp_path, teacher=tmp_path / "moved", steps=1)
    code, _, error = call(monkeypatch, capsys, argv)
    assert code == 0, error


def test_a_run_that_needs_fewer_examples_uses_the_first_ones(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "LEAST_TOKENS", 1)
    monkeypatch.setattr(teacher_cache, "HEAD_TOKENS", 64)
    losses = {}
    for name, steps, folder in (("large", 4, "a"), ("prefix", 2, "a"), ("own", 2, "b")):
        argv = cached(workshop, tmp_path / folder, out=tmp_path / name, steps=steps)
        code, _, error = call(monkeypatch, capsys, argv)
        assert code == 0, error
        losses[name] = [row["loss"] for row in log_rows(tmp_path / name)]
    assert losses["prefix"] == losses["own"] != losses["large"][:2]
    refused(call(monkeypatch, capsys, cached(workshop, tmp_path / "b", steps=3)), "256 tokens", "reads 384")


FOREIGN = {
    "a file": lambda path: path.write_text("mine"),
    "a folder with a file": lambda path: (path.mkdir(), (path / "thesis.txt").write_text("mine")),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_cache_is_never_touched(workshop, tmp_path, monkeypatch, capsys, name):
    FOREIGN[name](tmp_path / "cache")
    before = content(tmp_path)
    refused(call(monkeypatch, capsys, cached(workshop, tmp_path)), "is no cache of a teacher")
    assert content(tmp_path) == before


def test_an_empty_folder_becomes_a_cache(workshop, tmp_path, monkeypatch, capsys):
    (tmp_path / "cache").mkdir()
    assert call(monkeypatch, capsys, cached(workshop, tmp_path, steps=1))[0] == 0
    assert (tmp_path / "cache" / "header.json").exists()


DAMAGES = {
    "truncated": ("answers.bin", lambda old: old[:-1]),
    "no answers": ("answers.bin", lambda old: b""),
    "ids beyond the vocabulary": ("answers.bin", lambda old: b"\xff" * len(old)),
    "an empty header": ("header.json", lambda old: b""),
    "a header that is a list": ("header.json", lambda old: b"[]"),
    "draws that are no number": ("header.json", lambda old: old.replace(b'"draws": 4', b'"draws": "4"')),
    "no tokens": ("header.json", lambda old: old.replace(b'"tokens"', b'"spoken"')),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_line(cache, workshop, tmp_path, monkeypatch, capsys, name):
    file, change = DAMAGES[name]
    (cache / file).write_bytes(change((cache / file).read_bytes()))
    before = content(cache)
    refused(call(monkeypatch, capsys, cached(workshop, tmp_path)), "is damaged", "makes it anew")
    assert content(cache) == before


def test_a_full_disk_is_told_before_it_starts(workshop, tmp_path, monkeypatch, capsys):
    usage = argparse.Namespace(free=2_000_000)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda folder: usage)
    refused(call(monkeypatch, capsys, cached(workshop, tmp_path, **{"cache-draws": 500})),
            "MB, and the disk has 2 MB", "fewer --cache-draws")
    assert not [*tmp_path.iterdir()]


def test_a_disk_that_fills_up_keeps_what_is_done(workshop, tmp_path, monkeypatch, capsys):
    def full(build, chunk, rows):
        raise OSError(28, "No space left on device", "answers.bin")

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache.Build, "add", full)
        refused(call(patch, capsys, cached(workshop, tmp_path)), "No space left on device", "goes on")
    assert call(monkeypatch, capsys, cached(workshop, tmp_path, steps=1))[0] == 0


def test_an_unfinished_cache_of_other_settings_is_kept(workshop, tmp_path, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "answers_to", killed)
        assert call(patch, capsys, cached(workshop, tmp_path))[0] == 130
    before = content(tmp_path / "cache.part")
    refused(call(monkeypatch, capsys, cached(workshop, tmp_path, temperature=3)), "unfinished", "temperature")
    assert content(tmp_path / "cache.part") == before


def test_a_teacher_that_answers_with_nan_makes_no_cache(workshop, tmp_path, monkeypatch, capsys):
    honest = distill.load_models

    def poisoned(*arguments):
        tokenizer, teacher, student = honest(*arguments)
        teacher.norm.weight.data.fill_(float("inf"))
        return tokenizer, teacher, student

    monkeypatch.setattr(distill, "load_models", poisoned)
    refused(call(monkeypatch, capsys, cached(workshop, tmp_path)), "answers with NaN or infinity")
    assert not (tmp_path / "cache").exists()


NOT_TOGETHER = {
    "no teacher": {"teacher": "none", "student": "small", "student-layers": None},
    "reverse": {"divergence": "reverse"},
    "on-policy": {"on-policy": 0.5, "kd-weight": 1, "clm-weight": 0},
    "cosine": {"cos-weight": 1},
    "plain": {"loss": "plain"},
}


@pytest.mark.parametrize("name", NOT_TOGETHER)
def test_what_draws_cannot_give(workshop, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(workshop)
    argv = cached(workshop, tmp_path, **NOT_TOGETHER[name])
    refused(call(monkeypatch, capsys, argv), "--teacher-cache needs")


def test_the_plan_counts_no_teacher():
    teacher = GPT2(GPT2.config(vocab_size=500, context=64, width=256, n_layer=12, n_head=2))
    student = GPT2(GPT2.config(vocab_size=500, context=64, width=32, n_layer=4, n_head=2))
    argv = ["--teacher", "t", "--student-layers", "1", "--seq-len", "64", "--batch-size", "512",
            "--precision", "fp32"]
    live = distill.parse_args(argv)
    from_cache = distill.parse_args([*argv, "--teacher-cache", "cache"])
    needed = [outlook.memory_needed(args, teacher, student, 500) for args in (live, from_cache)]
    assert needed[0] - needed[1] == teacher.num_parameters() * 4 + 512 * 64 * 256 * 12 * 4
    ranks = argparse.Namespace(share=range)
    scoring = [outlook.work_to_follow(args, teacher, student, None, ranks)[1] for args in (live, from_cache)]
    assert scoring[1] > 2 * scoring[0]  # in micro-batches, which are smaller without a teacher

    # The control has no teacher either, and here micro-batches of half the size.
    halved = distill.parse_args([*argv, "--control-batch-size", "256"])
    _, for_student, for_control = outlook.work_to_follow(halved, teacher, student, student, ranks)
    _, alone, _ = outlook.work_to_follow(from_cache, teacher, student, student, ranks)
    assert for_control == pytest.approx(2 * alone) and for_control > 4 * for_student
    assert card.formula(from_cache).count("12 draws") == 1 and "draws" not in card.formula(live)


def test_a_header_is_of_another_format(cache, workshop, tmp_path):
    header = json.loads((cache / "header.json").read_text())
    (cache / "header.json").write_text(json.dumps({**header, "version": 2}))
    with pytest.raises(InputError, match="version of the format 2 there, 1 here"):
        teacher_cache.refuse_other(cache, teacher_cache.read_header(cache), header)
