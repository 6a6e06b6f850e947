"""Text in, batches of token ids out.

Read in this order:
  prepare    the text that --data names -> a Corpus on disk: the ids of all documents, one after the other
  batch_at   batch number i of a run, as a function of its arguments

The tokenizer is in support/tokenizer.py, what --data can name in support/documents.py, and how a corpus is
written so that a kill loses nothing in support/corpus.py.

Shapes: B sequences in a batch, L tokens in a sequence.

    python data.py --data openwebtext --tokenizer gpt2 --max-tokens 1e9 --workers 8
"""
import argparse
import errno
import functools
import json
import re
from pathlib import Path

import numpy as np

from support.cli import InputError, run_cli
from support.corpus import SPLITS, fits, locked, make
from support.documents import DATA_CHOICES, open_data
from support.tokenizer import load_tokenizer


class Corpus:
    """`train`, `val`: memory-mapped uint16 ids, an end-of-text id before each document. `meta`: of what data
    and tokenizer; documents, tokens, bytes of text in each split; `complete` or stopped at a budget."""

    def __init__(self, path):
        self.path, self.meta = Path(path), json.loads(Path(path, "meta.json").read_text())
        self.train, self.val = (np.memmap(self.path / f"{split}.bin", np.uint16, "r") for split in SPLITS)


def prepare(data, tokenizer, folder="corpora", max_tokens=None, workers=1, text_column="text"):
    """The corpus of `data` in ids of `tokenizer`: all training tokens, or at least `max_tokens`.

    Made when there is none of this version of the data: in a folder *.part, which gets its name when all
    is written, so that what has the name is whole. What was killed half-way goes on where it was."""
    if tokenizer.vocab_size > 2**16:
        raise InputError(f"a vocabulary of {tokenizer.vocab_size} does not fit the 16-bit ids of a corpus")
    identity, documents = open_data(str(data), text_column)
    wanted = {"source": identity, "tokenizer": tokenizer.fingerprint}
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(data)).strip("-.")[-100:]
    path = Path(folder, f"{name}-{tokenizer.fingerprint[:8]}")
    if not fits(path, wanted, max_tokens):
        try:
            with locked(path):
                make(path, wanted, documents, tokenizer, max_tokens, workers)
        except OSError as error:
            size = f"{2 * max_tokens // 10**6:,} MB" if max_tokens else "about half the size of its text"
            hint = f"; it takes {size}. Make room and start again: it goes on where it stopped"
            hint = hint if error.errno == errno.ENOSPC else ""
            raise InputError(f"{error.filename or path}: {error.strerror}{hint}") from error
    return Corpus(path)


def batch_at(tokens, seed, index, batch_size, context, packing="constant", eot=None):
    """Batch number `index` of a run: ids and targets (the ids that follow), (B, T) int64; -100 is no target.

    A pure function, so that a run resumes from one number. Each epoch takes each example once, in an order of
    its own. "constant": an example is a block of T tokens, wherever documents end; so each token is a target
    once. "padded": it is a document, cut after T targets or filled up with eot on the right. That needs no
    attention mask: in a causal model no token sees what is to its right, and the filling has no targets."""
    example, n = examples(tokens, context, packing, eot)
    ids, targets = np.full((batch_size, context), eot or 0), np.full((batch_size, context), -100)
    for row in range(batch_size):
        epoch, i = divmod(index * batch_size + row, n)
        found = example(permutation(seed, epoch, n)[i])
        ids[row, :len(found) - 1], targets[row, :len(found) - 1] = found[:-1], found[1:]
    return ids, targets


def examples(tokens, context, packing, eot):
    """(function: number of an example -> its at most T + 1 tokens, how many examples there are)."""
    if packing == "padded":
        starts, ends = document_spans(tokens, eot)
        return (lambda i: tokens[starts[i]:min(ends[i], starts[i] + context + 1)]), len(starts)
    n = (len(tokens) - 1) // context
    if n < 1:
        raise InputError(f"{len(tokens)} tokens make no block of {context} + 1; take a shorter --seq-len")
    return (lambda i: tokens[i * context:(i + 1) * context + 1]), n


@functools.lru_cache(maxsize=4)  # a batch can lie across two epochs
def permutation(seed, epoch, n):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


SPANS = {}  # id of an array -> (that array, so that its id stays taken; starts; ends)


def document_spans(tokens, eot):
    """Starts and ends of the documents that have any text, looked for once per array."""
    if id(tokens) not in SPANS:
        step = 2**24  # an array can be larger than memory
        found = [i + np.flatnonzero(tokens[i:i + step] == eot) for i in range(0, len(tokens), step)]
        starts = np.concatenate(found)
        ends = np.append(starts[1:], len(tokens))
        SPANS[id(tokens)] = tokens, starts[ends > starts + 1], ends[ends > starts + 1]
    return SPANS[id(tokens)][1:]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare a corpus ahead of training.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="stdlib", help=DATA_CHOICES)
    parser.add_argument("--tokenizer", default="demo/teacher", help="a model, by folder or Hub name")
    parser.add_argument("--max-tokens", type=float, help="stop at so many, e.g. 1e9; without it, take all")
    parser.add_argument("--workers", type=int, default=1, help="cores that tokenize")
    parser.add_argument("--text-column", default="text", help="column that holds the text")
    parser.add_argument("--folder", default="corpora", help="where corpora are kept")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.workers < 1 or args.max_tokens is not None and args.max_tokens < 1:
        raise InputError("--workers and --max-tokens must be at least 1")
    corpus = prepare(args.data, load_tokenizer(args.tokenizer), args.folder,
                     args.max_tokens and int(args.max_tokens), args.workers, args.text_column)
    for split in SPLITS:
        n = corpus.meta[split]
        print(f"{split}: {n['documents']:,} documents, {n['tokens']:,} tokens, {n['bytes']:,} bytes")
    print(corpus.path)


if __name__ == "__main__":
    run_cli(main)
