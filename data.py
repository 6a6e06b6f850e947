"""Text in, batches of token ids out.

Read in this order:
  1. Small things   InputError, run_cli, format_table, and fetch: a model's file, from a folder or the Hub
  2. Tokenizer      tokenizer.json -> tiktoken: one path for GPT-2, GPT-NeoX and our own
  3. Documents      open_data: what --data stands for, and which of its documents are held out; read_texts:
                    the same for evaluation
  4. prepare        documents -> train.bin and val.bin: uint16 ids, an end-of-text id before each document
  5. batch_at       batch number i of a run, as a function of its arguments

Shapes: B sequences in a batch, T tokens in a sequence. Byte-level BPE is from Radford et al. 2019 (GPT-2),
GPT-NeoX's form of it from Black et al. 2022 (arXiv 2204.06745).

    python data.py --data openwebtext --tokenizer gpt2 --max-tokens 1e9 --workers 8
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import unicodedata
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

EOT = "<|endoftext|>"


class InputError(ValueError):
    """The user's mistake: one line that names the thing and the fix."""


def run_cli(main):
    """Run a command: an InputError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def format_table(rows):
    """Rows (dicts with the same keys) as a Markdown table whose columns line up in a terminal, too."""
    def show(value):
        form = {int: ",", float: ".4f"}.get(type(value), "")
        return " ± ".join(map(show, value)) if isinstance(value, tuple) else format(value, form)

    cells = [list(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    width, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width, *("-" * (w - 1) + ":" for w in widths)])
    lines = (" | ".join([name.ljust(width), *map(str.rjust, row, widths)]) for name, *row in cells)
    return "\n".join(f"| {line} |" for line in lines)


HUB_ERRORS = {  # class of an error of the Hub's clients -> what it means here; the first that fits
    "GatedRepoError": "is gated: accept its terms on the Hub, then set HF_TOKEN",
    "RepositoryNotFoundError": "is neither a folder here nor a model on the Hub (or private: set HF_TOKEN)",
    "DatasetNotFoundError": "is neither a file here nor a data set on the Hub (or private: set HF_TOKEN)",
    "HFValidationError": "is no folder here, and no name that a model on the Hub could have",
    "RemoteEntryNotFoundError": "is not on the Hub",
    "LocalEntryNotFoundError": "is neither here nor in the Hub's cache, and the Hub cannot be reached; "
                               "plain `python distill.py` needs no Hub",
    "ConnectionError": "cannot be had, as the Hub cannot be reached; plain `python distill.py` needs no Hub"}


def hub_error(name, error):
    """The InputError for what the Hub's clients raised about `name`."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    known = next((meaning for cls, meaning in HUB_ERRORS.items() if cls in classes), None)
    return InputError(f"{name} {known or 'could not be read: ' + ' '.join(str(error).split())[:300]}")


