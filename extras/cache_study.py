"""What may be kept of a teacher's answers? Draws from them, or the likeliest tokens, at three temperatures.

    python -m extras.cache_study   makes the missing runs; can be stopped

Read in this order:
  ARMS               what is kept of the teacher's answer, and the loss that learns from it
  losses_from        a loss that forgets the rest of the answer
  noise              how far that moves the gradient of one micro-batch
  calibration_error  is a model right as often as it claims?
  figures            all that is measured on the held-out text

Each run is `python distill.py` with the flags in its row: FIRST_DEMO. The teacher
answers during the run, and what an arm would not keep on disk is forgotten at once; so every run has draws of
its own. Losses are in nats per token on the modules that the demo holds out.

Shapes: B sequences, L tokens of each, N = B * L, n tokens with a target, K kept tokens, V vocabulary.
Reference: Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""
import shlex

import torch
from torch.nn import functional as F

import distill
from extras.atlas import BASE, SEEDS
from extras.study import Study, arms, average, show_loss, spread, trained
from support.chunked_loss import chunked_loss
from support.cli import run_cli
from support.ranks import autocast
from support.scoring import held_out_batches
from support.teacher_cache import Draws, draw_tokens, draws_loss


# ------------------------------------------------------------------------------------ what is kept
def draws(p, n):
    """Distributions p (n, V) -> the ids and weights, each (n, K), that a cache of the product keeps."""
    ids = draw_tokens(p, 1 - torch.rand(len(p), 1), n)
    return ids, torch.full(ids.shape, 1 / n)


def likeliest(p, n=12):
    """The likeliest tokens and their probabilities, scaled to sum to 1, as most code that keeps a teacher's
    answers does. It is biased: their student is told that no other token has any probability."""
    top = p.topk(n)
    return top.indices, top.values / top.values.sum(-1, keepdim=True)


def likeliest_as_they_are(p, n=12):
    """The likeliest tokens and their probabilities, not scaled; for rest_loss."""
    top = p.topk(n)
    return top.indices, top.values


def rest_loss(student_logits, kept, targets, settings):
    """draws_loss with one more entry, for all tokens that are not kept: the teacher's probability of them
    against the student's. It is the KL of the two distributions after all these became one token."""
    T = settings.temperature
    log_q = (student_logits / T).log_softmax(-1).gather(1, kept.ids)  # (n, K)
    rest_of_p = (1 - kept.weights.sum(-1)).clamp(min=1e-6)  # (n,)
    rest_of_q = (1 - log_q.exp().sum(-1)).clamp(min=1e-6)
    kl = (kept.weights * (kept.weights.log() - log_q)).sum()
    kl = kl + (rest_of_p * (rest_of_p.log() - rest_of_q.log())).sum()
    clm = F.cross_entropy(student_logits, targets, reduction="sum")
    return settings.kd_weight * T**2 * kl + settings.clm_weight * clm, kl, clm


ARMS = {  # {arm: (p -> what is kept, its loss)}; None: distill.plain_loss and the whole answer
    "live teacher": None,
    "50 draws": (lambda p: draws(p, 50), draws_loss),
    "12 draws": (lambda p: draws(p, 12), draws_loss),
    "likeliest 12": (likeliest, draws_loss),
    "likeliest 12 and the rest": (likeliest_as_they_are, rest_loss),
}
# The first recipe of docs/atlas.md: from the teacher alone, and with a little of the text.
FIRST_STUDENT = ("--student-layers 0,2,5 --schedule cosine --betas 0.9 0.95 --steps 600 --batch-size 4 "
                 "--lr 1e-3 --kd-weight 1 --clm-weight 0")
FIRST_DEMO = f"{FIRST_STUDENT} --kd-weight 0.9 --clm-weight 0.1"
TEMPERATURES = (1, 1.5, 2)
RATES = ("7e-4", "1.4e-3")  # of draws, besides the recipe's 1e-3


def plan():
    runs = {}
    for seed in SEEDS:
        for temperature in TEMPERATURES:
            flags = f"{BASE} {FIRST_DEMO} --temperature {temperature} --seed {seed}"
            runs |= {f"T {temperature}, {arm}, seed {seed}": flags for arm in ARMS}
            if seed == 0:
                runs |= {f"T {temperature}, 12 draws, lr {lr}": f"{flags} --lr {lr}" for lr in RATES}
    for temperature in TEMPERATURES:
        flags = f"{BASE} {FIRST_STUDENT} --precision fp32 --temperature {temperature}"
        runs |= {f"noise: T {temperature}, {arm}": flags for arm in ARMS if ARMS[arm]}
    return runs


