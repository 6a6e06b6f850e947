"""Name the mistake in a distillation loss, in seconds, without training.

    python -m extras.check_loss my_loss.py:loss                   on (N, V)
    python -m extras.check_loss my_loss.py:loss --form sequences  on (B, L, V)
    python -m extras.check_loss my_loss.py:kl --kd-weight 1 --clm-weight 0
    python -m extras.check_loss distill.py:plain_loss

Read in this order:
  definition   the right loss
  ask          the value and the gradient of a loss, on a batch of random logits
  explain      which known loss has the same gradient, up to a factor that has a name, too
  check        the whole examination: ordinary logits, padding, large logits, padded vocabularies

The direction of a gradient says which loss it belongs to, and its size how that was divided. So a loss with
a wrong divergence and a wrong divisor gets both names. The wrong losses are those of extras/wrong_losses.py;
docs/wrong-losses.md says where each was found and what it does to a student.

Exit code: 0 the loss is right, 1 it is not, 2 it could not be checked.
Shapes: B sequences, L tokens in each, N = B * L, V vocabulary. T is the temperature.
"""
import inspect
import itertools
import math
import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from distill import LossSettings
from extras.wrong_losses import MISTAKES, PADDING_ROWS
from support.cli import InputError, new_parser, run_cli

SHAPES = ((3, 7, 40, 1.0), (2, 9, 48, 2.0), (4, 5, 44, 4.0))  # B, L, V, T of the ordinary cases
KL_ALONE = {"kd_weight": 1.0, "clm_weight": 0.0}
PARTS = {"the KL alone": KL_ALONE, "the CLM alone": {"kd_weight": 0.0, "clm_weight": 1.0},
         "the mixture": {"kd_weight": 0.6, "clm_weight": 0.4}}
TIGHT = 1e-3  # relative error that float32 stays far below
COARSE = 0.05  # ... and bf16, too

FIXES = {  # by section of docs/wrong-losses.md
    "divisors": "Sum over the vocabulary and the tokens; divide once, by the number of counted tokens",
    "padding": "Drop positions whose target is -100 before you compute anything from them",
    "weights": "The loss is kd_weight * T² * KL + clm_weight * CLM, in its value and in its gradient",
    "another-divergence": "The KL of a token is (log_p.exp() * (log_p - log_q)).sum(-1); p is the teacher's",
    "numbers": "Compute in float32, from log_softmax; never take the logarithm of a probability",
    "columns-and-positions": "Take the softmax over the vocabulary that both have; student, teacher and "
                             "target in a row must belong to the same position",
    "the-teacher": "The teacher answers for the same tokens, and only the student gets a gradient",
}
DIVERGENCES = {"forward": "KL(teacher || student)", "reverse": "KL(student || teacher)",
               "jsd": "JSD(teacher, student)"}
REDUCTIONS = {
    "sum": "a sum over the counted tokens; divide it once, by the tokens of the whole step",
    "mean": "a mean over the counted tokens; several micro-batches have to be weighted by their tokens",
}


# ------------------------------------------------------------------------------------ the right loss
def definition(student_logits, teacher_logits, targets, settings):
    """kd_weight * T² * divergence + clm_weight * CLM, a mean over the counted tokens.

    This is written a second time here so that distill.plain_loss can be checked, too.
    """
    T = settings.temperature
    counted = targets != -100
    s = student_logits[counted]  # (n, V)
    log_p = (teacher_logits[counted] / T).log_softmax(-1)
    log_q = (s / T).log_softmax(-1)

    if settings.divergence == "forward":
        divergence = log_p.exp() * (log_p - log_q)
    elif settings.divergence == "reverse":
        divergence = log_q.exp() * (log_q - log_p)
    else:
        w = settings.jsd_weight
        log_m = torch.logaddexp(log_p + math.log(w), log_q + math.log(1 - w))
        divergence = w * log_p.exp() * (log_p - log_m) + (1 - w) * log_q.exp() * (log_q - log_m)

    clm = F.cross_entropy(s, targets[counted])
    return settings.kd_weight * T**2 * divergence.sum(-1).mean() + settings.clm_weight * clm


