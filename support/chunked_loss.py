"""Any loss of logits, computed from hidden states, without the logits of all tokens.

  Losses         what the training loop sums up and the log shows
  chunked_loss   a loss function, applied chunk by chunk
  ChunkedLoss    the engine: logits of a few tokens, the loss and its gradient, and the two gradients to keep

Logits are a language model's largest tensors: 2 x 2048 tokens x 50,304 entries are 0.8 GB in float32, and
autograd keeps several tensors of that size. Here the logits of one chunk exist at a time, and autograd runs
on a few rows of them. What is kept is small: the gradients of the hidden states and of the head.

This is the one file that trades some clarity for memory: it overwrites logits with their gradient.
Shapes: N tokens, n tokens of a chunk, C width, V vocabulary.
"""
import functools
from typing import NamedTuple

import torch
from torch.nn import functional as F

from support.cli import InputError

CPU_ELEMENTS = 2**20  # of logits that the loss function sees at a time on a CPU


class Losses(NamedTuple):
    """Sums over the counted tokens of a micro-batch, in nats; divide them once, by all tokens of a step."""
    loss: torch.Tensor  # what is minimised; only this one carries a gradient
    kl: torch.Tensor  # at temperature T, before the factor T²
    clm: torch.Tensor
    cos: torch.Tensor  # 1 - cosine of the final hidden states
    teacher_clm: torch.Tensor  # the teacher's CLM on the same tokens: the bar to reach
    tokens: torch.Tensor  # how many were counted


def chunked_loss(loss_function, student_hidden, student_head, teacher_hidden, teacher_head, targets,
                 settings):
    """`loss_function`, applied to a few tokens at a time, as Losses (without the cosine).

    loss_function(student_logits (n, V), teacher_logits (n, V), targets (n,), settings) -> (loss, kl, clm):
    sums over the tokens. It sees float32 logits, and only tokens that have a target.
    student_hidden (N, C_s), teacher_hidden (N, C_t): final hidden states; student_head (V, C_s), teacher_head
    (V, C_t); targets (N,), -100 where there is none. ValueError if the heads differ in V.

    Without a teacher, teacher_hidden and teacher_head are None, and so are the teacher's logits. A tuple of
    tensors in place of teacher_hidden, with a row for each counted token, is passed on in place of the
    teacher's logits: that is how a cached teacher answers (support/teacher_cache.py).
    """
    if teacher_head is not None and len(teacher_head) != len(student_head):
        raise ValueError(f"heads of {len(student_head)} and {len(teacher_head)} rows: pass what they share")
    loss, kl, clm, teacher_clm = ChunkedLoss.apply(
        loss_function, student_hidden, student_head, teacher_hidden, teacher_head, targets, settings)
    return Losses(loss, kl, clm, torch.zeros_like(kl), teacher_clm, (targets != -100).sum())


class ChunkedLoss(torch.autograd.Function):
    """Forward computes the loss and, at the same time, its gradients; backward only hands them out."""

    @staticmethod
    def forward(ctx, loss_function, student_hidden, student_head, teacher_hidden, teacher_head, targets,
                settings):
        dtype = matmul_dtype(student_hidden)
        device = targets.device
        on_cpu = device.type == "cpu"
        V = len(student_head)

        # On a CPU the work goes over few rows of logits (4 MB), and of the head, at a time, so that they stay
        # in its cache. A GPU needs few and large pieces of work instead.
        chunk_size = settings.chunk_size or (512 if on_cpu else 1024)
        few = max(1, CPU_ELEMENTS // V) if on_cpu else chunk_size
        head_rows = 4096 if on_cpu else V

        student_weight = student_head.to(dtype)  # (V, C_s)
        grad_hidden = torch.zeros_like(student_hidden)
        grad_head = torch.zeros_like(student_head, dtype=torch.float32)
        sums = torch.zeros(4, device=device)  # loss, kl, clm, the teacher's clm

        # All chunks use the same memory for their logits: the system would have to clear new memory first.
        counted = (targets != -100).nonzero().flatten()
        memory = torch.empty(min(chunk_size, len(targets)), V, dtype=dtype, device=device)
        chunks = counted.split(chunk_size)
        answers_of_chunks = answers_in_chunks(teacher_hidden, teacher_head, chunks, memory)

        for rows, answers in zip(chunks, answers_of_chunks, strict=True):
            x = student_hidden[rows].to(dtype)  # (n, C_s)
            y = targets[rows]  # (n,)
            s = torch.mm(x, student_weight.T, out=memory[:len(rows)])  # (n, V)

            for start in range(0, len(rows), few):
                part = slice(start, start + few)
                found, gradient = loss_and_gradient(
                    loss_function, s[part], some_rows(answers, part), y[part], settings, few)
                sums += found
                s[part] = gradient  # over the logits, which have served

            # Logits are x @ head.T, so the chain rule is two products; the head's is summed in float32.
            grad_hidden[rows] = (s @ student_weight).to(grad_hidden.dtype)  # (n, C_s)
            pieces = zip(grad_head.split(head_rows), s.split(head_rows, dim=1), strict=True)
            for total, columns in pieces:
                total += columns.T @ x

        loss, kl, clm, teacher_clm = sums
        ctx.gradients = grad_hidden, grad_head.to(student_head.dtype)
        ctx.mark_non_differentiable(kl, clm, teacher_clm)
        return loss, kl, clm, teacher_clm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # scaled in place, which saves a copy of each, so they serve only once
        nothing = (None,) * 4  # for teacher_hidden, teacher_head, targets, settings
        return None, grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), *nothing


