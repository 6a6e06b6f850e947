"""Perplexity, with its protocol spelled out (work in progress: `compare` is what distill.py uses)."""
from contextlib import nullcontext

import torch
from torch.nn import functional as F


@torch.no_grad()
def compare(models, batches, vocab_size, autocast=nullcontext, chunk_size=1024):
    """Score several models on the same tokens; the first one is the reference of the others.

    models: list of GPTs that share a vocabulary. batches: iterable of (ids, targets), each (B, T) tensors on the models'
    device; targets of -100 are not scored. Distributions are over the first `vocab_size` entries (heads may be padded).
    Returns one dict a model: sums over scored tokens of `nll` (nats), `nll_squared`, `kl` = KL(reference || model) at
    T = 1, `agree` (same argmax as the reference), and their number, `tokens`. Logits exist for `chunk_size` tokens at a time.
    """
    names = ("nll", "nll_squared", "kl", "agree", "tokens")
    totals = torch.zeros(len(models), len(names), dtype=torch.float64)
    for ids, targets in batches:
        with autocast():
            hidden = [model.hidden(ids).flatten(0, 1) for model in models]  # each (N, C)
        targets = targets.flatten()
        for rows in (targets != -100).nonzero().flatten().split(chunk_size):
            reference = None
            for total, model, states in zip(totals, models, hidden, strict=True):
                with autocast():
                    logits = F.linear(states[rows], model.head_weight[:vocab_size])
                logp = logits.float().log_softmax(-1)  # (chunk, V)
                reference = logp if reference is None else reference
                nll = -logp.gather(1, targets[rows, None])
                kl = (reference.exp() * (reference - logp)).sum()
                agree = (logp.argmax(-1) == reference.argmax(-1)).sum()
                total += torch.stack((nll.sum(), nll.square().sum(), kl, agree, agree * 0 + len(rows))).double().cpu()
    return [dict(zip(names, total.tolist(), strict=True)) for total in totals]


def format_table(rows):
    """Rows (dicts with the same keys) as a Markdown table whose columns line up in a terminal, too."""
    cells = [list(rows[0])] + [[f"{v:.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)
                               for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(f"{c:{'<' if i == 0 else '>'}{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
