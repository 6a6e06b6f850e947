"""What --data can name: documents, each of them to train on or held out.

  open_data      a name -> Source: its documents, and what identifies this version of them
  hold_out       the split of data that brings none
  stdlib_*       the Python standard library, whose split is the same on every machine
  find_files     the files in a folder; those that are called train, valid or test mean what they say
  read_hub       a data set of the Hub, streamed

What is inside of a file is support/readers.py's matter, and support/wikitext.py makes articles of WikiText.
"""
import contextlib
import hashlib
import itertools
import math
import operator
import os
import platform
import re
import sys
import sysconfig
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.cli import InputError, lookalike
from support.hub import hub_error
from support.readers import PACKED, READERS, ending, read_file, rows_of_parquet, text_of
from support.wikitext import wikitext_articles

HUB_DATA = {"openwebtext": "Skylion007/openwebtext", "pile": "EleutherAI/the_pile_deduplicated",
            "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
            "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1"}
DATA_CHOICES = (f"stdlib, {', '.join(HUB_DATA)}, a data set of the Hub as owner/name or owner/name:config, "
                "a file of text, or a folder of .txt, .md, .jsonl, .parquet")
FOLDER_KINDS = tuple(kind for kind in READERS if kind != ".json")  # in folders those are settings
LONGEST = 2**22  # a text of more characters is several documents


class Source(NamedTuple):
    """What a name of data stands for."""
    identity: dict  # changes when the data does; "files", which stands for their content, may be in it
    documents: Iterable  # pairs ("train" or "val", text) in a fixed order, read as they are taken
    name: str  # for people, and for the name of a folder
    size: Callable  # () -> Size, or None where nobody knows before all is read


class Size(NamedTuple):
    """How much there is to read. Text lies in .jsonl with more around it, so of that it is a little less."""
    amount: float
    unit: str  # "bytes" or "documents"


ENDLESS = Size(math.inf, "bytes")  # more than a run asks for


def open_data(data, text_column="text"):
    """What --data stands for, as a Source. Before its first document is taken, no file is opened."""
    if data == "stdlib":
        identity = {"data": data, "python": platform.python_version()}
        size = partial(size_of, [path for _, path in stdlib_modules()])
        return Source(identity, stdlib_split(), data, size)
    if data not in HUB_DATA and os.path.exists(data):
        return open_local(Path(data), text_column)
    if data not in HUB_DATA and os.path.lexists(data):
        raise InputError(f"{data} is a link to what is not there")

    # What is close to a file here, or called like one, is not looked for on the Hub for half a minute.
    guess = lookalike(data, ["stdlib", *HUB_DATA])
    misspelt = data not in HUB_DATA and (guess or ending(data) in READERS)
    name = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::(.+))?", HUB_DATA.get(data, data))
    if misspelt or not name:
        hint = f" (did you mean {guess}?)" if guess else ""
        raise InputError(f"no data {data}{hint}: there is {DATA_CHOICES}")
    identity = {"data": data, "text_column": text_column}
    size = ENDLESS if data in ("openwebtext", "pile") else None
    return Source(identity, read_hub(name[1], name[2], text_column), plain_name(data), lambda: size)


def plain_name(text):
    """A name that a file can have, with letters of any script: "owner/name:main" -> "owner-name-main"."""
    text = unicodedata.normalize("NFC", text)
    kept = [c if unicodedata.category(c)[0] in "LMN" or c in "._" else "-" for c in text]
    return re.sub("-+", "-", "".join(kept)).strip("-.")[-40:] or "data"


def say(message):
    """A line to the user, above a progress bar."""
    from tqdm import tqdm
    tqdm.write(f"note: {message}", file=sys.stderr)


# --- What is held out -------------------------------------------------------------------------------------

REMEMBERED = 2**18  # texts whose copies are recognised, in some 40 MB of memory


