"""The killable build of a corpus: documents -> train.bin and val.bin, ids of uint16 on disk."""
import contextlib
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from support.cli import InputError
from support.files import replaced

SPLITS = ("train", "val")
SAVE_SECONDS = 5  # how much work a kill can cost


@contextlib.contextmanager
def locked(path):
    """One process at a time makes `path`; others wait here. The system frees the lock of one that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        with contextlib.suppress(ImportError):  # Windows has no such lock
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is making {path}; waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(path, wanted, documents, tokenizer, max_tokens, workers):
    """Build the corpus beside `path` and put it there in one step, in place of one that does not fit."""
    part = path.with_name(path.name + ".part")
    if fits(path, wanted, max_tokens):  # made by another process in the meantime
        return
    if not fits(part, wanted, max_tokens):
        build(part, wanted, documents, tokenizer, max_tokens, workers)
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def fits(path, wanted, max_tokens):
    """Whether the corpus at `path` is whole, of this data and tokenizer, and large enough."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        whole = all((path / f"{split}.bin").stat().st_size == 2 * meta[split]["tokens"] for split in SPLITS)
        enough = meta["complete"] or max_tokens and meta["train"]["tokens"] >= max_tokens
        return whole and enough and wanted.items() <= meta.items()
    except (OSError, ValueError, KeyError):
        return False


def build(part, wanted, documents, tokenizer, max_tokens, workers):
    """Write train.bin, val.bin and, last, meta.json; now and then progress.json, where a restart goes on."""
    from tqdm import tqdm
    name, limit = wanted["source"]["data"], max_tokens or sys.maxsize
    done, saved = restart(part, wanted), time.monotonic()
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(part / f"{split}.bin", "ab")) for split in SPLITS}
        bar = stack.enter_context(tqdm(desc=name, total=max_tokens, initial=done["train"]["tokens"],
                                       unit=" tokens", unit_scale=True))
        for split in SPLITS:
            files[split].truncate(2 * done[split]["tokens"])
        todo = itertools.islice(documents, done["documents"], None)
        for batch, encoded in tokenized(batched(todo), tokenizer, workers):
            for (split, text), ids in zip(batch, encoded, strict=True):
                ids = ids[:limit - done["train"]["tokens"]] if split == "train" else ids
                if len(ids):
                    files[split].write(ids)
                    size = len(text.encode("utf-8", "replace"))
                    done[split].update(documents=1, tokens=len(ids), bytes=size)
            done["documents"] += len(batch)
            bar.update(done["train"]["tokens"] - bar.n)
            if done["train"]["tokens"] >= limit:
                break
            if time.monotonic() > saved + SAVE_SECONDS:
                save(part / "progress.json", done, files.values())
                saved = time.monotonic()
        else:
            done["complete"] = True
        for split in SPLITS:
            if done[split]["tokens"] < 2:
                raise InputError(f"{name}: no text for {split}; it takes two documents, or one of many lines")
        done.update(eot=tokenizer.eot, vocab_size=tokenizer.vocab_size)
        save(part / "meta.json", done, files.values())
    (part / "progress.json").unlink(missing_ok=True)


def restart(part, wanted):
    """What a killed build of the same corpus has done; otherwise nothing, and a new folder."""
    done = {}
    with contextlib.suppress(OSError, ValueError):
        done = json.loads((part / "progress.json").read_text())
    if not wanted.items() <= done.items():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        done = {**wanted, "documents": 0, "complete": False}
    return {**done, **{split: Counter(done.get(split, {})) for split in SPLITS}}


def save(path, numbers, files):
    """Write JSON that is there whole or not at all, and not before what it says about these files is true."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    with replaced(path) as temporary:
        temporary.write_text(json.dumps(numbers, indent=2))


def batched(documents, size=2**20):
    """Lists of documents, of about a megabyte each."""
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document[1])
        if length >= size:
            yield batch
            batch, length = [], 0
    yield batch


def tokenized(batches, tokenizer, workers):
    """(batch, ids of each of its documents), in order, so that `workers` changes nothing but the time. Few
    batches are read ahead, so memory is bounded. Threads do use all cores: tiktoken lets the others run."""
    def encode(batch):
        return [np.append(tokenizer.eot, tokenizer.encode_array(text)).astype(np.uint16) for _, text in batch]

    with ThreadPoolExecutor(workers) as pool:
        running = deque()
        for batch in batches:
            running.append((batch, pool.submit(encode, batch)))
            if len(running) > 2 * workers:
                batch, ids = running.popleft()
                yield batch, ids.result()
        yield from ((batch, ids.result()) for batch, ids in running)
