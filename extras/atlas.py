"""Where a teacher pays: a plan of runs of the demo, one after the other, and what came of them.

    python -m extras.atlas                  what is not finished yet
    python -m extras.atlas --only control   those whose name contains "control"
    python -m extras.atlas --list           what there is, and what is done

Read in this order:
  plan       the runs, as data: a name, and the flags that make it differ from BASE
  one_run    distill.py's own functions, and a row of figures
  main       skips what docs/atlas.jsonl has, adds to it what it makes

What is made of the rows is in extras/atlas_page.py.

Each run is `python distill.py` with the flags that its row names ("weights averaged" adds what `averaged`
does). Losses are in nats per token, on the modules that the demo holds out: 131,733 tokens, or as many of
them as --eval-tokens says. Seconds are of training alone, and mean something only where nothing else ran;
losses do not depend on that.
"""
import copy
import shlex
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import distill
from extras.results import add_row, origin, read_rows
from sample import draw
from support import options
from support.card import formula
from support.cli import InputError, new_parser, pick_device, run_cli
from support.runtime import Ranks, autocast, keep_memory
from support.scoring import validate

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "atlas.jsonl"

# What all runs share; the rest is the demo's. bf16, so that `auto` cannot decide otherwise elsewhere.
BASE = "--no-control --precision bf16 --device cpu"
ALONE = "--kd-weight 1 --clm-weight 0"  # what the teacher says, and nothing else
TEXT = "--kd-weight 0 --clm-weight 1"  # what the control learns from

# What `python distill.py` runs: the best that tuning found for the student, and for its control.
SHARED = "--student-layers 0,4,5 --schedule linear --betas 0.9 0.999 --batch-size 2 --steps 1200"
STUDENT = f"{SHARED} --lr 1e-3 {ALONE}"
DEMO = f"{STUDENT} --kd-weight 0.9 --clm-weight 0.1"
CONTROL = f"{SHARED} --lr 5e-4 {TEXT}"

# The first recipe, where tuning began. Later flags win, so a run is one of these lines and what it changes.
FIRST = "--student-layers 0,2,5 --schedule cosine --betas 0.9 0.95 --steps 600 --batch-size 4"
FIRST_STUDENT = f"{FIRST} --lr 1e-3 {ALONE}"
FIRST_DEMO = f"{FIRST_STUDENT} --kd-weight 0.9 --clm-weight 0.1"
FIRST_CONTROL = f"{FIRST} --lr 6e-4 {TEXT}"
FIRST_BEST_CONTROL = f"{FIRST_CONTROL} --batch-size 8 --steps 300"
SEEDS = (0, 1, 2)
BUDGETS = (300, 600, 1200, 2400, 4800)  # steps
LONGEST_CONTROL = 7500  # steps that a control makes in the seconds of the longest student
FIRST_BUDGETS = (150, 300, 600, 1200, 2400)  # steps of twice as many tokens


def plan():
    """All runs, in the order in which they are made: {name: flags}."""
    return tuning() | layers() | tuning_again() | one_change() | budgets() | exercises() | first_recipe()


