"""Every reader, on files that are damaged, odd or hostile: an InputError or a right result, and nothing else.

Read in this order:
  SUBJECTS                     what is damaged, and who reads it
  test_an_input_error_or_...   one input after the other; mutators.py damages them
  Watch                        what a reader does meanwhile: files, processes, time, memory

A right result: a model with finite logits, texts as Python's own libraries read them, the ids that Hugging
Face's tokenizers library gives, batches of ids within the vocabulary, a run that can go on. Never another
exception (tiktoken's panics are not even Exceptions), a dead process, NaN, a pickle's code run, a file of
another folder touched, a gigabyte of memory, or five seconds of work.

    MUTATIONS=20000 MUTATION_SEED=7 python -m pytest tests/test_mutations.py

Inputs follow from the seed, so a failure comes again. It names the inputs and leaves their files. If Python
itself dies, the last input is in the newest pytest-of-NAME/pytest-N of the temporary directory.
"""
import argparse
import functools
import gzip
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import sysconfig
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mutators
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from mutators import damage_bytes, damage_json, damage_pickle, damage_safetensors, damage_zip
from texts import make_texts

from data import Corpus, batch_at, prepare
from distill import make_optimizer, take_step
from model import GPT2, GPTNeoX, load
from sample import draw as draw_tokens
from support import options
from support.cli import InputError
from support.corpus import Build, corpus_path
from support.documents import open_data
from support.hub import read_tensors, weight_files
from support.log import COLUMNS as COLUMN_NAMES
from support.log import read_log
from support.readers import read_file
from support.run import first_not_finite
from support.runtime import Ranks
from support.state import RunFolder
from support.tokenizer import load_tokenizer

resource = pytest.importorskip("resource", reason="Windows does not say how much memory was used")

MUTATIONS = int(os.environ.get("MUTATIONS", 2000))
SEED = int(os.environ.get("MUTATION_SEED", 0))
SECONDS = 5  # the most that an input may take, of this process's work
MEGABYTES = 1024  # the most by which an input may raise the peak of memory


# --- Models -----------------------------------------------------------------------------------------------

