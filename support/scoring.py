"""How well models predict text that they have not written. Only this file holds logits for evaluation.

  score_tokens     one batch -> scores for each model and token
  score            ... summed over each sequence
  compare          many batches -> sums for each model
  score_held_out   the held-out text of a run -> sums for each model and piece of text
  table_rows       these sums -> the rows of the table that a run prints; validate does both
  difference       how far two models are apart on the same text, with its noise

Shapes: M models, B sequences, L tokens of each, N = B * L, C width, V vocabulary,
W pieces of text.
"""
import math

import torch
from torch.nn import functional as F

from support.cli import InputError

SCORES = (  # what is summed over tokens
    "nll",  # negative log-likelihood in nats, over all logits, as anyone who loads the model would compute it
    "kl",  # KL(first model || model) in nats, over the tokens that both know
    "agree",  # the likeliest token is the first model's
    "accepted",  # sum over V of min(p, q): the chance that the first model keeps a token drafted by this one
    "right",  # the likeliest token is the target
    "tokens",
)


@torch.no_grad()
def score_tokens(models, ids, targets, vocab_size, chunk_size=512):
    """SCORES (M, 6, B, L) of the `targets` (B, L) that follow `ids` (B, L); 0 for those that are -100.

    Two models are compared over the first `vocab_size` logits: those beyond are padding, and models differ in
    how much of it they have.
    """
    scores = torch.zeros(len(models), len(SCORES), targets.numel(), device=ids.device)  # (M, 6, N)
    # Hidden states of all tokens are small. Logits are V / C times as large, so they come in chunks.
    hidden = [model.hidden(ids).flatten(0, 1) for model in models]  # each (N, C)
    flat = targets.flatten()
    counted = (flat != -100).nonzero().flatten()

    for rows in counted.split(chunk_size):
        target = flat[rows]
        for i, (model, states) in enumerate(zip(models, hidden, strict=True)):
            logits = F.linear(states[rows], model.head_weight).float()  # (chunk, V)
            nll = F.cross_entropy(logits, target, reduction="none")
            top = logits.argmax(-1)

            # The first model is compared with itself: KL 0, and each of its drafts would be accepted.
            kl = torch.zeros_like(nll)
            accepted = torch.ones_like(nll)
            if i == 0:
                first_logits = logits[:, :vocab_size]
                first_top = top
            else:
                log_p = first_logits.log_softmax(-1)
                log_q = logits[:, :vocab_size].log_softmax(-1)
                kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                accepted = torch.minimum(log_p, log_q).exp().sum(-1)

            columns = (nll, kl, top == first_top, accepted, top == target, torch.ones_like(nll))
            scores[i][:, rows] = torch.stack(columns)

    return scores.unflatten(-1, targets.shape).cpu().double()


def score(models, ids, targets, vocab_size, chunk_size=512):
    """Sums of SCORES over each sequence: (M, 6, B)."""
    return score_tokens(models, ids, targets, vocab_size, chunk_size).sum(-1)


def compare(models, batches, vocab_size):
    """Sums over `batches` of (ids, targets), each (B, L): for each model a dict of SCORES."""
    totals = sum(score(models, ids, targets, vocab_size).sum(-1) for ids, targets in batches)  # (M, 6)
    return [dict(zip(SCORES, total, strict=True)) for total in totals.tolist()]


# ------------------------------------------------------------------------------------ held-out text
def validate(networks, corpus, vocab_size, args, autocast):
    """A row of the table for each network, on the start of the held-out text; a teacher comes first."""
    return table_rows(networks, score_held_out(networks, corpus, vocab_size, args, autocast), corpus)


PIECE = 64  # tokens


def score_held_out(networks, corpus, vocab_size, args, autocast, bar=None):
    """Sums of SCORES over each piece of the first --eval-tokens of the held-out text: (M, 6, W)."""
    device = networks[0].head_weight.device
    # A student in the middle of its training goes back to that at the end.
    in_training = [network for network in networks if network.training]
    for network in in_training:
        network.eval()

    pieces = []
    with autocast:
        for ids, targets in held_out_batches(corpus, args, device):
            scores = score_tokens(networks, ids, targets, vocab_size).flatten(2)  # (M, 6, B * L)
            pieces += [piece.sum(-1) for piece in scores.split(PIECE, -1)]  # each (M, 6)
            if bar is not None:
                bar.update()

    for network in in_training:
        network.train()
    return torch.stack(pieces, -1)


def held_out_batches(corpus, args, device):
    """Disjoint blocks of the first --eval-tokens: yield ids and targets, each (B, L), as in training."""
    tokens = torch.from_numpy(corpus.val[:args.eval_tokens + 1].astype("int64"))
    length = min(args.seq_len, len(tokens) - 1)
    if length < 1:
        raise InputError(f"{len(tokens)} held-out tokens are too few to be scored: take more text")
    blocks = tokens.unfold(0, length + 1, length)  # (W, L + 1): the last of a block starts the next one
    for block in blocks.split(args.batch_size):
        yield block[:, :-1].to(device), block[:, 1:].to(device)


def table_rows(networks, scores, corpus):
    """SCORES (M, 6, W) -> a dict of figures for each network. If there are several, the first is the teacher.

    Bits per byte assume that these tokens have the mean length of all that is held out.
    """
    bytes_per_token = corpus.meta["val"]["bytes"] / corpus.meta["val"]["tokens"]
    rows = []
    for network, sums in zip(networks, scores.sum(-1), strict=True):
        total = dict(zip(SCORES, sums.tolist(), strict=True))
        loss = total["nll"] / total["tokens"]
        row = {"parameters": network.num_parameters(), "loss": loss, "perplexity": exp(loss),
               "bits per byte": loss / bytes_per_token / math.log(2)}
        if len(networks) > 1:
            row["KL to teacher"] = total["kl"] / total["tokens"]
            row["same top-1"] = total["agree"] / total["tokens"]
            row["acceptance"] = total["accepted"] / total["tokens"]
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------ noise
PARTS = 32  # of the held-out text, at most: neighbouring pieces come from one document, so they are alike
FEW_PARTS = 5  # fewer than these do not show how much parts differ


def ratio(totals, counts):
    """sum(totals) / sum(counts) over independent parts of a text, and its standard error, to first order."""
    n = len(totals)
    mean = totals.sum() / counts.sum()
    error = (totals - mean * counts).norm() / counts.sum() * math.sqrt(n / max(1, n - 1))
    return mean, error


def difference(scores, a, b=None):
    """The loss of model `a` minus that of model `b` (None: nothing), and two standard errors.

    All models read the same text, and what is hard for one is hard for the others. So the errors are those of
    the differences, part by part, which are much smaller than those of the losses.
    """
    nll = scores[a, SCORES.index("nll")]  # (W)
    if b is not None:
        nll = nll - scores[b, SCORES.index("nll")]
    tokens = scores[a, SCORES.index("tokens")]

    # Pieces are joined to fewer, longer parts, which depend less on each other.
    n = min(PARTS, len(tokens))
    totals, counts = (torch.stack([part.sum() for part in x.tensor_split(n)]) for x in (nll, tokens))
    mean, error = ratio(totals, counts)
    return mean.item(), 2 * error.item() if n >= FEW_PARTS else math.inf


def exp(nats):
    """exp, and infinity instead of an OverflowError: a model that diverged can lose 1,000 nats a token."""
    return math.inf if nats > 700 else math.exp(nats)
