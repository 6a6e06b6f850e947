"""Perplexity that says which one it is: per token, per word, per byte, by the protocols of published numbers.

    python eval_ppl.py gpt2 distilgpt2                    WikiText's test set as in Hugging Face's guide
    python eval_ppl.py gpt2 distilgpt2 --protocol pages   ... as in lm-evaluation-harness's `wikitext`
    python eval_ppl.py gpt2 distilgpt2 --data lambada     lm-evaluation-harness's `lambada_openai`
    python eval_ppl.py demo/teacher out --data stdlib     offline: the code that the demo held out

Read in this order:
  read_texts       --data -> texts
  tokenize, spans  texts -> windows of tokens: all that the protocols differ in
  token_scores     windows -> scores: the only place where logits exist
  figures          scores -> perplexities and their standard errors

One sum of negative log-likelihoods (NLL, nats) gives them all: per token exp(NLL / tokens), per word exp(NLL
/ words), per byte exp(NLL / bytes), bits per byte NLL / bytes / ln 2. The first one depends on the tokenizer.

References: the guide is huggingface.co/docs/transformers/perplexity, the harness is
github.com/EleutherAI/lm-evaluation-harness. Shapes: M models, B windows, T tokens, N = B * T, V vocabulary.
"""
import argparse
import json
import math
import re
import time
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from data import READERS, Corpus, InputError, hub_error, load_tokenizer, open_data, run_cli, wikitext_articles
from model import GPT2, load

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"  # -103 has the same test set, and 300 MB of training set
TEST_SETS = {"wikitext-2": WIKITEXT, "wikitext-103": WIKITEXT, "lambada": "EleutherAI/lambada_openai:default"}
EACH_TEXT = ("pages", "lambada")  # protocols that score each text for itself; the others join them
PROTOCOLS = {  # what exactly the figures are; printed with them
    "sliding": "windows of {context} tokens, stride {stride}, as in Hugging Face's guide.\nA token is scored "
               "once, if any precedes it in its window. Words and bytes: the text's, times the share scored.",
    "blocks": "blocks of {context} tokens, the last partial one dropped, as in DistilGPT2's time.\nThe first "
              "token of each is not scored. Words and bytes: the text's, times the share scored.",
    "pages": "rolling windows of {context} tokens over each page, as lm-evaluation-harness's wikitext.\n"
             "Words, len(re.split(r'\\s+', page)), and bytes: the page's before detokenisation.",
    "lambada": "the last word of each text after all before it, as lm-evaluation-harness's lambada_openai,\n"
               "whose perplexity is per word. Accurate: each token of the word is the likeliest."}


def read_texts(data, protocol, column):
    """What --data names: a list of texts, or of one Corpus; of one text if the protocol wants it joined."""
    path, source = Path(data), TEST_SETS.get(data, data)
    if (path / "meta.json").is_file():
        return [Corpus(path)]
    if data == "stdlib":
        texts = [text for split, text in open_data(data)[1] if split == "val"]
    elif path.is_file():
        texts = list(READERS.get(path.suffix, READERS[".txt"])(path, column))
        if path.suffix not in (".jsonl", ".parquet"):
            texts = ["".join(texts)]  # a large .txt comes in pieces
    elif path.is_dir() or path.suffix in READERS or not re.fullmatch(r"[\w.-]+/[\w.-]+(:.*)?", source):
        raise InputError(f"no --data {data}: there is {', '.join(TEST_SETS)}, stdlib, a file, the folder of "
                         "a prepared corpus, or a data set of the Hub as owner/name or owner/name:config")
    else:
        from datasets import load_dataset
        try:
            texts = load_dataset(*source.split(":"), split="test")[column]
        except Exception as error:
            raise hub_error(source, error) from error
    if source == WIKITEXT and protocol == "pages":
        return list(wikitext_articles(texts))
    if source == WIKITEXT and protocol == "blocks":
        return ["".join(line or " \n" for line in texts)]  # wiki.test.raw; the Hub emptied its blank lines
    return list(texts) if protocol in EACH_TEXT else ["\n\n".join(texts)]


# WikiText is cut into words ("wasn 't 1 @.@ 5"). The harness's rules, in its order, put them together again.
DETOKENIZER = [
    ("s '", "s'"), ("/' [0-9]/", "/'[0-9]/"),  # the second is a slip of the harness's
    *((f" @[{c}]@ ", c) for c in "-,."), *((f" [{c}] ", f"{c} ") for c in ":;.!?,"),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
    (" N ", " 1 "), (" 's", "'s")]


