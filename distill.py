"""Distil a GPT: a small student learns from a teacher's whole next-token distribution, not from text alone.

    python distill.py                                           the demo: offline, minutes on a laptop
    python distill.py --teacher gpt2 --student-layers 6         the same with GPT-2 on OpenWebText
    torchrun --nproc_per_node=8 distill.py --recipe distilgpt2  the published run, on eight GPUs

Read in this order:
  RECIPES            each shipped or published run, as data
  plain_loss         T² * KL(teacher || student) + CLM, as on a blackboard
  distillation_loss  the same from hidden states, in chunks of tokens, gradients included
  train              the loop: batch, forward, backward, step, log, save
  main               from the command line to the closing table
What surrounds the loop (processes, log, stopping and resuming) is in run.py.

References: Hinton et al. 2015 (arXiv 1503.02531), Sanh et al. 2019 (arXiv 1910.01108).
Shapes: B sequences in a micro-batch, T tokens in a sequence, N = B * T tokens, C width, V vocabulary.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import model as models
import run
from data import InputError, batch_at, format_table, load_tokenizer, prepare, run_cli

LEAST_TOKENS = 2**24  # in a corpus, so that short runs share one
DEMO_TEACHER = os.path.relpath(Path(__file__).parent / "demo" / "teacher")

RECIPES = {
    # `--teacher gpt2 --student-layers 6` and nothing else: the defaults in parse_args, 131M tokens.
    "plain": {},
    # Offline, from what the repository ships. The control is the same run without the teacher.
    "demo": {"teacher": DEMO_TEACHER, "student_layers": "3", "data": "stdlib", "seq_len": 256,
             "batch_size": 4, "grad_accum": 1, "steps": 600, "lr": 2e-3, "kd_weight": 1.0, "clm_weight": 0.0,
             "control": True, "eval_tokens": 200_000},
    # How the demo's teacher was made: the shape of demo/teacher/config.json, fresh weights, no teacher.
    "demo-teacher": {"teacher": "none", "student": DEMO_TEACHER, "student_init": "random",
                     "data": "stdlib", "seq_len": 256, "batch_size": 16, "grad_accum": 1, "epochs": 9,
                     "clm_weight": 1.0, "lr": 2e-3, "warmup": 0.02, "weight_decay": 0.1, "dropout": 0.1,
                     "attention_dropout": 0.0, "eval_interval": 500, "eval_tokens": 200_000},
    # DistilGPT2. Published: teacher, layers, data, context, T, optimizer, schedule, clip, dropout, epochs,
    # and 2,000 sequences a step (5 x 50 x 8 GPUs). Never published: loss weights; these are the script's.
    "distilgpt2": {"teacher": "gpt2", "student_layers": "6", "data": "openwebtext", "seq_len": 1024,
                   "batch_size": 5, "grad_accum": 400, "epochs": 3, "temperature": 2.0, "kd_weight": 0.5,
                   "clm_weight": 0.5, "lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.0,
                   "warmup": 0.05, "schedule": "linear", "grad_clip": 5.0, "dropout": 0.1},
    # DistilPythia, from its model card, which names neither AdamW's betas nor a clip. The card's run had bf16
    # weights: that is `--precision bf16-pure`, and the README measures what it costs.
    "distilpythia": {"teacher": "EleutherAI/pythia-160m", "student": "EleutherAI/pythia-70m", "data": "pile",
                     "seq_len": 2048, "batch_size": 2, "grad_accum": 2048, "steps": 64, "temperature": 2.0,
                     "kd_weight": 0.5, "clm_weight": 0.5, "lr": 1e-4, "warmup": 0.0, "schedule": "constant"},
    # The protocol usually meant by "WikiText-103 perplexity after fine-tuning" (gpt2 16.3, distilgpt2 21.1).
    "finetune-wikitext103": {"teacher": "none", "data": "wikitext-103", "seq_len": 1024, "batch_size": 4,
                             "grad_accum": 1, "epochs": 1, "clm_weight": 1.0, "lr": 5e-5, "weight_decay": 0.0,
                             "warmup": 0.0, "schedule": "linear", "grad_clip": 1.0},
}


def new_parser():
    """All flags, with their defaults, which stand here and nowhere else."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, help="a named set of defaults: `demo` if no model is named, or `plain`")
    add("--teacher", help="Hub id or folder, or `none` to train on the text alone")
    add("--student", help="Hub id or folder of a smaller model to start from (DistilPythia's way)")
    add("--student-layers", help="how many of the teacher's layers, evenly spread, or a list: 0,2,4,7,9,11")
    add("--student-init", choices=["teacher", "random"], default="teacher",
        help="random: the same shape, from scratch")
    add("--data", default="openwebtext", help="openwebtext, pile, wikitext-103, wikitext-2, stdlib, any Hub "
        "data set id[:config], a file or folder of .txt, .jsonl, .parquet")
    add("--text-column", default="text", help="the column or field with a document's text")
    add("--data-folder", default="corpora", help="where tokenised corpora are kept")
    add("--workers", type=int, default=os.cpu_count(), help="threads that tokenise")
    add("--packing", choices=["constant", "padded"], default="constant",
        help="constant: documents joined and cut into blocks; padded: one document an example")
    add("--seq-len", type=int, default=1024, help="tokens of an example")
    add("--batch-size", type=int, default=8, help="examples of a micro-batch: what fits in memory")
    add("--grad-accum", type=int, default=16, help="micro-batches of a step, over all GPUs together")
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--epochs", type=float, help="passes over the corpus, instead of --steps")
    add("--temperature", type=float, default=2.0, help="T: softens both distributions (Hinton et al. 2015)")
    add("--kd-weight", type=float, default=0.5, help="weight of T² * KL(teacher || student)")
    add("--clm-weight", type=float, default=0.5, help="weight of the causal-language-model loss on the text")
    add("--cos-weight", type=float, default=0.0, help="weight of 1 - cos(hidden states) (Sanh et al. 2019)")
    add("--lr", type=float, default=5e-4, help="AdamW's learning rate after the warm-up")
    add("--betas", type=float, nargs=2, default=[0.9, 0.95], help="AdamW's")
    add("--eps", type=float, default=1e-8, help="AdamW's")
    add("--weight-decay", type=float, default=0.0, help="AdamW's, on matrices only")
    add("--warmup", type=float, default=0.05, help="share of the steps in which the learning rate rises")
    add("--schedule", choices=["constant", "linear", "cosine"], default="cosine", help="linear, cosine: to 0")
    add("--grad-clip", type=float, default=1.0, help="largest norm of the gradient; 0: no limit")
    add("--dropout", type=float, default=0.0, help="of the student: embeddings, residual branches, attention")
    add("--attention-dropout", type=float, help="of attention weights, where it should differ (slow on CPUs)")
    add("--precision", choices=["auto", "bf16", "fp32", "bf16-pure"], default="auto",
        help="bf16: autocast, float32 weights; bf16-pure: bf16 weights, too; auto: bf16 where it is fast")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the best there is")
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--chunk-size", type=int, default=512, help="tokens whose logits exist at a time")
    add("--seed", type=int, default=0, help="of data order, dropout and random weights")
    add("--control", action=argparse.BooleanOptionalAction, default=False,
        help="then train the same student without the teacher, to compare")
    add("--eval-interval", type=int, default=0, help="steps between validations; 0: only at the end")
    add("--eval-tokens", type=int, default=100_000, help="validation tokens, at most")
    add("--save-interval", type=int, default=100, help="steps between saves of train_state.pt")
    add("--out", default="out", help="folder of the student, its log and its state")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    return parser


