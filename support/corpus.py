"""The killable build of a corpus: documents -> train.bin and val.bin, ids of uint16 on disk.

  corpus_path    where the corpus of some data belongs
  read_meta      what a finished corpus says about itself, checked against its files
  fits           whether it is the one that is wanted
  make           builds it beside its place and puts it there when it is complete
  Build          what has been written so far, which survives a kill

A build lives in the folder NAME.part. Every few seconds its progress.json notes how much of the two growing
files is good; a build that is started again cuts them to that length and goes on. The last file to be
written is meta.json, and then the folder is renamed to NAME. So a folder called NAME is complete, and an
older corpus of that name is there until then.
"""
import contextlib
import hashlib
import itertools
import json
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support.cli import InputError, open_bar
from support.files import locked, read_object, replaced, sync

SPLITS = ("train", "val")
COUNTS = ("documents", "tokens", "bytes")
SAVE_SECONDS = 5  # how much work a kill can cost
BATCH_CHARS = 2**20  # how much text is tokenized at a time


# ------------------------------------------------------------------------------------ finished corpora
def corpus_path(folder, source, tokenizer):
    """FOLDER/NAME-HASH. The hash tells data of one name apart; it stays when the content of files changes."""
    place = {key: value for key, value in source.identity.items() if key != "files"}
    text = json.dumps([place, tokenizer.fingerprint], sort_keys=True)
    return Path(folder, f"{source.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def read_meta(path):
    """The meta.json of a corpus whose numbers agree with its files; otherwise an InputError."""
    meta = read_object(path / "meta.json")
    if (excess(path, meta, "eot", "vocab_size") != [0, 0]
            or min(meta["train"]["tokens"], meta["val"]["tokens"]) < 2
            or not meta["eot"] < meta["vocab_size"] <= 2**16):
        # The folder may be somebody else's, so this does not say that it should be deleted.
        raise InputError(f"{path} is not a complete corpus: its meta.json does not describe a train.bin and "
                         "a val.bin beside it. `python data.py` makes corpora, also in place of broken ones")
    return meta


def excess(folder, numbers, *others):
    """How many bytes train.bin and val.bin have beyond the tokens that `numbers` counts; [-1] if a file or a
    count is missing."""
    try:
        counts = [numbers["documents"], *(numbers[split][key] for split in SPLITS for key in COUNTS)]
        counts += [numbers[key] for key in others]
        sizes = [(folder / f"{split}.bin").stat().st_size for split in SPLITS]
    except (KeyError, TypeError, OSError):
        return [-1]
    if not all(type(n) is int and 0 <= n < 2**62 for n in counts):
        return [-1]
    return [size - 2 * numbers[split]["tokens"] for size, split in zip(sizes, SPLITS, strict=True)]


def check_ids(path, ids, vocab_size):
    """Refuse ids that the vocabulary does not have, because they would crash a model.

    This looks at 64 MB at most, at both ends of a file. Damage that keeps the size of a file is rare, and
    reading all 17 GB of OpenWebText would take minutes at each start.
    """
    for part in (ids[:2**24], ids[-2**24:]):
        if part.max() >= vocab_size:
            raise InputError(f"{path} is damaged: it has the id {part.max()} in a vocabulary of "
                             f"{vocab_size}. Move it away and make it again with `python data.py`")


def fits(path, wanted, max_tokens):
    """Whether the corpus at `path` is complete, of this data and tokenizer, and large enough.

    Any revision of a Hub data set will do; `source` in meta.json also says which one it is.
    """
    try:
        meta = read_meta(path)
        same = (meta["tokenizer"] == wanted["tokenizer"]
                and wanted["source"].items() <= meta["source"].items())
        return same and bool(meta["complete"] or max_tokens and meta["train"]["tokens"] >= max_tokens)
    except (InputError, KeyError, AttributeError):
        return False


# ------------------------------------------------------------------------------------ building
def make(path, wanted, source, tokenizer, max_tokens, workers):
    """Build the corpus and put it at `path`, in place of one that does not fit. One process at a time."""
    part = path.with_name(path.name + ".part")
    try:
        with locked(path.parent, f"the corpus {path}", path.name, wait=True):
            if fits(path, wanted, max_tokens):  # another process made it in the meantime
                return
            if not fits(part, wanted, max_tokens):
                build(part, wanted, source, tokenizer, max_tokens, workers)
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}; start again, and it goes on "
                         "from what was saved (a corpus takes about half the size of its text)") from error


