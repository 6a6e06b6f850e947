"""What --data can name: documents, each of them to train on or held out.

  open_data      a name -> Source: its documents, and what identifies this version of them
  hold_out       the split of data that has none of its own
  stdlib_*       the Python standard library, whose split is the same on every machine
  open_local     a file or a folder; files called train, valid or test are used as such
  read_file      the texts in one file, by the ending of its name
  open_hub       a data set of the Hub, streamed

Texts are read as they are asked for, so memory stays bounded. wikitext.py cuts WikiText into articles.
"""
import codecs
import contextlib
import hashlib
import io
import itertools
import json
import operator
import os
import platform
import re
import reprlib
import sysconfig
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from support.cli import InputError, note, reading
from support.hub import asking_the_hub
from support.wikitext import wikitext_articles

HUB_DATA = {"openwebtext": "Skylion007/openwebtext", "pile": "EleutherAI/the_pile_deduplicated",
            "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
            "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1"}
HUB_NAME = r"([\w-][\w.-]*/[\w.-]+)(?:@([^:]+))?(?::(.+))?"  # owner/name@revision:config
DATA_CHOICES = (f"stdlib, {', '.join(HUB_DATA)}, a data set of the Hub (owner/name, owner/name:config or "
                "owner/name@revision:config), a file of text, or a folder of .txt, .md, .jsonl, .parquet or "
                "source files")


class Source(NamedTuple):
    """What a name of data stands for."""
    identity: dict  # changes when the data does; "files" in it stands for the content of local files
    documents: Iterable  # pairs ("train" or "val", text) in a fixed order, read as they are taken
    name: str  # for people, and for the name of a folder
    pinned: Callable = None  # of the Hub: (commit or None) -> this Source at that commit, or at the newest


def open_data(data, text_column="text"):
    """What --data stands for, as a Source. No file is opened before its first document is taken."""
    if data == "stdlib":
        return Source({"data": data, "python": platform.python_version()}, stdlib_split(), data)
    if data not in HUB_DATA and (os.path.isfile(data) or os.path.isdir(data)):
        return open_local(Path(data), text_column)

    repo = re.fullmatch(HUB_NAME, HUB_DATA.get(data, data))
    if not repo or ending(data) in (*ROWS, *TEXT):  # do not ask the Hub for the name of a file
        raise InputError(f"there is no file or folder {data}; --data takes {DATA_CHOICES}")
    return open_hub(data, *repo.groups(), text_column)


def plain_name(text):
    """A name that a file can have, in any script: "owner/name:main" -> "owner-name-main"."""
    text = unicodedata.normalize("NFC", text)
    kept = [c if unicodedata.category(c)[0] in "LMN" or c in "._" else "-" for c in text]
    return re.sub("-+", "-", "".join(kept)).strip("-.")[-40:] or "data"


# ------------------------------------------------------------------------------------ what is held out
REMEMBERED = 2**18  # texts whose copies are recognised, in about 40 MB of memory


def hold_out(texts, one_in=200, longest=2**16):
    """Split texts: pairs (split, text), where "val" gets one character in `one_in`.

    The first text is held out, so there is always something; later ones whenever less than the share is. A
    copy goes to the split of the earlier text, unless far too much is held out already.
      hold_out(["one", "two", "six", "two"], one_in=3) -> val one, train two, train six, train two

    A long text would be more than its share, so texts are split in pieces of at most `longest` characters;
    neighbours in one split are joined again. Only a text longer than that can be in both splits.
    """
    held_out = 0  # characters
    fair_share = 0.0  # of the characters so far
    remembered = {}  # hash of a text -> the splits of its pieces

    for text in filter(None, texts):
        parts = list(pieces(text, longest))
        earlier = remembered.get(stable_hash(text), ())
        is_full = len(remembered) >= REMEMBERED
        splits = []
        for number, piece in enumerate(parts):
            # When memory is full, the hash takes a fair share, and still sends copies the same way.
            is_due = stable_hash(piece) % one_in == 0 if is_full else held_out <= fair_share
            split = "val" if is_due else "train"
            if number < len(earlier) and held_out <= 2 * fair_share + longest:
                split = earlier[number]
            splits.append(split)
            held_out += len(piece) if split == "val" else 0
            fair_share += len(piece) / one_in

        if not is_full:
            remembered.setdefault(stable_hash(text), tuple(splits))
        for split, neighbours in itertools.groupby(zip(splits, parts, strict=True), operator.itemgetter(0)):
            yield split, "".join(piece for _, piece in neighbours)


