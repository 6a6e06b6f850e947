"""extras/check_loss.py: every known mistake gets its name, and no right loss is accused."""
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import distill
from extras.check_loss import FIXES, FORMS, UNSHIFTED, adapted, check, definition
from extras.wrong_losses import MISTAKES

ROOT = Path(__file__).parent.parent
MEANT = {"mixture exchanged": "jsd", "logarithm of zero": "jsd", "NaN behind a finite loss": "reverse"}


def names(loss, **settings):
    findings, _ = check(loss, **settings)
    return [finding.name for finding in findings]


def logs(s, t, T):
    return (s / T).log_softmax(-1), (t / T).log_softmax(-1)


# ------------------------------------------------------------------------------------ right losses
class ByHand(torch.autograd.Function):
    """No autograd inside: the gradient of T² * KL + CLM is written out."""

    @staticmethod
    def forward(ctx, s, t, y, T, kd_weight, clm_weight):
        counted = y != -100
        log_q, log_p = logs(s, t, T)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        log_1 = s.log_softmax(-1)
        clm = -log_1.gather(-1, y.clamp(min=0)[..., None])[..., 0]
        gradient = kd_weight * T * (log_q.exp() - log_p.exp())
        gradient += clm_weight * (log_1.exp() - F.one_hot(y.clamp(min=0), s.size(-1)))
        ctx.save_for_backward(gradient * counted[..., None])
        return ((kd_weight * T**2 * kl + clm_weight * clm) * counted).sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], *(None,) * 5


def by_hand(s, t, y, settings):
    return ByHand.apply(s, t, y, settings.temperature, settings.kd_weight, settings.clm_weight)


def log_target(s, t, y, settings):
    """F.kl_div on the counted rows; batchmean divides by these rows."""
    counted = y != -100
    log_q, log_p = logs(s[counted], t[counted], settings.temperature)
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    clm = F.cross_entropy(s.flatten(0, -2), y.flatten())
    return settings.kd_weight * settings.temperature**2 * kl + settings.clm_weight * clm, kl


def masked_mean(s, t, y, settings):
    mask = (y != -100).float()
    log_q, log_p = logs(s, t, settings.temperature)
    kl = F.kl_div(log_q, log_p.exp(), reduction="none").sum(-1)
    clm = F.cross_entropy(s.transpose(1, 2), y, reduction="none")
    each = settings.kd_weight * settings.temperature**2 * kl + settings.clm_weight * clm
    return (each * mask).sum() / mask.sum()


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
    for asked, ours in distill.LOSSES.items():
        loss, _ = adapted(ours, "tokens", "ours")
        findings, facts = check(loss, asked=asked)
        assert not findings and facts["reduction"].startswith("a sum"), asked
    for loss in (by_hand, log_target, masked_mean, cross_entropy_minus_entropy):
        findings, facts = check(loss)
        assert not findings, (loss, findings)
        assert facts["reduction"].startswith("a sum" if "sum" in loss.__code__.co_consts else "a mean") \
            or loss is by_hand, loss
        assert ("handled" in facts["teacher with a larger vocabulary"]) == (
            loss is cross_entropy_minus_entropy), loss


