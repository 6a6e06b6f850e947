"""What is said at the end of a run: what its numbers mean, what the models write, what to do next.

  verdict        the table in words: what the teacher was worth, against how good a control
  unknown_text   whether the teacher knows this text, and what to do if it does not
  show_texts     how each model goes on from the same words
  picture        loss.png, where it can be drawn
  next_steps     commands to paste
"""
import importlib.util
import lzma
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from support.log import read_log, seconds_of
from support.options import CONTROLS_TRIED, ROOT, control_of, is_shipped_demo


# ------------------------------------------------------------------------------------ what the table means
def verdict(rows, args):
    """{"teacher": row, "student": row, perhaps "control": row} of the table -> a sentence or two."""
    losses = {name: row["loss"] for name, row in rows.items()}
    if "teacher" not in losses:
        return ""
    teacher, student = losses["teacher"], losses["student"]
    if "control" not in losses:
        return (f"The student is {student - teacher:+.3f} nats from its teacher. How much of what it knows\n"
                "came from there, only a control tells: --control")

    control = losses["control"]
    if student >= control:
        return (f"The control did better than the student, by {student - control:.3f} nats:\n"
                f"text alone was worth more than this teacher.\n{effort(args)}")
    if control <= teacher:
        return (f"The student beats the control by {control - student:.3f} nats;\n"
                f"but both beat the teacher, so there is no gap to close.\n{effort(args)}")

    share = (control - student) / (control - teacher)
    return f"The student closes {share:.0%} of the gap between control and teacher.\n{effort(args)}"


def effort(args):
    """How good a control it was: what it had, and how that was chosen."""
    alone = control_of(args)
    had = f"The control had rate {alone.lr:g} and {sequences(alone)} sequences a step"
    if is_shipped_demo(args):
        return f"{had},\nchosen among {CONTROLS_TRIED} settings that were tried: docs/atlas.md"
    if args.control_lr is None and args.control_batch_size is None:
        return f"{had},\nthe student's; --control-lr gives it a rate of its own."
    return f"{had}."


def about_control(control_args):
    """What the second training of a run is for."""
    return ("The control now learns from as many tokens, but from the text alone: what the\n"
            "student does better is what the teacher was worth.\n"
            f"Rate {control_args.lr:g}, {control_args.steps:,} steps of {sequences(control_args)} sequences.")


def sequences(args):
    """How many a step has."""
    return args.batch_size * args.grad_accum


def unknown_text(args, rows, text):
    """A warning if the teacher does not know the held-out text that was scored, else "".

    The rule: it does not if xz, which knows no language at all, packs the text into fewer bits than the
    teacher needs, or if the student or the control, though smaller, has passed it. A student cannot learn
    from a teacher what the teacher does not know.
    """
    if "teacher" not in rows:
        return ""
    why = ""
    for name, row in rows.items():
        if name != "teacher" and row["loss"] < rows["teacher"]["loss"]:
            why = f"the {name} passes it on this text"
    if (bits := rows["teacher"]["bits per byte"]) > (packed := bits_of_xz(text)):
        why = f"it needs {bits:.2f} bits for a byte of this text, and xz only {packed:.2f}"
    return f"This teacher does not know this text: {why}.\n{tuning(args)}" if why else ""


def bits_of_xz(text):
    """Bits per byte of a text, as xz packs it."""
    data = text.encode("utf-8", "replace")
    return 8 * len(lzma.compress(data, preset=6)) / max(1, len(data))


def tuning(args):
    """What the field does then: train the teacher itself on the text first."""
    flags = {
        "--teacher": "none", "--student": args.teacher, "--data": args.data, "--seq-len": args.seq_len,
        "--batch-size": args.batch_size, "--grad-accum": args.grad_accum, "--steps": args.steps,
        "--out": "tuned-teacher"}
    if args.data_folder != "corpora":
        flags["--data-folder"] = args.data_folder
    if args.text_column != "text":
        flags["--text-column"] = args.text_column
    line = " ".join(f"{flag} {quote(value)}" for flag, value in flags.items())
    return ("Usually one tunes the teacher on the text first, and distils from that:\n"
            f"  python distill.py {line}\n"
            f"  and then this command again with --teacher tuned-teacher --recipe {args.recipe}")


