"""Pictures of runs: how they learned, and what temperature does to one prediction.

    python -m extras.plot out                    its losses: out/loss.png
    python -m extras.plot out-a out-b out-c      compared: a picture, a table
    python -m extras.plot out --distribution     one next token at T = 1, 2, 4
    python -m extras.plot out --distribution "with open(path,"
    python -m extras.plot out --save assets/loss.png

Read in this order:
  draw_loss                         one run: losses of student, teacher (the bar to reach) and control
  draw_runs, compare                several runs: by step and by second, and a table of what sets them apart
  verdicts                          several seeds: which student is better, or that the seeds cannot tell
  distributions, draw_distribution  the teacher at three temperatures; the student before and after
  read_columns, read_results        where the numbers come from

Runs are only read. The README's other pictures come from extras/figures.py. Nothing but pictures needs
matplotlib, so it is listed in requirements-dev.txt.
"""
if not __package__:  # started as a file, from which Python does not find the rest of the project
    raise SystemExit("error: run this from the project's folder, as `python -m extras.plot`")

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

from data import load_tokenizer
from distill import first_student
from model import load
from support.cli import (
    InputError,
    checked,
    format_table,
    lookalike,
    new_parser,
    reading,
    run_cli,
    user_path,
)
from support.files import replaced
from support.run import CHANGES_NOTHING, COLUMNS, read_held_out, read_log, read_settings

DEFAULT_PROMPT = "    if not isinstance(value,"  # a type follows, and there are many
RANKS = [*range(1, 11), 100, 1000]  # tokens shown: the teacher's ten likeliest, and two unlikely ones

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


# ------------------------------------------------------------------------------------ one run
def draw_loss(folder):
    """Axes with the losses of a run: lines on the training text, dots on held-out text."""
    axes = new_figure().subplots()
    axes.set_title(read_settings(folder).get("objective", ""), loc="left", parse_math=False)

    curves = curves_of(folder)
    means = {name: running_mean(values) for name, (_, values) in curves.items()}
    for name, (steps, values) in curves.items():
        label, colour = LINES[name]
        # Noise is drawn without antialiasing, which would double the size of the file.
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6, antialiased=False)
        axes.plot(steps, means[name], color=colour, linewidth=1.8, zorder=3, label=label)

    held_out = held_out_points(folder, curves)
    for role, points in held_out.items():
        axes.plot(*zip(*points, strict=True), "o:", color=ROLES[role], linewidth=1, markersize=5, zorder=4,
                  markeredgecolor="white", clip_on=False, label=f"{role}, held-out text")

    shown = [*means.values(), *([loss for _, loss in points] for points in held_out.values())]
    top = 1.15 * max(map(max, shown))
    axes.margins(x=0)
    axes.set(xlabel="steps", xlim=(0, None), ylim=(0, top), ylabel="nats per token on the training text")
    axes.grid(axis="y")

    if held_out:
        training, = axes.plot([], [], color=GREY, linewidth=1.8)
        dot, = axes.plot([], [], "o:", color=GREY, linewidth=1, markersize=5, markeredgecolor="white")
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


def curves_of(folder):
    """{key of LINES: (steps, values)} of a run: what it has, and what is not the same line twice."""
    log = read_columns(folder)
    curves = {name: (log["step"], log[name]) for name in LINES if name in log and log[name].any()}

    # If only one term has a weight, the loss is that term times its weight, and T² if it is the KL.
    if is_multiple(log["loss"], log["kl"]) or is_multiple(log["loss"], log["clm"]):
        curves.pop("loss", None)

    if Path(folder, "control", "log.csv").exists():
        # Its steps can have more tokens: it is drawn where the student had read the same number.
        control = read_columns(Path(folder, "control"))
        steps = np.cumsum(control["tokens"]) / log["tokens"].mean()
        curves["control"] = steps, control["clm"]
    return curves


def is_multiple(a, b):
    """Whether a is b times one number, but for the rounding of log.csv."""
    factor = a.sum() / b.sum() if b.any() else math.nan
    return np.allclose(a, factor * b, rtol=1e-4)