def fetch(name_or_dir, filename, required=True):
    """Path of a model's file, in a folder or the Hub's cache; None if it is missing and not `required`."""
    if Path(name_or_dir).is_dir():
        path = Path(name_or_dir, filename)
        if required and not path.is_file():
            raise InputError(f"{name_or_dir} has no {filename}: not a complete model folder")
        return path if path.is_file() else None
    if re.match(r"[./~]|out(/|$)|.*/$", str(name_or_dir)):
        raise InputError(f"no folder {name_or_dir}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        return Path(hf_hub_download(str(name_or_dir), filename))
    except Exception as error:
        if not isinstance(error, EntryNotFoundError):
            raise hub_error(name_or_dir, error) from error
        if required:
            raise hub_error(f"{filename} of {name_or_dir}", error) from error
        return None


def weight_files(name_or_dir):
    """The files with the weights: safetensors before .bin, one file before shards."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if path := fetch(name_or_dir, whole, required=False):
            return [path]
        if index := fetch(name_or_dir, whole + ".index.json", required=False):
            try:
                shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise InputError(f"{index} is damaged ({error!r:.99}): delete and fetch it again") from error
            return [fetch(name_or_dir, shard) for shard in shards]
    return [fetch(name_or_dir, "model.safetensors")]  # says that there is none, or that the Hub is silent


def read_tensors(path):
    """Yield (name, tensor) of one checkpoint file, large ones first. It is mapped into memory, anew after
    each of them to free the pages that were read. No code in a pickle is run."""
    import torch
    from safetensors.torch import load_file
    mapped = path.suffix != ".bin" or zipfile.is_zipfile(path)  # a .bin from before 2020 is read as a whole
    unpickle = functools.partial(torch.load, path, map_location="cpu", weights_only=True, mmap=mapped)
    read = unpickle if path.suffix == ".bin" else functools.partial(load_file, path)
    try:
        tensors = read()
        for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
            yield name, tensors[name]
            if mapped and tensors[name].numel() > 2**20:
                tensors = read()
    except Exception as error:  # damage shows as errors of a dozen kinds
        raise InputError(f"{path} is damaged or no weights ({error!r:.99}): fetch it again") from error


@contextlib.contextmanager
def replaced(path):
    """The name of a temporary file that takes the place of `path` once it is complete and safely on disk."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({reason}); what was there is intact") from error


# --- 2. Tokenizer -----------------------------------------------------------------------------------------

# How GPT-2 cuts text into words before it merges bytes: no token crosses a cut. {S} is whitespace. The last
# two alternatives: a run of it without its last character, which leads the next word; a single one.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|(?:{S}(?!\S))++|\s"
MAX_RUN = 24 * 2**13  # tiktoken fails on a million of whitespace; divisible by the length of any token of it

NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that are in no UTF-8 text; GPT-NeoX has no tokens for them

READABLE = {  # what decides ids in a tokenizer.json, and the values that are implemented here
    "model.type": [None, "BPE"], "model.dropout": [None, 0], "model.ignore_merges": [None, False],
    "model.byte_fallback": [None, False], "model.continuing_subword_prefix": [None, ""],
    "model.end_of_word_suffix": [None, ""], "normalizer.type": [None, "NFC"],
    "pre_tokenizer.type": ["ByteLevel"], "pre_tokenizer.add_prefix_space": [False],
    "pre_tokenizer.use_regex": [None, True], "post_processor.type": [None, "ByteLevel"]}


def check_readable(spec, name):
    """InputError for a tokenizer.json that would not give the same ids here as in its own library."""
    for setting, values in READABLE.items():
        section, key = setting.split(".")
        if (value := (spec[section] or {}).get(key)) not in values:
            raise InputError(f"{name}: {setting} {value!r} is not implemented; {values} is")
    added, vocab = spec["added_tokens"], spec["model"]["vocab"]
    spaces = [token["content"] for token in added if not token["special"]]
    if odd := set(spaces) - {" " * n for n in range(2, len(spaces) + 2)}:
        raise InputError(f"{name}: added token {min(odd)!r} is not implemented; runs of 2, 3, ... spaces are")
    for token, flag in itertools.product(added, ("lstrip", "rstrip", "single_word")):
        if token.get(flag):
            raise InputError(f"{name}: {flag} of {token['content']!r} is not implemented")
    if EOT not in [token["content"] for token in added if token["special"]]:
        raise InputError(f"{name} has no special token {EOT}, which has to stand between documents")
    order = [vocab["".join(pair).replace(" ", "")] for pair in spec["model"]["merges"]]
    if order != sorted(order):
        raise InputError(f"{name}: ids in another order than the merges' are not implemented")
    if missing := {byte for byte, letter in byte_letters().items() if letter not in vocab} - NEVER:
        raise InputError(f"{name} has no token for the byte {min(missing)}, so it cannot encode every text")


