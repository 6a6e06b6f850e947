"""A lab: write distillation yourself, in five functions, and be told which mistake you made.

    python -m extras.lab             check the functions below, train with your loss
    python -m extras.lab --steps 0   only check
    python -m extras.lab my_lab.py   the same with a copy of this file

Each of the five functions has a docstring with its shapes and a hint. Replace `raise NotImplementedError`
with your code; the worked example in the README is all that you need. extras/check_loss.py names your
mistakes, and docs/wrong-losses.md shows where others made them.

Shapes: B sequences, L tokens in each, V vocabulary. T is the temperature, p the teacher, q the student.
"""
import sys
from dataclasses import replace
from unittest import mock

import torch

import distill
from extras.check_loss import adapted, check, definition, load_function
from extras.study import trained
from model import GPT2, GPTNeoX
from support.cli import InputError, checked, new_parser, run_cli, user_path
from support.ranks import autocast, keep_memory
from support.scoring import validate


# ------------------------------------------------------------------------------------ yours
def kl_of_tokens(student_logits, teacher_logits, T):
    """How far the student is from its teacher at each token: KL(p || q) at temperature T.

    student_logits, teacher_logits (B, L, V) -> (B, L), in nats.
    Hint: KL(p || q) is the sum over the vocabulary of p * (log p - log q). log_softmax gives logarithms that
    are finite even where a probability is too small for float32.
    """
    raise NotImplementedError


def mixture(kl, clm, T, kd_weight, clm_weight):
    """The loss, from sums over tokens: kl at temperature T, and clm, the cross-entropy with the text.

    kl, clm: tensors with one number -> the same.
    Hint: divide logits by T, and the gradient of the KL is about T² times smaller. The weights should mean
    the same at every T.
    """
    raise NotImplementedError


def distillation_loss(student_logits, teacher_logits, targets, temperature, kd_weight, clm_weight):
    """The whole loss of a micro-batch: a sum over its counted tokens.

    student_logits, teacher_logits (B, L, V); targets (B, L), -100 where there is nothing to predict, such as
    after the end of a short document.
    Hint: use both functions above. Which positions may enter the KL?
    """
    raise NotImplementedError


def step(micro_batches, loss_of, parameters):
    """Put the gradient of a whole step into .grad: that of the mean loss of all tokens in all micro-batches.

    loss_of(micro_batch) -> (sum of the loss over its tokens, number of its tokens); parameters: a list.
    Micro-batches have different numbers of tokens. Returns the mean loss.
    Hint: .backward() adds to .grad. When do you know what to divide by, and how often do you divide?
    """
    raise NotImplementedError


def student_of(teacher, layers):
    """A student with the teacher's blocks `layers`, say [0, 2, 5], and all that is around the blocks.

    teacher: a GPT of model.py, with a teacher.config and teacher.blocks. Returns a new model of its class.
    Hint: dataclasses.replace(config, n_layer=...) changes a config; load_state_dict copies. The teacher
    must not change when the student is trained.
    """
    raise NotImplementedError


# ------------------------------------------------------------------------------------ the checks
# Each gets a function like one of those above, and returns what is wrong with it: lines, none if it is right.
def check_kl(kl_of_tokens):
    def loss(s, t, y, settings):
        T = settings.temperature
        kl = kl_of_tokens(s, t, T)
        if kl.shape != y.shape:
            raise InputError(f"it must return a number for each token, {[*y.shape]}; yours is {[*kl.shape]}")
        rest = definition(s, t, y, replace(settings, kd_weight=0.0))
        return settings.kd_weight * T**2 * kl[y != -100].mean() + rest

    return found_in(loss)


def check_mixture(mixture):
    def loss(s, t, y, settings):
        T = settings.temperature
        kl = definition(s, t, y, replace(settings, kd_weight=1 / T**2, clm_weight=0.0))
        clm = definition(s, t, y, replace(settings, kd_weight=0.0, clm_weight=1.0))
        return mixture(kl, clm, T, settings.kd_weight, settings.clm_weight)

    return found_in(loss)


def check_distillation_loss(distillation_loss):
    loss, _ = adapted(distillation_loss, "sequences", "distillation_loss")
    findings, _ = check(loss, {"jsd_weight": 0.5}, accumulate=True)  # so a mean is not right here
    return findings


def found_in(loss):
    """Findings except those about padding, which only distillation_loss has to know."""
    return [finding for finding in check(loss)[0] if finding.anchor != "padding"]


