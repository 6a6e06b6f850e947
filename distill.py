"""Distil a GPT: a small student learns from a teacher's whole next-token distribution, not from text alone.

    python distill.py                                           the demo
    python distill.py --teacher gpt2 --student-layers 6         with GPT-2
    torchrun --nproc_per_node=8 distill.py --recipe distilgpt2  on 8 GPUs

Read in this order:
  plain_loss   T² * KL(teacher || student) + CLM: the whole idea in ten lines
  train        the loop: batch, teacher, student, loss, backward, step, log, save
  main         from the command line to the closing table

Training uses plain_loss: change a line of it, and you train with your change. It is called with a few rows of
logits at a time (support/chunked_loss.py), because the logits of all tokens would not fit into memory.

References: Hinton et al. 2015 (arXiv 1503.02531), Sanh et al. 2019 (arXiv 1910.01108).
Shapes: B sequences in a micro-batch, L tokens in a sequence, N = B * L tokens, C width, V vocabulary.
T is the temperature, and nothing else.
"""
try:
    import support  # noqa: F401  (first: Ctrl-C ends in one line while PyTorch loads)
except ModuleNotFoundError as error:  # python -I, python -P, PYTHONSAFEPATH
    raise SystemExit("error: start Python without -I or -P, or set PYTHONPATH to this folder") from error

import copy
import math
import re
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch.nn import functional as F

from data import batch_at, examples_at, load_tokenizer, numbers_at, prepare, target_offsets
from model import build, load, spread_layers, student_from
from sample import draw
from support import flags, report, teacher_cache
from support.chunked_loss import Losses, chunked_loss
from support.cli import InputError, run_cli
from support.flags import RECIPES
from support.ranks import Ranks, autocast, keep_memory, pick_device, pick_precision, stop_at_once, to_device
from support.run import Run, claim, hash_of_code, published, read_settings, refuse_other_content
from support.teacher_cache import draws_loss
from support.tokenizer import shared_vocabulary

__all__ = ["RECIPES", "LossSettings", "Losses", "distillation_loss", "lr_at", "main", "plain_loss", "train"]


