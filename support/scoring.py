"""How models do on tokens that they have not written: the only place where evaluation has logits.

  score      one batch of tokens -> sums for each model and sequence
  compare    many batches -> sums for each model
  validate   the rows of the table that a run of distill.py prints

Shapes: M models, B sequences, L tokens of each, N = B * L, C width, V vocabulary.
"""
import math

import torch
from torch.nn import functional as F

from support.cli import InputError

SCORES = (  # what is summed over tokens
    "nll",  # negative log-likelihood in nats, over all logits, as for anyone who loads it
    "kl",  # KL(first model || model) in nats, over the tokens that both know
    "agree",  # the likeliest token is the first model's
    "right",  # the likeliest token is the target
    "tokens",
)


@torch.no_grad()
def score(models, ids, targets, vocab_size, chunk_size=512):
    """SCORES (M, 5, B): sums over the `targets` (B, L) that follow `ids` (B, L) and are not -100.

    The KL is over the first `vocab_size` logits: those beyond only pad, and not each model has as many.
    Logits exist for `chunk_size` tokens at a time.
    """
    scores = torch.zeros(len(models), len(SCORES), targets.numel(), device=ids.device)  # (M, 5, N)
    hidden = [model.hidden(ids).flatten(0, 1) for model in models]  # each (N, C)
    flat = targets.flatten()
    counted = (flat != -100).nonzero().flatten()

    for rows in counted.split(chunk_size):
        target = flat[rows]
        for i, (model, states) in enumerate(zip(models, hidden, strict=True)):
            logits = F.linear(states[rows], model.head_weight).float()  # (chunk, V)
            nll = F.cross_entropy(logits, target, reduction="none")
            top = logits.argmax(-1)
            if i == 0:
                first_logits = logits[:, :vocab_size]
                first_top = top
                kl = torch.zeros_like(nll)
            else:
                log_q = logits[:, :vocab_size].log_softmax(-1)
                log_p = first_logits.log_softmax(-1)
                kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            columns = (nll, kl, top == first_top, top == target, torch.ones_like(nll))
            scores[i][:, rows] = torch.stack(columns)

    return scores.unflatten(-1, targets.shape).cpu().double().sum(-1)


def compare(models, batches, vocab_size):
    """Sums over `batches` of (ids, targets), each (B, L): for each model a dict of SCORES."""
    totals = sum(score(models, ids, targets, vocab_size).sum(-1) for ids, targets in batches)  # (M, 5)
    return [dict(zip(SCORES, total, strict=True)) for total in totals.tolist()]


def validate(networks, corpus, vocab_size, args, autocast, watch=iter):
    """A row of the table for each network, on the start of the held-out text; a teacher comes first.

    Bits per byte are of tokens with the mean length of all that is held out.
    `watch`: what the batches go through on their way, such as a progress bar.
    """
    device = networks[0].head_weight.device
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    with autocast:
        sums = compare(networks, watch(held_out_batches(corpus, args, device)), vocab_size)
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)

    bytes_per_token = corpus.meta["val"]["bytes"] / corpus.meta["val"]["tokens"]
    rows = []
    for network, total in zip(networks, sums, strict=True):
        loss = total["nll"] / total["tokens"]
        row = {"parameters": network.num_parameters(), "loss": loss, "perplexity": exp(loss),
               "bits per byte": loss / bytes_per_token / math.log(2)}
        if len(networks) > 1:
            row["KL to teacher"] = total["kl"] / total["tokens"]
            row["same top-1"] = total["agree"] / total["tokens"]
        rows.append(row)
    return rows


def held_out_batches(corpus, args, device):
    """Disjoint blocks of the first --eval-tokens: yield ids and targets, each (B, L), as in training."""
    tokens = torch.from_numpy(corpus.val[:args.eval_tokens + 1].astype("int64"))
    length = min(args.seq_len, len(tokens) - 1)
    if length < 1:
        raise InputError(f"{len(tokens)} held-out tokens are too few to be scored: take more text")
    blocks = tokens.unfold(0, length + 1, length)  # (n, L + 1): the last of a block starts the next one
    for block in blocks.split(args.batch_size):
        yield block[:, :-1].to(device), block[:, 1:].to(device)


def exp(nats):
    """exp, and infinity instead of an OverflowError: a model that diverged can lose 1,000 nats a token."""
    return math.inf if nats > 700 else math.exp(nats)
