"""Pictures of runs: how they learned.

    python -m extras.plot out                  its losses: out/loss.png
    python -m extras.plot out-a out-b out-c    compared: tables, out-a/runs.png

Read in this order:
  draw_loss           one run: losses of student, teacher (the bar to reach) and control
  draw_runs, compare  several runs: by step and by second, and a table of what sets them apart
  verdicts            several seeds: which student is better, or that the seeds cannot tell
  read_run            where the numbers come from

Runs are only read. The README's other pictures come from extras/figures.py. Nothing but pictures needs
matplotlib, so it is listed in requirements-dev.txt.
"""
if not __package__:  # started as a file, from which Python does not find the rest of the project
    raise SystemExit("error: run this from the project's folder, as `python -m extras.plot`")

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.cli import InputError, format_table, new_parser, reading, run_cli, user_path
from support.files import replaced
from support.run import CHANGES_NOTHING, COLUMNS, read_held_out, read_log, read_settings

# After Okabe and Ito: colour-blind readers can tell them apart, and all can be read on white and on black.
GREY, BLUE, ORANGE, GREEN, PURPLE = "#7a818b", "#1f83c9", "#d55e00", "#009e73", "#b565a7"
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "text.color": GREY, "axes.labelcolor": GREY,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "grid.color": GREY, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "legend.frameon": False,
    "legend.labelcolor": "linecolor"}

LINES = {  # column of log.csv, or "control": the name of its line in the picture, its colour
    "loss": ("student's loss", GREY),
    "clm": ("student's CLM", BLUE),
    "teacher_clm": ("teacher's CLM,\nthe bar to reach", ORANGE),
    "control": ("control's CLM,\nwithout the teacher", PURPLE),
    "kl": ("student's KL\nto the teacher", GREEN),
}
ROLES = {"student": BLUE, "control": PURPLE, "teacher": ORANGE}


# ------------------------------------------------------------------------------------ what a run has left
class Run(NamedTuple):
    folder: str
    settings: dict  # args.json
    log: dict  # {column of log.csv: an array}, and "seconds", the time spent training so far
    held_out: np.ndarray  # (n, 2): step, loss on held-out text
    results: dict  # {role: {name: number}} of results.json; {} if the run has not finished


def read_run(folder):
    rows = read_log(Path(folder, "log.csv"))
    if len(rows) < 2:
        raise InputError(f"{Path(folder, 'log.csv')}: steps so far: {len(rows)}; a line needs two. Name the "
                         "folder of a run, such as out")
    log = {name: np.array([row[name] for row in rows]) for name in COLUMNS}
    log["seconds"] = np.cumsum(log["tokens"] / log["tokens_per_second"])
    held_out = [(row["step"], row["loss"]) for row in read_held_out(folder)
                if row["step"] <= rows[-1]["step"]]  # a kill can leave later ones
    return Run(folder, read_settings(folder), log, np.reshape(held_out, (-1, 2)), read_results(folder))


def read_results(folder):
    path = Path(folder, "results.json")
    if not path.exists():
        return {}
    with reading(path, "the results of a run"):
        rows = json.loads(path.read_bytes())["rows"]
        # Figures of a model that diverged are null.
        return {role: {name: value for name, value in row.items() if isinstance(value, (int, float))}
                for role, row in rows.items()}


# ------------------------------------------------------------------------------------ one run
def draw_loss(folder):
    """Axes with the losses of a run: lines on the training text, dots on held-out text."""
    run = read_run(folder)
    axes = new_figure().subplots()
    axes.set_title(run.settings.get("objective", ""), loc="left", parse_math=False)

    curves, held_out = curves_of(run)
    means = {name: running_mean(values) for name, (_, values) in curves.items()}
    for name, (steps, values) in curves.items():
        label, colour = LINES[name]
        # Noise is drawn without antialiasing, which would double the size of the file.
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6, antialiased=False)
        axes.plot(steps, means[name], color=colour, linewidth=1.8, zorder=3, label=label)

    dots = {"linewidth": 1, "markersize": 5, "markeredgecolor": "white"}
    for role, points in held_out.items():
        axes.plot(*zip(*points, strict=True), "o:", color=ROLES[role], zorder=4, clip_on=False,
                  label=f"{role}, held-out text", **dots)

    shown = [*means.values(), *([loss for _, loss in points] for points in held_out.values())]
    top = 1.15 * max(map(max, shown))
    axes.margins(x=0)
    axes.set(xlabel="steps", xlim=(0, None), ylim=(0, top), ylabel="nats per token on the training text")
    axes.grid(axis="y")

    if held_out:
        training, = axes.plot([], [], color=GREY, linewidth=1.8)
        dot, = axes.plot([], [], "o:", color=GREY, **dots)
        axes.legend([training, dot], ["training text, running mean", "the CLM on held-out text"],
                    loc="upper right")

    # The names of the lines, pushed apart where their ends meet.
    y = -math.inf
    for name in sorted(means, key=lambda name: means[name][-1]):
        y = max(y + 0.1 * top, means[name][-1])
        name_line(axes, LINES[name][0], y, LINES[name][1])
    return axes


