"""Pictures of runs: how they learned, and what temperature does to one prediction.

    python -m extras.plot out                    its losses: out/loss.png
    python -m extras.plot out-a out-b out-c      compared: a picture, a table
    python -m extras.plot out --distribution     one next token at T = 1, 2, 4
    python -m extras.plot out --distribution "with open(path,"
    python -m extras.plot out --save assets/loss.png

Read in this order:
  draw_loss                         a run: losses of student, teacher (the bar to reach) and control
  draw_runs, compare                several runs: by step and by second, and a table of what sets them apart
  distributions, draw_distribution  the teacher at three temperatures; the student before and after, beside it
  read_columns, read_card, ...      where the numbers come from

Nothing of a run is changed. The README's other pictures are made by extras/figures.py. Only pictures need
matplotlib, so it stands in requirements-dev.txt.
"""
import argparse
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

from distill import first_student
from model import load
from support.card import formula
from support.cli import InputError, format_table, new_parser, run_cli, user_path
from support.files import replaced
from support.log import COLUMNS, read_held_out, read_log
from support.state import CHANGES_NOTHING, read_settings
from support.tokenizer import load_tokenizer

FORMATS = (".png", ".svg", ".pdf")
DEFAULT_PROMPT = "    if not isinstance(value,"  # a type follows, and there are many
RANKS = [*range(1, 11), 100, 1000]  # tokens shown: the teacher's ten likeliest, and two unlikely ones

# After Okabe and Ito: distinct for colour-blind readers too, and each readable on white and on a dark page.
GREY, BLUE, ORANGE, GREEN, PURPLE = "#7a818b", "#1f83c9", "#d55e00", "#009e73", "#b565a7"
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "text.color": GREY, "axes.labelcolor": GREY,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "grid.color": GREY, "grid.alpha": 0.25,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}

LINES = {  # column of log.csv, or what else there is: its name in the picture, its colour
    "loss": ("student's loss", GREY),
    "clm": ("student's CLM", BLUE),
    "teacher_clm": ("teacher's CLM,\nthe bar to reach", ORANGE),
    "held_out": ("student's CLM on\nheld-out text", BLUE),
    "control": ("control's CLM,\nwithout the teacher", PURPLE),
    "kl": ("student's KL\nto the teacher", GREEN),
}


# ------------------------------------------------------------------------------------ one run
def draw_loss(folder):
    """Axes with each loss of a run over its steps: pale as it was logged, and its running mean."""
    axes = new_figure().subplots()
    if read_settings(folder) is not None:
        axes.set_title(formula(argparse.Namespace(**settings_of(folder))), loc="left")

    curves = curves_of(folder)
    means = {name: running_mean(values) for name, (_, values) in curves.items()}
    for name, (steps, values) in curves.items():
        label, colour = LINES[name]
        if name == "held_out":  # few values, and each is a mean already
            axes.plot(steps, values, "o:", color=colour, linewidth=1, markersize=4, zorder=3, label=label)
            means[name] = values
            continue
        # Noise without antialiasing: with it, it would be half of the file.
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6, antialiased=False)
        axes.plot(steps, means[name], color=colour, linewidth=1.8, zorder=3, label=label)

    last_step = max(steps[-1] for steps, _ in curves.values())  # a control can have more than the student
    top = 1.15 * max(mean.max() for mean in means.values())
    axes.set(xlabel="steps", ylabel="nats per token", xlim=(0, last_step), ylim=(0, top))
    axes.grid(axis="y")

    # Instead of a legend, names at the ends of the lines, pushed apart where those meet.
    y = -math.inf
    for name in sorted(means, key=lambda name: means[name][-1]):
        label, colour = LINES[name]
        y = max(y + 0.1 * top, means[name][-1])
        axes.annotate(label, (1, y), (6, 0), ("axes fraction", "data"), "offset points", color=colour,
                      va="center")
    return axes


def curves_of(folder):
    """{key of LINES: (steps, values)} of a run: what it has, and what is not another line again."""
    log = read_columns(folder)
    curves = {name: (log["step"], log[name]) for name in LINES if name in log and log[name].any()}

    # With one term alone, the loss is that term times its weight, and T² if it is the KL.
    if is_multiple(log["loss"], log["kl"]) or is_multiple(log["loss"], log["clm"]):
        curves.pop("loss", None)

    steps, losses = held_out_of(folder, log)
    if losses:
        curves["held_out"] = np.array(steps), np.array(losses)

    if Path(folder, "control", "log.csv").exists():
        # Its steps can have more tokens: it stands where the student had read as many.
        control = read_columns(Path(folder, "control"))
        steps = np.cumsum(control["tokens"]) / log["tokens"].mean()
        curves["control"] = steps, control["clm"]
    return curves