def hold_out(texts, one_in=200, longest=2**16):
    """Split texts: pairs (split, text), of which "val" has one character in `one_in`.

    The first text is held out, so there is always something, and from then on the next text whenever less
    than its share is. A copy goes where the text went, unless far too much is held out.
      hold_out(["one", "two", "six", "two"], one_in=3) -> val one, train two, train six, train two

    So that a long text is not more than its share, texts are decided on in pieces of at most `longest`
    characters; neighbours of one split stay together. Only a text longer than that can be in both.
    """
    held_out = 0  # characters
    fair_share = 0.0  # of the characters so far
    remembered = {}  # hash of a text -> the splits of its pieces

    for text in filter(None, texts):
        parts = list(pieces(text, longest))
        earlier = remembered.get(stable_hash(text), ())
        splits = []
        for number, piece in enumerate(parts):
            far_too_much = held_out > 2 * fair_share + longest
            if number < len(earlier) and not far_too_much:
                split = earlier[number]
            elif len(remembered) < REMEMBERED:
                split = "val" if held_out <= fair_share else "train"
            else:  # of so many texts the hash takes a fair share, and sends copies the same way
                split = "val" if stable_hash(piece) % one_in == 0 else "train"
            splits.append(split)
            held_out += len(piece) if split == "val" else 0
            fair_share += len(piece) / one_in

        if len(remembered) < REMEMBERED:
            remembered.setdefault(stable_hash(text), tuple(splits))
        for split, neighbours in itertools.groupby(zip(splits, parts, strict=True), operator.itemgetter(0)):
            yield split, "".join(piece for _, piece in neighbours)


def pieces(text, longest):
    """A text in pieces of at most `longest` characters: of whole lines, or else words, where it has any.

    pieces("one\\ntwo three\\n", 8) -> "one\\n", "two ", "three\\n"
    """
    start = 0
    while len(text) - start > longest:
        stop = start + longest
        cut = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start, stop) + 1 or stop
        yield text[start:cut]
        start = cut
    yield text[start:]


def stable_hash(text):
    """A number that is the same on every machine and in every run; hash(text) is not."""
    return zlib.crc32(text.encode("utf-8", "replace"))


# --- The standard library ---------------------------------------------------------------------------------

NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages",
              "dist-packages"}


def stdlib_modules():
    """(relative path, path) of each module of the Python standard library, sorted by relative path."""
    root = Path(sysconfig.get_path("stdlib"))  # the base interpreter's, in a virtual environment too
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")):
        skipped = NOT_STDLIB & set(name.split("/")) or name.startswith(("config-", "_sysconfigdata"))
        if not skipped and path.is_file():
            yield name, path


def stdlib_documents():
    """(relative path, text) of each of these modules: about 10 MB."""
    for name, path in stdlib_modules():
        with contextlib.suppress(UnicodeDecodeError):  # an old module may have another encoding
            yield name, path.read_text(encoding="utf-8")


def stdlib_held_out(name):
    """Whether a module (its relative path) is validation: the same one in 20 on every machine."""
    return stable_hash(name) % 20 == 0


def stdlib_split():
    """The held-out modules come first, so that they are all there however few tokens are asked for."""
    for name, text in sorted(stdlib_documents(), key=lambda document: not stdlib_held_out(document[0])):
        yield ("val" if stdlib_held_out(name) else "train"), text


# --- Files and folders ------------------------------------------------------------------------------------

SPLIT_NAMES = {"train": "train", "training": "train", "valid": "val", "validation": "val", "val": "val",
               "dev": "val", "test": "test", "testing": "test"}


@dataclass
class Files:
    """The files at a path: to train on, to hold out; `left_out` counts the others, by kind."""
    train: list = field(default_factory=list)
    val: list = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


def open_local(path, text_column):
    """A file or a folder as a Source."""
    try:
        files = find_files(path) if path.is_dir() else Files(train=[path])
        stats = [(str(file.resolve()), file.stat()) for file in files.train + files.val]
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror}") from error
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{path} is neither a file nor a folder")

    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    digest = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
    identity = {"data": str(path.resolve()), "text_column": text_column, "files": digest}
    documents = local_documents(path, files, text_column, sum(stat.st_size for _, stat in stats))
    size = partial(size_of, files.train + files.val)
    return Source(identity, documents, plain_name(path.resolve().name), size)


def size_of(files):
    """The Size of files: of .parquet their rows, of what is not packed its bytes."""
    kinds = {file.suffix.lower() for file in files}
    with contextlib.suppress(Exception):  # what is wrong with a file is said when it is read
        if kinds == {".parquet"}:
            return Size(sum(map(rows_of_parquet, files)), "documents")
        if kinds.isdisjoint((*PACKED, ".parquet")):
            return Size(sum(file.stat().st_size for file in files), "bytes")
    return None


