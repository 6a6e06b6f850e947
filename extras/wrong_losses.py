"""Mistakes of public distillation code, each as a loss.

    python -m extras.wrong_losses --page   makes the table of docs/wrong-losses.md anew

One function for each mistake; MISTAKES holds all of them by name. The right loss is distill.plain_loss.
extras/check_loss.py finds these mistakes in other code, and docs/wrong-losses.md shows what each does to a
student. Those students are trained: commit 4cd76ba has the code that made them.

The functions take the arguments of distill.plain_loss, in the shapes that such code uses: logits are
(B, L, V) and targets (B, L). They return (loss, kl, clm) as means, or as what the author took for a mean.
With @wrong_kl they only say what happens to the KL of log q and log p. Each function makes one mistake. If
that mistake is not about padding, it ignores -100, as its runs had none.

Shapes: B sequences, L tokens in each, N = B * L, V vocabulary. T is the temperature.
"""
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn import functional as F

from extras.study import Study
from support.cli import run_cli

PADDING_ROWS = 64  # extra rows of a teacher's vocabulary that only pad it
TOP = 12  # tokens that a truncated teacher keeps


class Mistake(NamedTuple):
    name: str  # in the table of the page
    loss: Callable  # (student_logits, teacher_logits, targets, settings) -> (loss, kl, clm)
    anchor: str  # the section of docs/wrong-losses.md
    sources: tuple  # where it was found: "owner/repository #number"


MISTAKES = {}  # by name, in the order of this file


def mistake(name, anchor, *sources):
    """Adds the function below it to MISTAKES."""
    def add(loss):
        MISTAKES[name] = Mistake(name, loss, anchor, sources)
        return loss
    return add


def wrong_kl(*about):
    """Adds the loss that is right but for its KL, which the function below makes of log q and log p."""
    def add(divergence):
        def loss(student_logits, teacher_logits, targets, settings):
            log_q, log_p = softened(student_logits, teacher_logits, settings)
            kl = divergence(log_q, log_p, targets, settings)
            return weighted(kl, mean_clm(student_logits, targets), settings)

        loss.__doc__ = divergence.__doc__
        return mistake(*about)(loss)
    return add


# ------------------------------------------------------------------------------------ what they share
def softened(student_logits, teacher_logits, settings):
    """log q and log p at temperature T."""
    T = settings.temperature
    return (student_logits / T).log_softmax(-1), (teacher_logits / T).log_softmax(-1)


def mean_kl(log_q, log_p):
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


def mean_clm(student_logits, targets):
    return F.cross_entropy(student_logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def weighted(kl, clm, settings):
    """The mixture as it should be: (loss, kl, clm)."""
    return settings.kd_weight * settings.temperature**2 * kl + settings.clm_weight * clm, kl, clm


# ------------------------------------------------------------------------------------ divisors
@wrong_kl("batchmean", "divisors", "huggingface/transformers #1181", "neuralmagic/sparseml #592")
def batchmean(log_q, log_p, targets, settings):
    """`batchmean` only divides by B: the KL of a whole sequence beside the CLM of one token."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@wrong_kl("mean over vocabulary", "divisors", "huggingface/trl #4105")
def mean_over_vocabulary(log_q, log_p, targets, settings):
    """`mean`, the default of F.kl_div, divides by the vocabulary, too."""
    return F.kl_div(log_q, log_p, reduction="mean", log_target=True)


@mistake("divided twice", "divisors", "modelscope/easydistill #16")
def divided_twice(student_logits, teacher_logits, targets, settings):
    """The loss is a mean already, and the trainer divides by the tokens again."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    n_tokens = (targets != -100).sum()
    kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / n_tokens
    return weighted(kl / n_tokens, mean_clm(student_logits, targets) / n_tokens, settings)


@wrong_kl("mean of means", "divisors", "huggingface/trl #4719", "modelscope/ms-swift #10076")
def mean_of_means(log_q, log_p, targets, settings):
    """Right for one micro-batch. If several differ in length, the tokens of short ones weigh more."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)[targets != -100].mean()


@wrong_kl("divisor of other tokens", "divisors", "huggingface/trl #6452", "huggingface/trl #6478")
def divisor_of_other_tokens(log_q, log_p, targets, settings):
    """The sum skips padding, but its divisor counts other tokens than were summed."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)[targets != -100].sum() / targets.numel()


# ------------------------------------------------------------------------------------ padding
@wrong_kl("padding counted", "padding", "peremartra/optipfair #34", "linkedin/Liger-Kernel #974",
          "jxiw/MambaInLlama #11")
def padding_counted(log_q, log_p, targets, settings):
    """The CLM skips -100, and the KL does not."""
    return mean_kl(log_q, log_p)


# ------------------------------------------------------------------------------------ weights
@mistake("T² missing", "weights", "keras-team/keras-io #869", "IntelLabs/distiller #122")
def t_squared_missing(student_logits, teacher_logits, targets, settings):
    """Without T² the KL has 1 / T² of the weight that it was given."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = mean_kl(log_q, log_p)
    clm = mean_clm(student_logits, targets)
    return settings.kd_weight * kl + settings.clm_weight * clm, kl, clm


@mistake("only the report is right", "weights", "axolotl-ai-cloud/axolotl #3660")
def only_the_report_is_right(student_logits, teacher_logits, targets, settings):
    """T², the weights and the CLM are in the number, but not in the gradient."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = mean_kl(log_q, log_p)
    loss, kl, clm = weighted(kl, mean_clm(student_logits, targets), settings)
    return kl + (loss - kl).detach(), kl, clm


@mistake("half the CLM unasked", "weights", "huggingface/trl #5731")
def half_the_clm_unasked(student_logits, teacher_logits, targets, settings):
    """A fused loss keeps its own default weights, whatever weights the run asked for."""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = mean_kl(log_q, log_p)
    clm = mean_clm(student_logits, targets)
    return 0.5 * settings.temperature**2 * kl + 0.5 * clm, kl, clm


@mistake("temperature ignored", "weights", "huggingface/trl #5731")
def temperature_ignored(student_logits, teacher_logits, targets, settings):
    """A fused loss softens with a temperature of its own, here 1, whatever temperature the run asked for."""
    log_q, log_p = softened(student_logits, teacher_logits, replace(settings, temperature=1.0))
    return weighted(mean_kl(log_q, log_p), mean_clm(student_logits, targets), settings)


# ------------------------------------------------------------------------------------ another divergence
@wrong_kl("no entropy", "another-divergence", "meta-pytorch/torchtune #1698")
def no_entropy(log_q, log_p, targets, settings):
    """A "forward KL" that is a cross-entropy: a perfect student scores its teacher's entropy, not 0."""
    return -(log_p.exp() * log_q).sum(-1).mean()


@wrong_kl("arguments swapped", "another-divergence", "paiml/aprender #2153")
def arguments_swapped(log_q, log_p, targets, settings):
    """F.kl_div(a, b) is KL(b || a): with the teacher first it is the reverse KL."""
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) / targets.numel()


