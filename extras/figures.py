"""The README's pictures, and the texts that it prints.

    python -m extras.figures              assets/layers, token, gradient.png
    python -m extras.figures --run out    also loss and distribution.png
    python -m extras.figures --texts      trains the demo, minutes long: texts

Read in this order:
  draw_layers        which of the teacher's layers a student is made of
  draw_token         one prediction with three tokens, worked out: logits, softmax, KL, gradient
  draw_gradient      why the loss has T²: the size of the gradient at T = 0.5 to 16, with it and without
  draw_distribution  one next token out of 4,096: the teacher at T = 1, 2, 4; the student before and after
  make_texts         what the README prints, all from one run of the demo

Layers and token are drawn from numbers in this file. The other two are measured, with the shipped teacher and
the demo's student; the gradient on 1,024 tokens of held-out modules.
"""
if not __package__:  # started as a file, from which Python does not find the rest of the project
    raise SystemExit("error: run this from the project's folder, as `python -m extras.figures`")

import copy
import io
import re
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

import distill
import sample
from data import load_tokenizer
from distill import LossSettings, plain_loss
from extras import plot
from extras.plot import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure
from model import load, spread_layers, student_from
from support import ROOT
from support.cli import InputError, new_parser, run_cli, user_path
from support.files import replaced
from support.flags import DEMO_TEACHER, RECIPES
from support.run import Run, read_settings
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
    every = ["embed", *layers, "head"]
    copied = ["embed", *kept, "head"]
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


def demo_models():
    """The demo's teacher, and its student before the first step."""
    teacher = load(DEMO_TEACHER)
    return teacher, student_from(teacher, DEMO_LAYERS).eval()


def demo_logits(n_tokens=1024, length=256):
    """Logits of the demo's teacher and first student, each (N, V), and the targets (N,), on held-out text."""
    tokenizer = load_tokenizer(DEMO_TEACHER)
    ids = []
    for split, text in stdlib_split():  # the held-out modules come first
        ids += [tokenizer.eot, *tokenizer.encode_array(text).tolist()]
        if len(ids) > n_tokens or split != "val":
            break
    ids = torch.tensor(ids[:n_tokens + 1])

    with torch.no_grad():
        t, s = (network(ids[:-1].view(-1, length)).flatten(0, 1) for network in demo_models())
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


# ------------------------------------------------------------------------------------ one real next token
PROMPT = "    if not isinstance(value,"  # a type follows, and there are many
RANKS = [*range(1, 11), 100, 1000]  # tokens shown: the teacher's ten likeliest, and two unlikely ones
PANELS = {  # {title: {series: its colour}}
    "what temperature does": {"teacher, T = 1": BLUE, "T = 2": PURPLE, "T = 4": ORANGE},
    "what distillation does": {"teacher, T = 1": BLUE, "student before": GREY, "after": GREEN},
}


@torch.no_grad()
def distributions(student):
    """(tokens, {series: their probabilities after PROMPT}); the last is that of all others."""
    tokenizer = load_tokenizer(DEMO_TEACHER)
    ids = torch.tensor([tokenizer.encode(PROMPT)])  # (1, L)
    t, before, after = (network(ids)[0, -1, :tokenizer.vocab_size].double()
                        for network in (*demo_models(), student))  # each (V,)
    logits = {"teacher, T = 1": t, "T = 2": t / 2, "T = 4": t / 4, "student before": before, "after": after}

    shown = t.argsort(descending=True)[torch.tensor(RANKS) - 1]
    tokens = [(f"{rank:,}th: " if rank > 10 else "") + ascii(tokenizer.decode([token]))
              for rank, token in zip(RANKS, shown, strict=True)]
    tokens.append(f"all {len(t) - len(RANKS):,} others")

    series = {}
    for name, z in logits.items():
        p = z.softmax(-1)[shown]
        series[name] = [*p.tolist(), 1 - p.sum().item()]
    return tokens, series


def draw_distribution(student):
    """Two Axes, a row for each token: the teacher at three temperatures; the student before and after."""
    figure = new_figure()
    figure.suptitle(f"next token after  {ascii(PROMPT)}", fontsize=10)
    both = figure.subplots(1, 2, sharex=True, sharey=True)
    tokens, series = distributions(student)

    # Points alone: between two tokens there is nothing, so no line leads from one to the next.
    markers = (("o", 8, "none"), ("s", 5, "full"), ("D", 5, "full"))
    for axes, (title, colours) in zip(both, PANELS.items(), strict=True):
        for (name, colour), (marker, size, fill) in zip(colours.items(), markers, strict=True):
            axes.plot(series[name], range(len(tokens)), marker, color=colour, markersize=size, fillstyle=fill,
                      label=name)
        axes.legend(title=title, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), handletextpad=0.1,
                    columnspacing=0.8)
        axes.set(xscale="log", xlabel="probability, log scale")
        axes.xaxis.set_major_formatter(lambda p, _: f"{100 * p:g}%")
        axes.axhline(len(tokens) - 1.5, color=GREY, linewidth=0.8)
        axes.grid()

    both[0].set_yticks(range(len(tokens)), tokens, family="monospace")
    both[0].invert_yaxis()
    return both


