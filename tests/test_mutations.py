"""Every reader, on files that are damaged, odd or hostile: a right result or an InputError, and nothing else.

Read in this order:
  SUBJECTS                     what is damaged, and who reads it
  test_an_input_error_or_...   one input after the other; mutators.py damages them
  Watch                        what a reader does meanwhile: files, processes, time, memory

A right result: a model with finite logits, texts as Python's own libraries read them, the ids that Hugging
Face's tokenizers library gives, batches of ids within the vocabulary, a run that can go on. Never another
exception (tiktoken's panics are not even Exceptions), NaN, a pickle's code run, a file of another folder
touched, a gigabyte of memory, or five seconds of work. After an InputError all files are as they were.

    MUTATIONS=20000 MUTATION_SEED=7 python -m pytest tests/test_mutations.py

Inputs follow from the seed. Those that failed are kept in the folder that the message names. If Python itself
dies, the last input is in the newest pytest-of-NAME/pytest-N of the temporary directory.
"""
import argparse
import contextlib
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
from pathlib import Path

import mutators
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from texts import make_texts

import distill
from data import Corpus, batch_at, prepare
from model import GPT2, GPTNeoX, load
from sample import draw as draw_tokens
from support import report, run, teacher_cache
from support.cli import InputError
from support.corpus import Build, corpus_path
from support.hub import read_tensors, weight_files
from support.ranks import Ranks
from support.text import open_data, read_file
from support.tokenizer import load_tokenizer

resource = pytest.importorskip("resource", reason="Windows does not say how much memory was used")

MUTATIONS = int(os.environ.get("MUTATIONS", 1000))
SEED = int(os.environ.get("MUTATION_SEED", 0))
SECONDS = 5  # the most that an input may take, of this process's work
MEGABYTES = 1024  # the most by which an input may raise the peak of memory


# ------------------------------------------------------------------------------------ models
def tiny(architecture):
    """A model with weights large enough to matter, and a vocabulary too small for any tokenizer."""
    torch.manual_seed(0)
    model = architecture(architecture.config(vocab_size=11, context=12, width=8, n_layer=2, n_head=2, eos=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_as_bin(folder):
    tiny(GPT2).save(folder)
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())  # in any order
    (folder / "pytorch_model.bin").write_bytes(mutators.saved(dict(sorted(tensors.items()))))
    (folder / "model.safetensors").unlink()


def save_as_shards(folder):
    tiny(GPTNeoX).save(folder)
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load(whole.read_bytes())
    whole.unlink()
    files = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        safetensors.torch.save_file({n: x for n, x in tensors.items() if files[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def use_model(folder):
    """What sample.py does with a model, whose tensors are those that others read in its files."""
    model = load(folder)
    for path in weight_files(folder):
        expected = tensors_in(path)
        for name, tensor in read_tensors(path):
            same = expected is None or torch.equal(tensor, expected[name])
            assert same or tensor.isnan().any(), name  # of a mask; load has refused other NaN

    ids = torch.arange(min(5, model.context))[None] % model.config.vocab_size  # (1, L)
    model.generate(ids, 3, draw_tokens)  # InputError if logits are not finite
    with torch.no_grad():
        logits = model(ids)  # (1, L, V)
    assert logits.shape == (*ids.shape, model.config.vocab_size)
    draw_tokens(logits[0])
    assert not logits.isnan().any() and not (logits == math.inf).any()


def tensors_in(path):
    """The tensors in a file that is read as a whole, not mapped; None where that finds a wrong checksum, or a
    dtype that safetensors reads in mapped files alone."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, KeyError):
        return None


# ------------------------------------------------------------------------------------ tokenizers
FORMS = {}  # folders of tokenizers, from the fixture tokenizers_dir
SAMPLES = (
    "It's 1,000 caf\u00e9s;\r\n\n  def f(x):\n        return '\\' + x\t\t",
    "\u65e5\u672c\x00 \x7f  e\u0301 ",
    "a\\b  !<|endoftext|>",
)


def tokenizer_file(form):
    """make(folder) for a tokenizer.json in the form of "gpt2" or "neox"."""
    return lambda folder: shutil.copy(FORMS[form] / "tokenizer.json", folder)


def old_tokenizer_files(folder):
    model = json.loads((FORMS["gpt2"] / "tokenizer.json").read_bytes())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"pad_token": "[PAD]", "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
    files = {"vocab": vocab, "added_tokens": {"[PAD]": len(vocab)}, "special_tokens_map": special,
             "tokenizer_config": {"add_prefix_space": False}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def use_tokenizer(folder):
    """The ids of Hugging Face's library, where that reads the file; the text again; the same when saved."""
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

    tokenizer.save(folder / "saved")
    assert load_tokenizer(folder / "saved").fingerprint == tokenizer.fingerprint


def library_reads(source):
    """The library's tokenizer, or None if it refuses the file (it is strict in parts that decide no ids)."""
    from tokenizers import Tokenizer
    try:
        reference = Tokenizer.from_str(source.decode())
        reference.no_truncation()
        reference.no_padding()
        return reference
    except KeyboardInterrupt:
        raise
    except BaseException:  # its own class, or a panic of Rust, which is not an Exception
        return None


# ------------------------------------------------------------------------------------ texts
TEXTS = ["one\ntwo", "", "caf\u00e9 \u65e5\u672c", "def f():\n    return 1\r\n", "x" * 50, "\u2028 \x0b"]


def text_file(name):
    """make(folder) for a file of TEXTS."""
    rows = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows))
    content = {"a.txt": "\n\n".join(TEXTS), "a.jsonl": lines, "a.json": json.dumps(rows)}

    def make(folder):
        if name == "a.parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / name)
            return
        raw = content[name.removesuffix(".gz")].encode()
        (folder / name).write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    return make


def use_text(folder):
    """The texts of a file are str, and what Python reads in it; --data splits them as they are."""
    path, = folder.iterdir()
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


# ------------------------------------------------------------------------------------ corpora, caches
@functools.cache
def small_tokenizer():
    return load_tokenizer(FORMS["gpt2"])


def text_of_corpus(folder):
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(12)))
    return str(path)


