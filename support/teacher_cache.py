"""What a teacher says of a corpus, kept on disk: it answers once, then any number of students learn from it.

  wanted_header   what makes a cache the one that a run needs
  make            has the cache that is wanted, made by all ranks together if it is not there
  Build           a cache that is being made, which survives a kill
  answers_to      the teacher's answers to a few examples: a forward pass, and K draws for each token
  TeacherCache    reads them back, as the Draws of support/sparse_loss.py

A cache is a folder with two files. header.json says what it is. answers.bin has a row for each target of each
example of the corpus, in their order: K ids of 16 bits, the entropy of the teacher's distribution at T, and
the teacher's own loss at T = 1, each 32 bits. So it depends on no seed, batch size or number of steps.

It is made in the folder NAME.part, chunk by chunk; the bytes of done.bin say which chunks are good. At the
end the folder is renamed to NAME, so what is called NAME is whole. Draws of an example follow from its
number, so after a kill, and with any number of ranks, the bytes are the same.
"""
import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from support.cli import InputError
from support.corpus import is_count, locked, read_object
from support.files import replaced
from support.progress import Progress
from support.runtime import autocast, to_device
from support.sparse_loss import Draws, draw_tokens

VERSION = 1
CHUNK_TOKENS = 2**13  # whose answers are computed at a time
SAVE_SECONDS = 5  # how much work a kill can cost
KEPT = "what the teacher has answered is kept, and the same command goes on"
ANEW = "Delete it, and the same command makes it anew"
HEAD_TOKENS = 2**24  # of a corpus that are compared; no run reads fewer where there are as many

# What must be the same for a cache to fit, and what that is called in a message.
COMPARED = {
    "version": "version of the format", "weights": "teacher", "corpus": "text to train on",
    "packing": "--packing", "seq_len": "--seq-len", "temperature": "--temperature", "draws": "--cache-draws",
    "vocab_size": "vocabulary", "precision": "--precision"}


# ------------------------------------------------------------------------------------ what a cache is
def wanted_header(args, teacher, corpus, vocab_size, offsets):
    """The header of the cache that a run needs. offsets: see TeacherCache."""
    return {
        "version": VERSION,
        "teacher": args.teacher,
        "weights": fingerprint(teacher),
        "data": args.data,
        "corpus": hashlib.sha256(corpus.train[:HEAD_TOKENS]).hexdigest()[:16],
        "packing": args.packing,
        "seq_len": args.seq_len,
        "temperature": args.temperature,
        "draws": args.cache_draws,
        "vocab_size": vocab_size,
        "precision": args.precision,
        "examples": len(offsets) - 1,
        "tokens": int(offsets[-1]),
    }


def fingerprint(network):
    """16 letters that another network would not have: of its configuration and its weights."""
    digest = hashlib.sha256(repr(network.config).encode())
    for name, parameter in network.named_parameters():
        content = parameter.detach().cpu().contiguous().view(torch.uint8)
        digest.update(name.encode())
        digest.update(content.numpy())
    return digest.hexdigest()[:16]


def row_type(header):
    """A row of answers.bin: 32 bytes for 12 draws."""
    letter = "<u2" if header["vocab_size"] <= 2**16 else "<u4"
    return np.dtype([("ids", letter, (header["draws"],)), ("entropy", "<f4"), ("clm", "<f4")])


def read_header(path):
    """The header of the cache in a folder, which fits its files. InputError if it is damaged, or no cache."""
    path = Path(path)
    if not (path / "header.json").is_file():
        raise InputError(f"{path} is no cache of a teacher: it has no header.json. Choose another "
                         "--teacher-cache")
    header = read_object(path / "header.json")
    counts = ("draws", "vocab_size", "examples", "tokens")
    sound = COMPARED.keys() <= header.keys() and all(
        is_count(header.get(name)) and header[name] > 0 for name in counts)
    answers = path / "answers.bin"
    if sound and header["version"] == VERSION:
        size = header["tokens"] * row_type(header).itemsize
        sound = answers.is_file() and answers.stat().st_size == size
    if not sound:
        raise InputError(f"{path} is damaged: its header.json does not fit its answers.bin. {ANEW}")
    return header


