"""Where does a teacher pay off? Runs of the demo with one change each, and the page made of their results.

    python -m extras.atlas   makes the missing runs; can be stopped

Read in this order:
  ARMS, budgets     the runs, as data: a name, and the flags that BASE lacks
  one_run, figures  what is trained and measured
  TABLES            the tables of docs/atlas.md: the name of each, and the function that makes it
  draw_budgets      where a teacher pays off, over seconds of training
  draw_divergences  what each divergence is good for

Each run is `python distill.py` with BASE and the flags in its row. Losses are in nats per token, on the
modules that the demo holds out: 131,733 tokens, or fewer if --eval-tokens says so. Seconds are of training
alone. They only mean something if nothing else ran at the same time; losses do not depend on that.
"""
import copy
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from extras.plot import BLUE, GREEN, ORANGE, PURPLE, new_figure
from extras.study import Study, arms, average, spread, trained
from sample import draw
from support.cli import run_cli
from support.flags import RECIPES
from support.ranks import autocast
from support.scoring import validate

# All runs share these flags; what they leave out keeps the demo's values. bf16 is named because the default,
# `auto`, may choose another precision on another machine.
BASE = "--no-control --precision bf16 --device cpu"
ALONE = "--kd-weight 1 --clm-weight 0"  # learns from the teacher alone
TEXT = "--kd-weight 0 --clm-weight 1"  # learns from the text alone, as the control does

# The demo: the best settings that tuning found for the student, and for its control.
SHARED = "--student-layers 0,4,5 --schedule linear --betas 0.9 0.999 --batch-size 2 --steps 1200"
STUDENT = f"{SHARED} --lr 1e-3 {ALONE}"
DEMO = f"{STUDENT} --kd-weight 0.9 --clm-weight 0.1"
CONTROL = f"{SHARED} --lr 5e-4 {TEXT}"

SEEDS = (0, 1, 2)
BUDGETS = (300, 600, 1200, 2400, 4800)  # steps
LONGEST_CONTROL = 7500  # steps that a control makes in the seconds of the longest student
FIRST_BUDGETS = (150, 300, 600, 1200, 2400)  # steps of the earlier recipe, each of 4 x 256 tokens


# ------------------------------------------------------------------------------------ the plan
# docs/atlas.jsonl has more rows than this plan: two rounds of tuning, all ways to keep three layers, and an
# earlier recipe. They are done. Each row has its flags, and commit 4cd76ba has the plan that they came from.

# What is compared at the demo's number of tokens: {arm: (its name in the tables, flags, seeds)}.
DEMO_STEPS = RECIPES["demo"]["steps"]
ARMS = {
    f"student {DEMO_STEPS} steps": (
        "0.9 KL and 0.1 CLM, T = 2 (**the demo**)", f"{DEMO} --steps {DEMO_STEPS}", SEEDS),
    "forward": ("KL alone, T = 2", STUDENT, SEEDS),
    "T 1": ("KL alone, T = 1", f"{STUDENT} --temperature 1", SEEDS),
    "T 4": ("KL alone, T = 4", f"{STUDENT} --temperature 4", SEEDS),
    "T 8": ("KL alone, T = 8", f"{STUDENT} --temperature 8", None),
    "half and half": ("half KL and half CLM", f"{STUDENT} --kd-weight 0.5 --clm-weight 0.5", SEEDS),
    "reverse": ("reverse KL alone", f"{STUDENT} --divergence reverse", SEEDS),
    "reverse, T 1": ("reverse KL alone, T = 1", f"{STUDENT} --divergence reverse --temperature 1", None),
    "jsd": ("JSD alone, mixture half and half", f"{STUDENT} --divergence jsd", SEEDS),
    "on-policy half": (
        "KL alone, half of the micro-batches on-policy", f"{STUDENT} --on-policy 0.5", SEEDS),
    "layers 0,2,5": ("KL alone, layers 0,2,5", f"{STUDENT} --student-layers 0,2,5", None),
    "layers 0,3,4": ("KL alone, layers 0,3,4", f"{STUDENT} --student-layers 0,3,4", None),
    f"control {DEMO_STEPS} steps": (
        "text alone, its own rate (**the control**)", f"{CONTROL} --steps {DEMO_STEPS}", SEEDS),
    "random start": ("the demo from random weights", f"{DEMO} --student-init random", SEEDS),
    "control, random start": (
        "the control from random weights", f"{CONTROL} --student-init random", SEEDS),
    "forward, random start": ("KL alone, from random weights", f"{STUDENT} --student-init random", None),
}
FIRST_ARMS = ("forward", "half and half", "reverse", "jsd")


def one_change():
    runs = {}
    for arm, (_, flags, seeds) in ARMS.items():
        if seeds:
            runs |= {f"{arm}, seed {seed}": f"{flags} --seed {seed}" for seed in seeds}
        else:
            runs[arm] = flags  # the default seed, 0
    return runs