def held_out_points(folder, curves):
    """{role: pairs (step, loss)} on held-out text: those of --eval-interval, and the last from results.json.

    The teacher does not learn, so it has one point, at the end.
    """
    results = read_results(folder)
    points = {}
    for role in ROLES:
        steps, _ = curves.get(role, curves["clm"])  # only a control has steps of its own
        found = []
        if role != "teacher":
            found = held_out(Path(folder, "control" if role == "control" else ""), steps).tolist()
        if "loss" in results.get(role, {}):
            found = [point for point in found if point[0] < steps[-1]]
            found.append((steps[-1], results[role]["loss"]))
        if found:
            points[role] = found
    return points


def held_out(folder, x):
    """The losses of --eval-interval, as pairs (x, loss). x: the place of each step of log.csv."""
    steps = [row["step"] for row in read_log(Path(folder, "log.csv"))]
    found = [(np.interp(row["step"], [0, *steps], [0, *x]), row["loss"]) for row in read_held_out(folder)
             if steps and row["step"] <= steps[-1]]  # a kill can leave later ones
    return np.reshape(found, (-1, 2))


def running_mean(values):
    """The mean of each value and its neighbours, a twentieth of all; near both ends there are fewer."""
    half = len(values) // 40
    sums = np.cumsum([0, *values])
    i = np.arange(len(values))
    first = np.maximum(i - half, 0)
    last = np.minimum(i + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


# ------------------------------------------------------------------------------------ several runs
def draw_runs(folders):
    """Two Axes, by step and by second of training, with the CLM of each run.

    A line is its training text, dots are held-out text, and a diamond is its last figure on held-out text.
    Shown is the range after a tenth of the steps: with the high losses before that, runs look alike.
    """
    figure = new_figure()
    both = figure.subplots(1, 2, sharey=True)
    looks = itertools.cycle(itertools.product(("-", "--", ":"), (BLUE, ORANGE, GREEN, PURPLE)))

    lines = []
    in_range = []
    for folder, (dashes, colour) in zip(folders, looks, strict=False):
        log = read_columns(folder)
        result = read_results(folder).get("student", {})
        start = len(log["step"]) // 10
        in_range += [*running_mean(log["clm"])[start:], *([result["loss"]] if "loss" in result else [])]
        in_range += [loss for step, loss in held_out(folder, log["step"]) if step >= log["step"][start]]
        for axes, x in zip(both, (log["step"], log["seconds"]), strict=True):
            line, = axes.plot(x, running_mean(log["clm"]), dashes, color=colour, linewidth=1.2)
            axes.plot(*held_out(folder, x).T, "o", color=colour, markersize=4, zorder=3)
            if "loss" in result:
                axes.plot(x[-1], result["loss"], "D", color=colour, markersize=6, clip_on=False, zorder=3)
        lines.append(line)

    margin = 0.05 * np.ptp(in_range) + 0.001
    both[0].set(xlabel="steps", ylabel="student's CLM, nats per token",
                ylim=(min(in_range) - margin, max(in_range) + margin))
    both[1].set(xlabel="seconds of training")
    for axes in both:
        axes.set_xlim(left=0)
        axes.grid()
    figure.suptitle("lines: training text, running mean;  dots: held-out text;  diamonds: at the end",
                    fontsize=10)

    # Names are set afterwards: matplotlib would leave out those with an underscore at their start, and would
    # take what is between two dollar signs for a formula.
    legend = figure.legend(lines, ["run"] * len(lines), loc="outside lower center",
                           ncols=min(4, len(folders)))
    for text, folder in zip(legend.get_texts(), folders, strict=True):
        text.set(text=str(folder), parse_math=False)
    return both


ABOUT_RUNS = "last: mean over the last steps, on the training text. KL to teacher: at T = 1."


def compare(folders):
    """A table with a column for each run: flags in which they differ, how long they took, where they ended.

    The KL of the training text is at the run's own T, so it is left out if T differs.
    """
    settings = [read_settings(folder) for folder in folders]
    # Names that are no flags say what is behind the names of text and teacher.
    differ = [name for name in what_differs(settings, {"steps", "objective"}) if name.isidentifier()]

    columns = {}
    for folder, found in zip(folders, settings, strict=True):
        log = read_columns(folder)
        result = read_results(folder).get("student", {})
        columns[str(folder)] = {
            **{name: str(found.get(name, "-")) for name in differ},
            "steps": f"{log['step'][-1]:,.0f}",
            "seconds": f"{log['seconds'][-1]:,.0f}",
            "last CLM": f"{running_mean(log['clm'])[-1]:.4f}",
            "last KL": f"{running_mean(log['kl'])[-1]:.4f}" if log["kl"].any() else "-",
            **{f"held-out {name}": f"{result[name]:.4f}" if name in result else "-"
               for name in ("loss", "KL to teacher", "same top-1")},
        }
    names = [name for name in columns[str(folder)] if name != "last KL" or "temperature" not in differ]
    rows = [{"run": name} | {run: column[name] for run, column in columns.items()} for name in names]
    return f"{format_table(rows)}\n{ABOUT_RUNS}"


def what_differs(settings, ignored):
    """The settings that have several values, sorted, among the runs that have them: a run of another commit
    can have other flags."""
    values = {}
    for found in settings:
        for name in found.keys() - (CHANGES_NOTHING | ignored) | found.keys() & {"eval_tokens"}:
            values.setdefault(name, set()).add(repr(found[name]))
    return [name for name in sorted(values) if len(values[name]) > 1]


ABOUT_VERDICTS = ("On held-out text; ± is 2 standard deviations over seeds. BETTER and WORSE need\n"
                  "3 seeds and a larger difference than that.")
ONE_SEED = ("one seed each, or none in common: differences that another seed could make\n"
            "(about 0.01 in the demo) mean nothing")


def verdicts(folders):
    """A table that says BETTER, WORSE or CANNOT TELL, or a line if no pair of runs has two seeds in common.

    Runs that differ in nothing but the seed are a group. In each group the student is compared with its
    control, and each group with the first. A seed sets the order of the text, so both have the same luck:
    what counts is the difference for each seed, and how much it varies from seed to seed.
    """
    settings = [read_settings(folder) for folder in folders]
    differ = what_differs(settings, {"seed", "learning rates"})  # the rates follow from flags
    if len(differ) > 1 and "objective" in differ:  # it follows from flags, unless plain_loss was edited
        differ.remove("objective")

    groups = {}  # name -> {role: {seed: loss on held-out text}}
    for folder, found in zip(folders, settings, strict=True):
        name = ", ".join(str(found.get(flag)) for flag in differ) or "student"
        losses = groups.setdefault(name, {"student": {}, "control": {}})
        for role, result in read_results(folder).items():
            if role in losses and "loss" in result:
                losses[role][found.get("seed")] = result["loss"]

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


# ------------------------------------------------------------------------------------ one next token
@torch.no_grad()
def distributions(folder, prompt):
    """(tokens, {panel: {series: their probabilities after the prompt}}); the last is that of all others.

    A probability is softmax(logits / T), over the tokenizer's vocabulary as in the loss.
    """
    networks = models_of(folder)
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]])  # (1, L)
    t, before, after = (network(ids[:, -network.context:])[0, -1, :tokenizer.vocab_size].double()
                        for network in networks)  # each (V,)
    ranks = [rank for rank in RANKS if rank < len(t)]
    shown = t.argsort(descending=True)[torch.tensor(ranks) - 1]

    names = [(f"{rank:,}th: " if rank > 10 else "") + ascii(tokenizer.decode([token]))
             for rank, token in zip(ranks, shown, strict=True)]
    names.append(f"all {len(t) - len(ranks):,} others")

    def probabilities(logits):
        chosen = {name: z.softmax(-1)[shown] for name, z in logits.items()}
        return {name: [*p.tolist(), 1 - p.sum().item()] for name, p in chosen.items()}

    first = {"teacher, T = 1": t}
    return names, {
        "what temperature does": probabilities(first | {"T = 2": t / 2, "T = 4": t / 4}),
        "what distillation does": probabilities(first | {"student before": before, "after": after}),
    }