def refuse_other(path, header, wanted):
    """InputError if the cache at `path` is another than the one that is wanted, or too small."""
    names = [name for name in COMPARED if header[name] != wanted[name]]
    if "precision" in names and "weights" in names:
        names.remove("weights")  # which may be the same, but rounded in another way
    if names:
        differences = [f"{COMPARED[name]} {header[name]!s:.99} there, {wanted[name]!s:.99} here"
                       for name in names]
        made_of = f"of {header.get('teacher')!s:.99} on {header.get('data')!s:.99}"
        raise InputError(f"{path} is another cache, {made_of}: {'; '.join(differences)}. Choose another "
                         "--teacher-cache")
    if header["examples"] < wanted["examples"] or header["tokens"] < wanted["tokens"]:
        raise InputError(f"{path} has answers for {header['tokens']:,} tokens of this text, and this run "
                         f"reads {wanted['tokens']:,}: choose another --teacher-cache, or fewer --steps")


# ------------------------------------------------------------------------------------ making one
def make(path, wanted, answers_of, offsets, ranks, reads):
    """Have the cache that is wanted at `path`. answers_of: range of examples -> their rows; offsets: see
    TeacherCache; reads: how many tokens this run is going to read."""
    path = Path(path)
    size = wanted["tokens"] * row_type(wanted).itemsize
    about = f"{wanted['draws']} draws for each of {wanted['tokens']:,} tokens, {size / 1e6:,.0f} MB"
    try:
        if ranks.any(not is_there(path)):
            if ranks.is_first:
                print(f"cache      {path}/: {about}; the teacher answers first", flush=True)
                if reads < wanted["tokens"] / 2:
                    print(f"note       this run reads only {reads:,} of them; without --teacher-cache the "
                          "teacher\n           would answer for no more than that", flush=True)
            with locked(path) if ranks.is_first else contextlib.nullcontext():
                make_missing(path, wanted, answers_of, offsets, ranks)
        refuse_other(path, read_header(path), wanted)
        if ranks.is_first:
            print(f"cache      {path}/: {about}; it is there", flush=True)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}; {KEPT}") from error
    except SystemExit:  # Ctrl-C or SIGTERM
        if ranks.is_first and not is_there(path):
            print(KEPT, flush=True)
        raise


def is_there(path):
    """Whether something is at `path` that is no empty folder."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def make_missing(path, wanted, answers_of, offsets, ranks):
    """Build the cache, unless another process did while this one waited for its turn."""
    part = path.with_name(path.name + ".part")
    if ranks.is_first and not is_there(path):
        begin(part, wanted)
    if not ranks.any(not is_there(path)):  # asked together: nobody looks before the first has prepared it
        return

    with Build(part, wanted, offsets) as build:
        todo = np.flatnonzero(build.done == 0)
        ranks.wait()  # all have read what is done, before any of them changes it
        mine = [int(todo[i]) for i in ranks.share(len(todo))]
        line = Progress("answering ", len(mine), silent=not ranks.is_first)
        for i, chunk in enumerate(mine, 1):
            build.add(chunk, answers_of(build.examples(chunk)))
            line.advance(f"{i}/{len(mine)}", [])
        line.close()

    ranks.wait()  # all are done
    if ranks.is_first:
        (part / "done.bin").unlink()
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()
        part.rename(path)
    ranks.wait()


def begin(part, wanted):
    """The folder in which the cache grows: a new one, or that of a build which was killed."""
    size = wanted["tokens"] * row_type(wanted).itemsize
    n_chunks = math.ceil(wanted["examples"] / examples_of_chunk(wanted))
    if is_there(part) and (part / "header.json").exists():
        found = read_object(part / "header.json")
        changed = [name for name in (*COMPARED, "tokens") if found.get(name) != wanted[name]]
        if changed:
            raise InputError(f"{part} is an unfinished cache with other settings ({', '.join(changed)}): "
                             "delete it, or choose another --teacher-cache")

    # What is still to be written must have room. The files get their size at once, but not their space.
    done = np.fromfile(part / "done.bin", np.uint8) if (part / "done.bin").exists() else np.zeros(1)
    needed = round(size * (1 - done.mean()))
    folder = next(folder for folder in part.absolute().parents if folder.exists())
    there = shutil.disk_usage(folder).free
    if needed > there:
        raise InputError(f"{part} takes {needed / 1e6:,.0f} MB, and the disk has {there / 1e6:,.0f} MB: make "
                         "room, choose a --teacher-cache on another disk, or fewer --cache-draws")

    part.mkdir(parents=True, exist_ok=True)
    with replaced(part / "header.json") as file:
        file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    for name, length in (("answers.bin", size), ("done.bin", n_chunks)):
        with open(part / name, "ab") as file:
            file.truncate(length)


def examples_of_chunk(header):
    """How many examples are answered at a time. It follows from the header, so that no rounding of a product
    depends on the run that makes the cache."""
    return max(1, CHUNK_TOKENS // header["seq_len"])


class Build:
    """The files of a cache that is being made; each rank writes the rows of its own chunks."""

    def __init__(self, part, header, offsets):
        self.part = part
        self.header = header
        self.offsets = offsets
        self.done = np.fromfile(part / "done.bin", np.uint8)
        self.unsaved = []  # chunks whose rows are written, but perhaps not on the disk
        self.saved = time.monotonic()

    def __enter__(self):
        self.answers_file = open(self.part / "answers.bin", "r+b")
        self.done_file = open(self.part / "done.bin", "r+b")
        return self

    def __exit__(self, *error):
        with self.answers_file, self.done_file:
            self.save()

    def examples(self, chunk):
        """The numbers of the examples of a chunk."""
        size = examples_of_chunk(self.header)
        return range(chunk * size, min((chunk + 1) * size, self.header["examples"]))

    def add(self, chunk, rows):
        """Write the rows of a chunk's examples."""
        start = int(self.offsets[self.examples(chunk).start])
        self.answers_file.seek(start * rows.itemsize)
        self.answers_file.write(rows.tobytes())
        self.unsaved.append(chunk)
        if time.monotonic() > self.saved + SAVE_SECONDS:
            self.save()

    def save(self):
        """Note which chunks are done, and not before their rows are on the disk."""
        self.answers_file.flush()
        os.fsync(self.answers_file.fileno())
        for chunk in self.unsaved:
            self.done_file.seek(chunk)
            self.done_file.write(b"\1")
        self.done_file.flush()
        self.unsaved = []
        self.saved = time.monotonic()