OF_JSD = ("mixture exchanged", "logarithm of zero")  # mistakes that no other divergence can have


def known_losses(asked):
    """{name: loss}, in the order in which they are tried; "" is the right one. All give means.

    asked: the divergence that is meant; the other ones have names, too.
    """
    def with_divergence(name):
        return lambda s, t, y, settings: definition(s, t, y, replace(settings, divergence=name))

    mistakes = {name: known.loss for name, known in MISTAKES.items() if asked == "jsd" or name not in OF_JSD}
    others = {name: with_divergence(name) for name in DIVERGENCES if name != asked}
    return {"": definition} | mistakes | others


# ------------------------------------------------------------------------------------ how it is called
FORMS = {"tokens": "logits (N, V) and targets (N,)", "sequences": "logits (B, L, V) and targets (B, L)"}

# The settings that a loss may have as parameters. If it does not have one, a flag says which value it uses.
DEFAULTS = {"temperature": None, "kd_weight": None, "clm_weight": None, "jsd_weight": 0.5}


def adapted(function, form):
    """A function of some form -> the same as loss(student_logits, teacher_logits, targets, settings) on
    logits (B, L, V), and the names of the settings that it takes."""
    parameters = inspect.signature(function).parameters
    takes_object = "settings" in parameters
    taken = [name for name in DEFAULTS if takes_object or name in parameters]

    def loss(*batch, settings):
        if form == "tokens":
            batch = [tensor.flatten(0, 1) for tensor in batch]
        if takes_object:
            return function(*batch, settings=settings)
        return function(*batch, **{name: getattr(settings, name) for name in taken})

    return loss, taken


def load_function(where):
    """`path/to/file.py:name` -> the function."""
    path, _, name = where.rpartition(":")
    if not path.endswith(".py"):
        raise InputError(f"{where}: expected path/to/file.py:function")
    sys.path.insert(0, str(Path(path).resolve().parent))  # a script finds its neighbours, and so does this
    try:
        function = runpy.run_path(path).get(name)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    if not inspect.isfunction(function):
        raise InputError(f"{path} has no function {name!r}")
    return function


# ------------------------------------------------------------------------------------ asking a loss
class Probe(NamedTuple):
    """A batch on which losses are compared."""
    student: torch.Tensor  # logits (B, L, V), float64
    teacher: torch.Tensor
    targets: torch.Tensor  # (B, L), -100 where there is none
    settings: LossSettings

    def alone(self, row, length):
        """The first tokens of one sequence, as a batch of its own."""
        return Probe(*(tensor[row:row + 1, :length] for tensor in self[:3]), self.settings)


def make_probe(B, L, V, settings, scale=1.5):
    """Random logits with a standard deviation of `scale`, the same for all settings."""
    generator = torch.Generator().manual_seed(L)
    student, teacher = scale * torch.randn(2, B, L, V, generator=generator, dtype=torch.float64)
    return Probe(student, teacher, torch.randint(V, (B, L), generator=generator), settings)


class Answer(NamedTuple):
    value: float
    gradient: torch.Tensor  # for the student's logits (B, L, V), float64


