"""A teacher's answers to a corpus, kept on disk: it answers once, then any number of students learn from it.

  Draws          what is kept of the teacher's answer: K tokens drawn from its distribution, and two numbers
  draw_tokens    K draws from each distribution
  draws_loss     the loss if all that is left of the teacher are its draws
  wanted_header  the description of the cache that a run needs; `check_fit` compares it with one on disk
  make           builds the cache if it is missing, by all ranks together
  answers_to     the teacher's answers to a few examples: a forward pass and the draws
  TeacherCache   reads a finished cache

Why draws: with p = softmax(t / T), let p^ (p with a hat) be the share of each token among K draws. However
small K is, the mean of p^ over all possible draws is p. So whatever is linear in p may use p^ instead and is
right on average, which is all that gradient descent needs. The likeliest K tokens, which others keep, never
add up to p, however many steps are made: unlikely tokens are lost, and students of them become too sure of
themselves (Anshumann et al. 2025, Sparse Logit Sampling, arXiv 2503.16870).

A cache is a folder with two files. header.json describes it. answers.bin has a row for each target of each
example of the corpus, in their order: K ids of 16 bits (32 for large vocabularies), then the entropy of the
teacher's distribution at T and the teacher's own loss at T = 1, each of 32 bits. So a cache depends on no
seed, batch size or number of steps. It grows in the folder NAME.part, which is renamed to NAME at the end.
The draws of an example follow from its number, so after a kill, and with any number of ranks, the bytes are
the same.

Shapes: n counted tokens, K draws, V vocabulary; B sequences, L tokens of each, N = B * L, C width.
"""
import contextlib
import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from support.cli import InputError, open_bar, reading, say
from support.files import locked, replaced, sync
from support.ranks import autocast, to_device

VERSIONS = {"constant": 1, "padded": 2}  # since 2 the end of a padded document is a target, too
CHUNK_TOKENS = 2**13  # whose answers are computed at a time
HEAD_TOKENS = 2**24  # compare only these first tokens of a corpus
AGAIN = "Delete the folder, and the same command makes it again"

# The entries of header.json that must be equal for a cache to fit a run.
COMPARED = ("version", "weights", "corpus", "packing", "seq_len", "temperature", "draws", "vocab_size",
            "precision")


# ------------------------------------------------------------------------------------ the loss from draws
class Draws(NamedTuple):
    """A teacher's answers at temperature T: one row for each token of a micro-batch that has a target, in the
    order of the tokens, and no row for tokens whose target is -100."""
    ids: torch.Tensor  # (n, K) int64: the tokens drawn; a token may occur several times
    weights: torch.Tensor  # (n, K): what each of them counts; 1 / K for draws
    entropy: torch.Tensor  # (n,): of the teacher's whole distribution at T, in nats
    clm: torch.Tensor  # (n,): the teacher's own loss on the target, at T = 1


def draw_tokens(p, offsets, n_draws):
    """Distributions p (n, V), offsets (n, 1) uniform in (0, 1] -> ids (n, K) of K draws from each.

    Let the probabilities lie side by side and fill the line from 0 to 1. The points u / K, (1 + u) / K,
    (2 + u) / K, ... share one random offset u, and each draws the token on whose piece it lies. For p = 0.5,
    0.3, 0.2, K = 4 and u = 0.1 they are 0.025, 0.275, 0.525 and 0.775, which gives the ids 0, 0, 1, 1.

    A token is drawn K * p times on average, as if each point were drawn on its own. But its count is K * p
    rounded down or up and never further away, which avoids most of the noise of likely tokens (systematic
    sampling, Madow and Madow 1944).
    """
    ends = p.cumsum(-1)  # (n, V): where the pieces end; the last one not exactly at 1
    points = (torch.arange(n_draws, device=p.device) + offsets) / n_draws  # (n, K)
    return torch.searchsorted(ends, points * ends[:, -1:])  # the first piece that ends there or later


