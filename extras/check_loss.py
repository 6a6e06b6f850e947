"""Name the mistake in anybody's distillation loss, in seconds, without training.

    python -m extras.check_loss my_loss.py:loss                   on (N, V)
    python -m extras.check_loss my_loss.py:loss --form sequences  on (B, L, V)
    python -m extras.check_loss my_loss.py:kl --kd-weight 1 --clm-weight 0
    python -m extras.check_loss distill.py:plain_loss

Read in this order:
  definition   the right loss
  FORMS        the ways in which such functions are called
  explain      which known loss has the same gradient, up to a factor that has a name, too
  check        the whole examination: ordinary logits, padding, large logits, padded vocabularies

The direction of a gradient says which loss it belongs to, and its size how that was divided. So a loss with
a wrong divergence and a wrong divisor gets both names. The wrong losses are those of extras/wrong_losses.py;
docs/wrong-losses.md says where each was found and what it does to a student.

Exit code: 0 the loss is right, 1 it is not, 2 it could not be checked.
Shapes: B sequences, L tokens in each, N = B * L, V vocabulary. T is the temperature.
"""
import difflib
import functools
import inspect
import itertools
import math
import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from distill import LossSettings
from extras.wrong_losses import MISTAKES, PADDING_ROWS, Mistake
from support.cli import InputError, lookalike, new_parser, run_cli

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
    "mean over all positions": "a mean; that of the KL also counts the last position, which has no target",
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


def unshifted(s, t, y, settings):
    """The CLM asks for the token that the model has just read, not for the next one."""
    return definition(s, t, F.pad(y, (1, 0))[:, :-1], settings)


UNSHIFTED = "labels not shifted"
KNOWN = MISTAKES | {UNSHIFTED: Mistake(UNSHIFTED, unshifted, "columns-and-positions", ())}
OF_JSD = ("mixture exchanged", "logarithm of zero")  # mistakes that no other divergence can have


def known_losses(asked):
    """{name: loss}, in the order in which they are tried; "" is the right one. All give means.

    asked: the divergence that is meant; the other ones have names, too.
    """
    def with_divergence(name):
        return lambda s, t, y, settings: definition(s, t, y, replace(settings, divergence=name))

    others = {name: with_divergence(name) for name in DIVERGENCES if name != asked}
    mistakes = {name: known.loss for name, known in KNOWN.items() if asked == "jsd" or name not in OF_JSD}
    return {"": definition} | mistakes | others


# ------------------------------------------------------------------------------------ how it is called
def unshift(student_logits, teacher_logits, targets):
    """Logits (B, L + 1, V) and labels (B, L + 1) for a function that shifts them itself.

    The last position has no target. There the student says what its teacher says, so that the KL is 0 and it
    does not matter whether the function counts it.
    """
    last = teacher_logits[:, -1:]
    shared = last[..., :student_logits.size(-1)]
    return (torch.cat((student_logits, shared), 1), torch.cat((teacher_logits, last), 1),
            F.pad(targets, (1, 0)))


def outputs(*batch):
    student_logits, teacher_logits, labels = unshift(*batch)
    return SimpleNamespace(logits=student_logits), SimpleNamespace(logits=teacher_logits), labels


WEIGHTS = "temperature=2, kd_weight=0.9, clm_weight=0.1"
FORMS = {  # name: its arguments from (student_logits, teacher_logits, targets), and an example
    "tokens": (lambda *batch: [tensor.flatten(0, 1) for tensor in batch],
               f"loss(student_logits, teacher_logits, targets, {WEIGHTS}); logits (N, V), targets (N,)"),
    "sequences": (lambda *batch: batch,
                  "the same; logits (B, L, V), targets (B, L) that are shifted already"),
    "shifts": (unshift, "the same; logits (B, L, V), labels (B, L) that the function shifts itself"),
    "outputs": (outputs, f"loss(outputs, teacher_outputs, labels, {WEIGHTS}); outputs.logits (B, L, V), and "
                         "it shifts"),
}
ADJUSTABLE = ("temperature", "kd_weight", "clm_weight", "jsd_weight")


