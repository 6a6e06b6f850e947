"""What every command shares: flags that explain themselves, and mistakes that end in one clear line.

  InputError     the user's mistake, in one line that names the thing and the fix
  reading        turns whatever a library raises about a file into an InputError
  run_cli        runs a command: every way in which it can end, and with which exit code
  new_parser     argparse with a --help that reads well; what it refuses is an InputError
  checked        the type of a flag whose value has a range
  lookalike      the file or folder that a misspelt name probably means
  open_bar       tqdm, or a line every 30 seconds where stderr is not a terminal
  format_table   rows of figures as Markdown
"""
import argparse
import contextlib
import difflib
import io
import os
import re
import sys

from support import ROOT, loading_is_over


class InputError(ValueError):
    """The user's mistake: one line that names the thing and the fix.

    It is one line whatever the thing is called: names come from files, and may have any length and character.
    """

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(message):
    """A message as one line of bearable length: 'no folder a\\nb' (a line break) -> 'no folder a\\\\nb'."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
    return shown if len(shown) <= 1000 else f"{shown[:700]} ... {shown[-200:]}"


# ------------------------------------------------------------------------------------ files from strangers
@contextlib.contextmanager
def reading(path, what):
    """While `path` is read as `what` ("a tokenizer"), every error becomes an InputError that says why.

    The libraries that read such files (json, torch, safetensors, pyarrow) raise a dozen classes of errors
    for damaged ones. This is the one place that knows them.
    """
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                start = file.read(40)
            if start.startswith(b"version https://git-lfs.github.com/"):  # left by a clone without git-lfs
                raise InputError(f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull`")
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} could not be read: {error.strerror or error}") from error
    except Exception as error:
        raise InputError(f"{path} is not {what}, or is damaged: {reason_of(error)}") from error


def reason_of(error):
    """What an error says, on one line, and its class where the message alone says little."""
    message = " ".join(str(error).split())[:300]
    if message and not isinstance(error, (LookupError, TypeError, AttributeError)):
        return message
    return f"{type(error).__name__} {message}".strip()


# ------------------------------------------------------------------------------------ how a command ends
def run_cli(main):
    """Run a command.

    Exit codes: 2 after an InputError, where the system refuses (a full disk, no permission) or where memory
    is short, each with one line on stderr; 130 after Ctrl-C; 141 if the output pipe was closed (`| head`).
    """
    loading_is_over()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the streams of a notebook need no encoding
            stream.reconfigure(errors="backslashreplace")  # characters that a console's encoding lacks

    try:
        try:
            main()
        finally:
            # Do not leave this to the interpreter: errors at its very end cannot be caught.
            if sys.stdout:
                sys.stdout.flush()
        return
    except InputError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, ""
    except BrokenPipeError:
        code, message = 141, ""  # 128 + SIGPIPE, as shells report it
    except OSError as error:
        where = error.filename or "standard output, or a file without a name"
        code, message = 2, f"{where}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code, message = 2, ("out of memory: take a smaller --batch-size (and more --grad-accum to keep the "
                            "size of a step), a shorter --seq-len, or a smaller model")

    if message and speaks():
        with contextlib.suppress(OSError):  # stderr may be as full as stdout
            print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    discard_output()
    sys.exit(code)


def is_out_of_memory(error):
    """Whether an error of Python or PyTorch, on whatever device, means that memory was short."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def speaks():
    """Whether this process says what went wrong. Until the processes of a `torchrun` have met, they all find
    the same mistake, and the first one speaks for all."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
        return True
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


def discard_output():
    """Send output that cannot be written to nowhere, or it would fail once more when Python ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())


# ------------------------------------------------------------------------------------ flags
class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is an InputError that suggests the nearest flag."""

    def error(self, message):
        message = re.sub(r"^argument (\S+?)(/\S+)?: ", r"\1 ", message)
        if message.startswith("unrecognized"):
            unknown = re.findall(r"(?<!\S)--[\w-]+", message)
            near = [match for flag in unknown
                    for match in difflib.get_close_matches(flag, self._option_string_actions, n=1)]
            message += f" (did you mean {', '.join(near)}?)" if near else ""
        raise InputError(f"{message}; see --help")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Fills paragraphs, leaves indented ones alone, and shows the defaults that say something."""

    def _fill_text(self, text, width, indent):
        return text if text.startswith(" ") else super()._fill_text(text, width, indent)

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False or action.default in ("", [])
        return action.help if silent or not action.option_strings else super()._get_help_string(action)


def new_parser(doc, usage="%(prog)s [options]"):
    """A parser for the script whose docstring is `doc`.

    --help shows its first paragraph and its examples, the indented lines that start with `python`. Flags have
    to be written in full: an abbreviation would change its meaning with the next flag that is added.
    """
    first, *others = (doc or "").strip().split("\n\n")
    examples = [part for part in others if part.startswith("    python")]
    parser = Parser(usage=usage, description=first, epilog="\n\n".join(examples),
                    formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=version())
    return parser


def version():
    """From pyproject.toml, the one place that has it."""
    path = ROOT / "pyproject.toml"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    return found[1] if found else "unknown"


def checked(kind, wanted, good):
    """The type of a flag: checked(int, "1 or more", lambda n: n >= 1) makes an int of "3" and refuses "0"."""
    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if good(value):
                return value
        raise argparse.ArgumentTypeError(f"{text:.40}: must be {wanted}")
    return convert


# The type of a flag that names a file, a folder or a model: in --out=~/x the shell leaves the ~ alone.
user_path = os.path.expanduser


def lookalike(name, known=()):
    """The name of something here, or one of the names `known`, that a misspelt name probably means; or None.

    "demo/techer" -> "demo/teacher"
    """
    folder, last = os.path.split(str(name).rstrip("/"))
    try:
        here = os.listdir(folder or ".")
    except OSError:
        here = []
    if near := difflib.get_close_matches(last, here, n=1, cutoff=0.8):
        return os.path.join(folder, near[0])
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
    return near[0] if near else None


# ------------------------------------------------------------------------------------ progress and tables
PLAIN_SECONDS = 30  # between two lines of progress in a file or a pipe


def open_bar(items=None, title="", **settings):
    """A tqdm bar on stderr; where that is not a terminal, a line every 30 seconds."""
    from tqdm import tqdm
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, title, dynamic_ncols=True, **settings)

    # By default a thread of tqdm also draws every 10 seconds, and the time is only looked at after as many
    # items as the last interval had, which takes long where later items are slower.
    tqdm.monitor_interval = 0
    return tqdm(items, title, file=Lines(), mininterval=PLAIN_SECONDS, delay=PLAIN_SECONDS, miniters=1,
                bar_format="{l_bar}{r_bar}", **settings)


class Lines(io.StringIO):
    """A file for tqdm whose text goes to stderr as lines, without carriage returns."""

    def write(self, text):
        if text.strip() and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # training does not end because stderr is full
                sys.stderr.write(text.strip().replace("||", "|") + "\n")  # where the bar would be


def say(text):
    """A line on stdout, above a bar if there is one."""
    from tqdm import tqdm
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def note(text):
    """A remark on stderr, above a bar if there is one."""
    from tqdm import tqdm
    tqdm.write(f"note: {text}", file=sys.stderr)


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
