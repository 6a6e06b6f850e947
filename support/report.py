"""Everything that a run of distill.py says to its user, in 80 columns, in this order:

  print_plan            what is about to happen
  warn_of_unknown_text  how well the teacher knows this text, and whether it should first be tuned on it
  open_progress         one bar for everything that the command will do
  about_control         the second training begins
  close                 the tables, what they mean, what the models write, what to do next; it also writes
                        results.json for other programs, and the model card (README.md)
  show_again            the same without the texts, for a run that was finished earlier
"""
import argparse
import copy
import json
import math
import platform
import shlex
import sys
import textwrap
import time
from functools import partial
from itertools import combinations, groupby
from pathlib import Path
from types import SimpleNamespace

import torch

from support import ROOT
from support.cli import format_table, one_line, open_bar, reading, say
from support.files import replaced
from support.flags import CONTROLS_TRIED, control_of, runs_of
from support.ranks import autocast, stop_at_once
from support.run import CHANGES_NOTHING, RESULTS, published, read_log, read_settings
from support.scoring import difference, held_out_batches, score_held_out, table_rows, validate

WIDTH = 80


def filled(text, indent=""):
    """A paragraph in lines of at most 80 columns; paths and other long words stay whole."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


# ------------------------------------------------------------------------------------ before the training
MANY_PASSES = 10  # over the same text: above this the plan warns


def print_plan(args, teacher, student, corpus, ranks):
    """What is about to happen, one part a line."""
    tokens = args.grad_accum * args.batch_size * args.seq_len
    passes = passes_over_text(args, corpus)

    plan = {"student": f"{origin(args)}: {size_of(student)}"}
    if teacher:
        control = "none; --control also trains the same student on the text alone"
        if args.control:
            control = "afterwards, the same student learns from the text alone"
        plan = {"teacher": f"{args.teacher}: {size_of(teacher)}", **plan, "control": control}
    plan |= {
        "objective": args.objective,
        "data": f"{args.data}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out",
        "steps": f"{args.steps:,} of {tokens:,} tokens ({args.grad_accum} x {args.batch_size} x "
                 f"{args.seq_len}): {passes:.2g} passes over the text",
        "rate": f"{args.lr:g}, {args.schedule} after {args.warmup:.0%} warm-up",
        "runs on": f"{ranks.world} x {ranks.device}, {args.precision}; writes to {args.out}/",
    }
    if passes > MANY_PASSES:
        enough = math.ceil(args.steps * MANY_PASSES / passes)
        plan["warning"] = (f"the student reads the same text {passes:.0f} times and may learn it by heart: "
                           f"take more text, or --steps {enough}")

    for title, text in plan.items():
        say(filled(f"{title:10} {text}", indent=" " * 11))


def size_of(network):
    return f"{len(network.blocks)} layers, {network.num_parameters() / 1e6:.1f}M parameters"


def passes_over_text(args, corpus):
    """How many times the run reads each example of the training text."""
    n_examples = (len(corpus.train) - 1) / args.seq_len
    if args.packing == "padded":
        used = len(corpus.train) / corpus.meta["train"]["tokens"]  # a short run uses a part of a large corpus
        n_examples = corpus.meta["train"]["documents"] * used
    return args.steps * args.grad_accum * args.batch_size / n_examples


def origin(args):
    """Where the student comes from: "layers 0,2,5 of demo/teacher"."""
    source = f"layers {args.student_layers} of {args.teacher}" if args.student_layers else args.student
    return f"the shape of {source}, with random weights" if args.student_init == "random" else source


ENOUGH_BITS = 1.4
ENOUGH_TOKENS = 2048  # held-out tokens that show whether the teacher needs more


def warn_of_unknown_text(args, teacher, corpus, tokenizer):
    """Before time is spent: a teacher that does not know this kind of text should be tuned on it first.

    The demo's teacher needs 1.2 bits for each byte of Python modules that it has not seen, 2.2 for English,
    and more than 3 for shell scripts. On Python that it does not know it needs 1.5, and there tuning it first
    was worth 0.1 to 0.4 nats to its students (docs/questions.md, README.md). So this warns above 1.4.
    """
    if teacher is None:
        return
    few = SimpleNamespace(**vars(args) | {"eval_tokens": ENOUGH_TOKENS, "batch_size": 1})
    row, = validate([teacher], corpus, tokenizer.vocab_size, few, autocast(args, teacher.head_weight.device))
    bits = row["bits per byte"]
    knows = "it knows such text" if bits < ENOUGH_BITS else "tune it first"
    say(f"teacher    needs about {bits:.2f} bits per byte of this text: {knows}")
    if bits < ENOUGH_BITS or not args.kd_weight or args.resume or has_been_tuned(args):
        return

    tuned = "tuned-teacher"
    tune = [sys.argv[0], "--teacher", "none", "--student", args.teacher, "--data", args.data,
            "--data-folder", args.data_folder, "--out", tuned]
    for name in ("text_column", "packing", "seq_len", "batch_size", "grad_accum"):
        tune += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    few_passes = min(1, 2 / passes_over_text(args, corpus))  # after many it would know the text by heart
    tune += ["--lr", "3e-4", "--steps", str(max(1, round(args.steps * few_passes)))]
    say("\n" + filled(
        f"warning    The teacher needs {bits:.2f} bits for each byte of this text. It would need about 1 for "
        "a text that it knows, so it may have little to teach. This trains it on the text first, and then "
        "repeats your command with it:"))
    say(command(*tune, here=True))
    again = this_command(teacher=tuned, recipe=args.recipe, out=f"{Path(args.out)}-2")
    say(command(*again, here=True) + "\n")


def has_been_tuned(args):
    """Whether the teacher comes from a run on this text."""
    its_text = read_settings(args.teacher).get("data")
    return its_text is not None and Path(its_text).resolve() == Path(args.data).resolve()


def this_command(**changes):
    """The words of the command that runs, with some flags changed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in changes:
        parser.add_argument(f"--{name}")
    _, others = parser.parse_known_args(sys.argv[1:])
    return [sys.argv[0], *others, *(word for name in changes for word in (f"--{name}", changes[name]))]


