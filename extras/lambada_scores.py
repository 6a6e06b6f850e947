"""What the LAMBADA study asks of a model: does it copy, and what does it lose where copying would help?

  figures        all of it
  on_items       our LAMBADA, by eval_ppl's protocol, and the same where there is nothing to copy
  copy_accuracy  tokens that stand there twice: drawn from the vocabulary, or names
  split_loss     the loss on held-out text, by whether the target, or its pair, stood there before

Shapes: B windows, L tokens of a window, N tokens in all.
"""
import numpy as np
import torch
from torch.nn import functional as F

from eval_ppl import Window, collate, lambada, score_windows
from extras.lambada_items import ARGS, exchanged, losses
from extras.lambada_text import name_list
from support.scoring import exp

RANDOM_LENGTHS = (16, 64)  # tokens that are repeated
HELD_OUT_BLOCKS = 60  # of L = 256 tokens
DIVISORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)  # of the logits: are they only too sure, or not enough?


def figures(model, corpus, items, names, tokenizer):
    """{figure: value} of a model, and two lists with a number for each item."""
    model = model.eval()
    found = on_items(model, items, tokenizer)
    found |= {f"copy random {n}": copy_accuracy(model, random_twice(n, tokenizer), tokenizer)
              for n in RANDOM_LENGTHS}
    found["copy names"] = copy_accuracy(model, names_twice(names, tokenizer), tokenizer)
    return found | split_loss(model, corpus.val)


# ------------------------------------------------------------------------------------ our LAMBADA
def on_items(model, items, tokenizer):
    """Perplexity and accuracy of the last word; the same after the best rescaling of the logits; with the
    word exchanged wherever it stood before. In nats for each item: `items`, `items exchanged`."""
    logits, targets, of = word_logits(model, [item["text"] for item in items], tokenizer)
    nll = sum_by_word(F.cross_entropy(logits, targets, reduction="none"), of)
    wrong = sum_by_word((logits.argmax(-1) != targets).float(), of)
    rescaled = [float(F.cross_entropy(logits / divisor, targets, reduction="sum")) / len(items)
                for divisor in DIVISORS]

    without = [exchanged(item["text"], item["other"]) for item in items]
    others, right_without = losses(model, without, tokenizer)
    return {
        "lambada perplexity": exp(float(nll.mean())),
        "lambada accuracy": float((wrong == 0).float().mean()),
        "rescaled perplexity": exp(min(rescaled)),
        "best divisor": DIVISORS[int(np.argmin(rescaled))],
        "exchanged perplexity": exp(float(others.mean())),
        "exchanged accuracy": float(right_without.mean()),
        "items": [round(nats, 3) for nats in nll.tolist()],
        "items exchanged": [round(nats, 3) for nats in others.tolist()],
    }


@torch.no_grad()
def word_logits(model, texts, tokenizer):
    """For the n tokens of the last words, as eval_ppl's `lambada` cuts them: logits (n, V), targets (n,), and
    of which text each is (n,)."""
    windows = [window for text in texts for window in lambada(text, tokenizer, ARGS)]
    found = []
    for start in range(0, len(windows), ARGS.batch_size):
        ids, targets = collate(windows[start:start + ARGS.batch_size], ARGS.device)  # each (B, L)
        row, column = (targets != -100).nonzero(as_tuple=True)  # each (n,)
        logits = F.linear(model.hidden(ids)[row, column], model.head_weight).float()
        found.append((logits, targets[row, column], start + row))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def sum_by_word(values, of):
    """values (n,) of tokens -> their sums by text."""
    return torch.zeros(int(of.max()) + 1).index_add_(0, of, values)


# ------------------------------------------------------------------------------------ copying
def random_twice(n, tokenizer, times=24):
    """Windows of n random tokens that stand there twice; all but the first of the second time are scored."""
    rng = np.random.default_rng(n)
    for _ in range(times):
        ids = rng.integers(0, tokenizer.eot, n)
        yield Window(np.concatenate([[tokenizer.eot], ids, ids]), n - 1, 0.0, 0.0)


def names_twice(names, tokenizer, times=24):
    """Windows of 8 to 48 names, and the same again; all but the first name of the second time is scored."""
    rng = np.random.default_rng(0)
    for _ in range(times):
        text = name_list(names, rng)
        first_name = text.partition("\n")[2].partition(" ")[0]
        ids = tokenizer.encode_array(text.rstrip())
        scored = text.rstrip().partition("\n")[2].removeprefix(first_name)
        window = np.append(tokenizer.eot, ids)[-ARGS.context - 1:]
        yield Window(window, len(tokenizer.encode(scored)), 0.0, 0.0)


def copy_accuracy(model, windows, tokenizer, args=ARGS):
    """The share of the scored tokens that are the likeliest."""
    scores = score_windows({"model": model}, [*windows], args, tokenizer.vocab_size)[0]
    _, _, _, right, tokens = scores.sum(-1).tolist()
    return right / tokens


# ------------------------------------------------------------------------------------ the loss, split
@torch.no_grad()
def split_loss(model, ids, length=ARGS.context):
    """Loss and share of the held-out tokens of each kind; `loss` is that of all, in nats per token."""
    tokens = torch.from_numpy(ids[:HELD_OUT_BLOCKS * length + 1].astype("int64"))
    blocks = tokens.unfold(0, length + 1, length)  # (B, L + 1)
    inputs, targets = blocks[:, :-1], blocks[:, 1:]  # each (B, L)
    nll = torch.cat([F.cross_entropy(model(i).float().transpose(1, 2), t, reduction="none")
                     for i, t in zip(inputs.split(8), targets.split(8), strict=True)])  # (B, L)

    found = {"loss": float(nll.mean()), "perplexity": exp(float(nll.mean()))}
    for kind, where in kinds_of_targets(inputs, targets).items():
        found[f"loss {kind}"] = float(nll[where].mean())
        found[f"share {kind}"] = float(where.float().mean())
    return found


def kinds_of_targets(inputs, targets):
    """{kind: where (B, L)}: `pair` and the target have stood in the window before, in this order; the target
    has, but after something else, at most 32 tokens ago (`near`) or more (`far`); it has not (`new`).

    A head that copies (Olsson et al. 2022, arXiv 2209.11895) looks for what followed the present
    token before.
    """
    distance = torch.zeros_like(targets)  # to where the target stood last; 0: nowhere
    pair = torch.zeros_like(targets, dtype=torch.bool)
    for row, (tokens, following) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
        last = {}
        pairs = set()
        for i, (token, target) in enumerate(zip(tokens, following, strict=True)):
            last[token] = i
            if target in last:
                distance[row, i] = i + 1 - last[target]
            pair[row, i] = (token, target) in pairs
            pairs.add((token, target))

    near = (distance > 0) & (distance <= 32) & ~pair
    return {"pair": pair, "near": near, "far": (distance > 32) & ~pair, "new": distance == 0}
