"""The loss: the definition against numbers by hand, and the engine against the definition in float64."""
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import distill
from distill import LossSettings, losses_of, plain_loss
from support import chunked_loss
from support.cli import InputError

DIVERGENCES = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.9)]


def inputs(N=50, C_s=24, C_t=24, V=97, scale=1.0):
    """Arguments of losses_of, without the settings; every seventh token has no target."""
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


def check_against_float64(given, settings, relative=1e-5):
    losses = losses_of(*given, settings)
    expected = in_float64(*given, settings)
    for ours, theirs in zip((losses.loss, losses.kl, losses.clm), expected, strict=True):
        assert close(ours, theirs, 2 * relative), settings
    for ours, theirs in zip(gradients(losses.loss, given), gradients(expected[0], given), strict=True):
        assert close(ours, theirs, relative), settings
    assert losses.tokens == (given[-1] != -100).sum()


# ------------------------------------------------------------------------------------ the definition
def test_the_definition_by_hand():
    """T² * sum p ln(p / q), and -ln softmax(s)[y]; a row of padding counts nowhere."""
    t = torch.tensor([[2.0, 0.0], [9.0, 0.0]]).double()
    s = torch.tensor([[0.0, 0.0], [0.0, 5.0]]).double()
    p = math.e / (math.e + 1)  # softmax of (2, 0) / 2
    kl = p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)
    clm = math.log(2)
    y, settings = torch.tensor([1, -100]), LossSettings(2.0, 0.25, 3.0)
    assert plain_loss(s, t, y, settings) == pytest.approx((0.25 * 4 * kl + 3 * clm, kl, clm))
    assert distill.text_alone(s, None, y, settings) == pytest.approx((3 * clm, 0, clm))


def test_the_divergences_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2) at T = 2. log.csv has the forward KL whatever is trained."""
    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    p, q = (0.75, 0.25), (0.5, 0.5)
    t, s = (2 * torch.tensor([x]).double().log() for x in (p, q))
    for divergence, w in DIVERGENCES:
        m = [w * a + (1 - w) * b for a, b in zip(p, q, strict=True)]
        jsd = w * kl(p, m) + (1 - w) * kl(q, m)
        expected = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[divergence]
        settings = LossSettings(2.0, 1.0, 0.0, 0.0, divergence, w)
        loss, logged, _ = distill.LOSSES[divergence](s, t, torch.tensor([0]), settings)
        assert (loss, logged) == pytest.approx((4 * expected, kl(p, q)))


def test_the_gradient_is_a_difference_of_probabilities():
    """d loss / d logits = kd * T * (q - p) + clm * (q at T = 1 - onehot), as the README derives it."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 5, 11).double()
    y = torch.tensor([0, 3, 7, 10, 3])
    loss, _, _ = plain_loss(s.requires_grad_(), t, y, LossSettings(4.0, 0.7, 0.2))
    q, p = (s / 4).softmax(-1), (t / 4).softmax(-1)
    expected = 0.7 * 4 * (q - p) + 0.2 * (s.softmax(-1) - F.one_hot(y, 11))
    assert torch.allclose(torch.autograd.grad(loss, s)[0], expected, atol=1e-12)


def test_a_perfect_student_scores_zero():
    """Otherwise the KL in log.csv would have a floor that no training reaches."""
    student_hidden, head, *_, targets = inputs()
    for divergence, w in DIVERGENCES:
        settings = LossSettings(2.0, 1.0, 0.0, 0.0, divergence, w)
        losses = losses_of(student_hidden, head, student_hidden.detach(), head.detach(), targets, settings)
        assert abs(losses.loss) < 1e-4 > abs(losses.kl), divergence
        assert torch.autograd.grad(losses.loss, student_hidden)[0].abs().max() < 1e-5, divergence


# ------------------------------------------------------------------------------------ the engine
def test_value_and_gradient_equal_float64_autograd():
    """At all temperatures, weights, divergences and sizes of chunks, and for students of another width."""
    for T in (0.1, 1.0, 2.0, 4.0):
        for kd, clm, cos in ((0.5, 0.5, 0.0), (1.0, 0.0, 0.0), (5.0, 2.0, 1.0)):
            check_against_float64(inputs(), LossSettings(T, kd, clm, cos))
    for divergence, w in DIVERGENCES:
        for scale, relative in ((1.0, 1e-5), (1e3, 1e-3)):  # probabilities that are exactly 0 in float32
            settings = LossSettings(2.0, 1.0, 0.5, 0.0, divergence, w, chunk_size=16)
            check_against_float64(inputs(scale=scale), settings, relative)
    for chunk_size in (1, 7, 50, 1000):
        check_against_float64(inputs(C_s=16, C_t=40), LossSettings(chunk_size=chunk_size))
    with torch.autocast("cpu", torch.bfloat16):
        bf16 = losses_of(*(given := inputs(N=200)), LossSettings())
    loss, _, _ = in_float64(*given, LossSettings())
    assert close(bf16.loss, loss, 1e-2)
    pairs = zip(gradients(bf16.loss, given), gradients(loss, given), strict=True)
    assert all(close(ours, theirs, 3e-2) for ours, theirs in pairs)


