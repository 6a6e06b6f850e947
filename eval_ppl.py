"""Perplexity that says which one it is: per token, per word, per byte, by the protocols of published numbers.

    python eval_ppl.py demo/teacher out                  offline, held-out code
    python eval_ppl.py gpt2 distilgpt2                   WikiText, as the guide
    python eval_ppl.py gpt2 distilgpt2 --protocol pages  ... as the harness
    python eval_ppl.py gpt2 distilgpt2 --data lambada    LAMBADA, likewise

A protocol decides how a text is cut into windows, which of their tokens are scored, and by how many words and
bytes the loss is divided. That is all, and yet on WikiText gpt2 has 29.9 by one protocol and 37.4 by another.

Read in this order:
  sliding, blocks,     the protocols: text -> windows
    pages, lambada
  read_texts           what --data names -> texts
  evaluate             windows -> batches -> scores (support/scoring.py computes the logits)
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
    note,
    open_bar,
    run_cli,
    user_path,
)
from support.hub import hub_error
from support.ranks import pick_device
from support.report import filled
from support.scoring import SCORES, compare, ratio, score
from support.text import HUB_DATA, HUB_NAME, ROWS, TEXT, ending, open_data, read_file, text_of
from support.tokenizer import load_tokenizer
from support.wikitext import detokenize_wikitext, wikitext_articles

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"
LAMBADA = "EleutherAI/lambada_openai:default"
TEST_SETS = {**HUB_DATA, "wikitext-2": WIKITEXT, "wikitext-103": WIKITEXT, "lambada": LAMBADA}
# (WikiText-2 and WikiText-103 have the same test split.)


# ------------------------------------------------------------------------------------ protocols
class Window(NamedTuple):
    """What a model reads at once. Words and bytes are the text's, in proportion to the tokens scored."""
    ids: np.ndarray  # L tokens
    n_scored: int  # the last n_scored tokens are scored, each given all tokens before it in the window
    words: float
    bytes: float


