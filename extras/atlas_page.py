"""What came of the atlas: the tables and the two pictures of docs/atlas.md, from docs/atlas.jsonl.

    python -m extras.atlas_page     writes both pictures, and the tables into the page

Read in this order:
  arms               rows of one run each -> arms, which are the same run with other seeds
  TABLES             each table of the page: its name there, and the function that makes it
  draw_budgets       where a teacher pays, over seconds
  draw_divergences   what each divergence is good for
  fill               text with marked places -> the same with the tables of today in them
"""
import math
import re
from functools import partial
from statistics import mean
from typing import NamedTuple

import numpy as np

from extras.atlas import BUDGETS, FIRST_BUDGETS, LONGEST_CONTROL, RESULTS, ROOT, finished
from extras.plot import BLUE, GREEN, ORANGE, PURPLE, new_figure, save
from support.cli import InputError, format_table, new_parser, run_cli
from support.files import replaced
from support.options import RECIPES

PAGE = ROOT / "docs" / "atlas.md"

class Recipe(NamedTuple):
    """What the runs of a recipe, of all lengths, have in common."""
    prefix: str  # of their names
    budgets: tuple  # steps
    tokens: int  # of a step
    # Of a step on a quiet machine, two threads (docs/speed.md). The runs of the atlas shared theirs with
    # other work, so their own seconds say little.
    seconds: dict


DEMO = Recipe("", (*BUDGETS, LONGEST_CONTROL), 512, {"student": 0.0630, "control": 0.0408})
FIRST = Recipe("first: ", FIRST_BUDGETS, 1024, {"student": 0.138, "control": 0.085})
DEMO_STEPS = RECIPES["demo"]["steps"]


def arms(rows):
    """{"reverse, seed 0": row, ...} -> {"reverse": [its rows, by seed]}; a name without a seed stays."""
    found = {}
    for name, row in rows.items():
        found.setdefault(name.partition(", seed ")[0], []).append(row)
    return {arm: sorted(of, key=lambda row: row["seed"]) for arm, of in found.items()}


def average(of, column="loss"):
    """Mean of a column over the seeds of an arm."""
    return mean(row[column] for row in of)


def spread(of, column="loss"):
    """`3.2475 (3.2465 to 3.2505)`: mean and range over the seeds, or the one value."""
    values = [row[column] for row in of]
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


# ------------------------------------------------------------------------------------ tables
def tuning_table(rows, prefix):
    """All that was tried for student and control in a round of tuning, whose names begin with `prefix`."""
    return format_table([
        {"tried": name.removeprefix(prefix), "held-out loss": f"{row['loss']:.4f}",
         "KL to teacher": f"{row['kl']:.4f}"}
        for name, row in rows.items() if name.startswith(prefix)])


ARMS = {  # arm: what it is called in the table
    f"student {DEMO_STEPS} steps": "0.9 KL and 0.1 CLM, T = 2 (**the demo**)",
    "forward": "KL alone, T = 2",
    "T 1": "KL alone, T = 1",
    "T 4": "KL alone, T = 4",
    "T 8": "KL alone, T = 8",
    "half and half": "half KL and half CLM",
    "reverse": "reverse KL alone",
    "reverse, T 1": "reverse KL alone, T = 1",
    "jsd": "JSD alone, mixture half and half",
    "on-policy half": "KL alone, half of the micro-batches on-policy",
    "layers 0,2,5": "KL alone, layers 0,2,5",
    "layers 0,3,4": "KL alone, layers 0,3,4",
    f"control {DEMO_STEPS} steps": "text alone, its own rate (**the control**)",
    "random start": "the demo from random weights",
    "control, random start": "the control from random weights",
    "forward, random start": "KL alone, from random weights",
}
FIRST_ARMS = {arm: ARMS[arm] for arm in ("forward", "half and half", "reverse", "jsd")}


def arms_table(rows, names=ARMS, prefix=""):
    """One change at a time, at the demo's tokens."""
    lines = []
    for arm, title in names.items():
        if of := arms(rows).get(prefix + arm):
            lines.append({"arm": title, "seeds": len(of), "held-out loss": spread(of),
                          "KL to teacher": f"{average(of, 'kl'):.4f}",
                          "same top-1": f"{average(of, 'same_top_1'):.3f}"})
    return format_table(lines)


def measures_table(rows):
    """What the divergences do to other measures than the loss."""
    lines = []
    for arm in DIVERGENCES:
        if of := [row for row in arms(rows).get(arm, []) if "distinct_3" in row]:
            lines.append({"arm": ARMS[arm], "seeds": len(of)}
                         | {title.replace("\n", " ").replace("|", r"\|"): f"{average(of, column):.4f}"
                            for column, title in MEASURES.items()})
    return format_table(lines)


