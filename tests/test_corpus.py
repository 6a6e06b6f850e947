"""support/corpus.py: corpora that no kill, full disk or second process harms, each under its own name."""
import errno
import itertools
import json
import os
import re
import threading
import time
from pathlib import Path

import pytest
from texts import make_texts, split_ids, write

from data import load_tokenizer, prepare
from support import corpus
from support.cli import InputError
from support.text import open_data
from support.tokenizer import Tokenizer


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file of documents, about 500 kB, and batches small enough for some 8 of them."""
    monkeypatch.setattr(corpus, "BATCH_CHARS", 2**16)
    write(tmp_path / "x.jsonl", make_texts(2000))
    return tmp_path / "x.jsonl"


@pytest.fixture
def build(source, tok, tmp_path):
    """build("folder"): the corpus of these documents in a folder of its own; build(): in tmp_path."""
    def build(folder=".", **settings):
        return prepare(source, tok, tmp_path / folder, **settings)
    return build


def content_of(made):
    return [made.meta, *((made.path / f"{split}.bin").read_bytes() for split in ("train", "val"))]


def stamp_of(made):
    return (made.path / "meta.json").stat().st_mtime_ns


# ------------------------------------------------------------------------------------ what is in a corpus
def test_all_forms_hold_the_same_corpus(tok, tmp_path):
    texts = make_texts(300)
    for name, part in {"a/x.jsonl": texts, "b/x.parquet": texts, "c/x.txt": texts, "d/1.jsonl": texts[:100],
                       "d/sub/2.parquet": texts[100:]}.items():
        write(tmp_path / name, part)
    (tmp_path / "d" / "x.csv").write_text("not data")
    expected = split_ids(tok, open_data(str(tmp_path / "a" / "x.jsonl")).documents)
    assert len(expected["val"]) > 1000
    for name in ("a/x.jsonl", "a", "b/x.parquet", "c", "d"):
        made = prepare(tmp_path / name, tok, tmp_path / "corpora")
        assert made.train.tolist() == expected["train"] and made.val.tolist() == expected["val"], name
        counts = [made.meta["train"], made.meta["val"]]
        assert made.meta["complete"] and counts[0]["tokens"] == len(made.train)
        assert sum(count["bytes"] for count in counts) == sum(len(text.encode()) for text in texts)
        assert sum(count["documents"] for count in counts) == 300


def test_workers_change_nothing_and_read_little_ahead(build, tok):
    one, two = (build(str(n), workers=n) for n in (1, 2))
    assert content_of(one) == content_of(two) and len(one.train) > 300_000

    taken = itertools.count()
    batches = ([("train", "word " * 100)] for _ in iter(lambda: next(taken), None))  # endless
    for _ in itertools.islice(corpus.tokenized(batches, tok, workers=2), 10):
        pass
    assert next(taken) < 20


def test_a_budget_is_kept_exactly(build, tok):
    whole = build("whole")
    part = build(max_tokens=12_345)
    assert len(part.train) == 12_345 and not part.meta["complete"]
    assert (part.train == whole.train[:12_345]).all() and (part.val == whole.val[:len(part.val)]).all()
    assert (part.train == tok.eot).sum() == part.meta["train"]["documents"]
    stamp = stamp_of(part)
    assert stamp_of(build(max_tokens=12_000)) == stamp  # enough: taken as it is
    assert len(build(max_tokens=20_000).train) == 20_000
    assert content_of(build()) == content_of(whole)
    assert build(max_tokens=10**9).meta["complete"]  # there is no more to be had


def test_texts_and_vocabularies_of_a_wrong_size(tok, tmp_path):
    (tmp_path / "x.txt").write_text("only one line")
    with pytest.raises(InputError, match="x.txt: no text for train; take two documents"):
        prepare(tmp_path / "x.txt", tok, tmp_path / "corpora")
    tok.vocab_size = 2**16 + 1
    with pytest.raises(InputError, match="65537"):
        prepare("stdlib", tok, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


# ------------------------------------------------------------------------------------ names
def test_corpora_of_different_data_do_not_meet(tok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["\u6587\u7ae0", "\u5c0f\u8bf4", "cafe\u0301", "a/b", "a-b", "a+b", "x" * 200, "\u6587" * 80]
    for i, name in enumerate(names):
        write(tmp_path / name / "x.txt", make_texts(30, seed=i))
    made = {name: prepare(name, tok) for name in names}
    stamps = {name: stamp_of(made[name]) for name in names}
    assert len({corpus_.path for corpus_ in made.values()}) == len(names)
    assert max(len(corpus_.path.name.encode()) for corpus_ in made.values()) < 200
    assert made["\u6587\u7ae0"].path.name.startswith("\u6587\u7ae0-")
    assert re.fullmatch(r"a-b-[0-9a-f]{8}", made["a+b"].path.name)
    assert {name: stamp_of(prepare(name, tok)) for name in names} == stamps


def test_the_places_of_corpora_never_change(tok, monkeypatch):
    """Another name for the same data would build each user's corpora again."""
    monkeypatch.chdir("/")
    tok.fingerprint = "0123456789abcdef"
    monkeypatch.setattr("platform.python_version", lambda: "3.11.7")
    names = {"stdlib": "stdlib-b39ab13d", "openwebtext": "openwebtext-affcd5e8",
             "Skylion007/openwebtext:plain_text": "Skylion007-openwebtext-plain_text-30482c56"}
    for data, name in names.items():
        assert corpus.corpus_path("corpora", open_data(data), tok).name == name