class Build:
    """A corpus that is being written into the folder `part`.

    `numbers` will be its meta.json: what was asked for, whether the data was read to its end, and the
    documents, tokens and bytes of text, for each split and (documents) in all.
    """

    def __init__(self, part, wanted):
        self.part = part
        self.progress = part / "progress.json"
        self.numbers = read_object(self.progress)
        self.saved = time.monotonic()
        # A killed build of the same corpus has left files that are at least as long as it noted.
        if min(excess(part, self.numbers)) < 0 or not wanted.items() <= self.numbers.items():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            self.numbers = {**wanted, "documents": 0, "complete": False}
            self.numbers.update((split, dict.fromkeys(COUNTS, 0)) for split in SPLITS)

    def __enter__(self):
        self.files = {split: open(self.part / f"{split}.bin", "ab") for split in SPLITS}
        for split, file in self.files.items():
            file.truncate(2 * self.tokens(split))  # what was written and not noted
        return self

    def __exit__(self, kind, error, trace):
        for file in self.files.values():
            with contextlib.suppress(OSError):  # a later start cuts off what is not noted
                file.close()
        if kind and not self.progress.exists():  # a start that failed leaves nothing behind
            shutil.rmtree(self.part, ignore_errors=True)

    def tokens(self, split):
        return self.numbers[split]["tokens"]

    def add(self, split, text, ids):
        """Append a document."""
        counts = self.numbers[split]
        self.files[split].write(ids)
        counts["documents"] += 1
        counts["tokens"] += len(ids)
        counts["bytes"] += len(text.encode("utf-8", "replace"))

    def save(self, path):
        """Note the numbers in a file, but only once what they say about the other files is true."""
        for file in self.files.values():
            sync(file)
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(self.numbers, indent=2))
        self.saved = time.monotonic()


def build(part, wanted, source, tokenizer, max_tokens, workers):
    """Write a corpus into the folder `part`, from where a killed build of it stopped."""
    if source.pinned:
        # A data set of the Hub may get a new version while a killed build of it waits. The build goes on with
        # the version that it noted, because half of one and half of another would be no data set at all.
        noted = read_object(part / "progress.json").get("source", {})
        source = source.pinned(noted.get("revision"))

    limit = max_tokens or sys.maxsize
    bar = open_bar(title=source.name, total=max_tokens, unit=" tokens", unit_scale=True)
    with Build(part, {**wanted, "source": source.identity}) as corpus, bar:
        todo = itertools.islice(source.documents, corpus.numbers["documents"], None)
        for batch, encoded in tokenized(batched(todo), tokenizer, workers):
            for (split, text), ids in zip(batch, encoded, strict=True):
                if split == "train":
                    ids = ids[:limit - corpus.tokens("train")]
                if len(ids):
                    corpus.add(split, text, ids)
            corpus.numbers["documents"] += len(batch)

            bar.update(corpus.tokens("train") - bar.n)
            if corpus.tokens("train") >= limit:
                break
            if time.monotonic() > corpus.saved + SAVE_SECONDS:
                corpus.save(corpus.progress)
        else:
            corpus.numbers["complete"] = True

        for split in SPLITS:
            if corpus.tokens(split) < 2:
                raise InputError(f"{source.name}: no text for {split}; take two documents, or a longer one")
        corpus.numbers.update(eot=tokenizer.eot, vocab_size=tokenizer.vocab_size)
        corpus.save(part / "meta.json")  # which makes it a corpus
        corpus.progress.unlink(missing_ok=True)
        bar.total = bar.n  # less than max_tokens if the data ended before


def batched(documents):
    """Lists of documents, of about a megabyte each."""
    batch = []
    length = 0
    for document in documents:
        batch.append(document)
        length += len(document[1])
        if length >= BATCH_CHARS:
            yield batch
            batch = []
            length = 0
    yield batch


def tokenized(batches, tokenizer, workers):
    """(batch, ids of each of its documents), in order, so that `workers` changes only the time.

    Few batches are read ahead, so memory stays bounded. Threads use all cores, as tiktoken runs outside of
    Python's lock.
    """
    def encode(batch):
        return [np.append(tokenizer.eot, tokenizer.encode_array(text)).astype(np.uint16) for _, text in batch]

    with ThreadPoolExecutor(workers) as pool:
        running = deque()
        for batch in batches:
            running.append((batch, pool.submit(encode, batch)))
            if len(running) > 2 * workers:
                batch, ids = running.popleft()
                yield batch, ids.result()
        for batch, ids in running:
            yield batch, ids.result()