def is_multiple(a, b):
    """Whether a is b times one number, but for the rounding of log.csv."""
    factor = a.sum() / b.sum() if b.any() else math.nan
    return np.allclose(a, factor * b, rtol=1e-4)


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
    """Two Axes, by step and by second of training, with two losses of each run on the text itself: a line on
    the text that it trained on, and marks on held-out text, those of --eval-interval and the card's."""
    figure = new_figure()
    both = figure.subplots(1, 2, sharey=True)
    looks = itertools.product(("-", "--", ":"), (BLUE, ORANGE, GREEN, PURPLE))

    for folder, (dashes, colour) in zip(folders, itertools.cycle(looks), strict=False):
        log = read_columns(folder)
        steps, losses = held_out_of(folder, log)
        final = read_card(folder).get("loss")
        for axes, x in zip(both, (log["step"], seconds_of(log)), strict=True):
            axes.plot(x, running_mean(log["clm"]), dashes, color=colour, linewidth=1.2, label=str(folder))
            axes.plot(np.interp(steps, log["step"], x), losses, "o", color=colour, markersize=4, zorder=3)
            if final:
                axes.plot(x[-1], float(final), "D", color=colour, markersize=6, clip_on=False, zorder=3)

    both[0].set(xlabel="steps", ylabel="student's CLM, nats per token")
    both[1].set(xlabel="seconds of training")
    for axes in both:
        axes.set_xlim(left=0)
        axes.grid()
    figure.suptitle("lines: training text, running mean;  dots: held-out text;  diamonds: at the end",
                    fontsize=10)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=min(4, len(folders)), frameon=False, labelcolor="linecolor")
    return both


def held_out_of(folder, log):
    """Steps of a run's log after which it was scored on held-out text, and the losses."""
    rows = [row for row in read_held_out(folder) if row["step"] <= log["step"][-1]]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def seconds_of(log):
    """Seconds of training until the end of each step."""
    return np.cumsum(log["tokens"] / log["tokens_per_second"])


def compare(folders):
    """A table of runs: the flags in which they differ, how long they took, where they ended."""
    settings = [read_settings(folder) or {} for folder in folders]
    values = {}  # of each flag, among the runs that have it: a run of another commit can have others
    for found in settings:
        for name in found.keys() - ({*CHANGES_NOTHING, "steps"} - {"eval_tokens"}):
            values.setdefault(name, set()).add(repr(found[name]))
    differ = [name for name in sorted(values) if len(values[name]) > 1]

    rows = []
    for folder, found in zip(folders, settings, strict=True):
        log = read_columns(folder)
        card = read_card(folder)
        rows.append({
            "run": str(folder),
            **{name: str(found.get(name, "-")) for name in differ},
            "steps": f"{log['step'][-1]:,.0f}",
            "seconds": f"{seconds_of(log)[-1]:,.0f}",
            "last CLM": f"{running_mean(log['clm'])[-1]:.4f}",
            "last KL": f"{running_mean(log['kl'])[-1]:.4f}" if log["kl"].any() else "-",
            **{f"held-out {name}": card.get(name, "-") for name in ("loss", "KL to teacher", "same top-1")},
        })
    return format_table(rows)


# ------------------------------------------------------------------------------------ one next token
@torch.no_grad()
def distributions(folder, prompt):
    """(tokens, {panel: {series: their probabilities after the prompt}}); the last is that of all others.

    A probability is softmax(logits / T), over the tokenizer's vocabulary as in the loss.
    """
    settings = settings_of(folder)
    tokenizer = load_tokenizer(folder)
    if settings["teacher"] == "none":
        raise InputError(f"{folder} is a run without a teacher: --distribution has nothing to draw")
    teacher = load(settings["teacher"])
    networks = (teacher, student_before(settings, teacher), load(folder))

    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]])  # (1, L)
    t, before, after = (network(ids[:, -network.context:])[0, -1, :tokenizer.vocab_size].double()
                        for network in networks)  # each (V,)
    ranks = [rank for rank in RANKS if rank < len(t)]
    shown = t.argsort(descending=True)[torch.tensor(ranks) - 1]

    def probabilities(logits, T=1):
        p = (logits / T).softmax(-1)[shown]
        return [*p.tolist(), 1 - p.sum().item()]

    names = []
    for rank, token in zip(ranks, shown, strict=True):
        place = f"{rank:,}th: " if rank > 10 else ""
        names.append(place + ascii(tokenizer.decode([token])))
    names.append(f"all {len(t) - len(ranks):,} others")
    return names, {
        "what temperature does": {
            "teacher, T = 1": probabilities(t), "T = 2": probabilities(t, 2), "T = 4": probabilities(t, 4)},
        "what distillation does": {
            "teacher, T = 1": probabilities(t), "student before": probabilities(before),
            "after": probabilities(after)},
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
        axes.legend(title=title, ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1),
                    labelcolor="linecolor", handletextpad=0.1, columnspacing=0.8)
        axes.set(xscale="log", xlabel="probability, log scale")
        axes.xaxis.set_major_formatter(lambda p, _: f"{100 * p:g}%")
        axes.axhline(len(tokens) - 1.5, color=GREY, linewidth=0.8)
        axes.grid()

    both[0].set_yticks(range(len(tokens)), tokens, family="monospace", parse_math=False)
    both[0].invert_yaxis()
    return both


