"""What --data stands for: documents of the Hub, of files, of the Python standard library."""
import contextlib
import hashlib
import itertools
import json
import platform
import re
import sysconfig
import zlib
from pathlib import Path

from support.cli import InputError
from support.hub import hub_error
from support.wikitext import wikitext_articles

HUB_DATA = {"openwebtext": "Skylion007/openwebtext", "pile": "EleutherAI/the_pile_deduplicated",
            "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
            "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1"}
DATA_CHOICES = (f"stdlib, {', '.join(HUB_DATA)}, a data set of the Hub as owner/name or owner/name:config, "
                "or a file or folder of .txt, .jsonl, .parquet")
NOT_STDLIB = {"test", "tests", "idle_test", "idlelib", "lib2to3", "encodings", "site-packages",
              "dist-packages"}


def open_data(data, text_column="text"):
    """What --data stands for: (identity, documents). `identity`, a dict, changes when the data does.
    `documents`: pairs (split, text), split "train" or "val", in a fixed order, read as they are taken."""
    if data == "stdlib":
        return {"data": data, "python": platform.python_version()}, stdlib_split()
    identity = {"data": data, "text_column": text_column}
    if data not in HUB_DATA and Path(data).exists():
        files = local_files(Path(data))
        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity["files"] = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
        texts = itertools.chain.from_iterable(READERS[file.suffix](file, text_column) for file in files)
        return identity, hold_out(texts, one_in=20)
    if name := re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::(.+))?", HUB_DATA.get(data, data)):
        return identity, read_hub(name[1], name[2], text_column)
    raise InputError(f"no data {data}: there is {DATA_CHOICES}")


def hold_out(texts, one_in=200):
    """Split data that has no validation split, by a hash of the text, so that copies of a text stay together.
    Held out is what hashes like the first text, so never nothing. Of a lone text it is the last tenth."""
    texts = filter(None, texts)
    first, second = next(texts, ""), next(texts, "")
    if not second:
        cut = first.rfind("\n", 0, len(first) * 9 // 10) + 1  # where a line starts
        yield from [("val", first[cut:]), ("train", first[:cut])]
        return
    held_out = stable_hash(first) % one_in
    for text in itertools.chain([first, second], texts):
        yield ("val" if stable_hash(text) % one_in == held_out else "train"), text


def stable_hash(text):
    """A number that is the same on every machine and in every run; hash(text) is not."""
    return zlib.crc32(text.encode("utf-8", "replace"))


def stdlib_documents():
    """(relative path, text) of each module of the Python standard library, sorted by path: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))  # the base interpreter's, in a virtual environment too
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")):
        if not NOT_STDLIB & set(name.split("/")) and not name.startswith(("config-", "_sysconfigdata")):
            with contextlib.suppress(UnicodeDecodeError):  # an old module may have another encoding
                yield name, path.read_text(encoding="utf-8")


def stdlib_held_out(name):
    """Whether a module (its relative path) is validation: the same one in 20 on every machine."""
    return stable_hash(name) % 20 == 0


def stdlib_split():
    """The held-out modules come first, so that they are all there however few tokens are asked for."""
    for name, text in sorted(stdlib_documents(), key=lambda document: not stdlib_held_out(document[0])):
        yield ("val" if stdlib_held_out(name) else "train"), text


def local_files(path):
    """The files at `path` that can be read, in order."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if files := [file for file in files if file.suffix in READERS]:
        return files
    raise InputError(f"{path}: no {', '.join(READERS)} file there")


def read_txt(path, column):
    """A file is a document; a large one is several, of whole lines."""
    with open(path, "rb") as file:
        while block := file.read(2**22) + file.readline():
            try:
                yield block.decode("utf-8")
            except UnicodeDecodeError as error:
                where = file.tell() - len(block) + error.start
                raise InputError(f"{path} is not UTF-8 text: see its byte {where}") from error


def read_jsonl(path, column):
    """A line is a JSON object; its `column` is a document."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {column: None}
            except ValueError as error:
                raise InputError(f"{path}, line {number} is not JSON: {error}") from error
            yield text_of(row, column, f"{path}, line {number}")


def read_parquet(path, column):
    """A row's `column` is a document."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile
    try:
        table = ParquetFile(path)
        text_of(dict.fromkeys(table.schema_arrow.names), column, path)
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from (text_of(row, column, path) for row in batch.to_pylist())
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error}") from error


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def text_of(row, column, where):
    """The text in a row; "" for a null."""
    if not isinstance(row, dict) or column not in row:
        raise InputError(f"{where} has no column {column!r}, only {list(row)}: see --text-column")
    if not isinstance(row[column], (str, type(None))):
        raise InputError(f"{where}: {column!r} is {type(row[column]).__name__}, not text: see --text-column")
    return row[column] or ""


def read_hub(repo, config, column):
    """A data set of the Hub, streamed: no more of it is downloaded than is taken."""
    from datasets import load_dataset
    try:
        try:
            splits = load_dataset(repo, config, streaming=True)
        except RuntimeError:  # a repository with a loading script, which datasets >= 4 does not run
            splits = load_dataset(repo, config, streaming=True, revision="refs/convert/parquet")
        if "train" not in splits:
            raise InputError(f"{repo} has no train split, only {', '.join(splits)}")
        texts = {split: (text_of(row, column, repo) for row in rows) for split, rows in splits.items()}
        if repo == "Salesforce/wikitext":
            texts = {split: wikitext_articles(lines) for split, lines in texts.items()}
        if "validation" not in texts:
            yield from hold_out(texts["train"])
            return
        validation = itertools.islice(texts["validation"], 10_000)  # enough to measure with
        yield from (("val", text) for text in validation if text)
        yield from (("train", text) for text in texts["train"] if text)
    except InputError:
        raise
    except Exception as error:
        raise hub_error(repo, error) from error
