"""Known wrong losses (docs/wrong-losses.md): ours makes none of these mistakes.

`agrees` asks whether a loss has the true value and gradient in a case; both are worked out here in float64.
In the case of each mistake the answer must be yes for our loss and no for the mistake.
"""
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

import distill
from distill import LossSettings
from extras import wrong_losses
from extras.wrong_losses import MISTAKES, STUDY

B, L, C, V = 2, 12, 16, 40
ALONE = LossSettings(temperature=2.0, kd_weight=1.0, clm_weight=0.0)
HALF = LossSettings(temperature=2.0, kd_weight=0.5, clm_weight=0.5)
JSD = LossSettings(temperature=2.0, kd_weight=1.0, clm_weight=0.0, divergence="jsd", jsd_weight=0.1)
REVERSE = LossSettings(temperature=2.0, kd_weight=1.0, clm_weight=0.0, divergence="reverse")
PADDED = ((L, 3),)


class Case(NamedTuple):
    """Where a mistake shows."""
    settings: LossSettings = ALONE
    lengths: tuple = ((L,) * B,)  # for each micro-batch of the step, the number of targets of each sequence
    scale: float = 1.0  # of the logits


CASES = {name: Case() for name in MISTAKES} | {
    **{name: Case(HALF) for name in (
        "batchmean", "mean over vocabulary", "divided twice", "T² missing", "only the report is right",
        "labels shifted twice", "teacher against itself")},
    "mean of means": Case(HALF, lengths=((L, L), (5, 2))),
    "padding counted": Case(HALF, PADDED),
    "divisor of other tokens": Case(HALF, PADDED),
    "NaN behind a finite loss": Case(REVERSE, PADDED),
    "mixture exchanged": Case(JSD),
    "logarithm of zero": Case(JSD, scale=50.0),
}


def micro_batches(case):
    """For each micro-batch: hidden states (N, C) and heads (V, C) of student and teacher, targets (N,)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    student_head, teacher_head = case.scale * normal(2, V, C)
    for lengths in case.lengths:
        targets = torch.randint(V, (len(lengths), L), generator=generator)
        for row, length in zip(targets, lengths, strict=True):
            row[length:] = -100
        student_hidden, teacher_hidden = normal(2, len(lengths) * L, C) / C**0.5
        yield student_hidden, student_head, teacher_hidden, teacher_head, targets.flatten()


def truth(s, t, y, settings):
    """The loss of one token by definition, in float64: logits s, t (V,) and the target y."""
    T = settings.temperature
    w = settings.jsd_weight
    p = (t / T - (t / T).logsumexp(0)).exp()
    q = (s / T - (s / T).logsumexp(0)).exp()
    m = w * p + (1 - w) * q
    divergence = {
        "forward": lambda: (p * (p / q).log()).sum(),
        "reverse": lambda: (q * (q / p).log()).sum(),
        "jsd": lambda: w * (p * (p / m).log()).sum() + (1 - w) * (q * (q / m).log()).sum(),
    }[settings.divergence]()
    return settings.kd_weight * T * T * divergence + settings.clm_weight * (s.logsumexp(0) - s[y])


def true_step(case):
    """Mean loss over the counted tokens of the step, and its gradient for the student's hidden states."""
    hidden = []
    losses = []
    for student_hidden, student_head, teacher_hidden, teacher_head, targets in micro_batches(case):
        hidden.append(student_hidden.double().requires_grad_())
        student_logits = hidden[-1] @ student_head.double().T
        teacher_logits = teacher_hidden.double() @ teacher_head.double().T
        tokens = zip(student_logits, teacher_logits, targets.tolist(), strict=True)
        losses += [truth(s, t, y, case.settings) for s, t, y in tokens if y != -100]
    loss = sum(losses) / len(losses)
    return loss.item(), torch.cat(torch.autograd.grad(loss, hidden))