def budgets():
    """The demo and its control, from a quarter of the demo's tokens to four times as many."""
    runs = {}
    for seed in SEEDS:
        for steps in BUDGETS:
            runs[f"student {steps} steps, seed {seed}"] = f"{DEMO} --steps {steps} --seed {seed}"
            runs[f"control {steps} steps, seed {seed}"] = f"{CONTROL} --steps {steps} --seed {seed}"
    runs[f"control {LONGEST_CONTROL} steps, seed 0"] = f"{CONTROL} --steps {LONGEST_CONTROL} --seed 0"
    return runs


# ------------------------------------------------------------------------------------ one run
def one_run(name, flags):
    """Make a run and score it on the held-out text. Returns its figures."""
    return trained(f"{BASE} {flags}", figures)


def figures(args, teacher, student, corpus, tokenizer):
    """All that a row has, besides its seed and times."""
    parts = teacher, student, corpus
    return {
        "objective": args.objective,
        **held_out(args, *parts, tokenizer),
        "reverse_kl": reverse_kl(args, *parts),
        **sample_figures(*parts),
        "tokens": args.steps * args.batch_size * args.grad_accum * args.seq_len,
    }


def held_out(args, teacher, student, corpus, tokenizer):
    """The student's figures from the table that distill.py prints, and the teacher's loss beside them."""
    context = autocast(args, torch.device("cpu"))
    bar, row = validate([teacher, student], corpus, tokenizer.vocab_size, args, context)
    return {"loss": row["loss"], "teacher_loss": bar["loss"], "kl": row["KL to teacher"],
            "same_top_1": row["same top-1"]}


@torch.no_grad()
def reverse_kl(args, teacher, student, corpus, blocks=80):
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
    """How the teacher likes the student's own texts, and how varied they are: {figure: value}.

    n texts from the start of a document, drawn at temperature 1. distinct_3: the share of different triples
    of tokens among all of them.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.full((n, 1), corpus.eot)
    text = student.generate(start, length, partial(draw, generator=generator))  # (n, 1 + length)
    log_p = copy.deepcopy(teacher).float()(text[:, :-1]).log_softmax(-1)
    nll = -log_p.gather(-1, text[:, 1:, None]).mean().item()
    triples = {tuple(triple) for triple in text[:, 1:].unfold(1, 3, 1).flatten(0, 1).tolist()}
    return {"teacher_nll_of_samples": nll, "distinct_3": len(triples) / (n * (length - 2))}


# ------------------------------------------------------------------------------------ tables
class Recipe(NamedTuple):
    """What the runs of a recipe have in common, whatever their length."""
    prefix: str  # of their names
    budgets: tuple  # steps
    tokens: int  # of a step
    # Seconds of a step on a quiet machine, two threads (docs/speed.md). The runs of the atlas shared their
    # machine with other work, so the seconds in their rows say little.
    seconds: dict


OF_DEMO = Recipe("", (*BUDGETS, LONGEST_CONTROL), 512, {"student": 0.0630, "control": 0.0408})
OF_FIRST = Recipe("first: ", FIRST_BUDGETS, 1024, {"student": 0.138, "control": 0.085})
DIVERGENCES = {  # {arm: its name in the picture}
    "forward": "forward",
    "reverse": "reverse",
    "jsd": "jsd",
    "on-policy half": "forward,\non-policy",
}
MEASURES = {  # {column of a row: its name in the picture}
    "loss": "held-out loss",
    "kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "teacher_nll_of_samples": "teacher's loss on\nthe student's texts",
    "distinct_3": "different 3-grams\nin these texts",
}


def tuning_table(rows, prefix):
    """All settings of student and control in a round of tuning, whose names begin with `prefix`."""
    return [
        {
            "tried": name.removeprefix(prefix),
            "held-out loss": f"{row['loss']:.4f}",
            "KL to teacher": f"{row['kl']:.4f}",
        }
        for name, row in rows.items() if name.startswith(prefix)
    ]


def arms_table(rows, names=ARMS, prefix=""):
    """One change at a time, on the demo's number of tokens."""
    lines = []
    for arm in names:
        title, _, _ = ARMS[arm]
        if seeds := arms(rows).get(prefix + arm):
            lines.append({
                "arm": title,
                "seeds": len(seeds),
                "held-out loss": spread(seeds),
                "KL to teacher": f"{average(seeds, 'kl'):.4f}",
                "same top-1": f"{average(seeds, 'same_top_1'):.3f}",
            })
    return lines


def measures_table(rows):
    """What the divergences change besides the loss."""
    lines = []
    for arm in DIVERGENCES:
        if seeds := [row for row in arms(rows).get(arm, []) if "distinct_3" in row]:
            title, _, _ = ARMS[arm]
            line = {"arm": title, "seeds": len(seeds)}
            for column, title in MEASURES.items():
                in_one_line = title.replace("\n", " ").replace("|", r"\|")
                line[in_one_line] = f"{average(seeds, column):.4f}"
            lines.append(line)
    return lines


def layers_table(rows):
    """All ways to keep three layers, the best after 100 steps first."""
    tried = [(name.split()[1].rstrip(","), row) for name, row in rows.items() if name.endswith(", 100 steps")]
    tried.sort(key=lambda pair: pair[1]["loss"])
    return [{"layers": kept, "before": f"{row['before']:.3f}", "after 100 steps": f"{row['loss']:.3f}"}
            for kept, row in tried]