def draw_distribution(folder, prompt):
    """Two Axes, a row for each token: the teacher at three temperatures; the student before and after."""
    figure = new_figure()
    tokens, panels = distributions(folder, prompt)
    figure.suptitle(f"next token after  {ascii(prompt[-60:])}", fontsize=10, parse_math=False)
    both = figure.subplots(1, 2, sharex=True, sharey=True)

    # Points alone: between two tokens there is nothing, so no line leads from one to the next.
    markers = (("o", 8, "none"), ("s", 5, "full"), ("D", 5, "full"))
    colours = ((BLUE, PURPLE, ORANGE), (BLUE, GREY, GREEN))
    for axes, (title, series), three in zip(both, panels.items(), colours, strict=True):
        for (name, p), (marker, size, fill), colour in zip(series.items(), markers, three, strict=True):
            axes.plot(p, range(len(p)), marker, color=colour, markersize=size, fillstyle=fill, label=name)
        axes.legend(title=title, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), handletextpad=0.1,
                    columnspacing=0.8)
        axes.set(xscale="log", xlabel="probability, log scale")
        axes.xaxis.set_major_formatter(lambda p, _: f"{100 * p:g}%")
        axes.axhline(len(tokens) - 1.5, color=GREY, linewidth=0.8)
        axes.grid()

    both[0].set_yticks(range(len(tokens)), tokens, family="monospace", parse_math=False)
    both[0].invert_yaxis()
    return both


