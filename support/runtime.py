"""Processes, devices and signals: what a training loop needs from the machine.

  Ranks           one process, or the many that torchrun started
  keep_memory     a CPU's memory allocator, told not to clear the same pages again and again
  to_device       a batch on its way to a GPU, which nobody waits for
  pick_precision  what --precision auto means on this device; autocast does what it says
  stop_signals    Ctrl-C and SIGTERM, noted so that the loop can stop where nothing is lost
  stop_at_once    the same outside of the loop, where there is nothing to lose
"""
import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from support.cli import InputError


# ------------------------------------------------------------------------------------ processes
class Ranks:
    """The processes of a run: one, or as many as torchrun started. Rank 0 prints and writes."""

    def __init__(self, device):
        self.rank = 0
        self.world = 1
        self.device = torch.device(device)
        if int_from_env("WORLD_SIZE", 1) > 1:
            self.join()

    def join(self):
        """Find the other processes, by the variables that torchrun sets."""
        self.world = int_from_env("WORLD_SIZE")
        self.rank = int_from_env("RANK")
        int_from_env("MASTER_PORT")
        if not 0 <= self.rank < self.world:
            raise InputError(f"RANK is {self.rank} of WORLD_SIZE {self.world}: start with torchrun, or unset "
                             "WORLD_SIZE")
        try:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int_from_env("LOCAL_RANK"))
                torch.cuda.set_device(self.device)
            # One way for tensors on GPUs, another for flags that the host alone needs to know.
            backend = "cuda:nccl,cpu:gloo" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may tokenise for hours
        except (RuntimeError, ValueError) as error:  # more processes than GPUs, nobody at MASTER_ADDR, ...
            reason = str(error).splitlines()[0]
            raise InputError(f"these {self.world} processes cannot work together ({reason}): start with "
                             "torchrun, and no more processes than GPUs, or unset WORLD_SIZE") from error

    @property
    def is_first(self):
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, count):
        """The numbers from 0 to count - 1 that are this process's: rank 1 of 4 has 1, 5, 9, ..."""
        return range(self.rank, count, self.world)

    def sum(self, tensor):
        """Add `tensor` up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether `flag` is true on some rank; all ranks must ask. It goes from host to host, so that no
        device has to finish what it is doing."""
        if self.world == 1:
            return bool(flag)
        return self.sum(torch.tensor(float(bool(flag)))).item() > 0

    def wait(self):
        """Until all ranks are here."""
        self.any(False)

    @contextlib.contextmanager
    def first_goes_first(self):
        """Rank 0 downloads and prepares; the others then find it done."""
        if not self.is_first:
            dist.barrier()
        yield
        if self.is_first and self.world > 1:
            dist.barrier()

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()


def int_from_env(name, default=None):
    """A number that torchrun puts into the environment."""
    text = os.environ.get(name, default)
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise InputError(f"WORLD_SIZE asks for several processes, but {name} is {text!r}: start with "
                         "torchrun, or unset WORLD_SIZE") from error


# ------------------------------------------------------------------------------------ the device
def keep_memory():
    """Let glibc keep the memory of freed tensors. It gives large ones back to the system, which clears their
    pages one by one when the next step asks for them again: a tenth of a GPT-2 step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own for any tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def to_device(array, device):
    """A numpy array -> a tensor on the device. A GPU fetches it from pinned memory while the host goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def bf16_is_fast(device):
    """GPUs say so. On a CPU a product is timed: without bf16 instructions it is several times slower.

    The fastest of several tries of each, in turns, and bf16 in doubt: what else the machine is doing must not
    decide between two precisions.
    """
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    seconds = {torch.bfloat16: math.inf, torch.float32: math.inf}
    for _ in range(20):
        for dtype in seconds:
            a = torch.ones(512, 512, dtype=dtype)
            started = time.perf_counter()
            a @ a
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    return seconds[torch.bfloat16] < 1.5 * seconds[torch.float32]


def pick_precision(wanted, before, ranks):
    """--precision, with `auto` resolved: what the run to resume has had (`before`), or bf16 if it is fast."""
    if wanted != "auto":
        return wanted
    if before:
        return before
    if not ranks.any(not bf16_is_fast(ranks.device)):
        return "bf16"
    if ranks.is_first:
        print("note       bf16 is not fast on this device, so fp32")
    return "fp32"


def autocast(args, device):
    """A context in which products are computed in bfloat16; weights and their gradients stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


# ------------------------------------------------------------------------------------ stopping
@contextlib.contextmanager
def stop_signals(aloud=True):
    """A list that fills when Ctrl-C or SIGTERM asks to stop; asked twice, the process ends at once."""
    asked = []

    def ask(number, frame):
        if asked:
            sys.exit(128 + number)
        asked.append(number)
        if aloud:
            note("\nstopping as soon as this micro-batch is done; once more stops at once\n")

    with handled(ask):
        yield asked


@contextlib.contextmanager
def stop_at_once(aloud=True):
    """Outside of the training loop Ctrl-C and SIGTERM end the process where it is, in one line."""
    def end(number, frame):
        if aloud:
            note(f"\nstopped by {signal.Signals(number).name}\n")
        sys.exit(128 + number)

    with handled(end):
        yield


@contextlib.contextmanager
def handled(handler):
    """Ctrl-C and SIGTERM call handler(number, frame), until the end of the block."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def note(text):
    """A message on stderr from within a signal handler, where print could interrupt itself."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def exit_code(asked):
    """128 + the signal, as shells count; where another rank was asked, as if it had been SIGTERM."""
    number = asked[0] if asked else signal.SIGTERM
    return 128 + number
