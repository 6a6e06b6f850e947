"""Everything that a run of distill.py says to its user, in 80 columns, in this order:

  print_plan            what is about to happen
  warn_of_unknown_text  whether the teacher should be tuned on this text first
  open_progress         one bar for everything that the command will do
  peak_memory           how much memory the first step took
  about_control         what the second training is for
  close                 the table, what it means, what the models write, what to do next; it also writes
                        results.json, which other programs can read, and the model card (README.md)
  show_again            the table, what it means and what to do next, for a run that was finished earlier
"""
import copy
import json
import math
import platform
import shlex
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import torch

from support import ROOT
from support.cli import format_table, open_bar, reading, say
from support.files import replaced
from support.flags import CONTROLS_TRIED, control_of
from support.ranks import autocast
from support.run import CHANGES_NOTHING, RESULTS, published, read_log, read_settings, seconds_of
from support.scoring import (
    FEW_PARTS,
    PARTS,
    difference,
    held_out_batches,
    score_held_out,
    table_rows,
    validate,
)

WIDTH = 80


def filled(text, indent=""):
    """A paragraph in lines of at most 80 columns; paths and other long words stay whole."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False,
                         break_on_hyphens=False)


# ------------------------------------------------------------------------------------ before the training
MANY_PASSES = 10  # over the same text: above this the plan warns


def print_plan(args, teacher, student, corpus, ranks):
    """What is about to happen, a line for each part of it."""
    def line(title, text):
        say(filled(f"{title:10} {text}", indent=" " * 11))

    for role, name, network in (("teacher", args.teacher, teacher), ("student", origin(args), student)):
        if network:
            millions = network.num_parameters() / 1e6
            line(role, f"{name}: {len(network.blocks)} layers, {millions:.1f}M parameters")
    if teacher:
        line("control", "afterwards, the same student learns from the text alone" if args.control else
             "none; --control also trains the same student on the text alone")

    tokens = args.grad_accum * args.batch_size * args.seq_len
    passes = passes_over_text(args, corpus)
    line("objective", args.objective)
    line("data", f"{args.data}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out")
    line("steps", f"{args.steps:,} of {args.grad_accum} x {args.batch_size} x {args.seq_len} = {tokens:,} "
                  f"tokens: {passes:.2g} passes over the text")
    line("rate", f"{args.lr:g}, {args.schedule} after {args.warmup:.0%} warm-up")
    line("on", f"{ranks.world} x {ranks.device}, {args.precision}; everything goes to {args.out}/")

    if passes > MANY_PASSES:
        enough = math.ceil(args.steps * MANY_PASSES / passes)
        line("warning", f"each part of the text is read {passes:.0f} times, so the student may learn it by "
                        f"heart: take more text, or --steps {enough}")
    if args.precision == "bf16-pure":
        line("warning", "bf16-pure: weights and sums of gradients lose small updates (see the README)")


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


ENOUGH_BITS = 2.0  # per byte
ENOUGH_TOKENS = 2048  # held-out tokens that show whether the teacher needs more


def warn_of_unknown_text(args, teacher, corpus, tokenizer):
    """Before time is spent: if the teacher does not know this kind of text, ask about tuning it first.

    The rule: it needs more than 2 bits for each byte. The demo's teacher needs 1.2 on Python modules that it
    has not seen, 2.2 on English and more than 3 on shell scripts. A fixed limit holds for texts of all sizes;
    a compressor is not a yardstick, as it needs 3.3 bits for English of 8 kB and 1.9 for English of 1 MB.
    """
    its_text = (read_settings(args.teacher) or {}).get("data")  # if the teacher comes from a run
    has_been_tuned = its_text is not None and Path(its_text).resolve() == Path(args.data).resolve()
    if teacher is None or not args.kd_weight or args.resume or has_been_tuned:
        return
    few = copy.copy(args)
    few.eval_tokens = ENOUGH_TOKENS
    few.batch_size = 1
    row, = validate([teacher], corpus, tokenizer.vocab_size, few, autocast(args, teacher.head_weight.device))
    bits = row["bits per byte"]
    if bits <= ENOUGH_BITS:
        return

    tuned = unused("tuned-teacher" if is_at_home() else str(Path("tuned-teacher").resolve()))
    again = ["--teacher", tuned, "--recipe", args.recipe, "--out", unused(args.out)]
    if args.teacher_cache:
        again += ["--teacher-cache", unused(args.teacher_cache)]
    say("\n" + filled(
        f"warning    This teacher needs {bits:.2f} bits for each byte of this text. A teacher that knows a "
        f"text needs about 1, and one that needs more than {ENOUGH_BITS:g} may have little to teach. Should "
        "it be tuned first? This trains the teacher itself on the text:"))
    say(command("python", "distill.py", *tuning_flags(args, tuned)))
    say("and then the same command as now, with\n" + broken(again) + "\n")


def tuning_flags(args, out):
    """Flags that train the teacher itself on the text of this run."""
    flags = ["--teacher", "none", "--student", full_path(args.teacher), "--data", full_path(args.data),
             "--data-folder", full_path(args.data_folder), "--out", out]
    for name in ("text_column", "packing", "seq_len", "batch_size", "grad_accum", "steps"):
        flags += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    return flags


def unused(name):
    """The name of a folder that does not exist yet: out -> out-2."""
    free, n = name, 2
    while Path(free).exists():
        free, n = f"{name}-{n}", n + 1
    return free


# ------------------------------------------------------------------------------------ during the training
def open_progress(args, ranks, corpus):
    """One bar over the micro-batches of everything that this command will do: the student's, the control's,
    and the batches of held-out text that are scored at the end. Only the first process shows it."""
    runs = [args]
    if args.control and args.teacher != "none":
        runs.append(control_of(args))
    total = sum(run.steps * len(ranks.share(run.grad_accum)) for run in runs)
    total += sum(1 for _ in held_out_batches(corpus, args, "cpu"))
    title = "distilling" if args.kd_weight or args.cos_weight else "training"
    return open_bar(title=title, total=total, unit="batch", disable=not ranks.is_first)


def peak_memory(device):
    """A line on the memory that was needed so far; "" where the system does not tell."""
    if device.type == "cuda":
        n_bytes = torch.cuda.max_memory_reserved(device)
    elif device.type == "mps":
        n_bytes = torch.mps.driver_allocated_memory()
    else:
        try:
            import resource
        except ImportError:  # Windows
            return ""
        unit = 1 if sys.platform == "darwin" else 1024
        n_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"memory     {n_bytes / 1e9:.2f} GB at most, up to the end of the first step"


def about_control(args):
    """What the second training of a run is for. args: the control's."""
    say("\n" + filled(
        "The control now learns from the same number of tokens, but from the text alone. Where the student "
        f"does better, the teacher made the difference. {args.steps:,} steps of {sequences(args)} sequences, "
        f"rate {args.lr:g}."))


