"""Text in, batches of token ids out.

Read in this order:
  prepare      the text that --data names -> a Corpus on disk: the ids of all documents, one after the other
  Corpus       these ids, as arrays that stay on disk until they are read
  batch_at     batch number i of a run, as a function of its arguments
  examples_at  how the tokens are cut into examples

The tokenizer is in support/tokenizer.py, the names that --data takes are in support/text.py, and
support/corpus.py writes a corpus so that a kill loses nothing.

Shapes: B sequences in a batch, L tokens in a sequence.

    python data.py --data my_texts/
    python data.py --data openwebtext --tokenizer gpt2 --max-tokens 1e9
"""
try:
    import support  # noqa: F401  (first: Ctrl-C ends in one line while PyTorch loads)
except ModuleNotFoundError as error:  # python -I, python -P, PYTHONSAFEPATH
    raise SystemExit("error: start Python without -I or -P, or set PYTHONPATH to this folder") from error

import functools
import hashlib
from collections import deque
from pathlib import Path

import numpy as np

from support.cli import InputError, checked, new_parser, run_cli, user_path
from support.corpus import SPLITS, check_ids, corpus_path, fits, make, read_meta
from support.text import DATA_CHOICES, open_data
from support.tokenizer import load_tokenizer


class Corpus:
    """A text as token ids: `train` and `val`, arrays of uint16.

    The documents lie one after the other, each with the end-of-text id `eot` before it. `meta` names the data
    and the tokenizer, and counts documents, tokens and bytes of text in each split.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.meta = read_meta(self.path)
        self.eot = self.meta["eot"]
        self.vocab_size = self.meta["vocab_size"]
        self.train, self.val = (np.memmap(self.path / f"{split}.bin", np.uint16, "r") for split in SPLITS)
        for ids in (self.train, self.val):
            check_ids(self.path, ids, self.vocab_size)

    @functools.cached_property
    def fingerprint(self):
        """A short hash of the ids, by which a run knows its text again.

        Up to 32M tokens all of them count; of more, 512 pieces that are spread over the whole array.
        """
        digest = hashlib.sha256()
        for ids in (self.train, self.val):
            digest.update(str(len(ids)).encode())
            step = max(2**16, len(ids) // 512)
            for start in range(0, len(ids), step):
                digest.update(ids[start:start + 2**16])
        return digest.hexdigest()[:16]


def prepare(data, tokenizer, folder="corpora", max_tokens=None, workers=1, text_column="text"):
    """The corpus of `data` in ids of `tokenizer`: all of the training tokens, or at least `max_tokens`.

    It is made if `folder` does not have it for this version of the data; other corpora there stay untouched.
    """
    if tokenizer.vocab_size > 2**16:
        raise InputError(f"a vocabulary of {tokenizer.vocab_size} does not fit the 16-bit ids of a corpus")
    source = open_data(str(data), text_column)
    path = corpus_path(folder, source, tokenizer)
    wanted = {"source": source.identity, "tokenizer": tokenizer.fingerprint}
    if not fits(path, wanted, max_tokens):
        make(path, wanted, source, tokenizer, max_tokens, workers)
    return Corpus(path)


def batch_at(tokens, seed, index, batch_size, context, packing="constant", eot=None):
    """Batch number `index` of a run: ids and targets, each (B, L) int64.

    The target of a position is the id that follows it; -100 means no target. This is a pure function, so a
    run resumes from one number. The packing says how the tokens are cut into examples of at most L + 1 ids.
    If L is 4 and the end-of-text id is 0:

        tokens      0 5 6 7 0 8 0 1 2 3 4 9
        "constant"  0 5 6 7 0 | 0 8 0 1 2        blocks, wherever documents end; what is left over is dropped
        "padded"    0 5 6 7 0 | 0 8 0 | 0 1 2 3 4    documents with their end, cut after L targets

    The block 0 5 6 7 0 gives the ids 0 5 6 7 and the targets 5 6 7 0. The document 0 8 is shorter: its ids
    are 0 8 0 0 and its targets 8 0 -100 -100. It is filled up on the right, where no earlier token of a
    causal model looks, so an attention mask is not needed.
    """
    starts, _ = cut(tokens, context, packing, eot)
    numbers = numbers_at(seed, index, batch_size, len(starts))
    return examples_at(tokens, numbers, context, packing, eot)


def examples_at(tokens, numbers, context, packing, eot):
    """Examples by their numbers: ids and targets, each (B, L) int64."""
    starts, ends = cut(tokens, context, packing, eot)
    ids = np.full((len(numbers), context), eot or 0)  # (B, L)
    targets = np.full((len(numbers), context), -100)  # (B, L)
    for row, i in enumerate(numbers):
        example = tokens[starts[i]:min(ends[i], starts[i] + context + 1)]
        if packing == "padded" and len(example) <= context:
            # A whole document. A model that never sees the end as a target never learns to stop.
            example = np.append(example, eot)

        n = len(example) - 1
        ids[row, :n] = example[:-1]
        targets[row, :n] = example[1:]
    return ids, targets


def numbers_at(seed, index, batch_size, n):
    """Which of n examples are in batch number `index`: an epoch takes each once, in an order of its own."""
    numbers = []
    for place in range(index * batch_size, (index + 1) * batch_size):
        epoch, position = divmod(place, n)
        numbers.append(permutation(seed, epoch, n)[position])
    return numbers


@functools.lru_cache(maxsize=4)  # a batch can lie across two epochs
def permutation(seed, epoch, n):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def cut(tokens, context, packing, eot):
    """Starts and ends of all examples."""
    if packing == "padded":
        return cut_documents(tokens, eot)
    n = (len(tokens) - 1) // context
    if n < 1:
        raise InputError(f"{len(tokens)} tokens are too few for one block of {context} + 1; take a shorter "
                         "--seq-len, or more text")
    # Blocks overlap by a token: the last target of one is the first input of the next.
    return range(0, n * context, context), range(context + 1, n * context + 2, context)


def target_offsets(tokens, context, packing, eot):
    """If the targets of all examples were in one line: where each example begins, and where the last ends.

    For the documents of `batch_at`, cut after 4 targets: 0, 4, 6, 10.
    """
    starts, ends = cut(tokens, context, packing, eot)
    if packing == "constant":
        return range(0, len(starts) * context + 1, context)
    n_targets = np.minimum(ends - starts, context)  # the end-of-text id makes up for the first one
    return np.concatenate(([0], n_targets.cumsum()))


CUT = deque(maxlen=4)  # (tokens, eot, result) of the last calls: looking through all tokens takes seconds


def cut_documents(tokens, eot):
    """Starts and ends of the documents that have any text."""
    for known_tokens, known_eot, known in CUT:
        if known_tokens is tokens and known_eot == eot:
            return known

    step = 2**24  # an array can be larger than memory
    found = [i + np.flatnonzero(tokens[i:i + step] == eot) for i in range(0, len(tokens), step)]
    starts = np.concatenate(found)
    ends = np.append(starts[1:], len(tokens))
    with_text = ends > starts + 1
    if not with_text.any():
        raise InputError(f"{len(tokens)} tokens with no document that has any text")
    CUT.append((tokens, eot, (starts[with_text], ends[with_text])))
    return CUT[-1][2]


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what is prepared").add_argument
    add("--data", type=user_path, default="stdlib", help=f"the text: {DATA_CHOICES}")
    add("--text-column", default="text", metavar="NAME",
        help="the column or JSON key that holds the text; '' reads files as they are, even JSON")
    add("--tokenizer", type=user_path, default="demo/teacher", metavar="MODEL",
        help="the model (a folder or a Hub name) whose tokenizer makes the ids: your teacher")
    add("--max-tokens", type=checked(float, "1 to 1e18, as in 1e9", lambda n: 1 <= n <= 1e18), metavar="N",
        help="stop after N training tokens; without it, all of the data is downloaded and used")
    add = parser.add_argument_group("how").add_argument
    add("--workers", type=checked(int, "1 to 1024", lambda n: 1 <= n <= 1024), default=1, metavar="N",
        help="cores that tokenize: more are faster, and the result is the same")
    add("--folder", type=user_path, default="corpora",
        help="where corpora are kept; one that is there already is not made again")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    max_tokens = int(args.max_tokens) if args.max_tokens else None
    corpus = prepare(args.data, load_tokenizer(args.tokenizer), args.folder, max_tokens, args.workers,
                     args.text_column)
    for split in SPLITS:
        n = corpus.meta[split]
        print(f"{split}: {n['documents']:,} documents, {n['tokens']:,} tokens, {n['bytes']:,} bytes")
    print(corpus.path)


if __name__ == "__main__":
    run_cli(main)
