"""What the teacher on disk is worth: students of the live teacher, of draws from it, of its likeliest tokens.

    python -m extras.cache_study                  what is not finished yet
    python -m extras.cache_study --only "seed 1"  those whose name contains this
    python -m extras.cache_study --list           all, and what is done
    python -m extras.cache_study --table          puts the table into its page

Read in this order:
  ARMS               what is compared
  likeliest_losses   the usual way to keep a teacher, which is not in the product as it is biased
  calibration_error  whether a model is as often right as it says
  figures            all that is measured on the held-out text
  one_run            distill.py's own functions, and a row of figures
  table              what came of it, for docs/teacher-cache.md

Each run is `python distill.py` with the flags that its row names, the first recipe of extras/atlas.py and
perhaps a cache; what comes of it is a line of docs/teacher-cache.jsonl. Caches that are not there are made
first. Losses are in nats per token, on the modules that the demo holds out.

Shapes: B sequences, L tokens of each, N = B * L, V vocabulary.
Reference: Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""
import shlex
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn import functional as F

import distill
from extras.atlas import BASE, FIRST_DEMO, set_up
from extras.atlas_page import arms, spread
from extras.results import add_row, origin, read_rows
from support.chunked_loss import chunked_losses
from support.cli import InputError, format_table, new_parser, run_cli, user_path
from support.files import replaced
from support.runtime import autocast, keep_memory
from support.scoring import held_out_batches
from support.sparse_loss import Draws

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "teacher-cache.jsonl"
PAGE = DOCS / "teacher-cache.md"
SEEDS = (0, 1, 2)
LIKELIEST = 12  # as many as the product draws


# ------------------------------------------------------------------------------------ what is compared
def likeliest_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
    """The loss if all that is kept of the teacher are its likeliest tokens, with probabilities that are made
    to sum to 1: what most who keep a teacher's answers do. Arguments and result as distill.LOSSES has them.
    """
    counted = targets != -100
    t = F.linear(teacher_hidden[counted], teacher_head).float()  # (n, V)
    top = (t / settings.temperature).softmax(-1).topk(LIKELIEST)
    weights = top.values / top.values.sum(-1, keepdim=True)  # (n, LIKELIEST)

    entropy = torch.special.entr(weights).sum(-1)
    clm = F.cross_entropy(t, targets[counted], reduction="none")
    answers = Draws(top.indices, weights, entropy, clm)
    return chunked_losses(student_hidden, student_head, answers, None, targets, settings)


class Arm(NamedTuple):
    """A way for a student to learn from the demo's teacher."""
    draws: int | None = None  # in a cache, made by distill.py's own code; None: the teacher itself
    losses: dict = {}  # what replaces an entry of distill.LOSSES


ARMS = {
    "live teacher": Arm(),
    "50 draws": Arm(draws=50),
    "12 draws": Arm(draws=12),
    "4 draws": Arm(draws=4),
    "likeliest 12": Arm(losses={"chunked": likeliest_losses}),
}


def plan():
    """All runs, in the order in which they are made: {name: (arm, seed)}."""
    return {f"{name}, seed {seed}": (arm, seed) for seed in SEEDS for name, arm in ARMS.items()}


def flags_of(arm, seed, caches):
    """What makes a run differ from `python distill.py`. caches: the folder in which all caches lie."""
    cache = f" --teacher-cache {shlex.quote(f'{caches}/{arm.draws}')} --cache-draws {arm.draws}"
    return f"{BASE} {FIRST_DEMO} --seed {seed}" + (cache if arm.draws else "")


# ------------------------------------------------------------------------------------ what is measured
def calibration_error(confidence, reference, n_bins=15):
    """How far a model's confidence is from how often it is right: 0 for a model that knows what it knows.

    confidence (n,): probability of the token that it finds likeliest; reference (n,): 1 where that token is
    right, or a better model's probability of it. Tokens with similar confidence share one of n_bins bins of
    equal width. The error is the distance between the two means in a bin, averaged over tokens: the expected
    calibration error of Guo et al. 2017, section 2.
    """
    bins = (confidence.double() * n_bins).ceil().long() - 1  # a bin has its upper end
    gaps = torch.zeros(n_bins, dtype=torch.float64)
    gaps.index_add_(0, bins.clamp(min=0), confidence.double() - reference.double())
    return gaps.abs().sum().item() / len(confidence)


@torch.no_grad()
def figures(teacher, student, corpus, vocab_size, args):
    """Figures of the student on the held-out text, and of the teacher beside it: {name: value}."""
    columns = {"student": [], "teacher": []}
    for ids, targets in held_out_batches(corpus, args, "cpu"):
        with autocast(args, torch.device("cpu")):
            t, s = (F.linear(network.hidden(ids).flatten(0, 1), network.head_weight[:vocab_size]).float()
                    for network in (teacher, student))  # each (N, V)
        log_p = t.log_softmax(-1)
        for name, logits in (("student", s), ("teacher", t)):
            columns[name].append(columns_of(logits.log_softmax(-1), log_p, targets.flatten()))

    found = {name: summary(torch.cat(parts, 1)) for name, parts in columns.items()}
    return found["student"] | {"teacher": found["teacher"]}