def test_nothing_counted_is_zero_and_vocabularies_that_differ_are_refused():
    """NaN from a batch of padding would end a run; a cut vocabulary would train on wrong probabilities."""
    given = inputs()
    given[-1][:] = -100
    loss, kl, clm = distill.distillation_loss(*given, temperature=2.0)
    assert loss == kl == clm == 0
    assert not any(gradient.any() for gradient in gradients(loss, given))
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
    """Logits of all tokens are what does not fit into memory."""
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
    monkeypatch.setattr(chunked_loss, "CPU_ELEMENTS", 16 * 97)
    for divergence in distill.LOSSES:
        traced.clear()
        chunked_loss.compiled.cache_clear()
        settings = LossSettings(divergence=divergence, chunk_size=16, compile=True)
        check_against_float64(inputs(), settings)
        assert len(traced) == 1, divergence
    chunked_loss.compiled.cache_clear()


# ------------------------------------------------------------------------------------ formulas, mistakes
def test_the_formula_has_the_numbers():
    """The plan and the model card show it; flags left out have the defaults of LossSettings."""
    def args(flags):
        return distill.parse_args(["--teacher", "gpt2", "--student-layers", "6", *flags.split()])

    assert LossSettings.of(args("")) == LossSettings() != LossSettings.of(args("--temperature 3"))
    for flags, formula in {
            "": "loss = 0.9 * 2² * KL(teacher || student, T = 2) + 0.1 * CLM",
            "--divergence reverse --clm-weight 0": "loss = 0.9 * 2² * KL(student || teacher, T = 2)",
            "--divergence jsd --cos-weight 3":
                "loss = 0.9 * 2² * JSD(teacher, student, T = 2) + 0.1 * CLM + 3 * (1 - cos)",
            "--teacher-cache c": "loss = 0.9 * 1² * KL(teacher || student, T = 1, 12 draws) + 0.1 * CLM",
            "--teacher-cache c --temperature 2":
                "loss = 0.9 * 2² * KL(teacher || student, T = 2, 12 draws) + 0.1 * CLM"}.items():
        assert args(flags).objective == formula
    assert distill.parse_args("--teacher none --student gpt2".split()).objective == "loss = 1 * CLM"


def test_a_forgotten_sum_is_said():
    """A reader who edits the loss learns what is wrong in one line."""
    def by_token(student_logits, teacher_logits, targets, settings):
        loss = -student_logits.log_softmax(-1).gather(1, targets[:, None])
        return loss, loss.sum(), loss.sum()

    hidden, head, targets = torch.ones(5, 4), torch.ones(7, 4), torch.tensor([1, 2, 3, 0, 4])
    with pytest.raises(InputError, match=r"by_token .* \(5, 1\).*\.sum\(\) missing"):
        chunked_loss.chunked_loss(by_token, hidden, head, None, None, targets, LossSettings())


def test_a_loss_of_hidden_states_is_an_entry_of_a_table(monkeypatch):
    """It is trained, logged and named; without a teacher, as in the control, it is left out."""
    def squares(student_hidden, teacher_hidden, targets):
        return (student_hidden - teacher_hidden).square().mean(-1)[targets != -100].sum()

    monkeypatch.setitem(distill.HIDDEN_LOSSES, "cos_weight", ("MSE", squares))
    args = distill.parse_args("--teacher gpt2 --student-layers 6 --cos-weight 3".split())
    assert args.objective.endswith(" + 0.1 * CLM + 3 * MSE")

    hidden, head, targets = torch.ones(5, 4), torch.ones(7, 4), torch.tensor([1, 2, 3, -100, 4])
    given, three = (hidden, head, 3 * hidden, head, targets), LossSettings(cos_weight=3.0)
    assert losses_of(*given, three).cos == 16
    assert losses_of(*given, three).loss == losses_of(*given, LossSettings()).loss + 48
    assert losses_of(hidden, head, None, None, targets, three).cos == 0