def pieces(text, longest):
    """A text in pieces of at most `longest` characters: of whole lines or words, if it has any.

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


# ------------------------------------------------------------------------------------ the standard library
NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages",
              "dist-packages"}


def stdlib_documents():
    """(relative path, text) of each module of the Python standard library, sorted by path: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))  # in a virtual environment this is the base interpreter's
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")):
        skipped = NOT_STDLIB & set(name.split("/")) or name.startswith(("config-", "_sysconfigdata"))
        if not skipped and path.is_file():
            with contextlib.suppress(UnicodeDecodeError):  # an old module may have another encoding
                yield name, path.read_text(encoding="utf-8")


def stdlib_held_out(name):
    """Whether a module (its relative path) is validation: the same one in 20 on every machine."""
    return stable_hash(name) % 20 == 0


def stdlib_split():
    """The held-out modules come first, so that all of them are there even if few tokens are asked for."""
    for name, text in sorted(stdlib_documents(), key=lambda document: not stdlib_held_out(document[0])):
        yield ("val" if stdlib_held_out(name) else "train"), text


# ------------------------------------------------------------------------------------ files and folders
SPLIT_NAMES = {"train": "train", "training": "train", "valid": "val", "validation": "val", "val": "val",
               "dev": "val", "test": "test", "testing": "test"}
JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".ldjson")
ROWS = (*JSON_LINES, ".json", ".parquet")  # files whose rows have a column of text
SOURCES = tuple(".py .pyi .c .h .cc .cpp .hpp .cu .cs .java .kt .scala .swift .js .jsx .ts .tsx .go .rs .rb "
                ".php .pl .lua .r .jl .sh .sql .hs .tex .rst".split())
TEXT = (".txt", ".md", *SOURCES)
IN_FOLDERS = (*JSON_LINES, ".parquet", *TEXT)  # not .json: in folders those are settings
PACKED = {".gz": "gzip", ".zst": "zstd"}
LONGEST = 2**22  # characters; a longer text becomes several documents