def finished_corpus(folder):
    prepare(text_of_corpus(folder), small_tokenizer(), folder)


def half_a_corpus(folder):
    """A build that was killed after 6 of 12 documents."""
    os.utime(text_of_corpus(folder), (0, 0))  # the build notes the time
    source = open_data(str(folder / "text.jsonl"))
    tokenizer = small_tokenizer()
    path = corpus_path(folder, source, tokenizer)
    with Build(path.with_name(path.name + ".part"),
               {"source": source.identity, "tokenizer": tokenizer.fingerprint}) as build:
        for split, text in itertools.islice(source.documents, 6):
            build.add(split, text, np.append(tokenizer.eot, tokenizer.encode_array(text)).astype(np.uint16))
        build.numbers["documents"] = 6
        build.save(build.progress)


def use_corpus(folder):
    path, = (path for path in folder.iterdir() if path.is_dir())
    corpus = Corpus(path)
    for tokens, packing in itertools.product((corpus.train, corpus.val), ("constant", "padded")):
        ids, targets = batch_at(tokens, 0, 3, 2, 4, packing, corpus.eot)
        assert ids.shape == targets.shape == (2, 4)
        assert 0 <= ids.min() and ids.max() < corpus.vocab_size
        assert -100 <= targets.min() and targets.max() < corpus.vocab_size


def use_half(folder):
    """A build goes on from what is there, or starts again."""
    os.utime(folder / "text.jsonl", (0, 0))
    tokenizer = small_tokenizer()
    assert prepare(str(folder / "text.jsonl"), tokenizer, folder).vocab_size == tokenizer.vocab_size
    use_corpus(folder)


CACHE = {**dict.fromkeys(teacher_cache.COMPARED, 1), "teacher": "t", "data": "d", "examples": 3, "tokens": 6,
         "draws": 2, "vocab_size": 11, "seq_len": 2}


def never(examples):
    raise AssertionError("a cache that is there was answered again")


