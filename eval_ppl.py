"""Perplexity that says which one it is: per token, per word, per byte, by the protocols of published numbers.

    python eval_ppl.py demo/teacher out                  offline, held-out code
    python eval_ppl.py gpt2 distilgpt2                   WikiText, as the guide
    python eval_ppl.py gpt2 distilgpt2 --protocol pages  ... as the harness
    python eval_ppl.py gpt2 distilgpt2 --data lambada    LAMBADA, likewise

A protocol says how a text is cut into windows, which of their tokens are scored, and by how many words and
bytes the loss is divided. Nothing else differs between them, and yet gpt2 has 29.9 on WikiText by one and
37.4 by another.

Read in this order:
  sliding, blocks,     the protocols: a text -> windows; hold them against what is published
    pages, lambada
  read_texts           what --data names -> texts
  evaluate             windows -> batches -> scores; support/scoring.py has the logits
  figures              sums of scores -> perplexities and their standard errors

The guide: huggingface.co/docs/transformers/perplexity.
The harness: github.com/EleutherAI/lm-evaluation-harness, its tasks wikitext and lambada_openai.
Shapes: M models, B windows, L tokens of a window. NLL: negative log-likelihood, summed, in nats.
"""
try:
    import support  # noqa: F401  (first: Ctrl-C ends in one line while PyTorch loads)
except ModuleNotFoundError as error:  # python -I, python -P, PYTHONSAFEPATH
    raise SystemExit("error: start Python without -I or -P, or set PYTHONPATH to this folder") from error

import itertools
import json
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Corpus
from model import DTYPES, GPT2, load
from sample import check_fit
from support.cli import (
    InputError,
    checked,
    format_table,
    lookalike,
    new_parser,
    open_bar,
    run_cli,
    user_path,
)
from support.hub import hub_error
from support.ranks import pick_device
from support.scoring import SCORES, compare, ratio, score
from support.text import ROWS, TEXT, ending, open_data, read_file, text_of
from support.tokenizer import load_tokenizer
from support.wikitext import detokenize_wikitext, wikitext_articles

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
LAMBADA = "EleutherAI/lambada_openai:default"
TEST_SETS = {"wikitext-2": WIKITEXT, "wikitext-103": WIKITEXT, "lambada": LAMBADA}  # WikiText's two are equal


# ------------------------------------------------------------------------------------ protocols
class Window(NamedTuple):
    """What a model reads at a time. Words and bytes are the text's, in proportion to the tokens scored."""
    ids: np.ndarray  # L tokens
    n_scored: int  # the last so many of them are scored, given all before them
    words: float
    bytes: float


def sliding(text, tokenizer, args):
    """The guide's: windows of `context` tokens, each `stride` after the last; it scores what none before did.

    So each token is scored once, but for the first of a window that has nothing before it. With stride 2 and
    context 4, in parentheses what is only read:  (a) b c d,  (c d) e f,  (e f) g
    """
    ids, words, size = whole_text(text, tokenizer)
    n = len(ids)
    n_done = 0
    for start in range(0, n - 1, args.stride):
        end = min(start + args.context, n)
        n_scored = end - max(n_done, start + 1)
        share = n_scored / n
        yield Window(ids[start:end], n_scored, share * words, share * size)
        if end == n:
            return
        n_done = end


def blocks(text, tokenizer, args):
    """Fine-tuning scripts': disjoint blocks of `context` tokens; what is left at the end is dropped.

    With context 4:  (a) b c d,  (e) f g h
    """
    ids, words, size = whole_text(text, tokenizer)
    n = len(ids)
    n_scored = args.context - 1
    for start in range(0, n - n_scored, args.context):
        share = n_scored / n
        yield Window(ids[start:start + args.context], n_scored, share * words, share * size)


def pages(text, tokenizer, args):
    """The harness's `wikitext`: every token of a page is scored, the first after an end-of-text token.

    A window has `context` inputs, so one token more than one of the guide's. The last is filled up on the
    left with tokens that were scored before. With context 3:  (eot) a b c,  (c) d e f,  (d e f) g
    """
    words = len(re.split(r"\s+", text))  # counted before WikiText's words, which are cut apart, are mended
    size = utf8_length(text)
    if args.data == WIKITEXT:
        text = detokenize_wikitext(text)

    ids = np.append(tokenizer.eot, tokenizer.encode_array(text))
    n = len(ids)
    for first in range(1, n, args.context):  # ids[first:end] are scored
        end = min(first + args.context, n)
        start = max(0, end - args.context - 1)
        share = (end - first) / (n - 1)
        yield Window(ids[start:end], end - first, share * words, share * size)


