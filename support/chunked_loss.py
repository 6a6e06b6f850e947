"""The distillation loss in chunks of tokens: the value and gradient of distill.plain_loss, small and fast.

Read distill.plain_loss first: it is the definition, and the tests hold this file against it. Then:
  LossSettings              what the loss depends on, besides the models
  distillation_loss         the loss from hidden states, for use on its own
  chunked_losses            the same with all that the log shows, as the training loop calls it
  ChunkedLoss               chunk by chunk: logits, their gradient, and the two gradients that are kept
  answers_in_chunks         the teacher's part: its logits, or what a cache holds in their place
  loss_and_gradient_        value and gradient of the loss, for a few rows of logits
  divergence_and_gradient_  the derivations: what d divergence / d logits is

Why. Logits are a language model's largest tensors: 2 x 2048 tokens x 50,304 entries are 0.8 GB in float32,
and with plain_loss autograd keeps several of that size. Here the logits of one chunk exist at a time, in
memory that the next chunk uses again, and the backward pass is done on the spot, because the gradient of this
loss is known in closed form. What is kept is small: the gradients of the hidden states and of the head.

Here, and in support/sparse_loss.py, logits are overwritten. Each place says what that saves.
Shapes: N tokens, n tokens of a chunk, C width, V vocabulary.
References: Hinton et al. 2015 (arXiv 1503.02531), section 2.
"""
import functools
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch.nn import functional as F

from support.sparse_loss import Draws, kl_and_gradient_, some_rows

DIVERGENCES = ("forward", "reverse", "jsd")


@dataclass(frozen=True)
class LossSettings:
    """loss = kd_weight * T² * divergence + clm_weight * CLM + cos_weight * (1 - cos)."""
    temperature: float = 2.0  # T
    kd_weight: float = 0.5
    clm_weight: float = 0.5
    cos_weight: float = 0.0
    divergence: str = "forward"  # or "reverse", "jsd": see distill.plain_loss
    jsd_weight: float = 0.5  # of the teacher in the mixture that jsd compares both with
    chunk_size: int | None = None  # tokens whose logits exist at a time; changes no value. None: by device
    compile: bool = False  # let torch.compile fuse the work on logits; for GPUs

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence {self.divergence!r}: must be one of {', '.join(DIVERGENCES)}")

    @classmethod
    def of(cls, args):
        """From the command line's flags of the same names."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


class Losses(NamedTuple):
    """Sums over the counted tokens of a micro-batch, in nats; divide them once, by all tokens of a step."""
    loss: torch.Tensor  # what is minimised; the others carry no gradient
    kl: torch.Tensor  # forward, at temperature T, before the factor T², whatever divergence is trained
    clm: torch.Tensor
    cos: torch.Tensor
    teacher_clm: torch.Tensor  # the teacher's CLM on the same tokens: the bar to reach
    tokens: torch.Tensor  # how many were counted


def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, **settings):
    """kd_weight * T² * KL(softmax(t / T) || softmax(s / T)) + clm_weight * CLM + cos_weight * (1 - cos).

    student_hidden (N, C_s), teacher_hidden (N, C_t): final hidden states; student_head (V, C_s), teacher_head
    (V, C_t); targets (N,), where -100 is counted in no term. Returns (loss, kl, clm), *sums* over the counted
    tokens, in nats: divide once, by the tokens of the whole step. The KL is the forward one, the teacher's
    entropy included, so a perfect student scores 0; `divergence` can train "reverse" or "jsd" in its place.
    The gradient flows to the student alone. `settings`: the fields of LossSettings, by name. ValueError if
    the heads differ in V. Source: Hinton et al. 2015, section 2; the cosine term: Sanh et al. 2019; the other
    divergences: Agarwal et al. 2023 (arXiv 2306.13649).
    """
    losses = chunked_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets,
                            LossSettings(**settings))
    return losses.loss, losses.kl, losses.clm


def chunked_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
    """`distillation_loss` with all that the log shows.

    In place of teacher_hidden there may be Draws of what a teacher said earlier (support/sparse_loss.py), or
    None, which leaves only the CLM; with either, teacher_head is None.
    """
    if teacher_head is not None and len(teacher_head) != len(student_head):
        raise ValueError(f"heads of {len(student_head)} and {len(teacher_head)} rows: pass what they share")
    if isinstance(teacher_hidden, Draws) and (settings.divergence != "forward" or settings.cos_weight):
        raise ValueError("draws can replace a teacher in the forward KL, and in no other term")
    loss, kl, clm, teacher_clm = ChunkedLoss.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, targets, settings)

    cos = torch.zeros_like(kl)
    if settings.cos_weight:
        cos = cosine_distance(student_hidden, teacher_hidden, targets)
        loss = loss + settings.cos_weight * cos
    return Losses(loss, kl, clm, cos.detach(), teacher_clm, (targets != -100).sum())


def cosine_distance(student_hidden, teacher_hidden, targets):
    """Sum of 1 - cos(student's, teacher's final hidden state) over counted tokens (Sanh et al. 2019)."""
    distance = 1 - F.cosine_similarity(student_hidden.float(), teacher_hidden.float(), dim=-1)  # (N,)
    return distance.masked_fill(targets == -100, 0.0).sum()


class ChunkedLoss(torch.autograd.Function):
    """Forward computes the loss and, at once, its gradients; backward only hands them out."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
        dtype = matmul_dtype(student_hidden)
        device = targets.device
        chunk_size = settings.chunk_size or default_chunk_size(device)
        V = len(student_head)

        student_weight = student_head.to(dtype)  # (V, C_s)
        grad_hidden = torch.zeros_like(student_hidden)
        grad_head = torch.zeros_like(student_head, dtype=torch.float32)
        sums = torch.zeros(4, device=device)  # divergence, kl, clm, teacher's clm

        # One piece of memory for the logits of all chunks: fresh memory would have to be cleared each time.
        logits = torch.empty(2, min(chunk_size, len(targets)), V, dtype=dtype, device=device)
        # On a CPU work goes over so few rows of logits (4 MB), and of the head, at a time that they stay in
        # the cache. A GPU wants few and large pieces of work instead.
        on_cpu = device.type == "cpu"
        few = max(1, 2**20 // V) if on_cpu else chunk_size
        head_rows = 4096 if on_cpu else V
        rows_function = compiled_rows_function() if settings.compile else loss_and_gradient_

        counted = (targets != -100).nonzero().flatten()
        chunks = counted.split(chunk_size)
        answers = answers_in_chunks(teacher_hidden, teacher_head, chunks, logits[1])
        for rows, t in zip(chunks, answers, strict=True):
            n = len(rows)
            x = student_hidden[rows].to(dtype)  # (n, C_s)
            y = targets[rows, None]  # (n, 1)

            s = torch.mm(x, student_weight.T, out=logits[0, :n])  # (n, V)
            for start in range(0, n, few):
                part = slice(start, start + few)
                sums += rows_function(s[part], some_rows(t, part), y[part], settings)

            # By now s is d loss / d logits. Logits are x @ head.T, so the chain rule is two products; that
            # for the head is summed in float32.
            grad_hidden[rows] = (s @ student_weight).to(grad_hidden.dtype)  # (n, C_s)
            pieces = zip(grad_head.split(head_rows), s.split(head_rows, dim=1), strict=True)
            for total, columns in pieces:
                total += columns.T @ x

        divergence, kl, clm, teacher_clm = sums
        ctx.gradients = grad_hidden, grad_head.to(student_head.dtype)
        ctx.mark_non_differentiable(kl, clm, teacher_clm)
        loss = settings.kd_weight * settings.temperature**2 * divergence + settings.clm_weight * clm
        return loss, kl, clm, teacher_clm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None  # they are scaled in place, which saves a copy of each; so they serve once
        nothing = (None,) * 4  # for teacher_hidden, teacher_head, targets, settings
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), *nothing


