"""Is it copying that breaks? DistilPythia's collapse on LAMBADA (140.8 -> 420.7), asked of models that copy.

    python -m extras.lambada                what is not done yet
    python -m extras.lambada --only routed  those whose name contains "routed"
    python -m extras.lambada --list         what there is, and what is done

LAMBADA's last word can mostly be copied from its passage, and distillation is known to weaken the heads that
copy (arXiv 2509.01649). So: a teacher that copies, a student that copies a little, the published objective,
others that differ from it in one thing, and after each run the question what became of copying.

Read in this order:
  WARM_START, plan   the recipes of teacher and student, and the runs
  warm_start         teacher and student before distillation, by the command line
  routed_losses      the one objective that distill.py does not have
  one_run            distill.py's own `train`, and figures at some of its steps

The text is extras/lambada_text.py's, the passages are extras/lambada_items.py's, what is measured is
extras/lambada_scores.py's; extras/lambada_page.py makes the tables of docs/lambada.md, which tells the story.
The suspects of arithmetic have a study of their own, extras/lambada_sums.py.
"""
import copy
import shlex
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import distill
from data import prepare
from extras.lambada_items import read_items
from extras.lambada_scores import figures
from extras.lambada_text import find_names, write_prose, write_text
from extras.results import add_row, origin, read_rows
from model import load, student_from
from support import options
from support.chunked_loss import Losses
from support.cli import InputError, new_parser, run_cli
from support.runtime import Ranks, keep_memory
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "lambada.jsonl"
OUT = Path("out-lambada")  # the models and texts, which are made once
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------ what is run
# On text alone, one after the other: the demo's teacher learns to copy; the student, three of its layers,
# learns to do without the others, and then gets used to the rate at which it will be distilled. A step of
# AdamW is as large as its rate: pythia-70m's rate fell from 1e-3 to 1e-4, and DistilPythia took 1e-4.
TEXT_ALONE = "--teacher none --seq-len 256 --batch-size 8 --grad-accum 1 --precision bf16 --eval-tokens 20000"
WARM_START = {  # folder in OUT: (what it starts from, flags)
    "teacher": ("demo", "--lr 1.5e-3 --warmup 0.05 --schedule linear --steps 500"),
    "student-1e-3": ("layers", "--lr 1e-3 --warmup 0.05 --schedule constant --steps 500 --seed 1"),
    "student": ("student-1e-3", "--lr 1e-4 --warmup 0 --schedule constant --steps 150 --seed 2"),
}
LAYERS = (0, 2, 5)

# The recipe is the card's: T = 2, half and half, rate 1e-4, constant, no warm-up, 64 steps. Sizes are ours.
BASE = ("--recipe distilpythia --seq-len 256 --batch-size 4 --grad-accum 1 --precision bf16 --device cpu "
        "--save-interval 10000")
MARKS = (4, 16, 64, 256, 1024)  # steps at which a run is asked; the published one had 64
SEEDS = (0, 1, 2)
SHORT_ARMS = {
    "published": "",
    "T 1": "--temperature 1",
    "teacher alone": "--kd-weight 1 --clm-weight 0",
    "teacher alone, T 1": "--kd-weight 1 --clm-weight 0 --temperature 1",
    "text alone": "--kd-weight 0 --clm-weight 1",
    "other text": f"--kd-weight 0 --clm-weight 1 --data {OUT}/prose",
    "routed": "--loss plain",  # see routed_losses
    "bf16-pure": "--precision bf16-pure",
    "published, warm-up": "--warmup 0.25",
    "published, larger steps": "--grad-accum 4",
    "published, lr 1e-3": "--lr 1e-3",
    "text alone, lr 1e-3": "--kd-weight 0 --clm-weight 1 --lr 1e-3",
    "other text, lr 1e-3": f"--kd-weight 0 --clm-weight 1 --data {OUT}/prose --lr 1e-3",
}
LONG_ARMS = {
    "published, long": "--steps 1024",
    "text alone, long": "--kd-weight 0 --clm-weight 1 --steps 1024",
}
SURE = 0.5  # nats of entropy, below which a teacher's token is routed to the text


def plan():
    """All runs, in the order in which they are made: {name: flags}. The long ones come last."""
    return {f"{arm}, seed {seed}": f"{flags} --seed {seed}".strip()
            for arms in (SHORT_ARMS, LONG_ARMS) for seed in SEEDS for arm, flags in arms.items()}


# ------------------------------------------------------------------------------------ before distillation
def warm_start():
    """Make text, teacher and student in OUT, unless they are there."""
    text = write_text(OUT / "text", load_tokenizer(options.DEMO_TEACHER))
    write_prose(OUT / "prose")
    for folder, (source, flags) in WARM_START.items():
        if (OUT / folder / "model.safetensors").exists():
            continue
        if source == "layers":
            cut_student(OUT / "teacher", OUT / "layers")

        first = options.DEMO_TEACHER if source == "demo" else OUT / source
        where = f"--student {first} --data {text} --out {OUT / folder} --overwrite"
        command = shlex.split(f"{TEXT_ALONE} {flags} {where}")
        subprocess.run([sys.executable, ROOT / "distill.py", *command], check=True)