def parse_args(argv=None):
    """Flags win over the recipe, the recipe over the defaults."""
    parser = new_parser()
    given = parser.parse_args(argv, argparse.Namespace(steps=None))
    recipe = given.recipe or ("plain" if given.teacher or given.student else "demo")
    parser.set_defaults(**RECIPES[recipe])
    if given.student or given.student_layers:  # the user's student replaces the recipe's, of either kind
        parser.set_defaults(student=None, student_layers=None)
    if given.steps:
        parser.set_defaults(epochs=None)
    args = parser.parse_args(argv)
    args.recipe = recipe
    return args


# ------------------------------------------------------------------------------------ the loss
def plain_loss(s, t, targets, temperature=2.0, kd_weight=0.5, clm_weight=0.5):
    """The definition, from whole logits s, t (N, V); -100 in targets (N,) counts in neither term. All that
    follows computes the same, and its gradient, in less memory and time; the tests hold it against this."""
    s, t, y = s[targets != -100], t[targets != -100], targets[targets != -100]
    log_p, log_q = (t / temperature).log_softmax(-1), (s / temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum()
    clm = F.cross_entropy(s, y, reduction="sum")
    return kd_weight * temperature**2 * kl + clm_weight * clm, kl, clm


class Losses(NamedTuple):
    """Sums over the counted tokens of a micro-batch; kl, clm and teacher_clm in nats."""
    loss: torch.Tensor
    kl: torch.Tensor
    clm: torch.Tensor
    cos: torch.Tensor
    teacher_clm: torch.Tensor  # the bar to reach


def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, *, temperature=2.0,
                      kd_weight=0.5, clm_weight=0.5, cos_weight=0.0, chunk_size=256):
    """kd_weight * T² * KL(softmax(t / T) || softmax(s / T)) + clm_weight * CLM + cos_weight * (1 - cos).

    student_hidden (N, C_s), teacher_hidden (N, C_t): final hidden states; student_head (V, C_s), teacher_head
    (V, C_t); targets (N,), where -100 is counted in no term. Returns (loss, kl, clm), *sums* over the counted
    tokens, in nats: divide once, by the tokens of the whole step. The KL is the forward one, the teacher's
    entropy included, so a perfect student scores 0. T² keeps its gradient from shrinking as T grows (Hinton
    et al. 2015, section 2). The gradient flows to the student alone. ValueError if the heads differ in V.
    """
    return all_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets, temperature,
                      kd_weight, clm_weight, cos_weight, chunk_size)[:3]