# ------------------------------------------------------------------------------------ what a run has left
def read_columns(folder):
    """log.csv -> {column: its values}, without lines that are damaged, and the seconds of training so far."""
    path = Path(folder, "log.csv")
    rows = read_log(path)
    if len(rows) < 2:
        raise InputError(f"{path}: steps so far: {len(rows)}; a line needs two. Name the folder of a run, "
                         "such as out")
    log = {name: np.array([row[name] for row in rows]) for name in COLUMNS}
    log["seconds"] = np.cumsum(log["tokens"] / log["tokens_per_second"])
    return log


def read_results(folder):
    """{role: its figures} of results.json, in which those that are not finite are null; {} for a run that
    has not finished. In the folder of a control, the control is the student."""
    folder = Path(folder).resolve()
    if folder.name == "control":
        return {"student": read_results(folder.parent).get("control", {})}
    path = folder / "results.json"
    if not path.exists():
        return {}
    with reading(path, "the results of a run"):
        rows = json.loads(path.read_bytes())["rows"]
        return {role: {name: value for name, value in row.items() if isinstance(value, (int, float))}
                for role, row in rows.items()}


def models_of(folder):
    """The teacher of a run, its student before the first step, and the student that it has saved."""
    path = Path(folder, "args.json")
    settings = read_settings(folder)
    if not settings or settings["teacher"] == "none":
        raise InputError(f"{path}: there are no settings of a run with a teacher; name the folder of such a "
                         "run, such as out")
    teacher = load(settings["teacher"])
    with reading(path, "the settings of a run"):
        args = argparse.Namespace(**settings)
        if args.student_layers:
            args.student_layers += ","  # a list, as args.json has it: "3" is layer 3, not three layers
        before = first_student(args, teacher).eval()
    return teacher, before, load(folder)


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
    parser = new_parser(__doc__, "python -m extras.plot [RUN ...] [options]")
    add = parser.add_argument_group("what is drawn").add_argument
    add("runs", nargs="*", type=user_path, default=["out"], metavar="RUN",
        help="folders that distill.py made (default: out); several are drawn into one picture, with a table; "
             "if there are three seeds of each, also with a verdict")
    add("--distribution", nargs="?", const=DEFAULT_PROMPT, metavar="PROMPT",
        help=f"of one run, what may follow PROMPT (if you name none: {DEFAULT_PROMPT.strip()!r} after four "
             "spaces); \\n in it is a line break; end it without a space, as most tokens begin with one. If "
             "the run's teacher is a folder, call this where you called distill.py")
    add = parser.add_argument_group("where to").add_argument
    add("--save", type=checked(user_path, "a name that ends in .png, .svg or .pdf",
                               lambda path: Path(path).suffix in (".png", ".svg", ".pdf")), metavar="PATH",
        help="the file (default: loss.png, runs.png or distribution.png in the first run's folder)")
    args = parser.parse_args(argv)
    if args.distribution is not None and len(args.runs) > 1:
        raise InputError("--distribution draws one run: name only one")
    return args


def main():
    args = parse_args()
    first = args.runs[0]
    for folder in args.runs:
        if not Path(folder).is_dir():
            near = lookalike(folder)
            raise InputError(f"there is no folder {folder}" + (f"; did you mean {near}?" if near else ""))
    if args.distribution is not None:
        name = "distribution"
        axes, _ = draw_distribution(first, args.distribution.replace("\\n", "\n"))
    elif len(args.runs) > 1:
        name = "runs"
        print(f"{compare(args.runs)}\n\n{verdicts(args.runs)}\n")
        axes, _ = draw_runs(args.runs)
    else:
        name = "loss"
        axes = draw_loss(first)
    save(axes.figure, args.save or Path(first, f"{name}.png"))


if __name__ == "__main__":
    run_cli(main)