def cut_student(teacher, folder):
    """Layers LAYERS of a teacher, as a model of its own."""
    folder.mkdir(exist_ok=True)
    student = student_from(load(teacher), LAYERS)
    student.save(folder)
    load_tokenizer(teacher).save(folder, student.context)


# ------------------------------------------------------------------------------------ an objective
def routed_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
    """plain_losses, where tokens of which the teacher is sure are learned from the text alone.

    What can be copied is what a teacher is sure of; so arXiv 2509.01649 proposes to protect copying.
    """
    log_p = F.linear(teacher_hidden, teacher_head).float().log_softmax(-1)  # (N, V)
    entropy = -(log_p.exp() * log_p).sum(-1)  # (N,)
    is_sure = entropy < SURE
    models = student_hidden, student_head, teacher_hidden, teacher_head

    from_both = distill.plain_losses(*models, targets.masked_fill(is_sure, -100), settings)
    alone = replace(settings, kd_weight=0.0, clm_weight=1.0)
    from_text = distill.plain_losses(*models, targets.masked_fill(~is_sure, -100), alone)
    return Losses(*(a + b for a, b in zip(from_both, from_text, strict=True)))


# ------------------------------------------------------------------------------------ a run
def start(flags, folder):
    """What distill.py has before it trains: args, tokenizer, teacher, student."""
    models = f"--teacher {OUT}/teacher --student {OUT}/student --data {OUT}/text --out {folder}"
    args = distill.parse_args(shlex.split(f"{BASE} {models} {flags}"))
    options.check(args)
    return args, *distill.load_models(args, CPU)


def questions():
    """A function: model -> its figures."""
    tokenizer = load_tokenizer(OUT / "teacher")
    corpus = prepare(str(OUT / "text"), tokenizer)
    items = read_items()
    names = find_names(tokenizer)

    def ask(model):
        return figures(copy.deepcopy(model).float(), corpus, items, names, tokenizer)
    return ask


def one_run(name, flags, ask):
    """Make a run. Returns its row: a name, settings, and figures by step."""
    with tempfile.TemporaryDirectory() as folder:
        args, tokenizer, teacher, student = start(flags, folder)
        corpus = prepare(args.data, tokenizer)
        losses = routed_losses if name.startswith("routed") else distill.plain_losses
        started = time.perf_counter()
        with mock.patch.dict(distill.LOSSES, plain=losses), asked_at(args.steps, student, ask) as states:
            distill.train(args, student, teacher if args.kd_weight else None, corpus, tokenizer.vocab_size,
                          Ranks("cpu"))
        seconds = time.perf_counter() - started
    return {"name": name, "flags": flags, "seed": args.seed, "states": states, "seconds": round(seconds),
            **origin()}


@contextmanager
def asked_at(last, student, ask):
    """Yields {step: figures}, filled while the student is trained: at MARKS of a long run, and at the end."""
    states = {}
    marks = {last, *(mark for mark in MARKS if last > 64)}
    done = 0

    def after_step(*_):
        nonlocal done
        done += 1
        if done in marks:
            states[str(done)] = ask(student)

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield states
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.lambada [options]")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with this in their name")
    parser.add_argument("--list", action="store_true",
                        help="show all runs, and what those that are done came to")
    return parser.parse_args(argv)


def summary(state):
    return f"{state['perplexity']:7.2f} {state['lambada perplexity']:8.1f} {state['lambada accuracy']:.3f}"


def main():
    args = parse_args()
    runs = {name: flags for name, flags in plan().items() if args.only in name}
    if not runs:
        raise InputError(f"--only {args.only}: no run of the plan has this in its name; see --list")
    if args.list:
        done = read_rows(RESULTS)
        print("perplexity, of our LAMBADA, its accuracy")
        for name, flags in runs.items():
            states = [*done[name]["states"].values()] if name in done else []
            print(summary(states[-1]) if states else " " * 22, name, "|", flags)
        return

    keep_memory()
    warm_start()
    ask = questions()
    for who in ("teacher", "student"):
        if who not in read_rows(RESULTS):
            add_row(RESULTS, {"name": who, "states": {"0": ask(load(OUT / who))}, **origin()})
    for name, flags in runs.items():
        if name in read_rows(RESULTS):  # read again each time: another process may be at work
            continue
        row = one_run(name, flags, ask)
        add_row(RESULTS, row)
        print(summary([*row["states"].values()][-1]), f"{row['seconds']:6} s  {name}", flush=True)


if __name__ == "__main__":
    run_cli(main)