def tuning():
    """Round one, from the layers that are evenly spread: one thing at a time, seed 0."""
    runs = {}
    for lr in ("5e-4", "7e-4", "1e-3", "1.5e-3", "2e-3"):
        runs[f"tune student lr {lr}"] = f"{FIRST_STUDENT} --lr {lr}"
    for lr in ("2e-4", "3e-4", "4.5e-4", "6e-4", "1e-3"):
        runs[f"tune control lr {lr}"] = f"{FIRST_CONTROL} --lr {lr}"
    for lr in ("5e-4", "7e-4", "1e-3"):
        runs[f"tune student batch 2 lr {lr}"] = f"{FIRST_STUDENT} --lr {lr} --batch-size 2 --steps 1200"
    for lr in ("2e-4", "3e-4"):
        runs[f"tune control batch 2 lr {lr}"] = f"{FIRST_CONTROL} --lr {lr} --batch-size 2 --steps 1200"
    for lr in ("6e-4", "1e-3"):
        runs[f"tune control batch 8 lr {lr}"] = f"{FIRST_CONTROL} --lr {lr} --batch-size 8 --steps 300"
    runs["tune control batch 16 lr 1e-3"] = f"{FIRST_CONTROL} --lr 1e-3 --batch-size 16 --steps 150"
    runs["tune student cosine of hidden states"] = f"{FIRST_STUDENT} --cos-weight 1"

    # From here on the student with a little of the text, and the control with 8 sequences a step.
    runs["tune student linear schedule"] = f"{FIRST_DEMO} --schedule linear"
    runs["tune student linear schedule lr 1.5e-3"] = f"{FIRST_DEMO} --schedule linear --lr 1.5e-3"
    for lr in ("6e-4", "1e-3"):
        runs[f"tune control linear schedule lr {lr}"] = f"{FIRST_BEST_CONTROL} --schedule linear --lr {lr}"
    runs["tune student 150 steps lr 2e-3"] = f"{FIRST_DEMO} --steps 150 --lr 2e-3"
    for lr in ("4e-4", "1e-3"):
        runs[f"tune control for 150 steps lr {lr}"] = f"{FIRST_BEST_CONTROL} --steps 75 --lr {lr}"
    runs["tune student layers 0,4,5"] = f"{FIRST_DEMO} --student-layers 0,4,5"
    runs["tune control layers 0,4,5"] = f"{FIRST_BEST_CONTROL} --student-layers 0,4,5"
    return runs


def layers():
    """All 20 ways to take 3 of 6, before training and after 100 steps, on fewer held-out tokens. They were
    enumerated between the two rounds of tuning, so with the settings of the first."""
    runs = {}
    for kept in combinations(range(6), 3):
        chosen = ",".join(map(str, kept))
        runs[f"layers {chosen}, 100 steps"] = (
            f"{FIRST_STUDENT} --student-layers {chosen} --steps 100 --eval-tokens 20000")
    return runs


# Sequences in a step, rate, AdamW's betas, and what else there is.
STUDENTS_AGAIN = [
    (4, "1.5e-3", "0.9 0.95"),
    (4, "2e-3", "0.9 0.95"),
    (4, "1.5e-3", "0.9 0.95", "--cos-weight 1"),
    (4, "1.5e-3", "0.9 0.95", "--kd-weight 0.95 --clm-weight 0.05"),
    (4, "1e-3", "0.9 0.95", "--schedule constant", "weights averaged"),
    (4, "1.5e-3", "0.9 0.99"),
    (2, "1e-3", "0.9 0.95"),
    (2, "1.5e-3", "0.9 0.95"),
    (2, "1e-3", "0.9 0.95", "--kd-weight 0.8 --clm-weight 0.2"),
    (2, "1e-3", "0.9 0.95", "--grad-clip 0"),
    (2, "1e-3", "0.8 0.98"),
    (2, "1e-3", "0.9 0.99"),
    (2, "7e-4", "0.9 0.99"),
    (2, "1e-3", "0.9 0.999"),
    (2, "7e-4", "0.9 0.999"),
    (1, "7e-4", "0.9 0.95"),
    (1, "7e-4", "0.9 0.999"),
]
CONTROLS_AGAIN = [
    (8, "1e-3", "0.9 0.95"),
    (8, "1e-3", "0.9 0.95", "--dropout 0.1 --attention-dropout 0"),
    (16, "1.5e-3", "0.9 0.95"),
    (8, "1e-3", "0.9 0.99"),
    (8, "7e-4", "0.9 0.99"),
    (4, "1e-3", "0.9 0.99"),
    (4, "7e-4", "0.9 0.99"),
    (4, "5e-4", "0.9 0.99"),
    (2, "5e-4", "0.9 0.99"),
    (8, "1e-3", "0.9 0.999"),
    (4, "1e-3", "0.9 0.999"),
    (4, "7e-4", "0.9 0.999"),
    (4, "7e-4", "0.95 0.999"),
    (4, "7e-4", "0.9 0.999", "--weight-decay 0.1"),
    (2, "1e-3", "0.9 0.999"),
    (2, "7e-4", "0.9 0.999"),
    (2, "5e-4", "0.9 0.999"),
    (2, "3.5e-4", "0.9 0.999"),
]