def adapted(function, form, where):
    """A function of some form -> the same as loss(student_logits, teacher_logits, targets, settings) on
    logits (B, L, V), and the names of the settings that it takes."""
    arguments_of, example = FORMS[form]
    signature = inspect.signature(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = [name for name in ADJUSTABLE
             if name in signature.parameters or takes_all and name != "jsd_weight"]
    takes_object = "settings" in signature.parameters

    def keywords(settings):
        return {"settings": settings} if takes_object else {name: getattr(settings, name) for name in taken}

    try:
        signature.bind(None, None, None, **keywords(LossSettings()))
    except TypeError as error:
        raise InputError(f"{where}{signature} cannot be called in this form ({error}). --form {form} means "
                         f"{example}; see --help for others") from error

    def loss(student_logits, teacher_logits, targets, settings):
        return function(*arguments_of(student_logits, teacher_logits, targets), **keywords(settings))
    return loss, ADJUSTABLE if takes_object else taken


def load_function(where):
    """`path/to/file.py:name` -> the function."""
    path, _, name = where.rpartition(":")
    if not path.endswith(".py"):
        raise InputError(f"{where}: expected path/to/file.py:function")
    functions = {known: value for known, value in load_module(path).items() if inspect.isfunction(value)}
    if name not in functions:
        own = [known for known, value in functions.items() if value.__module__ == "<run_path>"]
        near = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(own) or 'none'}"
        raise InputError(f"{path} has no function {name!r}; {hint}")
    return functions[name]


@functools.cache
def load_module(path):
    """Run a file, wherever it is -> {name: what it defines}."""
    if not Path(path).is_file():
        near = lookalike(path)
        raise InputError(f"{path} does not exist" + (f" (did you mean {near}?)" if near else ""))
    sys.path.insert(0, str(Path(path).resolve().parent))  # a script finds its neighbours, and so does this
    try:
        return runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------ asking a loss
class Probe(NamedTuple):
    """A batch on which losses are compared."""
    student: torch.Tensor  # logits (B, L, V), float64
    teacher: torch.Tensor
    targets: torch.Tensor  # (B, L), -100 where there is none
    settings: LossSettings

    def row(self, i, length):
        """The first tokens of one sequence, as a batch of its own."""
        return Probe(*(tensor[i:i + 1, :length] for tensor in self[:3]), self.settings)


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about reduction="mean"
            value = loss(student, probe.teacher.to(dtype), probe.targets.clone(), probe.settings)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the loss raised {type(error).__name__}: {error}") from error

    value = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = getattr(value, "shape", type(value).__name__)
        raise InputError(f"the loss must return a tensor with one number, or a tuple that starts with it, "
                         f"not {found}")
    gradient = torch.zeros_like(student)
    if value.requires_grad:
        gradient, = torch.autograd.grad(value.sum(), student, allow_unused=True, materialize_grads=True)
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
    text = " ".join(KNOWN[name].loss.__doc__.split())
    return Finding(name, text.rstrip("."), KNOWN[name].anchor)


class Match(NamedTuple):
    names: list  # of known losses; empty if this is the right one
    base: str  # a key of REDUCTIONS
    has_value: bool  # whether the value is that loss's, too


def compare(answers, others, tolerance):
    """Factors of the gradients; whether the values have the same. None where directions differ."""
    pairs = [*zip(answers, others, strict=True)]
    factors = [ratio(a.gradient, b.gradient, tolerance) for a, b in pairs]
    if None in factors:
        return None, False
    has_value = all(is_close(a.value, r * b.value, tolerance)
                    for (a, b), r in zip(pairs, factors, strict=True))
    return torch.tensor(factors), has_value


def explain(answers, known, bases, tolerance=TIGHT):
    """The known loss that has these gradients, up to factors that are known, too; None if none has.

    answers: one for each probe; known: {name: the answers of that loss}; bases: {name: factor of each probe}.
    """
    # Mistakes that only change the size of value and gradient, such as a divisor.
    scalars = {}
    for name in [name for name in known if name in MISTAKES]:
        factors, has_value = compare(known[name], known[""], tolerance)
        if has_value and not is_close(factors, torch.ones(len(factors))):
            scalars[name] = factors
    combinations = [names for n in range(3) for names in itertools.combinations(scalars, n)]

    matches = []
    for name, others in known.items():
        factors, has_value = compare(answers, others, tolerance)
        for factor_names, base in itertools.product(combinations, bases) if factors is not None else ():
            expected = math.prod((scalars[factor] for factor in factor_names), start=bases[base])
            if is_close(factors / expected, torch.ones(len(factors)), tolerance):
                matches.append(Match([*filter(None, (name, *factor_names))], base, has_value))
    return max(matches, key=lambda match: match.has_value, default=None)  # the first one of the best