def answers_in_chunks(teacher_hidden, teacher_head, chunks, memory):
    """What the teacher says of each chunk of tokens: logits (n, V), for which `memory` is used again and
    again; or Draws of n tokens, if its answers are draws; or None, without a teacher."""
    if teacher_hidden is None:
        yield from [None] * len(chunks)
    elif isinstance(teacher_hidden, Draws):
        n_tokens = [len(rows) for rows in chunks]
        if sum(n_tokens) != len(teacher_hidden.ids):
            raise ValueError(f"draws for {len(teacher_hidden.ids)} tokens, but {sum(n_tokens)} have a target")
        for parts in zip(*(tensor.split(n_tokens) for tensor in teacher_hidden), strict=True):
            yield Draws(*parts)
    else:
        teacher_weight = teacher_head.to(memory.dtype)  # (V, C_t)
        for rows in chunks:
            x = teacher_hidden[rows].to(memory.dtype)  # (n, C_t)
            yield torch.mm(x, teacher_weight.T, out=memory[:len(rows)])


def loss_and_gradient_(s, t, y, settings):
    """Logits s, t (n, V), targets y (n, 1) -> sums (divergence, kl, clm, teacher's clm), (4,). In place of t
    there may be Draws, or None.

    s becomes d loss / d s. With q = softmax(s / T), p = softmax(t / T) and D a divergence of the two:

        d/ds CLM    = softmax(s) - onehot(y)
        d/ds T² * D = T * d/dz D, where z = s / T; see `divergence_and_gradient_`
    """
    T = settings.temperature
    z_s, e_s, grad = exponentials(s, T)  # each (n, V); `grad` is softmax(s) but for a factor
    sum_s = e_s.sum(-1, keepdim=True)
    total = grad.sum(-1, keepdim=True)

    # CLM = log sum exp(s) - s[y], and s = T * z_s up to the shift that both have.
    clm = (total.log() - T * z_s.gather(1, y)).sum()
    # clm_weight * (softmax(s) - onehot(y)), over the exponentials: nobody needs those again.
    grad.mul_(settings.clm_weight / total)
    grad.scatter_add_(1, y, torch.full_like(total, -settings.clm_weight))

    divergence = kl = teacher_clm = torch.zeros_like(clm)
    if isinstance(t, Draws):
        teacher_clm = t.clm.sum()
        kl, grad_z = kl_and_gradient_(t, z_s, e_s, sum_s)
        divergence = kl
        grad.add_(grad_z, alpha=settings.kd_weight * T)
    elif t is not None:
        z_t, e_t, unsoftened = exponentials(t, T)
        sum_t = e_t.sum(-1, keepdim=True)
        teacher_clm = (unsoftened.sum(-1, keepdim=True).log() - T * z_t.gather(1, y)).sum()

        p = e_t.div_(sum_t)  # over the exponentials, as above
        q = e_s.div_(sum_s)
        # log p - log q = z_t - z_s + log(sum_s / sum_t); the last is a number for each row.
        divergence, kl, grad_z = divergence_and_gradient_(p, q, z_t, z_s, (sum_s / sum_t).log(), settings)
        grad.add_(grad_z, alpha=settings.kd_weight * T)

    s.copy_(grad)  # the logits have served; their memory, in the dtype of the products, holds the gradient
    return torch.stack((divergence, kl, clm, teacher_clm))


