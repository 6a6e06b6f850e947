"""extras/check_loss.py: every known mistake gets its name, and no right loss is accused."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import distill
from extras import check_loss
from extras.check_loss import FIXES, FORMS, UNSHIFTED, adapted, check, definition
from extras.wrong_losses import MISTAKES, mean_kl
from support.cli import run_cli

ROOT = Path(__file__).parent.parent
MEANT = {"mixture exchanged": "jsd", "logarithm of zero": "jsd", "NaN behind a finite loss": "reverse"}


def names(loss, **settings):
    return [finding.name for finding in check(loss, **settings)[0]]


def with_kl(kl):
    """A loss of the counted tokens, with kl(log_q, log_p, T) in place of T² * KL."""
    def loss(s, t, y, settings):
        counted = y != -100
        T = settings.temperature
        log_q, log_p = ((x[counted] / T).log_softmax(-1) for x in (s, t))
        clm = F.cross_entropy(s[counted], y[counted])
        return settings.kd_weight * kl(log_q, log_p, T) + settings.clm_weight * clm, "and more"
    return loss


# ------------------------------------------------------------------------------------ right losses
class ByHand(torch.autograd.Function):
    """No autograd inside: the gradient of T² * KL + CLM is written out."""

    @staticmethod
    def forward(ctx, s, t, y, T, kd_weight, clm_weight):
        counted = (y != -100)[..., None]
        log_q, log_p = (s / T).log_softmax(-1), (t / T).log_softmax(-1)
        log_1, one_hot = s.log_softmax(-1), F.one_hot(y.clamp(min=0), s.size(-1))
        gradient = kd_weight * T * (log_q.exp() - log_p.exp()) + clm_weight * (log_1.exp() - one_hot)
        ctx.save_for_backward(gradient * counted)
        loss = kd_weight * T**2 * log_p.exp() * (log_p - log_q) - clm_weight * one_hot * log_1
        return (loss * counted).sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], *(None,) * 5


def by_hand(s, t, y, settings):
    return ByHand.apply(s, t, y, settings.temperature, settings.kd_weight, settings.clm_weight)


def cross_entropy_minus_entropy(s, t, y, settings):
    """Both terms of the KL apart, on the columns that both models have."""
    counted = y != -100
    T = settings.temperature
    t = t[counted][:, :s.size(-1)]
    p = (t / T).softmax(-1)
    kl = F.cross_entropy(s[counted] / T, p, reduction="sum") - F.cross_entropy(t / T, p, reduction="sum")
    clm = F.cross_entropy(s[counted], y[counted], reduction="sum")
    return settings.kd_weight * T * T * kl + settings.clm_weight * clm


def test_no_right_loss_is_accused():
    ours = {asked: adapted(loss, "tokens", "ours")[0] for asked, loss in distill.LOSSES.items()}
    log_target = with_kl(lambda q, p, T: T**2 * mean_kl(q, p))
    for loss, asked, reduction in (*((loss, asked, "a sum") for asked, loss in ours.items()),
                                   (by_hand, "forward", "a sum"), (log_target, "forward", "a mean"),
                                   (cross_entropy_minus_entropy, "forward", "a sum")):
        findings, facts = check(loss, asked=asked)
        assert not findings and facts["reduction"].startswith(reduction), (loss, asked, findings)
        assert ("handled" in facts["teacher with a larger vocabulary"]) == (
            loss is cross_entropy_minus_entropy), loss


def test_definition_of_three_tokens_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 log 2 - 1/4 log 2, and the target has q = 1/4."""
    s = torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64).log()
    t = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log()
    settings = distill.LossSettings(temperature=1.0, kd_weight=1.0, clm_weight=10.0)
    loss = definition(s, t, torch.tensor([[1]]), settings)
    assert loss == pytest.approx(20.25 * torch.tensor(2.0, dtype=torch.float64).log().item())


# ------------------------------------------------------------------------------------ wrong losses
def test_each_mistake_gets_its_name():
    """Those of the page also count padding, because their runs have none; that is the second name."""
    for name, mistake in MISTAKES.items():
        found = names(mistake.loss, asked=MEANT.get(name, "forward"), accumulate=name == "mean of means")
        assert name in found and {*found} <= {name, "padding counted"}, (name, found)
        assert mistake.anchor in FIXES


def test_own_versions_and_two_mistakes_at_once():
    def own_weights(s, t, y, settings):
        return definition(s, t, y, replace(settings, kd_weight=0.7, clm_weight=0.3))

    def each_row_alone(s, t, y, settings):
        return sum(definition(s[i:i + 1], t[i:i + 1], y[i:i + 1], settings) for i in range(len(s))) / len(s)

    def batchmean_and_shift(s, t, y, settings):
        kl, clm = (replace(settings, clm_weight=0.0), replace(settings, kd_weight=0.0))
        return (MISTAKES["batchmean"].loss(s, t, y, kl)[0]
                + MISTAKES["labels shifted twice"].loss(s, t, y, clm)[0])

    def zeros(s, t, y, settings):
        return definition(F.pad(s, (0, t.size(-1) - s.size(-1))), t, y, settings)

    assert names(zeros) == ["zeros for missing rows"]
    assert names(own_weights) == ["half the CLM unasked"]
    assert names(each_row_alone) == ["mean of means"]
    assert names(batchmean_and_shift) == ["batchmean", "labels shifted twice"]
    for expected, kl in (
            (["arguments swapped", "T² missing"], lambda q, p, T: mean_kl(p, q)),
            (["T² missing"], lambda q, p, T: mean_kl(q, p)),
            (["no entropy"], lambda q, p, T: -T**2 * (p.exp() * q).sum(-1).mean()),
            (["temperature ignored"],
             lambda q, p, T: T**2 * mean_kl((T * q).log_softmax(-1), (T * p).log_softmax(-1))),
            (["softmax in bf16"], lambda q, p, T: T**2 * mean_kl(q.bfloat16(), p.bfloat16()))):
        assert names(with_kl(kl)) == expected