def name_line(axes, name, y, colour):
    """Write the name of a line beside its right end."""
    axes.annotate(name, (1, y), (6, 0), ("axes fraction", "data"), "offset points", color=colour, va="center")


def curves_of(run):
    """({key of LINES: (steps, values)} on the training text, {role: [(step, loss)]} on held-out text)."""
    log = run.log
    curves = {name: (log["step"], log[name]) for name in LINES if name in log and log[name].any()}
    held_out = {"student": run.held_out}

    # If only one term has a weight, the loss is that term times a number: the same line twice.
    for term in [name for name in ("kl", "clm") if name in curves]:
        factor = log["loss"].sum() / log[term].sum()
        if np.allclose(log["loss"], factor * log[term], rtol=1e-4):  # but for the rounding of log.csv
            curves.pop("loss", None)

    if Path(run.folder, "control", "log.csv").exists():
        # Its steps can have more tokens: it is drawn where the student had read the same number.
        control = read_run(Path(run.folder, "control"))
        longer = control.log["tokens"].mean() / log["tokens"].mean()
        curves["control"] = longer * control.log["step"], control.log["clm"]
        held_out["control"] = control.held_out * (longer, 1)

    # The last points are in results.json. The teacher does not learn, so it has no others.
    for role in ROLES:
        if "loss" in run.results.get(role, {}):
            last = curves.get(role, curves["clm"])[0][-1]  # only a control has steps of its own
            before = [point for point in held_out.get(role, ()) if point[0] < last]
            held_out[role] = [*before, (last, run.results[role]["loss"])]
    return curves, {role: points for role, points in held_out.items() if len(points)}


