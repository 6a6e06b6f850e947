"""Perplexity that says which one it is: per token, per word, per byte, by the protocols of published numbers.

    python eval_ppl.py gpt2 distilgpt2                    WikiText's test set as in Hugging Face's guide
    python eval_ppl.py gpt2 distilgpt2 --protocol pages   ... as in lm-evaluation-harness's `wikitext`
    python eval_ppl.py gpt2 distilgpt2 --data lambada     lm-evaluation-harness's `lambada_openai`
    python eval_ppl.py demo/teacher out                   offline: the code that the demo held out

Read in this order: tokenize and windows (all that the protocols differ in), score (the only place where
logits exist), figures (perplexities and standard errors). The texts come from data.read_texts. The guide is
huggingface.co/docs/transformers/perplexity, the harness github.com/EleutherAI/lm-evaluation-harness.
Shapes: M models, B windows, T tokens, N = B * T, V vocabulary. NLL: negative log-likelihood, summed, in nats.
"""
import argparse
import json
import math
import re
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import Corpus, load_tokenizer
from model import DTYPES, GPT2, load
from support.cli import InputError, format_table, run_cli
from support.documents import READERS, open_data
from support.hub import hub_error
from support.wikitext import detokenize_wikitext, wikitext_articles

PROTOCOLS = {  # printed with the figures
    "sliding": "As Hugging Face's guide, not detokenised; words and bytes: by the share of tokens scored",
    "blocks": "Disjoint whole blocks, not detokenised; words and bytes: by the share of tokens scored",
    "pages": "As lm-evaluation-harness; WikiText is detokenised; words and bytes: the page's before that",
    "lambada": "As lm-evaluation-harness's lambada_openai, whose perplexity is per word; not detokenised"}
WIKITEXT, LAMBADA = "Salesforce/wikitext:wikitext-2-raw-v1", "EleutherAI/lambada_openai:default"
TEST_SETS = {"wikitext-2": WIKITEXT, "wikitext-103": WIKITEXT, "lambada": LAMBADA}  # WikiText's two are equal
EACH_TEXT = ("pages", "lambada")  # protocols that score each text for itself; the others join them
SCORES = ("nll", "kl", "agree", "right", "tokens")


def read_texts(data, protocol, column):
    """What --data names: a list of texts, or of one Corpus; of one text if the protocol wants them joined."""
    path = Path(data)
    if (path / "meta.json").is_file():
        return [Corpus(path)]
    if data == "stdlib":
        texts = [text for split, text in open_data(data)[1] if split == "val"]
    elif path.is_file():
        texts = list(READERS.get(path.suffix, READERS[".txt"])(path, column))
        texts = texts if path.suffix in (".jsonl", ".parquet") else ["".join(texts)]  # .txt comes in pieces
    else:
        from datasets import load_dataset
        try:
            texts = list(load_dataset(*data.split(":", 1), split="test")[column])
        except Exception as error:
            raise hub_error(data, error) from error
    if data == WIKITEXT and protocol == "pages":
        return list(wikitext_articles(texts))
    if data == WIKITEXT and protocol == "blocks":
        return ["".join(line or " \n" for line in texts)]  # wiki.test.raw; the Hub emptied its blank lines
    return texts if protocol in EACH_TEXT else ["\n\n".join(texts)]


def tokenize(text, args, tokenizer):
    """(ids, how many of them, the last ones, are the text that counts, its words or 0, its bytes)."""
    if isinstance(text, Corpus):
        if args.protocol in EACH_TEXT or text.meta["tokenizer"] != tokenizer.fingerprint:
            raise InputError(f"{args.data} holds tokens: for sliding, blocks, and models with its tokenizer")
        return text.val, len(text.val), 0, text.meta["val"]["bytes"]
    encode, size = tokenizer.encode_array, len(text.encode("utf-8", "replace"))
    if args.protocol == "pages":
        ids = encode(detokenize_wikitext(text) if args.data == WIKITEXT else text)
        return np.append(tokenizer.eot, ids), len(ids), len(re.split(r"\s+", text)), size
    if args.protocol == "lambada":
        ids, before = encode(text), text.rpartition(" ")[0]
        size -= len(before.encode("utf-8", "replace"))
        return ids[-args.context - 1:], len(ids) - len(encode(before.rstrip())), 1, size
    # In pieces, to save memory. No token crosses into a line end that a visible character follows.
    pieces = re.finditer(r"(?s).{0,4096}.*?(?=\n\S|\Z)", text)
    ids = np.concatenate([encode(piece[0]) for piece in pieces])
    return ids, len(ids), len(text.split()), size


