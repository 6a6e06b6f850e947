"""What distilling does to LAMBADA and to copying: DistilPythia's open question, asked of small models.

    python -m extras.lambada ask EleutherAI/pythia-70m pythia/control pythia
                                      puts the questions to models that you have
    python -m extras.lambada --page   makes the tables and the picture of docs/lambada.md anew

LAMBADA's last word can mostly be copied from its passage, and distillation is known to weaken the heads that
copy (arXiv 2509.01649). So the study had a teacher that copies, a student that copies a little, the published
objective, and others that differ from it in one thing. Its runs are finished; docs/lambada.jsonl has their
figures. Commit 4cd76ba has the code that trained them, and the text in which names must be copied.

Read in this order:
  questions           what a model is asked: LAMBADA's words in the passage and not in it, random tokens twice
  ARMS                the runs: what differed from the published recipe
  copying_table, ...  the tables of docs/lambada.md

Shapes: S seeds, I items (the words of the study's own LAMBADA).
"""
import itertools
import re
import sys
from argparse import Namespace

import numpy as np
import torch

import eval_ppl
from data import load_tokenizer
from extras.plot import BLUE, GREY, PURPLE, new_figure
from extras.study import Study
from model import load
from support.cli import checked, format_table, new_parser, run_cli, user_path
from support.ranks import pick_device
from support.scoring import SCORES, exp


