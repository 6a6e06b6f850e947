"""What a run is going to take: memory, before it starts, and time, as soon as its speed is known.

  memory_needed   the peak, from the shapes of the models and of a micro-batch
  memory_there    what this process can have of the device
  check_memory    one line that holds one against the other, or an InputError
  work_to_follow  how much comes after the student's training: the control, the scoring
  advice          flags with which a run that would take days takes half an hour

Shapes: B sequences in a micro-batch, L tokens in a sequence, N = B * L, C width, V vocabulary.
"""
import os
from pathlib import Path

import torch

from support.chunked_loss import default_chunk_size
from support.cli import InputError
from support.log import read_log
from support.options import control_of
from support.progress import in_words
from support.teacher_cache import CHUNK_TOKENS

GB = 1e9


# ------------------------------------------------------------------------------------ memory
def memory_needed(args, teacher, student, vocab_size):
    """Bytes at the peak of a step: what is held for the whole run, what backward needs, and the loss."""
    number = 2 if args.precision.startswith("bf16") else 4  # bytes of what products take and give
    master = 2 if args.precision == "bf16-pure" else 4  # bytes of the student's weights and all that follows
    N = args.batch_size * args.seq_len

    # Weights, their gradients and AdamW's two averages; autocast adds a copy of the weights.
    P = student.num_parameters()
    held = P * (4 * master + (number if args.precision == "bf16" else 0))
    if teacher:
        held += P * master if args.control else 0  # the control waits in memory
    answering = 0
    if args.teacher_cache:
        # The teacher answers before the first step, while the student waits, and is not there afterwards.
        answering = P * master + teacher.num_parameters() * number
        answering += CHUNK_TOKENS * teacher.config.width * 12 * number + 512 * vocab_size * 5 * 4
        teacher = None
    if teacher:
        held += teacher.num_parameters() * number

    # What a block keeps for its backward pass: 16 rows of width C as products take them, and 6 as the stream
    # is held; of the teacher, a few rows of the layer that it is at. Dropout on attention needs all pairs.
    C = student.config.width
    block = N * C * (16 * number + 6 * master)
    if student.blocks[0].attention.dropout.p:
        block += 3 * N * args.seq_len * student.config.n_head * number
    activations = len(student.blocks) * block
    if teacher:
        activations += N * teacher.config.width * 12 * number

    # The loss: whole logits and their like (plain), or those of a chunk and the gradient of the head.
    if args.loss == "plain":
        loss = N * vocab_size * (2 * number + (7 if teacher else 4) * 4)
    else:
        rows = min(args.chunk_size or default_chunk_size(student.head_weight.device), N)
        few = rows if student.head_weight.device.type != "cpu" else min(rows, max(1, 2**20 // vocab_size))
        loss = rows * vocab_size * 2 * number + few * vocab_size * 8 * 4 + 2 * vocab_size * C * 4
    return max(held + activations + loss, answering)


def memory_there(device):
    """Bytes that this process has or can get on the device; None if the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))  # KiB
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])  # that we have already
        return free * 1024 + pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, StopIteration, ValueError):  # no Linux
        return None


def check_memory(args, teacher, student, vocab_size, ranks):
    """The plan's line on memory. InputError if what is there is so much too small that it cannot be enough.

    The estimate is good to about a third, so what may just fit is only advised against.
    """
    needed = memory_needed(args, teacher, student, vocab_size)
    there = memory_there(ranks.device)
    if there and ranks.device.type == "cpu":
        there /= ranks.world  # these share it
    if not there or needed <= there:
        return f"about {show(needed)}" + (f" of {show(there)}" if there else "")

    fits = largest_batch(args, teacher, student, vocab_size, there)
    if fits:
        total = args.batch_size * args.grad_accum
        accum = max(1, round(total / fits / ranks.world)) * ranks.world
        fix = f"take --batch-size {fits} --grad-accum {accum}"
    else:
        fix = "take a smaller model, or a shorter --seq-len"
    message = f"about {show(needed)}, but {ranks.device} has {show(there)}: {fix}"
    if needed > 1.5 * there:
        raise InputError(f"--batch-size {args.batch_size} x --seq-len {args.seq_len} needs {message}")
    return message


def largest_batch(args, teacher, student, vocab_size, there):
    """The largest power of 2 below args.batch_size that leaves a tenth of the memory free; 0 if none."""
    wanted = args.batch_size
    try:
        batch_size = 2 ** ((wanted - 1).bit_length() - 1) if wanted > 1 else 0
        while batch_size:
            args.batch_size = batch_size
            if memory_needed(args, teacher, student, vocab_size) < 0.9 * there:
                break
            batch_size //= 2
        return batch_size
    finally:
        args.batch_size = wanted


def show(n_bytes):
    return f"{n_bytes / GB:,.1f} GB" if n_bytes >= GB else f"{n_bytes / 1e6:,.0f} MB"


# ------------------------------------------------------------------------------------ time
def flops_per_token(network):
    """Multiplications of a forward pass: one for each weight of a matrix that is multiplied."""
    head = network.head_weight.numel()
    return head + sum(p.numel() for p in network.blocks.parameters() if p.dim() == 2)


def work_to_follow(args, teacher, student, control, ranks):
    """What comes after the student's training, in micro-batches of that training: (control, scoring).

    A backward pass takes twice what its forward pass does; the teacher only goes forward.
    """
    alone = 3 * flops_per_token(student)
    ahead = flops_per_token(teacher) if teacher and not args.teacher_cache else 0
    unit = (alone + ahead) * args.batch_size * args.seq_len

    networks = [network for network in (teacher, student, control) if network is not None]
    scoring = args.eval_tokens * sum(map(flops_per_token, networks)) / unit
    if control is None:
        return 0.0, scoring
    alone_args = control_of(args)
    rows = read_log(Path(alone_args.out, "log.csv")) if args.resume else []
    done = rows[-1]["step"] / alone_args.steps if rows else 0.0  # its steps may be fewer and larger
    steps = args.steps * (1 - done)
    return steps * len(ranks.share(args.grad_accum)) * alone / (alone + ahead), scoring


LONG_SECONDS = 2 * 3600  # a run on a CPU that takes longer gets an advice
SHORT_SECONDS = 30 * 60  # what is advised


def advice(args, seconds, ranks):
    """Flags with which what takes `seconds` in all would take SHORT_SECONDS on this machine.

    As in the demo, about 600 steps; of at least 512 tokens, as smaller ones are mostly noise.
    """
    tokens = args.steps * args.grad_accum * args.batch_size * args.seq_len * SHORT_SECONDS / seconds
    L = min(args.seq_len, 256)
    per_step = min(max(tokens / 600, 512), args.grad_accum * args.batch_size * args.seq_len)
    examples = max(1, round(per_step / L))

    batch_size = max(1, min(args.batch_size, examples // ranks.world))
    grad_accum = max(1, round(examples / batch_size / ranks.world)) * ranks.world
    steps = max(1, round(tokens / (grad_accum * batch_size * L)))
    return f"--steps {steps} --grad-accum {grad_accum} --batch-size {batch_size} --seq-len {L}"


def duration_note(args, seconds, ranks):
    """What to say once the speed is known: how long all will take, and what to change if that is long."""
    note = f"at this speed all of it takes {in_words(seconds)}"
    if seconds < 60:
        return ""
    if ranks.device.type == "cuda" or seconds < LONG_SECONDS:
        return note
    return (f"{note}. Ctrl-C, and about {in_words(SHORT_SECONDS)} with\n"
            f"           {advice(args, seconds, ranks)}")