def detokenize(page):
    """' = Oz = \\n It is " 1 @.@ 5 " km . \\n' -> ' = Oz =\\nIt is "1.5" km.\\n'"""
    for pattern, replacement in DETOKENIZER:
        page = re.sub(pattern, replacement, page)
    return page


def tokenize(text, args, tokenizer):
    """(ids, how many of them only lead up to the text that is scored, its words, its bytes)."""
    if isinstance(text, Corpus):
        if args.protocol in EACH_TEXT or text.meta["tokenizer"] != tokenizer.fingerprint:
            raise InputError(f"{args.data} holds tokens, not text: only for sliding and blocks, and for "
                             "models with the tokenizer that it was prepared with")
        return text.val, 0, math.nan, text.meta["val"]["bytes"]
    size = len(text.encode("utf-8", "replace"))
    if args.protocol == "pages":
        page = detokenize(text) if TEST_SETS.get(args.data) == WIKITEXT else text
        return np.array([tokenizer.eot, *tokenizer.encode(page)]), 1, len(re.split(r"\s+", text)), size
    if args.protocol == "lambada":
        before, _, word = text.rpartition(" ")
        known = tokenizer.encode(before.rstrip()) or [tokenizer.eot]
        ids = [*([] if before.strip() else known), *tokenizer.encode(f"{before} {word}")]
        return np.array(ids), len(known), 1, len(f" {word}".encode("utf-8", "replace"))
    # In pieces, so that lists stay short. No token crosses into a line end that a visible character follows.
    pieces = (match[0] for match in re.finditer(r"(?s).{1,4096}.*?(?=\n\S|\Z)", text))
    ids = np.fromiter(chain.from_iterable(map(tokenizer.encode, pieces)), np.int32)
    return ids, 0, len(text.split()), size


def spans(n, known, args):
    """Windows (start, end, first) of n tokens: tokens[start:end], of which tokens[first:end] are scored."""
    if args.protocol == "lambada":
        yield max(0, n - args.context - 1), n, known
        return
    # The harness counts a window's inputs; the guide counts its tokens, and the last one is no input.
    length, done = args.context + (args.protocol == "pages"), 1
    for start in range(0, n - 1, args.stride):
        end = min(start + length, n)
        if args.protocol == "pages":
            start = max(0, end - length)  # the last window, too, is full: fewer targets, more context
        if args.protocol != "blocks" or end - start == length:
            yield start, end, max(done, start + 1)
        if end == n:
            return
        done = end


def windows(texts, args, tokenizer):
    """List of (ids, scored, words, bytes, cluster): inputs are ids[:-1], targets ids[1:], of which the last
    `scored` count; words and bytes are their share of the text's. Standard errors take clusters as
    independent: texts or, in a joined one, stretches of `context` tokens."""
    found, each = [], args.protocol in EACH_TEXT
    for number, text in enumerate(texts[:args.limit] if each else texts):
        ids, known, words, size = tokenize(text, args, tokenizer)
        for start, end, first in spans(len(ids), known, args):
            share, cluster = (end - first) / (len(ids) - known), number if each else first // args.context
            found.append((ids[start:end], end - first, share * words, share * size, cluster))
    if not found:
        raise InputError(f"{args.data} is too short: no window for {args.protocol}, --context {args.context}")
    return found if each else found[:args.limit]


def collate(group, eot, device):
    """Windows -> ids, targets (B, T), filled up on the right, where a causal model does not look."""
    ids = np.full((len(group), max(len(tokens) for tokens, *_ in group) - 1), eot)
    targets = np.full_like(ids, -100)
    for i, (tokens, scored, *_) in enumerate(group):
        n = len(tokens) - 1
        ids[i, :n], targets[i, n - scored:n] = tokens[:-1], tokens[-scored:]
    return torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device)


SCORES = ("nll", "kl", "agree", "right")