def tuning_again():
    """Round two, from layers 0,4,5 with a linear schedule, all at 614,400 tokens, seed 0."""
    shared = "--student-layers 0,4,5 --schedule linear"
    runs = {}
    for who, base, tried in (("student", f"{shared} --kd-weight 0.9 --clm-weight 0.1", STUDENTS_AGAIN),
                             ("control", f"{shared} {TEXT}", CONTROLS_AGAIN)):
        for batch, lr, betas, *more in tried:
            name = " ".join([f"again: {who}, batch {batch}, lr {lr}, betas {betas}", *more])
            flags = " ".join(flag for flag in more if flag.startswith("--"))
            steps = 2400 // batch
            settings = f"--batch-size {batch} --steps {steps} --lr {lr} --betas {betas} {flags}"
            runs[name] = f"{base} {settings}".rstrip()
    return runs


def one_change():
    """Arms that differ in one thing from the teacher alone ("forward"), three seeds of each."""
    arms = {
        "forward": STUDENT,
        "reverse": f"{STUDENT} --divergence reverse",
        "jsd": f"{STUDENT} --divergence jsd",
        "half and half": f"{STUDENT} --kd-weight 0.5 --clm-weight 0.5",
        "T 1": f"{STUDENT} --temperature 1",
        "T 4": f"{STUDENT} --temperature 4",
        "on-policy half": f"{STUDENT} --on-policy 0.5",
        "random start": f"{DEMO} --student-init random",
        "control, random start": f"{CONTROL} --student-init random",
    }
    return {f"{arm}, seed {seed}": f"{flags} --seed {seed}" for seed in SEEDS for arm, flags in arms.items()}


def budgets():
    """The demo and its control, from a quarter of the demo's tokens to four times as many."""
    runs = {}
    for seed in SEEDS:
        for steps in BUDGETS:
            runs[f"student {steps} steps, seed {seed}"] = f"{DEMO} --steps {steps} --seed {seed}"
            runs[f"control {steps} steps, seed {seed}"] = f"{CONTROL} --steps {steps} --seed {seed}"
    runs[f"control {LONGEST_CONTROL} steps, seed 0"] = f"{CONTROL} --steps {LONGEST_CONTROL} --seed 0"
    return runs


def exercises():
    """The README's exercises that are not above, seed 0."""
    return {
        "T 8": f"{STUDENT} --temperature 8",
        "reverse, T 1": f"{STUDENT} --divergence reverse --temperature 1",
        "layers 0,2,5": f"{STUDENT} --student-layers 0,2,5",
        "layers 0,3,4": f"{STUDENT} --student-layers 0,3,4",
        "forward, random start": f"{STUDENT} --student-init random",
    }


def first_recipe():
    """The main arms once more, with the recipe that tuning began with: what holds for both is not owed to
    the layers, the schedule or the batch of one."""
    arms = {
        "forward": FIRST_STUDENT,
        "reverse": f"{FIRST_STUDENT} --divergence reverse",
        "jsd": f"{FIRST_STUDENT} --divergence jsd",
        "half and half": f"{FIRST_STUDENT} --kd-weight 0.5 --clm-weight 0.5",
    }
    runs = {f"first: {arm}, seed {seed}": f"{flags} --seed {seed}"
            for seed in SEEDS for arm, flags in arms.items()}
    for steps in FIRST_BUDGETS:
        for seed in SEEDS if steps <= 600 else (0,):
            half = f"--steps {steps // 2} --seed {seed}"
            runs[f"first: student {steps} steps, seed {seed}"] = f"{FIRST_DEMO} --steps {steps} --seed {seed}"
            runs[f"first: control {steps} steps, seed {seed}"] = f"{FIRST_BEST_CONTROL} {half}"
    return runs


def set_up(flags, folder):
    """What distill.py has before it trains. The run is written into a folder of `folder`, which is the
    caller's to throw away."""
    args = distill.parse_args(shlex.split(f"{flags} --out {folder}/out"))
    args.device = pick_device(args.device)
    options.check(args)
    ranks = Ranks(args.device)
    tokenizer, teacher, student = distill.load_models(args, ranks.device)
    corpus = distill.load_corpus(args, tokenizer)
    return args, ranks, tokenizer, teacher, student, corpus


