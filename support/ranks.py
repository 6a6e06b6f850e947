"""Processes, device and signals: what a training loop needs from the machine.

  Ranks           one process, or the many that torchrun started
  pick_device     what --device stands for
  pick_precision  what --precision auto means on this device; autocast does what it says
  keep_memory     tells a CPU's memory allocator not to clear the same pages again and again
  peak_memory     how much memory was needed so far
  to_device       a batch on its way to a GPU, without waiting for it
  stop_signals    Ctrl-C, SIGTERM and SIGHUP, noted so that the loop can stop where nothing is lost
  stop_at_once    the same signals outside of the loop: the first one ends the process
"""
import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from support.cli import InputError


# ------------------------------------------------------------------------------------ processes
class Ranks:
    """The processes of a run: one, or all that torchrun started. Rank 0 prints and writes.

    Used as a context, which parts from the other processes at its end.
    """

    def __init__(self, device):
        self.rank = 0
        self.world = 1
        self.device = torch.device(device)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            self.join()

    def join(self):
        """Find the other processes, by the variables that torchrun sets."""
        try:
            self.world = int(os.environ["WORLD_SIZE"])
            self.rank = int(os.environ["RANK"])
            if not 0 <= self.rank < self.world:
                raise ValueError(f"RANK is {self.rank} of WORLD_SIZE {self.world}")
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            # NCCL for tensors on GPUs, gloo for flags that only the hosts need to know.
            backend = "cuda:nccl,cpu:gloo" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may tokenise for hours
        except (RuntimeError, ValueError, KeyError) as error:  # no RANK, more processes than GPUs, ...
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"WORLD_SIZE asks for several processes, which cannot work together ({reason}): "
                             "start with torchrun, and no more processes than GPUs, or unset "
                             "WORLD_SIZE") from error

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.world > 1:
            dist.destroy_process_group()

    @property
    def is_first(self):
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, count):
        """The numbers from 0 to count - 1 that are this process's: rank 1 of 4 has 1, 5, 9, ..."""
        return range(self.rank, count, self.world)

    def sum(self, tensor):
        """Add `tensor` up over all ranks, in place."""
        if self.world == 1:
            return tensor
        try:
            dist.all_reduce(tensor)
        except RuntimeError as error:
            # A rank that ends with an error closes the connection. It has said why: the others end quietly.
            if self.is_first:
                raise InputError("another process of this run has ended: see what it said above") from error
            raise SystemExit(2) from error
        return tensor

    def any(self, flag):
        """Whether `flag` is true on some rank; all ranks must ask. It goes from host to host, so no device
        has to finish its work first."""
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
            self.wait()
        yield
        if self.is_first:
            self.wait()


# ------------------------------------------------------------------------------------ the device
def pick_device(name):
    """--device -> a device of PyTorch that works here; "auto": the first of cuda, mps, cpu that exists."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        return available[0]

    try:
        torch.zeros(1, device=name).item()  # fails on `meta`, too, which computes nothing
        return name
    except Exception as error:  # of a dozen classes, with messages of a dozen lines
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} does not work here ({reason:.200}); available: "
                         f"{', '.join(available)}") from error


def keep_memory():
    """Let glibc keep the memory of freed tensors. It gives large ones back to the system, which clears their
    pages one by one when the next step asks for them again: a tenth of a GPT-2 step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own for any tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def peak_memory(device):
    """Bytes of memory that were needed so far, at most; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def to_device(array, device):
    """A numpy array -> a tensor on the device. A GPU fetches it from pinned memory while the host goes on."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def bf16_is_fast(device):
    """GPUs say so. On a CPU a product is timed: without bf16 instructions it is several times slower.

    The fastest of several tries of each decides, in turns, and bf16 in doubt: other work on the machine must
    not decide between two precisions.
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
def stop_signals(aloud=True, at_once=False, way_on=lambda: ""):
    """A list that fills when a signal asks to stop. The second one ends the process where it is, in one line;
    with at_once the first one does. way_on() says what the line adds: how to go on."""
    asked = []

    def handle(number, frame):
        is_last = at_once or len(asked) > 0
        asked.append(number)
        text = "stopping after this micro-batch; once more stops immediately"
        if is_last:
            text = f"stopped by {signal.Signals(number).name}{way_on()}"
        if aloud:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{text}\n".encode())  # print could interrupt itself
        if is_last:
            sys.exit(128 + number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # a closed terminal; Windows has no such signal
    if hangup and signal.getsignal(hangup) is not signal.SIG_IGN:  # under nohup it stays ignored
        numbers.append(hangup)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


stop_at_once = partial(stop_signals, at_once=True)  # outside of the loop, where there is nothing to lose