@torch.no_grad()
def token_scores(models, ids, targets, vocab_size, autocast=nullcontext, chunk_size=512):
    """Scores (M, 4, B, T) of the tokens `targets` (B, T) that follow `ids` (B, T); 0 where a target is -100.

    nll, nats: with the softmax over all logits of a model, padding too, as for anyone who loads it. kl, nats:
    KL(first model || model) at T = 1, over the `vocab_size` entries that all have. agree: the argmax is the
    first model's; right: it is the target. Logits exist for `chunk_size` tokens at a time.
    """
    scores = torch.zeros(len(models), len(SCORES), targets.numel(), device=ids.device)
    with autocast():
        hidden = [model.hidden(ids).flatten(0, 1) for model in models]  # each (N, C)
    for rows in (targets.flatten() != -100).nonzero().flatten().split(chunk_size):
        target, best, reference = targets.flatten()[rows], None, None
        for score, model, states in zip(scores, models, hidden, strict=True):
            with autocast():
                logits = F.linear(states[rows], model.head_weight)  # (chunk, V)
            logits, top = logits.float(), logits.argmax(-1)
            best = top if best is None else best
            score[0, rows] = F.cross_entropy(logits, target, reduction="none")
            score[2, rows], score[3, rows] = (top == best).float(), (top == target).float()
            if len(models) > 1:
                logp = logits[:, :vocab_size].log_softmax(-1)
                reference = logp if reference is None else reference
                score[1, rows] = F.kl_div(logp, reference, reduction="none", log_target=True).sum(-1)
    return scores.unflatten(-1, targets.shape)


def compare(models, batches, vocab_size, autocast=nullcontext):
    """Sums over batches of (ids, targets), each (B, T): for each model a dict of SCORES and `tokens`."""
    totals, tokens = torch.zeros(len(models), len(SCORES), dtype=torch.float64), 0
    for ids, targets in batches:
        totals += token_scores(models, ids, targets, vocab_size, autocast).cpu().double().sum((-2, -1))
        tokens += (targets != -100).sum().item()
    return [{**dict(zip(SCORES, total.tolist(), strict=True)), "tokens": tokens} for total in totals]


def evaluate(models, texts, args, tokenizer, comparable):
    """Models of one tokenizer -> the figures of each; `comparable`: KL and agreement with the first, too."""
    from tqdm import tqdm
    found, scores, results = windows(texts, args, tokenizer), [], []
    batches = [found[i:i + args.batch_size] for i in range(0, len(found), args.batch_size)]

    def autocast():
        return torch.autocast(torch.device(args.device).type, torch.bfloat16, args.precision == "bf16")

    for batch in tqdm(batches, args.protocol, unit="batch"):
        ids, targets = collate(batch, tokenizer.eot, args.device)
        score = token_scores(models, ids, targets, tokenizer.vocab_size, autocast)
        scores.append(score.cpu().double().sum(-1))  # (M, 4, B)
    ids, targets = collate(batches[0], tokenizer.eot, args.device)
    for model, score in zip(models, torch.cat(scores, -1), strict=True):
        started = time.perf_counter()  # all is warm by now, and compare waits for the device
        compare([model], [(ids, targets)] * 2, tokenizer.vocab_size, autocast)
        speed = 2 * ids.numel() / (time.perf_counter() - started)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        results.append({"parameters": model.num_parameters(), "megabytes": round(size / 1e6),
                        **figures(score, found, args, comparable), "tokens_per_second": round(speed)})
    return results


def figures(scores, found, args, comparable):
    """Scores (4, windows) of one model -> {name: count, or (value, standard error)}."""
    nll, kl, agree, right = scores
    tokens, words, size, cluster = torch.tensor([window[1:] for window in found], dtype=torch.float64).T
    ratios = {"perplexity_per_token": (nll, tokens), "perplexity_per_word": (nll, words),
              "perplexity_per_byte": (nll, size), "bits_per_byte": (nll / math.log(2), size)}
    if args.protocol == "lambada":
        ratios["accuracy"] = (right == tokens).double(), words
    if comparable:
        ratios |= {"KL_to_first": (kl, tokens), "same_top_1_as_first": (agree, tokens)}
    result = {"tokens": tokens.sum(), "words": words.sum(), "bytes": size.sum()}
    result = {name: round(count.item()) for name, count in result.items() if count == count}
    numbers, cluster = cluster.unique(return_inverse=True)
    n = len(numbers)
    for name, (total, count) in ratios.items():
        mean = total.sum() / count.sum()
        residual = torch.zeros(n, dtype=torch.float64).index_add_(0, cluster, total - mean * count)
        error = residual.norm() / count.sum() * math.sqrt(n / max(1, n - 1))  # to first order
        if name.startswith("perplexity"):
            mean, error = mean.exp(), mean.exp() * error
        if mean == mean:  # a corpus does not know its words
            result[name] = (mean.item(), error.item()) if n > 1 else mean.item()
    return result


