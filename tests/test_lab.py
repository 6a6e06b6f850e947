"""extras/lab.py: the lesson's own code solves it, and each mistake is called by its name."""
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from workshop import flags

import distill
import model
from distill import LossSettings
from extras import lab
from extras.lab import CHECKS, examine
from extras.wrong_losses import MISTAKES
from support.cli import run_cli
from support.ranks import Ranks


# ------------------------------------------------------------------------------------ the lesson's own code
def kl_of_tokens(student_logits, teacher_logits, T):
    settings = LossSettings(temperature=T)
    no_targets = torch.zeros(1, dtype=torch.int64)
    rows = zip(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), strict=True)
    kl = [distill.plain_loss(s[None], t[None], no_targets, settings)[1] for s, t in rows]
    return torch.stack(kl).view(student_logits.shape[:2])


def filled_with(loss):
    """A loss of (B, L, V) logits and LossSettings in the place of distillation_loss."""
    def distillation_loss(student_logits, teacher_logits, targets, temperature, kd_weight, clm_weight):
        settings = LossSettings(temperature, kd_weight, clm_weight)
        return loss(student_logits, teacher_logits, targets, settings)[0]
    return distillation_loss


def plain(s, t, y, settings):
    return distill.plain_loss(s.flatten(0, 1), t.flatten(0, 1), y.flatten(), settings)


def step(micro_batches, loss_of, parameters):
    total = tokens = 0
    for micro_batch in micro_batches:
        loss, n_tokens = loss_of(micro_batch)
        loss.backward()
        total += loss.item()
        tokens += n_tokens
    student = SimpleNamespace(parameters=lambda: parameters)
    distill.divide_and_clip(student, torch.tensor(tokens), 0, Ranks("cpu"))
    return total / tokens


SOLUTIONS = {
    "kl_of_tokens": kl_of_tokens,
    "mixture": lambda kl, clm, T, kd_weight, clm_weight: kd_weight * T**2 * kl + clm_weight * clm,
    "distillation_loss": filled_with(plain),
    "step": step,
    "student_of": model.student_from,
}


def test_the_lessons_own_code_is_right():
    for name in CHECKS:
        assert examine(SOLUTIONS[name], name) == [], name
        assert examine(getattr(lab, name), name) is None, name  # the stubs are not written yet


# ------------------------------------------------------------------------------------ mistakes
def reverse(s, t, T):
    return kl_of_tokens(t, s, T)


def over_the_sequence(s, t, T):
    return F.kl_div((s / T).log_softmax(1), (t / T).softmax(-1), reduction="none").sum(-1)


def divided(by):
    """A step whose gradient is divided by(tokens of a micro-batch, all tokens, micro-batches)."""
    def step(micro_batches, loss_of, parameters):
        everything = sum(map(len, micro_batches))
        losses = []
        for micro_batch in micro_batches:
            loss, tokens = loss_of(micro_batch)
            (loss / by(tokens, everything, len(micro_batches))).backward()
            losses.append(loss.item())
        return sum(losses) / everything
    return step


def shared(teacher, layers):
    student = model.student_from(teacher, layers)
    student.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in layers)
    return student


def unloaded(teacher, layers):
    student = model.student_from(teacher, layers)
    student.norm.reset_parameters()
    return student


def test_each_mistake_is_told():
    wrong = {
        "kl_of_tokens": {
            "arguments swapped: ": reverse,
            "softmax over the sequence: ": over_the_sequence,
            "it must return a number for each": lambda s, t, T: reverse(s, t, T).sum(),
        },
        "mixture": {
            "T² missing: ": lambda kl, clm, T, kd_weight, clm_weight: kd_weight * kl + clm_weight * clm,
            "the KL alone has a gradient that no known loss has":
                lambda kl, clm, T, kd_weight, clm_weight: kd_weight * T * kl + clm_weight * clm,
        },
        "distillation_loss": {
            f"{name}: ": filled_with(MISTAKES[name].loss) for name in (
                "padding counted", "mean of means", "divided twice", "labels shifted twice", "batchmean")
        },
        "step": {
            "mean of means": divided(lambda n, N, k: n * k),
            "a sum of means": divided(lambda n, N, k: n),
            "the gradient is a sum over tokens: it was never divided": divided(lambda n, N, k: 1),
            "divided twice: by the tokens, and by the tokens": divided(lambda n, N, k: N * N),
            "divided twice: by the tokens, and by the number": divided(lambda n, N, k: N * k),
            "the gradient should be 77": divided(lambda n, N, k: 7),
            "the gradient is right; the mean loss is 38.5": lambda *args: 2 * step(*args),
            "no gradient arrived": lambda *args: 38.5,
        },
        "student_of": {
            "teacher and student share tensors": shared,
            "norm.weight is not a copy of the teacher's norm.weight": unloaded,
            "it must return a new model": lambda teacher, layers: teacher,
            "blocks.1.norm1.weight is not a copy": lambda teacher, _: model.student_from(teacher, [0, 2]),
            "for layers [0, 3] it has 3": lambda teacher, _: model.student_from(teacher, [0, 1, 3]),
            "it raised IndexError": lambda teacher, layers: layers[9],
        },
    }
    for name, functions in wrong.items():
        for told, function in functions.items():
            found = examine(function, name)
            assert found and found[0].startswith(told), (told, found)


# ------------------------------------------------------------------------------------ the command
def test_the_command(workshop, tmp_path, monkeypatch, capsys):
    """A copy of the lab in which the loss is written, and trained with: the same student as with ours."""
    text = inspect.getsource(lab)
    body = ("    import distill\n    settings = distill.LossSettings(temperature, kd_weight, clm_weight)\n"
            "    return distill.plain_loss(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1),\n"
            "                              targets.flatten(), settings)[0]\n")
    text, n = re.subn(r'(def distillation_loss.*?""".*?"""\n)    raise NotImplementedError\n',
                      lambda found: found[1] + body, text, flags=re.S)
    assert n == 1
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    short = flags(workshop, None, steps=None, kd_weight=0.9, clm_weight=0.1)
    monkeypatch.setattr(lab, "DEMO", " ".join(short))
    monkeypatch.setattr(sys, "argv", ["lab", str(tmp_path / "mine.py"), "--steps", "2"])
    with pytest.raises(SystemExit) as ended:
        run_cli(lab.main)
    printed = capsys.readouterr().out
    assert ended.value.code == 1  # four are still to be written
    assert "3 distillation_loss: right" in printed and printed.count("not written yet") == 4, printed
    yours, ours = re.findall(r"held-out loss, (?:yours|ours): (\S+)", printed)
    assert yours == ours
