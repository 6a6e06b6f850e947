"""out/log.csv: a row for each step, and the progress line with the same figures.

  Log             writes the rows of a run as they come
  read_log        the rows that are whole, of a file that may be damaged
  read_held_out   the same of out/held-out.csv, which has a row for each validation
"""
import csv
import math
from pathlib import Path

from support.cli import InputError
from support.files import replaced
from support.progress import Progress

COLUMNS = ("step", "loss", "kl", "clm", "cos", "teacher_clm", "lr", "grad_norm", "tokens",
           "tokens_per_second")
HELD_OUT = "held-out.csv"  # beside it
HELD_OUT_COLUMNS = ("step", "loss")


def read_log(path):
    """log.csv -> list of {column: number}, without rows that are cut, foreign or out of order.

    A log can end in half a row after a kill, or be missing; it is only a record, so nothing depends on it.
    """
    return read_rows(path, COLUMNS, positive=("tokens", "tokens_per_second"))


def read_held_out(folder):
    """held-out.csv of a run -> list of {"step", "loss"}: the student's loss at each --eval-interval."""
    return read_rows(Path(folder, HELD_OUT), HELD_OUT_COLUMNS)


def read_rows(path, columns, positive=()):
    """The rows of a .csv that have a finite number in each of `columns`, and steps that rise."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

    rows = []
    for line in lines:
        try:
            row = {name: float(value) for name, value in zip(columns, line.split(","), strict=True)}
        except ValueError:  # the header, half a row, or none of ours
            continue
        # A run stops before it writes NaN or infinity, so these are damage, too.
        previous = rows[-1]["step"] if rows else 0
        finite = all(map(math.isfinite, row.values()))
        in_order = finite and previous < row["step"] == int(row["step"])
        if in_order and all(row[name] > 0 for name in positive):
            rows.append(row)
    return rows


def seconds_of(rows):
    """Seconds of training in the steps of a log."""
    return sum(row["tokens"] / row["tokens_per_second"] for row in rows)


def write_rows(path, columns, rows):
    """A .csv that is whole or not there."""
    with replaced(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow(shown(row[name]) for name in columns)


def shown(value):
    """A number as it stands in log.csv: 3.0 -> "3", 0.00012345678 -> "0.0001234568"."""
    whole = math.isfinite(value) and value == int(value)
    return str(int(value)) if whole else f"{value:.7g}"


TITLES = {"student": "distilling", "control": "control   "}  # of the line, by args.role


class Log:
    """Rows of log.csv and the progress line; silent on ranks above 0. The file is opened for the first step
    that is written, so a run which never makes one changes nothing."""

    def __init__(self, args, first_step, ranks, later):
        self.path = Path(args.out, "log.csv")
        self.args = args
        self.first_step = first_step
        self.step = first_step  # steps that are done
        self.micro = 0  # micro-batches of the next one that are done
        self.silent = not ranks.is_first
        self.file = None
        self.figures = []  # of the last step, as text

        self.share = len(ranks.share(args.grad_accum))  # micro-batches of a step on this rank
        title = TITLES[args.role] if args.kd_weight or args.role == "control" else "training  "
        self.line = Progress(title, args.steps * self.share, first_step * self.share, later, self.silent)
        self.line.place = f"{first_step}/{args.steps}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.line.close()
        if self.file:
            self.file.close()

    def say(self, text):
        """A line above the progress line."""
        self.line.say(text)

    def tick(self):
        """One more micro-batch is done. Where a step takes more than 5 seconds the line counts these, too."""
        self.micro += 1
        seconds = self.line.time.seconds_per_unit() or 0
        place = f"{self.step}/{self.args.steps}"
        if seconds * self.share > 5 and self.micro < self.share:
            place += f" and {self.micro}/{self.share}"
        self.line.advance(place, self.figures)

    def write(self, step, losses, **rest):
        """Add the row of a step; `losses`: its mean Losses, `rest`: the other columns."""
        self.step = step
        self.micro = 0
        self.figures = figures(losses, rest["tokens_per_second"])
        self.line.place = f"{step}/{self.args.steps}"
        self.line.shown = self.figures
        if self.silent:
            return
        row = {"step": step, **losses._asdict(), **rest}
        try:
            if not self.file:
                self.open()
            csv.writer(self.file).writerow(shown(row[name]) for name in COLUMNS)
        except OSError as error:
            raise not_written(self.path, error) from error

    def write_held_out(self, step, loss):
        """Add the loss on held-out text after so many steps, and show it. Rows of later steps, which a kill
        has left, go: these steps are made again."""
        path = self.path.with_name(HELD_OUT)
        rows = [row for row in read_held_out(path.parent) if row["step"] < step]
        try:
            write_rows(path, HELD_OUT_COLUMNS, [*rows, {"step": step, "loss": loss}])
        except OSError as error:
            raise not_written(path, error) from error
        self.say(f"step {step}: held-out loss {loss:.4f}")

    def open(self):
        """Keep the rows of the steps that are done: those after the last saved state are made again."""
        kept = [row for row in read_log(self.path) if row["step"] <= self.first_step]
        write_rows(self.path, COLUMNS, kept)
        self.file = open(self.path, "a", newline="", buffering=1, encoding="utf-8")
        if len(kept) < self.first_step:
            lost = self.first_step - len(kept)
            self.say(f"note       {self.path} has lost {lost} of the steps before this one")


def not_written(path, error):
    return InputError(f"{path} cannot be written ({error.strerror}); the same command with --resume goes on "
                      "from the last saved state")


def figures(losses, speed):
    """What the progress line shows of a step, the most important first."""
    found = [f"loss {losses.loss:.3f}"]
    if losses.clm != losses.loss:  # text alone has only one
        found.append(f"CLM {losses.clm:.3f}")
    if losses.teacher_clm:
        found.append(f"teacher's {losses.teacher_clm:.3f}")
    found.append(f"{speed:,} tok/s")
    if losses.kl:
        found.append(f"KL {losses.kl:.3f}")
    return found
