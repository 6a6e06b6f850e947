"""What a command imports first: Ctrl-C while the rest is loading ends in one line.

PyTorch takes a second or two to load, and Ctrl-C in that time would print a page of its files. Nothing is
changed where the file of a command is only imported, as by a notebook, nor from `run_cli` on.
"""
import os
import signal
import sys
from pathlib import Path


def end(number, frame):
    """At once, as of what is half loaded nothing can be called; there is nothing to lose yet."""
    os.write(2, b"\nstopped by SIGINT\n")
    os._exit(128 + number)


def is_command():
    """Whether Python was started with a file of ours: `python distill.py`, `python -m extras.plot`."""
    started = Path(sys.argv[0] if sys.argv else "")  # "-m" while the package of a module is imported
    ours = Path(__file__).resolve().parent.parent
    return started.name == "-m" or started.is_file() and started.resolve().parent == ours


def loaded():
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Where Ctrl-C is ignored, as in a job that a script has put into the background, it stays so.
if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end)