def lambada(text, tokenizer, args):
    """The harness's `lambada_openai`: the last word is scored, given all before it, in one window."""
    before, _, _ = text.rpartition(" ")
    size = utf8_length(text) - utf8_length(before)

    ids = tokenizer.encode_array(text)
    n_target = len(ids) - len(tokenizer.encode_array(before.rstrip()))
    ids = ids[-args.context - 1:]
    n_scored = min(n_target, len(ids) - 1)  # of a text of one word the first token has nothing before it
    if n_scored > 0:
        share = n_scored / n_target
        yield Window(ids, n_scored, share, share * size)


PROTOCOLS = {  # name: (generator, what is printed with the figures)
    "sliding": (
        sliding,
        "As Hugging Face's guide, not detokenised; words and bytes: by the share of tokens scored"),
    "blocks": (
        blocks,
        "Disjoint whole blocks, not detokenised; words and bytes: by the share of tokens scored"),
    "pages": (
        pages,
        "As lm-evaluation-harness; WikiText is detokenised; words and bytes: the page's before that"),
    "lambada": (
        lambada,
        "As lm-evaluation-harness's lambada_openai, whose perplexity is per word; not detokenised"),
}
JOINED = ("sliding", "blocks")  # protocols that read all texts as one


def whole_text(text, tokenizer):
    """(ids, words, bytes) of a text, or of what a corpus held out, whose words (0) nobody counted."""
    if isinstance(text, Corpus):
        return text.val, 0, text.meta["val"]["bytes"]
    # In pieces, to save memory. No token crosses into a line end that a visible character follows.
    pieces = re.finditer(r"(?s).{0,4096}.*?(?=\n\S|\Z)", text)
    ids = np.concatenate([tokenizer.encode_array(piece[0]) for piece in pieces])
    return ids, len(text.split()), utf8_length(text)


def utf8_length(text):
    return len(text.encode("utf-8", "replace"))


# ------------------------------------------------------------------------------------ texts
def read_texts(data, protocol, column):
    """What --data names: a list of texts, or of one Corpus; of one text if the protocol joins them."""
    path = Path(data)
    if (path / "meta.json").is_file():
        return [Corpus(path)]

    if data == "stdlib":
        texts = [text for split, text in open_data(data).documents if split == "val"]
    elif path.is_file():
        texts = list(read_file(path, column))
        if ending(path) not in ROWS:
            texts = ["".join(texts)]  # a file of text comes in pieces
    else:
        texts = read_test_set(data, column)

    if data == WIKITEXT and protocol == "pages":
        return list(wikitext_articles(texts))
    if data == WIKITEXT and protocol == "blocks":
        return ["".join(line or " \n" for line in texts)]  # wiki.test.raw; the Hub emptied its blank lines
    return ["\n\n".join(texts)] if protocol in JOINED else texts


def read_test_set(data, column):
    """The texts of the test split of a data set on the Hub."""
    if not Path(data).exists():  # the Hub takes half a minute to say that it has no such thing
        near = lookalike(data, [*TEST_SETS, "stdlib"])
        if near or data.startswith(("/", ".", "~")) or ending(data) in (*ROWS, *TEXT):
            hint = f": did you mean {near}?" if near else ""
            raise InputError(f"{data} is neither a file here nor a data set on the Hub{hint}")

    from datasets import load_dataset
    try:
        values = list(load_dataset(*data.split(":", 1), split="test")[column])
    except Exception as error:
        if Path(data).is_dir():
            raise InputError(f"{data} could not be read as a data set with a test split: name a file in it, "
                             "or the corpus in corpora/ that a run has made of it") from error
        raise hub_error(data, error) from error
    return [text_of({column: value}, column, data) for value in values]


def check_corpus(corpus, tokenizer, args):
    """Tokens that are ready have no text to count words in, and are those of one tokenizer."""
    if args.protocol not in JOINED or corpus.meta["tokenizer"] != tokenizer.fingerprint:
        raise InputError(f"{args.data} holds token ids of one tokenizer: take --protocol "
                         f"{' or '.join(JOINED)}, and models with that tokenizer")


