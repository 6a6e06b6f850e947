"""What distilling does to LAMBADA and to copying: DistilPythia's open question, asked of small models.

    python -m extras.lambada   makes the missing runs; can be stopped
    python -m extras.lambada ask EleutherAI/pythia-70m pythia/control pythia
                               puts the same questions to models that you have

LAMBADA's last word can mostly be copied from its passage, and distillation is known to weaken the heads that
copy (arXiv 2509.01649). So: a teacher that copies, a student that copies a little, the published objective,
and others that differ from it in one thing.

Read in this order:
  WARM_START, ARMS    the recipes of teacher and student, and the runs
  write_text          their text: the standard library with its names drawn anew, so that they must be copied
  one_run             trains one arm, and asks at some of its steps
  figures             what a model is asked: our LAMBADA, copying, the loss on held-out text
  copying_table, ...  docs/lambada.md is made of these
  ask_models          the question for the real models

docs/lambada-items.jsonl holds 300 passages: code whose last word stands earlier in the passage. Commit
d0ffd89 has the code that chose them (extras/lambada_items.py).
Shapes: B windows, L tokens in a window.
"""
import ast
import copy
import functools
import itertools
import json
import keyword
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

import eval_ppl
from data import load_tokenizer, prepare
from distill import plain_loss
from extras.plot import BLUE, GREY, PURPLE, new_figure
from extras.study import ROOT, Study, trained, write_text
from model import load
from support.chunked_loss import chunked_loss
from support.cli import checked, format_table, new_parser, run_cli, user_path
from support.ranks import pick_device
from support.scoring import SCORES, exp
from support.text import stdlib_documents, stdlib_held_out

OUT = Path("out-lambada")  # texts and models that all runs share are made here once
DEMO_TEACHER = str(ROOT / "demo" / "teacher")
ITEMS = ROOT / "docs" / "lambada-items.jsonl"
LENGTH = 256  # tokens in a window
ASKING = Namespace(context=LENGTH, batch_size=16, device="cpu", protocol="lambada")  # as eval_ppl.py's flags

# ------------------------------------------------------------------------------------ what is run
# Before distillation: the demo's teacher learns to copy from text alone. The student, three of its layers,
# learns to do without the others and then gets used to the rate at which it will be distilled. A step of
# AdamW is as large as its rate: pythia-70m's rate fell from 1e-3 to 1e-4, and DistilPythia used 1e-4.
TEXT_ALONE = (f"--kd-weight 0 --clm-weight 1 --data {OUT}/text --seq-len 256 --batch-size 8 --grad-accum 1 "
              "--precision bf16 --eval-tokens 20000 --overwrite")
WARM_START = {  # folder in OUT: its flags
    "teacher": f"--teacher none --student {shlex.quote(DEMO_TEACHER)} --lr 1.5e-3 --warmup 0.05 "
               "--schedule linear --steps 500",
    "student-1e-3": "--teacher {models}/teacher --student-layers 0,2,5 --lr 1e-3 --warmup 0.05 "
                    "--schedule constant --steps 500",
    "student": "--teacher none --student {models}/student-1e-3 --lr 1e-4 --warmup 0 --schedule constant "
               "--steps 150",
}

# The recipe is the model card's: T = 2, half and half, rate 1e-4, constant, no warm-up, 64 steps.
BASE = ("--recipe distilpythia --seq-len 256 --batch-size 4 --grad-accum 1 --precision bf16 --device cpu "
        f"--save-interval 10000 --data {OUT}/text --teacher {{models}}/teacher --student {{models}}/student")
