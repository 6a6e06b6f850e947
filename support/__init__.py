"""What the lesson stands on; a reader may skip this folder.

Every command imports it first, because PyTorch takes a second or two to load: Ctrl-C in that time would print
a page of its files, and with this handler it ends in one line. Nothing changes where a file of the lesson is
imported by another program, such as a notebook, or once `run_cli` has begun.
"""
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stop_loading(number, frame):
    """Exit immediately: modules may be only half imported, and there is nothing to lose yet."""
    os.write(2, b"\nstopped by SIGINT\n")
    os._exit(128 + number)


def started_as_command():
    """Whether Python was started with a file of ours: `python distill.py`, `python -m extras.plot`."""
    started = Path(sys.argv[0] if sys.argv else "")  # "-m" while Python is still looking for the module
    return started.name == "-m" or started.is_file() and started.resolve().parent == ROOT


def loading_is_over():
    """From here on Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is stop_loading:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Where Ctrl-C is ignored, as in a background job of a shell script, it stays ignored.
if started_as_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_loading)