def tiny(architecture):
    """A model with weights large enough to matter, and a vocabulary too small for any tokenizer."""
    torch.manual_seed(0)
    model = architecture(architecture.config(vocab_size=11, context=12, width=8, n_layer=2, n_head=2, eos=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def use_model(folder):
    """What sample.py does with a model, whose tensors are those that others read in its files."""
    model = load(folder)
    for path in weight_files(folder):
        expected = tensors_in(path)
        for name, tensor in read_tensors(path):
            same = expected is None or torch.equal(tensor, expected[name])
            assert same or tensor.isnan().any(), name  # of a mask; load has refused other NaN

    ids = torch.arange(min(5, model.context))[None] % model.config.vocab_size  # (1, L)
    model.generate(ids, 3, draw_tokens)

    with torch.no_grad():
        logits = model(ids)  # (1, L, V)
    assert logits.shape == (*ids.shape, model.config.vocab_size)
    draw_tokens(logits[0])  # InputError if they are not finite
    assert not logits.isnan().any() and not (logits == math.inf).any()


def tensors_in(path):
    """The tensors in a file that is read as a whole, not mapped; None where that finds a wrong checksum, or a
    dtype that safetensors reads in mapped files alone."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        return torch.load(path, weights_only=True)
    except (RuntimeError, KeyError):
        return None


def damage_config(draw, folder):
    return damage_file(draw, folder / "config.json", damage_json)


def damage_weights(draw, folder):
    """model.safetensors: its bytes, its header, or an odd tensor in it."""
    path = folder / "model.safetensors"
    if draw.random() < 0.6:
        return damage_file(draw, path, damage_safetensors)

    tensors = safetensors.torch.load(path.read_bytes())
    name = draw.choice(list(tensors))
    tensors[name] = mutators.odd_tensor(draw, tensors[name]).contiguous()
    if draw.random() < 0.3:
        odd_name = mutators.odd_name(draw, name).replace("\ud800", "\u2028")  # which UTF-8 cannot hold
        tensors[odd_name] = tensors.pop(name)
    path.write_bytes(safetensors.torch.save(tensors))
    return f"{name} = {tensors[name].dtype} {[*tensors[name].shape]}" if name in tensors else f"no {name}"


def damage_bin(draw, folder):
    """pytorch_model.bin in place of safetensors: its bytes, its parts, or odd objects in it."""
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    legacy = draw.random() < 0.3
    if draw.random() < 0.4:
        content, recipe = damage_pickle(draw, tensors, legacy)
    elif legacy or draw.random() < 0.3:
        content, recipe = damage_bytes(draw, mutators.saved(tensors, legacy))
    else:
        content, recipe = damage_zip(draw, mutators.saved(tensors))
    path.write_bytes(content)
    return f"legacy {legacy}: {recipe}"


def damage_index(draw, folder):
    """Two shards and their index; one of the three is damaged, most often the index."""
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load(whole.read_bytes())
    whole.unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in files.items():
        (folder / file).write_bytes(safetensors.torch.save({name: tensors[name] for name in inside}))
    weight_map = {name: file for file, inside in files.items() for name in inside}

    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    if draw.random() < 0.2:
        return damage_file(draw, folder / draw.choice(list(files)), damage_safetensors)
    return damage_file(draw, index, damage_json)


# --- Tokenizers -------------------------------------------------------------------------------------------

SAMPLES = (
    "It's 1,000 caf\u00e9s;\r\n\n  def f(x):\n        return '\\' + x\t\t",
    "\u65e5\u672c\x00 \x7f  e\u0301 ",
    "a\\b  !<|endoftext|>",
)


def use_tokenizer(folder):
    """The ids of Hugging Face's library, where that reads the file, and the text again."""
    tokenizer = load_tokenizer(folder)
    for text in SAMPLES:
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and 0 <= tokenizer.eot < tokenizer.vocab_size
        if not tokenizer.nfc:
            assert tokenizer.decode(ids) == text

    reference = library_reads(tokenizer.source)
    if reference:
        every_token = tokenizer.decode(range(min(tokenizer.vocab_size, 2000)))
        for text in (*SAMPLES, every_token):
            expected = reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, allow_special=True) == expected, repr(text)


def damage_tokenizer(draw, folder):
    """Anywhere; more often where ids come from."""
    within = draw.choice([None, None, "model", "model", "added_tokens"])
    damage = functools.partial(damage_json, within=within)
    return damage_file(draw, folder / "tokenizer.json", damage)


def library_reads(source):
    """The library's tokenizer, or None if it refuses the file (of what decides no ids it asks for more)."""
    from tokenizers import Tokenizer
    try:
        reference = Tokenizer.from_str(source.decode())
        reference.no_truncation()
        reference.no_padding()
        return reference
    except Exception:  # its only class
        return None


def old_tokenizer_files(folder, spec):
    vocab = {**spec["model"]["vocab"], "<|endoftext|>": len(spec["model"]["vocab"])}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": len(vocab)}))
    special = {"pad_token": "[PAD]", "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False}))


def damage_old_tokenizer(draw, folder):
    path = draw.choice(sorted(folder.iterdir()))
    return damage_file(draw, path, damage_bytes if path.suffix == ".txt" else damage_json)


# --- Texts ------------------------------------------------------------------------------------------------

TEXTS = ["one\ntwo", "", "caf\u00e9 \u65e5\u672c", "def f():\n    return 1\r\n", "x" * 50, "\u2028 \x0b"]


def text_files(folder):
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)).encode()
    (folder / "a.txt").write_bytes("\n\n".join(TEXTS).encode())
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines, mtime=0))
    (folder / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(TEXTS * 9).encode(), mtime=0))
    pq.write_table(pa.table({"text": TEXTS, "id": range(len(TEXTS))}), folder / "a.parquet")


