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
import copy
import itertools
import re
import shlex
import subprocess
import sys
import sysconfig
import textwrap
import warnings
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

import distill
from data import load_tokenizer
from extras import atlas, cache_study
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

OUT = Path("out-questions")  # texts and models that runs share are made here once
UNSEEN = f"--data {OUT}/test --eval-tokens 40000"
CAREFUL = f"{CONTROL} --weight-decay 0.1 --dropout 0.1"  # the control of someone with little text
SIZES = {"30k": 30_000, "100k": 100_000, "300k": 300_000, "1M": 1_000_000}  # different tokens
LABELS = {  # arm: (logits of the teacher (n, V) -> a label for each token (n,))
    "argmax": lambda logits: logits.argmax(-1),
    "draw": lambda logits: torch.multinomial(logits.softmax(-1), 1)[:, 0],
}
HARD = f"{SHARED} --kd-weight 1 --clm-weight 1"  # the loss of labels_of is the CLM; the teacher is there, too
WRITTEN = f"{SHARED} --kd-weight 0 --clm-weight 1"
SMOOTHING = 0.1  # of the labels of the control that has soft labels without a teacher

# Models that runs need: {name: flags}. Each is trained when the first run asks for it.
FROM_DEMO = f"--recipe demo --teacher none --student {shlex.quote(DEMO_TEACHER)} --lr 5e-4"
SECOND_STAGE = "--recipe demo --schedule linear --batch-size 2 --steps 300 --kd-weight 1 --clm-weight 0"
MODELS = {
    "teacher": f"{FROM_DEMO} {UNSEEN} --eval-interval 200",
    "teacher-2.5M": f"{FROM_DEMO} {UNSEEN} --steps 4800",
    "quarter": "--recipe demo-teacher --epochs 2.25",
    "half": "--recipe demo-teacher --epochs 4.5",
    "own-size": f"{CONTROL} --steps 4800",
    **{f"stage-one-{seed}": f"{DEMO} --steps 900 --seed {seed}" for seed in SEEDS},
}


# ------------------------------------------------------------------------------------ the plan
class Arm(NamedTuple):
    """Runs that differ in their rate, and at the best rate in their seed."""
    question: str
    name: str
    flags: str
    rates: str  # tried with seed 0
    best: str  # of these: run with the other seeds, too
    seeds: tuple = SEEDS
    in_atlas: str = ""  # the name of this arm in extras/atlas.py, where it has run at `best` with all seeds


def arms_of_length(steps, tokens, student, control):
    """Student and control that read so many tokens, each with (rates, the best). Those of the demo are in the
    atlas."""
    in_atlas = {("student", "1e-3"), ("control", "5e-4")}
    return [Arm("length", f"{who}, {tokens}", f"{flags} --steps {steps}", *rates,
                in_atlas=f"{who} {steps} steps" if (who, rates[1]) in in_atlas else "")
            for who, flags, rates in (("student", DEMO, student), ("control", CONTROL, control))]


def arms_of_size(kept, student, control):
    """Student and control that start from these layers of the teacher."""
    n_layers = len(kept.split(","))
    return [Arm("layers", f"{who}, {n_layers} layers", f"{flags} --student-layers {kept}", *rates)
            for who, flags, rates in (("student", DEMO, student), ("control", CONTROL, control))]