# ------------------------------------------------------------------------------------ the loss
@dataclass(frozen=True)
class LossSettings:
    """What the loss depends on, besides logits. These are also the defaults of the command line."""
    temperature: float = 2.0  # T
    kd_weight: float = 0.9  # of the teacher's term, T² * KL
    clm_weight: float = 0.1  # of the text's term, the CLM
    cos_weight: float = 0.0  # of 1 - cosine of the final hidden states
    divergence: str = "forward"  # a key of LOSSES
    jsd_weight: float = 0.5  # of the teacher in the mixture of jsd_loss
    chunk_size: int | None = None  # tokens whose logits exist at a time; None: by device
    compile: bool = False  # let torch.compile fuse the work on logits; for GPUs

    def __post_init__(self):
        if self.divergence not in LOSSES:
            raise ValueError(f"divergence {self.divergence!r}: must be one of {', '.join(LOSSES)}")

    @classmethod
    def of(cls, args):
        """From the command line's flags of the same names."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def plain_loss(student_logits, teacher_logits, targets, settings):
    """T² * KL(teacher || student) and the causal-language-model loss (CLM), by definition.

    student_logits, teacher_logits (N, V): a score for each possible next token; targets (N,): the next token
    of the text, or -100 if there is none to predict. `settings`: a LossSettings.
    Returns (loss, kl, clm): sums over the counted tokens, in nats. Training minimises the first.
    """
    T = settings.temperature
    s, t, y = without_padding(student_logits, teacher_logits, targets)

    log_p = (t / T).log_softmax(-1)  # the teacher's distribution, softened by T
    log_q = (s / T).log_softmax(-1)  # the student's
    kl = (log_p.exp() * (log_p - log_q)).sum()  # 0 only if the two agree
    clm = F.cross_entropy(s, y, reduction="sum")  # -log of the student's probability of the next token

    # At high T the KL's gradient falls like 1 / T²: once by the chain rule through s / T, and once because
    # softer distributions differ less. T² cancels that; otherwise a high T would turn the term off.
    return settings.kd_weight * T**2 * kl + settings.clm_weight * clm, kl, clm


# The plan, the model card and args.json print this formula. Change it when you change plain_loss.
plain_loss.formula = ("{kd_weight:g} * {temperature:g}² * KL(teacher || student, T = {temperature:g}) + "
                      "{clm_weight:g} * CLM")


def without_padding(student_logits, teacher_logits, targets):
    """The rows that have a target. Padding must not count in any term of the loss."""
    counted = targets != -100
    if torch.compiler.is_compiling() or counted.all():  # the training loop has dropped padding already
        return student_logits, teacher_logits, targets
    return student_logits[counted], teacher_logits[counted], targets[counted]


def reverse_loss(student_logits, teacher_logits, targets, settings):
    """plain_loss with KL(student || teacher). The forward KL makes the student cover everything that its
    teacher finds likely; the reverse KL makes it avoid everything that its teacher finds unlikely."""
    T = settings.temperature
    s, t, y = without_padding(student_logits, teacher_logits, targets)

    log_p = (t / T).log_softmax(-1)
    log_q = (s / T).log_softmax(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum()
    clm = F.cross_entropy(s, y, reduction="sum")
    loss = settings.kd_weight * T**2 * reverse + settings.clm_weight * clm
    return loss, forward_kl(log_p, log_q), clm


reverse_loss.formula = plain_loss.formula.replace("teacher || student", "student || teacher")


def jsd_loss(student_logits, teacher_logits, targets, settings):
    """plain_loss with the Jensen-Shannon divergence, which lies between the forward and the reverse KL: it
    compares both distributions with w * p + (1 - w) * q (Agarwal et al. 2023, arXiv 2306.13649)."""
    T = settings.temperature
    w = settings.jsd_weight
    s, t, y = without_padding(student_logits, teacher_logits, targets)

    log_p = (t / T).log_softmax(-1)
    log_q = (s / T).log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(w), log_q + math.log(1 - w))  # of the mixture
    from_teacher = (log_p.exp() * (log_p - log_m)).sum()
    from_student = (log_q.exp() * (log_q - log_m)).sum()
    jsd = w * from_teacher + (1 - w) * from_student
    clm = F.cross_entropy(s, y, reduction="sum")
    loss = settings.kd_weight * T**2 * jsd + settings.clm_weight * clm
    return loss, forward_kl(log_p, log_q), clm


jsd_loss.formula = plain_loss.formula.replace("KL(teacher || student", "JSD(teacher, student")


def forward_kl(log_p, log_q):
    """The KL for log.csv, the same for every divergence, so that runs can be compared; without a gradient."""
    return (log_p.exp() * (log_p - log_q.detach())).sum()


def text_alone(student_logits, teacher_logits, targets, settings):
    """The CLM alone, for models that learn without a teacher, such as the control."""
    clm = F.cross_entropy(student_logits, targets, ignore_index=-100, reduction="sum")
    return settings.clm_weight * clm, torch.zeros_like(clm), clm


text_alone.formula = "{clm_weight:g} * CLM"

LOSSES = {"forward": plain_loss, "reverse": reverse_loss, "jsd": jsd_loss}  # what --divergence names


def losses_of(student_hidden, student_head, teacher_hidden, teacher_head, targets, settings):
    """All terms of the loss of a micro-batch, as Losses: sums over the counted tokens.

    student_hidden (N, C_s), teacher_hidden (N, C_t): final hidden states; student_head (V, C_s), teacher_head
    (V, C_t). Without a teacher both of its parts are None.
    """
    # The loss of logits, computed from hidden states for a few tokens at a time.
    loss_function = text_alone if teacher_hidden is None else LOSSES[settings.divergence]
    losses = chunked_loss(
        loss_function, student_hidden, student_head, teacher_hidden, teacher_head, targets, settings)
    if teacher_hidden is None:
        return losses

    # Losses of the hidden states themselves, if any has a weight.
    for name, (_, hidden_loss) in HIDDEN_LOSSES.items():
        if weight := getattr(settings, name):
            term = hidden_loss(student_hidden, teacher_hidden, targets)
            losses = losses._replace(loss=losses.loss + weight * term, cos=losses.cos + term.detach())
    return losses


def cosine_distance(student_hidden, teacher_hidden, targets):
    """Sum of 1 - cos(student's, teacher's final hidden state) over counted tokens (Sanh et al. 2019)."""
    distance = 1 - F.cosine_similarity(student_hidden.float(), teacher_hidden.float(), dim=-1)  # (N,)
    return distance.masked_fill(targets == -100, 0.0).sum()


# Losses of hidden states: {field of LossSettings with its weight: (its name in the formula, the loss)}.
HIDDEN_LOSSES = {"cos_weight": ("(1 - cos)", cosine_distance)}


def distillation_loss(student_hidden, student_head, teacher_hidden, teacher_head, targets, **settings):
    """kd_weight * T² * KL(softmax(t / T) || softmax(s / T)) + clm_weight * CLM, for use in other programs.

    Arguments as for `losses_of`; settings: the fields of LossSettings, by name. Returns (loss, kl, clm), sums
    over the counted tokens, in nats: divide them once, by the tokens of the whole step. The KL includes the
    teacher's entropy, so a perfect student scores 0. Only the student gets a gradient. ValueError if the
    heads differ in V. Source: Hinton et al. 2015, section 2.
    """
    losses = losses_of(
        student_hidden, student_head, teacher_hidden, teacher_head, targets, LossSettings(**settings))
    return losses.loss, losses.kl, losses.clm


def chosen_loss(args):
    """The loss of logits that will train."""
    if args.teacher_cache:
        return draws_loss
    return text_alone if args.teacher == "none" else LOSSES[args.divergence]


def objective(args):
    """The formula of the loss that will train, with its numbers, without terms whose weight is 0."""
    hidden = [f"{{{weight}:g}} * {name}" for weight, (name, _) in HIDDEN_LOSSES.items()]
    formula = " + ".join([chosen_loss(args).formula, *hidden])
    terms = formula.format(**vars(args)).split(" + ")
    return "loss = " + " + ".join(term for term in terms if not term.startswith("0 * "))


# ------------------------------------------------------------------------------------ the loop
def train(args, student, teacher, corpus, vocab_size, ranks, bar=None):
    """Train the student for args.steps. After a crash, the files in args.out are enough to resume.

    teacher: None to learn from the text alone, or from args.teacher_cache. vocab_size: V, the entries that
    both models have. ranks: the processes that share the micro-batches of a step. bar: shows the progress.
    """
    settings = LossSettings.of(args)
    teacher_head = teacher.head_weight[:vocab_size] if teacher else None  # (V, C_t)
    cache = open_cache(args, corpus, ranks.device)
    optimizer = make_optimizer(student, args)
    student.train()

    with Run(args, student, optimizer, corpus, ranks, teacher, bar) as run:
        for step in run.steps():
            sums = torch.zeros(len(Losses._fields), device=ranks.device)  # of Losses, on this rank
            for micro in ranks.share(args.grad_accum):
                # Batch: a function of (seed, step, micro-batch) alone, so a killed run can resume exactly.
                index = step * args.grad_accum + micro
                ids, targets = micro_batch(corpus, index, args, ranks.device)  # (B, L), (N,)
                if is_on_policy(index, args):
                    ids, targets = students_text(student, ids, index, args)

                # Teacher: it is not trained, so no_grad keeps nothing for a backward pass.
                teacher_hidden = None
                if teacher:
                    with torch.no_grad(), autocast(args, ranks.device):
                        teacher_hidden = teacher.hidden(ids).flatten(0, 1)  # (N, C_t)

                # Student, and the loss: how far its distribution of each next token is from the teacher's.
                with autocast(args, ranks.device):
                    student_hidden = student.hidden(ids).flatten(0, 1)  # (N, C_s)
                    student_head = student.head_weight[:vocab_size]  # (V, C_s)
                    if cache:  # the teacher's answers were stored before the run
                        losses = chunked_loss(
                            draws_loss, student_hidden, student_head, cache(index), None, targets, settings)
                    else:
                        losses = losses_of(
                            student_hidden, student_head, teacher_hidden, teacher_head, targets, settings)

                # Backward: the loss is a sum over tokens, and its gradients add up in .grad.
                losses.loss.backward()
                sums += torch.stack(losses).detach()
                run.after_micro_batch(step)

            # Divide once, by the tokens that counted in all micro-batches of all ranks.
            totals = Losses(*ranks.sum(sums))
            norm = divide_and_clip(student, totals.tokens, args.grad_clip, ranks)
            mean_losses, tokens, gradient_norm = mean_over_tokens(totals, norm)

            # Step.
            lr = lr_at(step, args)
            run.check(step, mean_losses, gradient_norm, lr)
            take_step(optimizer, lr)

            # Log, validate, save.
            run.finish_step(step, mean_losses, tokens, lr, gradient_norm)
    return student.eval()


def micro_batch(corpus, index, args, device):
    """Micro-batch number `index` of the run, on the device: ids (B, L), and the ids that follow, (N,).

    Also seeds everything random that follows in it, such as dropout.
    """
    ids, targets = batch_at(
        corpus.train, args.seed, index, args.batch_size, args.seq_len, args.packing, corpus.eot)

    # Like the data, dropout is a function of (seed, index): it is the same after a resume or on more ranks.
    torch.manual_seed(run_seed(args, index))
    return to_device(ids, device), to_device(targets, device).flatten()


def run_seed(args, index):
    """The seed of everything random in micro-batch `index` of the run."""
    return (args.seed * 1_000_003 + index) % 2**63


def is_on_policy(index, args):
    """Whether the student writes half of micro-batch `index` itself: args.on_policy of them, spread evenly.

    0.25 -> 3, 7, 11, ...: where the running total 0.25, 0.5, 0.75, 1, ... reaches a whole number.
    """
    return math.floor((index + 1) * args.on_policy) > math.floor(index * args.on_policy)


def students_text(student, ids, index, args):
    """Let the student write the second half of each example itself: on-policy data (Agarwal et al. 2023).
    ids (B, L) -> ids (B, L), targets (N,), in which only the student's own tokens count.

    In its own text a student meets its own mistakes, and its teacher shows how to continue from there.
    """
    B, L = ids.shape
    half = L // 2
    student.eval()  # without dropout, as in later use
    choose = partial(draw, generator=torch.Generator(ids.device).manual_seed(run_seed(args, index)))
    text = student.generate(ids[:, :half], L + 1 - half, choose)  # (B, L + 1), as targets are one ahead
    student.train()

    targets = text[:, 1:].clone()
    targets[:, :half - 1] = -100
    return text[:, :-1], targets.flatten()


def mean_over_tokens(totals, norm):
    """Losses of a step (sums) and the gradient's norm, as tensors -> mean Losses per counted token, the
    number of tokens, the norm, all as Python numbers.

    All numbers of a step leave the device here, at once, because each read waits until the GPU has finished
    its work so far.
    """
    *sums, gradient_norm = torch.stack((*totals, norm)).tolist()
    tokens = max(Losses(*sums).tokens, 1)
    return Losses(*(total / tokens for total in sums)), tokens, gradient_norm


def make_optimizer(student, args):
    """AdamW, with weight decay on matrices only, not on biases and norms."""
    matrices = [p for p in student.parameters() if p.dim() >= 2]
    vectors = [p for p in student.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = args.device != "mps"  # one kernel for all parameters; Apple's GPUs have none
    return torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), eps=args.eps, fused=fused)


def divide_and_clip(student, tokens, limit, ranks):
    """Add .grad up over all ranks, divide it by `tokens` (a tensor), clip its norm to `limit` (0: do not).

    Returns the norm before clipping, a tensor.
    """
    # Losses are sums, so gradients are, too. Here, and only here, they are divided.
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
    """Flags win over the recipe, the recipe over the defaults; see support/flags.py."""
    args = flags.parse_args(__doc__, LossSettings(), argv)
    flags.check(args)
    args.objective = objective(args)
    args.loss_code = hash_of_code(chosen_loss(args), text_alone, losses_of)  # an edited loss is another run
    return args


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    if args.device == "cpu":
        keep_memory()
    with Ranks(args.device) as ranks, stop_at_once(ranks.is_first):
        flags.check_ranks(args, ranks)
        with claim(args, ranks) as finished:  # no other process can use --out meanwhile
            distil(args, ranks, finished)


def distil(args, ranks, finished):
    """Teacher, student and corpus; train; perhaps the control; then the table.

    finished: whether args.out has a finished run with these settings. Then only its table is shown again.
    """
    resumed = read_settings(args.out) if args.resume else {}
    args.precision = pick_precision(args.precision, resumed.get("precision"), ranks)
    with ranks.first_goes_first():
        tokenizer, teacher, student = load_models(args, ranks.device)
        corpus = load_corpus(args, tokenizer)
    V = tokenizer.vocab_size
    if finished:
        refuse_other_content(args, corpus, student, teacher)
        if ranks.is_first:
            report.show_again(args)
        return
    if ranks.is_first:
        report.print_plan(args, teacher, student, corpus, ranks)
        report.warn_of_unknown_text(args, teacher, corpus, tokenizer)

    networks = {"teacher": teacher} if teacher else {}
    control = copy.deepcopy(student) if args.control and teacher else None
    if args.teacher_cache:
        cache_teacher(args, teacher, corpus, V, ranks)
        networks["teacher"] = teacher = None  # the cache replaces it, and its memory is free again

    with report.open_progress(args, ranks, corpus) as bar:
        networks["student"] = train(args, student, teacher, corpus, V, ranks, bar)
        export(student, tokenizer, args, ranks)

        # What was the teacher worth? The control is the same student on the same text, without a teacher.
        if control:
            control_args = flags.control_of(args)
            if ranks.is_first:
                report.about_control(control_args)
            networks["control"] = train(control_args, control, None, corpus, V, ranks, bar)
            export(control, tokenizer, control_args, ranks)

        if ranks.is_first:
            if args.teacher_cache:
                networks["teacher"] = load(args.teacher, ranks.device, teacher_dtype(args))
            report.close(args, networks, corpus, tokenizer, ranks, draw, bar)


def cache_teacher(args, teacher, corpus, vocab_size, ranks):
    """Fill the folder args.teacher_cache with the teacher's answers for the whole corpus, if it lacks any."""
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


