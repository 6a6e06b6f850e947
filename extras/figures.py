"""The README's pictures.

    python -m extras.figures              assets/layers, token, gradient.png
    python -m extras.figures --run out    also loss and distribution.png

Read in this order:
  draw_layers    which of the teacher's layers a student is made of
  draw_token     one prediction with three tokens, worked out: logits, softmax, KL, gradient
  draw_gradient  why the loss has T²: the size of the gradient at T = 0.5 to 16, with it and without

The gradient is measured, with the shipped teacher and the demo's student before its first step, on 1,024
tokens of held-out modules; the other pictures are drawn from numbers in this file.
"""
if not __package__:  # started as a file, from which Python does not find the rest of the project
    raise SystemExit("error: run this from the project's folder, as `python -m extras.figures`")

from pathlib import Path

import torch
from torch.nn import functional as F

from data import load_tokenizer
from distill import LossSettings, plain_loss
from extras import plot
from extras.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure
from model import load, spread_layers, student_from
from support import ROOT
from support.cli import new_parser, run_cli, user_path
from support.flags import DEMO_TEACHER, RECIPES
from support.text import stdlib_split

DEMO_LAYERS = [int(number) for number in RECIPES["demo"]["student_layers"].split(",")]


# ------------------------------------------------------------------------------------ copied layers
def draw_layers():
    """Two Axes: the demo's teacher and student, and GPT-2 and DistilGPT2, as rows of layers."""
    both = new_figure(height=4).subplots(2, 1)
    draw_copies(both[0], "demo/teacher\n6 layers", range(6), "its student\n3 of them", DEMO_LAYERS)
    draw_copies(both[1], "GPT-2\n12 layers", range(12), "DistilGPT2\n6 of them", spread_layers(12, 6))
    return both


def draw_copies(axes, teacher, layers, student, kept):
    """A teacher's layers above, the student's below, an arrow for each copy; what is left out is grey."""
    every, copied = ["embed", *layers, "head"], ["embed", *kept, "head"]
    places = []  # of teacher and student, {box: its x}
    for y, name, boxes, colour in ((1, teacher, every, BLUE), (0, student, copied, GREEN)):
        places.append({box: i - (len(boxes) - 1) / 2 for i, box in enumerate(boxes)})
        axes.text(-9, y, name, va="center", color=colour)
        axes.plot([*places[-1].values()], [y] * len(boxes), color=GREY, linewidth=1, zorder=0)
        for box, x in places[-1].items():
            axes.text(x, y, box, ha="center", va="center", fontsize=8, color="white",
                      bbox={"boxstyle": "round,pad=0.45", "color": colour if box in copied else GREY})

    for box in copied:
        axes.annotate("", (places[1][box], 0.17), (places[0][box], 0.83),
                      arrowprops={"arrowstyle": "-|>", "color": GREEN, "shrinkA": 0, "shrinkB": 0})
    axes.set(xlim=(-9, 7.8), ylim=(-0.3, 1.3))
    axes.axis("off")


# ------------------------------------------------------------------------------------ one token, on paper
TOKENS = ("str", "int", "the")
TEACHER = torch.tensor([4.0, 2.0, 0.0])  # logits
STUDENT = torch.tensor([2.0, 2.0, 1.0])


def work_token(T):
    """The loss of one prediction at temperature T: {"p", "q": (3,), "kl": a number, "gradient": of the KL for
    the student's logits (3,)}."""
    p = (TEACHER / T).softmax(-1)
    q = (STUDENT / T).softmax(-1)
    kl = (p * (p.log() - q.log())).sum().item()
    return {"p": p, "q": q, "kl": kl, "gradient": (q - p) / T}


def draw_token():
    """Four Axes: logits; both distributions at T = 1, at T = 2; the gradient with and without T²."""
    one, two = work_token(1), work_token(2)
    four = new_figure(height=3.3).subplots(1, 4, width_ratios=(2.2, 2.2, 2.2, 4))
    pair = {"teacher": BLUE, "student": GREEN}

    draw_bars(four[0], "logits", pair, (TEACHER, STUDENT), "{:g}")
    draw_bars(four[1], f"softmax, T = 1\nKL = {one['kl']:.3f}", pair, (one["p"], one["q"]), "{:.2f}")
    draw_bars(four[2], f"softmax, T = 2\nKL = {two['kl']:.3f}\nT² KL = {4 * two['kl']:.3f}", pair,
              (two["p"], two["q"]), "{:.2f}")
    draw_bars(four[3], "gradient of the KL\nfor the student's logits",
              {"T = 1": PURPLE, "T = 2, without T²": GREY, "T = 2, with T²": ORANGE},
              (one["gradient"], two["gradient"], 4 * two["gradient"]), "{:+.2f}")

    for axes in four[1:3]:
        axes.set_ylim(0, 1)
    four[1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, handlelength=1)  # of all three
    four[3].legend(loc="lower right", handlelength=1)
    return four