def sliding(text, tokenizer, args):
    """As in Hugging Face's guide: windows of --context tokens, each --stride tokens after the previous one. A
    window scores what no earlier one has scored. Words and bytes by the share of tokens scored.

    So each token is scored once, except the first one of a window without overlap: nothing comes before it.
    With stride 2 and context 4 (in parentheses: read, not scored):  (a) b c d,  (c d) e f,  (e f) g
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
    """As in fine-tuning scripts: disjoint blocks of --context tokens, without what remains at the end. Words
    and bytes by the share of tokens scored.

    With context 4:  (a) b c d,  (e) f g h
    """
    ids, words, size = whole_text(text, tokenizer)
    n = len(ids)
    n_scored = args.context - 1
    for start in range(0, n - n_scored, args.context):
        share = n_scored / n
        yield Window(ids[start:start + args.context], n_scored, share * words, share * size)


def pages(text, tokenizer, args):
    """As in lm-evaluation-harness's wikitext: every token of a page is scored, the first one after an
    end-of-text token. WikiText is detokenised; its words and bytes are counted before that.

    A window has --context inputs, one token more than in the guide. The last window of a page is filled up
    on the left with tokens that were scored before. With context 3:  (eot) a b c,  (c) d e f,  (d e f) g
    """
    # Count words and bytes first: detokenising joins words that WikiText splits, such as "otter 's".
    words = len(re.split(r"\s+", text))
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
    """As in lm-evaluation-harness's lambada_openai: the last word is scored, given all text before it, in one
    window. Its perplexity is the one per word."""
    before, _, _ = text.rpartition(" ")
    size = utf8_length(text) - utf8_length(before)

    ids = tokenizer.encode_array(text)
    n_target = len(ids) - len(tokenizer.encode_array(before.rstrip()))
    ids = ids[-args.context - 1:]
    n_scored = min(n_target, len(ids) - 1)  # if the text is one word, nothing comes before its first token
    if n_scored > 0:
        share = n_scored / n_target
        yield Window(ids, n_scored, share, share * size)


PROTOCOLS = {"sliding": sliding, "blocks": blocks, "pages": pages, "lambada": lambada}
JOINED = ("sliding", "blocks")  # these read all texts as one


def whole_text(text, tokenizer):
    """(ids, words, bytes) of a text, or of the held-out part of a corpus, which does not count words (0)."""
    if isinstance(text, Corpus):
        return text.val, 0, text.meta["val"]["bytes"]
    # Encode in pieces, to save memory. No token contains a line end that a visible character follows.
    pieces = re.finditer(r"(?s).{0,4096}.*?(?=\n\S|\Z)", text)
    ids = np.concatenate([tokenizer.encode_array(piece[0]) for piece in pieces])
    return ids, len(text.split()), utf8_length(text)


def utf8_length(text):
    return len(text.encode("utf-8", "replace"))


# ------------------------------------------------------------------------------------ texts
def read_texts(data, protocol, column):
    """What --data names -> a list of texts, or of one Corpus. A protocol in JOINED gets one text."""
    path = Path(data)
    if (path / "meta.json").is_file():
        return [Corpus(path)]

    if data == "stdlib" or path.is_dir():
        note(f"of {data} only the held-out part is scored")
        texts = [text for split, text in open_data(data, column).documents if split == "val"]
    elif path.is_file():
        texts = list(read_file(path, column))
        if ending(path) not in ROWS or not column:
            texts = ["".join(texts)]  # a file of plain text comes in pieces
    else:
        texts = read_test_set(data, column)

    if data == WIKITEXT and protocol == "pages":
        return list(wikitext_articles(texts))
    if data == WIKITEXT and protocol == "blocks":
        # As in the file wiki.test.raw. On the Hub, its blank lines (" ") have become empty rows.
        return ["".join(line or " \n" for line in texts)]
    return ["\n\n".join(texts)] if protocol in JOINED else texts


def read_test_set(data, column):
    """The texts of the test split of a data set on the Hub."""
    # Do not ask the Hub, which can take half a minute, for a name that looks local or misspelt.
    name = re.fullmatch(HUB_NAME, data)
    near = lookalike(data, [*TEST_SETS, "stdlib"])
    if not name or near or ending(data) in (*ROWS, *TEXT):
        hint = f": did you mean {near}?" if near else ""
        raise InputError(f"{data} is neither a file here nor a data set on the Hub{hint}")

    repo, revision, config = name.groups()
    from datasets import load_dataset
    try:
        values = list(load_dataset(repo, config, split="test", revision=revision)[column])
    except Exception as error:
        if "Unknown split" in str(error):
            raise InputError(f"{data} has no test split: name a file of it, or the corpus in corpora/ that a "
                             "run has made of it") from error
        raise hub_error(data, error) from error
    return [text_of({column: value}, column, data) for value in values]


def check_corpus(corpus, tokenizer, args):
    """A corpus contains token ids, so it fits only its own tokenizer, and its words cannot be counted."""
    if args.protocol not in JOINED or corpus.meta["tokenizer"] != tokenizer.fingerprint:
        raise InputError(f"{args.data} holds token ids of one tokenizer: take --protocol "
                         f"{' or '.join(JOINED)}, and models with that tokenizer")


# ------------------------------------------------------------------------------------ scores
def evaluate(models, texts, args, tokenizer):
    """{name: model}, all with this tokenizer -> {name: {figure: count, or (value, standard error)}}."""
    protocol = PROTOCOLS[args.protocol]
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
    """Windows -> ids, targets (B, L). Padding is on the right, where a causal model does not look."""
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
    """How fast a model is on the first batch, on its own. Padding counts as tokens.

    The model has scored this batch before, so caches are warm.
    """
    ids, targets = collate(windows[:args.batch_size], args.device)
    started = time.perf_counter()
    compare([model], [(ids, targets)] * 2, vocab_size)  # returns when the device has finished
    return 2 * ids.numel() / (time.perf_counter() - started)


# ------------------------------------------------------------------------------------ figures
def figures(scores, windows, protocol, several):
    """SCORES (6, windows) of one model -> {name: count, or (value, standard error)}.

    All perplexities come from one NLL: exp(NLL / words), exp(NLL / bytes), and exp(NLL / tokens), which only
    compares models with one tokenizer. Bits per byte is NLL / bytes / log 2. With `several` models there is
    also the KL to the first one. The perplexity of a model that has diverged can be infinite.
    """
    nll, kl, agree, _, right, tokens = scores
    pairs = [(window.words, window.bytes) for window in windows]
    words, size = torch.tensor(pairs, dtype=torch.float64).T  # each (windows)
    counts = {"token": tokens, "word": words, "byte": size}
    counts = {unit: count for unit, count in counts.items() if count.any()}  # words of a corpus are unknown

    result = {f"{unit}s": round(count.sum().item()) for unit, count in counts.items()}
    result["loss_in_nats_per_token"] = ratio(nll, tokens)
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
        if isinstance(value, tuple):
            mean, error = (number.item() for number in value)
            has_error = len(windows) > 1 and math.isfinite(error)  # one window has no spread
            result[name] = (mean, error) if has_error else mean
    return result


def report(results, args):
    """The settings, and a table with a column for each model."""
    settings = ", ".join(f"{name} {value}" for name, value in vars(args).items()
                         if name != "models" and value not in (None, False))
    explanation, *_ = PROTOCOLS[args.protocol].__doc__.split("\n\n")
    error = "± is one standard error, with windows as independent; distill.py prints two."
    names = max(results.values(), key=len)  # the model with the most figures has all of them
    rows = []
    for name in names:
        cells = {model: shown(values.get(name, "-")) for model, values in results.items()}
        rows.append({"": name.replace("_", " "), **cells})
    above = [filled(" ".join(text.split())) for text in (settings, explanation, error)]
    return "\n".join([*above, "", format_table(rows)])


def shown(figure):
    """A figure in five digits, or in four if it is large; counts are left alone.

    (24.76871, 0.32154) -> "24.769 ± 0.322", 123456.7 -> "1.235e+05"
    """
    if isinstance(figure, int | str):
        return figure
    numbers = figure if isinstance(figure, tuple) else (figure,)
    decimals = 5 - len(f"{numbers[0]:.0f}")
    return " ± ".join(format(number, f".{decimals}f" if decimals > 0 else ".4g") for number in numbers)


def to_json(results, args):
    """The same as JSON, which has no infinity: null instead."""
    text = json.dumps({**vars(args), "results": results})
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2)


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "%(prog)s MODEL [MODEL ...] [options]")
    positive = checked(int, "1 or more, below 2^63", lambda n: 1 <= n < 2**63)
    add = parser.add_argument_group("models and text").add_argument
    add("models", nargs="+", type=user_path, metavar="MODEL",
        help="folders, or names on the Hub such as gpt2; the KL is to the first one with the same tokenizer")
    add("--data", type=user_path, metavar="DATA",
        help="wikitext-2 (wikitext-103 has the same test set), lambada, a file, the held-out part of stdlib, "
             "of a folder of texts or of a corpus in corpora/, or the test split of a data set on the Hub as "
             "owner/name[@revision][:config]. If you leave it out, folders are scored on stdlib and other "
             "models on wikitext-2, but --protocol pages on wikitext-2 and lambada on lambada")
    add("--text-column", default="text", metavar="NAME",
        help="the column or JSON key that holds the text; '' reads a file as it is, even JSON")

    add = parser.add_argument_group(
        "protocol", "sliding: Hugging Face's guide. blocks: fine-tuning scripts. pages: "
        "lm-evaluation-harness's wikitext. lambada: its lambada_openai.").add_argument
    add("--protocol", choices=PROTOCOLS,
        help="the protocol of the number that you want to compare with (default: lambada for --data lambada, "
             "otherwise sliding)")
    add("--stride", type=positive, metavar="N",
        help="sliding: tokens from one window to the next. A small stride gives each token more context, so "
             "the perplexity is better, and takes longer (default: the context)")
    add("--context", type=positive, metavar="N",
        help="tokens of a window (default: as many as all models can read)")

    add = parser.add_argument_group("running").add_argument
    add("--batch-size", type=positive, default=8, metavar="N",
        help="windows scored at once; fewer need less memory and change no figure")
    add("--limit", type=positive, metavar="N", help="stop after N windows, for a quick look")
    add("--precision", choices=DTYPES, default="fp32",
        help="of the weights; published figures are for fp32, bf16 needs half the memory")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first one that is available")
    add("--json", action="store_true",
        help="print JSON; a pair is a value and its standard error, null a value too large for a number")
    return parser.parse_args(argv)


def settle(args, models):
    """Fill in the defaults that depend on other arguments and on the models; refuse impossible windows."""
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

    # Rotary positions can go on for ever; learned ones end with the context.
    longest = min((model.context for model in models if isinstance(model, GPT2)), default=math.inf)
    if not 2 <= args.context <= longest:
        allowed = "2 or more" if longest == math.inf else f"2 to {longest}"
        raise InputError(f"--context {args.context}: must be {allowed} with these models")
    shortest = 1 if args.protocol == "sliding" else args.context  # the other protocols have fixed strides
    if not shortest <= args.stride <= args.context:
        raise InputError(f"--stride {args.stride}: must be {shortest} to {args.context} with --protocol "
                         f"{args.protocol} and --context {args.context}")


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    tokenizers = {name: load_tokenizer(name) for name in args.models}  # first: finds wrong names fast
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

    print(to_json(results, args) if args.json else report(results, args))


if __name__ == "__main__":
    run_cli(main)