# ------------------------------------------------------------------------------------ during the training
def open_progress(args, ranks, corpus):
    """One bar over the micro-batches of everything that this command will do: the student's, the control's,
    and the batches of held-out text that are scored at the end. Only the first process shows it."""
    total = sum(run.steps * len(ranks.share(run.grad_accum)) for run in runs_of(args))
    total += sum(1 for _ in held_out_batches(corpus, args, "cpu"))
    return open_bar(title="training", total=total, unit="batch", disable=not ranks.is_first)


def about_control(args):
    """The second training begins. args: the control's."""
    say(f"\ncontrol    now learns from the text alone: {args.steps:,} steps, rate {args.lr:g}")


# ------------------------------------------------------------------------------------ the end
@stop_at_once(way_on=lambda: "; the same command with --resume scores the models")
def close(args, networks, corpus, tokenizer, ranks, draw, bar):
    """Score all models on the same held-out text, write the card and results.json, and say what came out.

    networks: {"teacher": ..., "student": ..., "control": ...}, of which only the student has to be there.
    draw: sample.draw, which chooses the tokens of the texts.
    """
    bar.set_description("scoring", refresh=False)
    models = [*networks.values()]
    context = autocast(args, ranks.device)
    scores = score_held_out(models, corpus, tokenizer.vocab_size, args, context, bar)  # (M, 6, W)
    bar.close()

    rows = dict(zip(networks, table_rows(models, scores, corpus), strict=True))
    if not args.compile:  # which would compile each length of a text anew
        add_speed(rows, networks, corpus.eot)
    gaps = {"student": difference(scores, [*networks].index("student"))}
    gaps |= {f"{b} - {a}": difference(scores, j, i)
             for (i, a), (j, b) in combinations(enumerate(networks), 2)}
    results = {
        "objective": args.objective,
        "settings": {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING},
        "rows": rows,
        "differences": gaps,
        "verdict": verdict(args, gaps, got_worse(args, rows, gaps)) if "teacher" in rows else
                   before_and_after(args, rows["student"]["loss"]),
    }
    write_card(args, ranks, results)
    without_infinity = json.loads(json.dumps(results), parse_constant=lambda name: None)
    with replaced(Path(args.out, RESULTS)) as file:  # last: a run that has it is finished
        file.write_text(json.dumps(without_infinity, indent=2) + "\n", encoding="utf-8")

    parts = [summary(results), next_steps(args, results)]
    if not args.compile:
        parts.insert(1, texts(networks, corpus, tokenizer, draw))
    say("\n" + "\n\n".join(parts))


def show_again(args):
    """The same without the texts, from the results.json of a finished run."""
    path = Path(args.out, RESULTS)
    with reading(path, "the results of a run"):
        results = json.loads(path.read_bytes())
        text = f"{summary(results)}\n\n{next_steps(args, results)}"
    say(f"The run in {args.out} is finished. Its results:\n\n{text}")