TUNED = f"--recipe demo --teacher {OUT}/teacher"  # the student starts from the layers of this one
FOUR_RATES = "1.75e-4 3.5e-4 7e-4 1.4e-3"
FROM_UNSEEN = f"{UNSEEN} --eval-interval 200"
LONG_UNSEEN = f"{UNSEEN} --steps 4800"
SMALL_STEPS = f"{CONTROL} --batch-size 1"  # twice as many of them
ARMS = [
    Arm("hard", "argmax", HARD, f"9e-5 {FOUR_RATES}", "9e-5"),
    Arm("hard", "draw", HARD, FOUR_RATES, "3.5e-4"),
    Arm("hard", "written", WRITTEN, FOUR_RATES, "3.5e-4"),
    Arm("unseen", "student", f"{DEMO} {FROM_UNSEEN}", "5e-4 1e-3 2e-3 4e-3", "2e-3"),
    Arm("unseen", "tuned teacher", f"{DEMO} {FROM_UNSEEN} {TUNED}", "1e-3 2e-3", "1e-3"),
    Arm("unseen", "control", f"{CONTROL} {FROM_UNSEEN}", "2.5e-4 5e-4 1e-3 2e-3", "1e-3"),
    Arm("unseen", "careful control", f"{CAREFUL} {FROM_UNSEEN}", "2.5e-4 5e-4 1e-3 2e-3", "1e-3", (0,)),
    *(Arm("scarce", f"{who}, {size}", f"{flags} {UNSEEN} --eval-interval 100", *rates)
      for size in SIZES for who, flags, *rates in (
          ("student", DEMO, "5e-4 1e-3 2e-3", "1e-3"),
          ("control", CONTROL, "2.5e-4 5e-4 1e-3", "5e-4"),
          ("careful control", CAREFUL, "5e-4", "5e-4", (0,)))),
    Arm("headline", "student", DEMO, "1e-3", "1e-3"),
    Arm("headline", "control", CONTROL, "5e-4", "5e-4"),

    Arm("unseen 2.5M", "student", f"{DEMO} {LONG_UNSEEN}", "1e-3 2e-3", "2e-3"),
    Arm("unseen 2.5M", "control", f"{CONTROL} {LONG_UNSEEN}", "5e-4 1e-3", "1e-3"),
    Arm("unseen 2.5M", "tuned teacher", f"{DEMO} {LONG_UNSEEN} {TUNED}-2.5M", "5e-4 1e-3", "1e-3"),
    *arms_of_length(300, "154k", ("5e-4 7e-4 1.4e-3 2e-3", "7e-4"),
                    ("2.5e-4 3.5e-4 7e-4 1e-3", "3.5e-4")),
    *arms_of_length(4800, "2.5M", ("5e-4 1.4e-3", "1e-3"), ("3.5e-4 7e-4 1e-3", "7e-4")),
    Arm("length", "control of small steps, 614k", f"{SMALL_STEPS} --steps 2400", "2.5e-4 3.5e-4", "3.5e-4"),
    Arm("length", "control of small steps, 2.5M", f"{SMALL_STEPS} --steps 9600", "2.5e-4 3.5e-4", "3.5e-4",
        (0,)),
    Arm("length", "smoothed control, 614k", CONTROL, "3.5e-4 5e-4", "5e-4"),
    *arms_of_size("0,5", ("1e-3 1.4e-3", "1e-3"), ("5e-4 7e-4", "5e-4")),
    *arms_of_size("0,3,4,5", ("7e-4 1e-3", "1e-3"), ("3.5e-4 5e-4", "5e-4")),
    *(Arm("ladder", name, DEMO, "7e-4 1e-3", "1e-3") for name in ("quarter", "half", "own-size")),
    Arm("policy", "the demo", DEMO, "1e-3", "1e-3"),
    *(Arm("policy", f"{name}, {lr}", f"{SECOND_STAGE} {flags}".rstrip(), lr, lr)
      for lr in ("1e-4", "3e-4") for name, flags in (
          ("forward", ""), ("reverse", "--divergence reverse"),
          ("reverse, on-policy", "--divergence reverse --on-policy 1"))),
    Arm("sure", "text", CONTROL, "5e-4", "5e-4", (0,)),
    Arm("sure", "argmax", HARD, "9e-5", "9e-5", (0,)),
    Arm("sure", "draw", HARD, "3.5e-4", "3.5e-4", (0,)),
    Arm("sure", "written", WRITTEN, "3.5e-4", "3.5e-4", (0,)),
    Arm("sure", "soft", DEMO, "1e-3", "1e-3", (0,)),
]


def plan():
    """Each arm at its rates with seed 0, and at its best rate with the other seeds."""
    runs = {}
    for arm in ARMS:
        for lr in arm.rates.split():
            runs[f"{arm.question}: {arm.name}, lr {lr}"] = f"{BASE} {arm.flags} --lr {lr}"
        for seed in arm.seeds[1:] if not arm.in_atlas else ():
            runs[f"{arm.question}: {arm.name}, seed {seed}"] = (
                f"{BASE} {arm.flags} --lr {arm.best} --seed {seed}")
    return runs


def one_run(name, flags):
    question, _, rest = name.partition(": ")
    arm = rest.rpartition(", ")[0]
    if UNSEEN in flags:
        write_text(OUT / "test", unseen_documents)

    losses_of = None
    if arm in LABELS:
        losses_of = labels_of(LABELS[arm])
    elif arm.startswith("smoothed"):
        losses_of = partial(chunked_loss, smoothed_loss)
    if SECOND_STAGE in flags:
        flags += f" --student {model(f'stage-one-{parsed(flags).seed}')}"
    elif arm == "tuned teacher":
        model(Path(parsed(flags).teacher).name)
    return trained(flags, FIGURES.get(question, figures), losses_of, partial(change, question, arm))