def cache_files(folder):
    rows = np.zeros(CACHE["tokens"], teacher_cache.row_type(CACHE))
    (folder / "cache").mkdir()
    (folder / "cache" / "header.json").write_text(json.dumps(CACHE))
    (folder / "cache" / "answers.bin").write_bytes(rows.tobytes())


def use_cache(folder):
    offsets = range(0, 7, 2)
    teacher_cache.make(folder / "cache", CACHE, never, offsets, Ranks("cpu"), 6)
    draws = teacher_cache.TeacherCache(folder / "cache", offsets).draws([2, 0], torch.device("cpu"))
    assert draws.ids.shape == (4, 2) and 0 <= draws.ids.min() and draws.ids.max() < 11
    assert torch.isfinite(draws.entropy + draws.clm).all()


# ------------------------------------------------------------------------------------ runs
def train_in(folder, steps, *more):
    """Train a model in folder/out, or resume that, or show the results that are there."""
    argv = f"--teacher none --student gpt2 --steps {steps} --seq-len 4 --batch-size 1 --grad-accum 1"
    argv += " --precision fp32 --device cpu --save-interval 1 --schedule constant --warmup 0 --eval-tokens 8"
    args = distill.parse_args([*argv.split(), "--out", str(folder / "out"), *more])
    ids = np.arange(100) % 11
    corpus = argparse.Namespace(train=ids, val=ids, eot=0, fingerprint="of a text",
                                meta={"val": {"bytes": 400, "tokens": 100}})
    ranks = Ranks("cpu")
    with run.claim(args, ranks) as finished:
        if finished:
            report.show_again(args)
        else:
            student = distill.train(args, tiny(GPT2), None, corpus, 11, ranks)
            assert not run.first_not_finite(student.state_dict())


def half_a_run(folder):
    train_in(folder, 2)


def finished_run(folder):
    train_in(folder, 2)
    row = {"parameters": 9, "loss": 2.5, "perplexity": 12.2, "bits per byte": 1.5, "MB as float32": 1}
    with run.published(folder / "out") as new:
        for name in (*run.MODEL_FILES, "README.md"):
            (new / name).write_text("{}")
    results = {"objective": "loss = 1 * CLM", "rows": {"student": row}, "verdict": "tied"}
    (folder / "out" / "results.json").write_text(json.dumps(results))


def use_run(folder):
    """The run goes on for a step; its log has what a log can have."""
    train_in(folder, 3, "--resume")
    for name in run.LOGS:
        rows = run.read_log(folder / "out" / name)
        steps = [row["step"] for row in rows]
        assert steps == sorted(set(steps)) and all(step >= 0 for step in steps)
        assert all(math.isfinite(value) for row in rows for value in row.values())


def use_finished(folder):
    """Its results are shown, and a model that is published then leaves edited text as it is."""
    train_in(folder, 2, "--resume")
    before = {name: (folder / "out" / name).read_bytes() for name in ("README.md", "config.json")}
    with run.published(folder / "out") as new:
        for name in before:
            (new / name).write_text("new")
    for name, content in before.items():
        now = (folder / "out" / name).read_bytes()
        assert now == content or now == b"new" and content == b"{}"


# ------------------------------------------------------------------------------------ all of them
SUBJECTS = {  # make(folder) writes good files; a pattern of those that are damaged; use(folder) reads them
    "config of GPT-2": (lambda folder: tiny(GPT2).save(folder), "config.json", use_model),
    "config of GPT-NeoX": (lambda folder: tiny(GPTNeoX).save(folder), "config.json", use_model),
    "weights of GPT-2": (lambda folder: tiny(GPT2).save(folder), "*.safetensors", use_model),
    "weights of GPT-NeoX": (lambda folder: tiny(GPTNeoX).save(folder), "*.safetensors", use_model),
    "pytorch_model.bin": (save_as_bin, "*.bin", use_model),
    "shards": (save_as_shards, "*.index.json", use_model),
    "tokenizer of GPT-2": (tokenizer_file("gpt2"), "*", use_tokenizer),
    "tokenizer of GPT-NeoX": (tokenizer_file("neox"), "*", use_tokenizer),
    "vocab and merges": (old_tokenizer_files, "*", use_tokenizer),
    **{name: (text_file(f"a{name}"), "*", use_text)
       for name in (".txt", ".jsonl", ".json", ".parquet", ".jsonl.gz")},
    "corpus": (finished_corpus, "*/*", use_corpus),
    "half a corpus": (half_a_corpus, "*/*", use_half),
    "teacher's cache": (cache_files, "*/*", use_cache),
    "settings of a run": (half_a_run, "out/args.json", use_run),
    "log of a run": (half_a_run, "out/log.csv", use_run),
    "state of a run": (half_a_run, "out/train_state.pt", use_run),
    "finished run": (finished_run, "out/*.json", use_finished),
}