# ------------------------------------------------------------------------------------ what the models write
@torch.no_grad()
def show_texts(networks, corpus, tokenizer, draw):
    """Lines: the start of a held-out document, how it goes on, and what each model writes there.

    draw: sample.draw. All draw with the same seed: the likeliest token, again and again, leads small models
    in circles.
    """
    opening, rest = document(corpus, tokenizer)
    lines = [two_lines("After the words", tokenizer.decode(opening)),
             two_lines("the text has", tokenizer.decode(rest))]
    for name, network in networks.items():
        device = network.head_weight.device
        ids = torch.tensor([[corpus.eot, *opening]], device=device)
        choose = partial(draw, temperature=0.8, generator=torch.Generator(device).manual_seed(0))
        written = network.generate(ids, len(rest), choose)[0, ids.size(1):].tolist()
        if corpus.eot in written:
            written = written[:written.index(corpus.eot)]
        lines.append(two_lines(f"the {name}", tokenizer.decode(written)))
    return "\n".join(lines)


def document(corpus, tokenizer, before=32, after=60):
    """A held-out document's first ids and the next ones; the first document that is long enough, if any. The
    first ones end with a line where they can."""
    ids = corpus.val[:100_000].tolist()
    starts = [i + 1 for i in range(len(ids)) if ids[i] == corpus.eot] or [0]
    ends = [*(start - 1 for start in starts[1:]), len(ids)]
    long = [start for start, end in zip(starts, ends, strict=True) if end - start >= before + after]
    start = long[0] if long else starts[0]
    before = min(before, len(ids) - start)
    ends_of_lines = [i for i in range(8, before) if tokenizer.decode([ids[start + i]]).endswith("\n")]
    cut = start + (ends_of_lines[-1] + 1 if ends_of_lines else before)
    return ids[start:cut], ids[cut:cut + after]


def two_lines(title, text):
    """The first two lines of a text that are not blank, beside a title, each cut to the terminal's width."""
    width = shutil.get_terminal_size().columns
    lines = [line.expandtabs(4) for line in text.splitlines() if line.strip()] or [""]
    shown = []
    for first, line in zip((title, ""), lines, strict=False):
        line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
        line = f"{first:18}{line}".rstrip()
        shown.append(line if len(line) < width else line[:width - 5] + " ...")
    return "\n".join(shown)


# ------------------------------------------------------------------------------------ what to do next
WORTH_A_PICTURE = 60  # seconds of training; drawing takes a few


def picture(args):
    """The path of the run's loss.png, drawn now; None where matplotlib is missing, or after a short run.

    A process of its own draws it, as nothing that trains may need matplotlib, or fail because of it.
    """
    if seconds_of(read_log(Path(args.out, "log.csv"))) < WORTH_A_PICTURE:
        return None
    if not importlib.util.find_spec("matplotlib") or not (ROOT / "extras" / "plot.py").exists():
        return None
    path = Path(args.out, "loss.png")
    command = [sys.executable, "-m", "extras.plot", str(Path(args.out).resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    return path if done.returncode == 0 and path.exists() else None


def next_steps(args, networks, corpus, drawn):
    """Commands to paste: compare, see, score, and the same on text of one's own. `drawn`: of `picture`."""
    models = [args.out, *([str(Path(args.out, "control"))] if "control" in networks else [])]
    compared = models[1:]
    if "teacher" in networks:
        compared = [args.teacher, *compared]
        models = [args.teacher, *models]

    steps = [("what they write", "python sample.py --model " + quote(args.out)
              + (" --compare " + quote(*compared) if compared else "")),
             ("perplexity", f"python eval_ppl.py {quote(*models)} --data {quote(corpus.path)}"),
             ("a picture", f"python -m extras.plot {quote(args.out)}")]
    if drawn:
        steps[-1] = ("a picture", f"{drawn} has it")
    if "teacher" in networks and (ROOT / "extras" / "play.py").exists():
        steps.append(("token by token", f"python -m extras.play {quote(args.out)}"))
    if args.recipe == "demo":
        steps.append(("your own text", "python distill.py --data my_texts/ --out mine"))
    return "Next\n" + "\n".join(f"  {title:15}  {line}" for title, line in steps)


def quote(*values):
    """Words that a shell takes as they are."""
    return shlex.join(map(str, values))