def student_before(settings, teacher):
    """The student as it was before the first step."""
    args = argparse.Namespace(**settings)
    if args.student_layers:
        args.student_layers += ","  # a list, as args.json has it: "3" is layer 3, not three layers
    return first_student(args, teacher).eval()


# ------------------------------------------------------------------------------------ what lies in a run
def read_columns(folder):
    """log.csv -> {column: its values}, without the lines that are damaged; says how many those are."""
    path = Path(folder, "log.csv")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the folder of a run, such as out") from error

    rows = [row for row in read_log(path) if all(map(math.isfinite, row.values()))]
    if len(rows) < 2:
        raise InputError(f"{path}: steps so far: {len(rows)}; a line needs two")
    if damaged := max(0, len(lines) - 1 - len(rows)):  # one is the header
        print(f"note: {path}: {damaged} of {len(lines)} lines left out, which hold no step", file=sys.stderr)
    return {name: np.array([row[name] for row in rows]) for name in COLUMNS}


def settings_of(folder):
    """args.json, with all that is asked of it here."""
    path = Path(folder, "args.json")
    found = read_settings(folder)
    if found is None:
        raise InputError(f"{path}: {os.strerror(2)}; name the folder of a run, such as out")
    found = {"divergence": "forward", **found}  # what a run did that does not say

    numbers = ("temperature", "kd_weight", "clm_weight", "cos_weight", "seed")
    texts = ("teacher", "divergence", "student", "student_layers", "student_init")
    wrong = [name for name in numbers if type(found.get(name)) not in (int, float)]
    wrong += [name for name in texts if name not in found or not isinstance(found[name], str | None)]
    if wrong:
        raise InputError(f"{path} is damaged or not from distill.py: it has no {wrong[0]} that could be read")
    return found


def read_card(folder):
    """{column: text} of a run's row in the table of its README.md; {} where there is none. A control is in
    the table of the run that it belongs to."""
    folder = Path(folder).resolve()
    role = "control" if folder.name == "control" else "student"
    try:
        card = (folder.parent if role == "control" else folder) / "README.md"
        lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}

    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    header = next((row for row in rows if row[0] == "model"), [])
    values = next((row for row in rows if row[0] == role), [])
    found = dict(zip(header, values, strict=False))
    return {name: text for name, text in found.items() if is_number(text)}


def is_number(text):
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False


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
    """A file that is whole or not there; its name says in which format."""
    with replaced(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
    print(path)


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.plot [RUN ...] [options]")
    add = parser.add_argument_group("what is drawn").add_argument
    add("runs", nargs="*", type=user_path, default=["out"], metavar="RUN",
        help="folders that distill.py made (default: out); several are drawn into one picture, with a table")
    add("--distribution", nargs="?", const=DEFAULT_PROMPT, metavar="PROMPT",
        help=f"of one run, what may follow PROMPT (if you name none: {DEFAULT_PROMPT!r}); \\n in it is a "
             "line break; end it without a space, as most tokens begin with theirs. If the run's teacher is "
             "a folder, call this where distill.py was called")
    add = parser.add_argument_group("where to").add_argument
    add("--save", type=user_path, metavar="PATH",
        help="a .png, .svg or .pdf (default: loss.png, runs.png or distribution.png in the first run's "
             "folder)")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.distribution is not None and len(args.runs) > 1:
        raise InputError("--distribution is of one run: name one")
    name = "loss" if len(args.runs) == 1 else "runs"
    name = name if args.distribution is None else "distribution"
    path = Path(args.save or Path(args.runs[0], f"{name}.png"))
    if path.suffix not in FORMATS:
        raise InputError(f"--save {path}: its name must end in {', '.join(FORMATS)}")

    if name == "loss":
        figure = draw_loss(args.runs[0]).figure
    elif name == "runs":
        print(compare(args.runs) + "\n")
        figure = draw_runs(args.runs)[0].figure
    else:
        figure = draw_distribution(args.runs[0], args.distribution.replace("\\n", "\n"))[0].figure
    save(figure, path)


if __name__ == "__main__":
    run_cli(main)