# ------------------------------------------------------------------------------------ scores
def evaluate(models, texts, args, tokenizer):
    """{name: model}, all of one tokenizer -> {name: {figure: count, or (value, standard error)}}."""
    protocol, _ = PROTOCOLS[args.protocol]
    if isinstance(texts[0], Corpus):
        check_corpus(texts[0], tokenizer, args)
    windows = itertools.chain.from_iterable(protocol(text, tokenizer, args) for text in texts)
    windows = list(itertools.islice(windows, args.limit))
    if not windows:
        raise InputError(f"{args.data} is too short: no window for {args.protocol}, --context {args.context}")

    scores = score_windows(models, windows, args, tokenizer.vocab_size)  # (M, 6, windows)
    results = {}
    for (name, model), sums in zip(models.items(), scores, strict=True):
        speed = tokens_per_second(model, windows, args, tokenizer.vocab_size)
        megabytes = sum(p.nbytes for p in model.parameters()) / 1e6
        results[name] = {"parameters": model.num_parameters(), "megabytes": round(megabytes),
                         **figures(sums, windows, args.protocol, len(models) > 1),
                         "tokens_per_second": round(speed)}
    return results


def score_windows(models, windows, args, vocab_size):
    """SCORES of each model in each window: (M, 6, windows)."""
    scores = torch.zeros(len(models), len(SCORES), len(windows), dtype=torch.float64)
    for i in open_bar(range(0, len(windows), args.batch_size), args.protocol, unit="batch"):
        ids, targets = collate(windows[i:i + args.batch_size], args.device)
        sums = score(models.values(), ids, targets, vocab_size)  # (M, 6, B)
        for name, nll in zip(models, sums[:, 0], strict=True):
            if not nll.isfinite().all():
                raise InputError(f"{name}: its logits are NaN or infinite, so it has no perplexity: the "
                                 "weights are broken, or too large for this --precision")
        scores[..., i:i + args.batch_size] = sums
    return scores


def collate(windows, device):
    """Windows -> ids, targets (B, L), filled up on the right, where a causal model does not look."""
    longest = max(len(window.ids) for window in windows) - 1
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    for row, window in enumerate(windows):
        tokens = torch.from_numpy(window.ids.astype(np.int64))
        n = len(tokens) - 1
        ids[row, :n] = tokens[:-1]
        targets[row, n - window.n_scored:n] = tokens[-window.n_scored:]
    return ids.to(device), targets.to(device)


def tokens_per_second(model, windows, args, vocab_size):
    """How fast a model alone is at the first batch; it was read before, so nothing is cold.

    Padding counts as tokens.
    """
    ids, targets = collate(windows[:args.batch_size], args.device)
    started = time.perf_counter()
    compare([model], [(ids, targets)] * 2, vocab_size)  # waits for the device
    return 2 * ids.numel() / (time.perf_counter() - started)


# ------------------------------------------------------------------------------------ figures
def figures(scores, windows, protocol, several):
    """SCORES (6, windows) of one model -> {name: count, or (value, standard error)}.

    One NLL gives all perplexities: exp(NLL / words), exp(NLL / bytes), and exp(NLL / tokens), which cannot be
    compared between tokenizers. Bits per byte is NLL / bytes in bits. With `several` models: KL to the first.
    """
    nll, kl, agree, _, right, tokens = scores
    pairs = [(window.words, window.bytes) for window in windows]
    words, size = torch.tensor(pairs, dtype=torch.float64).T  # each (windows)
    counts = {"token": tokens, "word": words, "byte": size}
    counts = {unit: count for unit, count in counts.items() if count.any()}  # a corpus does not know words

    result = {f"{unit}s": round(count.sum().item()) for unit, count in counts.items()}
    for unit, count in counts.items():
        mean, error = ratio(nll, count)
        result[f"perplexity_per_{unit}"] = mean.exp(), mean.exp() * error
    result["bits_per_byte"] = ratio(nll / math.log(2), size)
    if protocol == "lambada":
        result["accuracy"] = ratio((right == tokens).double(), words)
    if several:
        result["KL_to_first"] = ratio(kl, tokens)
        result["same_top_1_as_first"] = ratio(agree, tokens)

    for name, value in result.items():
        if isinstance(value, tuple):  # one window has no spread
            mean, error = (number.item() for number in value)
            result[name] = (mean, error) if len(windows) > 1 else mean
    return result