def load_models(args, device):
    """(tokenizer, teacher or None, student), checked against each other and in the run's precision."""
    tokenizer = common_tokenizer(args)

    # If the student is made of the teacher's layers, read the teacher in float32, so that the student starts
    # from weights that are not rounded.
    teacher = None
    if args.teacher != "none":
        teacher = load(args.teacher, dtype=teacher_dtype(args) if args.student else torch.float32)
    student = first_student(args, teacher)
    if args.seq_len is None:
        contexts = [network.context for network in (teacher, student) if network]
        args.seq_len = min(1024, *contexts)
    check_models(args, tokenizer, teacher, student)

    attention_dropout = args.dropout if args.attention_dropout is None else args.attention_dropout
    student.set_dropout(args.dropout, attention_dropout)
    student = student.to(device, torch.bfloat16 if args.precision == "bf16-pure" else torch.float32)
    if teacher:
        teacher = teacher.to(device, teacher_dtype(args)).requires_grad_(False)
    if args.compile:
        compile_layers(student, teacher)
    return tokenizer, teacher, student


def common_tokenizer(args):
    """The student's tokenizer, limited to the ids that the teacher shares; InputError if the two differ."""
    tokenizer = load_tokenizer(args.student or args.teacher)
    if args.student and args.teacher != "none":
        # Compare only the ids that both have: one of them may have more special tokens, such as [PAD].
        tokenizer.vocab_size = shared_vocabulary(load_tokenizer(args.teacher), tokenizer)
        if not tokenizer.vocab_size:
            raise InputError(f"{args.student} and {args.teacher} have different tokenizers: their "
                             "distributions cannot be compared token by token; choose a student of the "
                             "teacher's family")
    return tokenizer


