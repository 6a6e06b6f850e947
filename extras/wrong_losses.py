"""Losses that public distillation code has, or had, and what each does to a student of the demo's teacher.

    python -m extras.wrong_losses                 every run that is not finished; stop and start as you like
    python -m extras.wrong_losses --only swapped  those whose name contains "swapped"
    python -m extras.wrong_losses --table         what the runs came to, as docs/wrong-losses.md has it

Read in this order:
  the mistakes  a function each, and under its name where it was found; distill.plain_loss is the right one
  RUNS          which mistake trains with which settings, and the right loss with the same
  usual_loop    how such code divides: each micro-batch by itself, then by the number of micro-batches
  one_run       300 steps of a student, and a row of docs/wrong-losses.jsonl

A mistake has the arguments of distill.plain_loss, but as such code has them: logits are (B, L, V), targets
(B, L), and (loss, kl, clm) are means, or what its author took for one. Each function has one mistake, and
where that is not about padding it leaves -100 alone, as its runs have none. docs/wrong-losses.md tells the
story, and tests/test_wrong_losses.py shows that our loss makes none of them.

Shapes: B sequences, L tokens of each, N = B * L, C width, V vocabulary. T is the temperature.
"""
import math
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.nn import functional as F

import distill
from extras import atlas
from extras.results import add_row, commit, read_rows
from support.chunked_loss import Losses, LossSettings
from support.cli import InputError, format_table, new_parser, run_cli
from support.runtime import Ranks, autocast, keep_memory

RESULTS = Path(__file__).parent.parent / "docs" / "wrong-losses.jsonl"
LENGTH = 256  # tokens of an example, in the demo
PADDING_ROWS = 64  # by which a teacher's vocabulary is larger, where the two differ


# ------------------------------------------------------------------------------------ what they share
def softened(student_logits, teacher_logits, settings):
    """log q and log p, at temperature T."""
    T = settings.temperature
    return (student_logits / T).log_softmax(-1), (teacher_logits / T).log_softmax(-1)


