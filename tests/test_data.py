"""data.py: batches as a function of their arguments, corpora opened, the command."""
import hashlib
import json
import re

import numpy as np
import pytest
from texts import make_texts, write

import data
from data import Corpus, batch_at, load_tokenizer, numbers_at, prepare, target_offsets
from support.cli import InputError


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


@pytest.fixture
def source(tmp_path):
    write(tmp_path / "x.jsonl", make_texts(1000))
    return str(tmp_path / "x.jsonl")


# ------------------------------------------------------------------------------------ batches
def test_constant_batches_take_each_token_once_an_epoch():
    tokens = np.arange(1000, dtype=np.uint16)
    targets = []
    for index in range(30):  # 3 epochs of 99 blocks and a bit: batches do not end where epochs do
        ids, following = batch_at(tokens, 7, index, 10, 10)
        assert ids.shape == following.shape == (10, 10)
        assert ids.dtype == following.dtype == np.int64
        assert (following == ids + 1).all()
        targets += following.tolist()
    epochs = [[row[0] for row in targets[e * 99:(e + 1) * 99]] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 991, 10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


def test_batches_are_a_function_of_their_arguments():
    tokens = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint16)
    first = [batch_at(tokens, 1, i, 4, 16)[0] for i in range(100)]
    data.permutation.cache_clear()  # the order is not remembered from call to call, but found again
    assert all((batch_at(tokens, 1, i, 4, 16)[0] == first[i]).all() for i in (99, 0, 50))
    assert (batch_at(tokens, 1, 5, 8, 16)[0] == np.concatenate([first[10], first[11]])).all()  # only grouped
    assert not (batch_at(tokens, 2, 0, 4, 16)[0] == first[0]).all()


def test_the_order_of_data_never_changes():
    """The batches of published runs: another order of the same data would be another run."""
    tokens = (np.arange(20_000) * 7919 % 251).astype(np.uint16)
    digests = {"constant": "3811f8df96b139b5", "padded": "20f9d06156719452"}
    for packing, digest in digests.items():
        batches = [batch_at(tokens, 5, index, 6, 32, packing, eot=0) for index in range(120)]
        content = np.array(batches).tobytes()
        assert hashlib.sha256(content).hexdigest()[:16] == digest, packing


def test_padded_batches():
    documents = [[0, 5, 6, 7], [0, 8], [0], [0, *range(10, 30)], [0, *range(40, 47)], [0, *range(50, 58)],
                 [0, 9, 9]]
    tokens = np.array([i for document in documents for i in document], np.uint16)
    ids, targets = batch_at(tokens, 3, 0, 6, 8, packing="padded", eot=0)
    lengths = (targets != -100).sum(1)
    seen = [(ids[row, :n].tolist(), targets[row, :n].tolist()) for row, n in enumerate(lengths)]
    # The end of a document is a target, also that of the last one; only what is cut has none.
    expected = [([0, 5, 6, 7], [5, 6, 7, 0]), ([0, 8], [8, 0]), ([0, 9, 9], [9, 9, 0]),
                ([0, *range(10, 17)], [*range(10, 18)]), ([0, *range(40, 47)], [*range(40, 47), 0]),
                ([0, *range(50, 57)], [*range(50, 58)])]
    assert sorted(seen) == sorted(expected)
    for row, n in enumerate(lengths):
        assert (ids[row, n:] == 0).all()
        assert (targets[row, n:] == -100).all()

    offsets = target_offsets(tokens, 8, "padded", 0)
    numbers = [numbers_at(3, 0, 6, 6).index(i) for i in range(6)]
    assert np.diff(offsets).tolist() == lengths[numbers].tolist()


def test_the_example_in_the_docstring():
    tokens = np.array([0, 5, 6, 7, 0, 8, 0, 1, 2, 3, 4, 9], np.uint16)
    ids, targets = batch_at(tokens, 0, 0, 2, 4)
    assert sorted(zip(ids.tolist(), targets.tolist(), strict=True)) == [
        ([0, 5, 6, 7], [5, 6, 7, 0]), ([0, 8, 0, 1], [8, 0, 1, 2])]
    ids, targets = batch_at(tokens, 0, 0, 3, 4, "padded", eot=0)
    assert sorted(zip(ids.tolist(), targets.tolist(), strict=True)) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]), ([0, 5, 6, 7], [5, 6, 7, 0]), ([0, 8, 0, 0], [8, 0, -100, -100])]
    assert target_offsets(tokens, 4, "padded", 0).tolist() == [0, 4, 6, 10]


