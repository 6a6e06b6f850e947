"""Text in, batches of token ids out.

Read in this order:
  1. Small things      InputError, run_cli, fetch: a file of a model, from a folder or from the Hub
  2. Tokenizer         tokenizer.json -> tiktoken: one path for GPT-2, GPT-NeoX and our own
  3. Where text is     open_data: the documents of --data, each held out for validation ("val") or not ("train")
  4. prepare           documents -> train.bin and val.bin: uint16 ids, an end-of-text id before each document
  5. batch_at          batch number i of a run, as a function of its arguments

Shapes: B sequences in a batch, T tokens in a sequence. No torch here: the processes that tokenise must start fast.
Byte-level BPE is from Radford et al. 2019 (GPT-2); GPT-NeoX's changes to it from Black et al. 2022, arXiv 2204.06745.

    python data.py --data openwebtext --tokenizer gpt2 --max-tokens 1e9 --workers 8
"""
import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import unicodedata
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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


HUB_ERRORS = {  # class of the Hub clients' error -> what it means for the user; the first that fits
    "GatedRepoError": "is gated: accept its terms on its Hub page and set HF_TOKEN",
    "RepositoryNotFoundError": "is no folder here and no repository on the Hub (a private one needs HF_TOKEN)",
    "DatasetNotFoundError": "is no data set on the Hub (a private or gated one needs HF_TOKEN)",
    "HFValidationError": "is no folder here and no name that the Hub could have",
    "OfflineModeIsEnabled": "is not in the Hub cache, and HF_HUB_OFFLINE is set; `python distill.py` needs no Hub",
    "LocalEntryNotFoundError": "is not in the Hub cache, and the Hub does not answer; `python distill.py` needs no Hub",
    "ConnectionError": "cannot be had: the Hub does not answer; `python distill.py` needs no Hub",
}


