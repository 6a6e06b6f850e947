"""Should I distil? Questions before a run, asked of small models: unseen text, little text, hard labels.

    python -m extras.questions                    makes the missing runs; can be stopped
    python -m extras.questions --only scarce      only runs whose name contains "scarce"
    python -m extras.questions --list             prints the plan and the results so far
    python -m extras.questions --page             makes the tables of its page anew

Read in this order:
  plan             the runs; what each question expects was written into docs/questions.md before them
  labels_of        students of single tokens that the teacher chose, instead of its whole distribution
  teachers_text    text that the teacher wrote
  module_losses    the demo's models on modules that nobody has ever chosen anything on
  TABLES           the tables of docs/questions.md

Each run is the demo, or its control, with the flags in its row. Its text is the demo's, or the package `test`
of the Python standard library, which no model here has seen. Losses are in nats per token on held-out
modules.

Shapes: B sequences, L tokens of each, N = B * L, n tokens with a target, V vocabulary.
"""
import contextlib
import functools
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import load_tokenizer
from distill import text_alone
from extras.atlas import BASE, CONTROL, DEMO, SEEDS, SHARED
from extras.atlas import held_out as held_out_figures
from extras.study import Study, trained, write_text
from model import load
from sample import draw
from support.chunked_loss import chunked_loss
from support.cli import run_cli
from support.flags import DEMO_TEACHER
from support.ranks import autocast
from support.run import read_held_out
from support.scoring import SCORES, score
from support.text import stable_hash

OUT = Path("out-questions")  # the texts
UNSEEN = f"--data {OUT}/test --eval-tokens 40000 --eval-interval 200"
CAREFUL = f"{CONTROL} --weight-decay 0.1 --dropout 0.1"  # the control of someone with little text
SIZES = {"30k": 30_000, "100k": 100_000, "300k": 300_000}  # tokens
LABELS = {  # arm: (logits of the teacher (n, V) -> a label for each token (n,))
    "argmax": lambda logits: logits.argmax(-1),
    "draw": lambda logits: torch.multinomial(logits.softmax(-1), 1)[:, 0],
}
HARD = f"{SHARED} --kd-weight 1 --clm-weight 1"  # the loss of labels_of is the CLM; the teacher is there, too
WRITTEN = f"{SHARED} --kd-weight 0 --clm-weight 1"


# ------------------------------------------------------------------------------------ the plan
def plan():
    runs = {}
    for arm, flags in (("argmax", HARD), ("draw", HARD), ("written", WRITTEN)):
        runs |= {f"hard: {arm}, lr {lr}": f"{flags} --lr {lr}" for lr in ("3.5e-4", "7e-4", "1.4e-3")}
    for arm, flags, rates in (("student", DEMO, "5e-4 2e-3"), ("control", CONTROL, "2.5e-4 1e-3"),
                              ("careful control", CAREFUL, "2.5e-4 1e-3")):
        runs[f"unseen: {arm}, seed 0"] = f"{flags} {UNSEEN} --seed 0"
        runs |= {f"unseen: {arm}, lr {lr}": f"{flags} {UNSEEN} --lr {lr}" for lr in rates.split()}
    for arm, flags in (("student", DEMO), ("control", CONTROL)):
        runs |= {f"headline: {arm}, seed {seed}": f"{flags} --seed {seed}" for seed in SEEDS}
    return {name: f"{BASE} {flags}" for name, flags in runs.items()}


def one_run(name, flags):
    question, _, rest = name.partition(": ")
    arm = rest.split(", ")[0]
    if question in ("unseen", "scarce"):
        write_text(OUT / "test", functools.partial(test_package))
    return trained(flags, module_losses if question == "headline" else figures,
                   labels_of(LABELS[arm]) if arm in LABELS else None, functools.partial(change, rest))


def change(rest, teacher, student, corpus):
    """Another text in place of the corpus's training text, where an arm says so."""
    if rest.startswith("written"):
        corpus.train = teachers_text()
    for size, n_tokens in SIZES.items():
        if f" {size}," in rest:
            corpus.train = corpus.train[:n_tokens]
    return teacher, student, corpus


def figures(args, teacher, student, corpus, tokenizer):
    """The held-out loss at the end, and the best of those on the way: where somebody who looks would stop."""
    found = held_out_figures(args, teacher, student, corpus, tokenizer)
    on_the_way = [row["loss"] for row in read_held_out(args.out)]
    return {**found, "best": min([found["loss"], *on_the_way]), "different_tokens": len(corpus.train)}


# ------------------------------------------------------------------------------------ hard labels
def labels_of(choose):
    """A function in place of distill.losses_of: the CLM of labels that `choose` takes from the teacher."""
    def losses_of(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
        counted = targets != -100
        labels = targets.clone()
        labels[counted] = choose(F.linear(teacher_hidden[counted], teacher_head).float())
        return chunked_loss(text_alone, student_hidden, student_head, None, None, labels, settings)
    return losses_of


@functools.cache
def teachers_text(n_tokens=620_000, batch=64):
    """Tokens that the demo's teacher writes at temperature 1, from the start of a document; (n,) uint16."""
    teacher = load(DEMO_TEACHER)
    eot = load_tokenizer(DEMO_TEACHER).eot
    choose = functools.partial(draw, generator=torch.Generator().manual_seed(0))
    texts = []
    while sum(map(len, texts)) < n_tokens:
        ids = teacher.generate(torch.full((batch, 1), eot), teacher.context - 1, choose)
        texts += [row.numpy().astype(np.uint16) for row in ids]
    return np.concatenate(texts)


# ------------------------------------------------------------------------------------ unseen text
def package(*names):
    """(path, text) of the modules of packages of the standard library, sorted; none of a missing one."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(path for name in names for path in (root / name).rglob("*.py")):
        with contextlib.suppress(UnicodeDecodeError):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def test_package(held_out):
    """The documents of a split of the package `test`: one module in 20 is held out."""
    return (text for name, text in package("test") if (stable_hash(name) % 20 == 0) == held_out)


@torch.no_grad()
def module_losses(args, teacher, student, corpus, tokenizer):
    """The usual figures, and of the modules of three packages [tokens, teacher's nats, student's nats].
    Of `test` one module in four is taken, of each module the first 1,024 tokens; windows are those of
    training."""
    def losses(text):
        ids = torch.tensor([tokenizer.eot, *tokenizer.encode(text)][:4 * args.seq_len + 1])
        length = min(args.seq_len, len(ids) - 1)
        blocks = ids.unfold(0, length + 1, length)  # (W, L + 1)
        sums = score([teacher, student], blocks[:, :-1], blocks[:, 1:], tokenizer.vocab_size)  # (2, 6, W)
        nll = sums.sum(-1)[:, SCORES.index("nll")]
        return [blocks[:, 1:].numel(), *(round(nats, 2) for nats in nll.tolist())]

    with autocast(args, torch.device("cpu")):
        modules = {
            "idlelib, lib2to3": [losses(text) for _, text in package("idlelib", "lib2to3") if text],
            "test": [losses(text) for name, text in package("test") if text and stable_hash(name) % 4 == 0],
        }
    return {**held_out_figures(args, teacher, student, corpus, tokenizer), "modules": modules}


# ------------------------------------------------------------------------------------ tables
TABLES = {}
STUDY = Study("questions", __doc__, plan(), one_run, TABLES)

if __name__ == "__main__":
    run_cli(STUDY.main)