def all_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets, temperature, kd_weight,
               clm_weight, cos_weight, chunk_size):
    """`distillation_loss` with all that the log shows. Without a teacher (None) only the CLM term is left."""
    if teacher_head is not None and len(teacher_head) != len(student_head):
        raise ValueError(f"heads of {len(student_head)} and {len(teacher_head)} rows: pass what they share")
    loss, kl, clm, teacher_clm = ChunkedLoss.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, targets, temperature, kd_weight,
        clm_weight, chunk_size)
    cos = torch.zeros_like(kl)
    if cos_weight:
        s, t = (hidden[targets != -100].float() for hidden in (student_hidden, teacher_hidden))
        cos = (1 - F.cosine_similarity(s, t, dim=-1)).sum()
        loss = loss + cos_weight * cos
    return Losses(loss, kl, clm, cos.detach(), teacher_clm)


class ChunkedLoss(torch.autograd.Function):
    """The loss and its gradients in one pass over chunks of tokens.

    Logits are a language model's largest tensors (2 x 2048 tokens x 50,304 entries = 0.8 GB in float32), and
    autograd would keep several. Here they live for one chunk, in memory that the next one uses again; what
    stays are two gradients, of hidden states and head.
    """

    @staticmethod
    def forward(ctx, student_hidden, student_head, teacher_hidden, teacher_head, targets, T, kd_weight,
                clm_weight, chunk_size):
        dtype, V, device = matmul_dtype(student_hidden), len(student_head), targets.device
        head = student_head.to(dtype)
        teacher_head = None if teacher_head is None else teacher_head.to(dtype)
        grad_hidden = torch.zeros_like(student_hidden)
        grad_head = torch.zeros_like(student_head, dtype=torch.float32)
        sums = torch.zeros(3, device=device)
        memory = torch.empty(2, min(chunk_size, len(targets)), V, dtype=dtype, device=device)
        few = max(1, 2**20 // V) if device.type == "cpu" else chunk_size  # 4 MB stay in a CPU's cache
        for rows in (targets != -100).nonzero().flatten().split(chunk_size):  # n <= chunk_size counted tokens
            n, x, y, t = len(rows), student_hidden[rows].to(dtype), targets[rows, None], None
            s = torch.mm(x, head.T, out=memory[0, :n])  # (n, V)
            if teacher_head is not None:
                t = torch.mm(teacher_hidden[rows].to(dtype), teacher_head.T, out=memory[1, :n])  # (n, V)
            for part in (slice(i, i + few) for i in range(0, n, few)):
                t_part = None if t is None else t[part]
                sums += loss_and_gradient_(s[part], t_part, y[part], T, kd_weight, clm_weight)
            grad_hidden[rows] = (s @ head).to(grad_hidden.dtype)  # by now s is d loss / d logits
            for total, columns in zip(grad_head.split(4096), s.split(4096, dim=1), strict=True):
                total += columns.T @ x  # summed in float32, in pieces that stay in the cache
        kl, clm, teacher_clm = sums
        ctx.gradients = grad_hidden, grad_head.to(student_head.dtype)
        ctx.mark_non_differentiable(kl, clm, teacher_clm)
        return kd_weight * T**2 * kl + clm_weight * clm, kl, clm, teacher_clm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        (grad_hidden, grad_head), ctx.gradients = ctx.gradients, None  # scaled in place, so for one use only
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), *[None] * 7


