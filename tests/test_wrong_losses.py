"""Known wrong losses (docs/wrong-losses.md): ours, plain and chunked, makes none of them.

`agrees` asks whether a loss has the true value and gradient in a case, both worked out here in float64. In
the case of each mistake it must say yes to both of ours and no to the mistake: with that mistake in our loss,
the same question would fail this test.
"""
import json
import math
from typing import NamedTuple

import pytest
import torch
from conftest import REPO
from torch.nn import functional as F

import distill
from extras import wrong_losses
from extras.results import read_rows
from support.chunked_loss import LossSettings

DOC = REPO / "docs" / "wrong-losses.md"
B, L, C, V = 2, 12, 16, 40
ALONE = LossSettings(temperature=2.0, kd_weight=1.0, clm_weight=0.0)
HALF = LossSettings(temperature=2.0, kd_weight=0.5, clm_weight=0.5)
JSD = LossSettings(temperature=2.0, kd_weight=1.0, clm_weight=0.0, divergence="jsd")


class Case(NamedTuple):
    """Where a mistake shows: micro-batches of a step, settings, how large logits are."""
    settings: LossSettings
    lengths: tuple = ((L,) * B,)  # for each micro-batch, how many targets each sequence has
    scale: float = 1.0


CASES = {
    wrong_losses.batchmean: Case(HALF),
    wrong_losses.mean_over_vocabulary: Case(HALF),
    wrong_losses.divided_twice: Case(HALF),
    wrong_losses.mean_of_means: Case(HALF, lengths=((L, L), (5, 2))),
    wrong_losses.padding_counted: Case(HALF, lengths=((L, 3),)),
    wrong_losses.t_squared_missing: Case(HALF),
    wrong_losses.only_the_report_is_right: Case(HALF),
    wrong_losses.half_the_clm_unasked: Case(ALONE),
    wrong_losses.no_entropy: Case(ALONE),
    wrong_losses.arguments_swapped: Case(ALONE),
    wrong_losses.probability_for_logarithm: Case(ALONE),
    wrong_losses.log_target_forgotten: Case(ALONE),
    wrong_losses.logarithm_of_zero: Case(JSD, scale=50.0),
    wrong_losses.softmax_in_bf16: Case(ALONE),
    wrong_losses.zeros_for_missing_rows: Case(ALONE),
    wrong_losses.labels_shifted_twice: Case(HALF),
}
OURS = list(distill.LOSSES.values())


def micro_batches(case):
    """Hidden states (N, C) and heads (V, C) of student and teacher, targets (N,), for each micro-batch."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    heads = normal(V, C) * case.scale, normal(V, C) * case.scale
    for lengths in case.lengths:
        targets = torch.randint(V, (len(lengths), L), generator=generator)
        for row, length in zip(targets, lengths, strict=True):
            row[length:] = -100
        student_hidden = normal(len(lengths) * L, C) / C**0.5
        teacher_hidden = normal(len(lengths) * L, C) / C**0.5
        yield student_hidden, heads[0], teacher_hidden, heads[1], targets.flatten()


def truth(s, t, y, settings):
    """The loss of one token by definition, in float64: logits s, t (V,) and the target y."""
    T = settings.temperature
    p = (t / T - (t / T).logsumexp(0)).exp()
    q = (s / T - (s / T).logsumexp(0)).exp()
    if settings.divergence == "jsd":  # where float64 still has what float32 has rounded to 0
        m = (p + q) / 2
        divergence = (p * (p / m).log() + q * (q / m).log()).sum() / 2
    else:
        divergence = (p * (p / q).log()).sum()
    clm = s.logsumexp(0) - s[y]
    return settings.kd_weight * T * T * divergence + settings.clm_weight * clm


def true_step(case):
    """Mean loss over all counted tokens of the step, and its gradients for the student's hidden states."""
    hidden, losses = [], []
    for student_hidden, student_head, teacher_hidden, teacher_head, targets in micro_batches(case):
        hidden.append(student_hidden.double().requires_grad_())
        student_logits = hidden[-1] @ student_head.double().T
        teacher_logits = teacher_hidden.double() @ teacher_head.double().T
        for s, t, y in zip(student_logits, teacher_logits, targets.tolist(), strict=True):
            if y != -100:
                losses.append(truth(s, t, y, case.settings))
    loss = sum(losses) / len(losses)
    return loss.item(), torch.autograd.grad(loss, hidden)


def step_of(losses_of, case):
    """The same as distill.train has it: sums of micro-batches, divided once by their `tokens`."""
    hidden, losses = [], []
    for student_hidden, *others in micro_batches(case):
        hidden.append(student_hidden.requires_grad_())
        losses.append(losses_of(hidden[-1], *others, case.settings))
    loss = sum(micro.loss for micro in losses) / sum(micro.tokens for micro in losses)
    return loss.item(), torch.autograd.grad(loss, hidden)


def agrees(losses_of, case):
    """Whether value and gradient are the true ones, to a thousandth."""
    true_loss, true_gradients = true_step(case)
    loss, gradients = step_of(losses_of, case)
    error = torch.cat(gradients).double() - torch.cat(true_gradients)
    same_gradient = error.norm() < 1e-3 * torch.cat(true_gradients).norm()  # NaN is not less
    return math.isclose(loss, true_loss, rel_tol=1e-3) and bool(same_gradient)