def test_definition_of_three_tokens_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL = 1/2 log 2 - 1/4 log 2, and the target has q = 1/4."""
    s = torch.tensor([[[0.25, 0.25, 0.5]]], dtype=torch.float64).log()
    t = torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log()
    settings = distill.LossSettings(temperature=1.0, kd_weight=1.0, clm_weight=10.0)
    loss = definition(s, t, torch.tensor([[1]]), settings)
    log_2 = torch.tensor(2.0, dtype=torch.float64).log()
    assert loss == pytest.approx((0.25 * log_2 + 20 * log_2).item())


# ------------------------------------------------------------------------------------ wrong losses
def test_each_mistake_gets_its_name():
    """Those of the page also count padding, because their runs have none; that is the second name."""
    for name, mistake in MISTAKES.items():
        found = names(mistake.loss, asked=MEANT.get(name, "forward"), accumulate=name == "mean of means")
        assert name in found and {*found} <= {name, "padding counted"}, (name, found)
        assert mistake.anchor in FIXES


def with_mask(loss):
    """Make a loss of single tokens out of one that counts padding: it sees the counted ones alone."""
    def masked(s, t, y, settings):
        counted = y != -100
        return loss(s[counted][None], t[counted][None], y[counted][None], settings)
    return masked


def test_own_versions_and_two_mistakes_at_once():
    def reverse_without_t(s, t, y, settings):
        log_q, log_p = logs(s, t, settings.temperature)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        return settings.kd_weight * kl + settings.clm_weight * F.cross_entropy(s[0], y[0])

    def late_rounding(s, t, y, settings):
        log_q, log_p = (x.bfloat16() for x in logs(s, t, settings.temperature))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        return settings.kd_weight * settings.temperature**2 * kl + settings.clm_weight * F.cross_entropy(
            s[0], y[0])

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
    assert names(with_mask(reverse_without_t)) == ["arguments swapped", "T² missing"]
    assert names(with_mask(late_rounding)) == ["softmax in bf16"]
    assert names(own_weights) == ["half the CLM unasked"]
    assert names(each_row_alone) == ["mean of means"]
    assert names(batchmean_and_shift) == ["batchmean", "labels shifted twice"]
    for name in ("arguments swapped", "T² missing", "no entropy", "temperature ignored"):
        assert names(with_mask(MISTAKES[name].loss)) == [name]


def test_what_has_no_name_is_described():
    def squares(s, t, y, settings):
        log_q, log_p = logs(s, t, settings.temperature)
        kl = (log_p.exp() - log_q.exp()).square().sum(-1).mean()
        return settings.kd_weight * kl + settings.clm_weight * F.cross_entropy(s[0], y[0])

    def one_sum(s, t, y, settings):
        log_q, log_p = logs(s, t, settings.temperature)
        kl = settings.temperature**2 * (log_p.exp() * (log_p - log_q)).sum()
        return settings.kd_weight * kl + settings.clm_weight * F.cross_entropy(s[0], y[0])

    def naive(s, t, y, settings):
        q, p = ((x / settings.temperature).softmax(-1) for x in (s, t))
        kl = settings.temperature**2 * (p * (p / q).log()).sum(-1).mean()
        return settings.kd_weight * kl + settings.clm_weight * F.cross_entropy(s[0], y[0])

    for loss, parts in ((squares, ("the KL alone", "no known loss", "cosine")),
                        (one_sum, ("one term is a sum",)),
                        (naive, ("not for large ones", "found nan"))):
        (found,), _ = check(with_mask(loss))
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
    counted = y != -100
    kl = F.kl_div((s / temperature).log_softmax(-1), (t / temperature).softmax(-1), reduction="none").sum(-1)
    clm = F.cross_entropy(s.flatten(0, 1), y.flatten())
    return kd_weight * temperature**2 * kl[counted].mean() + clm_weight * clm

def forgets_to(student_logits, teacher_logits, labels, **weights):
    return shifts(torch.nn.functional.pad(student_logits, (0, 0, 0, 1)),
                  torch.nn.functional.pad(teacher_logits, (0, 0, 0, 1)),
                  torch.nn.functional.pad(labels, (1, 0)), **weights)

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

def two_numbers(s, t, y):
    return s.sum(-1)
'''
FIXED = ("--temperature", "3", "--kd-weight", "1", "--clm-weight", "0")


@pytest.fixture
def examine(tmp_path, monkeypatch, capsys):
    """examine("file.py:loss", ...) -> (exit code, what was printed on either stream), in this process."""
    from extras import check_loss
    from support.cli import run_cli
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
    code, printed = examine("mine.py:forgets_to", "--form", "shifts")
    assert code == 1 and printed.startswith(f"wrong: {UNSHIFTED}") and printed.count("wrong: ") == 1, printed
    assert "#columns-and-positions" in printed
    code, printed = examine(f"{ROOT}/extras/wrong_losses.py:batchmean", "--form", "sequences")
    assert code == 1 and "wrong: batchmean: " in printed and "docs/wrong-losses.md#divisors" in printed
    code, printed = examine("mine.py:shifts", "--form", "shifts", "--accumulate")
    assert code == 1 and "mean of means" in printed


def test_errors_are_one_clear_line(examine):
    for argv, part in (
            (("broken.py:loss",), "broken.py cannot be imported: ModuleNotFoundError"),
            (("mines.py:fixed",), "did you mean mine.py?"),
            (("mine.py",), "expected path/to/file.py:function"),
            (("mine.py:gone",), "has no function 'gone'; it has shifts"),
            (("mine.py:fixed",), "no parameter temperature: say which value it uses, with --temperature"),
            (("mine.py:positional", *FIXED), "missing a required argument: 'alpha'"),
            (("mine.py:nan", *FIXED), "NaN"),
            (("mine.py:of_the_teacher", *FIXED), "does not depend on the student"),
            (("mine.py:two_numbers", *FIXED), "one number"),
            (("mine.py:fixed", "--form", "outputs", *FIXED), "raised TypeError")):
        code, printed = examine(*argv)
        assert code == 2 and printed.startswith("error: ") and printed.count("\n") == 1, printed
        assert part in printed, printed


def test_the_command(tmp_path):
    (tmp_path / "mine.py").write_text(textwrap.dedent("""
        def loss(student_logits, teacher_logits, targets, temperature, kd_weight, clm_weight):
            raise NotImplementedError
        """))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "extras.check_loss", "mine.py:loss"], cwd=tmp_path, env=env,
                          text=True, capture_output=True)
    assert done.returncode == 2 and "raised NotImplementedError" in done.stderr and not done.stdout
