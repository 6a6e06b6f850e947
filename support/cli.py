"""What every command shares: flags that explain themselves, and mistakes that end in one clear line.

  InputError     the user's mistake, in one line that names the thing and the fix
  run_cli        runs a command: every way in which it can end, and with which exit code
  new_parser     argparse with a --help that reads well; what it refuses is an InputError
  checked        the type of a flag whose value has a range
  user_path      the type of a flag that names a file, a folder or a model
  pick_device    what --device stands for
  lookalike      the file or folder here that a misspelt name probably means
  format_table   rows of figures as Markdown
"""
from support.start import loaded

import argparse
import codecs
import contextlib
import difflib
import os
import re
import sys
import textwrap
from pathlib import Path


class InputError(ValueError):
    """The user's mistake: one line that names the thing and the fix.

    One line whatever the thing is called: names come from files, of any length, with any letter in them.
    """

    def __init__(self, message):
        super().__init__(one_line(message))


# ------------------------------------------------------------------------------------ how a command ends
def run_cli(main):
    """Run a command.

    Exit codes: 2 after an InputError or where the system refuses (a full disk, no permission), each one line
    on stderr; 130 after Ctrl-C; 141 where who reads the output has gone (`| head`), without a word.
    """
    loaded()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams have no encoding to fail in
            stream.reconfigure(errors="spell")

    try:
        try:
            main()
        finally:
            # Not left to the interpreter: what goes wrong in its last moments cannot be caught.
            if sys.stdout:
                sys.stdout.flush()
        return
    except InputError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, ""
    except BrokenPipeError:
        code, message = 141, ""  # 128 + SIGPIPE, what a shell reports of `cat`
    except OSError as error:
        where = error.filename or "standard output, or another file without a name"
        code, message = 2, f"{where}: {error.strerror or error}"

    with contextlib.suppress(OSError):  # stderr may be as full as stdout
        if message:
            print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    discard_output()
    sys.exit(code)


def discard_output():
    """Point what cannot be written to nowhere: otherwise its rest fails once more when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())


def one_line(message):
    """A message as one line of bearable length: 'no folder a\\nb' (a line break) -> 'no folder a\\\\nb'."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return shown if len(shown) <= 1000 else f"{shown[:700]} ... {shown[-200:]}"


SPELT = {"²": "^2", "±": "+-"}


def spell(error):
    """What to write for letters that a console's encoding lacks: ² -> ^2, others escaped: 日 -> \\u65e5."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start:error.end]
    written = [SPELT.get(c) or c.encode("ascii", "backslashreplace").decode() for c in letters]
    return "".join(written), error.end


codecs.register_error("spell", spell)


# ------------------------------------------------------------------------------------ flags
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an InputError, with the nearest flag to one that does not exist."""

    def error(self, message):
        message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1 ", message)
        if message.startswith("unrecognized"):
            unknown = re.findall(r"(?<!\S)--?[\w-]+", message)
            near = [difflib.get_close_matches(flag, self._option_string_actions, n=1) for flag in unknown]
            names = [match for matches in near for match in matches]
            message += f" (did you mean {', '.join(names)}?)" if names else ""
        raise InputError(f"{message}; see --help")


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs, leaves indented lines alone, and shows the defaults that say something."""

    def _fill_text(self, text, width, indent):
        paragraphs = text.split("\n\n")
        filled = [part if part.startswith(" ") else textwrap.fill(" ".join(part.split()), width)
                  for part in paragraphs]
        return "\n\n".join(filled)

    def _get_help_string(self, action):
        silent = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        if silent or action.default in ("", []) or not action.option_strings or "%(default)" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"


def new_parser(doc, usage="%(prog)s [options]"):
    """A parser for the script whose docstring is `doc`.

    --help shows its first paragraph and its examples, the indented lines that start with `python`: keep those
    under 80 columns, and put flags into groups.
    """
    first, *others = (doc or "").strip().split("\n\n")
    examples = [part for part in others if part.startswith("    python")]
    parser = Parser(
        usage=usage, description=first, epilog="\n\n".join(examples), formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=version())
    return parser


def version():
    """From pyproject.toml, the one place that has it."""
    try:
        text = Path(__file__).parent.parent.joinpath("pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    return found.group(1) if found else "unknown"


def checked(kind, wanted, good):
    """The type of a flag: checked(int, "1 or more", lambda n: n >= 1) makes an int of "3" and refuses "0"."""
    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if good(value):
                return value
        raise argparse.ArgumentTypeError(f"{text:.40}: must be {wanted}")
    return convert


def user_path(text):
    """Turn ~/x into /home/me/x: in --out=~/x the shell leaves the ~ alone, and so does Python's open."""
    return os.path.expanduser(text)


def pick_device(name):
    """--device -> a device of PyTorch that works here; "auto": the first of cuda, mps, cpu that is there."""
    import torch
    there = ["cpu"]
    if torch.backends.mps.is_available():
        there.insert(0, "mps")
    if torch.cuda.is_available():
        there.insert(0, "cuda")
    if name == "auto":
        return there[0]

    try:
        torch.zeros(1, device=name).item()  # fails on `meta`, too, which computes nothing
        return name
    except Exception as error:  # of a dozen classes, with messages of a dozen lines
        raise InputError(f"--device {name}: there is no such device here, only {', '.join(there)}") from error


def lookalike(name, known=()):
    """The name of what is here, or one of the names `known`, that a misspelt name probably means; or None.

    "demo/techer" -> "demo/teacher"
    """
    folder, slash, last = str(name).rstrip("/").rpartition("/")
    try:
        here = [entry.name for entry in Path(folder + slash).iterdir()]
    except OSError:
        here = []
    if near := difflib.get_close_matches(last, here, n=1, cutoff=0.8):
        return folder + slash + near[0]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
    return near[0] if near else None


# ------------------------------------------------------------------------------------ tables
def format_table(rows):
    """Rows (dicts with the same keys) as a Markdown table that lines up in a terminal, too; "" of no rows."""
    def show(value):
        form = {int: ",", float: ".4f"}.get(type(value), "")
        return " ± ".join(map(show, value)) if isinstance(value, tuple) else format(value, form)

    if not rows:
        return ""
    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    width, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width, *("-" * (w - 1) + ":" for w in widths)])
    lines = (" | ".join([name.ljust(width), *map(str.rjust, row, widths)]) for name, *row in cells)
    return "\n".join(f"| {line} |" for line in lines)