# ------------------------------------------------------------------------------------ printed texts
TEXTS = ROOT / "docs" / "texts.txt"
SHOWN_STEPS = (0, 200, 1200)


def make_texts(folder):
    """Train the demo in `folder` -> {command: what it prints, or the part of it that the README shows}."""
    students = {}
    save = Run.save

    def save_and_keep(run, step):
        """Like Run.save, which is called every 100 steps."""
        save(run, step)
        if run.args.role == "student" and step in SHOWN_STEPS:
            students[step] = copy.deepcopy(run.student).eval()

    out = Path(folder, "out")
    with mock.patch.object(Run, "save", save_and_keep):
        report = printed(distill.main, "--out", out)
    teacher, students[0] = demo_models()
    samples = printed(sample.main, "--model", out, "--compare", DEMO_TEACHER, "--tokens", 60, "--device",
                      "cpu")
    return {
        "python distill.py": re.search(r"\| model (.*\n\|)+.*", report)[0],
        "python sample.py --compare demo/teacher --tokens 60":
            samples.replace(str(out), "out").replace(DEMO_TEACHER, "demo/teacher"),
        "python -m extras.figures --texts": likeliest_texts(students, teacher),
    }


def printed(main, *flags):
    """What a command prints."""
    argv = ["", *map(str, flags)]
    with redirect_stdout(io.StringIO()) as output, mock.patch.object(sys, "argv", argv):
        main()
    return output.getvalue()


@torch.no_grad()
def likeliest_texts(students, teacher, tokens=40, lines=4):
    """How each student, {steps: model}, and the teacher go on, always with the likeliest token; the first few
    lines, as the texts go round in circles."""
    tokenizer = load_tokenizer(DEMO_TEACHER)
    ids = torch.tensor([tokenizer.encode(sample.DEFAULT_PROMPT)])  # (1, L)
    models = {f"after {steps} steps": students[steps] for steps in SHOWN_STEPS} | {"the teacher": teacher}

    parts = []
    for name, model in models.items():
        text = tokenizer.decode(model.generate(ids, tokens)[0].tolist())
        parts += [f"--- {name}", *text.splitlines()[:lines]]
    return "\n".join(parts)


def read_texts(path=TEXTS):
    """{command: text} of the file that write_texts makes."""
    blocks = path.read_text(encoding="utf-8").split("\n$ ")[1:]
    return {command: text.rstrip() for command, _, text in (block.partition("\n") for block in blocks)}


def write_texts(texts, path=TEXTS, readme=ROOT / "README.md"):
    """Write the file anew, and put each text where the README has the one before."""
    page = readme.read_text(encoding="utf-8")
    before = read_texts(path)
    content = "Texts of the README, made by `python -m extras.figures --texts`.\n"
    for command, text in texts.items():
        text = "\n".join(line.rstrip() for line in text.rstrip().splitlines())
        content += f"\n$ {command}\n{text}\n"
        page = page.replace(before[command], text)

    for place, new in ((path, content), (readme, page)):
        with replaced(place) as temporary:
            Path(temporary).write_text(new, encoding="utf-8")


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.figures [options]")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--run", type=user_path, metavar="DIR",
        help="also loss.png and distribution.png of this run of the demo")
    add("--texts", action="store_true",
        help="instead of pictures, train the demo and its control once more, which takes minutes, and write "
             "what models print into docs/texts.txt and README.md")
    parser.add_argument("--folder", type=user_path, default=str(ROOT / "assets"), metavar="DIR",
                        help="where pictures go")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.texts:
        print("This trains the demo and its control, which takes about three minutes.", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            write_texts(make_texts(folder))
        return

    pictures = {"layers": draw_layers()[0], "token": draw_token()[0],
                "gradient": draw_gradient(gradient_sizes())}
    if args.run:
        if not read_settings(args.run).get("is_demo"):
            raise InputError(f"--run {args.run} is not a run of the demo: run `python distill.py` first")
        pictures["loss"] = plot.draw_loss(args.run)
        pictures["distribution"] = draw_distribution(load(args.run))[0]
    for name, axes in pictures.items():
        plot.save(axes.figure, Path(args.folder, f"{name}.png"))


if __name__ == "__main__":
    run_cli(main)