def columns_of(log_q, log_p, targets):
    """A model's and its teacher's log-probabilities (N, V), targets (N,) -> six figures of each token,
    (6, N), in the order of `summary`."""
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    log_confidence, top = log_q.max(-1)
    same = top == log_p.argmax(-1)
    teachers = log_p.gather(1, top[:, None])[:, 0].exp()
    return torch.stack((nll, kl, same, log_confidence.exp(), top == targets, teachers))


def summary(columns):
    """Columns of all tokens, (6, n) -> the figures of a model, by name."""
    nll, kl, same, confidence, right, teachers = columns.double()
    return {
        "loss": nll.mean().item(),
        "kl": kl.mean().item(),
        "same_top_1": same.mean().item(),
        "confidence": confidence.mean().item(),  # mean probability of the token that it finds likeliest
        "right": right.mean().item(),  # how often that is the next token of the text
        "teachers": teachers.mean().item(),  # mean probability that the teacher gives to it
        "ece_text": calibration_error(confidence, right),
        "ece_teacher": calibration_error(confidence, teachers),
    }


def one_run(name, caches):
    """Make a run and score it. Returns its row: a name, flags, figures."""
    arm, seed = plan()[name]
    flags = flags_of(arm, seed, caches)
    with tempfile.TemporaryDirectory() as folder:
        args, ranks, tokenizer, teacher, student, corpus = set_up(flags, folder)
        if arm.draws:
            distill.cache_teacher(args, teacher, corpus, tokenizer.vocab_size, ranks)

        started = time.perf_counter()
        with mock.patch.dict(distill.LOSSES, arm.losses):
            distill.train(
                args, student, None if arm.draws else teacher, corpus, tokenizer.vocab_size, ranks)
        seconds = time.perf_counter() - started
        found = figures(teacher, student, corpus, tokenizer.vocab_size, args)
    return {"name": name, "flags": flags, "seed": seed, **found, "steps": args.steps,
            "seconds": round(seconds, 1), **origin()}


def table(rows):
    """{name: row} -> the table of the page: for each arm the mean over its seeds, and the range."""
    by_arm = arms(rows)
    lines = []
    for name in ARMS:
        if of := by_arm.get(name):
            lines.append(line(name, {column: spread(of, column) for column in ("loss", "kl")}, of))
    teachers = [row["teacher"] for row in rows.values()]
    lines.append(line("the teacher itself", {"loss": f"{teachers[0]['loss']:.4f}", "kl": "0"}, teachers))
    return format_table(lines)


def line(name, losses, of):
    """A line of the table. of: rows of figures, over which all but `losses` are averaged."""
    def average(column):
        return f"{mean(row[column] for row in of):.3f}"

    return {
        "learns from": name,
        "held-out loss": losses["loss"],
        "KL to teacher": losses["kl"],
        "same top-1": average("same_top_1"),
        "confidence": average("confidence"),
        "right": average("right"),
        "ECE, text": average("ece_text"),
        "ECE, teacher": average("ece_teacher"),
    }


def fill(page, rows):
    """The text of the page, with the table between its two marks made anew."""
    before, _, rest = page.partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->")
    if not after:
        raise InputError(f"{PAGE} has no place for the table: a line <!-- table --> and a line <!-- end -->")
    return f"{before}<!-- table -->\n{table(rows)}\n<!-- end -->{after}"


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.cache_study [options]")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in their name")
    parser.add_argument("--list", action="store_true",
                        help="show all runs, and what those that are done came to")
    parser.add_argument("--table", action="store_true",
                        help=f"put the table of what is done into docs/{PAGE.name}")
    parser.add_argument("--caches", type=user_path, default="caches", metavar="DIR",
                        help="where the caches lie, or are made: 400 MB in all")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    names = [name for name in plan() if args.only in name]
    if not names:
        raise InputError(f"--only {args.only}: no run of the plan has this in its name; see --list")
    done = read_rows(RESULTS)
    if args.list:
        for name in names:
            print(f"{done[name]['loss']:.4f}" if name in done else "      ", name)
        return
    if args.table:
        if not done:
            raise InputError(f"{RESULTS} has no runs yet: python -m extras.cache_study makes them")
        text = fill(PAGE.read_text(encoding="utf-8"), done)
        with replaced(PAGE) as file:
            file.write_text(text, encoding="utf-8")
        return

    keep_memory()
    for name in names:
        if name in read_rows(RESULTS):  # read again each time: another process may be at work
            continue
        row = one_run(name, args.caches)
        add_row(RESULTS, row)
        print(f"{row['loss']:.4f} {row['seconds']:6.0f} s  {name}", flush=True)


if __name__ == "__main__":
    run_cli(main)