# ------------------------------------------------------------------------------------ the examination
def check(loss, fixed=None, asked="forward", accumulate=False, shifts=False):
    """Examine a loss(student_logits, teacher_logits, targets, settings) on logits (B, L, V).

    Returns a list of Findings, empty if the loss is right, and a dict of facts about it. fixed: settings that
    the loss does not take, with the values that it uses. asked: the divergence that is meant. accumulate:
    whether the values of micro-batches are averaged. shifts: whether the loss shifts its labels itself.
    """
    fixed = {"jsd_weight": 0.1} | (fixed or {})
    parts = {"the loss": KL_ALONE} if fixed.keys() & KL_ALONE.keys() else PARTS

    def settings(part, T):
        return LossSettings(**{"temperature": T} | parts[part] | fixed, divergence=asked)

    probes = {part: [make_probe(B, L, V, settings(part, T)) for B, L, V, T in SHAPES] for part in parts}
    first = next(iter(parts))
    findings, base = on_ordinary_logits(loss, probes, asked, shifts)
    if all(finding.anchor != "columns-and-positions" for finding in findings):
        for part in parts:
            findings += with_padding(loss, settings(part, 2.0), findings)

    # Look further only if ordinary logits are right: a later case would repeat the same mistake.
    facts = {"divergence": f"{DIVERGENCES[asked]}, times T²", "reduction": REDUCTIONS.get(base, base)}
    if all(finding.anchor == "padding" for finding in findings):
        findings += on_large_logits(loss, settings(first, 1.0))
        found, facts["teacher with a larger vocabulary"] = with_padded_vocabulary(loss, settings(first, 2.0))
        findings += found
    if not findings and base == "mean" and accumulate:
        findings = [named("mean of means")]
    return [*dict.fromkeys(findings)], facts


def on_ordinary_logits(loss, probes, asked, shifts):
    """Findings, and how the loss is reduced. probes: {part: [Probe of each of SHAPES]}."""
    every = [probe for of_part in probes.values() for probe in of_part]
    answers = [ask(loss, probe) for probe in every]
    if not any(answer.gradient.any() for answer in answers):
        raise InputError("the loss does not depend on the student's logits: its gradient is 0")
    known = {name: [ask(other, probe, torch.float64) for probe in every]
             for name, other in known_losses(asked).items()}
    B, L = torch.tensor([probe.targets.shape for probe in every], dtype=torch.float).T
    bases = {"mean": torch.ones(len(every)), "sum": B * L}
    if shifts:
        bases["mean over all positions"] = L / (L + 1)

    def explained(chosen, names=known, tolerance=TIGHT):
        """`explain` for some of the probes and some of the known losses."""
        return explain(answers[chosen], {name: known[name][chosen] for name in names},
                       {base: factors[chosen] for base, factors in bases.items()}, tolerance)

    # One known loss may explain all parts. Otherwise each part may have a mistake of its own.
    match = explained(slice(None))
    if match and match.has_value:
        return [named(name) for name in match.names], match.base
    n = len(SHAPES)
    of_part = {part: slice(i * n, i * n + n) for i, part in enumerate(probes)}
    matches = {part: explained(chosen) for part, chosen in of_part.items()}
    if not all(matches.values()) and (match := explained(slice(None), [""], COARSE)):
        return [named("softmax in bf16")], match.base
    if not all(math.isfinite(answer.value) for answer in answers):
        raise InputError("the loss is NaN or infinite for ordinary logits, and not in a way that is known: "
                         "look for the logarithm of 0 or less, and for 0 / 0")
    found, right = ({part: of[chosen] for part, chosen in of_part.items()} for of in (answers, known[""]))
    return by_part(found, matches, right)


def by_part(answers, matches, right):
    """Findings where no single loss explains KL, CLM and mixture, and their reductions."""
    if len(answers) > 1:
        kl_alone, clm_alone, _ = answers.values()
        if all(is_close(a.gradient, b.gradient) for a, b in zip(kl_alone, clm_alone, strict=True)):
            text = "the weights that were asked for change nothing, so the loss uses weights of its own"
            return [named("half the CLM unasked")._replace(text=text)], ""

    findings = []
    bases = {match.base for part, match in matches.items() if match and part != "the mixture"}
    if {"mean", "sum"} <= bases:
        findings.append(Finding("", "one term is a sum over tokens and the other one a mean", "divisors"))
    for part, match in matches.items():
        if part == "the mixture" and (findings or len(bases) > 1):
            break  # it can only repeat what its terms have shown
        for name in match.names if match else ():
            findings.append(named(name))
        if match is None or not (match.has_value or UNSHIFTED in match.names):
            findings.append(described(part, match, answers[part][1], right[part][1]))
    return findings, "mean over all positions" if len(bases) > 1 else "".join(bases)