def sequences(args):
    """How many a step has."""
    return args.batch_size * args.grad_accum


# ------------------------------------------------------------------------------------ the end
def close(args, networks, corpus, tokenizer, ranks, draw, bar=None):
    """Score all models on the same held-out text, write the card and results.json, and say what came out.

    networks: {"teacher": ..., "student": ..., "control": ...}, of which only the student has to be there.
    draw: sample.draw, which chooses the tokens of the texts.
    """
    models = [*networks.values()]
    context = autocast(args, ranks.device)
    scores = score_held_out(models, corpus, tokenizer.vocab_size, args, context, bar)  # (M, 6, W)
    if bar is not None:
        bar.close()

    rows = dict(zip(networks, table_rows(models, scores, corpus), strict=True))
    if not args.compile:  # which would compile each length of a text anew
        add_speed(rows, networks, corpus.eot)
    gaps = all_differences([*networks], scores)
    results = {
        "objective": args.objective,
        "settings": {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING},
        "rows": rows,
        "differences": gaps,
        "verdict": verdict(args, gaps, scores.size(-1)),
    }
    write_card(args, ranks, results)
    without_infinity = json.loads(json.dumps(results), parse_constant=lambda name: None)
    with replaced(Path(args.out, RESULTS)) as file:  # last: a run that has it is finished
        file.write_text(json.dumps(without_infinity, indent=2) + "\n", encoding="utf-8")

    story = "" if args.compile else texts(networks, corpus, tokenizer, draw)
    say("\n" + "\n\n".join(filter(None, [*summary(results), story, next_steps(args, results)])))


def show_again(args):
    """The same without the texts, from the results.json of a finished run."""
    path = Path(args.out, RESULTS)
    with reading(path, "the results of a run"):
        results = json.loads(path.read_bytes())
        text = "\n\n".join(filter(None, [*summary(results), next_steps(args, results)]))
    say(f"{args.out} contains this run already, and it is finished. Its results:\n")
    say(text)


