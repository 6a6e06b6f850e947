"""Where a teacher pays: a plan of runs of the demo, one after the other, and what came of them.

    python -m extras.atlas                  what is not finished yet; stop when you like
    python -m extras.atlas --only control   those whose name contains "control"
    python -m extras.atlas --list           what there is, and what is done

Read in this order:
  plan       the runs, as data: a name, and the flags that make it differ from BASE
  one_run    distill.py's own functions, and a row of figures
  main       skips what docs/atlas.jsonl has, adds to it what it makes

Each run is `python distill.py` with the flags that its row names. Losses are on the modules that the demo
holds out (131,733 tokens), in nats per token. Seconds are of training alone, and mean something only where
nothing else ran; losses do not depend on that.
"""
import json
import shlex
import subprocess
import tempfile
import time
from datetime import date
from functools import partial
from itertools import combinations
from pathlib import Path

import torch

import distill
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
STUDENT = "--student-layers 0,2,5 --steps 600 --batch-size 4"
CONTROL = f"{STUDENT} --kd-weight 0 --clm-weight 1"  # the same run, without what the teacher says
BEST_STUDENT = f"{STUDENT} --lr 1e-3"
BEST_CONTROL = f"{CONTROL} --lr 4.5e-4"
BUDGETS = (150, 300, 600, 1200, 2400)


def plan():
    """All runs, in the order in which they are made: {name: flags}."""
    runs = {}

    # Tuning, seed 0: one thing at a time, around the student's and the control's best rate.
    for lr in ("5e-4", "7e-4", "1e-3", "1.5e-3", "2e-3"):
        runs[f"tune student lr {lr}"] = f"{STUDENT} --lr {lr}"
    for lr in ("2e-4", "3e-4", "4.5e-4", "6e-4", "1e-3"):
        runs[f"tune control lr {lr}"] = f"{CONTROL} --lr {lr}"
    for T in ("1", "4"):
        runs[f"tune student T {T}"] = f"{STUDENT} --lr 1e-3 --temperature {T}"
    for lr in ("5e-4", "7e-4", "1e-3"):
        runs[f"tune student batch 2 lr {lr}"] = f"{STUDENT} --lr {lr} --batch-size 2 --steps 1200"
    for lr in ("2e-4", "3e-4"):
        runs[f"tune control batch 2 lr {lr}"] = f"{CONTROL} --lr {lr} --batch-size 2 --steps 1200"
    for lr in ("4.5e-4", "6e-4", "1e-3"):
        runs[f"tune control batch 8 lr {lr}"] = f"{CONTROL} --lr {lr} --batch-size 8 --steps 300"
    runs["tune student batch 8 lr 1.5e-3"] = f"{STUDENT} --lr 1.5e-3 --batch-size 8 --steps 300"
    runs["tune student beta2 0.99"] = f"{STUDENT} --lr 1e-3 --betas 0.9 0.99"
    runs["tune control beta2 0.99"] = f"{CONTROL} --lr 4.5e-4 --betas 0.9 0.99"
    runs["tune student half and half"] = f"{STUDENT} --lr 1e-3 --kd-weight 0.5 --clm-weight 0.5"
    runs["tune student nine to one"] = f"{STUDENT} --lr 1e-3 --kd-weight 0.9 --clm-weight 0.1"

    runs["tune student cosine of hidden states"] = f"{STUDENT} --lr 1e-3 --cos-weight 1"
    runs["tune student linear schedule"] = f"{STUDENT} --lr 1e-3 --schedule linear"
    runs["tune student layers 0,3,5"] = f"{STUDENT} --lr 1e-3 --student-layers 0,3,5"
    runs["tune student layers 0,4,5"] = f"{STUDENT} --lr 1e-3 --student-layers 0,4,5"

    # The map, with the rates that tuning found best. What the page concludes from has three seeds.
    for steps in BUDGETS:
        for seed in (0, 1, 2) if steps <= 1200 else (0,):
            runs[f"student {steps} steps, seed {seed}"] = f"{BEST_STUDENT} --steps {steps} --seed {seed}"
            runs[f"control {steps} steps, seed {seed}"] = f"{BEST_CONTROL} --steps {steps} --seed {seed}"
    for seed in (0, 1, 2):
        for divergence in ("reverse", "jsd"):
            runs[f"{divergence}, seed {seed}"] = f"{BEST_STUDENT} --divergence {divergence} --seed {seed}"
        both = "--kd-weight 0.5 --clm-weight 0.5"
        runs[f"half and half, seed {seed}"] = f"{BEST_STUDENT} {both} --seed {seed}"
        runs[f"on-policy half, seed {seed}"] = f"{BEST_STUDENT} --on-policy 0.5 --seed {seed}"
    runs["random start, student"] = f"{BEST_STUDENT} --student-init random"
    runs["random start, control"] = f"{BEST_CONTROL} --student-init random"
    runs["reverse, on-policy half, seed 0"] = f"{BEST_STUDENT} --divergence reverse --on-policy 0.5"

    # The README's exercises that are not above, seed 0.
    for T in ("1", "4", "8"):
        runs[f"T {T}"] = f"{BEST_STUDENT} --temperature {T}"
    runs["layers 0,3,4"] = f"{BEST_STUDENT} --student-layers 0,3,4"
    runs["reverse, T 1"] = f"{BEST_STUDENT} --divergence reverse --temperature 1"

    # Which layers: all 20 ways to take 3 of 6, before training and after 100 steps.
    for layers in combinations(range(6), 3):
        chosen = ",".join(map(str, layers))
        runs[f"layers {chosen}, 100 steps"] = f"{BEST_STUDENT} --student-layers {chosen} --steps 100"
    return runs


