"""extras/lab.py: the lesson's own code solves it, and each mistake is called by its name."""
import inspect
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from workshop import flags

import distill
import model
from distill import LossSettings
from extras import lab
from extras.lab import CHECKS, examine
from extras.wrong_losses import MISTAKES
from support.cli import run_cli
from support.ranks import Ranks

MIXTURE = "settings.kd_weight * T**2 * kl + settings.clm_weight * clm"


# ------------------------------------------------------------------------------------ the lesson's own code
def kl_of_tokens(student_logits, teacher_logits, T):
    settings = LossSettings(temperature=T)
    no_targets = torch.zeros(1, dtype=torch.int64)
    rows = zip(student_logits.flatten(0, 1), teacher_logits.flatten(0, 1), strict=True)
    kl = [distill.plain_loss(s[None], t[None], no_targets, settings)[1] for s, t in rows]
    return torch.stack(kl).view(student_logits.shape[:2])


def mixture(kl, clm, T, kd_weight, clm_weight):
    assert f"return {MIXTURE}, kl, clm" in inspect.getsource(distill.plain_loss)
    settings = LossSettings(kd_weight=kd_weight, clm_weight=clm_weight)
    return eval(MIXTURE, {"settings": settings, "T": T, "kl": kl, "clm": clm})


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


SOLUTIONS = {"kl_of_tokens": kl_of_tokens, "mixture": mixture, "distillation_loss": filled_with(plain),
             "step": step, "student_of": model.student_from}


def test_the_lessons_own_code_is_right():
    for name in CHECKS:
        assert examine(SOLUTIONS[name], name) == [], name
        assert examine(getattr(lab, name), name) is None, name  # the stubs are not written yet


def test_each_wrong_loss_is_told_so():
    for name, mistake in MISTAKES.items():
        found = examine(filled_with(mistake.loss), "distillation_loss")
        told = "JSD(teacher, student)" if name in ("mixture exchanged", "logarithm of zero") else f"{name}: "
        assert any(line.startswith(told) or "JSD" in told and told in line for line in found), (name, found)


def test_wrong_parts_are_told_so():
    def logs(s, t, T, dim=-1):
        return (s / T).log_softmax(dim), (t / T).log_softmax(-1)

    def reverse(s, t, T):
        log_q, log_p = logs(s, t, T)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def over_the_sequence(s, t, T):
        log_q, log_p = logs(s, t, T, 1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def without_entropy(s, t, T):
        log_q, log_p = logs(s, t, T)
        return -(log_p.exp() * log_q).sum(-1)

    def no_t_squared(kl, clm, T, kd_weight, clm_weight):
        return kd_weight * kl + clm_weight * clm

    def one_t(kl, clm, T, kd_weight, clm_weight):
        return kd_weight * T * kl + clm_weight * clm

    for name, function, told in (
            ("kl_of_tokens", reverse, "arguments swapped: "),
            ("kl_of_tokens", over_the_sequence, "softmax over the sequence: "),
            ("kl_of_tokens", without_entropy, "no entropy: "),
            ("kl_of_tokens", lambda s, t, T: reverse(s, t, T).sum(), "it must return a number for each"),
            ("mixture", no_t_squared, "T² missing: "),
            ("mixture", one_t, "the KL alone has a gradient that no known loss has")):
        found = examine(function, name)
        assert found and found[0].startswith(told), (told, found)


def test_wrong_steps_are_told_so():
    def divided(by):
        """A step whose gradient is divided by(tokens of a micro-batch, all tokens, micro-batches)."""
        def step(micro_batches, loss_of, parameters):
            everything = sum(map(len, micro_batches))
            total = 0
            for micro_batch in micro_batches:
                loss, tokens = loss_of(micro_batch)
                (loss / by(tokens, everything, len(micro_batches))).backward()
                total += loss.item()
            return total / everything
        return step

    for by, told in ((lambda n, N, k: N, None), (lambda n, N, k: n * k, "mean of means"),
                     (lambda n, N, k: n, "a sum of means"), (lambda n, N, k: 1, "never divided"),
                     (lambda n, N, k: N * N, "divided twice: by the tokens, and by the tokens"),
                     (lambda n, N, k: N * k, "divided twice: by the tokens, and by the number"),
                     (lambda n, N, k: 7, "should be 77")):
        found = examine(divided(by), "step")
        assert found == [] if told is None else told in found[0], (told, found)
    assert "the mean loss is 38.5" in examine(lambda *args: step(*args) * 2, "step")[0]
    assert "no gradient arrived" in examine(lambda *args: 38.5, "step")[0]


def test_wrong_students_are_told_so():
    def shared(teacher, layers):
        student = model.student_from(teacher, layers)
        student.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in layers)
        return student

    def unloaded(teacher, layers):
        student = model.student_from(teacher, layers)
        student.norm.reset_parameters()
        return student

    for function, told in ((shared, "share tensors"),
                           (unloaded, "norm.weight is not a copy of the teacher's norm.weight"),
                           (lambda teacher, layers: teacher, "a new model"),
                           (lambda teacher, layers: model.student_from(teacher, [0, 2]),
                            "weight, but of blocks.2."),
                           (lambda teacher, layers: model.student_from(teacher, [0, 1, 3]), "3 blocks"),
                           (lambda teacher, layers: layers[9], "it raised IndexError")):
        found = examine(function, "student_of")
        assert found and told in found[0], (told, found)


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