def teacher_dtype(args):
    """The teacher's weights never change, so they are stored in the precision of its products."""
    return torch.bfloat16 if args.precision.startswith("bf16") else torch.float32


def first_student(args, teacher):
    """The student before its first step: the model args.student, or the teacher's args.student_layers."""
    torch.manual_seed(args.seed)  # of random weights
    if args.student:
        return build(args.student) if args.student_init == "random" else load(args.student)

    layers = parse_layers(args.student_layers, len(teacher.blocks))
    args.student_layers = ",".join(map(str, layers))  # "6" becomes "0,2,4,7,9,11"
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
    """InputError if teacher, student, tokenizer and flags do not fit together."""
    for name, network in ((args.teacher, teacher), (args.student or "the student", student)):
        if network and network.config.vocab_size < tokenizer.vocab_size:
            raise InputError(f"{name} has {network.config.vocab_size} embeddings for a tokenizer of "
                             f"{tokenizer.vocab_size} tokens: the two do not belong together")
        if network and network.context < args.seq_len:
            raise InputError(f"--seq-len {args.seq_len}, but {name} has {network.context} positions")
    if args.cos_weight and student.config.width != teacher.config.width:
        raise InputError(f"--cos-weight needs one width; the teacher's is {teacher.config.width}, the "
                         f"student's {student.config.width}")