def windows(text, args, tokenizer):
    """Yield (ids, scored, words, bytes): the last `scored` of ids are scored, each token of a text in one
    window after as many others as the stride allows; words and bytes are the text's in proportion."""
    ids, counted, words, size = tokenize(text, args, tokenizer)
    n, first, rolling = len(ids), len(ids) - counted, args.protocol in EACH_TEXT
    length = args.context + rolling  # the harness counts inputs; the guide all, and the last one is no input
    for start in range(0, n - 1, args.stride):
        end, first = min(start + length, n), max(first, start + 1)  # ids[first:end] are scored
        start = max(0, end - length) if rolling else start  # the harness's last window is full, too
        if args.protocol != "blocks" or end - start == length:
            share = (end - first) / counted
            yield ids[start:end], end - first, share * words, share * size
        if end == n:
            return
        first = end


def collate(batch, device):
    """Windows -> ids, targets (B, T), filled up on the right, where a causal model does not look."""
    ids = torch.zeros(len(batch), max(len(tokens) for tokens, *_ in batch) - 1, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for i, (tokens, scored, *_) in enumerate(batch):
        tokens, n = torch.from_numpy(tokens.astype(np.int64)), len(tokens) - 1
        ids[i, :n], targets[i, n - scored:n] = tokens[:-1], tokens[-scored:]
    return ids.to(device), targets.to(device)


@torch.no_grad()
def score(models, ids, targets, vocab_size, chunk_size=512):
    """SCORES (M, 5, B): sums over the tokens `targets` (B, T) that follow `ids` (B, T) and are not -100.

    nll: nats, with the softmax over all logits of a model, padding too, as for anyone who loads it. kl: nats,
    KL(first model || model), over the `vocab_size` entries that all have. agree: the likeliest token is the
    first model's; right: it is the target. Logits exist for `chunk_size` tokens at a time.
    """
    scores = torch.zeros(len(models), len(SCORES), targets.numel(), device=ids.device)
    hidden = [model.hidden(ids).flatten(0, 1) for model in models]  # each (N, C)
    for rows in (targets.flatten() != -100).nonzero().flatten().split(chunk_size):
        target = targets.flatten()[rows]
        for i, (model, states) in enumerate(zip(models, hidden, strict=True)):
            logits = F.linear(states[rows], model.head_weight).float()  # (chunk, V)
            nll, top = F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)
            if i == 0:
                first, best, kl = logits[:, :vocab_size], top, torch.zeros_like(nll)
            else:
                logs = logits[:, :vocab_size].log_softmax(-1), first.log_softmax(-1)
                kl = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
            scores[i][:, rows] = torch.stack((nll, kl, top == best, top == target, torch.ones_like(nll)))
    return scores.unflatten(-1, targets.shape).cpu().double().sum(-1)


def compare(models, batches, vocab_size, autocast=nullcontext):
    """Sums over batches of (ids, targets), each (B, T): for each model a dict of SCORES."""
    with autocast():
        totals = sum(score(models, ids, targets, vocab_size).sum(-1) for ids, targets in batches)  # (M, 5)
    return [dict(zip(SCORES, total, strict=True)) for total in totals.tolist()]


def evaluate(models, texts, args, tokenizer):
    """{name: model}, all of one tokenizer -> {name: {figure: count, or (value, standard error)}}."""
    from tqdm import tqdm
    found = [window for text in texts for window in windows(text, args, tokenizer)][:args.limit]
    if not found:
        raise InputError(f"{args.data} is too short: no window for {args.protocol}, --context {args.context}")
    scores = torch.zeros(len(models), len(SCORES), len(found), dtype=torch.float64)
    for i in tqdm(range(0, len(found), args.batch_size), args.protocol, unit="batch"):
        batch = collate(found[i:i + args.batch_size], args.device)
        scores[..., i:i + args.batch_size] = score(models.values(), *batch, tokenizer.vocab_size)
    results, first = {}, collate(found[:args.batch_size], args.device)
    for (name, model), sums in zip(models.items(), scores, strict=True):
        started = time.perf_counter()  # all is warm by now, and compare waits for the device
        compare([model], [first] * 2, tokenizer.vocab_size)
        speed = 2 * first[0].numel() / (time.perf_counter() - started)
        size = sum(p.nbytes for p in model.parameters())
        results[name] = {"parameters": model.num_parameters(), "megabytes": round(size / 1e6),
                         **figures(sums, found, args, len(models) > 1), "tokens_per_second": round(speed)}
    return results


