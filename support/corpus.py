"""The killable build of a corpus: documents -> train.bin and val.bin, ids of uint16 on disk.

  corpus_path    where the corpus of some data belongs
  read_meta      what a finished corpus says about itself, checked against its files
  fits           whether it is the one that is wanted
  make           builds it beside its place and puts it there when it is complete
  Build          what has been written so far, which survives a kill

A build lives in the folder NAME.part. Every few seconds its progress.json notes how much of the two growing
files is good; a build that is started again cuts them to that and goes on. The last file to be written is
meta.json, and then the folder is renamed to NAME. So what is called NAME is whole, and an older corpus of
that name is there until then.
"""
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from support.cli import InputError
from support.files import replaced
from support.progress import open_bar

SPLITS = ("train", "val")
COUNTS = ("documents", "tokens", "bytes")
SAVE_SECONDS = 5  # how much work a kill can cost
BATCH_CHARS = 2**20  # how much text is tokenized at a time
ANEW = "Delete it and make it anew with `python data.py`"


# --- Finished corpora -------------------------------------------------------------------------------------

def corpus_path(folder, source, tokenizer):
    """FOLDER/NAME-HASH. The hash tells data of one name apart; it stays when the content of files changes."""
    place = {key: value for key, value in source.identity.items() if key != "files"}
    text = json.dumps([place, tokenizer.fingerprint], sort_keys=True)
    return Path(folder, f"{source.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}")


def read_meta(path):
    """The meta.json of a corpus, whose numbers are sound and fit its files; otherwise an InputError."""
    if not (path / "meta.json").is_file():
        raise InputError(f"{path} is no corpus: it has no meta.json. `python data.py` makes one")
    meta = read_object(path / "meta.json")
    sizes = [file_size(path / f"{split}.bin") for split in SPLITS]
    sound = (
        has_counts(meta)
        and all(meta[split]["tokens"] >= 2 for split in SPLITS)
        and sizes == [2 * meta[split]["tokens"] for split in SPLITS]
        and is_count(meta.get("vocab_size")) and 0 < meta["vocab_size"] <= 2**16
        and is_count(meta.get("eot")) and meta["eot"] < meta["vocab_size"]
        and isinstance(meta.get("complete"), bool)
        and isinstance(meta.get("source"), dict) and isinstance(meta.get("tokenizer"), str)
    )
    if not sound:
        raise InputError(f"{path} is damaged: its meta.json does not fit its files. {ANEW}")
    return meta


def check_ids(path, ids, vocab_size):
    """Refuse ids that the vocabulary does not have: they would crash a model.

    Looks at both ends of a file, at 64 MB of it at most. Damage that keeps a file's size is rare, and to read
    all of 17 GB would take minutes at each start.
    """
    for part in (ids[:2**24], ids[-2**24:]):
        if part.max() >= vocab_size:
            raise InputError(f"{path} is damaged: id {part.max()} in a vocabulary of {vocab_size}. {ANEW}")