def check_step(step):
    """Three micro-batches of 2, 3 and 5 tokens, with the loss (w * x)² of a token x."""
    micro_batches = torch.arange(1.0, 11.0).split([2, 3, 5])
    w = torch.ones(1, requires_grad=True)
    loss = step(micro_batches, lambda x: ((w * x).square().sum(), len(x)), [w])
    if w.grad is None:
        return ["no gradient arrived in .grad: call .backward() on the loss of each micro-batch"]

    means = [x.square().mean().item() for x in micro_batches]
    factors = {
        1.0: [],
        sum(means) / 3 / 38.5: ["mean of means: a micro-batch weighs the same, however many tokens it has"],
        sum(means) / 38.5: ["a sum of means: add sums up, and divide by all tokens at the end"],
        10.0: ["the gradient is a sum over tokens: it was never divided"],
        0.1: ["divided twice: by the tokens, and by the tokens again"],
        1 / 3: ["divided twice: by the tokens, and by the number of micro-batches"],
    }
    for factor, lines in factors.items():
        if torch.isclose(w.grad, torch.tensor(77 * factor)):  # the mean of x² is 38.5
            if not lines and abs(float(loss) - 38.5) > 1e-3:
                return [f"the gradient is right; the mean loss is 38.5, and you returned {float(loss):.4g}"]
            return lines
    return [f"the gradient should be 77, and it is {w.grad.item():.4g}"]


def check_student(student_of):
    for architecture, vocab_size in ((GPT2, 11), (GPTNeoX, 13)):
        config = architecture.config(vocab_size=vocab_size, context=8, width=8, n_layer=4, n_head=2)
        teacher = architecture(config)
        for parameter in teacher.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # no two layers, biases or norms are alike
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        student = student_of(teacher, [0, 3])
        if student is teacher or student.state_dict().keys() - before.keys():
            return ["it must return a new model, with the teacher's kinds of tensors"]
        if len(student.blocks) != 2 or student.config.n_layer != 2:
            return [f"for layers [0, 3] it has {len(student.blocks)} blocks, and {student.config.n_layer} in "
                    "its config"]

        for name, tensor in student.state_dict().items():
            source = name.replace("blocks.1.", "blocks.3.")
            if not torch.equal(tensor, before[source]):
                like = [other for other in before if torch.equal(tensor, before[other])]
                found = f", but of {' '.join(like)}" if like else ""
                return [f"{name} is not a copy of the teacher's {source}{found}"]
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(1)
        if any(not torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items()):
            return ["teacher and student share tensors: training the student changes its teacher"]
    return []


CHECKS = {"kl_of_tokens": check_kl, "mixture": check_mixture, "distillation_loss": check_distillation_loss,
          "step": check_step, "student_of": check_student}


def examine(function, name):
    """What is wrong with a function of the lab: lines; None if it is not written yet."""
    try:
        return [str(line) for line in CHECKS[name](function)]
    except Exception as error:
        if isinstance(error, NotImplementedError) or isinstance(error.__cause__, NotImplementedError):
            return None
        return [str(error) if isinstance(error, InputError) else f"it raised {type(error).__name__}: {error}"]


# ------------------------------------------------------------------------------------ 100 steps
DEMO = "--no-control --eval-tokens 20000"


def held_out(args, teacher, student, corpus, tokenizer):
    """The figures of a student that `trained` returns."""
    context = autocast(args, torch.device(args.device))
    _, row = validate([teacher, student], corpus, tokenizer.vocab_size, args, context)
    return {"loss": row["loss"]}


def train_with(loss_function, steps):
    """The held-out loss of the demo's student after some steps with a loss of plain_loss's form."""
    with mock.patch.dict(distill.LOSSES, forward=loss_function):
        return trained(f"{DEMO} --steps {steps}", held_out)["loss"]


def as_plain_loss(distillation_loss):
    """The reader's loss in the form that training calls: logits (n, V), and the terms for the log."""
    def loss_function(student_logits, teacher_logits, targets, settings):
        loss = distillation_loss(student_logits[None], teacher_logits[None], targets[None],
                                 settings.temperature, settings.kd_weight, settings.clm_weight)
        with torch.no_grad():
            _, kl, clm = distill.plain_loss(student_logits, teacher_logits, targets, settings)
        return loss, kl, clm

    loss_function.formula = "your loss"
    return loss_function


def main():
    parser = new_parser(__doc__, "python -m extras.lab [FILE] [options]")
    parser.add_argument("file", nargs="?", type=user_path, default=__file__, help="a copy of the lab")
    parser.add_argument("--steps", type=checked(int, "0 or more", lambda n: n >= 0), default=100, metavar="N",
                        help="train the demo for N steps at the end; 0: do not")
    args = parser.parse_args()

    functions = {name: load_function(f"{args.file}:{name}") for name in CHECKS}
    results = {}
    for number, (name, function) in enumerate(functions.items(), 1):
        results[name] = examine(function, name)
        lines = ["not written yet"] if results[name] is None else results[name] or ["right"]
        for line in lines:
            print(f"{number} {name}: {line}", flush=True)

    if args.steps and results["distillation_loss"] is not None:
        keep_memory()
        print(f"Training the demo for {args.steps} steps, with your loss and with ours ...", flush=True)
        losses = {"yours": as_plain_loss(functions["distillation_loss"]), "ours": distill.plain_loss}
        for name, loss_function in losses.items():
            try:
                print(f"  held-out loss, {name}: {train_with(loss_function, args.steps):.4f}", flush=True)
            except InputError as error:  # a loss of NaN
                print(f"  {name} stops: {error}")
    sys.exit(0 if all(lines == [] for lines in results.values()) else 1)


if __name__ == "__main__":
    run_cli(main)
