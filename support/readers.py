"""One file -> the texts in it.

  read_file      the texts of a file, by what its name ends in
  READERS        ending -> reader(path, column): .txt, .md, .jsonl, .json, .parquet
  open_bytes     a file's bytes, unpacked if it is .gz or .zst
  text_of        the text in a row of data

A reader yields strings as they are asked for, so memory stays bounded. Whatever is wrong with a file is one
InputError that names the file, the place in it, and what mends it.
"""
import codecs
import contextlib
import gzip
import io
import itertools
import json
import reprlib
import shlex
import zlib
from pathlib import Path

from support.cli import InputError

try:
    import zstandard
except ImportError:  # only .zst files need it
    zstandard = None

PACKED = (".gz", ".zst")
UNPACK_ERRORS = (OSError, EOFError, zlib.error) + ((zstandard.ZstdError,) if zstandard else ())
BLOCK = 2**22  # bytes of text that are read at a time
LONGEST_LINE = 2**16  # a block ends where a line does, unless the line is longer than this
LARGEST_JSON = 2**28  # bytes that are parsed at once; a small .gz can be unpacked to any size


def ending(path):
    """What a file's name ends in, without a packing: x.TXT -> ".txt", x.jsonl.gz -> ".jsonl"."""
    path = Path(str(path).lower())
    return Path(path.stem).suffix if path.suffix in PACKED else path.suffix


def read_file(path, column="text"):
    """The texts of one file. What has an ending of its own (.tex, .py, none) is read as plain text."""
    kind = ending(path)
    if kind in (".csv", ".tsv"):
        raise InputError(f"{path} is a table: write its column of texts as .jsonl or .parquet")
    if kind == ".parquet" and Path(path).suffix.lower() in PACKED:
        raise InputError(f"{path}: unpack it first; a parquet file is compressed already")
    return READERS.get(kind, read_txt)(path, column)


# --- Plain text -------------------------------------------------------------------------------------------

def read_txt(path, column=None):
    """A file is a document; one of more than 4 MB comes in blocks, of whole lines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # drops a byte order mark, keeps half a character
    with open_bytes(path) as file:
        for start, block in blocks(file):
            refuse_utf16(path, block[:4] if start == 0 else b"")
            if (nul := block.find(b"\0")) >= 0:
                raise InputError(f"{path} is no text: its byte {start + nul} is NUL" + mend(path, "UTF-16LE"))
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.object ends where the block does, and may start with what was kept of the last one.
                byte = start + len(block) - len(error.object) + error.start
                raise not_utf8(path, byte) from error
            if text:
                yield text


def blocks(file):
    """(where it starts, bytes) of each block of a file; the last one is empty."""
    start = 0
    while True:
        block = file.read(BLOCK) + file.readline(LONGEST_LINE)
        yield start, block
        if not block:
            return
        start += len(block)


def not_utf8(path, byte):
    return InputError(f"{path} is not UTF-8 text: see its byte {byte}" + mend(path, "WINDOWS-1252"))


def refuse_utf16(path, head):
    """UTF-16 and UTF-32 are known by the byte order mark that they start with."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        raise InputError(f"{path} is UTF-32, not UTF-8: its byte 0 starts a mark" + mend(path, "UTF-32"))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path} is UTF-16, not UTF-8: its byte 0 starts a mark" + mend(path, "UTF-16"))


def mend(path, encoding):
    """The command that makes UTF-8 of a file in another encoding."""
    path = Path(path)
    new = shlex.quote(str(path.with_name(f"{path.stem}-utf8{path.suffix}")))
    return f"; if it is {encoding}: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {new}"


# --- Packed files -----------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_bytes(path):
    """An open file of bytes; the packing of .gz and .zst is undone on the way."""
    try:
        with unpacking(path) as file:
            yield file
    except InputError:
        raise
    except UNPACK_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}") from error


def unpacking(path):
    suffix = Path(path).suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix != ".zst":
        return open(path, "rb")
    if not zstandard:
        raise InputError(f"{path} needs a package that is not here: pip install zstandard (or unzstd it)")
    reader = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True)
    return io.BufferedReader(reader)


# --- Rows of data -----------------------------------------------------------------------------------------

def read_jsonl(path, column):
    """A line is a JSON object; its `column` is a document."""
    start = 0
    with open_bytes(path) as lines:
        for number in itertools.count(1):
            where = f"{path}, line {number}"
            line = lines.readline(LARGEST_JSON + 1)
            check_size(line, where)
            if not line:
                return
            if number == 1:
                refuse_utf16(path, line[:4])
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield text_of(parse_json(line, path, where, start), column, where)
            start += len(line)


def read_json(path, column):
    """A list of JSON objects; the `column` of each is a document. It is read as a whole."""
    with open_bytes(path) as file:
        content = file.read(LARGEST_JSON + 1)
    check_size(content, path)
    refuse_utf16(path, content[:4])
    rows = parse_json(content.removeprefix(codecs.BOM_UTF8), path, path, 0)
    if not isinstance(rows, list):
        raise InputError(f"{path} is not a list of JSON objects; with one object a line, call it .jsonl")
    for number, row in enumerate(rows, 1):
        yield text_of(row, column, f"{path}, row {number}")


def check_size(content, where):
    """InputError for what takes several times its size of memory to be parsed."""
    if len(content) > LARGEST_JSON:
        raise InputError(f"{where} is JSON of more than {LARGEST_JSON // 2**20} MB in one piece: write it as "
                         ".jsonl, an object a line (jq -c '.[]' x.json > x.jsonl)")


def parse_json(content, path, where, start):
    """The value of JSON in UTF-8, which starts at byte `start` of the file `path`."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise not_utf8(path, start + error.start) from error
    except ValueError as error:
        hint = "; one object a line: call it .jsonl" if "Extra data" in str(error) and where == path else ""
        raise InputError(f"{where} is not JSON: {error}{hint}") from error
    except RecursionError as error:
        raise InputError(f"{where} is JSON nested too deeply to be read") from error


def read_parquet(path, column):
    """A row's `column` is a document."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"{path} needs a package that is not here: pip install pyarrow") from error
    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise no_column(path, column, names)
            # Few rows at a time: in a file of 2 kB a text of 100 MB can stand for each of 1,000 rows.
            rows = (batch.column(0).to_pylist() for batch in table.iter_batches(8, columns=[column]))
            for value in itertools.chain.from_iterable(rows):
                yield text_of({column: value}, column, path)
    except InputError:
        raise
    except Exception as error:  # damage shows as errors of a dozen kinds
        raise InputError(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:300]}") from error


def rows_of_parquet(path):
    """How many rows a file has: it says so at its end."""
    from pyarrow.parquet import read_metadata
    return read_metadata(path).num_rows


READERS = {".txt": read_txt, ".md": read_txt, ".jsonl": read_jsonl, ".json": read_json,
           ".parquet": read_parquet}


def text_of(row, column, where):
    """The text in a row; "" for a null."""
    if not isinstance(row, dict):
        raise InputError(f"{where} is no JSON object with {column!r} in it, but {reprlib.repr(row)}")
    if column not in row:
        raise no_column(where, column, row)
    if not isinstance(row[column], (str, type(None))):
        kind = type(row[column]).__name__
        raise InputError(f"{where}: {column!r} is {kind}, not text: see --text-column")
    return row[column] or ""


def no_column(where, column, names):
    there = reprlib.repr(list(names))
    return InputError(f"{where} has no column {column!r}, only {there}: see --text-column")
