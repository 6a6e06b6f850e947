"""Perplexity that says which one it is: per token, per word, per byte, by the protocols of published numbers.

    python eval_ppl.py gpt2 distilgpt2                    WikiText's test set as in Hugging Face's guide
    python eval_ppl.py gpt2 distilgpt2 --protocol pages   ... as in lm-evaluation-harness's `wikitext`
    python eval_ppl.py gpt2 distilgpt2 --data lambada     lm-evaluation-harness's `lambada_openai`
    python eval_ppl.py demo/teacher out --data stdlib     offline: the code that the demo held out

Read in this order:
  1. read_texts                  --data -> texts
  2. sliding, rolling, windows   texts -> windows of tokens: all that the protocols differ in
  3. token_scores, compare       windows -> scores; the only place where logits exist
  4. figures, describe           scores -> perplexities, their standard errors, and what exactly they are

One sum of negative log-likelihoods (NLL, nats) gives them all: per token exp(NLL / tokens), per word exp(NLL / words),
per byte exp(NLL / bytes), bits per byte NLL / bytes / ln 2. All but the first can be compared across tokenizers.

References: huggingface.co/docs/transformers/perplexity; github.com/EleutherAI/lm-evaluation-harness; LAMBADA: Paperno
et al. 2016, arXiv 1606.06031. Shapes: M models, B windows, T tokens, N = B * T, n of them at a time, V vocabulary.
"""
import argparse
import itertools
import json
import math
import re
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from data import READERS, Corpus, InputError, hub_error, load_tokenizer, open_data, run_cli, wikitext_articles
from model import GPT2, load

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1"  # -103 has the same test set, and a training set of 300 MB
TEST_SETS = {"wikitext-2": WIKITEXT, "wikitext-103": WIKITEXT, "lambada": "EleutherAI/lambada_openai:default"}
SHARE = "words and bytes: the whole text's, times the share of its tokens that is scored"
PROTOCOLS = {  # what exactly the figures are; printed beside them
    "sliding": "windows of {context} tokens, stride {stride} (Hugging Face's guide); every token is scored once, unless "
               "nothing stands before it in its window; " + SHARE,
    "blocks": "disjoint blocks of {context} tokens, the last partial one dropped, the first token of each not scored "
              "(the scripts of DistilGPT2's time); " + SHARE,
    "pages": "rolling windows of {context} tokens in each page, after end-of-text (lm-evaluation-harness's wikitext); "
             "words, as re.split(r'\\s+', page) counts them, and bytes: of the page before detokenisation",
    "lambada": "the last word of each text, given all before it, at most {context} tokens (lm-evaluation-harness's "
               "lambada_openai, whose perplexity is the one per word); accuracy: every token of it is the likeliest"}


# ------------------------------------------------------------------------------------ 1. texts
def read_texts(data, protocol, column):
    """The texts of --data, or a Corpus. For `pages` and `lambada` each is scored for itself; the others get one."""
    path, source = Path(data), TEST_SETS.get(data, data)
    if path.is_dir():
        return read_corpus(path, protocol)
    if data == "stdlib":
        texts = [text for split, text in open_data(data)[1] if split == "val"]
    elif path.is_file():
        texts = list(READERS.get(path.suffix, READERS[".txt"])(path, column))
        if path.suffix not in (".jsonl", ".parquet"):
            texts = ["".join(texts)]  # a long .txt comes in pieces
    else:
        texts = read_hub(source, column)
    if source == WIKITEXT and protocol == "pages":
        return list(wikitext_articles(texts))
    if source == WIKITEXT and protocol == "blocks":
        return ["".join(line or " \n" for line in texts)]  # wiki.test.raw: the Hub's copy has emptied its blank lines
    return texts if protocol in ("pages", "lambada") else ["\n\n".join(texts)]