MARKS = (4, 16, 64, 256, 1024)  # steps at which a long run is asked
SEEDS = (0, 1, 2)
SHORT_ARMS = {
    "published": "",
    "T 1": "--temperature 1",
    "teacher alone": "--kd-weight 1 --clm-weight 0",
    "teacher alone, T 1": "--kd-weight 1 --clm-weight 0 --temperature 1",
    "text alone": "--kd-weight 0 --clm-weight 1",
    "other text": f"--kd-weight 0 --clm-weight 1 --data {OUT}/prose",
    "routed": "",  # trained with routed_loss
    "bf16-pure": "--precision bf16-pure",
    "published, warm-up": "--warmup 0.25",
    "published, larger steps": "--grad-accum 4",
    "published, lr 1e-3": "--lr 1e-3",
    "text alone, lr 1e-3": "--kd-weight 0 --clm-weight 1 --lr 1e-3",
    "other text, lr 1e-3": f"--kd-weight 0 --clm-weight 1 --data {OUT}/prose --lr 1e-3",
}
LONG_ARMS = {
    "published, long": "--steps 1024",
    "text alone, long": "--kd-weight 0 --clm-weight 1 --steps 1024",
}
SIZES = (1, 4, 16)  # of a step, in micro-batches of 1,024 tokens
STARTS = (0, 1, 2)  # warm starts: further ones have other batches
LADDER_ARMS = {"published": "", "text alone": "--kd-weight 0 --clm-weight 1"}


def ladder():
    """Steps of three sizes, with the teacher and with the text alone, from three warm starts."""
    # The further warm starts come last, and their largest steps, which take longest, at the very end.
    order = [(0, size) for size in SIZES]
    order += [(start, size) for start in (1, 2) for size in (1, 4)]
    order += [(start, 16) for start in (1, 2)]

    runs = {}
    for (start, size), seed in itertools.product(order, SEEDS):
        for arm, flags in LADDER_ARMS.items():
            name = f"ladder: {arm}, x{size}, start {start}, seed {seed}"
            runs[name] = f"{flags} --grad-accum {size} --seed {seed}".strip()
    return runs


PLAN = {"teacher": "", "student": ""}  # before distillation
PLAN |= {f"{arm}, seed {seed}": f"{flags} --seed {seed}".strip()
         for arms in (SHORT_ARMS, LONG_ARMS) for seed in SEEDS for arm, flags in arms.items()}
PLAN |= {f"start {start}, {who}": "" for start in STARTS for who in ("teacher", "student")} | ladder()

SURE = 0.5  # nats of entropy; where the teacher has less, the routed arm learns from the text


def routed_loss(student_logits, teacher_logits, targets, settings):
    """plain_loss, but from the text alone where the teacher is sure, because what can be copied is what a
    teacher is sure of. Proposed in arXiv 2509.01649."""
    log_p = teacher_logits.float().log_softmax(-1)  # (N, V)
    is_sure = -(log_p.exp() * log_p).sum(-1) < SURE  # (N,)
    alone = replace(settings, kd_weight=0.0, clm_weight=1.0)
    from_both = plain_loss(student_logits, teacher_logits, targets.masked_fill(is_sure, -100), settings)
    from_text = plain_loss(student_logits, teacher_logits, targets.masked_fill(~is_sure, -100), alone)
    return tuple(a + b for a, b in zip(from_both, from_text, strict=True))


# ------------------------------------------------------------------------------------ the text
NAME = re.compile(r"[A-Za-z_]\w{3,}")
LEAST_MODULES, MOST_MODULES = 3, 60  # rarer names are many tokens; more frequent ones are English, or `self`
COPIES = 3  # of each training module, each with its own names
LIST_NAMES = (8, 48)  # in a list, at least and at most
LIST_SHARE = 0.25  # of the training text, in characters


def find_names(tokenizer):
    """The names in 3 to 60 of the training modules that are one or two tokens, sorted."""
    modules = Counter()
    for path, text in stdlib_documents():
        if not stdlib_held_out(path):
            modules.update(set(NAME.findall(text)))

    return sorted(name for name, count in modules.items()
                  if LEAST_MODULES <= count <= MOST_MODULES and not keyword.iskeyword(name)
                  and len(tokenizer.encode(" " + name)) <= 2)