def budget_points(rows, who, recipe):
    """[(steps, seconds, rows of the seeds)] of the student or the control, by budget."""
    found = arms(rows)
    points = []
    for steps in recipe.budgets:
        if seeds := found.get(f"{recipe.prefix}{who} {steps} steps"):
            points.append((steps, steps * recipe.seconds[who], seeds))
    return points


def control_after(rows, seconds, recipe):
    """The control's mean loss after so many seconds: a straight line over log(seconds) between its budgets,
    and None beyond them."""
    points = budget_points(rows, "control", recipe)
    times = [math.log(taken) for _, taken, _ in points]
    if not times or not times[0] <= math.log(seconds) <= times[-1]:
        return None
    return float(np.interp(math.log(seconds), times, [average(seeds) for _, _, seeds in points]))


def budgets_table(rows, recipe):
    """Student and control on the same number of tokens, and in the same time."""
    teacher = next(iter(rows.values()))["teacher_loss"]
    controls = {steps: seeds for steps, _, seeds in budget_points(rows, "control", recipe)}

    def share(student, control):
        return "" if control is None else f"{(control - student) / (control - teacher):.0%}"

    lines = []
    for steps, seconds, seeds in budget_points(rows, "student", recipe):
        student = average(seeds)
        at_equal_tokens = average(controls[steps]) if steps in controls else None
        at_equal_seconds = control_after(rows, seconds, recipe)
        lines.append({
            "tokens": f"{steps * recipe.tokens:,}",
            "seconds": f"{seconds:.0f}",
            "seeds": len(seeds),
            "student": spread(seeds),
            "control, equal tokens": spread(controls[steps]) if steps in controls else "",
            "closes": share(student, at_equal_tokens),
            "control, equal seconds": "" if at_equal_seconds is None else f"{at_equal_seconds:.3f}",
            "closes then": share(student, at_equal_seconds),
        })
    return lines


TABLES = {
    "tuning": partial(tuning_table, prefix="tune "),
    "tuning_again": partial(tuning_table, prefix="again: "),
    "arms": arms_table,
    "first_arms": partial(arms_table, names=FIRST_ARMS, prefix=OF_FIRST.prefix),
    "measures": measures_table,
    "budgets": partial(budgets_table, recipe=OF_DEMO),
    "first_budgets": partial(budgets_table, recipe=OF_FIRST),
    "layers": layers_table,
}


# ------------------------------------------------------------------------------------ pictures
def draw_budgets(rows):
    """Held-out loss over seconds of training, student and control; each budget is a run of its own."""
    figure = new_figure()
    axes = figure.subplots()
    for who, colour, label_at in (("student", BLUE, (0, -13)), ("control", PURPLE, (3, 6))):
        points = budget_points(rows, who, OF_DEMO)
        seconds = [taken for _, taken, _ in points]
        axes.plot(seconds, [average(seeds) for _, _, seeds in points], "-", color=colour, label=who)
        for steps, taken, seeds in points:
            axes.plot([taken] * len(seeds), [row["loss"] for row in seeds], "o", color=colour, markersize=4)
            tokens = f"{steps * OF_DEMO.tokens / 1000:,.0f}k"
            axes.annotate(tokens, (taken, average(seeds)), label_at, textcoords="offset points",
                          color=colour, fontsize=8, ha="right" if who == "student" else "left")

    teacher = next(iter(rows.values()))["teacher_loss"]
    axes.axhline(teacher, color=ORANGE, linewidth=1.2, label="teacher")
    axes.set(xscale="log", ylabel="held-out loss, nats per token",
             xlabel="seconds of training on two CPU cores (beside the points: tokens)")
    axes.set_xticks([10, 20, 50, 100, 200, 300])
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.minorticks_off()
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.grid()
    return figure


def draw_divergences(rows):
    """What each divergence is good for: five measures, a point for each seed."""
    figure = new_figure(height=3.2)
    panels = figure.subplots(1, len(MEASURES))
    for axes, (column, title) in zip(panels, MEASURES.items(), strict=True):
        for x, arm in enumerate(DIVERGENCES):
            values = [row[column] for row in arms(rows).get(arm, []) if column in row]
            axes.plot([x] * len(values), values, "o", color=(BLUE, ORANGE, GREEN, PURPLE)[x], alpha=0.8)
        axes.set_title(title, fontsize=8)
        axes.set_xticks(range(len(DIVERGENCES)), DIVERGENCES.values(), rotation=60, fontsize=8)
        axes.margins(x=0.15)
        axes.grid(axis="y")
        axes.tick_params(axis="y", labelsize=8)
    return figure


PICTURES = {"atlas-budgets.png": draw_budgets, "atlas-divergences.png": draw_divergences}
STUDY = Study("atlas", __doc__, one_change() | budgets(), one_run, TABLES, PICTURES)

if __name__ == "__main__":
    run_cli(STUDY.main)