@torch.no_grad()
def answers_to(teacher, ids, targets, numbers, args, header):
    """The rows of answers.bin for the examples with these numbers; ids, targets (B, L): what is in them."""
    device = teacher.head_weight.device
    counted = np.flatnonzero(targets.reshape(-1) != -100)
    rows = np.empty(len(counted), row_type(header))

    # Offsets of the draws: a number for each target, from a generator of each example's own.
    n_targets = (targets != -100).sum(1)
    random = [np.random.default_rng(i).random(n, np.float32) for i, n in zip(numbers, n_targets, strict=True)]
    offsets = to_device(1 - np.concatenate(random)[:, None], device)  # (n, 1), in (0, 1]

    with autocast(args, device):
        hidden = teacher.hidden(to_device(ids, device)).flatten(0, 1)  # (N, C)
        hidden = hidden[to_device(counted, device)]  # (n, C)
        targets = to_device(targets.reshape(-1)[counted], device)  # (n,)
        head = teacher.head_weight[:header["vocab_size"]]  # (V, C)

        few = 512 if device.type == "cuda" else max(1, 2**21 // len(head))  # rows of logits at a time
        for start in range(0, len(rows), few):
            part = slice(start, start + few)
            logits = F.linear(hidden[part], head).float()
            log_p = (logits / args.temperature).log_softmax(-1)
            p = log_p.exp()
            rows["ids"][part] = draw_tokens(p, offsets[part], header["draws"]).cpu()
            rows["entropy"][part] = -(p * log_p).sum(-1).cpu()
            rows["clm"][part] = F.cross_entropy(logits, targets[part], reduction="none").cpu()

    if not np.isfinite(rows["entropy"] + rows["clm"]).all():
        raise InputError(f"{args.teacher}, the teacher, answers with NaN or infinity: try "
                         "--precision fp32, or another teacher")
    return rows


# ------------------------------------------------------------------------------------ using one
class TeacherCache:
    """A finished cache. offsets: the row of the first target of each example, and the number of all rows."""

    def __init__(self, path, offsets):
        self.path = path
        self.header = read_header(path)
        self.offsets = offsets
        self.rows = np.memmap(Path(path, "answers.bin"), row_type(self.header), "r")

    def draws(self, numbers, device):
        """What the teacher said of these examples, one after the other: Draws of their n targets."""
        rows = np.concatenate([self.rows[self.offsets[i]:self.offsets[i + 1]] for i in numbers])
        ids = rows["ids"].astype(np.int64)  # (n, K)
        entropy = rows["entropy"].copy()
        clm = rows["clm"].copy()
        if ids.max() >= self.header["vocab_size"] or not np.isfinite(entropy + clm).all():
            raise InputError(f"{self.path} is damaged: its answers.bin has what no teacher says. {ANEW}")

        weights = torch.full((1, 1), 1 / ids.shape[1], device=device).expand(ids.shape)
        return Draws(to_device(ids, device), weights, to_device(entropy, device), to_device(clm, device))