def byte_letters():
    """GPT-2's letter for each byte, as vocabulary files hold no raw bytes: {33: '!', ..., 32: 'Ġ', ...}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """Byte-level BPE, from the bytes of a tokenizer.json. `eot`: id of <|endoftext|>; `vocab_size`: highest
    id + 1; `fingerprint`: equal for tokenizers that give equal ids, however their files are laid out."""

    def __init__(self, source, name="tokenizer.json"):
        import tiktoken
        self.source, spec = source, json.loads(source)
        check_readable(spec, name)
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
        byte_of, vocab = {letter: byte for byte, letter in byte_letters().items()}, spec["model"]["vocab"]
        words = {bytes(byte_of[c] for c in text): i for text, i in vocab.items() if text not in added}
        spaces = {text.encode(): i for text, i in added.items() if text not in self.special}
        pattern = WORDS.replace("{S}", r"\s")
        if spaces:  # GPT-NeoX: runs of 24..2 spaces, longest first, before all else; {S} starts no such run
            pattern = f" {{2,{len(spaces) + 1}}}|" + WORDS.replace("{S}", r"(?: (?! )|[^\S ])")
        self.bpe = tiktoken.Encoding(  # ranks are ids: merge order; without a special token it is slow
            name, pat_str=pattern, mergeable_ranks=words | spaces, special_tokens={EOT: added[EOT]})
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        self.nfc = spec["normalizer"] is not None
        self.bytes = {i: text for text, i in [*words.items(), *spaces.items()]}
        self.bytes |= {i: text.encode() for text, i in self.special.items()}
        self.eot, self.vocab_size = added[EOT], max(self.bytes) + 1
        decisive = [sorted((i, t.hex()) for i, t in self.bytes.items()), sorted(self.special), self.nfc]
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def encode(self, text, allow_special=False):
        """Ids of a text. "<|endoftext|>" in it is ordinary characters, or with `allow_special` the token."""
        ids = []
        for i, piece in enumerate(self.special_pattern.split(text) if allow_special else [text]):
            ids += [self.special[piece]] if i % 2 else self.encode_array(piece).tolist()
        return ids

    def encode_array(self, text):
        """Ids of a text, uint32, none of them special. Other Python threads run meanwhile."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        long_runs = re.finditer(r"\s+", text) if len(text) > MAX_RUN else ()
        cuts = [i for run in long_runs for i in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
        pieces = (text[start:end] for start, end in itertools.pairwise([0, *cuts, None]))
        return np.concatenate([self.bpe.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def decode_bytes(self, ids):
        """Bytes of some ids. An id that only pads a model's vocabulary has none."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Write what transformers' AutoTokenizer needs to give the same ids."""
        Path(folder, "tokenizer.json").write_bytes(self.source)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
                  "unk_token": EOT, "clean_up_tokenization_spaces": False}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(name_or_dir):
    """Tokenizer of a model, given its folder or its name on the Hub."""
    path = fetch(name_or_dir, "tokenizer.json")
    try:
        return Tokenizer(path.read_bytes(), f"{name_or_dir}/tokenizer.json")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no tokenizer.json of a byte-level BPE: {error!r}") from error


def train_tokenizer(texts, vocab_size, folder):
    """Train a tokenizer of GPT-2's form into folder/tokenizer.json. Needs the `tokenizers` library."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([EOT])  # after training, so that the ids before it are the merge order
    Path(folder).mkdir(parents=True, exist_ok=True)
    bpe.save(str(Path(folder, "tokenizer.json")))


# --- 3. Documents -----------------------------------------------------------------------------------------

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


def wikitext_articles(rows):
    """Rows of Salesforce/wikitext, a line each -> articles, byte for byte lm-evaluation-harness's pages."""
    article = []
    for row in rows:
        line = row.rstrip("\n") or " "  # the Hub's copy has emptied the blank lines
        if re.fullmatch(r" = (?!= ).*(?<! =) = ", line):  # " = Title = ", not " = = Section = = "
            if "".join(article).strip():
                yield "\n".join(article)
            article = []
        article.append(line)
    yield "\n".join([*article, ""])  # the file ends with a line break


def detokenize_wikitext(page):
    """WikiText is cut into words; the harness's rules, in its order, put them together again:
    ' = Oz = \\n It is " 1 @.@ 5 " km . \\n' -> ' = Oz =\\nIt is "1.5" km.\\n'"""
    for pattern, replacement in (
            ("s '", "s'"), ("/' [0-9]/", "/'[0-9]/"),  # the second is a slip of the harness's
            *((f" @[{c}]@ ", c) for c in "-,."), *((f" [{c}] ", f"{c} ") for c in ":;.!?,"),
            *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")),
            ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"),
            (" N ", " 1 "), (" 's", "'s")):
        page = re.sub(pattern, replacement, page)
    return page


WIKITEXT, LAMBADA = "Salesforce/wikitext:wikitext-2-raw-v1", "EleutherAI/lambada_openai:default"
TEST_SETS = {"wikitext-2": WIKITEXT, "wikitext-103": WIKITEXT, "lambada": LAMBADA}  # WikiText's two are equal
EACH_TEXT = ("pages", "lambada")  # protocols that score each text for itself; the others join them


def read_texts(data, protocol, column):
    """What --data names: a list of texts, or of one Corpus; of one text if the protocol wants them joined."""
    path = Path(data)
    if (path / "meta.json").is_file():
        return [Corpus(path)]
    if data == "stdlib":
        texts = [text for split, text in open_data(data)[1] if split == "val"]
    elif path.is_file():
        texts = list(READERS.get(path.suffix, READERS[".txt"])(path, column))
        texts = texts if path.suffix in (".jsonl", ".parquet") else ["".join(texts)]  # .txt comes in pieces
    else:
        from datasets import load_dataset
        try:
            texts = list(load_dataset(*data.split(":", 1), split="test")[column])
        except Exception as error:
            raise hub_error(data, error) from error
    if data == WIKITEXT and protocol == "pages":
        return list(wikitext_articles(texts))
    if data == WIKITEXT and protocol == "blocks":
        return ["".join(line or " \n" for line in texts)]  # wiki.test.raw; the Hub emptied its blank lines
    return texts if protocol in EACH_TEXT else ["\n\n".join(texts)]


# --- 4. prepare -------------------------------------------------------------------------------------------

SPLITS = ("train", "val")
SAVE_SECONDS = 5  # how much work a kill can cost


class Corpus:
    """`train`, `val`: memory-mapped uint16 ids, an end-of-text id before each document. `meta`: of what data
    and tokenizer; documents, tokens, bytes of text in each split; `complete` or stopped at a budget."""

    def __init__(self, path):
        self.path, self.meta = Path(path), json.loads(Path(path, "meta.json").read_text())
        self.train, self.val = (np.memmap(self.path / f"{split}.bin", np.uint16, "r") for split in SPLITS)


def prepare(data, tokenizer, folder="corpora", max_tokens=None, workers=1, text_column="text"):
    """The corpus of `data` in ids of `tokenizer`: all training tokens, or at least `max_tokens`.

    Made when there is none of this version of the data: in a folder *.part, which gets its name when all
    is written, so that what has the name is whole. What was killed half-way goes on where it was."""
    if tokenizer.vocab_size > 2**16:
        raise InputError(f"a vocabulary of {tokenizer.vocab_size} does not fit the 16-bit ids of a corpus")
    identity, documents = open_data(str(data), text_column)
    wanted = {"source": identity, "tokenizer": tokenizer.fingerprint}
    name = re.sub(r"[^A-Za-z0-9.]+", "-", str(data)).strip("-.")[-100:]
    path = Path(folder, f"{name}-{tokenizer.fingerprint[:8]}")
    if not fits(path, wanted, max_tokens):
        try:
            with locked(path):
                make(path, wanted, documents, tokenizer, max_tokens, workers)
        except OSError as error:
            size = f"{2 * max_tokens // 10**6:,} MB" if max_tokens else "about half the size of its text"
            hint = f"; it takes {size}. Make room and start again: it goes on where it stopped"
            hint = hint if error.errno == errno.ENOSPC else ""
            raise InputError(f"{error.filename or path}: {error.strerror}{hint}") from error
    return Corpus(path)


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


# --- 5. batch_at ------------------------------------------------------------------------------------------

def batch_at(tokens, seed, index, batch_size, context, packing="constant", eot=None):
    """Batch number `index` of a run: ids and targets (the ids that follow), (B, T) int64; -100 is no target.

    A pure function, so that a run resumes from one number. Each epoch takes each example once, in an order of
    its own. "constant": an example is a block of T tokens, wherever documents end; so each token is a target
    once. "padded": it is a document, cut after T targets or filled up with eot on the right. That needs no
    attention mask: in a causal model no token sees what is to its right, and the filling has no targets."""
    example, n = examples(tokens, context, packing, eot)
    ids, targets = np.full((batch_size, context), eot or 0), np.full((batch_size, context), -100)
    for row in range(batch_size):
        epoch, i = divmod(index * batch_size + row, n)
        found = example(permutation(seed, epoch, n)[i])
        ids[row, :len(found) - 1], targets[row, :len(found) - 1] = found[:-1], found[1:]
    return ids, targets


def examples(tokens, context, packing, eot):
    """(function: number of an example -> its at most T + 1 tokens, how many examples there are)."""
    if packing == "padded":
        starts, ends = document_spans(tokens, eot)
        return (lambda i: tokens[starts[i]:min(ends[i], starts[i] + context + 1)]), len(starts)
    n = (len(tokens) - 1) // context
    if n < 1:
        raise InputError(f"{len(tokens)} tokens make no block of {context} + 1; take a shorter --seq-len")
    return (lambda i: tokens[i * context:(i + 1) * context + 1]), n


@functools.lru_cache(maxsize=4)  # a batch can lie across two epochs
def permutation(seed, epoch, n):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


SPANS = {}  # id of an array -> (that array, so that its id stays taken; starts; ends)


def document_spans(tokens, eot):
    """Starts and ends of the documents that have any text, looked for once per array."""
    if id(tokens) not in SPANS:
        step = 2**24  # an array can be larger than memory
        found = [i + np.flatnonzero(tokens[i:i + step] == eot) for i in range(0, len(tokens), step)]
        starts = np.concatenate(found)
        ends = np.append(starts[1:], len(tokens))
        SPANS[id(tokens)] = tokens, starts[ends > starts + 1], ends[ends > starts + 1]
    return SPANS[id(tokens)][1:]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Prepare a corpus ahead of training.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="stdlib", help=DATA_CHOICES)
    parser.add_argument("--tokenizer", default="demo/teacher", help="a model, by folder or Hub name")
    parser.add_argument("--max-tokens", type=float, help="stop at so many, e.g. 1e9; without it, take all")
    parser.add_argument("--workers", type=int, default=1, help="cores that tokenize")
    parser.add_argument("--text-column", default="text", help="column that holds the text")
    parser.add_argument("--folder", default="corpora", help="where corpora are kept")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.workers < 1 or args.max_tokens is not None and args.max_tokens < 1:
        raise InputError("--workers and --max-tokens must be at least 1")
    corpus = prepare(args.data, load_tokenizer(args.tokenizer), args.folder,
                     args.max_tokens and int(args.max_tokens), args.workers, args.text_column)
    for split in SPLITS:
        n = corpus.meta[split]
        print(f"{split}: {n['documents']:,} documents, {n['tokens']:,} tokens, {n['bytes']:,} bytes")
    print(corpus.path)


if __name__ == "__main__":
    run_cli(main)
