"""Distil a GPT: a small student learns from a teacher's whole next-token distribution, not from text alone.

    python distill.py                                           the demo
    python distill.py --teacher gpt2 --student-layers 6         with GPT-2
    torchrun --nproc_per_node=8 distill.py --recipe distilgpt2  on 8 GPUs

Read in this order:
  plain_loss   T² * KL(teacher || student) + CLM: the whole idea in ten lines
  train        the loop: batch, teacher, student, loss, backward, step, log, save
  main         from the command line to the closing table

The loss that runs by default is support/chunked_loss.py: the same value and gradient in less memory and time.
To train with a loss of your own, replace the line `kl = ...` in plain_loss and run `python distill.py --loss
plain`. After a stop or a crash the same command with `--resume` goes on.

References: Hinton et al. 2015 (arXiv 1503.02531), Sanh et al. 2019 (arXiv 1910.01108).
Shapes: B sequences in a micro-batch, L tokens in a sequence, N = B * L tokens, C width, V vocabulary.
T is the temperature, and nothing else.
"""
import support.start  # noqa: F401  (first: Ctrl-C ends in one line while PyTorch loads)

import argparse
import copy
import math
import re
from functools import partial

import torch
from torch.nn import functional as F

from data import batch_at, examples_at, load_tokenizer, numbers_at, prepare, target_offsets
from model import build, load, spread_layers, student_from
from sample import draw
from support import closing, options, teacher_cache
from support.card import print_plan, write_card
from support.chunked_loss import Losses, LossSettings, chunked_losses, cosine_distance, distillation_loss
from support.cli import InputError, format_table, pick_device, run_cli
from support.options import RECIPES
from support.outlook import check_memory, work_to_follow
from support.progress import watched
from support.run import Run
from support.runtime import Ranks, autocast, keep_memory, pick_precision, stop_at_once, to_device
from support.scoring import held_out_batches, validate
from support.state import RunFolder, read_settings
from support.tokenizer import shared_vocabulary

__all__ = ["RECIPES", "distillation_loss", "lr_at", "main", "parse_args", "plain_loss", "train"]


# ------------------------------------------------------------------------------------ the loss
def plain_loss(student_logits, teacher_logits, targets, settings):
    """T² * KL(teacher || student) and the causal-language-model loss (CLM), by definition.

    student_logits, teacher_logits (N, V): a score for each possible next token; targets (N,): the token that
    did come next, or -100 where there is none to predict. `settings`: a LossSettings.
    Returns (loss, kl, clm): sums over the counted tokens, in nats.
    """
    T = settings.temperature
    counted = targets != -100  # padding has nothing to teach
    s = student_logits[counted]
    t = teacher_logits[counted]

    log_p = (t / T).log_softmax(-1)  # the teacher's distribution, softened by T
    log_q = (s / T).log_softmax(-1)  # the student's
    kl = (log_p.exp() * (log_p - log_q)).sum()
    clm = F.cross_entropy(s, targets[counted], reduction="sum")

    divergence = kl if settings.divergence == "forward" else other_divergence(log_p, log_q, settings)
    # At high T the KL's gradient falls like 1 / T²: once by the chain rule through s / T, once because softer
    # distributions differ less. T² cancels that; otherwise a high T would turn the term off.
    return settings.kd_weight * T**2 * divergence + settings.clm_weight * clm, kl, clm


def other_divergence(log_p, log_q, settings):
    """Instead of the forward KL (Agarwal et al. 2023, arXiv 2306.13649). log_p, log_q (N, V) -> a sum.

    The forward KL makes the student cover all that its teacher finds likely, the reverse KL makes it avoid
    what its teacher finds unlikely; jsd compares both with a mixture and lies in between.
    """
    if settings.divergence == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum()

    w = settings.jsd_weight
    log_m = torch.logaddexp(log_p + math.log(w), log_q + math.log(1 - w))  # the mixture w * p + (1 - w) * q
    from_teacher = (log_p.exp() * (log_p - log_m)).sum()
    from_student = (log_q.exp() * (log_q - log_m)).sum()
    return w * from_teacher + (1 - w) * from_student


