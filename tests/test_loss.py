"""The loss: the definition against numbers by hand, and the engine against the definition in float64."""
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill
from distill import LossSettings, plain_loss
from support import chunked_loss
from support.cli import InputError

DIVERGENCES = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def inputs(N=50, C_s=24, C_t=24, V=97, scale=1.0):
    """Arguments of losses_of but for the settings; every seventh token has no target."""
    torch.manual_seed(0)
    student = [(scale * torch.randn(N, C_s)).requires_grad_(), torch.randn(V, C_s, requires_grad=True)]
    teacher = [scale * torch.randn(N, C_t), torch.randn(V, C_t)]
    targets = torch.randint(V, (N,))
    targets[::7] = -100
    return [*student, *teacher, targets]


def in_float64(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
    """The definition on whole logits in float64, with an autograd graph: (loss, kl, clm)."""
    s = student_hidden.double() @ student_head.double().T
    t = teacher_hidden.double() @ teacher_head.double().T
    loss, kl, clm = distill.LOSSES[settings.divergence](s, t, targets, settings)
    if settings.cos_weight:
        similarity = F.cosine_similarity(student_hidden.double(), teacher_hidden.double(), dim=-1)
        loss = loss + settings.cos_weight * (1 - similarity)[targets != -100].sum()
    return loss, kl, clm


def close(a, b, relative=1e-5):
    a, b = a.double(), b.double()
    return (a - b).norm() <= relative * b.norm()


def gradients(loss, given):
    """With respect to the student's hidden states and head; of 3 * loss, so that what comes in is used."""
    return torch.autograd.grad(3 * loss, given[:2])


# ------------------------------------------------------------------------------------ the definition
def test_the_definition_by_hand():
    """Two tokens: T² * sum p ln(p / q), and -ln softmax(s)[y]; a row of padding counts nowhere."""
    t = torch.tensor([[2.0, 0.0], [9.0, 0.0]]).double()
    s = torch.tensor([[0.0, 0.0], [0.0, 5.0]]).double()
    p = math.e / (math.e + 1)  # softmax of (2, 0) / 2
    expected = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    loss, kl, clm = plain_loss(s, t, torch.tensor([1, -100]), LossSettings(2.0, 0.25, 3.0))
    assert kl.item() == pytest.approx(expected) and clm.item() == pytest.approx(math.log(2))
    assert loss.item() == pytest.approx(0.25 * 4 * expected + 3 * math.log(2))


def test_the_divergences_by_hand():
    """Two tokens: p = (3/4, 1/4), q = (1/2, 1/2). The log always has the forward KL."""
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    p, q = (0.75, 0.25), (0.5, 0.5)
    t, s = (torch.tensor([x]).double().log() for x in (p, q))
    for divergence, w in DIVERGENCES:
        m = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]
        jsd = w * kl(p, m) + (1 - w) * kl(q, m)
        expected = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[divergence]
        settings = LossSettings(1.0, 1.0, 0.0, 0.0, divergence, w)
        loss, logged, _ = distill.LOSSES[divergence](s, t, torch.tensor([0]), settings)
        assert loss.item() == pytest.approx(expected) and logged.item() == pytest.approx(kl(p, q))


def test_the_gradient_is_a_difference_of_probabilities():
    """d loss / d logits = kd * T * (q - p) + clm * (q at T = 1 - onehot), as the README derives it."""
    torch.manual_seed(0)
    s, t = torch.randn(5, 11).double().requires_grad_(), torch.randn(5, 11).double()
    y = torch.tensor([0, 3, 7, 10, 3])
    loss, _, _ = plain_loss(s, t, y, LossSettings(4.0, 0.7, 0.2))
    q, p = (s / 4).softmax(-1), (t / 4).softmax(-1)
    expected = 0.7 * 4 * (q - p) + 0.2 * (s.softmax(-1) - F.one_hot(y, 11))
    assert torch.allclose(torch.autograd.grad(loss, s)[0], expected, atol=1e-12)