def test_documents_are_looked_for_once_in_each_array(monkeypatch):
    arrays = [np.array([0, 5, 6, 0, 7], np.uint16) for _ in range(2)]  # equal, and not the same
    searched = []
    search = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda array: searched.append(1) or search(array))
    for i in range(6):
        batch_at(arrays[i % 2], 0, i, 1, 4, "padded", eot=0)
    assert len(searched) == 2


def test_too_few_tokens():
    with pytest.raises(InputError, match="16 tokens are too few for one block of 16"):
        batch_at(np.zeros(16, np.uint16), 0, 0, 1, 16)
    assert batch_at(np.zeros(17, np.uint16), 0, 0, 1, 16)[0].shape == (1, 16)
    with pytest.raises(InputError, match="no document that has any text"):
        batch_at(np.zeros(16, np.uint16), 0, 0, 1, 16, "padded", eot=0)


# ------------------------------------------------------------------------------------ corpora
def test_damaged_corpora_are_one_line_and_made_anew(source, tok, tmp_path):
    corpus = prepare(source, tok, tmp_path)
    assert (corpus.eot, corpus.vocab_size, corpus.meta["tokenizer"]) == (
        tok.eot, tok.vocab_size, tok.fingerprint)
    good, train = corpus.meta, corpus.train.tolist()
    half = (corpus.path / "train.bin").read_bytes()[:len(train)]
    metas = [[good], {**good, "train": "many"}, {**good, "documents": True}, {**good, "eot": 10**12}]
    for name, content in (*(("meta.json", json.dumps(meta).encode()) for meta in metas),
                          ("meta.json", b"[" * 10**5), ("meta.json", None), ("train.bin", half),
                          ("val.bin", None)):
        (corpus.path / name).unlink()
        if content is not None:
            (corpus.path / name).write_bytes(content)
        with pytest.raises(InputError, match="is not a complete corpus: ") as error:
            Corpus(corpus.path)
        assert "\n" not in str(error.value)
        assert prepare(source, tok, tmp_path).train.tolist() == train


def test_ids_beyond_the_vocabulary(source, tok, tmp_path):
    path = prepare(source, tok, tmp_path).path
    content = bytearray((path / "val.bin").read_bytes())
    content[-2:] = b"\xff\xff"
    (path / "val.bin").write_bytes(content)
    with pytest.raises(InputError, match=f"id 65535 in a vocabulary of {tok.vocab_size}"):
        Corpus(path)


def test_nobody_is_told_to_remove_what_may_be_theirs(tmp_path):
    (tmp_path / "meta.json").write_text('{"title": "my notes"}')
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=f"{folder.name} is not a complete corpus") as error:
            Corpus(folder)
        assert not re.search("delete|damaged|move it", str(error.value).lower())


def test_a_corpus_is_known_by_its_content(source, tok, tmp_path):
    corpus = prepare(source, tok, tmp_path)
    assert Corpus(corpus.path).fingerprint == corpus.fingerprint
    for name in ("train.bin", "val.bin"):
        ids = np.fromfile(corpus.path / name, np.uint16)
        swapped = ids.copy()
        swapped[1:3] = ids[2], ids[1]  # the same tokens in another order
        assert swapped[1] != swapped[2]
        swapped.tofile(corpus.path / name)
        assert Corpus(corpus.path).fingerprint != corpus.fingerprint
        ids.tofile(corpus.path / name)


def test_of_a_large_corpus_a_sample_is_hashed(source, tok, tmp_path):
    corpus = prepare(source, tok, tmp_path)
    corpus.train = np.zeros(2**26, np.uint16)
    first = corpus.fingerprint
    for place, noticed in ((0, True), (2**26 - 2**17, True), (2**17 - 1, False)):
        del corpus.fingerprint
        corpus.train[place] = 1
        assert (corpus.fingerprint != first) == noticed
        corpus.train[place] = 0


# ------------------------------------------------------------------------------------ the command
def test_command(run, tokenizers_dir, source, tmp_path):
    result = run("data.py", "--data", source, "--tokenizer", tokenizers_dir / "gpt2", "--max-tokens", "1e4")
    assert result.returncode == 0, result.stderr
    assert "10,000 tokens" in result.stdout
    assert (tmp_path / result.stdout.splitlines()[-1] / "meta.json").is_file()
    result = run("data.py", "--data", "nothing", "--tokenizer", tokenizers_dir / "gpt2", "--folder", "other")
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no file or folder nothing")
    assert not (tmp_path / "other").exists()


def test_numbers_out_of_range():
    for flag, values in {"--workers": ("0", "-1", "1.5", str(2**65), "1025"),
                         "--max-tokens": ("nan", "0", "-3", "1e400", "1e19", "many")}.items():
        for value in values:
            with pytest.raises(InputError, match=flag):
                data.parse_args([f"{flag}={value}"])