def test_another_tokenizer_or_changed_data_is_noticed(build, source, tokenizers_dir, tmp_path):
    first = build()
    other = prepare(source, load_tokenizer(tokenizers_dir / "neox"), tmp_path)
    assert other.path != first.path and len(other.train) != len(first.train)
    for key, value in {"tokenizer": "0" * 16, "source": {"data": "stdlib"}}.items():
        (first.path / "meta.json").write_text(json.dumps({**first.meta, key: value}))
        assert build().meta == first.meta

    train = first.train[:].tolist()
    write(source, make_texts(1500, seed=1))
    new = build()
    assert new.path == first.path and new.train.tolist() != train
    assert first.train.tolist() == train  # who has opened the old one can read on


# ------------------------------------------------------------------------------------ kills, full disks
def test_killed_at_any_moment(build, monkeypatch):
    """An exception at each place where a kill could leave something behind."""
    whole = build("whole")
    old = build(max_tokens=5000)
    stamp = stamp_of(old)
    monkeypatch.setattr(corpus, "SAVE_SECONDS", 0)

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    for place, name in ((os, "fsync"), (os, "replace"), (corpus.shutil, "rmtree"), (Path, "rename")):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, die)
            build()
        if name != "rename":  # until the new one is complete, the old one stays in use
            assert stamp_of(old) == stamp and (build(max_tokens=5000).train == old.train).all()
    assert content_of(build()) == content_of(whole)


def test_a_build_goes_on(build, source, tmp_path, monkeypatch):
    """After a full disk, or a kill while a document is written; but not with documents that have changed."""
    encoded, encode = [], Tokenizer.encode_array
    monkeypatch.setattr(Tokenizer, "encode_array", lambda *args: encoded.append(args) or encode(*args))
    for changed in (False, True):
        calls = itertools.count()

        def full(number, calls=calls):
            if next(calls) >= 7:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(corpus, "SAVE_SECONDS", 0)
            patch.setattr(os, "fsync", full)
            with pytest.raises(InputError, match="No space left on device"):
                build()
        part, = tmp_path.glob("*.part")
        assert json.loads((part / "progress.json").read_text())["documents"] > 300
        with open(part / "train.bin", "ab") as file:
            file.write(b"half a document that was written but not yet noted")

        if changed:
            write(source, make_texts(2000, seed=1))
        encoded.clear()
        made = build()
        assert len(encoded) == 2000 if changed else 0 < len(encoded) < 1700
        assert content_of(made) == content_of(build("whole"))
        assert not part.exists() and not list(tmp_path.glob("**/.distil*"))
        corpus.shutil.rmtree(made.path)


def test_many_at_once_build_once(build, tmp_path, monkeypatch):
    builds, slowly = [], corpus.build
    monkeypatch.setattr(corpus, "build", lambda *args: (builds.append(1), time.sleep(0.2), slowly(*args)))
    threads = [threading.Thread(target=build, args=("c",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = build("c")
    assert len(builds) == 1 and made.meta["complete"] and list((tmp_path / "c").iterdir()) == [made.path]


def test_a_start_that_failed_leaves_nothing_behind(tok, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\nnot JSON\n')
    (tmp_path / "mine").mkdir()
    for folder, said in (("new/corpora", "line 2"), ("mine", "line 2"), ("x.jsonl/a", "cannot be written")):
        with pytest.raises(InputError, match=said):
            prepare(tmp_path / "x.jsonl", tok, tmp_path / folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "x.jsonl"]  # the user's folder stays