def ask(loss, probe, dtype=torch.float32):
    """The Answer of a loss to a probe. It may return the loss, or a tuple that starts with it."""
    student = probe.student.to(dtype).requires_grad_()
    gradient = torch.zeros_like(student)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about reduction="mean"
            value = loss(student, probe.teacher.to(dtype), probe.targets.clone(), settings=probe.settings)

        value = value[0] if isinstance(value, tuple) else value
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise InputError("the loss must return a tensor with one number, or a tuple that starts with it")
        if value.requires_grad:
            gradient, = torch.autograd.grad(value.sum(), student, allow_unused=True, materialize_grads=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the loss raised {type(error).__name__}: {error}") from error
    return Answer(value.item(), gradient.double())


def is_close(a, b, tolerance=TIGHT):
    """Whether two tensors, or two numbers, agree; NaN agrees with NaN."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    both_nan = a.isnan() & b.isnan()
    return bool((a - b).masked_fill(both_nan, 0).norm() <= tolerance * b[~both_nan].norm() + 1e-5)


def ratio(a, b, tolerance=TIGHT):
    """The factor r > 0 with a = r * b, for two gradients; None if their directions differ."""
    if not b.any():
        return None if a.any() else 1.0
    r = ((a * b).sum() / (b * b).sum()).item()
    return r if r > 0 and (a - r * b).norm() <= tolerance * a.norm() else None


# ------------------------------------------------------------------------------------ finding the name
class Finding(NamedTuple):
    """Something that is wrong; name: "" where no known mistake fits."""
    name: str
    text: str
    anchor: str  # of docs/wrong-losses.md

    def __str__(self):
        name = f"{self.name}: " if self.name else ""
        return f"{name}{self.text}. {FIXES[self.anchor]} (docs/wrong-losses.md#{self.anchor})."


def named(name):
    """The Finding for a known loss."""
    if name in DIVERGENCES:
        text = f"the divergence is {DIVERGENCES[name]}; if you mean that, add --divergence {name}"
        return Finding("", text, "another-divergence")
    text = " ".join(MISTAKES[name].loss.__doc__.split())
    return Finding(name, text.rstrip("."), MISTAKES[name].anchor)


class Match(NamedTuple):
    names: list  # of known losses; empty if this is the right one
    base: str  # a key of REDUCTIONS
    has_value: bool  # whether the value is also that of the known loss


def compare(answers, others, tolerance):
    """The factor between the gradients of each pair, None if a direction differs; and whether the values
    have the same factors."""
    pairs = [*zip(answers, others, strict=True)]
    factors = [ratio(a.gradient, b.gradient, tolerance) for a, b in pairs]
    if None in factors:
        return None, False
    has_value = all(is_close(a.value, r * b.value, tolerance)
                    for (a, b), r in zip(pairs, factors, strict=True))
    return torch.tensor(factors), has_value


def explain(answers, known, n_tokens, tolerance=TIGHT):
    """The known loss that has these gradients, up to factors that are known, too; None if none has.

    answers: one for each probe; known: {name: the answers of that loss}; n_tokens: those of each probe.
    """
    # Mistakes that only change the size of value and gradient, such as a divisor.
    scalars = {}
    for name, others in known.items():
        factors, has_value = compare(others, known[""], tolerance)
        if name in MISTAKES and has_value and not is_close(factors, torch.ones(len(factors))):
            scalars[name] = factors
    combinations = [names for n in range(3) for names in itertools.combinations(scalars, n)]

    matches = []
    for name, others in known.items():
        factors, has_value = compare(answers, others, tolerance)
        if factors is None:
            continue
        for factor_names, base in itertools.product(combinations, REDUCTIONS):
            start = n_tokens if base == "sum" else torch.ones(len(n_tokens))
            expected = math.prod((scalars[factor] for factor in factor_names), start=start)
            if is_close(factors / expected, torch.ones(len(factors)), tolerance):
                matches.append(Match([*filter(None, (name, *factor_names))], base, has_value))
    return max(matches, key=lambda match: match.has_value, default=None)  # the first one of the best


# ------------------------------------------------------------------------------------ the examination
def check(loss, fixed=None, asked="forward", accumulate=False):
    """Examine a loss(student_logits, teacher_logits, targets, settings) on logits (B, L, V).

    Returns a list of Findings, empty if the loss is right, and the name of its reduction. fixed: settings
    that the loss does not take, with the values that it uses. asked: the divergence that is meant.
    accumulate: whether the values of micro-batches are averaged.
    """
    fixed = {"jsd_weight": 0.1} | (fixed or {})
    parts = {"the loss": KL_ALONE} if fixed.keys() & KL_ALONE.keys() else PARTS

    def settings(part, T):
        return LossSettings(**{"temperature": T} | parts[part] | fixed, divergence=asked)

    if parts is PARTS and ignores_weights(loss, [settings(part, 2.0) for part in parts]):
        text = "the weights that were asked for change nothing, so the loss uses weights of its own"
        return [named("half the CLM unasked")._replace(text=text)], ""

    findings = []
    bases = set()
    for part in parts:
        if part == "the mixture" and (findings or len(bases) > 1):
            break  # it can only repeat what its terms have shown
        probes = [make_probe(B, L, V, settings(part, T)) for B, L, V, T in SHAPES]
        found, base = on_ordinary_logits(loss, probes, part)
        findings += found
        bases.add(base)
    if bases >= {"sum", "mean"}:
        findings.append(Finding("", "one term is a sum over tokens and the other one a mean", "divisors"))

    # Look further only where this cannot repeat the same mistake.
    if all(finding.name and finding.anchor != "columns-and-positions" for finding in findings):
        for part in parts:
            findings += with_padding(loss, settings(part, 2.0), findings)
    if all(finding.anchor == "padding" for finding in findings):
        first = next(iter(parts))
        findings += on_large_logits(loss, settings(first, 1.0))
        findings += with_padded_vocabulary(loss, settings(first, 2.0))
    if not findings and "mean" in bases and accumulate:
        findings = [named("mean of means")]
    return [*dict.fromkeys(findings)], bases.pop()


def ignores_weights(loss, settings_of_parts):
    """Whether the loss is the same for the KL alone and for the CLM alone."""
    kl_alone, clm_alone, _ = (ask(loss, make_probe(3, 7, 40, settings)) for settings in settings_of_parts)
    return (math.isfinite(kl_alone.value) and is_close(kl_alone.value, clm_alone.value)
            and is_close(kl_alone.gradient, clm_alone.gradient))


def on_ordinary_logits(loss, probes, part):
    """Findings for one of the PARTS, and how it is reduced. probes: a Probe of each of SHAPES."""
    answers = [ask(loss, probe) for probe in probes]
    known = {name: [ask(other, probe, torch.float64) for probe in probes]
             for name, other in known_losses(probes[0].settings.divergence).items()}
    n_tokens = torch.tensor([float(probe.targets.numel()) for probe in probes])

    match = explain(answers, known, n_tokens)
    if match is None and (rounded := explain(answers, {"": known[""]}, n_tokens, COARSE)):
        return [named("softmax in bf16")], rounded.base
    findings = [named(name) for name in match.names] if match else []
    if match is None or not match.has_value:
        findings.append(described(part, match, answers[1], known[""][1]))
    return findings, match.base if match else ""


def described(part, match, found, right):
    """What has no name: the second of SHAPES, expected and found."""
    B, L, V, T = SHAPES[1]
    what = "a value that does not fit its gradient" if match else "a gradient that no known loss has"
    cosine = F.cosine_similarity(found.gradient.flatten(), right.gradient.flatten(), dim=0)
    text = (f"{part} has {what}. On {B} x {L} tokens (V = {V}, T = {T:g} unless it is fixed) the mean should "
            f"be {right.value:.4g}, and the value is {found.value:.4g}; the norm of its gradient should be "
            f"{right.gradient.norm():.3g}, and is {found.gradient.norm():.3g} (a sum is {B * L} times as "
            f"large); the cosine of the two gradients is {cosine:.3f}")
    return Finding("", text, "weights" if cosine > 1 - TIGHT else "another-divergence")


def with_padding(loss, settings, findings):
    """A sequence of nine tokens and one of three with padding after it, against each without padding."""
    both = make_probe(2, 9, 40, settings)
    both.targets[1, 3:] = -100
    value, gradient = ask(loss, both)
    if math.isfinite(value) and not gradient.isfinite().all():
        return [named("NaN behind a finite loss")]
    if not is_close(gradient[1, 3:], torch.zeros(6, 40)):
        return [named("padding counted")]
    if findings:
        return []

    nine = ask(loss, both.alone(0, 9)).gradient
    three = F.pad(ask(loss, both.alone(1, 3)).gradient, (0, 0, 0, 6))
    a_sum = torch.cat((nine, three))
    a_mean = torch.cat((9 * nine, 3 * three)) / 12
    if is_close(gradient, a_sum) or is_close(gradient, a_mean):
        return []
    if is_close(gradient, a_sum / 2):
        return [named("mean of means")]
    if ratio(gradient, a_mean):
        return [named("divisor of other tokens")]
    return [Finding("", "padding changes how much the other tokens weigh", "padding")]


def on_large_logits(loss, settings):
    """Logits with a standard deviation of 100, where most probabilities are 0 in float32."""
    probe = make_probe(2, 5, 40, settings, scale=100.0)
    found = ask(loss, probe)
    right = ask(definition, probe, torch.float64)
    factor = found.value / right.value  # 1 for a mean, N for a sum
    if math.isfinite(factor) and is_close(found.gradient, factor * right.gradient):
        return []
    if settings.divergence == "jsd" and math.isnan(found.value):
        return [named("logarithm of zero")]
    return [Finding("", f"right for ordinary logits, but not for large ones, where probabilities round to 0: "
                    f"expected {right.value:.4g} as a mean, found {found.value:.4g}", "numbers")]


def with_padded_vocabulary(loss, settings):
    """A teacher whose head has more rows, which only pad it. A loss may refuse it, or ignore these rows."""
    probe = make_probe(2, 9, 40, settings)
    wider = probe._replace(teacher=F.pad(probe.teacher, (0, PADDING_ROWS), value=-100))
    try:
        gradient = ask(loss, wider).gradient
    except InputError:
        return []
    if ratio(gradient, ask(definition, probe, torch.float64).gradient):
        return []
    if ratio(gradient, ask(MISTAKES["zeros for missing rows"].loss, probe, torch.float64).gradient):
        return [named("zeros for missing rows")]
    return [Finding("", f"wrong if the teacher's logits have {PADDING_ROWS} more columns, all -100",
                    "columns-and-positions")]


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.check_loss FILE.py:FUNCTION [options]")
    add = parser.add_argument
    add("function", metavar="FILE.py:FUNCTION",
        help="called with student_logits, teacher_logits, targets (shifted already), and by name with "
             "settings, a LossSettings, or with those of temperature, kd_weight, clm_weight and jsd_weight "
             "that it has as parameters. It may return a sum or a mean, alone or first in a tuple")
    add("--form", choices=FORMS, default="tokens",
        help="; ".join(f"{name}: {shapes}" for name, shapes in FORMS.items()))
    add("--divergence", choices=DIVERGENCES, default="forward", help="the one that you mean")
    add("--accumulate", action="store_true", help="your loop averages the loss over micro-batches")
    for name, default in DEFAULTS.items():
        add(flag(name), type=float, default=default, metavar="X",
            help=f"the value that it uses, if it has no parameter {name}")
    return parser.parse_args(argv)


def flag(name):
    return "--" + name.replace("_", "-")


def main():
    args = parse_args()
    loss, taken = adapted(load_function(args.function), args.form)
    fixed = {name: getattr(args, name) for name in DEFAULTS if name not in taken}
    for name, value in fixed.items():
        if value is None:
            raise InputError(f"{args.function} has no parameter {name}: add {flag(name)} and the value that "
                             "it uses")

    try:
        findings, base = check(loss, fixed, args.divergence, args.accumulate)
    except InputError as error:
        raise InputError(f"{args.function}: {error} (called with {FORMS[args.form]}; see --form)") from error
    for finding in findings:
        print(f"wrong: {finding}")
    if not findings:
        print(f"right: {args.function}")
        print(f"  divergence: {DIVERGENCES[args.divergence]}, times T²")
        print(f"  reduction: {REDUCTIONS[base]}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    run_cli(main)