@pytest.mark.filterwarnings("ignore:reduction")  # PyTorch itself warns of mean
@pytest.mark.parametrize("mistake", CASES, ids=lambda mistake: mistake.__name__)
def test_ours_is_right_where_the_mistake_is_wrong(mistake):
    case = CASES[mistake]
    for losses_of in OURS:
        assert agrees(losses_of, case)
    assert not agrees(wrong_losses.usual_loop(mistake, L), case)


def test_each_mistake_is_run_and_tested():
    in_runs = {mistake for mistake, _ in wrong_losses.RUNS.values() if mistake}
    assert in_runs == set(CASES)


@pytest.mark.parametrize("mistake, value, gradient", [
    (wrong_losses.no_entropy, False, True),  # the number alone is wrong: the student is the same
    (wrong_losses.only_the_report_is_right, True, False),  # and the other way round
], ids=["no_entropy", "only_the_report_is_right"])
def test_number_and_student_can_be_wrong_apart(mistake, value, gradient):
    case = CASES[mistake]
    true_loss, (true_gradient,) = true_step(case)
    loss, (found,) = step_of(wrong_losses.usual_loop(mistake, L), case)
    assert math.isclose(loss, true_loss, rel_tol=1e-3) == value
    assert torch.allclose(found.double(), true_gradient, rtol=1e-3, atol=1e-6) == gradient


def test_half_the_clm_unasked_trains_as_half_and_half():
    unasked = step_of(wrong_losses.usual_loop(wrong_losses.half_the_clm_unasked, L), Case(ALONE))
    asked = true_step(Case(HALF))
    assert unasked[0] == pytest.approx(asked[0], rel=1e-5)
    assert torch.allclose(unasked[1][0].double(), asked[1][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mistake", [wrong_losses.batchmean, wrong_losses.mean_over_vocabulary,
                                     wrong_losses.divided_twice, wrong_losses.t_squared_missing],
                         ids=lambda mistake: mistake.__name__)
@pytest.mark.filterwarnings("ignore:reduction")
def test_a_wrong_divisor_leaves_the_direction(mistake):
    """With the KL alone these scale the gradient and no more, which AdamW divides out again."""
    case = Case(ALONE)
    _, (true_gradient,) = true_step(case)
    _, (found,) = step_of(wrong_losses.usual_loop(mistake, L), case)
    alike = F.cosine_similarity(found.double().flatten(), true_gradient.flatten(), dim=0).item()
    ratio = (found.norm() / true_gradient.norm()).item()
    expected = {"batchmean": L, "mean_over_vocabulary": 1 / V, "divided_twice": 1 / (B * L),
                "t_squared_missing": 1 / 4}[mistake.__name__]
    assert alike == pytest.approx(1, abs=1e-5) and ratio == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("losses_of", OURS, ids=distill.LOSSES)
def test_padding_changes_nothing(losses_of):
    """Whatever the models say after a document's end: the same loss, and no gradient there."""
    case = Case(HALF, lengths=((L, 3),))
    (student_hidden, student_head, teacher_hidden, teacher_head, targets), = micro_batches(case)
    padding = targets == -100
    other = student_hidden.clone()
    other[padding] = 100 * torch.randn(int(padding.sum()), C)
    found = []
    for hidden in (student_hidden, other):
        hidden.requires_grad_()
        losses = losses_of(hidden, student_head, teacher_hidden, teacher_head, targets, HALF)
        losses.loss.backward()
        assert (hidden.grad[padding] == 0).all() and losses.tokens == L + 3
        found.append(losses.loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_bf16_products_cost_less_than_a_bf16_softmax():
    """Under autocast our logits, too, come out of a bf16 product; from there on we compute in float32."""
    case = Case(ALONE)
    _, (true_gradient,) = true_step(case)
    errors = []
    for losses_of in (*OURS, wrong_losses.usual_loop(wrong_losses.softmax_in_bf16, L)):
        with torch.autocast("cpu", torch.bfloat16):
            _, (found,) = step_of(losses_of, case)
        errors.append(((found.double() - true_gradient).norm() / true_gradient.norm()).item())
    plain, chunked, theirs = errors
    assert 2 * max(plain, chunked) < theirs


def test_short_documents_are_the_same_text():
    tokens = torch.arange(1, 5000).numpy()
    cut = wrong_losses.short_documents(tokens, 0)
    assert (cut[cut != 0] == tokens).all()
    starts = (cut == 0).nonzero()[0]
    lengths = starts[1:] - starts[:-1] - 1
    assert lengths.min() >= 8 and lengths.max() <= wrong_losses.LENGTH


# ------------------------------------------------------------------------------------ the page
def test_the_page_has_the_table_of_the_results():
    done = read_rows(wrong_losses.RESULTS)
    assert set(done) == set(wrong_losses.RUNS)
    assert wrong_losses.table(done) in DOC.read_text(encoding="utf-8")


def test_each_line_of_code_on_the_page_is_that_of_the_mistake():
    """What a reader of the page sees is what was run."""
    code = (REPO / "extras" / "wrong_losses.py").read_text(encoding="utf-8")
    lines = {line.strip() for line in code.splitlines()}
    blocks = DOC.read_text(encoding="utf-8").split("```python\n")[1:]
    shown = [line.strip() for block in blocks for line in block.split("```")[0].splitlines() if line.strip()]
    assert len(blocks) >= 10 and [line for line in shown if line not in lines] == []


def test_results_name_their_command_commit_and_seed():
    for line in wrong_losses.RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert row["flags"].startswith(wrong_losses.COMMON) and not row["commit"].endswith(("+", "?"))