def read_object(path):
    """The JSON object in a file; an empty one if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def has_counts(numbers):
    """Whether all that is counted, in whole and by split, is there as numbers that can be."""
    splits = [numbers.get(split) for split in SPLITS]
    return is_count(numbers.get("documents")) and all(
        isinstance(split, dict) and all(is_count(split.get(key)) for key in COUNTS) for split in splits)


def is_count(value):
    return type(value) is int and 0 <= value < 2**62


def file_size(path):
    return path.stat().st_size if path.is_file() else 0


def fits(path, wanted, max_tokens):
    """Whether the corpus at `path` is whole, of this data and tokenizer, and large enough."""
    try:
        meta = read_meta(path)
    except InputError:
        return False
    enough = meta["complete"] or bool(max_tokens) and meta["train"]["tokens"] >= max_tokens
    return enough and wanted.items() <= meta.items()


# --- Building ---------------------------------------------------------------------------------------------

def make(path, wanted, source, tokenizer, max_tokens, workers):
    """Build the corpus and put it to `path`, in place of one that does not fit."""
    part = path.with_name(path.name + ".part")
    try:
        with locked(path):
            if fits(path, wanted, max_tokens):  # made by another process in the meantime
                return
            if not fits(part, wanted, max_tokens):
                build(part, wanted, source, tokenizer, max_tokens, workers)
            shutil.rmtree(path, ignore_errors=True)
            part.rename(path)
    except OSError as error:
        size = f"{2 * max_tokens // 10**6:,} MB" if max_tokens else "about half the size of its text"
        room = f"; it takes {size}. Make room and start again: it goes on where it stopped"
        hint = room if error.errno == errno.ENOSPC else ""
        raise InputError(f"{error.filename or path}: {error.strerror or error}{hint}") from error


@contextlib.contextmanager
def locked(path):
    """One process at a time makes `path`; others wait here. The system frees the lock of one that dies.

    At the end the lock is removed, and so are folders that were made for it if nothing has come into them.
    """
    new_folders = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock(f"{path}.lock") as file:
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    os.unlink(file.name)
    finally:
        with contextlib.suppress(OSError):  # one that is not empty, so those around it are not
            for folder in new_folders:
                folder.rmdir()


def lock(path):
    """The file `path`, open and locked."""
    while True:
        file = open(path, "w")
        try:
            import fcntl
        except ImportError:  # Windows has no such lock
            return file

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process makes what {path} is for; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)

        # The process that had it may have removed the file, and another one be behind a new file already.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
                return file
        file.close()


class Build:
    """A corpus that is being written into the folder `part`.

    `numbers` is what will be its meta.json: what was asked for, whether the data was read to its end, and
    documents, tokens and bytes of text, in each split and (documents) in all.
    """

    def __init__(self, part, wanted):
        self.part = part
        self.progress = part / "progress.json"
        self.numbers = read_object(self.progress)
        self.saved = time.monotonic()
        if not self.can_go_on(wanted):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            self.numbers = {**wanted, "documents": 0, "complete": False}
            self.numbers.update((split, dict.fromkeys(COUNTS, 0)) for split in SPLITS)

    def can_go_on(self, wanted):
        """Whether a killed build of the same corpus has left its files, and as much in them as it noted."""
        return (wanted.items() <= self.numbers.items() and has_counts(self.numbers)
                and all(file_size(self.part / f"{split}.bin") >= 2 * self.tokens(split) for split in SPLITS))

    def __enter__(self):
        self.files = {split: open(self.part / f"{split}.bin", "ab") for split in SPLITS}
        for split, file in self.files.items():
            file.truncate(2 * self.tokens(split))  # what was written and not noted
        return self

    def __exit__(self, kind, error, trace):
        for file in self.files.values():
            with contextlib.suppress(OSError):  # what is not noted is not missed
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
        """Note the numbers in a file, and not before what they say about the other files is true."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        with replaced(path) as temporary:
            temporary.write_text(json.dumps(self.numbers, indent=2))
        self.saved = time.monotonic()

    def finish(self):
        """Write meta.json, which makes it a corpus."""
        self.save(self.part / "meta.json")
        self.progress.unlink(missing_ok=True)


def build(part, wanted, source, tokenizer, max_tokens, workers):
    """Write a corpus into the folder `part`, from where a killed build of it stopped."""
    limit = max_tokens or sys.maxsize
    size = source.size()
    with Build(part, wanted) as corpus, progress_bar(source.name) as bar:
        todo = itertools.islice(source.documents, corpus.numbers["documents"], None)
        for batch, encoded in tokenized(batched(todo), tokenizer, workers):
            for (split, text), ids in zip(batch, encoded, strict=True):
                if split == "train":
                    ids = ids[:limit - corpus.tokens("train")]
                if len(ids):
                    corpus.add(split, text, ids)
            corpus.numbers["documents"] += len(batch)

            show(bar, corpus, size, max_tokens)
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
        corpus.finish()
        bar.total = bar.n


def progress_bar(name):
    return open_bar(title=name, unit=" tokens", unit_scale=True)


def show(bar, corpus, size, max_tokens):
    """Move the bar. It ends where the budget or the data will be used up, whichever comes first.

    The tokens in the data follow from its `size`, if that is known, and the text so far; if not, nobody can
    say whether the budget will be used up, and the bar has no end.
    """
    tokens = sum(corpus.tokens(split) for split in SPLITS)
    end = math.inf
    if size and (read := sum(corpus.numbers[split][size.unit] for split in SPLITS)):
        end = max(tokens, tokens * size.amount / read)
        if max_tokens:
            end = min(end, max_tokens + corpus.tokens("val"))
    bar.total = round(end) if end < math.inf else None
    bar.update(tokens - bar.n)


def batched(documents):
    """Lists of documents, of about a megabyte each."""
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document[1])
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    yield batch


def tokenized(batches, tokenizer, workers):
    """(batch, ids of each of its documents), in order, so that `workers` changes nothing but the time.

    Few batches are read ahead, so memory is bounded. Threads do use all cores: tiktoken lets the others run.
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