def running_mean(values):
    """The mean of each value and its neighbours, a twentieth of all; near both ends there are fewer."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


# ------------------------------------------------------------------------------------ several runs
def draw_runs(runs):
    """Two Axes, by step and by second of training, with the CLM of each run.

    A line is its training text, dots are held-out text, and a diamond is its last figure on held-out text.
    Lines start after a tenth of the steps: beside the high losses before that, runs look alike.
    """
    figure = new_figure()
    both = figure.subplots(1, 2, sharey=True)
    looks = itertools.cycle(itertools.product(("-", "--", ":"), (BLUE, ORANGE, GREEN, PURPLE)))

    lines = []
    for run, (dashes, colour) in zip(runs, looks, strict=False):
        steps = run.log["step"]
        start = len(steps) // 10
        held_out, losses = run.held_out[run.held_out[:, 0] >= steps[start]].T
        for axes, x in zip(both, (steps, run.log["seconds"]), strict=True):
            line, = axes.plot(x[start:], running_mean(run.log["clm"])[start:], dashes, color=colour,
                              linewidth=1.2)
            axes.plot(np.interp(held_out, steps, x), losses, "o", color=colour, markersize=4, zorder=3)
            axes.plot(x[-1], run.results.get("student", {}).get("loss", math.nan), "D", color=colour,
                      markersize=6, clip_on=False, zorder=3)
        lines.append(line)

    both[0].set(xlabel="steps", ylabel="student's CLM, nats per token")
    both[1].set(xlabel="seconds of training")
    for axes in both:
        axes.set_xlim(left=0)
        axes.grid()
    figure.suptitle("lines: training text, running mean;  dots: held-out text;  diamonds: at the end",
                    fontsize=10)

    # Names are set afterwards: matplotlib would leave out those with an underscore at their start, and would
    # take what is between two dollar signs for a formula.
    legend = figure.legend(lines, ["run"] * len(lines), loc="outside lower center", ncols=min(4, len(runs)))
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set(text=run.folder, parse_math=False)
    return both


ABOUT_RUNS = "last CLM: a mean, on the training text. KL to teacher: at T = 1."


def compare(runs):
    """A table with a column for each run: flags that differ, how long it took, where it ended."""
    # Names that are no flags say what is behind the names of text and teacher.
    differ = [name for name in what_differs(runs, {"steps", "objective"}) if name.isidentifier()]
    columns = {}
    for run in runs:
        result = run.results.get("student", {})
        columns[run.folder] = {
            **{name: str(run.settings.get(name, "-")) for name in differ},
            "steps": f"{run.log['step'][-1]:,.0f}",
            "seconds": f"{run.log['seconds'][-1]:,.0f}",
            "last CLM": f"{running_mean(run.log['clm'])[-1]:.4f}",
            **{f"held-out {name}": f"{result[name]:.4f}" if name in result else "-"
               for name in ("loss", "KL to teacher", "same top-1")},
        }
    names = columns[runs[0].folder]
    rows = [{"run": name} | {folder: column[name] for folder, column in columns.items()} for name in names]
    return f"{format_table(rows)}\n{ABOUT_RUNS}"


def what_differs(runs, ignored):
    """The settings that have several values, sorted, among the runs that have them: a run of another commit
    can have other flags."""
    values = {}
    for run in runs:
        for name in run.settings.keys() - (CHANGES_NOTHING | ignored) | run.settings.keys() & {"eval_tokens"}:
            values.setdefault(name, set()).add(repr(run.settings[name]))
    return [name for name in sorted(values) if len(values[name]) > 1]


ABOUT_VERDICTS = ("On held-out text; ± is 2 standard deviations over seeds. BETTER and WORSE need\n"
                  "3 seeds and a larger difference than that.")
ONE_SEED = ("one seed each, or none in common: differences that another seed could make\n"
            "(about 0.01 in the demo) mean nothing")


def verdicts(runs):
    """A table that says BETTER, WORSE or CANNOT TELL, or a line if no pair of runs has two seeds in common.

    Runs that differ in nothing but the seed are a group. In each group the student is compared with its
    control, and each group with the first. A seed sets the order of the text, so both have the same luck:
    what counts is the difference for each seed, and how much it varies from seed to seed.
    """
    differ = what_differs(runs, {"seed", "learning rates"})  # the rates follow from flags
    if len(differ) > 1 and "objective" in differ:  # it follows from flags, unless plain_loss was edited
        differ.remove("objective")

    groups = {}  # name -> {role: {seed: loss on held-out text}}
    for run in runs:
        name = ", ".join(str(run.settings.get(flag)) for flag in differ) or "student"
        losses = groups.setdefault(name, {"student": {}, "control": {}})
        for role, result in run.results.items():
            if role in losses and "loss" in result:
                losses[role][run.settings.get("seed")] = result["loss"]

    (first, baseline), *others = groups.items()
    pairs = {f"{name} against its control": (losses["student"], losses["control"])
             for name, losses in groups.items()}
    pairs |= {f"{name} against {first}": (losses["student"], baseline["student"]) for name, losses in others}

    rows = []
    for pair, (losses, reference) in pairs.items():
        differences = [losses[seed] - reference[seed] for seed in losses.keys() & reference.keys()]
        if len(differences) > 1:
            mean = statistics.fmean(differences)
            noise = 2 * statistics.stdev(differences)
            is_clear = len(differences) > 2 and abs(mean) > noise  # with two, chance passes in one of five
            rows.append({", ".join(differ): pair, "seeds": len(differences),
                         "loss minus the other's": f"{mean:+.4f} ± {noise:.4f}",
                         "verdict": ("BETTER" if mean < 0 else "WORSE") if is_clear else "CANNOT TELL"})
    return f"{format_table(rows)}\n{ABOUT_VERDICTS}" if rows else ONE_SEED


# ------------------------------------------------------------------------------------ from flags to a file
def new_figure(height=4.5):
    """An empty figure in STYLE, whatever the user's own settings of matplotlib are."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: it needs no screen
    except ImportError as error:
        raise InputError("pictures need matplotlib: python -m pip install -r requirements-dev.txt") from error
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(8, height), dpi=150, layout="constrained")


def save(figure, path):
    """Write a picture; the name of the file says in which format. A failure leaves the old file as it was."""
    with replaced(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    print(path)


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.plot [RUN ...]")
    parser.add_argument("runs", nargs="*", type=user_path, default=["out"], metavar="RUN",
                        help="folders that distill.py made (default: out); several are drawn into one "
                             "picture, with a table, and with a verdict if there are three seeds of each")
    return parser.parse_args(argv)


def main():
    folders = parse_args().runs
    if len(folders) == 1:
        save(draw_loss(folders[0]).figure, Path(folders[0], "loss.png"))
        return
    runs = [read_run(folder) for folder in folders]
    print(f"{compare(runs)}\n\n{verdicts(runs)}\n")
    save(draw_runs(runs)[0].figure, Path(folders[0], "runs.png"))


if __name__ == "__main__":
    run_cli(main)