def loss_and_gradient_(s, t, y, T, kd_weight, clm_weight):
    """Logits s, t (n, V), targets y (n, 1) -> sums (kl, clm, teacher's clm); s becomes d loss / d s.

    Gradients are differences of distributions. With p = softmax(t / T) and q = softmax(s / T):
        d/ds T² * KL(p || q) = T * (q - p)        d/ds CLM = softmax(s) - onehot(y)
    One exponential makes two of them: e = exp(s / T) is q but for a factor, and e**T is softmax(s).
    """
    z_s, e_s, grad = exponentials(s, T)
    sum_s, total = e_s.sum(-1, keepdim=True), grad.sum(-1, keepdim=True)
    clm = (total.log() - T * z_s.gather(1, y)).sum()
    grad.mul_(clm_weight / total).scatter_add_(1, y, torch.full_like(total, -clm_weight))
    kl = teacher_clm = torch.zeros_like(clm)
    if t is not None:
        z_t, e_t, unsoftened = exponentials(t, T)
        teacher_clm = (unsoftened.sum(-1, keepdim=True).log() - T * z_t.gather(1, y)).sum()
        sum_t = e_t.sum(-1, keepdim=True)
        p, q = e_t.div_(sum_t), e_s.div_(sum_s)
        kl = z_t.sub_(z_s).mul_(p).sum() + (sum_s / sum_t).log().sum()
        grad.add_(q.sub_(p), alpha=kd_weight * T)
    s.copy_(grad)
    return torch.stack((kl, clm, teacher_clm))


def exponentials(logits, T):
    """z, exp(z), exp(T * z) for z = logits / T in float32, shifted so that the largest of a row is 0."""
    z = logits.float() / T
    z -= z.amax(-1, keepdim=True)
    e = z.exp()
    return z, e, e**T if T >= 1 else (T * z).exp()  # below 1, e is 0 where its power is not


