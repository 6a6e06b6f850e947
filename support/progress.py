"""How far a command is: one line at the bottom of a terminal, or a line now and then in a file.

  Progress    the line: `distilling   12/600  1:40 left  loss 1.203  CLM 3.881  teacher's 3.040`
  watched     the same around things that are taken one by one
  open_bar    for what has no figures to show: tqdm's, or lines where there is no terminal
  TimeLeft    from the units of work that are done to the seconds that all the rest takes
  clock       7265 seconds -> "2:01:05", for the line; in_words: "2.0 hours", for sentences

The line goes to stderr, so `python distill.py > results.txt` still shows it.
"""
import contextlib
import shutil
import sys
import time

REDRAW_SECONDS = 0.1  # how often the line on a terminal changes
PLAIN_SECONDS = 30  # how often a line goes to a file or a pipe


class TimeLeft:
    """Seconds to come, from how long the units of work took that are done.

    `later`: work that follows the `total` units of this phase, in units. The first unit also sets things up
    (memory, compilation), so as soon as there is another one it is not counted.
    """

    def __init__(self, total, done=0, later=0.0):
        self.total = total
        self.done = done
        self.later = later
        self.marks = [(done, time.monotonic())]  # units, time: at the start, after the first, after the last

    def advance(self, units=1):
        self.done += units
        self.marks = [*self.marks[:2], (self.done, time.monotonic())]

    def seconds_per_unit(self):
        """The mean so far; None before the first unit is done."""
        if len(self.marks) == 1:
            return None
        (units, since), (done, until) = self.marks[-2:]
        return (until - since) / (done - units)

    def is_reliable(self):
        """Whether enough is done to say how long the rest takes: four units, or one that took long."""
        (units, since), (done, until) = self.marks[0], self.marks[-1]
        return done - units >= 4 or done > units and until - since > 20

    def seconds(self):
        """How long the rest of this phase and all that follows it will take; None if nobody knows yet."""
        each = self.seconds_per_unit()
        return None if each is None else each * (self.total - self.done + self.later)


class Progress:
    """A line that says how far `title` is.

    `shown` is what stands behind it, in order of importance: what does not fit into the terminal is left out.
    A silent one (of ranks above 0) writes nothing.
    """

    def __init__(self, title, total, done=0, later=0.0, silent=False):
        self.title = title
        self.time = TimeLeft(total, done, later)
        self.started = time.monotonic()
        self.silent = silent
        self.on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.place = f"{done}/{total}"
        self.shown = []
        self.drawn = time.monotonic()
        self.last_line = ""
        if self.on_terminal:
            self.draw()  # at once, as the first unit may take minutes

    def advance(self, place, shown):
        """One more unit is done. `place`: where that is ("3/600"); `shown`: list of figures as text."""
        self.time.advance()
        self.place = place
        self.shown = shown
        patience = REDRAW_SECONDS if self.on_terminal else PLAIN_SECONDS
        if time.monotonic() >= self.drawn + patience:
            self.draw()

    def line(self, width):
        """The line, at most `width` letters of it."""
        seconds = self.time.seconds()
        left = "" if seconds is None else f"{clock(seconds)} left"
        if self.time.done >= self.time.total:
            left = f"took {clock(time.monotonic() - self.started)}"
        parts = [f"{self.title} {self.place:>9}", left, *self.shown]

        line = ""
        for part in parts:
            longer = f"{line}  {part}" if line and part else line + part
            if len(longer) > width:
                break
            line = longer
        return line or parts[0][:width]

    def draw(self):
        self.drawn = time.monotonic()
        if self.silent:
            return
        if self.on_terminal:
            # One column less than there is: some terminals begin a new line after a full one.
            self.write("\r\x1b[K" + self.line(shutil.get_terminal_size().columns - 1))
        elif (line := self.line(200)) != self.last_line:
            self.write(line + "\n")
            self.last_line = line

    def say(self, text):
        """A line of text, above this one."""
        if self.silent:
            return
        if self.on_terminal:
            self.write("\r\x1b[K")
        print(text, flush=True)
        if self.on_terminal:
            self.draw()

    def close(self):
        """Leave the last line as it is, and go to a new one."""
        self.draw()
        if self.on_terminal and not self.silent:
            self.write("\n")

    def write(self, text):
        """To stderr. Work of days does not end because its progress cannot be shown."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(text)
            sys.stderr.flush()


def watched(items, title, total):
    """`items`, shown as they are taken."""
    line = Progress(title, total)
    for i, item in enumerate(items, 1):
        yield item
        line.advance(f"{i}/{total}", [])
    line.close()


def open_bar(items=None, title="", **settings):
    """A bar of tqdm on a terminal; in a file or a pipe, of what takes longer, a line every half a minute."""
    from tqdm import tqdm
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(items, title, dynamic_ncols=True, **settings)
    return tqdm(items, title, file=Lines(), mininterval=PLAIN_SECONDS, delay=PLAIN_SECONDS,
                bar_format="{l_bar}{r_bar}", **settings)


class Lines:
    """A file for tqdm whose text goes to stderr as lines, without carriage returns."""

    def write(self, text):
        if text.strip() and sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(text.strip() + "\n")

    def flush(self):
        pass


def clock(seconds):
    """7265 -> "2:01:05", 65 -> "1:05", 400000 -> "4 days 15 h"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def in_words(seconds):
    """Roughly, for sentences: 40 -> "40 seconds", 150 -> "2 minutes", 7300 -> "2.0 hours"."""
    for unit, length, form in (("days", 86400, ".1f"), ("hours", 3600, ".1f"), ("minutes", 60, ".0f")):
        if seconds >= 2 * length:
            return f"{seconds / length:{form}} {unit}"
    return f"{seconds:.0f} seconds"