@wrong_kl("mixture exchanged", "another-divergence", "huggingface/trl #3043")
def mixture_exchanged(log_q, log_p, targets, settings):
    """The mixture of the JSD gives the student the teacher's weight, and the other way round."""
    w = settings.jsd_weight
    log_m = torch.logaddexp(log_q + math.log(w), log_p + math.log(1 - w))
    return (w * log_p.exp() * (log_p - log_m) + (1 - w) * log_q.exp() * (log_q - log_m)).sum(-1).mean()


@wrong_kl("probability for logarithm", "another-divergence", "microsoft/ProDA #20", "microsoft/ProDA #43")
def probability_for_logarithm(log_q, log_p, targets, settings):
    """F.kl_div expects the student's log-probabilities. Given probabilities, it sums p * (log p - q)."""
    return F.kl_div(log_q.exp(), log_p.exp(), reduction="sum") / targets.numel()


@wrong_kl("log_target forgotten", "another-divergence", "nlp-with-transformers/notebooks #94")
def log_target_forgotten(log_q, log_p, targets, settings):
    """The teacher's log-probabilities are taken for probabilities."""
    return F.kl_div(log_q, log_p, reduction="sum") / targets.numel()


@mistake("top-K on one side", "another-divergence", "AI-Hypercomputer/maxtext #4056")
def top_k_on_one_side(student_logits, teacher_logits, targets, settings):
    """The teacher's probabilities sum to 1 over its likeliest tokens, the student's over all of them."""
    log_q, _ = softened(student_logits, teacher_logits, settings)
    likeliest = teacher_logits.topk(TOP)
    log_p = (likeliest.values / settings.temperature).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q.gather(-1, likeliest.indices))).sum(-1).mean()
    return weighted(kl, mean_clm(student_logits, targets), settings)


@wrong_kl("top-K clamped", "another-divergence", "verl-project/verl #7856")
def top_k_clamped(log_q, log_p, targets, settings):
    """The KL over the teacher's likeliest tokens can be below 0. Clamped there, it has no gradient."""
    log_p, ids = log_p.topk(TOP)
    return (log_p.exp() * (log_p - log_q.gather(-1, ids))).sum(-1).clamp(min=0).mean()


# ------------------------------------------------------------------------------------ numbers
@wrong_kl("logarithm of zero", "numbers", "linkedin/Liger-Kernel #769", "linkedin/Liger-Kernel #1397",
          "linkedin/Liger-Kernel #1453")
def logarithm_of_zero(log_q, log_p, targets, settings):
    """The JSD mixes probabilities: 0 * log 0 is NaN where both are below 1e-45."""
    w = settings.jsd_weight
    log_m = (w * log_p.exp() + (1 - w) * log_q.exp()).log()
    return (w * log_p.exp() * (log_p - log_m) + (1 - w) * log_q.exp() * (log_q - log_m)).sum(-1).mean()