def hub_error(name, error):
    """InputError for whatever the Hub's clients raised: no network, no such repository, a broken download."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    meaning = next((text for cls, text in HUB_ERRORS.items() if cls in classes), None)
    return InputError(f"{name} {meaning or 'could not be read: ' + ' '.join(str(error).split())[:300]}")


def fetch(name_or_dir, filename, required=True):
    """Path of a model's file, from a folder or from the Hub (its cache); None if not there and not `required`."""
    if Path(name_or_dir).is_dir():
        path = Path(name_or_dir, filename)
        if required and not path.is_file():
            raise InputError(f"{name_or_dir} has no {filename}: it is not a complete model folder")
        return path if path.is_file() else None
    if re.match(r"[./~]|out\b|.*/$", str(name_or_dir)):
        raise InputError(f"no folder {name_or_dir}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        return Path(hf_hub_download(str(name_or_dir), filename))
    except EntryNotFoundError as error:  # not in the repository, or offline and not in the cache
        if not required:
            return None
        raise hub_error(f"{filename} of {name_or_dir}", error) from error
    except Exception as error:
        raise hub_error(name_or_dir, error) from error


# --- 2. Tokenizer ---------------------------------------------------------------------------------------------

# How GPT-2 cuts text into words before it merges bytes; no token crosses a cut. {S} is whitespace. The last two
# alternatives: a run of whitespace without its last character, which leads the next word; a single one.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|(?:{S}(?!\S))++|\s"
MAX_RUN = 24 * 2**13  # tiktoken panics on a million of whitespace; cut at a multiple of every token of spaces

READABLE = {  # the settings of a tokenizer.json that decide ids, and the values that this code implements
    "model.type": [None, "BPE"], "model.dropout": [None, 0], "model.ignore_merges": [None, False],
    "model.byte_fallback": [None, False], "model.continuing_subword_prefix": [None, ""],
    "model.end_of_word_suffix": [None, ""], "normalizer.type": [None, "NFC"], "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.add_prefix_space": [False], "pre_tokenizer.use_regex": [None, True]}


def byte_letters():
    """GPT-2's letter for each byte, since vocabulary files hold no raw bytes: {33: '!', ..., 32: 'Ġ', ...}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """Byte-level BPE from the bytes of a tokenizer.json; its id order is the merge order, as tiktoken's ranks are.

    `eot`: id of <|endoftext|>; `vocab_size`: highest id + 1; `fingerprint`: equal if all texts get equal ids."""

    def __init__(self, source, name="tokenizer.json"):
        import tiktoken
        self.source, spec = source, json.loads(source)
        check_readable(spec, name)
        added, vocab = {t["content"]: t for t in spec["added_tokens"]}, spec["model"]["vocab"]
        to_byte = {letter: byte for byte, letter in byte_letters().items()}
        words = {bytes(to_byte[c] for c in text): i for text, i in vocab.items() if text not in added}
        spaces = {text.encode(): t["id"] for text, t in added.items() if not t["special"]}
        # GPT-NeoX has tokens for 24..2 spaces, longest first, before anything else is cut: one more alternative
        # in front, with whitespace elsewhere (S) then meaning whitespace that starts no such run.
        words_re = WORDS.replace("{S}", r"\s") if not spaces else (
            f" {{2,{len(spaces) + 1}}}|" + WORDS.replace("{S}", r"(?: (?! )|[^\S ])"))
        self.bpe = tiktoken.Encoding(name, pat_str=words_re, mergeable_ranks=words | spaces, special_tokens={})
        self.special = {text: t["id"] for text, t in added.items() if t["special"]}
        self.special_re = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        self.bytes = {i: text for tokens in (words, spaces) for text, i in tokens.items()}
        self.bytes |= {i: text.encode() for text, i in self.special.items()}
        self.nfc = spec["normalizer"] is not None
        self.eot, self.vocab_size = self.special[EOT], max(self.bytes) + 1
        decisive = sorted((i, text.hex()) for i, text in self.bytes.items()), sorted(self.special.items()), self.nfc
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def encode(self, text, allow_special=False):
        """Ids of a text. "<|endoftext|>" in it is ordinary characters, or with `allow_special` the token."""
        ids = []
        for i, piece in enumerate(self.special_re.split(text) if allow_special else [text]):
            ids += [self.special[piece]] if i % 2 else self._encode_ordinary(piece)
        return ids

    def _encode_ordinary(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return sum(map(self.bpe.encode_ordinary, short_runs(text)), [])

    def decode_bytes(self, ids):
        """The bytes of some ids. Ids that only pad a model's vocabulary have none."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Write what transformers' AutoTokenizer needs to give the same ids."""
        Path(folder, "tokenizer.json").write_bytes(self.source)
        config = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=EOT, eos_token=EOT, unk_token=EOT,
                      clean_up_tokenization_spaces=False)
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_readable(spec, name):
    """InputError for a tokenizer.json that would get other ids here than from its own library."""
    for setting, values in READABLE.items():
        section, key = setting.split(".")
        if (value := (spec[section] or {}).get(key)) not in values:
            raise InputError(f"{name}: {setting} {value!r} is not implemented; GPT-2's and GPT-NeoX's forms are")
    spaces = [t["content"] for t in spec["added_tokens"] if not t["special"]]
    if odd := set(spaces) - {" " * n for n in range(2, len(spaces) + 2)}:
        raise InputError(f"{name}: added token {min(odd)!r} is not implemented; only runs of 2, 3, 4, ... spaces are")
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    order = [vocab["".join(pair).replace(" ", "")] for pair in merges]
    if order != sorted(order):
        raise InputError(f"{name}: its ids are not in merge order; such a vocabulary is not implemented")
    if EOT not in [t["content"] for t in spec["added_tokens"] if t["special"]]:
        raise InputError(f"{name} has no special token {EOT}, which must stand between documents")


def short_runs(text):
    """The text in pieces with no run of whitespace longer than MAX_RUN."""
    if len(text) <= MAX_RUN:
        return [text]
    cuts = [i for run in re.finditer(r"\s+", text) for i in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, None])]


def load_tokenizer(name_or_dir):
    """Tokenizer of a model, given its folder or its name on the Hub."""
    path = fetch(name_or_dir, "tokenizer.json")
    try:
        return Tokenizer(path.read_bytes(), f"{name_or_dir}/tokenizer.json")
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no tokenizer.json of a byte-level BPE: {error!r}") from error


def train_tokenizer(texts, vocab_size, folder):
    """Train a BPE of GPT-2's form; writes folder/tokenizer.json. Needs the `tokenizers` library."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([EOT])  # after training, so that the ids below it are the merge order
    Path(folder).mkdir(parents=True, exist_ok=True)
    bpe.save(str(Path(folder, "tokenizer.json")))


# --- 3. Where text is -----------------------------------------------------------------------------------------

HUB_DATA = {"openwebtext": "Skylion007/openwebtext", "pile": "EleutherAI/the_pile_deduplicated",
            "wikitext-103": "Salesforce/wikitext:wikitext-103-raw-v1",
            "wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1"}
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "encodings"}


