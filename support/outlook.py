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
# What is held at once, in numbers for each token, counted in model.Block and in the losses.
ROWS_OF_PRODUCTS = 16  # x C: what a block's products take and give, kept for its backward pass
ROWS_OF_STREAM = 6  # x C: the stream around them and in its norms, in the precision of the weights
ROWS_OF_TEACHER = 12  # x C: of the one layer that the teacher is at, as nothing of it is kept
ATTENTION_COPIES = 3  # x L x heads: all pairs, kept only for dropout on attention
PLAIN_LOGITS = 7  # x V, in float32: logits, their softmax and their gradients
PLAIN_LOGITS_ALONE = 4  # the same without a teacher
CHUNK_LOGITS = 8  # x V, in float32, of the tokens that the chunked loss is at
ANSWER_LOGITS = 5  # x V, in float32, of the tokens that a teacher's cache is at
ANSWER_CHUNK = 512  # how many these are


def memory_needed(args, teacher, student, vocab_size):
    """Bytes at the peak: what is held for the whole run, what backward needs, and the loss."""
    answering = 0
    held = memory_of_student(args, student)
    if teacher and args.control:
        held += student.num_parameters() * bytes_of_weights(args)  # the control waits in memory
    if args.teacher_cache:
        answering = memory_of_answers(args, teacher, student, vocab_size)
        teacher = None  # it answers before the first step, and is not there afterwards
    if teacher:
        held += teacher.num_parameters() * bytes_of_products(args)
    step = memory_of_activations(args, teacher, student) + memory_of_loss(args, teacher, student, vocab_size)
    return max(held + step, answering)


def bytes_of_products(args):
    """Of a number that matrix products take or give."""
    return 2 if args.precision.startswith("bf16") else 4


def bytes_of_weights(args):
    """Of a weight of the student, and of all that follows it."""
    return 2 if args.precision == "bf16-pure" else 4


def memory_of_student(args, student):
    """Weights, their gradients and AdamW's two averages; autocast adds a copy of the weights."""
    copy = bytes_of_products(args) if args.precision == "bf16" else 0
    return student.num_parameters() * (4 * bytes_of_weights(args) + copy)


def memory_of_answers(args, teacher, student, vocab_size):
    """The teacher that fills a cache, while the student waits."""
    number = bytes_of_products(args)
    models = student.num_parameters() * bytes_of_weights(args) + teacher.num_parameters() * number
    hidden = CHUNK_TOKENS * teacher.config.width * ROWS_OF_TEACHER * number
    return models + hidden + ANSWER_CHUNK * vocab_size * ANSWER_LOGITS * 4


def memory_of_activations(args, teacher, student):
    """What the blocks keep for the backward pass."""
    number = bytes_of_products(args)
    N = args.batch_size * args.seq_len
    block = N * student.config.width * (ROWS_OF_PRODUCTS * number + ROWS_OF_STREAM * bytes_of_weights(args))
    if student.blocks[0].attention.dropout.p:
        block += ATTENTION_COPIES * N * args.seq_len * student.config.n_head * number

    activations = len(student.blocks) * block
    if teacher:
        activations += N * teacher.config.width * ROWS_OF_TEACHER * number
    return activations


def memory_of_loss(args, teacher, student, vocab_size):
    """Whole logits and their like (plain), or those of a chunk and the gradient of the head."""
    number = bytes_of_products(args)
    N = args.batch_size * args.seq_len
    if args.loss == "plain":
        return N * vocab_size * (2 * number + (PLAIN_LOGITS if teacher else PLAIN_LOGITS_ALONE) * 4)

    device = student.head_weight.device
    rows = min(args.chunk_size or default_chunk_size(device), N)
    few = rows if device.type != "cpu" else min(rows, max(1, 2**20 // vocab_size))  # as in chunked_loss.py
    head_gradient = 2 * vocab_size * student.config.width * 4
    return rows * vocab_size * 2 * number + few * vocab_size * CHUNK_LOGITS * 4 + head_gradient


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
    """What comes after the student's training, in its micro-batches, and after the control's, in those of the
    control: (control, scoring, scoring).

    A backward pass takes twice what its forward pass does; the teacher only goes forward.
    """
    alone = 3 * flops_per_token(student)
    ahead = flops_per_token(teacher) if teacher and not args.teacher_cache else 0
    unit = (alone + ahead) * args.batch_size * args.seq_len

    networks = [network for network in (teacher, student, control) if network is not None]
    scoring = args.eval_tokens * sum(map(flops_per_token, networks)) / unit
    if control is None:
        return 0.0, scoring, 0.0
    alone_args = control_of(args)
    rows = read_log(Path(alone_args.out, "log.csv")) if args.resume else []
    done = rows[-1]["step"] / alone_args.steps if rows else 0.0  # its steps may be fewer and larger
    steps = args.steps * (1 - done)
    training = steps * len(ranks.share(args.grad_accum)) * alone / (alone + ahead)
    control_unit = alone * alone_args.batch_size * args.seq_len
    return training, scoring, scoring * unit / control_unit


LONG_SECONDS = 2 * 3600  # a run on a CPU that takes longer gets an advice
SHORT_SECONDS = 30 * 60  # what is advised
SHORT_STEPS = 600  # of it, if they do not get too small
SHORT_LENGTH = 256  # tokens of a sequence, at most
LEAST_PER_STEP = 512  # tokens; smaller steps are mostly noise


def advice(args, seconds, ranks):
    """Flags with which what takes `seconds` in all would take SHORT_SECONDS on this machine."""
    step_tokens = args.grad_accum * args.batch_size * args.seq_len
    tokens = args.steps * step_tokens * SHORT_SECONDS / seconds
    L = min(args.seq_len, SHORT_LENGTH)
    per_step = min(max(tokens / SHORT_STEPS, LEAST_PER_STEP), step_tokens)
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