def plain_losses(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
    """plain_loss from final hidden states (N, C) and heads (V, C), with all that the log shows, as Losses.

    It makes the logits of all tokens at once, (N, V): autograd needs them, and memory pays for them.
    """
    student_logits = F.linear(student_hidden, student_head).float()
    if teacher_hidden is None:  # the control, which learns from the text alone
        clm = F.cross_entropy(student_logits, targets, ignore_index=-100, reduction="sum")
        loss = settings.clm_weight * clm
        kl = teacher_clm = torch.zeros_like(clm)
    else:
        teacher_logits = F.linear(teacher_hidden, teacher_head).float()
        loss, kl, clm = plain_loss(student_logits, teacher_logits, targets, settings)
        teacher_clm = F.cross_entropy(teacher_logits, targets, ignore_index=-100, reduction="sum")

    cos = torch.zeros_like(clm)
    if settings.cos_weight:
        cos = cosine_distance(student_hidden, teacher_hidden, targets)
        loss = loss + settings.cos_weight * cos
    tokens = (targets != -100).sum()
    return Losses(loss, kl.detach(), clm.detach(), cos.detach(), teacher_clm, tokens)


LOSSES = {"chunked": chunked_losses, "plain": plain_losses}  # what --loss names


# ------------------------------------------------------------------------------------ the loop
def train(args, student, teacher, corpus, vocab_size, ranks, later=0.0):
    """Train the student for args.steps. All that is needed to go on after a crash lies in args.out.

    teacher: None to learn from the text alone, or from args.teacher_cache. vocab_size: V, the entries that
    both models have. ranks: the processes among which the micro-batches of a step are shared. later: how much
    work follows, counted in micro-batches; with it the time left is that of all.
    """
    losses_of = LOSSES[args.loss]
    settings = LossSettings.of(args)
    teacher_head = teacher.head_weight[:vocab_size] if teacher else None  # (V, C_t)
    cache = open_cache(args, corpus, ranks.device)
    optimizer = make_optimizer(student, args)
    student.train()

    with Run(args, student, optimizer, corpus, vocab_size, ranks, later) as run:
        for step in run.steps():
            sums = torch.zeros(len(Losses._fields), device=ranks.device)  # of Losses, on this rank
            for micro in ranks.share(args.grad_accum):
                # Batch: a function of (seed, step, micro-batch) alone, so a run can stop and go on.
                index = step * args.grad_accum + micro
                ids, targets = micro_batch(corpus, index, args, ranks.device)  # (B, L), (N,)
                if is_on_policy(index, args):
                    ids, targets = students_text(student, ids, index, args)

                # Teacher: it only answers, so nothing is kept for a backward pass.
                with torch.no_grad(), autocast(args, ranks.device):
                    teacher_says = teacher.hidden(ids).flatten(0, 1) if teacher else None  # (N, C_t)
                if cache:  # with --teacher-cache it has answered before the run
                    teacher_says = cache(index)  # Draws: see support/sparse_loss.py

                # Student, and the loss: how far its distribution of each next token is from the teacher's.
                with autocast(args, ranks.device):
                    student_hidden = student.hidden(ids).flatten(0, 1)  # (N, C_s)
                    student_head = student.head_weight[:vocab_size]  # (V, C_s)
                    losses = losses_of(
                        student_hidden, student_head, teacher_says, teacher_head, targets, settings)

                # Backward: the loss is a sum over tokens, and its gradients add up in .grad.
                losses.loss.backward()
                sums += torch.stack(losses).detach()
                run.after_micro_batch(step)

            # Divide once, by the tokens that counted in all micro-batches of all ranks.
            sums = ranks.sum(sums)
            norm = divide_and_clip(student, sums[TOKENS], args.grad_clip, ranks)
            mean_losses, tokens, gradient_norm = mean_over_tokens(sums, norm)

            # Step.
            lr = lr_at(step, args)
            run.check(step, mean_losses, gradient_norm, lr)
            take_step(optimizer, lr)

            # Log, validate, save.
            run.finish_step(step, mean_losses, tokens, lr, gradient_norm)
    return student.eval()


def micro_batch(corpus, index, args, device):
    """Micro-batch number `index` of the run, on the device: ids (B, L), and the ids that follow, (N,). What
    is random in it, such as dropout, is seeded here, too."""
    ids, targets = batch_at(
        corpus.train, args.seed, index, args.batch_size, args.seq_len, args.packing, corpus.eot)

    # Dropout, like the data, is a function of (seed, index): resumed or on more ranks, a run draws the same.
    torch.manual_seed(run_seed(args, index))
    return to_device(ids, device), to_device(targets, device).flatten()


def run_seed(args, index):
    """The seed of all that is random in micro-batch `index` of the run."""
    return (args.seed * 1_000_003 + index) % 2**63


def is_on_policy(index, args):
    """Whether the student writes half of micro-batch `index` itself: args.on_policy of them, spread evenly.

    0.25 -> 3, 7, 11, ...: those at which the running total, 0.25, 0.5, 0.75, 1, ..., passes a whole number.
    """
    return math.floor((index + 1) * args.on_policy) > math.floor(index * args.on_policy)


def students_text(student, ids, index, args):
    """Replace the second half of each example by what the student writes after the first: on-policy data
    (Agarwal et al. 2023). ids (B, L) -> ids (B, L), targets (N,), where what the student wrote is counted.

    On its own text a student meets the mistakes that it makes, and its teacher says how to go on from there.
    """
    B, L = ids.shape
    half = L // 2
    student.eval()  # without dropout, as it will write when it is used
    choose = partial(draw, generator=torch.Generator(ids.device).manual_seed(run_seed(args, index)))
    text = student.generate(ids[:, :half], L + 1 - half, choose)  # (B, L + 1), as targets are one ahead
    student.train()

    targets = text[:, 1:].clone()
    targets[:, :half - 1] = -100
    return text[:, :-1], targets.flatten()


TOKENS = Losses._fields.index("tokens")


def mean_over_tokens(sums, norm):
    """Sums of Losses, and the gradient's norm, as tensors -> (mean Losses per counted token, tokens, norm).

    The numbers of a step leave the device here, all at once: to read one is to wait until a GPU has done all
    that it was told so far.
    """
    *totals, gradient_norm = torch.cat((sums, norm.view(1))).tolist()
    tokens = max(totals[TOKENS], 1)
    return Losses(*(total / tokens for total in totals)), tokens, gradient_norm


def make_optimizer(student, args):
    """AdamW, with weight decay on matrices only: biases and norms have nothing to shrink."""
    matrices = [p for p in student.parameters() if p.dim() >= 2]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = args.device != "mps"  # one kernel for all parameters, where there is one
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=args.eps, fused=fused)