def test_what_has_no_name_is_described():
    for parts, kl in (
            (("the KL alone", "no known loss", "cosine"),
             lambda q, p, T: (p.exp() - q.exp()).square().sum(-1).mean()),
            (("one term is a sum",), lambda q, p, T: T**2 * (p.exp() * (p - q)).sum()),
            (("not for large ones", "found nan"),
             lambda q, p, T: T**2 * (p.exp() * (p.exp() / q.exp()).log()).sum(-1).mean())):
        (found,), _ = check(with_kl(kl))
        assert not found.name and all(part in str(found) for part in parts), found
    (found,), _ = check(lambda *batch: distill.jsd_loss(*FORMS["tokens"][0](*batch[:3]), batch[3]))
    assert "--divergence jsd" in found.text


# ------------------------------------------------------------------------------------ the command
FILE = '''
import torch
from torch.nn import functional as F
from neighbour import T

def shifts(student_logits, teacher_logits, labels, temperature, kd_weight, clm_weight):
    s, t, y = student_logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:]
    kl = F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="none").sum(-1)
    clm = F.cross_entropy(s.flatten(0, 1), y.flatten())
    return kd_weight * temperature**2 * kl[y != -100].mean() + clm_weight * clm

def forgets_to(student_logits, teacher_logits, labels, **weights):
    s, t = (F.pad(x, (0, 0, 0, 1)) for x in (student_logits, teacher_logits))
    return shifts(s, t, F.pad(labels, (1, 0)), **weights)

def outputs(outputs, teacher_outputs, labels, temperature, kd_weight, clm_weight):
    return shifts(outputs.logits, teacher_outputs.logits, labels, temperature, kd_weight, clm_weight)

def fixed(s, t, y):
    kl = F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="none").sum(-1)
    return T * T * kl[y != -100].sum()

def positional(s, t, y, alpha):
    return fixed(s, t, y)

def nan(s, t, y):
    return fixed(s, t, y) * float("nan")

def of_the_teacher(s, t, y):
    return fixed(t, t, y)

def per_sequence(s, t, y):
    B, L, V = s.shape
    return fixed(s, t, y)

def two_numbers(s, t, y):
    return s.sum(-1)
'''
FIXED = ("--temperature", "3", "--kd-weight", "1", "--clm-weight", "0")


@pytest.fixture
def examine(tmp_path, monkeypatch, capsys):
    """examine("file.py:loss", ...) -> (exit code, what was printed on either stream), in this process."""
    check_loss.load_module.cache_clear()
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("T = 3.0")
    (tmp_path / "broken.py").write_text("import no_such_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def examine(*argv):
        monkeypatch.setattr(sys, "argv", ["check_loss", *argv])
        with pytest.raises(SystemExit) as ended:
            run_cli(check_loss.main)
        return ended.value.code, "".join(capsys.readouterr())
    return examine


def test_forms(examine):
    for argv in (("mine.py:shifts", "--form", "shifts"), ("mine.py:outputs", "--form", "outputs"),
                 ("mine.py:fixed", *FIXED), (f"{ROOT}/distill.py:plain_loss",)):
        code, printed = examine(*argv)
        assert code == 0 and printed.startswith("right: "), printed
    for argv, *parts in (
            (("mine.py:forgets_to", "--form", "shifts"), UNSHIFTED, "#columns-and-positions"),
            ((f"{ROOT}/extras/wrong_losses.py:batchmean", "--form", "sequences"), "batchmean", "#divisors"),
            (("mine.py:shifts", "--form", "shifts", "--accumulate"), "mean of means", "#divisors")):
        code, printed = examine(*argv)
        assert code == 1 and printed.startswith(f"wrong: {parts[0]}: ") and parts[1] in printed, printed
    assert examine("mine.py:forgets_to", "--form", "shifts")[1].count("wrong: ") == 1


def test_errors_are_one_clear_line(examine):
    for argv, part in (
            (("broken.py:loss",), "broken.py cannot be imported: ModuleNotFoundError"),
            (("mines.py:fixed",), "did you mean mine.py?"),
            (("mine.py",), "expected path/to/file.py:function"),
            (("mine.py:gone",), "has no function 'gone'; it has shifts, forgets_to, outputs, fixed"),
            ((f"{ROOT}/distill.py:plain_los",), "has no function 'plain_los'; did you mean plain_loss?"),
            ((f"{ROOT}/extras/lab.py:gone",), "it has kl_of_tokens, mixture, distillation_loss, step"),
            (("mine.py:per_sequence", *FIXED), "; is it --form sequences?"),
            (("mine.py:fixed",), "say which value it uses, with --temperature"),
            (("mine.py:positional", *FIXED), "missing a required argument: 'alpha'"),
            (("mine.py:nan", *FIXED), "NaN"),
            (("mine.py:of_the_teacher", *FIXED), "does not depend on the student"),
            (("mine.py:two_numbers", *FIXED), "one number"),
            (("mine.py:fixed", "--form", "outputs", *FIXED), "raised TypeError")):
        code, printed = examine(*argv)
        assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed
        assert part in printed, printed


def test_the_command(tmp_path):
    (tmp_path / "mine.py").write_text("def loss(s, t, y, settings):\n    raise NotImplementedError\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "extras.check_loss", "mine.py:loss"], cwd=tmp_path, env=env,
                          text=True, capture_output=True)
    assert done.returncode == 2 and "raised NotImplementedError" in done.stderr and not done.stdout
