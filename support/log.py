"""out/log.csv: a row for each step, and the progress bar with the same figures.

  Log        writes the rows of a run as they come
  read_log   the rows that are whole, of a file that may be damaged
"""
import csv
import time
from datetime import timedelta
from pathlib import Path

from support.files import replaced

COLUMNS = ("step", "loss", "kl", "clm", "cos", "teacher_clm", "lr", "grad_norm", "tokens",
           "tokens_per_second")


def read_log(path):
    """log.csv -> list of {column: number}, without rows that are cut, foreign or out of order.

    A log can end in half a row after a kill, or be missing; it is only a record, so nothing depends on it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

    rows = []
    for values in csv.reader(line for line in lines if "\0" not in line):
        try:
            row = {name: float(value) for name, value in zip(COLUMNS, values, strict=True)}
        except ValueError:  # the header, half a row, or none of ours
            continue
        previous = rows[-1]["step"] if rows else 0
        if row["step"] > previous and row["step"].is_integer() and row["tokens_per_second"] > 0:
            rows.append(row)
    return rows


def shown(value):
    """A number as it stands in log.csv: 3.0 -> "3", 0.00012345678 -> "0.0001234568"."""
    return str(int(value)) if value == int(value) else f"{value:.7g}"


class Log:
    """Rows of log.csv and a progress bar; silent on ranks above 0. Opened by the first step that it writes,
    so that a run which never makes one changes nothing."""

    def __init__(self, args, first_step, ranks):
        from tqdm import tqdm
        self.path = Path(args.out, "log.csv")
        self.first_step = first_step
        self.steps = args.steps
        self.silent = not ranks.is_first
        self.file = None
        self.started = time.time()
        self.bar = tqdm(total=args.steps, initial=first_step, unit="step", disable=self.silent,
                        desc="distilling" if args.kd_weight else "training")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.file:
            self.file.close()

    def say(self, text):
        """A line above the progress bar."""
        if not self.silent:
            self.bar.write(text)

    def write(self, step, losses, **rest):
        """Add the row of a step; `losses`: its mean Losses, `rest`: the other columns, in their order."""
        if self.silent:
            return
        if not self.file:
            self.open()
        values = (step, *losses[:5], *rest.values())
        csv.writer(self.file).writerow(map(shown, values))

        figures = {"loss": losses.loss, "KL": losses.kl, "CLM": losses.clm, "teacher": losses.teacher_clm}
        figures = {name: f"{value:.3f}" for name, value in figures.items() if value}
        self.bar.set_postfix(figures | {"tok/s": rest["tokens_per_second"]}, refresh=False)
        self.bar.update()
        if step == self.first_step + 3 < self.steps:
            seconds = (time.time() - self.started) / 3 * (self.steps - step)
            left = timedelta(seconds=round(seconds))
            self.say(f"at this speed the {self.steps - step:,} steps to come take {left} (h:mm:ss)")

    def open(self):
        """Keep the rows of the steps that are done: those after the last saved state are made again."""
        kept = [row for row in read_log(self.path) if row["step"] <= self.first_step]
        with replaced(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for row in kept:
                writer.writerow(map(shown, row.values()))
        self.file = open(self.path, "a", newline="", buffering=1, encoding="utf-8")
        if len(kept) < self.first_step:
            self.say(f"note: {self.path} has lost {self.first_step - len(kept)} of the steps before this one")