def figures(scores, found, args, several):
    """SCORES (5, windows) of one model -> {name: count, or (value, standard error)}. One NLL gives all
    perplexities: exp(NLL / tokens), which depends on the tokenizer, exp(NLL / words), exp(NLL / bytes)."""
    nll, kl, agree, right, tokens = scores
    words, size = torch.tensor([window[2:] for window in found], dtype=torch.float64).T
    counts = {"token": tokens, "word": words, "byte": size}
    counts = {unit: count for unit, count in counts.items() if count.any()}  # a corpus does not know words
    ratios = {f"perplexity_per_{unit}": (nll, count) for unit, count in counts.items()}
    ratios["bits_per_byte"] = nll / math.log(2), size
    if args.protocol == "lambada":
        ratios["accuracy"] = (right == tokens).double(), words
    if several:
        ratios |= {"KL_to_first": (kl, tokens), "same_top_1_as_first": (agree, tokens)}
    result, n = {f"{unit}s": round(count.sum().item()) for unit, count in counts.items()}, len(found)
    for name, (total, count) in ratios.items():
        mean = total.sum() / count.sum()
        error = (total - mean * count).norm() / count.sum() * math.sqrt(n / max(1, n - 1))  # to first order
        if name.startswith("perplexity"):
            mean, error = mean.exp(), mean.exp() * error
        result[name] = (mean.item(), error.item()) if n > 1 else mean.item()
    return result


def report(results, args):
    """What was measured, and a table with a column for each model."""
    settings = ", ".join(f"{name} {value}" for name, value in vars(args).items() if name != "models")
    rows = [{"": name.replace("_", " "), **{model: of.get(name, "-") for model, of in results.items()}}
            for name in max(results.values(), key=len)]
    return (f"{settings}\n{PROTOCOLS[args.protocol]}.\n±: standard error, with windows as independent.\n\n"
            f"{format_table(rows)}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="Hub ids or folders; KL: to the first with its tokenizer")
    add("--data", help="wikitext-2, wikitext-103 (one test set), lambada, stdlib, a file, a prepared corpus, "
        "or a Hub data set id[:config]; None: wikitext-2, but for folders alone stdlib")
    add("--text-column", default="text", help="column or field that holds a text")
    add("--protocol", choices=PROTOCOLS, help="None: lambada for --data lambada, else sliding")
    add("--stride", type=int, help="sliding: tokens from a window to the next; None: the context")
    add("--context", type=int, help="tokens of a window; None: the shortest of the models'")
    add("--batch-size", type=int, default=8, help="windows scored at a time")
    add("--limit", type=int, help="stop after so many windows")
    add("--precision", choices=DTYPES, default="fp32", help="of weights; published figures: fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of PyTorch")
    add("--json", action="store_true", help="print JSON; a pair is a value and its standard error")
    return parser.parse_args(argv)


def settle(args, models):
    """Fill in what follows from the other arguments and the models, and refuse what these do not allow."""
    offline = args.protocol != "pages" and all(Path(name).is_dir() for name in args.models)
    args.data = args.data or ("stdlib" if offline else "wikitext-2")
    args.data = TEST_SETS.get(args.data, args.data)
    args.protocol = args.protocol or ("lambada" if args.data == LAMBADA else "sliding")
    args.context = min(model.context for model in models) if args.context is None else args.context
    args.stride = args.context if args.stride is None else args.stride
    # Rotary positions have no end; sliding alone has a choice of strides.
    positions = min((model.context for model in models if isinstance(model, GPT2)), default=math.inf)
    shortest = 1 if args.protocol == "sliding" else args.context
    bounds = {"context": (2, positions), "stride": (shortest, args.context), "batch_size": (1, math.inf),
              "limit": (1, math.inf)}
    for name, (low, high) in bounds.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {low} to {high} with these models")


def main():
    args = parse_args()
    tokenizers = {name: load_tokenizer(name) for name in args.models}
    models = {name: load(name, args.device, DTYPES[args.precision]) for name in tokenizers}
    settle(args, models.values())
    texts, results = read_texts(args.data, args.protocol, args.text_column), {}
    for kind in {tokenizer.fingerprint: tokenizer for tokenizer in tokenizers.values()}.values():
        alike = {name: models[name] for name in models if tokenizers[name].fingerprint == kind.fingerprint}
        results |= evaluate(alike, texts, args, kind)
    print(json.dumps({**vars(args), "results": results}, indent=2) if args.json else report(results, args))


if __name__ == "__main__":
    run_cli(main)