QUALITY = ("loss", "perplexity", "bits per byte", "KL to teacher", "same top-1")
SIZE = ("parameters", "MB as float32", "tokens per second", "acceptance")
ABOUT_ACCEPTANCE = ("Acceptance is the share of tokens that the teacher would keep if this model drafted "
                    "them (speculative decoding).")


def summary(results):
    """How good the models are, what that means, how large and fast they are."""
    quality, size = (
        format_table([{"model": name} | {column: row[column] for column in columns if column in row}
                      for name, row in results["rows"].items()])
        for columns in (QUALITY, SIZE))
    if "teacher" in results["rows"]:
        size += "\n" + filled(ABOUT_ACCEPTANCE)
        if (T := results["settings"]["temperature"]) != 1:
            quality += f"\nKL to teacher is at T = 1; the kl in log.csv is at T = {T:g}."
    return "\n\n".join(filter(None, [quality, results["verdict"], size]))


# ------------------------------------------------------------------------------------ what the table means
WORTH = {  # by the sign of control - student
    1: "That is what the teacher was worth.",
    0: "On this text no gain from the teacher shows.",
    -1: "Text alone was worth more than this teacher.",
}
PASSED = "The {} has trained on this text and the teacher has not, so it can be better here."
NO_CONTROL = ("Whether the teacher helped, only a control can tell: repeat the command with --resume "
              "--control.")
NOISE = ("± is two standard errors on this held-out text. Other held-out text would move every loss by up to "
         "{:.3f}, but all of them together. A different seed adds noise of its own{}.")
TOO_SHORT = "The held-out text is too short to know its noise, so everything counts as a tie: take more text."


def verdict(args, gaps, worse):
    """The table in words; what lies within the noise of the held-out text is a tie.

    gaps: {"control - student": (nats, two standard errors), ...}; "student" is the student's own loss.
    worse: the sentences of got_worse.
    """
    signs = {name: sign(gap) for name, gap in gaps.items()}
    said = []
    caveat = NO_CONTROL
    if "control - student" in gaps:
        said = [compared(gaps, "student", "control")]
        if not worse or signs["control - student"] != 1:
            said.append(WORTH[signs["control - student"]])
        caveat = effort(args)
    said += worse

    # Where the student is between control and teacher, or which of the two has passed the teacher.
    is_between = all(signs.get(name) == 1 for name in ("control - student", "student - teacher"))
    if is_between and not worse:
        whole = gaps["control - teacher"]
        closed = gaps["control - student"][0] / whole[0]
        said.append(f"The student closes {closed:.0%} of the gap between control and teacher, which is "
                    f"{amount(whole)}.")
    else:
        said.append(compared(gaps, "teacher", "student"))
        if signs.get("control - teacher") == -1:
            said.append(compared(gaps, "teacher", "control"))
        passed = [name for name in ("student", "control") if signs.get(f"{name} - teacher") == -1]
        if passed and not has_been_tuned(args):
            said.append(PASSED.format(passed[0]))

    noise = gaps["student"][1]
    seeds = ", about 0.004 in the demo" if args.is_demo else ""
    about_noise = NOISE.format(noise, seeds) if math.isfinite(noise) else TOO_SHORT
    return filled(" ".join(said)) + "\n" + filled(f"{caveat} {about_noise}")


def got_worse(args, rows, gaps):
    """Sentences on the runs whose held-out loss was better on the way, beyond the noise."""
    name = "control - student" if "control" in rows else "student - teacher"
    gain, noise = gaps[name]
    best = {}
    said = []
    for run in runs_of(args):
        end = rows[run.role]["loss"]
        step, best[run.role] = min(((row["step"], row["loss"]) for row in on_the_way(run)),
                                   key=lambda point: point[1], default=(0, end))
        best[run.role] = min(best[run.role], end)
        if end - best[run.role] > noise:
            said.append(f"The {run.role} got worse after step {step:,.0f}, where it had "
                        f"{best[run.role]:.3f}: it has read the text too often.")
    if said and "control" in rows and gain > noise:
        said.append("So compare the two at their best: the student had "
                    f"{best['student']:.3f}, the control {best['control']:.3f}.")
    return said


CLEARLY = 0.01  # nats


def before_and_after(args, end):
    """Whether a training without a teacher helped. end: its loss."""
    rows = on_the_way(args)
    if not rows or rows[0]["step"]:  # an older version has begun the run
        return ""
    best = min(rows, key=lambda row: row["loss"])
    said = f"Held-out loss: before {rows[0]['loss']:.3f}, after {end:.3f}"
    if end - best["loss"] < CLEARLY:
        return said + "."
    why = f"it was {best['loss']:.3f} after step {best['step']:,.0f}" if best["step"] else (
        "training made it worse")
    return f"{said}: {why}; take fewer --steps."