def read_corpus(path, protocol):
    if protocol not in ("sliding", "blocks"):
        raise InputError(f"--protocol {protocol} needs text, but {path} holds tokens: take sliding or blocks")
    try:
        return Corpus(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is a folder, but no corpus that data.py prepared: {error}") from error


def read_hub(source, column):
    """The test split of a data set; the Hub's cache keeps it, so that the second time needs no network."""
    from datasets import load_dataset
    repo, _, config = source.partition(":")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo) or Path(repo).suffix in READERS:
        raise InputError(f"no --data {source}: there is {', '.join(TEST_SETS)}, stdlib, a file of text, the folder of a "
                         "prepared corpus, or a data set of the Hub as owner/name or owner/name:config")
    try:
        return load_dataset(repo, config or None, split="test")[column]
    except Exception as error:
        raise hub_error(source, error) from error


# WikiText is cut into words ("wasn 't 1 @.@ 5"). The harness's rules, in its order, glue them together again.
DETOKENIZER = [
    ("s '", "s'"), ("/' [0-9]/", "/'[0-9]/"),  # the second is a slip of the harness's: it fits nothing
    *((f" @[{c}]@ ", c) for c in "-,."), *((f" [{c}] ", f"{c} ") for c in ":;.!?,"),
    *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "),
    (" 's", "'s")]


def detokenize(page):
    """' = Oz = \\n It was " 1 @.@ 5 " km . ' -> ' = Oz =\\nIt was "1.5" km. '"""
    for pattern, replacement in DETOKENIZER:
        page = re.sub(pattern, replacement, page)
    return page


# ------------------------------------------------------------------------------------ 2. windows
def sliding(n, context, stride):
    """Spans (start, end, first) of n tokens: a window is tokens[start:end], of which tokens[first:end] are scored."""
    done = 1
    for start in range(0, n - 1, stride):
        end = min(start + context, n)
        yield start, end, max(done, start + 1)
        done = end
        if end == n:
            return


def rolling(n, context):
    """Spans of n tokens whose first is end-of-text: `context` inputs a window, disjoint targets. The last window, too,
    is a full one: where it has fewer targets it has more context."""
    for first in range(1, n, context):
        end = min(first + context, n)
        yield max(0, end - context - 1), end, first


class Window(NamedTuple):
    """Inputs ids[:-1], targets ids[1:], of which the last `scored` count; words and bytes are its share of the text's."""
    ids: np.ndarray
    scored: int
    words: float
    bytes: float
    cluster: int  # what the standard errors take as independent: a page, a text, a context's length of one long text


def windows(texts, args, tokenizer):
    """List of the Windows of all texts; their ids are views of one array a text."""
    one_text = args.protocol in ("sliding", "blocks")
    found = []
    for number, text in enumerate(texts if one_text else texts[:args.limit]):
        ids, known, words, size = tokens_of(text, args, tokenizer)
        for start, end, first in itertools.islice(spans(len(ids), known, args), args.limit if one_text else None):
            share = (end - first) / (len(ids) - known)
            found.append(Window(ids[start:end], end - first, words * share, size * share,
                                first // args.context if one_text else number))
    if not found:
        raise InputError(f"{args.data} has {sum(map(len, texts)):,} characters or tokens of text: too few for one window")
    return found


def tokens_of(text, args, tokenizer):
    """(ids, how many of them only lead up to the text that is scored, its words, its bytes)."""
    if isinstance(text, Corpus):
        pass
    size = len(text.encode("utf-8", "replace"))
    if args.protocol == "pages":
        page = detokenize(text) if TEST_SETS.get(args.data) == WIKITEXT else text
        return np.array([tokenizer.eot, *tokenizer.encode(page)]), 1, len(re.split(r"\s+", text)), size
    if args.protocol == "lambada":
        before, _, word = text.rpartition(" ")
        before = tokenizer.encode(before.rstrip())
        return np.array(tokenizer.encode(text)), len(before), 1, len(word.encode()) + 1
    return encode(text), 0, len(text.split()), size