def usual_loop(name):
    """A mistake in the form of distill.losses_of. Usual code divides each micro-batch's mean by the number of
    micro-batches. Ours divides by `tokens`, so a micro-batch says that it has one token."""
    def losses_of(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
        student_logits = F.linear(student_hidden, student_head).float().unflatten(0, (-1, L))
        teacher_logits = F.linear(teacher_hidden, teacher_head).float().unflatten(0, (-1, L))
        found = MISTAKES[name].loss(student_logits, teacher_logits, targets.unflatten(0, (-1, L)), settings)
        return SimpleNamespace(loss=found[0], tokens=1)

    return losses_of


def step_of(losses_of, case):
    """`true_step` as distill.train computes it: sums over micro-batches, divided once by their `tokens`."""
    hidden = []
    losses = []
    for student_hidden, *others in micro_batches(case):
        hidden.append(student_hidden.requires_grad_())
        losses.append(losses_of(hidden[-1], *others, case.settings))
    loss = sum(micro.loss for micro in losses) / sum(micro.tokens for micro in losses)
    return loss.item(), torch.cat(torch.autograd.grad(loss, hidden)).double()


def agrees(losses_of, case):
    """Whether value and gradient are right to a thousandth."""
    true_loss, true_gradient = true_step(case)
    loss, gradient = step_of(losses_of, case)
    error = (gradient - true_gradient).norm() / true_gradient.norm()
    return math.isclose(loss, true_loss, rel_tol=1e-3), bool(error < 1e-3)  # NaN is not less


@pytest.mark.filterwarnings("ignore:reduction")  # PyTorch itself warns about `mean`
def test_ours_is_right_where_each_mistake_is_wrong():
    wrong_in_one = {"no entropy": (False, True), "only the report is right": (True, False),
                    "NaN behind a finite loss": (True, False)}
    for name, case in CASES.items():
        assert agrees(distill.losses_of, case) == (True, True), name
        found = agrees(usual_loop(name), case)
        assert found != (True, True), name
        assert name not in wrong_in_one or found == wrong_in_one[name], name


@pytest.mark.filterwarnings("ignore:reduction")
def test_mistakes_do_what_the_page_says():
    """Number and gradient of some of them, worked out in another way."""
    half = true_step(Case(HALF))
    unasked = step_of(usual_loop("half the CLM unasked"), Case())
    assert unasked[0] == pytest.approx(half[0], rel=1e-5)
    torch.testing.assert_close(unasked[1], half[1], rtol=1e-4, atol=1e-6)

    text_alone = LossSettings(temperature=2.0, kd_weight=0.0, clm_weight=0.5)
    itself = step_of(usual_loop("teacher against itself"), Case(HALF))
    torch.testing.assert_close(itself[1], true_step(Case(text_alone))[1], rtol=1e-4, atol=1e-6)

    # With the KL alone a wrong divisor only scales the gradient, and AdamW divides that out again.
    _, true_gradient = true_step(Case())
    for name, factor in {"batchmean": L, "mean over vocabulary": 1 / V, "divided twice": 1 / (B * L),
                         "T² missing": 1 / 4}.items():
        _, found = step_of(usual_loop(name), Case())
        torch.testing.assert_close(found / factor, true_gradient, rtol=1e-3, atol=1e-5)

    # Under autocast our logits, too, come from a bf16 product; from there on we compute in float32.
    errors = []
    for losses_of in (distill.losses_of, usual_loop("softmax in bf16")):
        with torch.autocast("cpu", torch.bfloat16):
            _, found = step_of(losses_of, Case())
        errors.append((found - true_gradient).norm())
    ours, theirs = errors
    assert 2 * ours < theirs


def test_the_page_is_that_of_the_rows_and_of_the_code():
    """Each mistake has its section, its sources as links, and only lines of code that are run. The page gives
    a name to what the functions of @wrong_kl return."""
    page = STUDY.file(".md").read_text(encoding="utf-8")
    rows = STUDY.rows()
    assert STUDY.filled(page, rows) == page and rows.keys() >= MISTAKES.keys()

    code = Path(wrong_losses.__file__).read_text(encoding="utf-8")
    code = {line.strip() for line in (code + code.replace("return ", "kl = ")).splitlines()}
    for name, mistake in MISTAKES.items():
        heading, _, rest = page.partition(f"\n### {name}\n")
        section = rest.partition("\n#")[0]
        title = heading.rpartition("\n## ")[2].partition("\n")[0]
        assert title.lower().replace(" ", "-") == mistake.anchor, name
        for source in mistake.sources:
            repository, number = source.split(" #")
            assert f"[{source}](https://github.com/{repository}/issues/{number})" in section, name
        shown = re.search(r"```python\n(.*?)\n```", section, re.DOTALL)[1].splitlines()
        assert set(shown) <= code and mistake.loss.__doc__, name
