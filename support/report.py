"""Everything that a run of distill.py says to its user, in 80 columns, in this order:

  print_plan            what is about to happen
  warn_of_unknown_text  how well the teacher knows this text, and whether it should first be tuned on it
  open_progress         one bar for everything that the command will do
  about_control         the second training begins
  close                 the tables, what they mean, what the models write, what to do next; it also writes
                        results.json for other programs, and the model card (README.md)
  show_again            the same without the texts, for a run that was finished earlier
"""
import json
import math
import platform
import shlex
import textwrap
from functools import partial
from itertools import combinations, groupby, takewhile
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
    advice = "it knows such text"
    if bits > ENOUGH_BITS:
        advice = ("it may have little to teach. Unless you have done so, train it on this text first "
                  "(README.md, \"Your own text\")")
    say(filled(f"teacher    needs about {bits:.2f} bits per byte of this text: {advice}", indent=" " * 11))


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
    # The student's own loss, and each difference of two models, with their noise.
    gaps = {"student": difference(scores, [*networks].index("student"))}
    gaps |= {f"{b} - {a}": difference(scores, j, i)
             for (i, a), (j, b) in combinations(enumerate(networks), 2)}
    if "teacher" in rows:
        said = verdict(args, gaps, got_worse(args, rows, gaps))
    else:
        said = before_and_after(args, rows["student"]["loss"])
    settings = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING}
    results = {"objective": args.objective, "settings": settings, "rows": rows, "differences": gaps,
               "verdict": said}
    write_card(args, ranks, results)
    # JSON has no infinity, which the perplexity of a diverged model can be: null takes its place.
    without_infinity = json.loads(json.dumps(results), parse_constant=lambda name: None)
    with replaced(Path(args.out, RESULTS)) as file:  # last: a run that has it is finished
        file.write_text(json.dumps(without_infinity, indent=2) + "\n", encoding="utf-8")

    parts = [summary(results), next_steps(args, results)]
    if not args.compile:  # which would compile each length of a text anew
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
SIZE = ("parameters", "acceptance")
ABOUT_ACCEPTANCE = ("Acceptance is the share of tokens that the teacher would keep if this model drafted "
                    "them (speculative decoding).")


def summary(results):
    """How good the models are, what that means, how large they are."""
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
NO_CONTROL = ("Whether the teacher helped, only a control can tell: repeat the command with --resume "
              "--control.")
NOISE = ("± is two standard errors on this held-out text. Other held-out text would move every loss by up to "
         "{:.3f}, but all of them together. A different seed adds its own noise: about 0.004 in the demo.")
TOO_SHORT = "The held-out text is too short to know its noise, so everything counts as a tie: take more text."


def verdict(args, gaps, worse):
    """The table in words; what lies within the noise of the held-out text is a tie.

    gaps: {"control - student": (nats, two standard errors), ...}; "student" is the student's own loss.
    worse: the sentences of got_worse.
    """
    said = []
    caveat = NO_CONTROL
    if gain := gaps.get("control - student"):
        said = [compared(gaps, "student", "control")]
        if not worse or sign(gain) != 1:
            said.append(WORTH[sign(gain)])
        caveat = effort(args)
    said += [*worse, compared(gaps, "teacher", "student")]

    # A share of the gap to the teacher makes sense only for a student between a fair control and its teacher.
    if gain and not worse and sign(gain) == sign(gaps["student - teacher"]) == 1:
        closed = gain[0] / gaps["control - teacher"][0]
        said.append(f"The student closes {closed:.0%} of the gap between control and teacher.")

    noise = gaps["student"][1]
    about_noise = NOISE.format(noise) if math.isfinite(noise) else TOO_SHORT
    return filled(" ".join(said)) + "\n" + filled(f"{caveat} {about_noise}")


def got_worse(args, rows, gaps):
    """Sentences on the runs whose held-out loss was better on the way, beyond the noise."""
    _, noise = gaps["control - student" if "control" in rows else "student - teacher"]
    said = []
    for run in runs_of(args):
        end = rows[run.role]["loss"]
        best = min(on_the_way(run), key=lambda row: row["loss"], default={"loss": end})
        if end - best["loss"] > noise:
            said.append(f"The {run.role} got worse after step {best['step']:,.0f}, where it had "
                        f"{best['loss']:.3f}: it has read the text too often. Compare it at its best.")
    return said


def before_and_after(args, end):
    """Whether a training without a teacher helped. end: its loss."""
    rows = on_the_way(args)
    if not rows or rows[0]["step"]:  # the log is damaged
        return ""
    said = f"Held-out loss: before {rows[0]['loss']:.3f}, after {end:.3f}."
    best = min(rows, key=lambda row: row["loss"])
    if end - best["loss"] > 0.01:
        said += f" It was best after step {best['step']:,.0f}, {best['loss']:.3f}: take fewer --steps."
    return said


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
    return f"The control had rate {alone.lr:g}{how}."


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
        text = [*takewhile(corpus.eot.__ne__, written[0, len(opening):].tolist())]
        lines.append(titled(f"the {name}", tokenizer.decode(text)))
    return "\n".join(lines)


def passage(corpus, tokenizer, before=128, after=60):
    """Ids from the middle of the longest held-out document, and the next ones. The first part ends with a
    colon at the end of a line if it can: in code that opens a block, so there is something to write."""
    start = corpus.val[:100_000].tolist()
    documents = [[*ids] for is_eot, ids in groupby(start, corpus.eot.__eq__) if not is_eot]
    ids = max(documents, key=len)
    middle = (len(ids) + 1) // 2
    words = [tokenizer.decode([token]) for token in ids[:middle + 1]]
    opens = [i for i in range(max(1, middle - before), len(words))
             if words[i - 1].endswith(":") and words[i].startswith("\n")]
    cut = opens[-1] if opens else middle
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
    steps = {"see what they write": ["sample.py", "--model", out, *compare, "--num", "3"],
             "draw the losses": ["-m", "extras.plot", out]}
    if others:
        steps["compare them token by token, on a page"] = ["-m", "extras.play", out]

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


def command(*words):
    """A Python command to paste into a shell; it works from any folder."""
    start = "" if is_at_home() else f"cd {shlex.quote(str(ROOT))} && "
    return f"  {start}{shlex.join(['python', *words])}"