def draw_bars(axes, title, colours, series, form):
    """Bars side by side for each token, with their numbers. `colours`: {name of a series: its colour}."""
    width = 0.84 / len(series)
    for i, ((name, colour), values) in enumerate(zip(colours.items(), series, strict=True)):
        places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(TOKENS))]
        bars = axes.bar(places, values.tolist(), 0.92 * width, color=colour, label=name)
        numbers = [form.format(value).replace("-", "\N{MINUS SIGN}") for value in values.tolist()]
        axes.bar_label(bars, numbers, fontsize=6.5, color=GREY, padding=1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(TOKENS)), TOKENS)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(x=0.01, y=0.1)


# ------------------------------------------------------------------------------------ why T²
TEMPERATURES = [2 ** (i / 4) for i in range(-4, 17)]  # 0.5 to 16


def demo_logits(n_tokens=1024, length=256):
    """Logits of the demo's teacher and first student, each (N, V), and the targets (N,), on held-out text."""
    tokenizer = load_tokenizer(DEMO_TEACHER)
    ids = []
    for split, text in stdlib_split():  # the held-out modules come first
        ids += [tokenizer.eot, *tokenizer.encode_array(text).tolist()]
        if len(ids) > n_tokens or split != "val":
            break
    ids = torch.tensor(ids[:n_tokens + 1])

    teacher = load(DEMO_TEACHER)
    student = student_from(teacher, DEMO_LAYERS).eval()
    with torch.no_grad():
        t, s = (network(ids[:-1].view(-1, length)).flatten(0, 1) for network in (teacher, student))
    return t, s, ids[1:]


def gradient_sizes():
    """{"without T²", "with T²": a size for each of TEMPERATURES, "CLM": one number}.

    A size is the length of the gradient for the student's logits of a token, on average over tokens.
    """
    t, s, targets = demo_logits()
    s.requires_grad_()

    def size(loss):
        gradient, = torch.autograd.grad(loss, s, retain_graph=True)  # (N, V), a row for each token
        return gradient.norm(dim=-1).mean().item()

    sizes = {"without T²": [], "with T²": []}
    for T in TEMPERATURES:
        settings = LossSettings(temperature=T, kd_weight=1.0, clm_weight=0.0)
        loss, kl, _ = plain_loss(s, t, targets, settings)  # T² * KL, and the KL
        sizes["without T²"].append(size(kl))
        sizes["with T²"].append(size(loss))
    sizes["CLM"] = size(F.cross_entropy(s, targets, reduction="sum"))
    return sizes


def draw_gradient(sizes):
    """Axes: the size of the gradient over T, both axes logarithmic."""
    axes = new_figure(height=3.8).subplots()
    axes.plot(TEMPERATURES, sizes["without T²"], "s-", color=ORANGE, markersize=4)
    axes.plot(TEMPERATURES, sizes["with T²"], "o-", color=BLUE, markersize=4)
    axes.axhline(sizes["CLM"], color=GREEN, linestyle="--")

    # A straight line with the slope of 1 / T², for the eye.
    start = TEMPERATURES.index(4)
    guide = [0.6 * sizes["without T²"][start] * (4 / T) ** 2 for T in TEMPERATURES[start:]]
    axes.plot(TEMPERATURES[start:], guide, ":", color=GREY)
    axes.annotate("1 / T²", (TEMPERATURES[-7], guide[-7]), (-8, -4), textcoords="offset points", ha="right",
                  va="top")

    for name, y, colour in (("gradient of\nT² KL", sizes["with T²"][-1], BLUE),
                            ("gradient of\nthe KL alone", sizes["without T²"][-1], ORANGE),
                            ("gradient of\nthe CLM", sizes["CLM"], GREEN)):
        plot.name_line(axes, name, y, colour)
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set(xscale="log", yscale="log", xlabel="temperature T", xlim=(0.5, 16),
             ylabel="size, on average over tokens")
    axes.set_xticks(ticks, [f"{T:g}" for T in ticks])
    axes.minorticks_off()
    axes.grid()
    return axes


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.figures [options]")
    parser.add_argument("--run", type=user_path, metavar="DIR",
                        help="also loss.png and distribution.png of this run of distill.py")
    parser.add_argument("--folder", type=user_path, default=str(ROOT / "assets"), metavar="DIR",
                        help="where pictures go")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    pictures = {"layers": draw_layers()[0], "token": draw_token()[0],
                "gradient": draw_gradient(gradient_sizes())}
    if args.run:
        pictures["loss"] = plot.draw_loss(args.run)
        pictures["distribution"] = plot.draw_distribution(args.run, plot.DEFAULT_PROMPT)[0]
    for name, axes in pictures.items():
        plot.save(axes.figure, Path(args.folder, f"{name}.png"))


if __name__ == "__main__":
    run_cli(main)