def rename(text, names, rng):
    """Exchange those of `names` that are in the text for others: each always for the same one.

    "push(item, heap)" -> "shape(title, wait)"
    """
    known = set(names)
    found = sorted(known & set(NAME.findall(text)))
    others = rng.choice(names, len(found), replace=False).tolist()
    new = dict(zip(found, others, strict=True))
    return NAME.sub(lambda match: new.get(match[0], match[0]), text)


def name_list(names, rng):
    """Some names on a line, and the same line again."""
    line = " ".join(rng.choice(names, rng.integers(*LIST_NAMES)).tolist())
    return f"{line}\n{line}\n"


def renamed_modules(names, held_out):
    """The documents of a split. Lists only help a small model to learn, so the held-out text has none."""
    rng = np.random.default_rng(int(held_out))
    for _ in range(1 if held_out else COPIES):
        owed = 0  # characters of lists
        for path, text in stdlib_documents():
            if stdlib_held_out(path) != held_out:
                continue
            yield rename(text, names, rng)

            owed += 0 if held_out else len(text) * LIST_SHARE / (1 - LIST_SHARE)
            while owed > 0:
                extra = name_list(names, rng)
                yield extra
                owed -= len(extra)


def docstrings(held_out):
    """Other text: what each module says in English."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path, text in stdlib_documents():
        if stdlib_held_out(path) == held_out:
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
            yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


# ------------------------------------------------------------------------------------ the runs
@functools.cache
def warm_start(start=0):
    """Make texts, teacher and student in OUT, unless they are there. Returns the folder of the two models and
    ask(model) -> its figures."""
    tokenizer = load_tokenizer(DEMO_TEACHER)
    names = find_names(tokenizer)
    write_text(OUT / "text", lambda held_out: renamed_modules(names, held_out))
    write_text(OUT / "prose", docstrings)
    models = OUT / f"start-{start}"
    for folder, flags in WARM_START.items():
        if not (models / folder / "model.safetensors").exists():
            command = shlex.split(f"{TEXT_ALONE} {flags.format(models=models)} --out {models / folder}")
            seed = 10 * start + [*WARM_START].index(folder)
            subprocess.run([sys.executable, ROOT / "distill.py", *command, "--seed", str(seed)], check=True)

    corpus = prepare(str(OUT / "text"), tokenizer)
    return models, lambda model: figures(copy.deepcopy(model).float().eval(), corpus, names, tokenizer)


def one_run(name, flags):
    """The figures of an arm by step, or of a model before distillation."""
    found = re.search(r"start (\d)", name)
    models, ask = warm_start(int(found[1]) if found else 0)
    who = name.split(", ")[-1]
    if who in WARM_START:
        return {"states": {"0": ask(load(models / who))}}

    states = {}
    losses_of = functools.partial(chunked_loss, routed_loss) if name.startswith("routed") else None
    return trained(f"{BASE.format(models=models)} {flags}", lambda *_: {"states": states}, losses_of,
                   around=lambda args, teacher, student, *_: asked(args.steps, student, ask, states))


@contextmanager
def asked(last, student, ask, states):
    """Fill states, {step: figures}, while the student is trained: at the end, and at MARKS of a long run."""
    marks = {last, *(mark for mark in MARKS if last > 64)}
    done = 0

    def after_step(*_):
        nonlocal done
        done += 1
        if done in marks:
            states[str(done)] = ask(student)

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()


# ------------------------------------------------------------------------------------ what a model is asked
def figures(model, corpus, names, tokenizer):
    """{figure: value}, and `items`: the nats of each word of our LAMBADA."""
    items = [json.loads(line)["text"] for line in ITEMS.read_text(encoding="utf-8").splitlines()]
    nll, right = word_losses(model, items, tokenizer)
    return {
        "lambada perplexity": exp(nll.mean()),
        "lambada accuracy": float(right.mean()),
        "items": nll.round(3).tolist(),
        "copy random 64": copy_accuracy(model, random_twice(64, tokenizer), tokenizer),
        "copy names": copy_accuracy(model, names_twice(names, tokenizer), tokenizer),
        **split_loss(model, corpus.val),
    }


def word_losses(model, texts, tokenizer, args=ASKING):
    """The nats that a model needs for the last word of each text, and whether it has all its tokens right."""
    windows = [window for text in texts for window in eval_ppl.lambada(text, tokenizer, args)]
    scores = scores_of(model, windows, tokenizer, args)
    return scores["nll"], scores["right"] == scores["tokens"]


def copy_accuracy(model, windows, tokenizer, args=ASKING):
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


def names_twice(names, tokenizer, times=24):
    """Windows of 8 to 48 names that occur twice; the second time is scored, but for its first name."""
    rng = np.random.default_rng(0)
    for _ in range(times):
        text = name_list(names, rng).rstrip()
        _, _, second = text.partition("\n")
        scored = second.removeprefix(second.partition(" ")[0])
        window = np.append(tokenizer.eot, tokenizer.encode_array(text))[-LENGTH - 1:]
        yield eval_ppl.Window(window, len(tokenizer.encode(scored)), 0.0, 0.0)


@torch.no_grad()
def split_loss(model, ids, n_blocks=60):
    """Held-out loss in nats per token: of all tokens, of those whose pair (the token and the one before it)
    occurred earlier in the window, and of those that are new to the window.

    A head that copies looks for what followed the present token before (Olsson et al. 2022,
    arXiv 2209.11895).
    """
    blocks = torch.from_numpy(ids[:n_blocks * LENGTH + 1].astype("int64")).unfold(0, LENGTH + 1, LENGTH)
    inputs, targets = blocks[:, :-1], blocks[:, 1:]  # each (B, L)
    nll = torch.cat([F.cross_entropy(model(i).float().transpose(1, 2), t, reduction="none")
                     for i, t in zip(inputs.split(8), targets.split(8), strict=True)])  # (B, L)
    pair, new = pairs_and_new(blocks)
    return {"loss": float(nll.mean()), "perplexity": exp(float(nll.mean())),
            "loss pair": float(nll[pair].mean()), "loss new": float(nll[new].mean())}


def pairs_and_new(blocks):
    """blocks (B, L + 1) -> of each token but the first, (B, L): did its pair occur before, is it new?"""
    pair = torch.zeros_like(blocks[:, 1:], dtype=torch.bool)
    new = pair.clone()
    for row, tokens in enumerate(blocks.tolist()):
        seen_pairs = set()
        seen = set()
        for i, (token, target) in enumerate(zip(tokens, tokens[1:], strict=False)):
            seen.add(token)
            pair[row, i] = (token, target) in seen_pairs
            new[row, i] = target not in seen
            seen_pairs.add((token, target))
    return pair, new


# ------------------------------------------------------------------------------------ the page
def states_of(rows):
    """{label: the figures of each seed}, in the order of the plan; a long arm has a label for each mark."""
    found = {}
    for arm in SHORT_ARMS | LONG_ARMS:
        for seed in SEEDS:
            states = rows.get(f"{arm}, seed {seed}", {"states": {}})["states"]
            for steps, values in states.items():
                label = f"{arm}, {steps} steps" if arm in LONG_ARMS else arm
                found.setdefault(label, []).append(values)
    return found


def control_of(label):
    """The arm with the text alone at the same rate and on as many tokens; None if there is no such arm."""
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


# ------------------------------------------------------------------------------------ the real models
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


def parse_ask(argv):
    parser = new_parser("Put the questions of the study to models: a column for each.\n\n"
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


# ------------------------------------------------------------------------------------ the command
def show(row):
    state = [*row["states"].values()][-1]
    return f"perplexity {state['perplexity']:.2f}, LAMBADA {state['lambada perplexity']:.0f}"


TABLES = {"copying": copying_table, "changes": changes_table, "ladder": ladder_table}
STUDY = Study("lambada", __doc__, PLAN, one_run, TABLES, {"lambada.png": draw}, show=show)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["ask"]:
        ask_models(argv[1:])
    else:
        STUDY.main(argv)


if __name__ == "__main__":
    run_cli(main)