def budget_points(rows, who, recipe):
    """[(steps, seconds, rows of the seeds)] of the student or the control, by budget."""
    found = arms(rows)
    points = []
    for steps in recipe.budgets:
        if of := found.get(f"{recipe.prefix}{who} {steps} steps"):
            points.append((steps, steps * recipe.seconds[who], of))
    return points


def control_after(rows, seconds, recipe):
    """The control's mean loss after so many seconds: a straight line over log(seconds) between its budgets.
    None beyond them."""
    points = budget_points(rows, "control", recipe)
    times = [math.log(taken) for _, taken, _ in points]
    if not times or not times[0] <= math.log(seconds) <= times[-1]:
        return None
    return float(np.interp(math.log(seconds), times, [average(of) for _, _, of in points]))


def budgets_table(rows, recipe):
    """Student and control at equal tokens, and at equal seconds."""
    teacher = next(iter(rows.values()))["teacher_loss"]
    controls = {steps: of for steps, _, of in budget_points(rows, "control", recipe)}

    def share(student, control):
        return "" if control is None else f"{(control - student) / (control - teacher):.0%}"

    lines = []
    for steps, seconds, of in budget_points(rows, "student", recipe):
        at_equal_tokens = average(controls[steps]) if steps in controls else None
        at_equal_seconds = control_after(rows, seconds, recipe)
        lines.append({
            "tokens": f"{steps * recipe.tokens:,}", "seconds": f"{seconds:.0f}", "seeds": len(of),
            "student": spread(of),
            "control, equal tokens": spread(controls[steps]) if steps in controls else "",
            "closes": share(average(of), at_equal_tokens),
            "control, equal seconds": "" if at_equal_seconds is None else f"{at_equal_seconds:.3f}",
            "closes then": share(average(of), at_equal_seconds)})
    return format_table(lines)


def layers_table(rows):
    """All ways to take three layers, best after 100 steps first."""
    tried = [(name.split()[1].rstrip(","), row) for name, row in rows.items() if name.endswith(", 100 steps")]
    tried.sort(key=lambda pair: pair[1]["loss"])
    return format_table([{"layers": layers, "before": f"{row['before']:.3f}",
                          "after 100 steps": f"{row['loss']:.3f}"} for layers, row in tried])


TABLES = {
    "tuning": partial(tuning_table, prefix="tune "),
    "tuning_again": partial(tuning_table, prefix="again: "),
    "arms": arms_table,
    "first_arms": partial(arms_table, names=FIRST_ARMS, prefix=FIRST.prefix),
    "measures": measures_table,
    "budgets": partial(budgets_table, recipe=DEMO),
    "first_budgets": partial(budgets_table, recipe=FIRST),
    "layers": layers_table,
}


def fill(page, rows):
    """The text of the page, with each table between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    def one(found):
        name = found.group(1)
        if name not in TABLES:
            raise InputError(f"{PAGE} has a place for a table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- table: {name} -->\n{TABLES[name](rows)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", one, page, flags=re.DOTALL)


# ------------------------------------------------------------------------------------ pictures
def draw_budgets(rows):
    """Held-out loss over seconds of training, student and control; each budget is a run of its own."""
    figure = new_figure()
    axes = figure.subplots()
    for who, colour, label_at in (("student", BLUE, (0, -13)), ("control", PURPLE, (3, 6))):
        points = budget_points(rows, who, DEMO)
        seconds = [taken for _, taken, _ in points]
        axes.plot(seconds, [average(of) for _, _, of in points], "-", color=colour, label=who)
        for steps, taken, of in points:
            axes.plot([taken] * len(of), [row["loss"] for row in of], "o", color=colour, markersize=4)
            tokens = f"{steps * DEMO.tokens / 1000:,.0f}k"
            axes.annotate(tokens, (taken, average(of)), label_at, textcoords="offset points", color=colour,
                          fontsize=8, ha="right" if who == "student" else "left")

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


DIVERGENCES = {  # arm: its name in the picture
    "forward": "forward",
    "reverse": "reverse",
    "jsd": "jsd",
    "on-policy half": "forward,\non-policy",
}
MEASURES = {  # column of a row: its name in the picture
    "loss": "held-out loss",
    "kl": "KL(teacher || student)",
    "reverse_kl": "KL(student || teacher)",
    "teacher_nll_of_samples": "teacher's loss on\nthe student's texts",
    "distinct_3": "different 3-grams\nin these texts",
}


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


def parse_args(argv=None):
    return new_parser(__doc__, "python -m extras.atlas_page").parse_args(argv)


def main():
    parse_args()
    rows = finished()
    if not rows:
        raise InputError(f"{RESULTS} has no runs yet: python -m extras.atlas makes them")
    save(draw_budgets(rows), ROOT / "assets" / "atlas-budgets.png")
    save(draw_divergences(rows), ROOT / "assets" / "atlas-divergences.png")
    with replaced(PAGE) as file:
        file.write_text(fill(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    run_cli(main)
