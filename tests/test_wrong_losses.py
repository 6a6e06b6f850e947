"""Known wrong losses (docs/wrong-losses.md): ours makes none of these mistakes.

`agrees` asks whether a loss has the true value and gradient in a case; both are worked out here in float64.
In the case of each mistake the answer must be yes for our loss and no for the mistake.
"""
import math
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

import distill
from distill import LossSettings
from extras import wrong_losses
from extras.study import ROOT
from extras.wrong_losses import MISTAKES, PLAN, STUDY, usual_loop

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

    student_head = normal(V, C) * case.scale
    teacher_head = normal(V, C) * case.scale
    for lengths in case.lengths:
        targets = torch.randint(V, (len(lengths), L), generator=generator)
        for row, length in zip(targets, lengths, strict=True):
            row[length:] = -100
        student_hidden = normal(len(lengths) * L, C) / C**0.5
        teacher_hidden = normal(len(lengths) * L, C) / C**0.5
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


def step_of(losses_of, case):
    """The same as distill.train computes it: sums over micro-batches, divided once by their `tokens`."""
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
        found = agrees(usual_loop(MISTAKES[name].loss, L), case)
        assert found != (True, True), name
        assert name not in wrong_in_one or found == wrong_in_one[name], name


def test_mistakes_do_what_their_names_say():
    """Number and gradient of some of them, worked out in another way."""
    half = true_step(Case(HALF))
    unasked = step_of(usual_loop(wrong_losses.half_the_clm_unasked, L), Case(ALONE))
    assert unasked[0] == pytest.approx(half[0], rel=1e-5)
    torch.testing.assert_close(unasked[1], half[1], rtol=1e-4, atol=1e-6)

    text_alone = LossSettings(temperature=2.0, kd_weight=0.0, clm_weight=0.5)
    itself = step_of(usual_loop(wrong_losses.teacher_against_itself, L), Case(HALF))
    torch.testing.assert_close(itself[1], true_step(Case(text_alone))[1], rtol=1e-4, atol=1e-6)

    loss, gradient = step_of(usual_loop(wrong_losses.nan_behind_a_finite_loss, L), Case(REVERSE, PADDED))
    assert math.isfinite(loss) and gradient.isnan().any()


@pytest.mark.filterwarnings("ignore:reduction")
def test_a_wrong_divisor_leaves_the_direction():
    """With the KL alone these only scale the gradient, and AdamW divides that out again."""
    factors = {"batchmean": L, "mean over vocabulary": 1 / V, "divided twice": 1 / (B * L),
               "T² missing": 1 / 4}
    _, true_gradient = true_step(Case(ALONE))
    for name, factor in factors.items():
        _, found = step_of(usual_loop(MISTAKES[name].loss, L), Case(ALONE))
        assert F.cosine_similarity(found.flatten(), true_gradient.flatten(), dim=0) > 1 - 1e-5, name
        assert found.norm() / true_gradient.norm() == pytest.approx(factor, rel=1e-3), name


def test_bf16_products_cost_less_than_a_bf16_softmax():
    """Under autocast our logits, too, come from a bf16 product; from there on we compute in float32."""
    _, true_gradient = true_step(Case(ALONE))
    errors = []
    for losses_of in (distill.losses_of, usual_loop(wrong_losses.softmax_in_bf16, L)):
        with torch.autocast("cpu", torch.bfloat16):
            _, found = step_of(losses_of, Case(ALONE))
        errors.append((found - true_gradient).norm() / true_gradient.norm())
    ours, theirs = errors
    assert 2 * ours < theirs


def test_short_documents_are_the_same_text():
    tokens = torch.arange(1, 5000).numpy()
    cut = wrong_losses.short_documents(tokens, 0)
    assert (cut[cut != 0] == tokens).all()
    ends = (cut == 0).nonzero()[0]
    lengths = ends[1:] - ends[:-1] - 1
    assert lengths.min() >= 8 and lengths.max() <= wrong_losses.LENGTH


def test_a_run_trains_with_its_mistake(tmp_path, monkeypatch):
    """Two steps: the reported loss is wrong by 1 / T² and the student is still scored by the definition."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(900)))
    small = (f"--teacher {ROOT}/demo/teacher --data text.txt --steps 2 --batch-size 2 --grad-accum 1 "
             "--eval-tokens 300 --student-layers 1 --kd-weight 1 --clm-weight 0")
    right, missing, stopped = (
        wrong_losses.one_run(name, f"{PLAN[name]} {small}")
        for name in ("right, KL alone", "T² missing", "log_target forgotten"))
    assert right["perfect on screen"] == pytest.approx(0, abs=1e-4)
    assert right["initial on screen"] == pytest.approx(4 * missing["initial on screen"], rel=1e-2)
    assert 2 < right["loss"] < 20 and right["loss"] != missing["loss"]
    assert stopped["ends as"] == "stops at once" and "nan" in stopped["why"]


# ------------------------------------------------------------------------------------ the page
def test_the_page_shows_each_mistake():
    """Its section, its sources as links, and only lines of code that are run. It gives a name to what the
    functions of @wrong_kl return."""
    page = STUDY.file(".md").read_text(encoding="utf-8")
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
        assert set(shown) <= code, name
        assert mistake.loss.__doc__ and name in PLAN, name


def test_the_table_is_that_of_the_rows():
    page = STUDY.file(".md").read_text(encoding="utf-8")
    rows = STUDY.rows()
    assert STUDY.filled(page, rows) == page and rows.keys() <= PLAN.keys()
    for name in MISTAKES.keys() - rows.keys():
        assert "not run yet" in page.partition(f"\n### {name}\n")[2].partition("\n#")[0], name
    assert all(not row["commit"].endswith(("+", "?")) for row in rows.values())