def matmul_dtype(tensor):
    """The dtype in which autocast, where it is on, would multiply this tensor."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


class Objective(torch.nn.Module):
    """The loss of one micro-batch. DistributedDataParallel wraps this, so its hooks see each forward pass."""

    def __init__(self, student, teacher, vocab_size, args):
        super().__init__()
        self.student, self.vocab_size, self.args = student, vocab_size, args
        self.frozen = (teacher,)  # in a tuple it is no submodule: neither trained nor exchanged between ranks

    def forward(self, ids, targets):
        """ids, targets (B, T) -> Losses over the real vocabulary, to which both heads are cut."""
        a, (teacher,), hidden, head = self.args, self.frozen, None, None
        if teacher is not None:
            with torch.no_grad():
                hidden, head = teacher.hidden(ids).flatten(0, 1), teacher.head_weight[:self.vocab_size]
        return all_losses(self.student.hidden(ids).flatten(0, 1), self.student.head_weight[:self.vocab_size],
                          hidden, head, targets.flatten(), a.temperature, a.kd_weight, a.clm_weight,
                          a.cos_weight, a.chunk_size)


# ------------------------------------------------------------------------------------ the loop
def train(args, student, teacher, corpus, vocab_size, ranks):
    """Train the student for args.steps. All that is needed to go on after a crash lies in args.out."""
    objective = Objective(student.train(), teacher, vocab_size, args)
    wrapped = DistributedDataParallel(objective) if ranks.world > 1 else objective
    optimizer = make_optimizer(student, args)
    first = run.resume(args, corpus, student, optimizer) if args.resume else 0
    with run.Log(args, first, ranks) as log, run.stop_signals() as stop:
        for step in range(first, args.steps):
            started, sums = time.perf_counter(), torch.zeros(6, device=ranks.device)
            for micro in range(ranks.rank, args.grad_accum, ranks.world):
                index = step * args.grad_accum + micro
                ids, targets, counted = micro_batch(corpus, index, args, ranks.device)
                last = micro + ranks.world >= args.grad_accum  # gradients cross between ranks once a step
                with contextlib.nullcontext() if last or ranks.world == 1 else wrapped.no_sync():
                    with autocast(args, ranks.device):
                        losses = wrapped(ids, targets)
                    losses.loss.backward()
                sums[:5] += torch.stack(losses).detach()
                sums[5] += counted
                if ranks.any(stop):
                    run.save_state(args, corpus, student, optimizer, step, ranks)
                    log.say(f"stopped after step {step}; the same command with --resume goes on from there")
                    sys.exit(128 + (stop or [signal.SIGTERM])[0])
            *sums, tokens = ranks.sum(sums).tolist()
            losses = Losses(*(total / max(tokens, 1) for total in sums))  # sums are divided once, here ...
            for parameter in student.parameters():  # ... and here; DDP has divided by the number of ranks
                parameter.grad.mul_(ranks.world / max(tokens, 1))
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.grad_clip or torch.inf).item()
            lr = lr_at(step, args)
            if not math.isfinite(norm + losses.loss):
                raise InputError(f"step {step + 1}: loss {losses.loss:.3g}, gradient {norm:.3g} at learning "
                                 f"rate {lr:.2g}. Start again with a lower --lr, more --warmup, or "
                                 f"--precision fp32; the last saved state stays in {args.out}")
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            log.write(step + 1, losses, lr=lr, grad_norm=norm, tokens=int(tokens),
                      tokens_per_second=max(1, round(tokens / (time.perf_counter() - started))))
            if args.eval_interval and (step + 1) % args.eval_interval == 0 and ranks.rank == 0:
                row, = run.validate([student], corpus, vocab_size, args, autocast(args, ranks.device))
                log.say(f"step {step + 1}: validation loss {row['loss']:.4f}")
            if (step + 1) % args.save_interval == 0 or step + 1 == args.steps:
                run.save_state(args, corpus, student, optimizer, step + 1, ranks)
    return student.eval()


def micro_batch(corpus, index, args, device):
    """Micro-batch number `index` of the run on the device: ids, targets, and how many targets count."""
    ids, targets = (torch.from_numpy(array) for array in batch_at(
        corpus.train, args.seed, index, args.batch_size, args.seq_len, args.packing, corpus.meta["eot"]))
    # Dropout, like the data, is a function of (seed, index): resumed or on more ranks, a run draws the same.
    torch.manual_seed(args.seed * 1_000_003 + index)
    return ids.to(device), targets.to(device), (targets != -100).sum().item()


def make_optimizer(student, args):
    """AdamW, with weight decay on matrices only: biases and norms have nothing to shrink."""
    matrices = [p for p in student.parameters() if p.dim() >= 2]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=args.eps,
                             fused=args.device != "mps")


def lr_at(step, args):
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, or linear or cosine down to 0."""
    warmup = math.ceil(args.warmup * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, args.steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return args.lr * shape[args.schedule]


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


# ------------------------------------------------------------------------------------ from flags to a run
def load_models(args, device):
    """(tokenizer, teacher or None, student), checked against each other and in the run's precision."""
    tokenizer, teacher = load_tokenizer(args.student if args.teacher == "none" else args.teacher), None
    if args.student and load_tokenizer(args.student).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{args.student} and {args.teacher} have different tokenizers: their distributions "
                         "cannot be compared token by token; choose a student of the teacher's family")
    held = torch.bfloat16 if args.precision.startswith("bf16") else torch.float32
    if args.teacher != "none":  # one that gives its layers away does so in float32, before it is rounded
        teacher = models.load(args.teacher, dtype=held if args.student else torch.float32)
    layers = parse_layers(args.student_layers, len(teacher.blocks)) if args.student_layers else []
    args.student_layers = ",".join(map(str, layers)) or None
    student = first_student(args, teacher, layers)
    for name, network in ((args.teacher, teacher), (args.student or "the student", student)):
        if network and network.config.vocab_size < tokenizer.vocab_size:
            raise InputError(f"{name} has {network.config.vocab_size} embeddings for a tokenizer of "
                             f"{tokenizer.vocab_size} tokens: the two do not belong together")
        if network and network.context < args.seq_len:
            raise InputError(f"--seq-len {args.seq_len}, but {name} has {network.context} positions")
    if args.cos_weight and student.norm.weight.shape != teacher.norm.weight.shape:
        raise InputError(f"--cos-weight needs one width; the teacher's is {len(teacher.norm.weight)}, the "
                         f"student's {len(student.norm.weight)}")
    on_attention = args.dropout if args.attention_dropout is None else args.attention_dropout
    student.set_dropout(args.dropout, on_attention)
    if args.compile:
        for block in [*student.blocks, *(teacher.blocks if teacher else ())]:
            block.compile()
    student = student.to(device, torch.bfloat16 if args.precision == "bf16-pure" else torch.float32)
    return tokenizer, teacher and teacher.to(device, held).requires_grad_(False), student