# ------------------------------------------------------------------------------------ what a model is asked
def is_in(word, text):
    """Whether a text has the word as a whole."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def questions(model, tokenizer, texts, args):
    """{question: answer} for a model that you have."""
    args = Namespace(**vars(args) | {"context": model.context, "protocol": "lambada"})
    n = min(64, model.context // 2)
    copied = copy_accuracy(model, random_twice(n, tokenizer), tokenizer, args)
    answers = {"parameters": model.num_parameters(), f"{n} random tokens twice: copied": copied}

    parts = {"all words": [], "in the passage": [], "not in it": []}
    for text in texts:
        before, _, word = text.rpartition(" ")
        parts["all words"].append(text)
        parts["in the passage" if is_in(word, before) else "not in it"].append(text)
    for what, some in parts.items():
        if some:
            nll, right = word_losses(model, some, tokenizer, args)
            answers[f"{what} ({len(some)}): perplexity"] = exp(nll.mean())
            answers[f"{what}: accuracy"] = float(right.mean())
    return answers


def word_losses(model, texts, tokenizer, args):
    """The nats that a model needs for the last word of each text, and whether it has all its tokens right."""
    windows = [window for text in texts for window in eval_ppl.lambada(text, tokenizer, args)]
    scores = scores_of(model, windows, tokenizer, args)
    return scores["nll"], scores["right"] == scores["tokens"]


def copy_accuracy(model, windows, tokenizer, args):
    """The share of the scored tokens that the model finds likeliest."""
    scores = scores_of(model, [*windows], tokenizer, args)
    return float(scores["right"].sum() / scores["tokens"].sum())


def scores_of(model, windows, tokenizer, args):
    """{name of SCORES: a value for each window}."""
    scores = eval_ppl.score_windows({"model": model}, windows, args, tokenizer.vocab_size)[0]
    return dict(zip(SCORES, scores.numpy(), strict=True))


def random_twice(n, tokenizer, times=24):
    """Windows of n random tokens that occur twice; the second time is scored, but for its first token."""
    rng = np.random.default_rng(n)
    for _ in range(times):
        ids = rng.integers(0, tokenizer.eot, n)
        yield eval_ppl.Window(np.concatenate([[tokenizer.eot], ids, ids]), n - 1, 0.0, 0.0)


def parse_ask(argv):
    parser = new_parser("Put the questions of this study to models that you have: a column for each.\n\n"
                        "    python -m extras.lambada ask EleutherAI/pythia-70m pythia/control pythia",
                        "python -m extras.lambada ask MODEL [MODEL ...] [options]")
    add = parser.add_argument
    add("models", nargs="+", type=user_path, metavar="MODEL", help="folders, or names on the Hub")
    add("--data", type=user_path, default=eval_ppl.LAMBADA,
        help="passages with a last word: a file, or a data set on the Hub with a test split")
    add("--batch-size", type=checked(int, "1 or more", lambda n: n >= 1), default=16, metavar="N",
        help="passages at a time")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first one that is there")
    return parser.parse_args(argv)


def ask_models(argv):
    args = parse_ask(argv)
    args.device = pick_device(args.device)
    texts = eval_ppl.read_texts(eval_ppl.TEST_SETS.get(args.data, args.data), "lambada", "text")
    columns = {name: questions(load(name, torch.device(args.device)), load_tokenizer(name), texts, args)
               for name in args.models}
    lines = [{"": question, **{name: answers.get(question, "-") for name, answers in columns.items()}}
             for question in columns[args.models[0]]]
    print(format_table(lines))


# ------------------------------------------------------------------------------------ the page
# What was run. Names are those of the rows.
MARKS = (4, 16, 64, 256, 1024)  # steps at which a long run is asked
SEEDS = (0, 1, 2)
SHORT_ARMS = ("published", "T 1", "teacher alone", "teacher alone, T 1", "text alone", "other text", "routed",
              "bf16-pure", "published, warm-up", "published, larger steps", "published, lr 1e-3",
              "text alone, lr 1e-3", "other text, lr 1e-3")  # 64 steps each
LONG_ARMS = ("published, long", "text alone, long")  # 1,024 steps, asked at MARKS
LADDER_ARMS = ("published", "text alone")
SIZES = (1, 4, 16)  # of a step of the ladder, in micro-batches of 1,024 tokens
STARTS = (0, 1, 2)  # its warm starts: further ones had other batches


def states_of(rows):
    """{label: the figures of each seed}, in the order of the arms; a long arm has a label for each mark."""
    found = {}
    for arm in (*SHORT_ARMS, *LONG_ARMS):
        for seed in SEEDS:
            states = rows.get(f"{arm}, seed {seed}", {"states": {}})["states"]
            for steps, values in states.items():
                label = f"{arm}, {steps} steps" if arm in LONG_ARMS else arm
                found.setdefault(label, []).append(values)
    return found


def control_of(label):
    """The arm with the text alone, at the same rate and on the same number of tokens, or None."""
    arm, _, rest = label.partition(", ")
    if arm == "text alone" or rest == "larger steps":
        return None
    return f"text alone, {rest}" if rest.startswith(("long", "lr")) else "text alone"


def column(seeds, name):
    """(seeds,), or (seeds, items) of `items`."""
    return np.array([values[name] for values in seeds])


def interval(values):
    """Mean of `values` (seeds, items), and where 95% of the means lie if seeds and items are drawn again."""
    rng = np.random.default_rng(0)
    n_seeds, n_items = values.shape
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), 2000) / n_seeds  # (2000, seeds)
    items = rng.multinomial(n_items, np.full(n_items, 1 / n_items), 2000) / n_items  # (2000, items)
    low, high = np.percentile(((seeds @ values) * items).sum(1), (2.5, 97.5))
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def spread(values, form):
    """`18.74 (18.68 to 18.79)`: mean and range, or the one value."""
    if len(values) == 1:
        return format(values[0], form)
    return f"{values.mean():{form}} ({min(values):{form}} to {max(values):{form}})"


def copying_table(rows):
    """What each model was asked, as means over its seeds: what measures copying itself comes first."""
    models = {who: [rows[who]["states"]["0"]] for who in ("teacher", "student")}
    return [{
        "": label,
        "names copied": f"{column(seeds, 'copy names').mean():.3f}",
        "random copied": f"{column(seeds, 'copy random 64').mean():.3f}",
        "loss, pair seen": f"{column(seeds, 'loss pair').mean():.3f}",
        "loss, new": f"{column(seeds, 'loss new').mean():.3f}",
        "LAMBADA": spread(column(seeds, "lambada perplexity"), ".0f"),
        "accuracy": f"{column(seeds, 'lambada accuracy').mean():.3f}",
        "perplexity": spread(column(seeds, "perplexity"), ".2f"),
    } for label, seeds in (models | states_of(rows)).items()]


def changes_table(rows):
    """How far each arm moved text and LAMBADA, and how it compares with text alone, seed by seed."""
    before = rows["student"]["states"]["0"]
    states = states_of(rows)
    lines = []
    for label, seeds in states.items():
        line = {"": label,
                "text, a token": f"{column(seeds, 'loss').mean() - before['loss']:+.3f}",
                "LAMBADA, a word": interval(column(seeds, "items") - np.array(before["items"])),
                "LAMBADA less text alone's": "-", "names copied, less": "-", "random copied, less": "-"}
        control = states.get(control_of(label))
        if control and len(control) == len(seeds):
            less = {name: column(seeds, name) - column(control, name)
                    for name in ("items", "copy names", "copy random 64")}
            line["LAMBADA less text alone's"] = interval(less["items"])
            line["names copied, less"] = spread(less["copy names"], "+.3f")
            line["random copied, less"] = spread(less["copy random 64"], "+.3f")
        lines.append(line)
    return lines


def ladder_table(rows):
    """What 64 steps of each size changed, from each warm start: with the teacher, with the text alone."""
    lines = []
    for start, size in itertools.product(STARTS, SIZES):
        name = "ladder: {}, x{}, start {}, seed {}"
        seeds = [seed for seed in SEEDS
                 if all(name.format(arm, size, start, seed) in rows for arm in LADDER_ARMS)]
        if not seeds:
            continue
        published, alone = ([rows[name.format(arm, size, start, seed)]["states"]["64"] for seed in seeds]
                            for arm in LADDER_ARMS)
        before = np.array(rows[f"start {start}, student"]["states"]["0"]["items"])
        less = {name: column(published, name) - column(alone, name)
                for name in ("items", "loss", "copy names")}
        lines.append({
            "warm start": start, "tokens a step": f"{1024 * size:,}", "seeds": len(seeds),
            "LAMBADA, published": interval(column(published, "items") - before),
            "LAMBADA, text alone": interval(column(alone, "items") - before),
            "published less text alone": interval(less["items"]),
            "text, less": spread(less["loss"], "+.3f"),
            "names copied, less": spread(less["copy names"], "+.3f"),
        })
    return lines


def draw(rows):
    """Change of LAMBADA and of text over steps, with the teacher and without."""
    axes = new_figure().subplots()
    before = rows["student"]["states"]["0"]
    states = states_of(rows)
    for arm, colour in (("published", BLUE), ("text alone", PURPLE)):
        seeds = [states[f"{arm}, long, {steps} steps"] for steps in MARKS]
        words = [(column(of, "items") - np.array(before["items"])).mean(1) for of in seeds]  # each (seeds,)
        tokens = [column(of, "loss").mean() - before["loss"] for of in seeds]
        axes.fill_between(MARKS, [min(w) for w in words], [max(w) for w in words], color=colour, alpha=0.2)
        axes.plot(MARKS, [w.mean() for w in words], "o-", color=colour, label=f"{arm}: LAMBADA, a word")
        axes.plot(MARKS, tokens, "s--", color=colour, label=f"{arm}: text, a token")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xscale="log", xlabel="steps", ylabel="change, nats (above 0: worse)")
    axes.set_xticks(MARKS, MARKS)
    axes.minorticks_off()
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.grid()
    return axes.figure


# ------------------------------------------------------------------------------------ the command
TABLES = {"copying": copying_table, "changes": changes_table, "ladder": ladder_table}
STUDY = Study("lambada", __doc__, tables=TABLES, pictures={"lambada.png": draw}, made_by="4cd76ba")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["ask"]:
        ask_models(argv[1:])
    else:
        STUDY.main(argv)


if __name__ == "__main__":
    run_cli(main)
