"""How good are the students of a teacher on disk? The live teacher, draws from it, or its likeliest tokens.

    python -m extras.cache_study                  makes the missing runs; can be stopped
    python -m extras.cache_study --only "seed 1"  only runs whose name contains this
    python -m extras.cache_study --list           prints the plan and the results so far
    python -m extras.cache_study --page           makes the table of its page anew

Read in this order:
  ARMS               what is compared
  likeliest_losses   the usual way to keep a teacher's answers, which the product does not have: it is biased
  calibration_error  is a model right as often as it claims?
  figures            all that is measured on the held-out text

Each run is `python distill.py` with the flags in its row: the first recipe of extras/atlas.py, and a cache in
the folder `caches`, which is made if it is missing (400 MB in all). Losses are in nats per token on the
modules that the demo holds out.

Shapes: B sequences, L tokens of each, N = B * L, V vocabulary.
Reference: Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""
import torch
from torch.nn import functional as F

from extras.atlas import BASE, FIRST_DEMO, SEEDS
from extras.study import Study, arms, average, spread, trained
from support.chunked_loss import chunked_loss
from support.cli import run_cli
from support.ranks import autocast
from support.scoring import held_out_batches
from support.teacher_cache import Draws, draws_loss

LIKELIEST = 12  # tokens; the product draws the same number
ARMS = {  # {arm: its flags}
    "live teacher": "",
    "50 draws": "--teacher-cache caches/50 --cache-draws 50",
    "12 draws": "--teacher-cache caches/12 --cache-draws 12",
    "4 draws": "--teacher-cache caches/4 --cache-draws 4",
    "likeliest 12": "",  # see likeliest_losses
}


def plan():
    return {f"{arm}, seed {seed}": f"{BASE} {FIRST_DEMO} --seed {seed} {flags}".rstrip()
            for seed in SEEDS for arm, flags in ARMS.items()}


def one_run(name, flags):
    return trained(flags, figures, likeliest_losses if name.startswith("likeliest") else None)


def likeliest_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
    """The loss if only the teacher's likeliest tokens are kept, their probabilities scaled to sum to 1, as
    most code that keeps a teacher's answers does. Arguments and result are those of distill.losses_of."""
    counted = targets != -100
    t = F.linear(teacher_hidden[counted], teacher_head).float()  # (n, V)
    top = (t / settings.temperature).softmax(-1).topk(LIKELIEST)
    weights = top.values / top.values.sum(-1, keepdim=True)  # (n, LIKELIEST)

    entropy = torch.special.entr(weights).sum(-1)
    clm = F.cross_entropy(t, targets[counted], reduction="none")
    answers = Draws(top.indices, weights, entropy, clm)
    return chunked_loss(draws_loss, student_hidden, student_head, answers, None, targets, settings)


# ------------------------------------------------------------------------------------ what is measured
def calibration_error(confidence, reference, n_bins=15):
    """How far a model's confidence is from how often it is right: 0 for a model that knows what it knows.

    confidence (n,): probability of the token that it finds likeliest; reference (n,): 1 if that token is
    right, or the probability that a better model gives to it. Tokens with similar confidence share one of
    n_bins bins of equal width. The error is the distance between the two means in a bin, averaged over
    tokens: the expected calibration error of Guo et al. 2017, section 2.
    """
    bins = (confidence.double() * n_bins).ceil().long() - 1  # a bin includes its upper end
    gaps = torch.zeros(n_bins, dtype=torch.float64)
    gaps.index_add_(0, bins.clamp(min=0), confidence.double() - reference.double())
    return gaps.abs().sum().item() / len(confidence)


@torch.no_grad()
def figures(args, teacher, student, corpus, tokenizer):
    """Figures of the student on the held-out text, and under "teacher" those of the teacher."""
    of_student, of_teacher = [], []
    for ids, targets in held_out_batches(corpus, args, "cpu"):
        with autocast(args, torch.device("cpu")):
            log_p = log_probabilities(teacher, ids, tokenizer.vocab_size)  # (N, V)
            log_q = log_probabilities(student, ids, tokenizer.vocab_size)
        of_student.append(figures_of_tokens(log_q, log_p, targets.flatten()))
        of_teacher.append(figures_of_tokens(log_p, log_p, targets.flatten()))
    return {**summary(of_student), "teacher": summary(of_teacher)}


def log_probabilities(network, ids, vocab_size):
    hidden = network.hidden(ids).flatten(0, 1)  # (N, C)
    return F.linear(hidden, network.head_weight[:vocab_size]).float().log_softmax(-1)


def figures_of_tokens(log_q, log_p, targets):
    """Log-probabilities of a model and of its teacher, (N, V), and targets (N,) -> {figure: (N,)}."""
    log_confidence, top = log_q.max(-1)
    return {
        "loss": -log_q.gather(1, targets[:, None])[:, 0],
        "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
        "same_top_1": top == log_p.argmax(-1),
        "confidence": log_confidence.exp(),  # the probability of the token that it finds likeliest
        "right": top == targets,  # whether that is the next token of the text
        "teachers": log_p.gather(1, top[:, None])[:, 0].exp(),  # the teacher's probability of it
    }


def summary(batches):
    """Figures of tokens, by batch -> the figures of a model."""
    tokens = {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}
    return {
        **{name: values.mean().item() for name, values in tokens.items()},
        "ece_text": calibration_error(tokens["confidence"], tokens["right"]),
        "ece_teacher": calibration_error(tokens["confidence"], tokens["teachers"]),
    }


# ------------------------------------------------------------------------------------ the table
def arms_table(rows):
    """For each arm the mean over its seeds, and the range of the losses."""
    found = arms(rows)
    lines = []
    for arm in ARMS:
        if seeds := found.get(arm):
            lines.append(line(arm, spread(seeds), spread(seeds, "kl"), seeds))

    teachers = [row["teacher"] for row in rows.values()]  # the same in all rows
    lines.append(line("the teacher itself", f"{teachers[0]['loss']:.4f}", "0", teachers))
    return lines


COLUMNS = {
    "same top-1": "same_top_1", "confidence": "confidence", "right": "right", "ECE, text": "ece_text",
    "ECE, teacher": "ece_teacher"}


def line(arm, loss, kl, seeds):
    means = {title: f"{average(seeds, column):.3f}" for title, column in COLUMNS.items()}
    return {"learns from": arm, "held-out loss": loss, "KL to teacher": kl, **means}


STUDY = Study("cache_study", __doc__, plan(), one_run, {"arms": arms_table}, page="teacher-cache")

if __name__ == "__main__":
    run_cli(STUDY.main)