def described(part, match, found, right):
    """What has no name: the second of SHAPES, expected and found."""
    B, L, V, T = SHAPES[1]
    cosine = F.cosine_similarity(found.gradient.flatten(), right.gradient.flatten(), dim=0)
    what = "a value that does not fit its gradient" if match else "a gradient that no known loss has"
    norm = right.gradient.norm().item()
    text = (f"{part} has {what}. On {B} x {L} tokens (V = {V}, T = {T:g} unless it is fixed) the value "
            f"should be {right.value:.4g} as a mean or {B * L * right.value:.4g} as a sum, and is "
            f"{found.value:.4g}; the norm of the gradient should be {norm:.3g} or {B * L * norm:.3g}, and is "
            f"{found.gradient.norm():.3g}; its cosine with the right gradient is {cosine:.3f}")
    return Finding("", text, "another-divergence" if cosine < 1 - TIGHT else "weights")


def with_padding(loss, settings, findings):
    """A sequence of nine tokens and one of three with padding after it, against each without padding."""
    both = make_probe(2, 9, 40, settings)
    both.targets[1, 3:] = -100
    try:
        value, gradient = ask(loss, both)
    except InputError as error:
        return [Finding("", f"targets of -100, which mean that there is none: {error}", "padding")]
    if math.isfinite(value) and not gradient.isfinite().all():
        return [named("NaN behind a finite loss")]
    if not is_close(gradient[1, 3:], torch.zeros(6, 40)):
        return [named("padding counted")]
    if findings:
        return []

    nine = ask(loss, both.row(0, 9)).gradient
    three = F.pad(ask(loss, both.row(1, 3)).gradient, (0, 0, 0, 6))
    a_sum = torch.cat((nine, three))
    a_mean = torch.cat((9 * nine, 3 * three)) / 12
    for names, expected in (([], a_sum), ([], a_mean), (["mean of means"], a_sum / 2)):
        if is_close(gradient, expected):
            return [named(name) for name in names]
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
    """A teacher whose head has more rows, which only pad it: findings, and what the loss does."""
    probe = make_probe(2, 9, 40, settings)
    wider = probe._replace(teacher=F.pad(probe.teacher, (0, PADDING_ROWS), value=-100))
    try:
        gradient = ask(loss, wider).gradient
    except InputError:
        return [], "refused; pass the columns that both have"
    if ratio(gradient, ask(definition, probe, torch.float64).gradient):
        return [], "handled: only the columns that both have count"
    if ratio(gradient, ask(MISTAKES["zeros for missing rows"].loss, probe, torch.float64).gradient):
        return [named("zeros for missing rows")], ""
    return [Finding("", f"wrong if the teacher's logits have {PADDING_ROWS} more columns, all -100",
                    "columns-and-positions")], ""


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.check_loss FILE.py:FUNCTION [options]")
    add = parser.add_argument
    add("function", metavar="FILE.py:FUNCTION",
        help="it may return a sum or a mean, alone or first in a tuple")
    add("--form", choices=FORMS, default="tokens",
        help="how it is called. " + ". ".join(f"{name}: {example}" for name, (_, example) in FORMS.items()) +
             ". In each form it may take a LossSettings named settings instead of numbers")
    add("--divergence", choices=DIVERGENCES, default="forward", help="the one that you mean")
    add("--accumulate", action="store_true", help="your loop averages the loss over micro-batches")
    for name in ADJUSTABLE:
        add("--" + name.replace("_", "-"), type=float, metavar="X",
            help=f"the value that it uses, if it has no parameter {name}")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    loss, taken = adapted(load_function(args.function), args.form, args.function)
    fixed = {name: getattr(args, name) for name in ADJUSTABLE if name not in taken}
    if args.divergence != "jsd" and "jsd_weight" in fixed:
        fixed["jsd_weight"] = 0.5  # of no use
    for name, value in fixed.items():
        if value is None:
            raise InputError(f"{args.function} has no parameter {name}: say which value it uses, with "
                             f"--{name.replace('_', '-')}")

    shifts = args.form in ("shifts", "outputs")
    try:
        findings, facts = check(loss, fixed, args.divergence, args.accumulate, shifts)
    except InputError as error:
        if args.form == "tokens" and "the loss raised" in str(error):
            raise InputError(f"{error}; is it --form sequences?") from error
        raise
    for finding in findings:
        print(f"wrong: {finding}")
    if not findings:
        print(f"right: {args.function}")
        for name, fact in facts.items():
            print(f"  {name}: {fact}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    run_cli(main)