QUALITY = ("loss", "perplexity", "bits per byte", "KL to teacher", "same top-1")
SIZE = ("parameters", "MB as float32", "tokens per second", "acceptance")
ABOUT_SPEED = "Speed is that of writing one text, the likeliest token each time."
ABOUT_ACCEPTANCE = (" Acceptance is the share of tokens that the teacher would keep if this model drafted "
                    "them (speculative decoding).")


def summary(results):
    """Paragraphs: how good the models are, what that means, how large and fast they are."""
    quality, size = (
        format_table([{"model": name} | {column: row[column] for column in columns if column in row}
                      for name, row in results["rows"].items()])
        for columns in (QUALITY, SIZE))
    about = ABOUT_SPEED + (ABOUT_ACCEPTANCE if "teacher" in results["rows"] else "")
    return [quality, results["verdict"], f"{size}\n{filled(about)}"]


# ------------------------------------------------------------------------------------ what the table means
def all_differences(names, scores):
    """{"control - student": (nats, two standard errors), ...}; {"student": ...} is the student's own loss."""
    found = {"student": difference(scores, names.index("student"))}
    for i in range(len(names)):
        for j in range(i):
            found[f"{names[i]} - {names[j]}"] = difference(scores, i, j)
    return found


def verdict(args, gaps, n_pieces):
    """The table in words. What lies within the noise of the held-out text is a tie. gaps: all_differences."""
    if "student - teacher" not in gaps:
        return ""
    paragraphs = [compared_with_teacher(gaps)]
    if "control - student" in gaps:
        worth = {
            1: "That is what the teacher was worth.",
            0: "On this text no gain from the teacher shows.",
            -1: "Text alone was worth more than this teacher.",
        }[sign(gaps["control - student"])]
        first = compared(gaps, "student", "control")
        paragraphs = [f"{first} {worth} {compared_with_teacher(gaps)}", effort(args)]
    else:
        paragraphs.append("Only a control tells how much of that came from the teacher: this command with "
                          "--resume --control trains one.")

    n_parts = min(PARTS, n_pieces)
    noise = (f"± is two standard errors over {n_parts} parts of the held-out text; a different seed adds "
             f"noise of its own. (Each loss alone is only known to ± {gaps['student'][1]:.3f}, but all "
             "models read the same text.)")
    if n_parts < FEW_PARTS:
        noise = ("The held-out text is too short to know its noise, so everything counts as a tie: take more "
                 "text.")
    return "\n".join(map(filled, [*paragraphs, noise]))


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
    return {
        1: f"The {a} is {amount(gap)} better than the {b}.",
        0: f"The {a} and the {b} are tied, {amount(gap)} apart.",
        -1: f"The {b} is {amount(gap)} better than the {a}.",
    }[sign(gap)]


def compared_with_teacher(gaps):
    """Where the student is between control and teacher, or who of the two has passed the teacher."""
    behind = gaps["student - teacher"]
    worth = gaps.get("control - student", (0, 0))
    gap = gaps.get("control - teacher", (0, 0))
    if sign(worth) == sign(behind) == sign(gap) == 1:
        return (f"It closes {worth[0] / gap[0]:.0%} of the gap between control and teacher, which is "
                f"{amount(gap)}.")

    sentences = [compared(gaps, "teacher", "student")]
    if sign(gap) == -1:
        sentences.append(compared(gaps, "teacher", "control"))
    if sign(behind) == -1 or sign(gap) == -1:
        sentences.append("A model can pass the teacher if it was trained on text of this kind and the "
                         "teacher was not; then there is no gap to close.")
    return " ".join(sentences)


def effort(args):
    """How good a control it was: its settings, and how they were chosen."""
    alone = control_of(args)
    settings = f"The control had rate {alone.lr:g} and {sequences(alone)} sequences a step"
    if args.is_demo:
        return f"{settings}, the best of {CONTROLS_TRIED} settings that were tried (docs/atlas.md)."
    if args.control_lr is None and args.control_batch_size is None:
        return f"{settings}, like the student; --control-lr gives it a rate of its own."
    return f"{settings}."


# ------------------------------------------------------------------------------------ size and speed
SPEED_SECONDS = 1.0  # of writing, for each model


def add_speed(rows, networks, eot):
    """Add megabytes and tokens per second to the rows. All models write in the precision of the first one's
    weights and are counted in one precision: files of different ones would not compare."""
    dtype = next(iter(networks.values())).head_weight.dtype
    for name, network in networks.items():
        rows[name]["MB as float32"] = round(4 * network.num_parameters() / 1e6)
        if name == "control":  # the student's shape, so the student's speed
            rows[name]["tokens per second"] = rows["student"]["tokens per second"]
            continue
        if network.head_weight.dtype != dtype:
            network = copy.deepcopy(network).to(dtype)
        rows[name]["tokens per second"] = round(writing_speed(network, eot))


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