def one_run(name, flags):
    """Make a run and score it on the held-out text. Returns its row: a name, settings, figures."""
    with tempfile.TemporaryDirectory() as folder:
        args = distill.parse_args(shlex.split(f"{BASE} {flags} --out {folder}/out"))
        args.device = pick_device(args.device)
        options.check(args)
        ranks = Ranks(args.device)
        tokenizer, teacher, student = distill.load_models(args, ranks.device)
        corpus = distill.load_corpus(args, tokenizer)

        def score():
            context = autocast(args, ranks.device)
            bar, row = validate([teacher, student], corpus, tokenizer.vocab_size, args, context)
            return {"loss": row["loss"], "teacher_loss": bar["loss"], "kl": row["KL to teacher"],
                    "same_top_1": row["same top-1"]}

        before = score()["loss"]
        started = time.perf_counter()
        teaches = teacher if args.kd_weight or args.cos_weight else None
        distill.train(args, student, teaches, corpus, tokenizer.vocab_size, ranks)
        seconds = time.perf_counter() - started
        found = score() | {"reverse_kl": reverse_kl(teacher, student, corpus, args)}
        found |= sample_figures(teacher, student, corpus)
    tokens = args.steps * args.batch_size * args.grad_accum * args.seq_len
    return {"name": name, "flags": flags, "seed": args.seed, "objective": formula(args), "before": before,
            **found, "steps": args.steps, "tokens": tokens, "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
            "date": date.today().isoformat()}


@torch.no_grad()
def reverse_kl(teacher, student, corpus, args, blocks=80):
    """KL(student || teacher) in nats per token at T = 1, on the first 20,000 held-out tokens."""
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
    start = torch.full((n, 1), corpus.meta["eot"])
    text = student.generate(start, length, partial(draw, generator=generator))  # (n, 1 + length)
    log_p = teacher.float()(text[:, :-1]).log_softmax(-1)
    nll = -log_p.gather(-1, text[:, 1:, None]).mean().item()
    triples = {tuple(triple) for triple in text[:, 1:].unfold(1, 3, 1).flatten(0, 1).tolist()}
    return {"teacher_nll_of_samples": nll, "distinct_3": len(triples) / (n * (length - 2))}


def commit():
    """The commit whose code this is, with a + if it has been changed since."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "?") + ("+" if changed else "")


def finished():
    """{name: row} of what RESULTS has."""
    if not RESULTS.exists():
        return {}
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def parse_args(argv=None):
    parser = new_parser(__doc__)
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
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a", encoding="utf-8") as file:  # a line each, so a kill costs one run
            file.write(json.dumps(row) + "\n")
        print(f"{row['loss']:.4f} {row['seconds']:6.0f} s  {name}", flush=True)


if __name__ == "__main__":
    run_cli(main)