def mean_clm(student_logits, targets):
    return F.cross_entropy(student_logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def weighted(kl, clm, settings):
    """The mixture as it should be: (loss, kl, clm)."""
    return settings.kd_weight * settings.temperature**2 * kl + settings.clm_weight * clm, kl, clm


# ------------------------------------------------------------------------------------ divisors
def batchmean(student_logits, teacher_logits, targets, settings):
    """`batchmean` divides by B alone, so this is the KL of a sequence beside the CLM of a token.
    transformers #1181, SparseML #592."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return weighted(kl, mean_clm(student_logits, targets), settings)


def mean_over_vocabulary(student_logits, teacher_logits, targets, settings):
    """`mean`, the default of F.kl_div, divides by B * L * V, too. TRL #4105 divided by L * V."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="mean", log_target=True)
    return weighted(kl, mean_clm(student_logits, targets), settings)


def divided_twice(student_logits, teacher_logits, targets, settings):
    """A mean, and then a trainer that divides by the tokens again. torchtune's recipe, easydistill #16."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    n_tokens = (targets != -100).sum()
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / n_tokens
    return weighted(kl / n_tokens, mean_clm(student_logits, targets) / n_tokens, settings)


def mean_of_means(student_logits, teacher_logits, targets, settings):
    """Right for a micro-batch; over several of unequal lengths, tokens of the short ones count more.
    TRL #4719, transformers #34191."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[targets != -100].mean()
    return weighted(kl, mean_clm(student_logits, targets), settings)


def padding_counted(student_logits, teacher_logits, targets, settings):
    """The CLM skips -100, the KL does not look. OptiPFair #34, Liger #974."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return weighted(kl, mean_clm(student_logits, targets), settings)


# ------------------------------------------------------------------------------------ weights
def t_squared_missing(student_logits, teacher_logits, targets, settings):
    """The KL weighs 1 / T² of what its weight says. Keras-io #869."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / targets.numel()
    clm = mean_clm(student_logits, targets)
    return settings.kd_weight * kl + settings.clm_weight * clm, kl, clm


def only_the_report_is_right(student_logits, teacher_logits, targets, settings):
    """T², the weights and the CLM reach the number, and not the gradient. axolotl #3660."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / targets.numel()
    loss, kl, clm = weighted(kl, mean_clm(student_logits, targets), settings)
    return kl + (loss - kl).detach(), kl, clm


def half_the_clm_unasked(student_logits, teacher_logits, targets, settings):
    """A fused loss keeps its own default weights, whatever the run asked for. TRL #5731."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / targets.numel()
    clm = mean_clm(student_logits, targets)
    return 0.5 * settings.temperature**2 * kl + 0.5 * clm, kl, clm


# ------------------------------------------------------------------------------------ another divergence
def no_entropy(student_logits, teacher_logits, targets, settings):
    """A "forward KL" that is a cross-entropy: a perfect student scores its teacher's entropy.
    torchtune #1698."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = -(log_p.exp() * log_q).sum(-1).mean()
    return weighted(kl, mean_clm(student_logits, targets), settings)


def arguments_swapped(student_logits, teacher_logits, targets, settings):
    """F.kl_div(a, b) is KL(b || a): with the teacher in front it is the reverse KL. aprender #2153."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_p, log_q, reduction="sum", log_target=True) / targets.numel()
    return weighted(kl, mean_clm(student_logits, targets), settings)


def probability_for_logarithm(student_logits, teacher_logits, targets, settings):
    """F.kl_div wants the student's logarithms; this is sum p * (log p - q). ProDA #20 and #43."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q.exp(), log_p.exp(), reduction="sum") / targets.numel()
    return weighted(kl, mean_clm(student_logits, targets), settings)


def log_target_forgotten(student_logits, teacher_logits, targets, settings):
    """Logarithms where F.kl_div expects the teacher's probabilities. Asked for in
    nlp-with-transformers #94."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="sum") / targets.numel()
    return weighted(kl, mean_clm(student_logits, targets), settings)


# ------------------------------------------------------------------------------------ numbers and columns
def logarithm_of_zero(student_logits, teacher_logits, targets, settings):
    """JSD through the mixture of probabilities: 0 * log 0 is NaN where both are below 1e-45.
    Liger #769, #1397, #1453."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    w = settings.jsd_weight
    log_m = (w * log_p.exp() + (1 - w) * log_q.exp()).log()
    kl = (w * log_p.exp() * (log_p - log_m) + (1 - w) * log_q.exp() * (log_q - log_m)).sum(-1).mean()
    return weighted(kl, mean_clm(student_logits, targets), settings)


def softmax_in_bf16(student_logits, teacher_logits, targets, settings):
    """Eight bits for a difference of two nearly equal logarithms. Liger #1432, torchforge #237."""
    with torch.autocast(student_logits.device.type, enabled=False):
        log_q, log_p = softened(student_logits.bfloat16(), teacher_logits.bfloat16(), settings)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return weighted(kl.float(), mean_clm(student_logits, targets), settings)


def zeros_for_missing_rows(student_logits, teacher_logits, targets, settings):
    """A student with fewer rows than its teacher gets logits of 0 in their place. Liger #634,
    DistillKit #37."""
    # The stage: a teacher whose further rows only pad, so that its training has pushed them far down.
    teacher_logits = F.pad(teacher_logits, (0, PADDING_ROWS), value=-100)

    missing = teacher_logits.size(-1) - student_logits.size(-1)
    log_q, log_p = softened(F.pad(student_logits, (0, missing)), teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / targets.numel()
    return weighted(kl, mean_clm(student_logits, targets), settings)


def labels_shifted_twice(student_logits, teacher_logits, targets, settings):
    """Targets that were shifted meet a model that shifts them again, and the student learns the token
    after the next. transformers #562, #44642."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / targets.numel()
    clm = mean_clm(student_logits[:, :-1], targets[:, 1:])
    return weighted(kl, clm, settings)


# ------------------------------------------------------------------------------------ the runs
ALONE = "--kd-weight 1 --clm-weight 0 --batch-size 4"  # as in the demo
HALF = "--kd-weight 0.5 --clm-weight 0.5 --batch-size 4"
SHORT = "--kd-weight 1 --clm-weight 0 --packing padded"  # on short documents: see short_documents
ONE_BY_ONE = f"{SHORT} --batch-size 1 --grad-accum 4"
JSD = f"{ALONE} --divergence jsd --temperature 0.25"
COMMON = ("--student-layers 0,2,5 --schedule cosine --betas 0.9 0.95 --lr 1e-3 --steps 300 "
          f"--seq-len {LENGTH} --loss plain")

RUNS = {  # name: (mistake, or None for our loss as it is; flags)
    "right, KL alone": (None, ALONE),
    "right, seed 1": (None, f"{ALONE} --seed 1"),
    "no entropy": (no_entropy, ALONE),
    "divided twice": (divided_twice, ALONE),
    "half the CLM unasked": (half_the_clm_unasked, ALONE),
    "arguments swapped": (arguments_swapped, ALONE),
    "probability for logarithm": (probability_for_logarithm, ALONE),
    "log_target forgotten": (log_target_forgotten, ALONE),
    "zeros for missing rows": (zeros_for_missing_rows, ALONE),
    "softmax in bf16": (softmax_in_bf16, ALONE),
    "right, half and half": (None, HALF),
    "batchmean": (batchmean, HALF),
    "mean over vocabulary": (mean_over_vocabulary, HALF),
    "T² missing": (t_squared_missing, HALF),
    "only the report is right": (only_the_report_is_right, HALF),
    "labels shifted twice": (labels_shifted_twice, HALF),
    "right, short documents": (None, f"{SHORT} --batch-size 4"),
    "padding counted": (padding_counted, f"{SHORT} --batch-size 4"),
    "mean of means": (mean_of_means, ONE_BY_ONE),
    "logarithm of zero": (logarithm_of_zero, JSD),
}

SAME_GRADIENT = {  # as another run, by the tests, so that it need not be made again
    "no entropy": "right, KL alone",
    "half the CLM unasked": "right, half and half",
}


def usual_loop(mistake, length=LENGTH):
    """A mistake as distill.LOSSES has losses, N = B * length.

    Usual code takes the mean of a micro-batch and divides by the number of micro-batches. Our loop divides
    by `tokens`; so each micro-batch brings its mean, and says that it is one token.
    """
    def losses_of(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
        student_logits = F.linear(student_hidden, student_head).float().unflatten(0, (-1, length))
        teacher_logits = F.linear(teacher_hidden, teacher_head).float().unflatten(0, (-1, length))
        loss, kl, clm = mistake(student_logits, teacher_logits, targets.unflatten(0, (-1, length)), settings)
        nothing = torch.zeros(())
        return Losses(loss, kl.detach(), clm.detach(), nothing, nothing, tokens=torch.ones(()))

    return losses_of


def short_documents(tokens, eot):
    """The same text in documents of 8 to 256 tokens, short ones as likely as long ones on a logarithmic
    scale: 73% of a padded batch is padding. (Where a module ends, they can be shorter.)"""
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(8), np.log(LENGTH), len(tokens) // 8))
    starts = lengths.astype(int).cumsum()
    return np.insert(tokens, starts[starts < len(tokens)], eot)


def one_run(name):
    """Train and score as extras/atlas.py does, with a mistake in place of the loss. Returns its row."""
    mistake, flags = RUNS[name]
    losses_of = usual_loop(mistake) if mistake else distill.plain_losses
    load_corpus = distill.load_corpus

    def load_short_corpus(args, tokenizer):
        corpus = load_corpus(args, tokenizer)
        if args.packing == "padded":
            corpus.train = short_documents(corpus.train, corpus.eot)
        return corpus

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(distill.LOSSES, plain=losses_of))
        stack.enter_context(mock.patch.object(distill, "load_corpus", load_short_corpus))
        screen = on_the_screen(losses_of, flags)
        row = {"name": name, "flags": f"{COMMON} {flags}", "commit": commit()}
        if name in SAME_GRADIENT:
            return row | screen | {"ends as": SAME_GRADIENT[name]}
        try:
            return atlas.one_run(name, row["flags"]) | screen
        except InputError as error:  # a loss of NaN: the run stops at once, and says so
            return row | screen | {"ends as": "stops at once", "why": str(error).split(". ")[0]}


def on_the_screen(losses_of, flags):
    """The loss that a run shows for its first step: of a perfect student, and of the one it starts from."""
    args = distill.parse_args(f"{atlas.BASE} {COMMON} {flags}".split())
    device = Ranks(args.device).device
    tokenizer, teacher, student = distill.load_models(args, device)
    corpus = distill.load_corpus(args, tokenizer)

    shown = {}
    for who, network in (("perfect", teacher), ("initial", student)):
        sums = torch.zeros(2)  # of the loss, of tokens
        for micro in range(args.grad_accum):
            ids, targets = distill.micro_batch(corpus, micro, args, device)
            with torch.no_grad(), autocast(args, device):
                hidden, teacher_hidden = (x.hidden(ids).flatten(0, 1) for x in (network, teacher))
                losses = losses_of(hidden, network.head_weight, teacher_hidden, teacher.head_weight, targets,
                                   LossSettings.of(args))
            sums += torch.stack((losses.loss, losses.tokens)).float()
        loss = (sums[0] / sums[1]).item()
        shown[f"{who} on screen"] = loss if math.isfinite(loss) else None  # JSON has no NaN
    return shown


# ------------------------------------------------------------------------------------ results
def table(done):
    """The rows that are done, in the order of RUNS, as Markdown."""
    def show(value):
        if value is None:
            return "NaN"
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"

    rows = []
    for name in RUNS:
        if name in done:
            row = done[name]
            rows.append({
                "loss": name,
                "perfect student": show(row["perfect on screen"]),
                "first step": show(row["initial on screen"]),
                "held-out loss": row["ends as"] if "ends as" in row else show(row["loss"]),
                "KL to teacher": "" if "ends as" in row else show(row["kl"]),
            })
    return format_table(rows)


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.wrong_losses [options]")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in their name")
    parser.add_argument("--table", action="store_true", help="make no run, show what is finished")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    names = [name for name in RUNS if args.only in name]
    if not names:
        raise InputError(f"--only {args.only}: no run has this in its name; there are {', '.join(RUNS)}")
    done = read_rows(RESULTS)
    if args.table and not done:
        raise InputError("--table: no run is done yet; without --table they are made")

    for name in names:
        if args.table or name in done:
            continue
        keep_memory()
        done[name] = one_run(name)
        add_row(RESULTS, done[name])
    print(table(done))


if __name__ == "__main__":
    run_cli(main)