def draws_loss(student_logits, draws, targets, settings):
    """distill.plain_loss with Draws instead of the teacher's logits: (loss, kl, clm), sums over n tokens.

    student_logits (n, V), targets (n,): of the tokens that have a target, as support/chunked_loss.py passes
    them. With H the entropy of p, for one token

        KL(p || q) = sum p * log(p / q) = -H - sum p * log q

    H is known, and the last sum is linear in p, so p^ takes the place of p: it becomes the sum over the draws
    of w_k * log q[id_k], with weights w_k = 1 / K. The gradient T * (q - p^) is T * (q - p) on average, that
    of the whole distribution. The value is right on average, too; for a good student it can be below 0.
    """
    T = settings.temperature
    log_q = (student_logits / T).log_softmax(-1).gather(1, draws.ids)  # (n, K)
    kl = -draws.entropy.sum() - (draws.weights * log_q).sum()
    clm = F.cross_entropy(student_logits, targets, reduction="sum")
    return settings.kd_weight * T**2 * kl + settings.clm_weight * clm, kl, clm


draws_loss.formula = ("{kd_weight:g} * {temperature:g}² * KL(teacher || student, T = {temperature:g}, "
                      "{cache_draws} draws) + {clm_weight:g} * CLM")


# ------------------------------------------------------------------------------------ what a cache is
def wanted_header(args, teacher, corpus, vocab_size, offsets):
    """The header of the cache that a run needs. offsets: see TeacherCache."""
    return {
        "version": VERSIONS[args.packing],
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
    """16 characters that identify a network: its configuration and its weights."""
    digest = hashlib.sha256(repr(network.config).encode())
    for name, parameter in network.named_parameters():
        content = parameter.detach().cpu().contiguous().view(torch.uint8)
        digest.update(name.encode())
        digest.update(content.numpy())
    return digest.hexdigest()[:16]


def row_type(header):
    """A row of answers.bin: 32 bytes for 12 draws."""
    id_type = "<u2" if header["vocab_size"] <= 2**16 else "<u4"
    return np.dtype([("ids", id_type, (header["draws"],)), ("entropy", "<f4"), ("clm", "<f4")])


def read_header(path):
    """What the cache in the folder `path`, finished or not, says about itself."""
    path = Path(path, "header.json")
    if not path.is_file():
        raise InputError(f"{path.parent} is not a teacher's cache, as it has no header.json: choose a "
                         "different --teacher-cache")
    with reading(path, "the header of a teacher's cache"):
        header = json.loads(path.read_bytes())
        header["tokens"] = int(header["tokens"])
        header["bytes"] = header["tokens"] * row_type(header).itemsize  # of answers.bin
        return header


def check_fit(path, wanted):
    """The header of the cache at `path`. InputError if it is not the one that a run needs."""
    header = read_header(path)
    different = [f"{name} {header.get(name)!s:.99} there, {wanted[name]!s:.99} here"
                 for name in COMPARED if header.get(name) != wanted[name]]
    if different:
        raise InputError(f"{path} is another cache, of {header.get('teacher')!s:.99} on "
                         f"{header.get('data')!s:.99}: {'; '.join(different)}. Choose a different "
                         "--teacher-cache")
    if header["tokens"] < wanted["tokens"]:
        raise InputError(f"{path} has answers for {header['tokens']:,} tokens of this text, and this run "
                         f"reads {wanted['tokens']:,}: choose a different --teacher-cache, or fewer --steps")
    return header


# ------------------------------------------------------------------------------------ making one
def make(path, wanted, answers_of, offsets, ranks, reads):
    """Have the wanted cache at `path`: build it if it is missing, refuse one that does not fit.

    answers_of: range of examples -> their rows of answers.bin; offsets: see TeacherCache; reads: how many
    tokens this run is going to read.
    """
    path = Path(path)
    is_missing = ranks.any(not is_there(path))
    if ranks.is_first:
        size = wanted["tokens"] * row_type(wanted).itemsize
        say(f"cache      {path}/: {wanted['draws']} draws for each of {wanted['tokens']:,} tokens (this run "
            f"reads {reads:,}), {size / 1e6:,.0f} MB" + ("; the teacher answers first" if is_missing else ""))

    if is_missing:
        lock = locked(path.parent, f"the cache {path}", name=path.name, wait=True)
        try:
            with lock if ranks.is_first else contextlib.nullcontext():
                make_missing(path, wanted, answers_of, offsets, ranks)
        except OSError as error:
            raise InputError(f"{error.filename or path}: {error.strerror or error}. The answers so far are "
                             "kept, and the same command goes on") from error

    header = check_fit(path, wanted)
    found = (path / "answers.bin").stat().st_size
    if found != header["bytes"]:
        raise InputError(f"{path} is damaged: answers.bin has {found:,} bytes instead of "
                         f"{header['bytes']:,}. {AGAIN}")


def is_there(path):
    """Whether something is at `path`, besides a folder that is empty or has temporary files of a kill."""
    if path.is_dir():
        return any(not entry.name.startswith(".distil-") for entry in path.iterdir())
    return path.exists()


def make_missing(path, wanted, answers_of, offsets, ranks):
    """Build the cache, unless another process has done so while this one waited for the lock."""
    part = Path(f"{path}.part")
    if ranks.is_first and not is_there(path):
        begin(part, wanted)
    if not ranks.any(not is_there(path)):  # asked together, so no rank looks before the first has begun
        return

    build(part, wanted, answers_of, offsets, ranks)
    ranks.wait()  # all are done
    if ranks.is_first:
        (part / "done.bin").unlink()
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()  # an empty folder
        part.rename(path)
    ranks.wait()


def begin(part, wanted):
    """Prepare the folder in which the cache grows: a new one, or one that a killed build has left."""
    if is_there(part) and check_fit(part, wanted)["tokens"] != wanted["tokens"]:
        raise InputError(f"{part} is an unfinished cache of more text: delete it, or choose a different "
                         "--teacher-cache")
    with replaced(part / "header.json") as file:  # first, as it tells that the folder is ours
        file.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")

    size = wanted["tokens"] * row_type(wanted).itemsize
    n_chunks = math.ceil(wanted["examples"] / examples_of_chunk(wanted))
    for name, length in (("answers.bin", size), ("done.bin", n_chunks)):
        with open(part / name, "ab") as file:
            file.truncate(length)  # takes space on the disk only where it is written


def examples_of_chunk(header):
    """How many examples are answered at a time. It follows from the header alone, so that rounding in the
    teacher's products does not depend on the run that makes the cache."""
    return max(1, CHUNK_TOKENS // header["seq_len"])


def build(part, header, answers_of, offsets, ranks):
    """Write the rows that are missing in answers.bin; each rank takes chunks of its own. The byte of a chunk
    in done.bin becomes 1 when its rows are safe on disk."""
    todo = np.flatnonzero(np.fromfile(part / "done.bin", np.uint8) == 0)
    ranks.wait()  # all ranks have read what is done before one of them changes it
    mine = [int(todo[i]) for i in ranks.share(len(todo))]
    size = examples_of_chunk(header)

    with open(part / "answers.bin", "r+b") as answers, open(part / "done.bin", "r+b") as done:
        for chunk in open_bar(mine, "answering", unit=" chunks", disable=not ranks.is_first):
            examples = range(chunk * size, min((chunk + 1) * size, header["examples"]))
            rows = answers_of(examples)
            answers.seek(int(offsets[examples.start]) * rows.itemsize)
            answers.write(rows.tobytes())
            sync(answers)
            done.seek(chunk)
            done.write(b"\1")
            done.flush()


@torch.no_grad()
def answers_to(teacher, ids, targets, numbers, args, header):
    """The rows of answers.bin for the examples with these numbers; ids, targets (B, L): their content."""
    device = teacher.head_weight.device
    counted = np.flatnonzero(targets.reshape(-1) != -100)
    rows = np.empty(len(counted), row_type(header))

    # Offsets of the draws: a number for each target, from a generator that each example has for itself.
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
            logits = F.linear(hidden[part], head).float()  # (few, V)
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
        self.path = Path(path)
        self.header = read_header(self.path)
        self.offsets = offsets
        self.rows = np.memmap(self.path / "answers.bin", row_type(self.header), "r")

    def draws(self, numbers, device):
        """The teacher's answers to these examples, one after the other: Draws of their n targets."""
        rows = np.concatenate([self.rows[self.offsets[i]:self.offsets[i + 1]] for i in numbers])
        ids = rows["ids"].astype(np.int64)  # (n, K)
        entropy = rows["entropy"].copy()
        clm = rows["clm"].copy()
        if ids.max() >= self.header["vocab_size"] or not np.isfinite(entropy + clm).all():
            raise InputError(f"{self.path} is damaged: its answers.bin has values that no teacher gives. "
                             f"{AGAIN}")

        weights = torch.full((1, 1), 1 / ids.shape[1], device=device).expand(ids.shape)
        return Draws(to_device(ids, device), weights, to_device(entropy, device), to_device(clm, device))