def damage_text(draw, folder, name):
    keep_only(folder, name)
    damage = {"a.json": damage_json, "a.jsonl": damage_lines}.get(name, damage_bytes)
    return damage_file(draw, folder / name, damage)


def keep_only(folder, name):
    for path in folder.iterdir():
        if path.name != name:
            path.unlink()


def damage_lines(draw, content):
    """One line of .jsonl as JSON, or the whole as bytes."""
    if draw.random() < 0.3:
        return damage_bytes(draw, content)
    lines = content.splitlines(keepends=True)
    i = draw.randrange(len(lines))
    lines[i], recipe = damage_json(draw, lines[i])
    return b"".join(lines[:i] + [lines[i] + b"\n"] + lines[i + 1:]), f"line {i}: {recipe}"


def damage_packed(draw, folder):
    """.gz: the packed bytes, or what is in them."""
    name = draw.choice(["a.jsonl.gz", "a.txt.gz"])
    keep_only(folder, name)
    if draw.random() < 0.6:
        return damage_file(draw, folder / name, damage_bytes)
    content, recipe = damage_bytes(draw, gzip.decompress((folder / name).read_bytes()))
    (folder / name).write_bytes(gzip.compress(content, mtime=0))
    return f"within {name}: {recipe}"


COLUMNS = {
    "texts": lambda: pa.array(TEXTS),
    "a dictionary": lambda: pa.array([*TEXTS, None]).dictionary_encode(),
    "large texts": lambda: pa.array(TEXTS, pa.large_string()),
    "long texts": lambda: pa.array(["a" * 10**6] * 40),
    "no rows": lambda: pa.array([], pa.string()),
    "nulls": lambda: pa.array([None, None]),
    "bytes": lambda: pa.array([b"\xff", b"a"]),
    "numbers": lambda: pa.array([1, None]),
    "lists": lambda: pa.array([["a"], None]),
    "structs": lambda: pa.array([{"text": "a"}]),
    "dates": lambda: pa.array([2**62], pa.timestamp("us")),  # beyond those that Python has
}


def damage_parquet(draw, folder):
    """The bytes of a table, or a table with another kind of column, or written in another way."""
    kind = draw.choice(["bytes", "bytes", "bytes", "table", "table", "both"])
    recipe = []
    if kind != "bytes":
        column = draw.choice(list(COLUMNS))
        name = draw.choice(["text", "text", "text", "", "text.text", "two\nlines"])
        packing = draw.choice(["NONE", "SNAPPY", "GZIP", "ZSTD"])
        pq.write_table(pa.table([COLUMNS[column]()], [name]), folder / "a.parquet", compression=packing)
        recipe.append(f"{column} called {name!r}, {packing}")
    if kind != "table":
        recipe.append(damage_file(draw, folder / "a.parquet", damage_bytes))
    keep_only(folder, "a.parquet")
    return "; ".join(recipe)


def use_texts(folder):
    """The texts of a file are str, and what Python reads in it; --data splits them as they are."""
    for path in sorted(folder.iterdir()):
        texts = list(read_file(path))
        assert all(type(text) is str for text in texts)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        content = content.removeprefix(b"\xef\xbb\xbf")
        if ".jsonl" in path.name:
            rows = [json.loads(line) for line in content.split(b"\n") if line.strip()]
            assert texts == [row["text"] or "" for row in rows]
        elif path.suffix == ".json":
            assert texts == [row["text"] or "" for row in json.loads(content)]
        elif ".txt" in path.name:
            assert "".join(texts) == content.decode()

        found = list(open_data(str(path)).documents)
        assert {split for split, _ in found} <= {"train", "val"}
        assert sum(len(text) for _, text in found) == sum(map(len, texts))


# --- Corpora ----------------------------------------------------------------------------------------------