@wrong_kl("NaN behind a finite loss", "numbers", "huggingface/trl #5594")
def nan_behind_a_finite_loss(log_q, log_p, targets, settings):
    """-inf marks padding in the teacher's answers. The sum leaves it out, but its gradient is 0 * inf."""
    log_p = log_p.masked_fill((targets == -100)[..., None], -math.inf)
    return (log_q.exp() * (log_q - log_p)).nan_to_num().sum(-1)[targets != -100].mean()


@mistake("softmax in bf16", "numbers", "linkedin/Liger-Kernel #1432")
def softmax_in_bf16(student_logits, teacher_logits, targets, settings):
    """Eight bits for the difference of two nearly equal logarithms."""
    with torch.autocast(student_logits.device.type, enabled=False):
        log_q, log_p = softened(student_logits.bfloat16(), teacher_logits.bfloat16(), settings)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return weighted(kl.float(), mean_clm(student_logits, targets), settings)


# ------------------------------------------------------------------------------------ columns and positions
@mistake("zeros for missing rows", "columns-and-positions", "linkedin/Liger-Kernel #634",
         "arcee-ai/DistillKit #37")
def zeros_for_missing_rows(student_logits, teacher_logits, targets, settings):
    """A student whose vocabulary has fewer rows than its teacher's gets logits of 0 in their place."""
    # Set the stage: a teacher with extra rows that only pad, so its training has pushed them far down.
    teacher_logits = F.pad(teacher_logits, (0, PADDING_ROWS), value=-100)

    missing = teacher_logits.size(-1) - student_logits.size(-1)
    log_q, log_p = softened(F.pad(student_logits, (0, missing)), teacher_logits, settings)
    return weighted(mean_kl(log_q, log_p), mean_clm(student_logits, targets), settings)


@mistake("softmax over the sequence", "columns-and-positions", "salesforce/ALBEF #58", "uta-smile/TCL #12")
def softmax_over_the_sequence(student_logits, teacher_logits, targets, settings):
    """The student's probabilities sum to 1 over the tokens of a sequence instead of the vocabulary."""
    _, log_p = softened(student_logits, teacher_logits, settings)
    log_q = (student_logits / settings.temperature).log_softmax(1)
    return weighted(mean_kl(log_q, log_p), mean_clm(student_logits, targets), settings)


@mistake("teacher shifted alone", "columns-and-positions", "linkedin/fmchisel #23")
def teacher_shifted_alone(student_logits, teacher_logits, targets, settings):
    """The teacher's logits are shifted by a token and the student's are not."""
    log_q, log_p = softened(student_logits[:, :-1], teacher_logits[:, 1:], settings)
    return weighted(mean_kl(log_q, log_p), mean_clm(student_logits, targets), settings)


@mistake("labels shifted twice", "columns-and-positions", "huggingface/transformers #562",
         "huggingface/transformers #44642", "huggingface/transformers #46898")
def labels_shifted_twice(student_logits, teacher_logits, targets, settings):
    """Targets that are shifted already meet a model that shifts them again: the student learns the token
    after the next. (The three sources train language models; none of them distils.)"""
    log_q, log_p = softened(student_logits, teacher_logits, settings)
    kl = mean_kl(log_q, log_p)
    clm = mean_clm(student_logits[:, :-1], targets[:, 1:])
    return weighted(kl, clm, settings)


# ------------------------------------------------------------------------------------ the teacher
@mistake("answers to another example", "the-teacher", "haitongli/knowledge-distillation-pytorch #4",
         "haitongli/knowledge-distillation-pytorch #9", "haitongli/knowledge-distillation-pytorch #17")
def answers_to_another_example(student_logits, teacher_logits, targets, settings):
    """The teacher's answers were kept in one order, and the examples have been shuffled since."""
    log_q, log_p = softened(student_logits, teacher_logits.roll(1, dims=0), settings)
    return weighted(mean_kl(log_q, log_p), mean_clm(student_logits, targets), settings)


@mistake("teacher against itself", "the-teacher", "labmlai/annotated_deep_learning_paper_implementations #66")
def teacher_against_itself(student_logits, teacher_logits, targets, settings):
    """Both sides of the KL are the teacher's: it is 0, and the student learns from the text alone."""
    log_q, log_p = softened(teacher_logits, teacher_logits, settings)
    return weighted(mean_kl(log_q, log_p), mean_clm(student_logits, targets), settings)


# ------------------------------------------------------------------------------------ results
def show(value):
    if value is None:  # JSON has no NaN
        return "NaN"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def losses_table(rows):
    """Each right loss, and after it the mistakes that were trained with its settings."""
    return [{
        "loss": name,
        "perfect student": show(row["perfect on screen"]),
        "first step": show(row["initial on screen"]),
        "held-out loss": row.get("ends as") or show(row["loss"]),
        "KL to teacher": "" if "ends as" in row else show(row["kl"]),
    } for name, row in rows.items()]


STUDY = Study("wrong_losses", __doc__, tables={"losses": losses_table}, page="wrong-losses",
              made_by="4cd76ba")

if __name__ == "__main__":
    run_cli(STUDY.main)