def report(results, args):
    """What was measured, and a table with a column for each model."""
    settings = ", ".join(f"{name} {value}" for name, value in vars(args).items() if name != "models")
    _, explanation = PROTOCOLS[args.protocol]
    rows = [{"": name.replace("_", " "), **{model: of.get(name, "-") for model, of in results.items()}}
            for name in max(results.values(), key=len)]  # the model with the most figures has all rows
    return (f"{settings}\n{explanation}.\n±: standard error, with windows as independent.\n\n"
            f"{format_table(rows)}")


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "%(prog)s MODEL [MODEL ...] [options]")
    positive = checked(int, "1 or more, below 2^63", lambda n: 1 <= n < 2**63)
    add = parser.add_argument_group("models and text").add_argument
    add("models", nargs="+", type=user_path, metavar="MODEL",
        help="folders, or names on the Hub such as gpt2; the KL is to the first one with the same tokenizer")
    add("--data", type=user_path, metavar="DATA",
        help="wikitext-2, wikitext-103 (the same test set), lambada, stdlib, a file, a corpus that data.py "
             "or a run has prepared, or id[:config] of a data set on the Hub; without it what --protocol "
             "pages (wikitext-2) or lambada is for, else stdlib where all models are folders, else "
             "wikitext-2")
    add("--text-column", default="text", metavar="NAME", help="the column or field that holds a text")

    add = parser.add_argument_group(
        "protocol", "sliding: Hugging Face's guide. blocks: fine-tuning scripts. pages: "
        "lm-evaluation-harness's wikitext. lambada: its lambada_openai.").add_argument
    add("--protocol", choices=PROTOCOLS,
        help="take that of the number you want to compare with; without it lambada for --data lambada, "
             "otherwise sliding")
    add("--stride", type=positive, metavar="N",
        help="sliding: tokens from one window to the next; a small one gives each token more to go by, a "
             "better perplexity, and takes longer; without it, the context")
    add("--context", type=positive, metavar="N",
        help="tokens of a window; without it, all that the models can see (the least of them)")

    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=positive, default=8, metavar="N",
        help="windows that are scored at a time; fewer take less memory and change no figure")
    add("--limit", type=positive, metavar="N",
        help="stop after N windows, for a quick look; without it, take all")
    add("--precision", choices=DTYPES, default="fp32",
        help="of the weights; published figures are of fp32, bf16 takes half of the memory")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    add("--json", action="store_true", help="print JSON; a pair is a value and its standard error")
    return parser.parse_args(argv)


def settle(args, models):
    """Fill in what follows from the other arguments and the models, and refuse what these do not allow."""
    all_local = all(Path(name).is_dir() for name in args.models)
    if not args.data:
        usual = "stdlib" if all_local else "wikitext-2"
        args.data = {"pages": "wikitext-2", "lambada": "lambada"}.get(args.protocol, usual)
    args.data = TEST_SETS.get(args.data, args.data)
    if not args.protocol:
        args.protocol = "lambada" if args.data == LAMBADA else "sliding"
    if args.context is None:
        args.context = min(model.context for model in models)
    if args.stride is None:
        args.stride = args.context

    # Rotary positions have no end, learned ones do.
    longest = min((model.context for model in models if isinstance(model, GPT2)), default=math.inf)
    if not 2 <= args.context <= longest:
        allowed = "2 or more" if longest == math.inf else f"2 to {longest}"
        raise InputError(f"--context {args.context}: must be {allowed} with these models")
    shortest = 1 if args.protocol == "sliding" else args.context  # the others have no choice
    if not shortest <= args.stride <= args.context:
        raise InputError(f"--stride {args.stride}: must be {shortest} to {args.context} with --protocol "
                         f"{args.protocol} and --context {args.context}")


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    tokenizers = {name: load_tokenizer(name) for name in args.models}  # first: a wrong name is said at once
    models = {name: load(name, args.device, DTYPES[args.precision]) for name in tokenizers}
    for name in models:
        check_fit(name, models[name], tokenizers[name])
    settle(args, models.values())

    texts = read_texts(args.data, args.protocol, args.text_column)
    results = {}
    kinds = {tokenizer.fingerprint: tokenizer for tokenizer in tokenizers.values()}
    for kind, tokenizer in kinds.items():
        alike = {name: models[name] for name in models if tokenizers[name].fingerprint == kind}
        results |= evaluate(alike, texts, args, tokenizer)

    if args.json:
        print(json.dumps({**vars(args), "results": results}, indent=2))
    else:
        print(report(results, args))


if __name__ == "__main__":
    run_cli(main)