def open_data(data, text_column="text"):
    """What `--data` stands for: (identity, documents). The identity changes when the data does; documents is a
    generator of (split, text) in a fixed order, split "train" or "val"; a text never comes in both."""
    if data == "stdlib":
        return {"data": data, "python": platform.python_version()}, split_stdlib()
    identity = {"data": data, "text_column": text_column}
    if Path(data).exists():
        files = local_files(Path(data))
        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity["files"] = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
        texts = itertools.chain.from_iterable(READERS[file.suffix](file, text_column) for file in files)
        return identity, hold_out(texts, one_in=20)
    if repo := re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)(?::(.+))?", HUB_DATA.get(data, data)):
        return identity, read_hub(repo[1], repo[2], text_column)
    raise InputError(f"no --data {data}: there is stdlib, {', '.join(HUB_DATA)}, any Hub data set as owner/name or "
                     "owner/name:config, or a file or folder of .txt, .jsonl, .parquet")


def hold_out(texts, one_in=200):
    """Validation for data that has none: by a hash of the text, so that its copies are held out too. Held out is
    what hashes like the first text, so there always is some; of a lone text, the last tenth of its lines."""
    texts = filter(None, texts)
    first, second = next(texts, ""), next(texts, "")
    if not second:
        cut = first.rfind("\n", 0, len(first) * 9 // 10) + 1
        yield from (("val", first[cut:]), ("train", first[:cut]))
        return
    held_out = text_hash(first) % one_in
    for text in itertools.chain([first, second], texts):
        yield ("val" if text_hash(text) % one_in == held_out else "train"), text


def text_hash(text):
    """The same number on every machine and in every run, unlike hash()."""
    return zlib.crc32(text.encode("utf-8", "replace"))


def stdlib_documents():
    """(relative path, text) of the modules of the Python standard library, sorted by path: about 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))  # the base interpreter's, in a virtual environment too
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")):
        if not NOT_STDLIB & set(name.split("/")) and not name.startswith(("config-", "_sysconfigdata")):
            with contextlib.suppress(UnicodeDecodeError):  # an old module may have another encoding
                yield name, path.read_text(encoding="utf-8")


def stdlib_split(module):
    """Side of a module, given its relative path: the same one in 20 is held out on every machine."""
    return "val" if text_hash(module) % 20 == 0 else "train"


def split_stdlib():
    """Held-out modules first: validation is complete then, however few tokens are asked for."""
    pairs = [(stdlib_split(name), text) for name, text in stdlib_documents()]
    yield from sorted(pairs, key=lambda pair: pair[0] == "train")


def local_files(path):
    """The files at `path` that we can read, in order."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if files := [file for file in files if file.suffix in READERS]:
        return files
    raise InputError(f"{path}: no {', '.join(READERS)} file there")


def read_txt(path, column=None):
    """A file is a document; a long one becomes several, of whole lines."""
    with open(path, "rb") as file:
        while block := file.read(2**22) + file.readline():
            try:
                yield block.decode("utf-8")
            except UnicodeDecodeError as error:
                where = file.tell() - len(block) + error.start
                raise InputError(f"{path} is not UTF-8 text: see its byte {where}") from error


def read_jsonl(path, column):
    """A line is a JSON object, its `column` a document."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error})") from error
            yield text_of(row, column, f"{path}, line {number}")


def read_parquet(path, column):
    """A row's `column` is a document."""
    import pyarrow.parquet
    try:
        table = pyarrow.parquet.ParquetFile(path)
        text_of(dict.fromkeys(table.schema_arrow.names), column, path)
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from (text_of(row, column, path) for row in batch.to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is no readable parquet file: {error}") from error


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet}


def text_of(row, column, where):
    """The text in a row; "" for a null."""
    if not isinstance(row, dict) or column not in row:
        raise InputError(f"{where}: no column {column!r} in {list(row)}; name the right one with --text-column")
    if not isinstance(row[column], (str, type(None))):
        raise InputError(f"{where}: column {column!r} is {type(row[column]).__name__}, not text; see --text-column")
    return row[column] or ""


def read_hub(repo, config, column):
    """A Hub data set, streamed: only what is read is downloaded. Validation: its own split, or held out."""
    from datasets import load_dataset
    try:
        try:
            splits = load_dataset(repo, config, streaming=True)
        except RuntimeError:  # still carries a loading script, which datasets >= 4 refuses: the Hub has a converted copy
            splits = load_dataset(repo, config, streaming=True, revision="refs/convert/parquet")
        if "train" not in splits:
            raise InputError(f"{repo} has no train split, only {', '.join(splits)}")
        texts = {split: (text_of(row, column, repo) for row in rows) for split, rows in splits.items()}
        if repo == "Salesforce/wikitext":
            texts = {split: wikitext_articles(lines) for split, lines in texts.items()}
        if "validation" not in texts:
            yield from hold_out(texts["train"])
        else:
            yield from (("val", text) for text in itertools.islice(texts["validation"], 10_000))  # some are huge
            yield from (("train", text) for text in texts["train"])
    except InputError:
        raise
    except Exception as error:
        raise hub_error(repo, error) from error


def wikitext_articles(rows):
    """Rows of Salesforce/wikitext (one line each) -> articles, byte for byte the pages of lm-evaluation-harness."""
    article = []
    for row in rows:
        line = row.rstrip("\n") or " "  # the Hub's copy has emptied the blank lines
        if re.fullmatch(r" = (?!= ).*(?<! =) = ", line):  # " = Title = ", not " = = Section = = "
            if "".join(article).strip():
                yield "\n".join(article)
            article = []
        article.append(line)
    yield "\n".join([*article, ""])  # the file ends with a line's end


# --- 4. prepare -----------------------------------------------------------------------------------------------

SPLITS = ("train", "val")
SAVE_SECONDS = 5  # of work that a kill can cost


class Corpus:
    """`train`, `val`: memory-mapped uint16 ids, an end-of-text id before each document; `meta`: where they come from
    and how many documents, tokens, and bytes of text each split has; `complete` if that is all of the source."""

    def __init__(self, path):
        self.path, self.meta = Path(path), json.loads(Path(path, "meta.json").read_text())
        self.train, self.val = (np.memmap(self.path / f"{split}.bin", np.uint16, "r") for split in SPLITS)


def prepare(data, tokenizer, folder="corpora", max_tokens=None, workers=1, text_column="text"):
    """The corpus of `data` in the ids of `tokenizer`, made when there is none that fits: of another version of the
    data, or with fewer than `max_tokens` training tokens although the data has more. It is built beside, in .part, and
    moved when complete: a folder without .part is always whole. Started again after a kill, it goes on in .part."""
    if tokenizer.vocab_size > 2**16:
        raise InputError(f"a vocabulary of {tokenizer.vocab_size} does not fit in the 16-bit ids of a corpus")
    source, documents = open_data(data, text_column)
    wanted = {"source": source, "tokenizer": tokenizer.fingerprint}
    name = re.sub(r"[^A-Za-z0-9.]+", "-", data).strip("-.")
    path = Path(folder, f"{name}-{tokenizer.fingerprint[:8]}")
    try:
        with locked(path):
            if not fits(path, wanted, max_tokens):
                build(Path(f"{path}.part"), wanted, documents, tokenizer, max_tokens, workers)
                shutil.rmtree(path, ignore_errors=True)
                os.rename(f"{path}.part", path)
    except OSError as error:
        need = f"{2 * max_tokens / 1e9:.1f} GB" if max_tokens else "2 bytes a token, about half the text's size"
        hint = f"; it takes {need}: free some space and start again, it goes on where it stopped"
        raise InputError(f"{path}: {error.strerror}{hint if error.errno == errno.ENOSPC else ''}") from error
    return Corpus(path)


@contextlib.contextmanager
def locked(path):
    """One process at a time prepares `path`. The others wait here, then find it made. The lock dies with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fits(path, wanted, max_tokens):
    """Whether the corpus at `path` is whole, and of this data and tokenizer, and large enough."""
    try:
        meta = json.loads((path / "meta.json").read_text())
        sizes = {split: (path / f"{split}.bin").stat().st_size for split in SPLITS}
    except (OSError, ValueError):
        return False
    enough = meta["complete"] or max_tokens and meta["train"]["tokens"] >= max_tokens
    return enough and wanted.items() <= meta.items() and all(sizes[s] == 2 * meta[s]["tokens"] for s in SPLITS)


def build(part, wanted, documents, tokenizer, max_tokens, workers):
    """Write train.bin and val.bin, then meta.json; every few seconds progress.json, from which a restart goes on."""
    from tqdm import tqdm
    done, limit = restart(part, wanted), max_tokens or sys.maxsize
    with open(part / "train.bin", "ab") as train, open(part / "val.bin", "ab") as val, tqdm(
            desc=f"tokenizing {wanted['source']['data']}", total=max_tokens, unit=" tokens", unit_scale=True) as bar:
        files, saved = {"train": train, "val": val}, time.monotonic()
        for split, file in files.items():
            file.truncate(2 * done[split]["tokens"])
        new = itertools.islice((pair for pair in documents if pair[1]), done["documents"], None)
        for batch, encoded in tokenized(batched(new), tokenizer, workers):
            for (split, text), ids in zip(batch, encoded):
                kept = ids[:limit - done["train"]["tokens"]] if split == "train" else ids
                files[split].write(kept)
                count(done[split], text if len(kept) == len(ids) else tokenizer.decode(kept[1:]), kept)
            done["documents"] += len(batch)
            bar.update(done["train"]["tokens"] - bar.n)
            if done["train"]["tokens"] >= limit:
                break
            if time.monotonic() - saved > SAVE_SECONDS:
                save(part / "progress.json", done, files.values())
                saved = time.monotonic()
        else:
            done["complete"] = True
        meta = {**done, "eot": tokenizer.eot, "vocab_size": tokenizer.vocab_size}
        save(part / "meta.json", meta, files.values())


def count(tally, text, ids):
    """Add a document to a split's numbers."""
    for key, amount in dict(documents=len(ids) > 0, tokens=len(ids), bytes=len(text.encode("utf-8", "replace"))).items():
        tally[key] += amount


def restart(part, wanted):
    """What an earlier, killed build of the same corpus has done; otherwise nothing, in a new folder."""
    with contextlib.suppress(OSError, ValueError):
        done = json.loads((part / "progress.json").read_text())
        if wanted.items() <= done.items():
            return done
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    return {**wanted, "documents": 0, "complete": False, **{s: dict(documents=0, tokens=0, bytes=0) for s in SPLITS}}


def save(path, obj, files):
    """Write JSON that is there whole or not at all, and only after the files that it speaks of."""
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    with open(f"{path}.tmp", "w") as file:
        json.dump(obj, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def batched(documents, size=2**20):
    """Lists of documents of about a megabyte in all: large enough to hide the cost of sending them to a process."""
    batch, volume = [], 0
    for document in documents:
        batch.append(document)
        volume += len(document[1])
        if volume >= size:
            yield batch
            batch, volume = [], 0
    yield batch


def tokenized(batches, tokenizer, workers):
    """Pairs (batch, ids of its documents), in order, so that the number of processes changes nothing but the time.
    Few batches are on their way at once, so that memory is bounded."""
    if workers == 1:
        yield from ((batch, encode_batch(batch, tokenizer)) for batch in batches)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the locks of other threads
    with ProcessPoolExecutor(workers, spawn, start_worker, [tokenizer.source]) as pool:
        running = deque()
        try:
            for batch in batches:
                running.append((batch, pool.submit(encode_batch, batch)))
                if len(running) > 2 * workers:
                    batch, ids = running.popleft()
                    yield batch, ids.result()
            yield from ((batch, ids.result()) for batch, ids in running)
        except BrokenProcessPool as error:
            raise InputError("a tokenizing process died, perhaps for lack of memory; start again with fewer --workers, "
                             "it goes on where it stopped") from error


def encode_batch(batch, tokenizer=None):
    """Ids of each document: end-of-text, then its text."""
    tokenizer = tokenizer or worker_tokenizer
    return [np.array([tokenizer.eot, *tokenizer.encode(text)], np.uint16) for _, text in batch]


def start_worker(source):
    """Make a process ready to tokenise: leave Ctrl-C to the parent, and do not outlive it."""
    global worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker_tokenizer = Tokenizer(source)


# --- 5. batch_at ----------------------------------------------------------------------------------------------

def batch_at(tokens, seed, index, batch_size, context, packing="constant", eot=None):
    """Batch number `index` of a run: ids (B, T) and targets (B, T), the ids that follow, int64; -100 where there is none.

    A pure function of its arguments: to resume a run, its step number is enough. Every epoch takes each example once,
    in another order. "constant": an example is a block of T tokens, whatever documents it cuts; each token is a target
    once an epoch. "padded": an example is a document, cut after T targets or filled up with eot on the right. Nothing
    needs to mask that padding in attention: in a causal model no earlier token sees it, and it has no target."""
    span, n = spans(tokens, context, packing, eot)
    ids = np.full((batch_size, context), eot or 0, np.int64)
    targets = np.full((batch_size, context), -100, np.int64)
    for row in range(batch_size):
        epoch, i = divmod(index * batch_size + row, n)
        example = tokens[slice(*span(permutation(seed, epoch, n)[i]))]
        ids[row, :len(example) - 1], targets[row, :len(example) - 1] = example[:-1], example[1:]
    return ids, targets


def spans(tokens, context, packing, eot):
    """(function: number of an example -> where its at most T + 1 tokens start and end, how many examples there are)."""
    if packing == "padded":
        starts = document_starts(tokens, eot)
        return (lambda i: (starts[i], min(starts[i + 1], starts[i] + context + 1))), len(starts) - 1
    n = (len(tokens) - 1) // context
    if n < 1:
        raise InputError(f"{len(tokens)} tokens make no block of {context} + 1; take a shorter --seq-len or more data")
    return (lambda i: (i * context, (i + 1) * context + 1)), n


@functools.lru_cache(maxsize=4)  # a batch may lie across two epochs
def permutation(seed, epoch, n):
    """The order of n examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


STARTS = {}  # id of an array -> (the array, which keeps its id taken, its documents' starts)


def document_starts(tokens, eot):
    """Positions of the end-of-text ids, found once for each array, and the array's length at the end."""
    if id(tokens) not in STARTS:
        step = 2**24
        found = [i + np.flatnonzero(tokens[i:i + step] == eot) for i in range(0, len(tokens), step)]
        STARTS[id(tokens)] = tokens, np.concatenate([*found, [len(tokens)]])
    return STARTS[id(tokens)][1]


def main():
    parser = argparse.ArgumentParser(description="Prepare a corpus ahead of training: text -> train.bin and val.bin.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", default="stdlib", help=f"stdlib, {', '.join(HUB_DATA)}, a Hub data set as owner/name "
                        "or owner/name:config, or a file or folder of .txt, .jsonl, .parquet")
    parser.add_argument("--tokenizer", default="demo/teacher", help="model folder or Hub name whose tokenizer to use")
    parser.add_argument("--max-tokens", type=float, help="stop after this many training tokens, e.g. 1e9 (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    parser.add_argument("--text-column", default="text", help="column or key that holds the text")
    parser.add_argument("--folder", default="corpora", help="where corpora are kept")
    args = parser.parse_args()
    corpus = prepare(args.data, load_tokenizer(args.tokenizer), args.folder, int(args.max_tokens or 0) or None,
                     args.workers, args.text_column)
    for split in SPLITS:
        print("{}: {documents:,} documents, {tokens:,} tokens, {bytes:,} bytes".format(split, **corpus.meta[split]))
    print(corpus.path)


if __name__ == "__main__":
    run_cli(main)