def compile_layers(student, teacher):
    """torch.compile all blocks. InputError if it finds no compiler on this machine."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=student.head_weight.device))
    except Exception as error:  # of a dozen classes, with messages of a hundred lines
        raise InputError("--compile does not work here: torch.compile needs a C++ compiler (and Triton on a "
                         "GPU). Install g++, or leave --compile out") from error
    for block in [*student.blocks, *(teacher.blocks if teacher else ())]:
        block.compile()


LEAST_TOKENS = 2**24  # of a corpus, so that short runs share one


def load_corpus(args, tokenizer):
    """The corpus, built if it is missing, cut to the number of tokens that the steps can read. With --epochs
    it decides args.steps. Padded examples skip the rest of long documents, so such a run may read some
    documents twice."""
    step_examples = args.batch_size * args.grad_accum
    budget = None if args.epochs else max(LEAST_TOKENS, args.steps * step_examples * args.seq_len + 1)
    corpus = prepare(args.data, tokenizer, args.data_folder, budget, args.workers, args.text_column)
    corpus.train = corpus.train[:budget]  # a longer run may have built a larger corpus

    if args.epochs:
        n_examples = (len(corpus.train) - 1) // args.seq_len
        if args.packing == "padded":
            n_examples = corpus.meta["train"]["documents"]
        args.steps = math.ceil(args.epochs * n_examples / step_examples)
    return corpus


def export(student, tokenizer, args, ranks):
    """Write the student as a folder that transformers can open."""
    if ranks.is_first:
        with published(args.out) as folder:
            student.save(folder)
            tokenizer.save(folder, student.context)


if __name__ == "__main__":
    run_cli(main)