Made with distil-from-scratch. Teacher: {teacher}. Student: {origin}.

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
    about = {"teacher": "none", "tags": "", "made": "trained", "inherited": ""}
    if args.teacher != "none":
        about = {"teacher": f"`{args.teacher}`", "tags": "\ntags: [distillation]", "made": "distilled",
                 "inherited": INHERITED}

    rows = read_log(Path(args.out, "log.csv"))
    about["tokens"] = int(sum(row["tokens"] for row in rows))
    about["hours"] = seconds_of(rows) / 3600
    about["ranks"] = ranks.world
    about["hardware"] = f"{platform.machine()} CPU"
    if ranks.device.type == "cuda":
        about["hardware"] = torch.cuda.get_device_name()

    about |= {"origin": origin(args), "results": "\n\n".join(filter(None, summary(results)))}
    with published(args.out) as folder:
        # A file name can contain bytes that are not characters; the card must not fail because of them.
        (folder / "README.md").write_text(CARD.format(**vars(args) | about), "utf-8", errors="replace")


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
    ids = corpus.val[:100_000].tolist()
    bounds = [-1, *(i for i, token in enumerate(ids) if token == corpus.eot), len(ids)]
    documents = [(bound + 1, end) for bound, end in zip(bounds, bounds[1:], strict=False) if end > bound + 1]
    enough = 2 * (before + after)
    start, end = max(documents, key=lambda document: min(document[1] - document[0], enough))

    cut = middle = (start + end + 1) // 2
    for i in range(max(start + 1, middle - before), middle + 1):
        before_it, token = (tokenizer.decode(ids[j:j + 1]) for j in (i - 1, i))
        if token.startswith("\n") and (before_it.endswith(":") or cut == middle):
            cut = i
    return ids[max(start, cut - before):cut], ids[cut:min(end, cut + after)]


def titled(title, text, which=slice(3)):
    """Three lines of a text, of those that are not blank, beside a title; each is cut to the width."""
    lines = [line.expandtabs(4) for line in text.splitlines() if line.strip()] or [""]
    shown = []
    for line in lines[which]:
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        line = f"{'' if shown else title:18}{line}".rstrip()
        shown.append(line if len(line) <= WIDTH else line[:WIDTH - 4] + " ...")
    return "\n".join(shown)


# ------------------------------------------------------------------------------------ what to do next
def next_steps(args, results):
    """Where the student is, and commands to paste."""
    out = full_path(args.out)
    others = [full_path(args.teacher)] if "teacher" in results["rows"] else []
    if "control" in results["rows"]:
        others.append(full_path(Path(args.out, "control")))
    compare = ["--compare", *others] if others else []

    steps = [("what they write", ["sample.py", "--model", out, *compare, "--num", "3"])]
    if not Path(args.out, "loss.png").exists():
        steps.append(("a picture of the losses", ["-m", "extras.plot", out]))
    if "teacher" in results["rows"]:
        steps.append(("a page that compares them token by token", ["-m", "extras.play", out]))
    if args.recipe == "demo" and args.data == "stdlib":
        steps.append(("the same on your own text", ["distill.py", "--data", "my_texts/", "--out", "mine"]))
    elif args.recipe != "demo" and not args.data.startswith("wikitext"):
        steps.append(("perplexity on WikiText-2", ["eval_ppl.py", *others[:1], out]))

    lines = [f"The student is in {out}, and transformers opens it:",
             f"  AutoModelForCausalLM.from_pretrained({out!r})", "Next:"]
    for title, words in steps:
        lines += [f"# {title}", command("python", *words)]
    return "\n".join(lines)


def is_at_home():
    return Path.cwd().resolve() == ROOT


def full_path(name):
    """A model for `command`, which starts in the project's folder: Hub names stay as they are."""
    return str(name) if is_at_home() or not Path(name).exists() else str(Path(name).resolve())


def command(*words):
    """A shell command to paste, which starts in the project's folder."""
    start = [] if is_at_home() else ["cd", str(ROOT), "&&"]
    return broken([*start, *words])


def broken(words):
    """Words of a command, quoted and broken at 80 columns."""
    lines = [" "]
    for word in words:
        word = word if word == "&&" else shlex.quote(word)
        if len(f"{lines[-1]} {word} \\") > WIDTH and lines[-1].strip():
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {word}"
    return "\n".join(lines)