@pytest.fixture(scope="module", autouse=True)
def forms(tokenizers_dir):
    FORMS.update({path.name: path for path in tokenizers_dir.iterdir()})


# ------------------------------------------------------------------------------------ what a reader does
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
        elif (event == "open" or event in CHANGES) and isinstance(args[0], (str, bytes, os.PathLike)):
            reads = event == "open" and not (
                isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            path = os.path.realpath(os.fsdecode(args[0]))
            allowed = (self.folder, *SYSTEM) if reads else self.folder
            if not path.startswith(allowed) and not path.endswith(".pyc") and "__pycache__" not in path:
                self.seen.append(f"{event} {path}")

    @contextlib.contextmanager
    def on(self, folder):
        def stop(*_):
            raise TooLong(f"more than {SECONDS} seconds")

        self.seen = []
        memory = peak_megabytes()
        handler = signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process's work, however busy the machine is
        self.folder = os.path.realpath(folder)
        try:
            yield
        finally:
            self.folder = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, handler)
            if peak_megabytes() > memory + MEGABYTES:
                self.seen.append(f"{peak_megabytes() - memory:,.0f} MB of memory")


def peak_megabytes():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.fixture(scope="module")
def watch():
    return Watch()


def outcome(use, folder, watch):
    """How `use` takes the files in a folder: "right", "refused", or what is wrong with it."""
    before = content_of(folder)
    try:
        with warnings.catch_warnings(), watch.on(folder):
            warnings.simplefilter("ignore")  # PyTorch's about prototypes
            use(folder)
        result = "right"
    except InputError as error:
        one_line = len(str(error).splitlines()) == 1 and len(str(error)) <= 1000
        result = "refused" if one_line else f"an InputError of several lines: {error}"
        now = content_of(folder)
        kept = [path for path in before if path.parent.suffix != ".part"]  # a build may change its own folder
        if lost := [str(path) for path in kept if now.get(path) != before[path]]:
            result = f"changed before it was refused: {', '.join(lost)}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # of any kind: a panic in Rust is not an Exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        result = f"{type(error).__name__}: {error!s:.200} at {Path(place.filename).name}:{place.lineno}"
    if (folder / "EXECUTED").exists():
        result = "code in a pickle was run"
    return "; ".join(watch.seen) or result


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(folder, files):
    """The good files again, and nothing else. The folder itself stays: it is the working directory."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_input_error_or_a_right_result(name, tmp_path, watch, monkeypatch):
    folder = tmp_path / "files"
    folder.mkdir()
    monkeypatch.chdir(folder)  # so that what a pickle would do is seen here, too
    make, pattern, use = SUBJECTS[name]
    make(folder)
    good = content_of(folder)
    use(folder)  # undamaged, with all imports that a first use brings

    outcomes = Counter()
    faults = []
    for number in range(math.ceil(MUTATIONS / len(SUBJECTS))):
        restore(folder, good)
        draw = random.Random(f"{SEED} {name} {number}")
        mutators.damage(draw, draw.choice(sorted(folder.glob(pattern))))
        damaged = content_of(folder)

        result = outcome(use, folder, watch)
        outcomes[result] += 1
        if result not in ("right", "refused"):
            faults.append(f"input {number}: {result}")
            restore(tmp_path / f"input {number}", damaged)

    assert not faults, "\n".join([f"{len(faults)} of seed {SEED}, kept in {tmp_path}:", *faults[:20]])
    # If next to nothing were read, next to nothing would have been tested.
    assert outcomes["right"] > 0.04 * number, outcomes