def one_run(name, flags):
    arm = name.split(", ")[1]
    losses_of = losses_from(*ARMS[arm]) if ARMS[arm] else None
    return noise(flags, losses_of) if name.startswith("noise") else trained(flags, figures, losses_of)


def losses_from(keep, loss_function):
    """A function in place of distill.losses_of, which learns only from what `keep` keeps of an answer."""
    def losses_of(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
        counted = targets != -100
        t = F.linear(teacher_hidden[counted], teacher_head).float()  # (n, V)
        p = (t / settings.temperature).softmax(-1)
        clm = F.cross_entropy(t, targets[counted], reduction="none")
        kept = Draws(*keep(p), torch.special.entr(p).sum(-1), clm)
        return chunked_loss(loss_function, student_hidden, student_head, kept, None, targets, settings)
    return losses_of


def noise(flags, losses_of, n_draws=8):
    """How far the gradient of one micro-batch is from that of the whole answer, relative to its size, for the
    student's hidden states and for its head: the root mean square over `n_draws` draws. The student is the
    one before training, the text is held out."""
    args = distill.parse_args(shlex.split(flags))
    tokenizer, teacher, student = distill.load_models(args, torch.device("cpu"))
    corpus = distill.load_corpus(args, tokenizer)
    ids, targets = next(held_out_batches(corpus, args, "cpu"))
    with torch.no_grad():
        teacher_hidden = teacher.hidden(ids).flatten(0, 1)
        student_hidden = student.hidden(ids).flatten(0, 1)

    def gradients(losses_of, seed=0):
        torch.manual_seed(seed)
        inputs = [x.detach().clone().requires_grad_() for x in (student_hidden, student.head_weight)]
        losses = losses_of(*inputs, teacher_hidden, teacher.head_weight, targets.flatten(),
                           distill.LossSettings.of(args))
        return torch.autograd.grad(losses.loss, inputs)

    right = gradients(distill.losses_of)
    found = [gradients(losses_of, seed) for seed in range(n_draws)]
    result = {}
    for part, exact, *others in zip(("hidden", "head"), right, *found, strict=True):
        squares = torch.stack([(g - exact).square().sum() for g in others])
        result[part] = (squares.mean().sqrt() / exact.norm()).item()
    return result


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
    """For each arm the mean over its seeds, and the range of the losses; by temperature, the best first."""
    rows = {name: row for name, row in rows.items() if "seed" in name}
    found = sorted(arms(rows).items(), key=lambda item: (item[0].split(",")[0], average(item[1])))
    lines = [line(arm, seeds) for arm, seeds in found]
    teachers = [row["teacher"] for row in rows.values()]  # the same in all rows
    return [*lines, line("the teacher itself", teachers[:1])]


def rates_table(rows):
    """The held-out loss of 12 draws at three rates, seed 0, where all three were tried."""
    lines = []
    for temperature in TEMPERATURES:
        low, high = (f"T {temperature}, 12 draws, lr {lr}" for lr in RATES)
        names = {RATES[0]: low, "1e-3": f"T {temperature}, 12 draws, seed 0", RATES[1]: high}
        if rows.keys() >= {*names.values()}:
            losses = {f"lr {lr}": f"{rows[name]['loss']:.4f}" for lr, name in names.items()}
            lines.append({"12 draws": f"T = {temperature}", **losses})
    return lines


def noise_table(rows):
    """For each arm and temperature, the noise in hidden states and head."""
    lines = []
    for arm in filter(ARMS.get, ARMS):  # without the live teacher, which has no noise
        cells = {"kept": arm}
        for temperature in TEMPERATURES:
            row = rows.get(f"noise: T {temperature}, {arm}")
            if row:
                cells[f"T = {temperature}"] = show(row)
        lines.append(cells)
    return lines


COLUMNS = {
    "same top-1": "same_top_1", "confidence": "confidence", "right": "right", "ECE, text": "ece_text",
    "ECE, teacher": "ece_teacher"}


def line(arm, seeds):
    means = {title: f"{average(seeds, column):.3f}" for title, column in COLUMNS.items()}
    return {"learns from": arm, "held-out loss": spread(seeds), "KL to teacher": spread(seeds, "kl"), **means}


def show(row):
    return f"{row['hidden']:.2f}, {row['head']:.2f}" if "hidden" in row else show_loss(row)


TABLES = {"arms": arms_table, "rates": rates_table, "noise": noise_table}
STUDY = Study("cache_study", __doc__, plan(), one_run, TABLES, page="teacher-cache", show=show)

if __name__ == "__main__":
    run_cli(STUDY.main)