def local_documents(path, files, text_column, size):
    """Pairs (split, text) of these files, of about `size` bytes."""
    if path.is_dir():
        say(f"{path}: {describe(files)}")
    train = texts_of(files.train, text_column)
    if files.val:  # all of it first, however few tokens are asked for
        yield from (("val", text) for text in texts_of(files.val, text_column))
        yield from (("train", text) for text in train)
    else:
        # Of a small corpus 64k characters would be more than its share; below 512 a piece says little.
        longest = min(max(size // 40, 512), 2**16)
        yield from hold_out(train, one_in=20, longest=longest)


def texts_of(files, text_column):
    """The texts in files, none of them too long to be handled as one document."""
    for file in files:
        for text in read_file(file, text_column):
            yield from filter(None, pieces(text, LONGEST))


def find_files(root):
    """What can be read in a folder and below it, in a fixed order.

    As soon as a file or a folder is called train, only what is called by the name of a split is read.
    """
    files, unnamed = Files(), []
    for file in walk(root, files.left_out):
        split = split_named(file.relative_to(root))
        if split == "test":
            files.left_out["called test"] += 1
        else:
            {"train": files.train, "val": files.val, None: unnamed}[split].append(file)
    if files.train:
        files.left_out["of no split"] += len(unnamed)
    else:
        files.train = unnamed
    if not files.train:
        raise InputError(f"{root}: no {', '.join(FOLDER_KINDS)} file to train on there{leavings(files)}")
    return files


def walk(root, left_out):
    """The files below a folder that can be read, sorted.

    Hidden ones are not: a Mac's ._a.txt is no text, and .ipynb_checkpoints holds old copies.
    """
    found, visited = [], set()

    def refuse(error):
        raise error

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        if os.path.realpath(folder) in visited:  # links can go round in circles
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        left_out["hidden"] += sum(name.startswith(".") for name in folders + names)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]

    for file in sorted(found):
        packed_parquet = file.suffix.lower() in PACKED and ending(file) == ".parquet"
        if not file.is_file():
            left_out["broken links" if file.is_symlink() else "no regular files"] += 1
        elif ending(file) not in FOLDER_KINDS or packed_parquet:
            left_out[file.suffix.lower() or "without an ending"] += 1
        else:
            yield file


def split_named(relative):
    """The split that the name of a file, or of a folder on the way to it, says; the nearest counts.

    "valid.txt" -> "val", "train/a.txt" -> "train", "test-00000-of-00002.parquet" -> "test", "training.md" ->
    "train", "latest.txt" -> None, "test-drive.txt" -> None
    """
    for part in reversed(relative.parts):
        name = re.fullmatch(r"([a-z]+)([-_.]?\d.*|\..*)?", part.lower())
        if name and name[1] in SPLIT_NAMES:
            return SPLIT_NAMES[name[1]]
    return None


def describe(files):
    """Files in words: "3 files (2 .txt, 1 .md); left out: 1 .py"."""
    kinds = Counter(ending(file) for file in files.train + files.val)
    n = sum(kinds.values())
    words = f"{n:,} file{'s' * (n != 1)} ({listed(kinds)})"
    if files.val:
        words += f", by their names {len(files.train):,} to train on and {len(files.val):,} held out"
    return words + leavings(files)


def leavings(files):
    left_out = +files.left_out  # without zeros
    return f"; left out: {listed(left_out)}" if left_out else ""


def listed(counts):
    most = [f"{n:,} {kind}" for kind, n in counts.most_common(8)]
    rest = sum(counts.values()) - sum(n for _, n in counts.most_common(8))
    return ", ".join(most + [f"{rest:,} others"] * (rest > 0))


# --- The Hub ----------------------------------------------------------------------------------------------

ENOUGH = 10_000  # documents of a validation split to measure with


def read_hub(repo, config, column):
    """A data set of the Hub, streamed: no more of it is downloaded than is taken."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"{repo} needs a package that is not here: pip install datasets") from error
    try:
        try:
            splits = load_dataset(repo, config, streaming=True)
        except RuntimeError:  # a repository with a loading script, which datasets >= 4 does not run
            splits = load_dataset(repo, config, streaming=True, revision="refs/convert/parquet")
        yield from hub_documents(repo, splits, column)
    except InputError:
        raise
    except Exception as error:
        raise hub_error(repo, error) from error


def hub_documents(repo, splits, column):
    """Pairs (split, text) of a data set's splits (name -> rows)."""
    if "train" not in splits:
        raise InputError(f"{repo} has no train split, only {', '.join(splits)}")

    def texts(split):
        rows = (text_of(row, column, repo) for row in splits[split])
        articles = wikitext_articles(rows) if repo == "Salesforce/wikitext" else rows
        return filter(None, articles)

    held_out = next((name for name in splits if SPLIT_NAMES.get(name) == "val"), None)
    if held_out is None:
        yield from hold_out(texts("train"))
        return
    say(f"{repo}: its split {held_out} is held out, the first {ENOUGH:,} documents of it at most")
    yield from (("val", text) for text in itertools.islice(texts(held_out), ENOUGH))
    yield from (("train", text) for text in texts("train"))