def parsed(flags):
    return distill.parse_args(shlex.split(flags))


def model(name):
    """The folder of one of MODELS, which is trained now unless it is there."""
    folder = str(OUT / name)
    if not Path(folder, "model.safetensors").exists():
        flags = shlex.split(f"{BASE} {MODELS[name]} --eval-tokens 40000")
        subprocess.run([sys.executable, ROOT / "distill.py", *flags, "--out", folder], check=True)
    return folder


def change(question, arm, teacher, student, corpus):
    """Another text or another teacher in place of the demo's, where an arm says so."""
    if arm == "written":
        corpus.train = teachers_text()
    if question == "scarce":
        corpus.train = corpus.train[:SIZES[arm.split(", ")[1]]]
    if question == "ladder":
        teacher = load(model(arm), dtype=torch.bfloat16).requires_grad_(False)
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
        return chunked_loss(distill.text_alone, student_hidden, student_head, None, None, labels, settings)
    return losses_of


def smoothed_loss(student_logits, teacher_logits, targets, settings):
    """text_alone with soft labels and no teacher: a share of each label is spread over the vocabulary
    (Szegedy et al. 2015, arXiv 1512.00567, section 7). log.csv has the plain CLM."""
    smoothed = F.cross_entropy(student_logits, targets, label_smoothing=SMOOTHING, reduction="sum")
    clm = F.cross_entropy(student_logits, targets, reduction="sum")
    return smoothed, torch.zeros_like(clm), clm


@cache
def teachers_text(n_tokens=620_000, batch=64):
    """Tokens that the demo's teacher writes at temperature 1, from the start of a document; (n,) uint16."""
    teacher = load(DEMO_TEACHER)
    eot = load_tokenizer(DEMO_TEACHER).eot
    choose = partial(draw, generator=torch.Generator().manual_seed(0))
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


# ------------------------------------------------------------------------------------ completions
HEADER = re.compile(r"\n( *)(?:async )?def \w+\(.*\).*:(?=\n)")  # of a function, in one line
READ = 64  # tokens that a model reads up to there
WRITTEN_TOKENS = 96  # that it writes then


def compiles(args, teacher, student, corpus, tokenizer):
    """The usual figures, and which share of the functions that the models complete Python can compile."""
    found = atlas.held_out(args, teacher, student, corpus, tokenizer)
    shares = {who: compiled_share(network, corpus.val, tokenizer)
              for who, network in (("compiles", student), ("teacher_compiles", teacher))}
    return {**found, **shares}


def compiled_share(network, held_out_ids, tokenizer, batch=64):
    """Functions of the held-out text that the model completes after their header, at temperature 1."""
    prompts, headers = find_headers(held_out_ids, tokenizer)
    choose = partial(draw, generator=torch.Generator().manual_seed(0))
    network = copy.deepcopy(network).float().eval()
    n_compiled = 0
    for start in range(0, len(headers), batch):
        texts = network.generate(prompts[start:start + batch], WRITTEN_TOKENS, choose)[:, READ:]
        n_compiled += sum(is_python(header, tokenizer.decode(ids.tolist()))
                          for header, ids in zip(headers[start:], texts, strict=False))
    return n_compiled / len(headers)


def find_headers(ids, tokenizer):
    """The last READ tokens up to the end of each function's header, (n, READ), and the headers. They end with
    the colon, because a token can begin with the end of the line and the spaces of the next one."""
    prompts, headers = [], []
    for found in HEADER.finditer(tokenizer.decode(ids.tolist())):
        before = tokenizer.encode(found.string[max(0, found.end() - 8 * READ):found.end()])
        if len(before) >= READ:
            prompts.append(before[-READ:])
            headers.append(found[0][1:])
    return torch.tensor(prompts), headers


def is_python(header, body):
    """Whether a header with the body that was written for it compiles: the lines up to the function's end,
    or all complete lines if the text stops before.

    is_python("def f(x):", "\\n    return x\\ny = (") -> True
    is_python("def f(x):", "\\n    return (\\n") -> False
    """
    indent = len(header) - len(header.lstrip(" "))
    complete = body.split("\n")[:-1]  # the first one is the rest of the header's line
    inside = [not line.strip() or line.startswith(" " * (indent + 1)) for line in complete]
    end = [*inside, False].index(False)
    function = header + "\n".join(complete[:end])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about code such as "1 is 1", which compiles
            compile(textwrap.dedent(function), "completion", "exec")
        return True
    except (SyntaxError, ValueError):
        return False