def test_jsd_lies_between_the_two_directions():
    """With a small weight its gradient points where the forward KL's does, with a large one the reverse's."""
    found = {}
    for divergence, w in (("forward", 0.5), ("reverse", 0.5), ("jsd", 0.001), ("jsd", 0.999)):
        given = inputs(scale=0.1)
        loss = distill.losses_of(*given, LossSettings(1.0, 1.0, 0.0, 0.0, divergence, w)).loss
        found[divergence, w] = gradients(loss, given)[0].flatten()

    def alike(a, b):
        return F.cosine_similarity(found[a], found[b], dim=0).item()

    assert alike(("jsd", 0.001), ("forward", 0.5)) > 0.99 > alike(("jsd", 0.001), ("reverse", 0.5))
    assert alike(("jsd", 0.999), ("reverse", 0.5)) > 0.99 > alike(("jsd", 0.999), ("forward", 0.5))


def test_a_perfect_student_scores_zero():
    hidden, head = torch.randn(50, 24, requires_grad=True), torch.randn(97, 24)
    targets = torch.zeros(50, dtype=torch.long)
    for divergence, w in DIVERGENCES:
        for T in (0.5, 1.0, 2.0):
            settings = LossSettings(T, 1.0, 0.0, 0.0, divergence, w)
            losses = distill.losses_of(hidden, head, hidden.detach(), head, targets, settings)
            assert abs(losses.loss) < 1e-4 > abs(losses.kl), (divergence, T)
            assert torch.autograd.grad(losses.loss, hidden)[0].abs().max() < 1e-5, (divergence, T)


# ------------------------------------------------------------------------------------ the engine
def check_against_float64(given, settings, relative=1e-5):
    losses = distill.losses_of(*given, settings)
    expected = in_float64(*given, settings)
    for ours, theirs in zip((losses.loss, losses.kl, losses.clm), expected, strict=True):
        assert close(ours, theirs, 2e-5), settings
    for ours, theirs in zip(gradients(losses.loss, given), gradients(expected[0], given), strict=True):
        assert close(ours, theirs, relative), settings
    assert losses.tokens == (given[-1] != -100).sum()


def test_value_and_gradient_equal_float64_autograd():
    for T in (0.1, 1.0, 2.0, 4.0):
        for kd, clm, cos in ((0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (5.0, 2.0, 1.0)):
            check_against_float64(inputs(), LossSettings(T, kd, clm, cos))
    for divergence, w in DIVERGENCES:
        for scale, relative in ((1.0, 1e-5), (1e3, 1e-3)):  # probabilities that are exactly 0 in float32
            settings = LossSettings(2.0, 1.0, 0.5, 0.0, divergence, w, chunk_size=16)
            check_against_float64(inputs(scale=scale), settings, relative)


def test_chunks_and_widths_change_nothing():
    for chunk_size in (1, 7, 16, 50, 1000):
        check_against_float64(inputs(C_s=16, C_t=40), LossSettings(chunk_size=chunk_size))


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    """The embedding is also the head, as in GPT-2."""
    embedding = torch.randn(97, 24, requires_grad=True)
    _, _, *rest = inputs()
    ids = torch.arange(50)
    settings = LossSettings(chunk_size=16)
    found = []
    for loss_of in (distill.losses_of, in_float64):
        loss, *_ = loss_of(torch.tanh(embedding[ids]), embedding, *rest, settings)
        found.append(torch.autograd.grad(loss, embedding)[0])
    assert close(*found)


def test_nothing_counted_is_zero_with_zero_gradients():
    given = inputs()
    given[-1][:] = -100
    loss, kl, clm = distill.distillation_loss(*given, temperature=2.0)
    assert loss == kl == clm == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, given))


def test_text_alone():
    student_hidden, student_head, _, _, targets = inputs()
    losses = distill.losses_of(student_hidden, student_head, None, None, targets, LossSettings(2.0, 0.0, 3.0))
    logits = student_hidden.double() @ student_head.double().T
    assert losses.clm.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item())
    assert losses.loss.item() == pytest.approx(3 * losses.clm.item())
    assert losses.kl == losses.teacher_clm == losses.cos == 0


def test_bf16_products_move_the_gradient_by_little():
    given = inputs(N=200)
    with torch.autocast("cpu", torch.bfloat16):
        losses = distill.losses_of(*given, LossSettings())
    expected = in_float64(*given, LossSettings())
    assert close(losses.loss, expected[0], 1e-2)
    assert all(close(a, b, 3e-2) for a, b in zip(gradients(losses.loss, given),
                                                 gradients(expected[0], given), strict=True))