def on_the_way(args):
    """The rows of held-out.csv, if they are losses on the text of the table."""
    is_same = read_settings(args.out).get("eval_tokens") == args.eval_tokens
    return read_log(Path(args.out, "held-out.csv")) if is_same else []


def sign(gap):
    """1 or -1 for a difference (nats, noise) above or below 0, and 0 for a tie."""
    nats, noise = gap
    return 0 if abs(nats) <= noise else int(math.copysign(1, nats))


def amount(gap):
    nats, noise = gap
    return f"{abs(nats):.3f} nats" + (f" (± {noise:.3f})" if math.isfinite(noise) else "")


def compared(gaps, a, b):
    """A sentence on models `a` and `b`, of which `a` comes first in the name of their difference, b - a."""
    gap = gaps[f"{b} - {a}"]
    if sign(gap) == 0:
        return f"The {a} and the {b} are tied, {amount(gap)} apart."
    better, worse = (a, b) if sign(gap) == 1 else (b, a)
    return f"The {better} is {amount(gap)} better than the {worse}."


def effort(args):
    """How good a control it was: its settings, and how they were chosen."""
    alone = control_of(args)
    how = ""
    if args.is_demo:
        how = f", the best of {CONTROLS_TRIED} settings that were tried (docs/atlas.md)"
    elif args.control_lr is None:
        how = ", like the student; --control-lr gives it a rate of its own"
    sequences = alone.batch_size * alone.grad_accum
    return f"The control had rate {alone.lr:g} and {sequences} sequences a step{how}."


# ------------------------------------------------------------------------------------ size and speed
def add_speed(rows, networks, eot):
    """Add megabytes and tokens per second to the rows. Speeds are those in the precision of the first model's
    weights, so that they compare."""
    dtype = next(iter(networks.values())).head_weight.dtype
    for name, network in networks.items():
        rows[name]["MB as float32"] = round(4 * network.num_parameters() / 1e6)
        if name == "control":  # the student's shape, so the student's speed
            rows[name]["tokens per second"] = rows["student"]["tokens per second"]
            continue
        if network.head_weight.dtype != dtype:
            network = copy.deepcopy(network).to(dtype)
        rows[name]["tokens per second"] = round(writing_speed(network, eot))


SPEED_SECONDS = 1.0  # of writing, for each model


def writing_speed(network, eot):
    """Tokens per second when one text is written, the likeliest token each time."""
    ids = torch.tensor([[eot]], device=network.head_weight.device)

    def seconds_for(n_tokens):
        started = time.perf_counter()
        network.generate(ids, n_tokens)[0, -1].item()  # waits for the device
        return time.perf_counter() - started

    seconds_for(1)  # the first one also sets things up
    enough = int(SPEED_SECONDS / seconds_for(2) * 2)
    n_tokens = max(2, min(enough, network.context - 1))
    return n_tokens / seconds_for(n_tokens)


# ------------------------------------------------------------------------------------ the model card
CARD = """---
library_name: transformers
pipeline_tag: text-generation{tags}
---
# A {made} GPT

Made with distil-from-scratch. Teacher: `{teacher}`. Student: {origin}.

    {objective}

{steps:,} steps, {tokens:,} tokens of `{data}` ({packing} packing, sequences of {seq_len}). AdamW, learning
rate {lr:g} ({schedule}), seed {seed}, {precision}. Settings: `args.json`; every step: `log.csv`.
Hardware: {ranks} x {hardware}, {hours:.2f} hours of training steps. Energy and CO2 were not measured.

## Results on held-out text of the same data

{results}

## Limitations

{inherited}Read the card of the model that it comes from before you use it, and measure it on your task.
"""
INHERITED = """The student learns to predict what its teacher predicts. It inherits the teacher's errors and
biases, and because it is smaller it adds some of its own. """


def write_card(args, ranks, results):
    """README.md of the student, from the settings, the log and the results."""
    is_distilled = args.teacher != "none"
    on_gpu = ranks.device.type == "cuda"
    rows = read_log(Path(args.out, "log.csv"))
    about = vars(args) | {
        "made": "distilled" if is_distilled else "trained",
        "tags": "\ntags: [distillation]" if is_distilled else "",
        "inherited": INHERITED if is_distilled else "",
        "origin": origin(args),
        "tokens": int(sum(row["tokens"] for row in rows)),
        "hours": sum(row["tokens"] / row["tokens_per_second"] for row in rows) / 3600,
        "ranks": ranks.world,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "results": summary(results),
    }
    with published(args.out) as folder:
        # A file name can contain bytes that are not characters; the card must not fail because of them.
        (folder / "README.md").write_text(CARD.format(**about), "utf-8", errors="replace")