def ending(path):
    """The ending of a file's name, packing aside: x.TXT -> ".txt", x.jsonl.gz -> ".jsonl"."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def open_local(path, text_column):
    """A file or a folder as a Source."""
    with reading(path, "text"):
        train, val, about = find_files(path) if path.is_dir() else ([path], [], "")
        stats = [(str(file.resolve()), file.stat()) for file in train + val]

    # The resolved path, so that the same data spelt in another way is the same data.
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    identity = {"data": str(path.resolve()), "text_column": text_column,
                "files": hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]}
    size = sum(stat.st_size for _, stat in stats)
    documents = local_documents(train, val, about, text_column, size)
    return Source(identity, documents, plain_name(path.resolve().name))


def local_documents(train, val, about, text_column, size):
    """Pairs (split, text) of these files, which have `size` bytes."""
    def texts_of(files):
        for file in files:
            for text in read_file(file, text_column):
                yield from filter(None, pieces(text, LONGEST))

    if about:
        note(about)
    if val:  # all of it first, even if few tokens are asked for
        yield from (("val", text) for text in texts_of(val))
        yield from (("train", text) for text in texts_of(train))
    else:
        # In a small corpus 64k characters are more than the share; below 512 a piece says little.
        yield from hold_out(texts_of(train), one_in=20, longest=min(max(size // 40, 512), 2**16))


def find_files(root):
    """The readable files in a folder, to train on and to hold out, and a line that tells the user of them.

    Names of splits count if every file has one: a single training.md must not leave out 40 other files. A
    README, a licence, and code beside text are about the data, not part of it.
    """
    found = []
    left_out = Counter()
    for path in walk(root, set()):
        kind = "hidden" if path.name.startswith(".") else ending(path) or "without an ending"
        if kind in IN_FOLDERS and path.is_file():
            found.append(path)
        else:
            left_out[kind] += 1
    named = {file: split for file in found if (split := split_named(file.relative_to(root)))}
    train, val = ([file for file in named if named[file] == split] for split in ("train", "val"))

    code = () if any(ending(file) in SOURCES for file in named) else SOURCES
    others = [file for file in found if file not in named and ending(file) not in code
              and not re.match(r"(readme|licen[sc]e)\b", file.name.lower())]
    if train and not others:
        left_out["not named train or valid"] = len(found) - len(train + val)
        about = f"by their names {len(train):,} to train on and {len(val):,} held out"
    else:
        train, val = found, []
        about = f"{len(named):,} named train, valid or test is read like the others" if named else ""

    skipped = f"left out: {listed(left_out) or 'nothing'}"
    if not train:
        raise InputError(f"{root} has no .txt, .md, .jsonl, .parquet or source file to train on; {skipped}")
    notes = [listed(Counter(map(ending, train + val))), about, skipped]
    return train, val, f"{root}: {'; '.join(filter(None, notes))}"


def listed(counts):
    """The largest counts in words: "2 .txt, 1 .md"."""
    return ", ".join(f"{n:,} {kind}" for kind, n in (+counts).most_common(8))


def split_named(relative):
    """The split that the name of a file, or of a folder on the way to it, says; the nearest one counts.

    "valid.txt" -> "val", "train/a.txt" -> "train", "test-00000-of-00002.parquet" -> "test", "training.md" ->
    "train", "latest.txt" -> None, "test-drive.txt" -> None
    """
    for part in reversed(relative.parts):
        name = re.fullmatch(r"([a-z]+)([-_.]?\d.*|\..*)?", part.lower())
        if name and name[1] in SPLIT_NAMES:
            return SPLIT_NAMES[name[1]]
    return None


def walk(folder, visited):
    """The files below a folder, sorted. Links are followed, but no folder is read twice: they can go round in
    circles. Hidden folders (.git, .ipynb_checkpoints) are not looked into."""
    visited.add(folder.resolve())
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_dir():
            yield path
        elif path.resolve() not in visited:
            yield from walk(path, visited)


# ------------------------------------------------------------------------------------ one file
BLOCK = 2**22  # bytes of text that are read at a time
LONGEST_LINE = 2**16  # a block ends with a line, unless the line is longer than this
NOT_TEXT = rb"PK\x03\x04|7z\xbc\xaf|\xfd7zXZ|BZh\d1AY|\x1f\x8b|\x28\xb5\x2f\xfd|PAR1|%PDF-"  # starts of files


def read_file(path, column="text"):
    """The texts of one file, as they are asked for. A file without a known ending is plain text.

    With the column "" every file but .parquet is plain text, JSON too.
    """
    kind = ending(path)
    if kind in (".csv", ".tsv"):
        raise InputError(f"{path} is a table: write its column of texts as .jsonl or .parquet")

    what = f"a {kind} file" if kind in ROWS else "UTF-8 text (iconv -f ENCODING -t UTF-8 FILE > NEW)"
    if kind == ".json":
        what = "a list of JSON objects (if it has one object per line, call it .jsonl)"
    with reading(path, what):
        if kind in ROWS and (column or kind == ".parquet"):
            for where, row in rows_of(path, kind, column):
                yield text_of(row, column, where)
        else:
            yield from plain_text(path, column)


@contextlib.contextmanager
def unpacked(path):
    """An open file of bytes; .gz and .zst are unpacked on the way. InputError if it is not text at all."""
    packing = PACKED.get(Path(path).suffix.lower())
    if packing is None:
        file = open(path, "rb")
    else:
        import pyarrow
        file = io.BufferedReader(pyarrow.input_stream(str(path), packing))
    with file:
        if re.match(NOT_TEXT, file.peek(300)):
            raise InputError(f"{path} is packed, a PDF or a parquet file: unpack it, extract its text, or "
                             "give its name the ending .gz, .zst or .parquet")
        yield file


def plain_text(path, column):
    """The text of a file in blocks of about 4 MB, of whole lines. JSON lines under another name are refused,
    unless no column is wanted."""
    with unpacked(path) as file:
        blocks = iter(lambda: file.read(BLOCK) + file.readline(LONGEST_LINE), b"")
        is_start = True
        try:
            for text in codecs.iterdecode(blocks, "utf-8-sig"):
                if "\0" in text:
                    raise ValueError("it has a NUL byte")
                if is_start and column and is_json_object(text.strip().partition("\n")[0]):
                    raise InputError(f"{path} starts with a JSON object: call it .jsonl to read the "
                                     f"{column!r} of each line, or add --text-column '' to read it as it is")
                is_start = False
                yield text
        except UnicodeDecodeError as error:
            raise ValueError(error.reason) from error  # its position counts from the start of a block


def is_json_object(line):
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def rows_of(path, kind, column):
    """(where it is, row) for each row of a file of one of the kinds ROWS."""
    if kind == ".parquet":
        from pyarrow.parquet import ParquetFile
        with ParquetFile(path) as table:
            text_of(dict.fromkeys(table.schema_arrow.names), column, path)  # whether there is such a column
            # Take few rows at a time: in a file of 2 kB each of 1,000 rows can stand for one text of 100 MB.
            for batch in table.iter_batches(8, columns=[column]):
                yield from ((path, {column: value}) for value in batch.column(0).to_pylist())
        return

    with unpacked(path) as file:
        if kind == ".json":
            rows = json.loads(file.read().decode("utf-8-sig"))
            if not isinstance(rows, list):
                raise ValueError(f"it is a {type(rows).__name__}")
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
        else:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    if line.strip():
                        yield where, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where} is not JSON: {error}") from error


def text_of(row, column, where):
    """The text in a row; "" for a null."""
    if not isinstance(row, dict) or column not in row:
        there = reprlib.repr(list(row) if isinstance(row, dict) else row)
        raise InputError(f"{where} has no column {column!r}, only {there}: see --text-column")
    text = row[column]
    if not isinstance(text, (str, type(None))):
        raise InputError(f"{where}: {column!r} is {type(text).__name__}, not text: see --text-column")
    return text or ""


# ------------------------------------------------------------------------------------ the Hub
ENOUGH = 10_000  # documents of a validation split to measure with


def open_hub(data, repo, revision, config, text_column):
    """A data set of the Hub as a Source, streamed: no more of it is downloaded than is taken.

    Nothing is asked for before it is pinned, so a finished corpus needs no network.
    """
    identity = {"data": data, "text_column": text_column}

    def pinned(commit=None):
        """The Source at one commit, which its identity names: a build can go on with that one later."""
        with asking_the_hub(f"{repo}@{revision}" if revision else repo):
            from datasets import load_dataset_builder
            try:
                builder = load_dataset_builder(repo, config, revision=commit or revision)
            except RuntimeError:  # a repository with a loading script, which datasets >= 4 does not run
                builder = load_dataset_builder(repo, config, revision="refs/convert/parquet")
            splits = builder.as_streaming_dataset()
        known = {**identity, "revision": builder.hash}
        return Source(known, hub_documents(repo, splits, text_column), plain_name(data))

    return Source(identity, None, plain_name(data), pinned)


def hub_documents(repo, splits, column):
    """Pairs (split, text) of a data set's splits (name -> rows)."""
    if "train" not in splits:
        raise InputError(f"{repo} has no train split, only {', '.join(splits)}")

    def texts(split):
        rows = (text_of(row, column, repo) for row in splits[split])
        articles = wikitext_articles(rows) if repo == "Salesforce/wikitext" else rows
        return filter(None, articles)

    with asking_the_hub(repo):
        held_out = next((name for name in splits if SPLIT_NAMES.get(name) == "val"), None)
        if held_out is None:
            yield from hold_out(texts("train"))
            return
        note(f"{repo}: its split {held_out} is held out, the first {ENOUGH:,} documents of it at most")
        yield from (("val", text) for text in itertools.islice(texts(held_out), ENOUGH))
        yield from (("train", text) for text in texts("train"))
