"""Two pictures of a run: how it learned, and what its temperature does to one prediction.

    python plot.py out                                   out/loss.png: every step of out/log.csv
    python plot.py out --distribution                    out/distribution.png: one next token at T = 1, 2, 4
    python plot.py out --distribution "with open(path,"  ... after a prompt of your own
    python plot.py out --save assets/loss.png            into another file (.png, .svg or .pdf)

The README's pictures are the first two, after `python distill.py`, with `--save assets/loss.png` and
`--save assets/distribution.png`. The same run gives the same picture.

Read in this order:
  draw_loss                         the student's losses, the teacher's as the bar to reach, the control's
  distributions, draw_distribution  the teacher at three temperatures; the student before and after, beside it
  read_log, student_before          where the numbers come from
matplotlib is needed here and nowhere else, so only requirements-dev.txt has it.
"""
import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

import distill
import model as models
from data import InputError, load_tokenizer, replaced, run_cli
from run import formula

DEFAULT_PROMPT = "    if not isinstance(value,"  # a type follows, and there are many
RANKS = [*range(1, 11), 100, 1000]  # tokens shown: the teacher's ten likeliest, and two unlikely ones

# After Okabe and Ito: distinct for colour-blind readers too, and each readable on white and on a dark page.
GREY, BLUE, ORANGE, GREEN, PURPLE = "#7a818b", "#1f83c9", "#d55e00", "#009e73", "#b565a7"
STYLE = {"figure.facecolor": "none", "axes.facecolor": "none", "text.color": GREY, "axes.labelcolor": GREY,
         "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "grid.color": GREY,
         "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10}

LINES = {  # column of log.csv: its name in the picture, its colour
    "loss": ("student's loss", GREY),
    "clm": ("student's CLM", BLUE),
    "teacher_clm": ("teacher's CLM,\nthe bar to reach", ORANGE),
    "control": ("control's CLM,\nwithout the teacher", PURPLE),
    "kl": ("student's KL\nto the teacher", GREEN)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("run", nargs="?", default="out", help="the --out of distill.py (default: out); if its teacher is a "
        "folder, draw --distribution where distill.py was called")
    add("--distribution", nargs="?", const=DEFAULT_PROMPT, metavar="PROMPT",
        help=f"draw what may follow PROMPT (if you name none: {DEFAULT_PROMPT!r}); \\n in it is a line "
             "break; end it without a space, as most tokens begin with theirs")
    add("--save", metavar="PATH", help="where to (default: loss.png or distribution.png in the run's folder)")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------ the losses of a run
def draw_loss(folder):
    """Axes with each loss of a run over its steps: pale as it was logged, and its running mean."""
    axes, log = new_figure().subplots(), read_log(Path(folder, "log.csv"))
    if Path(folder, "args.json").exists():
        axes.set_title(formula(argparse.Namespace(**read_settings(folder))), loc="left")
    curves = {name: (log["step"], log[name]) for name in LINES if name in log and log[name].any()}
    if Path(folder, "control", "log.csv").exists():
        control = read_log(Path(folder, "control", "log.csv"))
        curves["control"] = control["step"], control["clm"]
    means = {name: running_mean(values) for name, (_, values) in curves.items()}
    for name, (steps, values) in curves.items():
        label, colour = LINES[name]  # noise without antialiasing makes half the file
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.6, antialiased=False)
        axes.plot(steps, means[name], color=colour, linewidth=1.8, zorder=3, label=label)
    axes.set(xlabel="steps", ylabel="nats per token", xlim=(0, log["step"][-1]),
             ylim=(0, 1.15 * max(mean.max() for mean in means.values())))
    axes.grid(axis="y")
    y, apart = -math.inf, 0.1 * axes.get_ylim()[1]
    for name in sorted(means, key=lambda name: means[name][-1]):  # instead of a legend, names at the ends
        y = max(y + apart, means[name][-1])
        axes.annotate(LINES[name][0], (1, y), (6, 0), ("axes fraction", "data"), "offset points",
                      color=LINES[name][1], va="center")
    return axes


def running_mean(values):
    """The mean of each value and its neighbours, a twentieth of all; near both ends there are fewer."""
    half, sums, i = len(values) // 40, np.cumsum([0, *values]), np.arange(len(values))
    first, last = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


# ------------------------------------------------------------------------------------ one next token
@torch.no_grad()
def distributions(folder, prompt):
    """(tokens, {panel: {series: their probabilities after the prompt}}); the last is that of all others.

    A probability is softmax(logits / T), over the tokenizer's vocabulary as in the loss.
    """
    settings, tokenizer = read_settings(folder), load_tokenizer(folder)
    if settings["teacher"] == "none":
        raise InputError(f"{folder} is a run without a teacher: --distribution has nothing to draw")
    teacher, ids = models.load(settings["teacher"]), tokenizer.encode(prompt) or [tokenizer.eot]
    networks = teacher, student_before(settings, teacher), models.load(folder)
    t, before, after = (network(torch.tensor([ids[-network.context:]]))[0, -1, :tokenizer.vocab_size].double()
                        for network in networks)  # each (V,)
    ranks = [rank for rank in RANKS if rank < len(t)]
    shown = t.argsort(descending=True)[torch.tensor(ranks) - 1]

    def probabilities(logits, T=1):
        p = (logits / T).softmax(-1)[shown]
        return [*p.tolist(), 1 - p.sum().item()]

    names = [(f"{rank:,}th: " if rank > 10 else "") + ascii(tokenizer.decode([i]))
             for rank, i in zip(ranks, shown, strict=True)]
    return [*names, f"all {len(t) - len(ranks):,} others"], {
        "what temperature does": {
            "teacher, T = 1": probabilities(t), "T = 2": probabilities(t, 2), "T = 4": probabilities(t, 4)},
        "what distillation does": {
            "teacher, T = 1": probabilities(t), "student before": probabilities(before),
            "after": probabilities(after)}}


def draw_distribution(folder, prompt):
    """Two Axes, a row for each token: the teacher at three temperatures; the student before and after."""
    figure, (tokens, panels) = new_figure(), distributions(folder, prompt)
    figure.suptitle(f"next token after  {ascii(prompt[-60:])}", fontsize=10, parse_math=False)
    both, colours = figure.subplots(1, 2, sharex=True, sharey=True), ((PURPLE, ORANGE), (GREY, GREEN))
    for axes, (title, series), pair in zip(both, panels.items(), colours, strict=True):
        looks = zip((BLUE, *pair), "osD", (8, 4, 4), ("none", "full", "full"), strict=True)
        for (name, p), (colour, marker, size, fill) in zip(series.items(), looks, strict=True):
            axes.plot(p[:-1], range(len(p) - 1), color=colour, alpha=0.5, linewidth=1)
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


# ------------------------------------------------------------------------------------ what lies in a run
def read(path):
    """The text of a file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name the folder of a run, such as out") from error


def read_log(path):
    """log.csv -> {column: its values}. InputError names a line that is no row of numbers."""
    (header, *lines), rows = read(path).splitlines() or [""], []
    if len(lines) < 2:
        raise InputError(f"{path}: steps so far: {len(lines)}; a line needs two")
    names = header.split(",")
    if missing := {"step", "loss", "kl", "clm", "teacher_clm"} - {*names}:
        raise InputError(f"{path} has no column {min(missing)}: it is no log of distill.py")
    for number, line in enumerate(lines, 2):
        try:
            row = dict(zip(names, map(float, line.split(",")), strict=True))
        except ValueError:
            row = {"step": math.nan}
        if not math.isfinite(sum(row.values())) or rows and row["step"] <= rows[-1]["step"]:
            raise InputError(f"{path}, line {number} is damaged: {line[:60]!r}; delete it")
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in names}


def read_settings(folder):
    """args.json, with all that is asked of it here."""
    path, asked = Path(folder, "args.json"), ("teacher", "student", "student_layers", "student_init", "seed",
                                              "temperature", "kd_weight", "clm_weight", "cos_weight")
    try:
        settings = json.loads(read(path))
        return {name: settings[name] for name in asked}
    except (json.JSONDecodeError, TypeError, LookupError) as error:
        raise InputError(f"{path} is damaged or not from distill.py: {error!r:.99}") from error


def student_before(settings, teacher):
    """The student as it was before the first step."""
    layers = [int(layer) for layer in (settings["student_layers"] or "").split(",") if layer]
    return distill.first_student(argparse.Namespace(**settings), teacher, layers).eval()


# ------------------------------------------------------------------------------------ from flags to a file
def new_figure():
    """An empty figure in STYLE, whatever the user's own settings of matplotlib are."""
    try:
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: it needs no screen
    except ImportError as error:
        raise InputError("plot.py needs matplotlib: python -m pip install -r requirements-dev.txt") from error
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(8, 4.5), dpi=150, layout="constrained")


def main():
    args = parse_args()
    name = "loss.png" if args.distribution is None else "distribution.png"
    path = Path(args.save or Path(args.run, name))
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--save {path}: its name must end in .png, .svg or .pdf")
    if args.distribution is None:
        axes = draw_loss(args.run)
    else:
        axes = draw_distribution(args.run, args.distribution.replace("\\n", "\n"))[0]
    with replaced(path) as temporary:
        axes.figure.savefig(temporary, format=path.suffix[1:])
    print(path)


if __name__ == "__main__":
    run_cli(main)