FIGURES = {"headline": module_losses, "policy": compiles, "sure": cache_study.figures}  # others: figures


# ------------------------------------------------------------------------------------ tables
def seeds_of(rows, question, name):
    """The rows of an arm at its best rate, by seed."""
    arm = next(arm for arm in ARMS if (arm.question, arm.name) == (question, name))
    if arm.in_atlas:
        return arms(atlas.STUDY.rows())[arm.in_atlas]
    names = [f"lr {arm.best}", *(f"seed {seed}" for seed in arm.seeds[1:])]
    found = [rows.get(f"{question}: {name}, {which}") for which in names]
    return [row for row in found if row]


def rate_of(seeds):
    return seeds[0]["flags"].split("--lr ")[-1].split()[0]


def table_of(rows, question, columns, more=()):
    """A line for each arm of a question that has rows; `more`: {title: rows} of other arms, in front.
    columns: {title: rows of the arm -> its cell}."""
    found = {**dict(more), **{arm.name: seeds_of(rows, question, arm.name)
                              for arm in ARMS if arm.question == question}}
    return [{"": name, "rate": rate_of(seeds), "seeds": len(seeds),
             **{title: cell(seeds) for title, cell in columns.items()}}
            for name, seeds in found.items() if seeds]


def mean_of(column, form=".3f"):
    return lambda seeds: format(average(seeds, column), form)


LOSS = {"held-out loss": spread}
KL = {"KL to teacher": mean_of("kl", ".4f")}
TEACHERS = {"its teacher's": mean_of("teacher_loss")}


def hard_table(rows):
    """Single tokens against the whole distribution; text and distribution are arms of the atlas."""
    of_atlas = arms(atlas.STUDY.rows())
    more = {"the text": of_atlas["control 1200 steps"], "soft: the distribution, T = 1": of_atlas["T 1"],
            "soft, T = 2": of_atlas["forward"]}
    return table_of(rows, "hard", {**LOSS, **KL, "same top-1": mean_of("same_top_1")}, more)


def ladder_table(rows):
    """Teachers of different quality; the demo's own teacher is the best of them."""
    more = {"all of its training": arms(atlas.STUDY.rows())["student 1200 steps"]}
    return table_of(rows, "ladder", {**TEACHERS, **LOSS, **KL}, more)


def rates_table(rows):
    """All rates that were tried with seed 0: held-out losses."""
    lines = []
    for arm in ARMS:
        found = {lr: rows.get(f"{arm.question}: {arm.name}, lr {lr}") for lr in arm.rates.split()}
        losses = [f"{lr}: {row['loss']:.4f}" for lr, row in found.items() if row]
        if len(losses) > 1:
            lines.append({"question": arm.question, "arm": arm.name,
                          "held-out loss by rate": ", ".join(losses)})
    return lines


def scarce_table(rows):
    """Student and controls on unseen text, by the number of different tokens of it."""
    lines = []
    for size, who in itertools.product((*SIZES, "all"), ("student", "control", "careful control")):
        seeds = seeds_of(rows, "unseen", who) if size == "all" else seeds_of(rows, "scarce", f"{who}, {size}")
        if seeds:
            lines.append({
                "different tokens": size,
                "passes": f"{512 * seeds[0]['steps'] / seeds[0]['different_tokens']:.1f}",
                "": who,
                "rate": rate_of(seeds),
                "seeds": len(seeds),
                "at the end": mean_of("loss")(seeds),
                "at its best": spread(seeds, "best"),
            })
    return lines


def headline_table(rows):
    """Teacher, student and control on packages that nothing was chosen on."""
    pairs = [*zip(*(seeds_of(rows, "headline", who) for who in ("student", "control")), strict=True)]
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


SURE = ("confidence", "right", "ece_text", "ece_teacher")
TABLES = {
    "unseen": partial(table_of, question="unseen", columns=LOSS | TEACHERS),
    "unseen_long": partial(table_of, question="unseen 2.5M", columns=LOSS | TEACHERS),
    "scarce": scarce_table,
    "hard": hard_table,
    "sure": partial(table_of, question="sure", columns={name: mean_of(name) for name in SURE}),
    "headline": headline_table,
    "length": partial(table_of, question="length", columns=LOSS),
    "layers": partial(table_of, question="layers", columns=LOSS | KL),
    "ladder": ladder_table,
    "policy": partial(table_of, question="policy", columns=LOSS | KL | {"compiles": mean_of("compiles")}),
    "rates": rates_table,
}
STUDY = Study("questions", __doc__, plan(), one_run, TABLES)

if __name__ == "__main__":
    run_cli(STUDY.main)