def corpus_files(folder, tokenizer):
    """A finished corpus, and a second that is half built, with its text."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(12)))
    os.utime(text, (0, 0))  # of which the corpus knows, so it must be the same for each input
    prepare(str(text), tokenizer, folder / "whole")

    source = open_data(str(text))
    path = corpus_path(folder / "half", source, tokenizer)
    part = path.with_name(path.name + ".part")
    part.parent.mkdir()
    with Build(part, {"source": source.identity, "tokenizer": tokenizer.fingerprint}) as build:
        for split, text in itertools.islice(source.documents, 6):
            build.add(split, text, np.append(tokenizer.eot, tokenizer.encode_array(text)).astype(np.uint16))
        build.numbers["documents"] = 6
        build.save(build.progress)


def damage_corpus(draw, folder):
    whole, = (folder / "whole").iterdir()
    path = draw.choice([whole / "meta.json"] * 3 + [whole / "train.bin", whole / "val.bin"])
    return damage_file(draw, path, damage_json if path.suffix == ".json" else damage_bytes)


def damage_half(draw, folder):
    part, = (folder / "half").iterdir()
    path = draw.choice([part / "progress.json"] * 3 + [part / "train.bin", part / "val.bin"])
    return damage_file(draw, path, damage_json if path.suffix == ".json" else damage_bytes)


def use_corpus(folder, tokenizer):
    whole, = (folder / "whole").iterdir()
    check_corpus(Corpus(whole))


def use_half(folder, tokenizer):
    """A build goes on from what is there, or starts again."""
    os.utime(folder / "text.jsonl", (0, 0))
    corpus = prepare(str(folder / "text.jsonl"), tokenizer, folder / "half")
    assert corpus.vocab_size == tokenizer.vocab_size
    check_corpus(corpus)
    assert not list((folder / "half").glob("*.part"))


def check_corpus(corpus):
    for tokens, packing in itertools.product((corpus.train, corpus.val), ("constant", "padded")):
        ids, targets = batch_at(tokens, 0, 3, 2, 4, packing, corpus.eot)
        assert ids.shape == targets.shape == (2, 4)
        assert 0 <= ids.min() and ids.max() < corpus.vocab_size
        assert -100 <= targets.min() and targets.max() < corpus.vocab_size


# --- Runs -------------------------------------------------------------------------------------------------

STEPS = 5


def settings(folder):
    argv = f"--teacher none --student x --steps {STEPS} --seq-len 4 --precision fp32 --device cpu --workers 1"
    args = options.parse_args("", [*argv.split(), "--resume", "--out", str(folder / "out")])
    options.check(args)
    return args


def run_files(folder):
    """A run of two of five steps."""
    args = settings(folder)
    args.resume = False
    student, optimizer, corpus = parts_of_run(args)
    run = RunFolder(args, Ranks("cpu"))
    run.claim()
    for _ in range(2):
        make_step(student, optimizer)
    run.save(corpus, student, optimizer, 2)
    rows = [COLUMN_NAMES, *([step, 2.5, 1.5, 3.5, 0, 0, 0.001, 1, 64, 1000] for step in (1, 2))]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / "out" / "log.csv").write_text(text)
    run.release()


def parts_of_run(args):
    student = tiny(GPT2)
    return student, make_optimizer(student, args), argparse.Namespace(train=range(100))


def make_step(student, optimizer):
    student(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()
    if first_not_finite((name, p.grad) for name, p in student.named_parameters()):
        raise InputError("a step whose gradient is not finite is not made: Run.check")
    take_step(optimizer, 1e-3)


def damage_settings(draw, folder):
    return damage_file(draw, folder / "out" / "args.json", damage_json)


def damage_log(draw, folder):
    path = folder / "out" / "log.csv"
    if draw.random() < 0.5:
        return damage_file(draw, path, damage_bytes)
    cells = [line.split(",") for line in path.read_text().splitlines()]
    row, column = draw.randrange(3), draw.randrange(10)
    odd = ["nan", "inf", "-1", "1e400", "", "2.5", "1_0", "\u0662", '"', "9" * 400]
    cells[row][column] = draw.choice(odd)
    path.write_text("\n".join(map(",".join, cells)), encoding="utf-8")
    return f"row {row}, column {column} = {cells[row][column]!r:.40}"


def damage_state(draw, folder):
    path = folder / "out" / "train_state.pt"
    kind = draw.choice(["bytes", "zip", "anything", "settings", "student", "optimizer"])
    if kind in ("bytes", "zip"):
        return damage_file(draw, path, damage_bytes if kind == "bytes" else damage_zip)
    state = torch.load(path, weights_only=True)
    content, recipe = damage_pickle(draw, state, within=None if kind == "anything" else kind)
    path.write_bytes(content)
    return f"{kind}: {recipe}"


def use_run(folder):
    """The run is claimed and resumed, makes a step and can be saved; its log has what it can have."""
    args = settings(folder)
    student, optimizer, corpus = parts_of_run(args)
    run = RunFolder(args, Ranks("cpu"))
    run.claim()
    try:
        done = run.resume(corpus, student, optimizer)
        assert type(done) is int and 0 <= done <= STEPS
        make_step(student, optimizer)
        assert not first_not_finite(student.named_parameters())
        run.save(corpus, student, optimizer, done + 1)
    finally:
        run.release()

    rows = read_log(folder / "out" / "log.csv")
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and all(step > 0 for step in steps)
    assert all(math.isfinite(value) for row in rows for value in row.values())


# --- All of them ------------------------------------------------------------------------------------------

class Subject(NamedTuple):
    make: Callable  # (folder): write good files
    damage: Callable  # (draw, folder) -> a recipe in words: damage them
    use: Callable  # (folder): read them, and find the result right


def damage_file(draw, path, damage):
    content, recipe = damage(draw, path.read_bytes())
    path.write_bytes(content)
    return f"{path.name}: {recipe}"


def of_model(architecture, damage):
    return lambda tokenizers: Subject(lambda folder: tiny(architecture).save(folder), damage, use_model)


def of_tokenizer(form):
    def make(tokenizers):
        source = (tokenizers / form / "tokenizer.json").read_bytes()
        return Subject(
            lambda folder: (folder / "tokenizer.json").write_bytes(source),
            damage_tokenizer, use_tokenizer)
    return make


def of_old_tokenizer(tokenizers):
    spec = json.loads((tokenizers / "gpt2" / "tokenizer.json").read_bytes())
    return Subject(lambda folder: old_tokenizer_files(folder, spec), damage_old_tokenizer, use_tokenizer)


def of_text(name):
    damage = functools.partial(damage_text, name=name)
    return lambda tokenizers: Subject(text_files, damage, use_texts)


def of_corpus(damage, use):
    def make(tokenizers):
        tokenizer = load_tokenizer(tokenizers / "gpt2")
        return Subject(
            lambda folder: corpus_files(folder, tokenizer), damage, lambda folder: use(folder, tokenizer))
    return make


def of_run(damage):
    return lambda tokenizers: Subject(run_files, damage, use_run)


SUBJECTS = {
    "config.json of GPT-2": of_model(GPT2, damage_config),
    "config.json of GPT-NeoX": of_model(GPTNeoX, damage_config),
    "model.safetensors": of_model(GPT2, damage_weights),
    "model.safetensors of GPT-NeoX": of_model(GPTNeoX, damage_weights),
    "pytorch_model.bin": of_model(GPT2, damage_bin),
    "pytorch_model.bin of GPT-NeoX": of_model(GPTNeoX, damage_bin),
    "model.safetensors.index.json": of_model(GPT2, damage_index),
    "tokenizer.json of GPT-2": of_tokenizer("gpt2"),
    "tokenizer.json of GPT-NeoX": of_tokenizer("neox"),
    "vocab.json and merges.txt": of_old_tokenizer,
    ".txt": of_text("a.txt"),
    ".jsonl": of_text("a.jsonl"),
    ".json": of_text("a.json"),
    ".parquet": lambda tokenizers: Subject(text_files, damage_parquet, use_texts),
    ".gz": lambda tokenizers: Subject(text_files, damage_packed, use_texts),
    "meta.json and .bin of a corpus": of_corpus(damage_corpus, use_corpus),
    "progress.json of a corpus": of_corpus(damage_half, use_half),
    "args.json": of_run(damage_settings),
    "log.csv": of_run(damage_log),
    "train_state.pt": of_run(damage_state),
}


# --- What a reader does -----------------------------------------------------------------------------------

NEVER = {"os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen",
         "socket.connect", "socket.getaddrinfo"}
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}
SYSTEM = ("/proc", "/dev", "/sys", "/etc/localtime", *map(os.path.realpath, {
    sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), Path(__file__).parent.parent}))


class TooLong(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


class Watch:
    """Used as a context: an audit hook of Python, which cannot be removed again, sees what happens in it."""

    def __init__(self):
        self.folder = None
        self.seen = []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if self.folder is None:
            return
        if event in NEVER:
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            self.check(event, args[0], self.folder if writes else (self.folder, *SYSTEM))
        elif event in CHANGES and isinstance(args[0], (str, bytes, os.PathLike)):
            self.check(event, args[0], self.folder)

    def check(self, event, path, allowed):
        path = os.path.realpath(os.fsdecode(path))
        if not path.startswith(allowed) and not path.endswith(".pyc") and "__pycache__" not in path:
            self.seen.append(f"{event} {path}")

    def __call__(self, folder):
        self.next = os.path.realpath(folder)
        return self

    def __enter__(self):
        def stop(*_):
            raise TooLong(f"more than {SECONDS} seconds")

        self.seen = []
        self.memory = peak_megabytes()
        self.handler = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process's work, however busy the machine is
        self.folder = self.next

    def __exit__(self, *error):
        self.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self.handler)
        if peak_megabytes() > self.memory + MEGABYTES:
            self.seen.append(f"{peak_megabytes() - self.memory:,.0f} MB of memory")


def peak_megabytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.fixture(scope="module")
def watch():
    return Watch()


def outcome(use, folder, watch):
    """How `use` takes the files in a folder: "right", "refused", or what is wrong with it."""
    result = "right"
    try:
        with warnings.catch_warnings(), watch(folder):
            warnings.simplefilter("ignore")  # PyTorch's about prototypes
            use(folder)
    except InputError as error:
        one_line = len(str(error).splitlines()) == 1 and len(str(error)) <= 1000
        result = "refused" if one_line else f"an InputError that is no line: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any kind: a panic in Rust is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        result = f"{type(error).__name__}: {error!s:.200} at {Path(place.filename).name}:{place.lineno}"
    return "; ".join(watch.seen) or result


def good_files(subject, folder):
    """Make them and read them, undamaged, with all imports that a first use brings: {path: content}."""
    subject.make(folder)
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    subject.use(folder)
    return files


def restore(folder, files):
    """The good files again, and nothing else. The folder itself stays: it is the working directory."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_input_error_or_a_right_result(name, tokenizers_dir, tmp_path, watch, monkeypatch):
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.chdir(folder)  # so that what a pickle would do is seen here, too
    subject = SUBJECTS[name](tokenizers_dir)
    files = good_files(subject, folder)

    outcomes = Counter()
    faults = []
    for number in range(math.ceil(MUTATIONS / len(SUBJECTS))):
        seed = f"{SEED} {name} {number}"
        restore(folder, files)
        recipe = subject.damage(random.Random(seed), folder)
        (tmp_path / "recipe.txt").write_text(f"input {number}: {recipe}", "utf-8", "backslashreplace")

        result = outcome(subject.use, folder, watch)
        outcomes[result] += 1
        if (folder / "EXECUTED").exists():
            result = "code in a pickle was run"
        if result not in ("right", "refused"):
            faults.append(f"input {number} ({recipe}): {result}")
            kept = tmp_path / f"input {number}"
            restore(kept, files)
            subject.damage(random.Random(seed), kept)

    assert not faults, "\n".join([f"{len(faults)} of seed {SEED}, kept in {tmp_path}:", *faults[:20]])
    # If next to nothing were read, next to nothing would have been tested.
    assert outcomes["right"] > 0.04 * number, outcomes