def loss_and_gradient(loss_function, s, answers, y, settings, full_size):
    """Student's logits s (n, V) -> sums (loss, kl, clm, the teacher's clm), (4,), and d loss / d s (n, V)."""
    if settings.compile and len(s) == full_size:  # a remainder of another size would be compiled anew
        loss_function = compiled(loss_function)

    with torch.enable_grad(), torch.autocast(s.device.type, enabled=False):
        s = s.float().requires_grad_()
        t = answers.float() if isinstance(answers, torch.Tensor) else answers
        loss, kl, clm = loss_function(s, t, y, settings)
        if loss.dim():
            raise InputError(f"{loss_function.__name__} returns a loss of shape {tuple(loss.shape)}, but it "
                             "has to be one number: is a .sum() missing?")
        gradient, = torch.autograd.grad(loss, s)

    sums = torch.stack((loss, kl, clm, teacher_clm_of(t, y).to(loss)))
    return sums.detach(), gradient


@functools.cache
def compiled(loss_function):
    """The loss as a few fused kernels, instead of one for each operation in it."""
    return torch.compile(loss_function, dynamic=False)


# ------------------------------------------------------------------------------------ the teacher's answers
def answers_in_chunks(teacher_hidden, teacher_head, chunks, like):
    """What the teacher says of each chunk of tokens: logits (n, V), in memory that is used again for the next
    chunk; or the rows of a cache's answers; or None without a teacher."""
    if teacher_hidden is None:
        yield from [None] * len(chunks)
    elif isinstance(teacher_hidden, tuple):
        n_tokens = sum(map(len, chunks))
        if n_tokens != len(teacher_hidden[0]):
            raise ValueError(f"answers for {len(teacher_hidden[0])} tokens, but {n_tokens} have a target")
        start = 0
        for rows in chunks:
            yield some_rows(teacher_hidden, slice(start, start + len(rows)))
            start += len(rows)
    else:
        memory = torch.empty_like(like)
        teacher_weight = teacher_head.to(memory.dtype)  # (V, C_t)
        for rows in chunks:
            x = teacher_hidden[rows].to(memory.dtype)  # (n, C_t)
            yield torch.mm(x, teacher_weight.T, out=memory[:len(rows)])


def some_rows(answers, rows):
    """Some rows of a teacher's answers, which are logits (n, V), or a tuple of tensors, or None."""
    if answers is None:
        return None
    if isinstance(answers, tuple):
        return type(answers)(*(tensor[rows] for tensor in answers))
    return answers[rows]


def teacher_clm_of(answers, y):
    """The teacher's CLM, a sum; a cache has it ready; 0 without a teacher."""
    if answers is None:
        return torch.zeros(())
    if isinstance(answers, tuple):
        return answers.clm.sum()
    return F.cross_entropy(answers, y, reduction="sum")


def matmul_dtype(tensor):
    """The dtype in which autocast, where it is on, would multiply this tensor."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