def format_table(rows):
    """Rows (dicts with the same keys) as a Markdown table whose columns line up in a terminal, too."""
    def show(value):
        if isinstance(value, tuple):
            return "{:.4f} ± {:.4f}".format(*value)
        return format(value, {int: ",", float: ".4f"}.get(type(value), ""))

    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    width, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width, *("-" * (w - 1) + ":" for w in widths)])
    lines = (" | ".join([name.ljust(width), *map(str.rjust, row, widths)]) for name, *row in cells)
    return "\n".join(f"| {line} |" for line in lines)


def report(results, args):
    """What was measured, and a table with a column for each model."""
    glued = args.protocol == "pages" and TEST_SETS.get(args.data) == WIKITEXT
    clusters = "texts" if args.protocol in EACH_TEXT else f"stretches of {args.context} tokens"
    rows = [{"": name.replace("_", " "), **{model: of.get(name, "-") for model, of in results.items()}}
            for name in max(results.values(), key=len)]
    return f"""{args.data}, {args.protocol}: {PROTOCOLS[args.protocol].format(**vars(args))}
Detokeniser: {"that of wikitext" if glued else "none"}. ±: standard error, with {clusters} as independent.
Megabytes: weights in memory. Speed: in batches of {args.batch_size} on {args.device}, {args.precision}.

{format_table(rows)}"""


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="Hub ids or folders; KL and agreement are with the first")
    add("--data", help="wikitext-2 or wikitext-103 (one test set), lambada, stdlib, a file, the held-out "
        "part of a prepared corpus, a Hub data set id[:config] (default: wikitext-2; for folders, stdlib)")
    add("--text-column", default="text", help="column or field that holds a text (default: %(default)s)")
    add("--protocol", choices=PROTOCOLS, help="default: lambada for --data lambada, else sliding")
    add("--stride", type=int, help="sliding: tokens from a window to the next (default: the context)")
    add("--context", type=int, help="tokens of a window (default: the shortest of the models')")
    add("--batch-size", type=int, default=8, help="windows scored at a time (default: %(default)s)")
    add("--limit", type=int, help="stop after that many texts (pages, lambada) or windows (sliding, blocks)")
    add("--precision", choices=["fp32", "bf16", "bf16-pure"], default="fp32", help="bf16: autocast; "
        "bf16-pure: the weights, too; published figures are not that rounded (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--json", action="store_true", help="print JSON; a pair is a value and its standard error")
    return parser.parse_args(argv)


def check(args):
    """Refuse what can be refused before anything is loaded, and settle the protocol."""
    for name, least in (("context", 2), ("stride", 1), ("batch_size", 1), ("limit", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    offline = args.protocol != "pages" and all(Path(name).is_dir() for name in args.models)
    args.data = args.data or ("stdlib" if offline else "wikitext-2")
    args.protocol = args.protocol or ("lambada" if args.data == "lambada" else "sliding")
    if args.data == "lambada" and args.protocol != "lambada":
        raise InputError(f"--data lambada has a protocol of its own: leave out --protocol {args.protocol}")
    if args.stride and args.protocol != "sliding":
        raise InputError(f"--stride {args.stride}: only --protocol sliding has one, not {args.protocol}")


def main():
    args = parse_args()
    check(args)
    texts = read_texts(args.data, args.protocol, args.text_column)
    tokenizers = {name: load_tokenizer(name) for name in args.models}
    dtype = torch.bfloat16 if args.precision == "bf16-pure" else torch.float32
    models = {name: load(name, args.device, dtype) for name in tokenizers}
    args.context = args.context or min(model.context for model in models.values())
    args.stride = args.stride or args.context
    if args.stride > args.context:
        raise InputError(f"--stride {args.stride} would skip tokens: at most the context, {args.context}")
    for name, model in models.items():
        if args.context > model.context and isinstance(model, GPT2):  # rotary positions have no end
            raise InputError(f"--context {args.context}, but {name} has {model.context} positions")
    alike, results = {}, dict.fromkeys(models)
    for name, tokenizer in tokenizers.items():
        alike.setdefault(tokenizer.fingerprint, []).append(name)
    for names in alike.values():
        comparable = len(names) > 1 and args.models[0] in names
        found = evaluate([models[name] for name in names], texts, args, tokenizers[names[0]], comparable)
        results.update(zip(names, found, strict=True))
    print(json.dumps({**vars(args), "results": results}, indent=2) if args.json else report(results, args))


if __name__ == "__main__":
    run_cli(main)