def first_student(args, teacher, layers):
    """The student before its first step: what args.student names, or those layers of the teacher."""
    torch.manual_seed(args.seed)  # of random weights
    if args.student:
        return (models.build if args.student_init == "random" else models.load)(args.student)
    student = models.student_from(teacher, layers)
    if args.student_init == "random":
        student.initialise()
    return student


def parse_layers(text, depth):
    """`6` -> that many of the teacher's layers, evenly spread; `0,2,4` -> those."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--student-layers {text}: expected a number, or a list such as 0,2,4") from error
    return numbers if "," in text else models.spread_layers(depth, numbers[0])


def main():
    args = parse_args()
    run.check(args)
    if args.device == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        args.device = "cuda" if torch.cuda.is_available() else mps
    if args.device == "cpu":
        run.keep_memory()
    ranks = run.Ranks(args.device)
    if args.grad_accum % ranks.world:
        raise InputError(f"--grad-accum {args.grad_accum} cannot be shared evenly by {ranks.world} processes")
    args.precision = run.precision(args, ranks)
    out, lock = Path(args.out), run.claim(args) if ranks.rank == 0 else None
    with ranks.rank_0_first():
        tokenizer, teacher, student = load_models(args, ranks.device)
        step_tokens = args.grad_accum * args.batch_size * args.seq_len
        budget = None if args.epochs else max(LEAST_TOKENS, args.steps * step_tokens + 1)
        corpus = prepare(args.data, tokenizer, args.data_folder, budget, args.workers, args.text_column)
    corpus.train = corpus.train[:budget]  # there may be more, made for another run
    if args.epochs:
        documents, blocks = corpus.meta["train"]["documents"], (len(corpus.train) - 1) // args.seq_len
        examples = documents if args.packing == "padded" else blocks
        args.steps = math.ceil(args.epochs * examples / (args.batch_size * args.grad_accum))
    if ranks.rank == 0:
        run.print_plan(args, teacher, student, corpus, ranks)
        if not args.resume:
            for name in run.RUN_FILES:
                (out / name).unlink(missing_ok=True)
                (out / "control" / name).unlink(missing_ok=True)
            (out / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    control = copy.deepcopy(student) if args.control and teacher else None
    networks = {"teacher": teacher} if teacher else {}
    networks["student"] = train(args, student, teacher, corpus, tokenizer.vocab_size, ranks)
    if ranks.rank == 0:
        student.save(out)
        tokenizer.save(out)
    if control:
        alone = {"kd_weight": 0.0, "cos_weight": 0.0, "clm_weight": 1.0, "out": str(out / "control")}
        (out / "control").mkdir(exist_ok=True)
        networks["control"] = train(argparse.Namespace(**{**vars(args), **alone}), control, None, corpus,
                                    tokenizer.vocab_size, ranks)
    if ranks.rank == 0:
        scores = run.validate(list(networks.values()), corpus, tokenizer.vocab_size, args,
                              autocast(args, ranks.device))
        table = format_table([{"model": name, **score} for name, score in zip(networks, scores, strict=True)])
        run.write_card(args, ranks, table)
        print(f"\n{table}\n\nNext:  python sample.py --model {out}")
        lock.release()
    ranks.close()


if __name__ == "__main__":
    run_cli(main)
