"""Should I distil? Questions before a run, asked of small models: unseen text, little text, hard labels.

    python -m extras.questions   makes the missing runs; can be stopped

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
import itertools
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import load_tokenizer
from distill import text_alone
from extras import atlas
from extras.atlas import BASE, CONTROL, DEMO, SEEDS, SHARED
from extras.study import Study, arms, average, spread, trained, write_text
from model import load
from sample import draw
from support import ROOT
from support.chunked_loss import chunked_loss
from support.cli import run_cli
from support.flags import DEMO_TEACHER
from support.ranks import autocast
from support.run import read_held_out
from support.scoring import SCORES, score
from support.text import stable_hash, stdlib_held_out

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
HARD_ARMS = {"argmax": HARD, "draw": HARD, "written": WRITTEN}
FOUR_RATES = ("1.75e-4", "3.5e-4", "7e-4", "1.4e-3")
HARD_RATES = {"argmax": ("9e-5", *FOUR_RATES), "draw": FOUR_RATES, "written": FOUR_RATES}
UNSEEN_ARMS = {"student": f"{DEMO} {UNSEEN}",
               "tuned teacher": f"{DEMO} {UNSEEN} --recipe demo --teacher {OUT}/teacher",
               "control": f"{CONTROL} {UNSEEN}", "careful control": f"{CAREFUL} {UNSEEN}"}
UNSEEN_RATES = {"student": ("5e-4", "1e-3", "2e-3", "4e-3"), "tuned teacher": ("1e-3", "2e-3"),
                "control": ("2.5e-4", "5e-4", "1e-3", "2e-3"),
                "careful control": ("2.5e-4", "5e-4", "1e-3", "2e-3")}
TUNING = (f"--recipe demo --teacher none --student {shlex.quote(DEMO_TEACHER)} --data {OUT}/test --lr 5e-4 "
          f"--precision bf16 --device cpu --eval-tokens 40000 --out {OUT}/teacher")
SCARCE_ARMS = {"student": "1e-3", "control": "5e-4", "careful control": "5e-4"}  # the demo's rates
BEST = {  # the rates that were best with seed 0
    "argmax": "9e-5", "draw": "3.5e-4", "written": "3.5e-4",
    "student": "2e-3", "tuned teacher": "1e-3", "control": "1e-3", "careful control": "1e-3"}


def plan():
    """Each arm at several rates with seed 0; the others at the best rate; then less text at that rate."""
    runs = {}
    for question, found, rates in (("hard", HARD_ARMS, HARD_RATES),
                                   ("unseen", UNSEEN_ARMS, UNSEEN_RATES)):
        for arm, flags in found.items():
            runs |= {f"{question}: {arm}, lr {lr}": f"{flags} --lr {lr}" for lr in rates[arm]}
        for arm, seed in itertools.product(found, SEEDS[1:]):
            runs[f"{question}: {arm}, seed {seed}"] = f"{found[arm]} --lr {BEST[arm]} --seed {seed}"
    for seed, size, (arm, lr) in itertools.product(SEEDS, SIZES, SCARCE_ARMS.items()):
        flags = f"{UNSEEN_ARMS[arm]} --eval-interval 100 --lr {lr} --seed {seed}"
        runs[f"scarce: {arm}, {size}, seed {seed}"] = flags
    for seed, (arm, flags) in itertools.product(SEEDS, {"student": DEMO, "control": CONTROL}.items()):
        runs[f"headline: {arm}, seed {seed}"] = f"{flags} --seed {seed}"
    return {name: f"{BASE} {flags}" for name, flags in runs.items()}


def one_run(name, flags):
    question, _, rest = name.partition(": ")
    arm = rest.split(", ")[0]
    if question in ("unseen", "scarce"):
        write_text(OUT / "test", unseen_documents)
    if arm == "tuned teacher" and not (OUT / "teacher" / "model.safetensors").exists():
        subprocess.run([sys.executable, ROOT / "distill.py", *shlex.split(TUNING)], check=True)

    score_run = module_losses if question == "headline" else figures
    losses_of = labels_of(LABELS[arm]) if arm in LABELS else None
    return trained(flags, score_run, losses_of, functools.partial(change, rest))


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
    found = atlas.held_out(args, teacher, student, corpus, tokenizer)
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


def unseen_documents(held_out):
    """The documents of a split of the package `test`: one module in 20 is held out."""
    return (text for name, text in package("test") if stdlib_held_out(name) == held_out)


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
    return {**atlas.held_out(args, teacher, student, corpus, tokenizer), "modules": modules}


# ------------------------------------------------------------------------------------ tables
def seeds_of(rows, question, arm):
    """The rows of an arm at its best rate, by seed."""
    names = [f"{question}: {arm}, lr {BEST[arm]}", *(f"{question}: {arm}, seed {seed}" for seed in SEEDS[1:])]
    return [rows[name] for name in names if name in rows]


def line(title, seeds, **more):
    return {"learns from": title, **more, "seeds": len(seeds), "held-out loss": spread(seeds),
            "KL to teacher": f"{average(seeds, 'kl'):.4f}",
            "same top-1": f"{average(seeds, 'same_top_1'):.3f}"}


def hard_table(rows):
    """Single tokens against the whole distribution; text and distribution are arms of the atlas."""
    of_atlas = arms(atlas.STUDY.rows())
    lines = [line("the text", of_atlas["control 1200 steps"], rate="5e-4")]
    for arm in HARD_ARMS:
        if seeds := seeds_of(rows, "hard", arm):
            lines.append(line(arm, seeds, rate=BEST[arm]))
    lines.append(line("soft: the distribution, T = 1", of_atlas["T 1"], rate="1e-3"))
    lines.append(line("soft, T = 2", of_atlas["forward"], rate="1e-3"))
    return lines


def rates_table(rows):
    """All rates that were tried, with seed 0: held-out losses."""
    lines = []
    for question, rates in (("hard", HARD_RATES), ("unseen", UNSEEN_RATES)):
        for arm, tried in rates.items():
            found = {lr: rows.get(f"{question}: {arm}, lr {lr}") for lr in tried}
            losses = [f"{lr}: {row['loss']:.4f}" for lr, row in found.items() if row]
            lines.append({"question": question, "arm": arm, "held-out loss by rate": ", ".join(losses)})
    return lines


def unseen_table(rows):
    """Students and controls on text that the teacher has not seen, or has only been tuned on."""
    found = {arm: seeds_of(rows, "unseen", arm) for arm in UNSEEN_ARMS}
    return [{"": arm, "rate": BEST[arm], "seeds": len(seeds), "held-out loss": spread(seeds),
             "its teacher's": f"{seeds[0]['teacher_loss']:.3f}"} for arm, seeds in found.items() if seeds]


def scarce_table(rows):
    """Student and controls on unseen text, by the number of different tokens of it."""
    lines = []
    for size, arm in itertools.product((*SIZES, "all"), SCARCE_ARMS):
        seeds = arms(rows).get(f"scarce: {arm}, {size}", [])
        if size == "all":
            seeds = seeds_of(rows, "unseen", arm)
        if seeds:
            lines.append({
                "different tokens": size,
                "passes": f"{512 * seeds[0]['steps'] / seeds[0]['different_tokens']:.1f}",
                "": arm,
                "seeds": len(seeds),
                "at the end": f"{average(seeds):.3f}",
                "at its best": spread(seeds, "best"),
            })
    return lines


def headline_table(rows):
    """Teacher, student and control on packages that nothing was chosen on."""
    pairs = [[rows.get(f"headline: {arm}, seed {seed}") for arm in ("student", "control")] for seed in SEEDS]
    pairs = [pair for pair in pairs if all(pair)]
    lines = []
    for names in pairs[0][0]["modules"] if pairs else ():
        nats = np.array([[model["modules"][names] for model in pair] for pair in pairs])  # (S, 2, n, 3)
        lines.append({"package": names, "modules": nats.shape[2],
                      "tokens": f"{nats[0, 0, :, 0].sum():,.0f}", **headline(nats)})
    return lines


def headline(nats, draws=2000):
    """nats (S seeds, 2 models, n modules, 3): tokens, nats of the teacher, nats of the model; the models are
    student and control -> their losses, and what the teacher was worth. The 95% intervals draw modules and
    seeds again."""
    n_seeds, _, n_modules, _ = nats.shape
    rng = np.random.default_rng(0)
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), draws)  # (draws, S)
    modules = rng.multinomial(n_modules, np.full(n_modules, 1 / n_modules), draws)  # (draws, n)
    seeds = np.vstack([np.ones(n_seeds), seeds])  # as they are; then drawn again
    modules = np.vstack([np.ones(n_modules), modules])

    sums = np.einsum("ds,dn,smnk->dmk", seeds, modules, nats)  # (1 + draws, 2, 3)
    teacher = sums[:, 0, 1] / sums[:, 0, 0]
    student, control = (sums[:, :, 2] / sums[:, :, 0]).T
    gain = control - student
    share = gain / (control - teacher)

    def shown(values, form):
        low, high = np.percentile(values[1:], (2.5, 97.5))
        return f"{values[0]:{form}} ({low:{form}} to {high:{form}})"

    return {"teacher": f"{teacher[0]:.3f}", "student": f"{student[0]:.3f}", "control": f"{control[0]:.3f}",
            "student better by": shown(gain, ".3f"), "of the gap": shown(share, ".1%")}


TABLES = {"unseen": unseen_table, "scarce": scarce_table, "hard": hard_table, "headline": headline_table,
          "rates": rates_table}
STUDY = Study("questions", __doc__, plan(), one_run, TABLES)

if __name__ == "__main__":
    run_cli(STUDY.main)