def test_heads_of_different_vocabularies_are_refused():
    given = inputs()
    with pytest.raises(ValueError, match="97 and 90"):
        distill.distillation_loss(*given[:3], given[3][:90], given[4])


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
    given = inputs(N=512, V=1000)
    with LargestTensor() as largest:
        distill.distillation_loss(*given, chunk_size=32, cos_weight=1.0)[0].backward()
    assert largest.numel == max(32 * 1000, 1000 * 24)  # the logits of a chunk


def test_the_compiled_loss_is_the_loss(monkeypatch):
    """Traced as for a GPU, though run without its compiler; the last rows, being fewer, are not traced."""
    traced = []

    def backend(module, example_inputs):
        traced.append(module)
        return module

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    given = inputs()
    for divergence in distill.LOSSES:
        chunked_loss.compiled.cache_clear()
        found = []
        for compiled in (False, True):
            traced.clear()
            settings = LossSettings(divergence=divergence, chunk_size=16, compile=compiled)
            monkeypatch.setattr(chunked_loss, "CPU_ELEMENTS", 16 * 97)
            losses = distill.losses_of(*given, settings)
            found.append([*losses, *gradients(losses.loss, given)])
        assert all(close(a, b) for a, b in zip(*found, strict=True))
        assert len(traced) == 1, divergence
    chunked_loss.compiled.cache_clear()


# ------------------------------------------------------------------------------------ what is said of it
def test_the_formula_has_the_numbers():
    def said(*flags):
        return distill.parse_args([*"--teacher gpt2 --student-layers 6".split(), *flags]).objective

    assert said() == "loss = 0.9 * 2² * KL(teacher || student, T = 2) + 0.1 * CLM"
    assert said("--divergence", "reverse", "--clm-weight", "0") == (
        "loss = 0.9 * 2² * KL(student || teacher, T = 2)")
    assert said("--divergence", "jsd", "--cos-weight", "3").endswith(
        "JSD(teacher, student, T = 2) + 0.1 * CLM + 3 * (1 - cos)")
    assert "1² * KL(teacher || student, T = 1, 12 draws)" in said("--teacher-cache", "c")
    assert "T = 2, 12 draws" in said("--teacher-cache", "c", "--temperature", "2")
    assert "T = 2, 12 draws" in distill.parse_args("--recipe distilgpt2 --teacher-cache c".split()).objective
    alone = distill.parse_args("--teacher none --student gpt2".split())
    assert alone.objective == "loss = 1 * CLM"


def test_a_forgotten_sum_is_said():
    def by_token(student_logits, teacher_logits, targets, settings):
        loss = -student_logits.log_softmax(-1).gather(1, targets[:, None])
        return loss, loss.sum(), loss.sum()

    hidden, head, targets = torch.ones(5, 4), torch.ones(7, 4), torch.tensor([1, 2, 3, 0, 4])
    with pytest.raises(InputError, match=r"by_token returns a loss of shape \(5, 1\).*is a .sum\(\) missing"):
        chunked_loss.chunked_loss(by_token, hidden, head, None, None, targets, LossSettings())


def test_a_loss_of_hidden_states_is_an_entry_of_a_table(monkeypatch):
    """It is trained, logged and named; without a teacher, as in the control, it is left out."""
    def squares(student_hidden, teacher_hidden, targets):
        return (student_hidden - teacher_hidden).square().mean(-1)[targets != -100].sum()

    monkeypatch.setitem(distill.HIDDEN_LOSSES, "cos_weight", ("MSE", squares))
    args = distill.parse_args("--teacher gpt2 --student-layers 6 --cos-weight 3".split())
    assert args.objective.endswith(" + 0.1 * CLM + 3 * MSE")

    hidden, head, targets = torch.ones(5, 4), torch.ones(7, 4), torch.tensor([1, 2, 3, -100, 4])
    without = distill.losses_of(hidden, head, 3 * hidden, head, targets, LossSettings())
    found = distill.losses_of(hidden, head, 3 * hidden, head, targets, LossSettings(cos_weight=3.0))
    assert found.cos == 16 and found.loss == without.loss + 48
    assert distill.losses_of(hidden, head, None, None, targets, LossSettings(cos_weight=3.0)).cos == 0


def test_defaults_of_the_loss_are_those_of_the_command_line():
    assert LossSettings.of(distill.parse_args("--teacher gpt2 --student-layers 6".split())) == LossSettings()