def divide_and_clip(student, tokens, limit, ranks):
    """Add .grad up over all ranks, divide it by `tokens` (a tensor), clip its norm to `limit` (0: do not).

    Returns the norm before clipping, a tensor.
    """
    factor = 1 / tokens.clamp(min=1)
    for parameter in student.parameters():
        ranks.sum(parameter.grad)
        parameter.grad.mul_(factor)
    return torch.nn.utils.clip_grad_norm_(student.parameters(), limit or torch.inf)


def take_step(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def lr_at(step, args):
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, or linear or cosine down to 0."""
    warmup = math.ceil(args.warmup * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup

    done = (step - warmup) / max(1, args.steps - warmup)  # from 0 to nearly 1
    if args.schedule == "linear":
        return args.lr * (1 - done)
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * done)) / 2
    return args.lr


# ------------------------------------------------------------------------------------ from flags to a run
def parse_args(argv=None):
    """Flags win over the recipe, the recipe over the defaults; see support/options.py."""
    return options.parse_args(__doc__, argv)


def main():
    args = parse_args()
    options.check(args)
    args.device = pick_device(args.device)
    if args.device == "cpu":
        keep_memory()
    ranks = Ranks(args.device)
    with stop_at_once(ranks.is_first):
        if args.grad_accum % ranks.world:
            raise InputError(
                f"--grad-accum {args.grad_accum} cannot be shared evenly by {ranks.world} processes")

        # --out is held for this process, and refused if it holds something else.
        folder = RunFolder(args, ranks)
        try:
            folder.claim()
            distil(args, ranks)
        finally:
            folder.release()
            ranks.close()


def distil(args, ranks):
    """Teacher, student and corpus; train; perhaps the control; then the table."""
    resumed = (read_settings(args.out) or {}) if args.resume else {}
    args.precision = pick_precision(args.precision, resumed.get("precision"), ranks)
    with ranks.first_goes_first():
        tokenizer, teacher, student = load_models(args, ranks.device)
        memory = check_memory(args, teacher, student, tokenizer.vocab_size, ranks)
        corpus = load_corpus(args, tokenizer)
    if ranks.is_first:
        print_plan(args, teacher, student, corpus, memory, ranks)
        warn_of_unknown_text(args, teacher, corpus, tokenizer)

    networks = {"teacher": teacher} if teacher else {}
    control = copy.deepcopy(student) if args.control and teacher else None
    training, scoring, scoring_by_control = work_to_follow(args, teacher, student, control, ranks)
    if args.teacher_cache:
        cache_teacher(args, teacher, corpus, tokenizer.vocab_size, ranks)
        networks["teacher"] = teacher = None  # the cache answers for it; its memory is the student's
    networks["student"] = train(
        args, student, teacher, corpus, tokenizer.vocab_size, ranks, training + scoring)
    export(student, tokenizer, args.out, ranks)

    # The control answers what the teacher was worth: the same student and tokens, but the text alone.
    if control:
        control_args = options.control_of(args)
        if ranks.is_first:
            print("\n" + closing.about_control(control_args), flush=True)
        networks["control"] = train(
            control_args, control, None, corpus, tokenizer.vocab_size, ranks, scoring_by_control)
        export(control, tokenizer, control_args.out, ranks)

    if ranks.is_first:
        if args.teacher_cache:
            networks["teacher"] = load(args.teacher, ranks.device, teacher_dtype(args)).requires_grad_(False)
        close(args, networks, corpus, tokenizer, ranks)


def cache_teacher(args, teacher, corpus, vocab_size, ranks):
    """Have what the teacher says of the whole corpus in the folder args.teacher_cache."""
    cut = args.seq_len, args.packing, corpus.eot
    offsets = target_offsets(corpus.train, *cut)
    wanted = teacher_cache.wanted_header(args, teacher, corpus, vocab_size, offsets)

    def answers_of(numbers):
        ids, targets = examples_at(corpus.train, numbers, *cut)
        return teacher_cache.answers_to(teacher, ids, targets, numbers, args, wanted)

    reads = args.steps * args.grad_accum * args.batch_size * args.seq_len
    teacher_cache.make(args.teacher_cache, wanted, answers_of, offsets, ranks, reads)


def open_cache(args, corpus, device):
    """A function from the number of a micro-batch to the Draws of its targets, or None without a cache."""
    if not args.teacher_cache:
        return None
    offsets = target_offsets(corpus.train, args.seq_len, args.packing, corpus.eot)
    cache = teacher_cache.TeacherCache(args.teacher_cache, offsets)
    n_examples = len(offsets) - 1
    return lambda index: cache.draws(numbers_at(args.seed, index, args.batch_size, n_examples), device)


def warn_of_unknown_text(args, teacher, corpus, tokenizer):
    """Before days are spent: does this teacher know the text? The first 2,048 held-out tokens tell."""
    if not teacher or not args.kd_weight:
        return
    few = argparse.Namespace(eval_tokens=2048, batch_size=1, seq_len=args.seq_len)
    device = teacher.head_weight.device
    row, = validate([teacher], corpus, tokenizer.vocab_size, few, autocast(args, device))
    text = held_out_text(corpus, tokenizer, few.eval_tokens)
    if warning := closing.unknown_text(args, {"teacher": row}, text):
        print(f"\n{warning}\n", flush=True)


def close(args, networks, corpus, tokenizer, ranks):
    """Score all on the same held-out text; the table, what it means, what they write, what to do next."""
    batches = len([*held_out_batches(corpus, args, "cpu")])
    scores = validate(
        [*networks.values()], corpus, tokenizer.vocab_size, args, autocast(args, ranks.device),
        lambda found: watched(found, "scoring   ", batches))
    rows = dict(zip(networks, scores, strict=True))
    table = [{"model": name, **row} for name, row in rows.items()]
    write_card(args, ranks, format_table(table))

    # Without the parameters, which the plan has said, it fits into 80 columns.
    narrow = [{column: value for column, value in row.items() if column != "parameters"} for row in table]
    paragraphs = [
        format_table(narrow),
        closing.verdict(rows, args),
        closing.unknown_text(args, rows, held_out_text(corpus, tokenizer, args.eval_tokens)),
        "" if args.compile else closing.show_texts(networks, corpus, tokenizer, draw),
    ]
    print("\n" + "\n\n".join(filter(None, paragraphs)) + "\n", flush=True)
    print(closing.next_steps(args, networks, corpus, closing.picture(args)))


def held_out_text(corpus, tokenizer, n_tokens):
    """What is scored, as text."""
    ids = corpus.val[:n_tokens]
    return tokenizer.decode(ids[ids != corpus.eot].tolist())


def load_models(args, device):
    """(tokenizer, teacher or None, student), checked against each other and in the run's precision."""
    tokenizer = common_tokenizer(args)

    # A teacher that gives its layers away is read in float32, so that the student starts from weights that
    # are not rounded.
    teacher = None
    if args.teacher != "none":
        teacher = load(args.teacher, dtype=teacher_dtype(args) if args.student else torch.float32)
    student = first_student(args, teacher)
    if args.seq_len is None:
        contexts = [network.context for network in (teacher, student) if network]
        args.seq_len = min(1024, *contexts)
    check_models(args, tokenizer, teacher, student)

    on_attention = args.dropout if args.attention_dropout is None else args.attention_dropout
    student.set_dropout(args.dropout, on_attention)
    student = student.to(device, torch.bfloat16 if args.precision == "bf16-pure" else torch.float32)
    if teacher:
        teacher = teacher.to(device, teacher_dtype(args)).requires_grad_(False)
    if args.compile:
        for block in [*student.blocks, *(teacher.blocks if teacher else ())]:
            block.compile()
    return tokenizer, teacher, student


def common_tokenizer(args):
    """The student's tokenizer, with the ids that the teacher has, too; InputError if the two differ."""
    tokenizer = load_tokenizer(args.student or args.teacher)
    if args.student and args.teacher != "none":
        # Compared are the ids that both have: one of the two may know more special tokens, such as [PAD].
        tokenizer.vocab_size = shared_vocabulary(load_tokenizer(args.teacher), tokenizer)
        if not tokenizer.vocab_size:
            raise InputError(f"{args.student} and {args.teacher} have different tokenizers: their "
                             "distributions cannot be compared token by token; choose a student of the "
                             "teacher's family")
    return tokenizer


def teacher_dtype(args):
    """The teacher's weights, which nobody updates, are held in the precision in which it computes."""
    return torch.bfloat16 if args.precision.startswith("bf16") else torch.float32


def first_student(args, teacher):
    """The student before its first step: what args.student names, or args.student_layers of the teacher."""
    torch.manual_seed(args.seed)  # of random weights
    if args.student:
        return build(args.student) if args.student_init == "random" else load(args.student)

    layers = parse_layers(args.student_layers, len(teacher.blocks))
    args.student_layers = ",".join(map(str, layers))  # from here on, which, not how many
    student = student_from(teacher, layers)
    if args.student_init == "random":
        student.initialise()
    return student


def parse_layers(text, depth):
    """`6` -> that many of the teacher's layers, evenly spread; `0,2,4` -> those; `4,` -> that one."""
    if not re.fullmatch(r"-?[0-9]{1,9}(, ?[0-9]{1,9})*,?", text):
        raise InputError(f"--student-layers {text:.99}: expected a number, or a list such as 0,2,4")
    numbers = [int(part) for part in text.removesuffix(",").split(",")]
    if len(numbers) > 1000:
        raise InputError(f"--student-layers names {len(numbers)} layers: take at most 1000")
    return numbers if "," in text else spread_layers(depth, numbers[0])


def check_models(args, tokenizer, teacher, student):
    """InputError where teacher, student, tokenizer and flags do not belong together."""
    for name, network in ((args.teacher, teacher), (args.student or "the student", student)):
        if network and network.config.vocab_size < tokenizer.vocab_size:
            raise InputError(f"{name} has {network.config.vocab_size} embeddings for a tokenizer of "
                             f"{tokenizer.vocab_size} tokens: the two do not belong together")
        if network and network.context < args.seq_len:
            raise InputError(f"--seq-len {args.seq_len}, but {name} has {network.context} positions")
    if args.cos_weight and student.config.width != teacher.config.width:
        raise InputError(f"--cos-weight needs one width; the teacher's is {teacher.config.width}, the "
                         f"student's {student.config.width}")


LEAST_TOKENS = 2**24  # in a corpus, so that short runs share one


def load_corpus(args, tokenizer):
    """The corpus, made if need be, cut to as many tokens as the steps have room for. With --epochs it decides
    args.steps. Padded examples skip the rest of long documents, so such a run may read documents twice."""
    step_examples = args.batch_size * args.grad_accum
    budget = None if args.epochs else max(LEAST_TOKENS, args.steps * step_examples * args.seq_len + 1)
    corpus = prepare(args.data, tokenizer, args.data_folder, budget, args.workers, args.text_column)
    corpus.train = corpus.train[:budget]  # there may be more, made for another run

    if args.epochs:
        n_examples = (len(corpus.train) - 1) // args.seq_len
        if args.packing == "padded":
            n_examples = corpus.meta["train"]["documents"]
        args.steps = math.ceil(args.epochs * n_examples / step_examples)
    return corpus


def export(student, tokenizer, folder, ranks):
    """A folder that transformers opens, too."""
    if ranks.is_first:
        student.save(folder)
        tokenizer.save(folder, student.context)


if __name__ == "__main__":
    run_cli(main)