@functools.cache
def compiled_rows_function():
    """loss_and_gradient_ as one or two kernels, instead of one for each line of it."""
    return torch.compile(loss_and_gradient_, dynamic=False)


def divergence_and_gradient_(p, q, z_t, z_s, log_ratio, settings):
    """Distributions p, q (n, V) -> sums of the divergence and of the forward KL, d divergence / d z_s (n, V).

    log p - log q = z_t - z_s + log_ratio (n, 1). Everything but p may be overwritten.

    Softmax turns a derivative g = dD/dq into dD/dz = q * (g - sum(q * g)). With D for one row, a token:

        forward  D = sum p * log(p / q)       g = -p / q, so dD/dz = q - p
        reverse  D = sum q * log(q / p)       g = log(q / p) + 1, so dD/dz = q * (log(q / p) - D)
        jsd      D = w * KL(p || m) + (1 - w) * KL(q || m), where m = w * p + (1 - w) * q
                 g = (1 - w) * log(q / m): through m both terms give -(1 - w) * (w * p + (1 - w) * q) / m,
                 that is -(1 - w), which cancels the +1 of d(q * log q)/dq
                 so dD/dz = (1 - w) * q * (log(q / m) - KL(q || m))
    """
    if settings.divergence == "forward":
        # p sums to 1, so the number for each row may be added at the end. Over z_t: a copy saved.
        kl = z_t.sub_(z_s).mul_(p).sum() + log_ratio.sum()
        return kl, kl, q.sub_(p)

    log_p_q = z_t.sub_(z_s).add_(log_ratio)  # log p - log q
    kl = (p * log_p_q).sum()
    if settings.divergence == "reverse":
        reverse = -(q * log_p_q).sum(-1, keepdim=True)  # (n, 1)
        return reverse.sum(), kl, q.mul_(-log_p_q - reverse)

    # log(m / q) = log(w * p / q + 1 - w), and log(m / p) likewise: finite, even where p or q is 0.
    w = settings.jsd_weight
    log_w = p.new_full((), math.log(w))
    log_rest = p.new_full((), math.log(1 - w))
    log_m_q = torch.logaddexp(log_p_q + log_w, log_rest)  # (n, V)
    log_m_p = torch.logaddexp(log_rest - log_p_q, log_w)  # (n, V)
    from_teacher = -(p * log_m_p).sum()  # KL(p || m)
    from_student = -(q * log_m_q).sum(-1, keepdim=True)  # KL(q || m), (n, 1)
    jsd = w * from_teacher + (1 - w) * from_student.sum()
    return jsd, kl, q.mul_(-log_m_q - from_student).mul_(1 - w)


def exponentials(logits, T):
    """z, exp(z), exp(T * z) for z = logits / T in float32, shifted so that the largest of a row is 0.

    One exponential makes two: exp(z) is softmax(logits / T) but for a factor, and its T-th power is that of
    softmax(logits). Below T = 1 the power is computed from z, as exp(z) is 0 where its power is not.
    """
    z = logits.float() / T
    z -= z.amax(-1, keepdim=True)  # in place: a copy of the logits is enough
    e = z.exp()
    unsoftened = e**T if T >= 1 else (T * z).exp()
    return z, e, unsoftened


def default_chunk_size(device):
    """Tokens whose logits exist at a time. A GPU has work enough at 512; 1,024 halve what it spends on adding
    the head's gradients up, and cost another 0.9 GB at 50,000 entries."""
    return 512 if device.type == "cpu" else 1024


def matmul_dtype(tensor):
    """The dtype in which autocast, where it is on, would multiply this tensor."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