# ------------------------------------------------------------------------------------ what the models write
def texts(networks, corpus, tokenizer, draw):
    """Lines of held-out text, how it goes on, and how each model goes on.

    All draw with the same seed: the likeliest token, again and again, leads small models in circles.
    """
    opening, rest = passage(corpus, tokenizer)
    lines = [titled("After the words", tokenizer.decode(opening), slice(-3, None)),
             titled("the text has", tokenizer.decode(rest))]
    for name, network in networks.items():
        device = network.head_weight.device
        generator = torch.Generator(device).manual_seed(0)
        choose = partial(draw, temperature=0.7, top_k=50, generator=generator)
        written = network.generate(torch.tensor([opening], device=device), len(rest), choose)
        written = written[0, len(opening):].tolist()
        if corpus.eot in written:
            written = written[:written.index(corpus.eot)]
        lines.append(titled(f"the {name}", tokenizer.decode(written)))
    return "\n".join(lines)


def passage(corpus, tokenizer, before=128, after=60):
    """Ids from the middle of a held-out document, where there is something to go on from, and the next ones.

    The first part ends with a line where it can; best one with a colon, which in code opens a block.
    """
    start = corpus.val[:100_000].tolist()
    documents = [[*ids] for is_eot, ids in groupby(start, corpus.eot.__eq__) if not is_eot]
    enough = 2 * (before + after)
    ids = max(documents, key=lambda ids: min(len(ids), enough))

    middle = (len(ids) + 1) // 2
    words = {i: tokenizer.decode(ids[i:i + 1]) for i in range(max(0, middle - before), middle + 1)}
    ends = [i for i in words if i - 1 in words and words[i].startswith("\n")]
    blocks = [i for i in ends if words[i - 1].endswith(":")]
    cut = (blocks or ends or [middle])[-1]
    return ids[max(0, cut - before):cut], ids[cut:cut + after]


def titled(title, text, which=slice(3)):
    """Three lines of a text, of those that are not blank, beside a title; each is cut to the width."""
    lines = [one_line(line.expandtabs(4)) for line in text.splitlines() if line.strip()][which] or [""]
    shown = [f"{'' if i else title:18}{line}".rstrip() for i, line in enumerate(lines)]
    return "\n".join(line if len(line) <= WIDTH else line[:WIDTH - 4] + " ..." for line in shown)


# ------------------------------------------------------------------------------------ what to do next
def next_steps(args, results):
    """Where the student is, and commands to paste."""
    out = full_path(args.out)
    others = [full_path(args.teacher)] if "teacher" in results["rows"] else []
    if "control" in results["rows"]:
        others.append(full_path(Path(args.out, "control")))

    compare = ["--compare", *others] if others else []
    steps = {"see what they write": ["sample.py", "--model", out, *compare, "--num", "3"]}
    if not Path(args.out, "loss.png").exists():
        steps["draw the losses"] = ["-m", "extras.plot", out]
    if "teacher" in results["rows"]:
        steps["compare them token by token, on a page"] = ["-m", "extras.play", out]
    if args.recipe == "demo" and args.data == "stdlib":
        steps["do the same with your own text"] = ["distill.py", "--data", "my_texts/", "--out", "mine"]
    elif args.recipe != "demo" and args.data != "stdlib":
        steps["measure perplexity on WikiText-2"] = ["eval_ppl.py", *others[:1], out, "--data", "wikitext-2"]

    lines = [f"The student is in the folder {out}/, and transformers opens it:",
             f"  AutoModelForCausalLM.from_pretrained({out!r})",
             "Next:"]
    for title, words in steps.items():
        lines += [f"# {title}", command(*words)]
    return "\n".join(lines)


def is_at_home():
    return Path.cwd().resolve() == ROOT


def full_path(name):
    """A model for `command`, which starts in the project's folder: Hub names stay as they are."""
    return str(name) if is_at_home() or not Path(name).exists() else str(Path(name).resolve())


def command(*words, here=False):
    """A Python command to paste into a shell, which starts in the project's folder; broken at 80 columns.
    here: it starts where this one did."""
    start = [] if here or is_at_home() else ["cd", shlex.quote(str(ROOT)), "&&"]
    lines = [" "]
    for word in [*start, "python", *map(shlex.quote, words)]:
        if len(f"{lines[-1]} {word} \\") > WIDTH:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return "\n".join(lines)