def one_run(name, flags):
    """Make a run and score it on the held-out text. Returns its row: a name, settings, figures."""
    with tempfile.TemporaryDirectory() as folder:
        args, ranks, tokenizer, teacher, student, corpus = set_up(f"{BASE} {flags}", folder)

        def score():
            context = autocast(args, ranks.device)
            bar, row = validate([teacher, student], corpus, tokenizer.vocab_size, args, context)
            return {"loss": row["loss"], "teacher_loss": bar["loss"], "kl": row["KL to teacher"],
                    "same_top_1": row["same top-1"]}

        before = score()["loss"] if name.startswith("layers") else None  # which that table compares
        started = time.perf_counter()
        teaches = teacher if args.kd_weight or args.cos_weight else None
        with averaged(student, args.steps) if "weights averaged" in name else nullcontext():
            distill.train(args, student, teaches, corpus, tokenizer.vocab_size, ranks)
        seconds = time.perf_counter() - started
        found = score() | {"reverse_kl": reverse_kl(teacher, student, corpus, args)}
        found |= sample_figures(teacher, student, corpus)
    tokens = args.steps * args.batch_size * args.grad_accum * args.seq_len
    return {"name": name, "flags": flags, "seed": args.seed, "objective": formula(args), "before": before,
            **found, "steps": args.steps, "tokens": tokens, "seconds": round(seconds, 1), **origin()}


@contextmanager
def averaged(student, steps):
    """At the end of the block the student has the mean of its weights after each of the last `steps` / 4
    steps (Izmailov et al. 2018, arXiv 1803.05407)."""
    done = 0
    sums = [torch.zeros_like(parameter) for parameter in student.parameters()]

    def add(*_):
        nonlocal done
        done += 1
        if done > steps - steps // 4:
            for total, parameter in zip(sums, student.parameters(), strict=True):
                total += parameter.detach()

    hook = register_optimizer_step_post_hook(add)
    yield
    hook.remove()
    for total, parameter in zip(sums, student.parameters(), strict=True):
        parameter.data.copy_(total / (steps // 4))


@torch.no_grad()
def reverse_kl(teacher, student, corpus, args, blocks=80):
    """KL(student || teacher) in nats per token at T = 1, on the first 20,480 held-out tokens."""
    ids = torch.from_numpy(corpus.val[:blocks * args.seq_len].astype("int64"))
    ids = ids.view(blocks, -1)  # (blocks, L)
    total = 0.0
    for batch in ids.split(8):
        with autocast(args, torch.device("cpu")):
            log_p, log_q = (network(batch).float().log_softmax(-1) for network in (teacher, student))
        total += (log_q.exp() * (log_q - log_p)).sum().item()
    return total / ids.numel()


@torch.no_grad()
def sample_figures(teacher, student, corpus, n=64, length=128):
    """What the teacher thinks of the student's own text, and how varied that is: {figure: value}.

    n texts from the start of a document, drawn at temperature 1. distinct_3: the share of different triples
    of tokens among all.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.full((n, 1), corpus.eot)
    text = student.generate(start, length, partial(draw, generator=generator))  # (n, 1 + length)
    log_p = copy.deepcopy(teacher).float()(text[:, :-1]).log_softmax(-1)
    nll = -log_p.gather(-1, text[:, 1:, None]).mean().item()
    triples = {tuple(triple) for triple in text[:, 1:].unfold(1, 3, 1).flatten(0, 1).tolist()}
    return {"teacher_nll_of_samples": nll, "distinct_3": len(triples) / (n * (length - 2))}


def finished():
    """{name: row} of what RESULTS has."""
    return read_rows(RESULTS)


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.atlas [options]")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in their name")
    parser.add_argument("--list", action="store_true",
                        help="show all runs, and what those that are done came to")
    parser.add_argument("--backwards", action="store_true",
                        help="from the last run to the first: for a second process beside another")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    runs = {name: flags for name, flags in plan().items() if args.only in name}
    if not runs:
        raise InputError(f"--only {args.only}: no run of the plan has this in its name; see --list")
    if args.list:
        done = finished()
        for name, flags in runs.items():
            print(f"{done[name]['loss']:.4f}" if name in done else "      ", name, "|", flags)
        return

    keep_memory()
    for name, flags in reversed(runs.items()) if args.backwards else runs.items():
        if name in finished():  # read again each time: another process may be at work
            continue
        row = one_run(name, flags)
        add_row(RESULTS, row)
        print(f"{row['loss']:.4f} {row['seconds']:6.0f} s  {name}", flush=True)


if __name__ == "__main__":
    run_cli(main)
