"""data.py: batches as a function of their arguments, corpora opened, the command."""
import hashlib
import json

import numpy as np
import pytest
from texts import make_texts, write

import data
from data import Corpus, batch_at, load_tokenizer, prepare
from support.cli import InputError


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


@pytest.fixture
def source(tmp_path):
    write(tmp_path / "x.jsonl", make_texts(1000))
    return str(tmp_path / "x.jsonl")


# --- batch_at ---------------------------------------------------------------------------------------------

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
    data.permutation.cache_clear()
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
    documents = [[0, 5, 6, 7], [0, 8], [0], [0, *range(10, 30)], [0, 9, 9]]
    tokens = np.array([i for document in documents for i in document], np.uint16)
    ids, targets = batch_at(tokens, 3, 0, 4, 8, packing="padded", eot=0)
    lengths = (targets != -100).sum(1)
    seen = [(ids[row, :n].tolist(), targets[row, :n].tolist()) for row, n in enumerate(lengths)]
    assert sorted(seen) == [
        ([0], [8]),
        ([0, 5, 6], [5, 6, 7]),
        ([0, 9], [9, 9]),
        ([0, 10, 11, 12, 13, 14, 15, 16], [10, 11, 12, 13, 14, 15, 16, 17]),
    ]
    for row, n in enumerate(lengths):
        assert (ids[row, n:] == 0).all()
        assert (targets[row, n:] == -100).all()


def test_the_example_in_the_docstring():
    tokens = np.array([0, 5, 6, 7, 0, 8, 0, 1, 2, 3, 4, 9], np.uint16)
    ids, targets = batch_at(tokens, 0, 0, 2, 4)
    assert sorted(zip(ids.tolist(), targets.tolist(), strict=True)) == [
        ([0, 5, 6, 7], [5, 6, 7, 0]), ([0, 8, 0, 1], [8, 0, 1, 2])]
    ids, targets = batch_at(tokens, 0, 0, 3, 4, "padded", eot=0)
    assert sorted(zip(ids.tolist(), targets.tolist(), strict=True)) == [
        ([0, 0, 0, 0], [8, -100, -100, -100]), ([0, 1, 2, 3], [1, 2, 3, 4]), ([0, 5, 6, 0], [5, 6, 7, -100])]


def test_documents_are_looked_for_once_in_each_array():
    before = data.documents_in.cache_info().misses
    arrays = [np.array([0, 5, 6, 0, 7], np.uint16) for _ in range(2)]  # equal, and not the same
    for i in range(6):
        batch_at(arrays[i % 2], 0, i, 1, 4, "padded", eot=0)
    assert data.documents_in.cache_info().misses == before + 2


def test_padded_batches_of_a_corpus(source, tok, tmp_path):
    corpus = prepare(source, tok, tmp_path)
    n = corpus.meta["train"]["documents"]
    first = [batch_at(corpus.train, 0, i, 1, 64, "padded", corpus.eot) for i in range(n)]
    counted = sum(int((targets != -100).sum()) for _, targets in first)
    lengths = np.diff(np.append(np.flatnonzero(corpus.train == tok.eot), len(corpus.train)))
    assert counted == np.minimum(lengths - 1, 64).sum()
    assert all(ids[0, 0] == tok.eot for ids, _ in first)


def test_too_few_tokens():
    with pytest.raises(InputError, match="16 tokens make no block of 16"):
        batch_at(np.zeros(16, np.uint16), 0, 0, 1, 16)
    assert batch_at(np.zeros(17, np.uint16), 0, 0, 1, 16)[0].shape == (1, 16)
    with pytest.raises(InputError, match="no document that has any text"):
        batch_at(np.zeros(16, np.uint16), 0, 0, 1, 16, "padded", eot=0)


# --- Corpus -----------------------------------------------------------------------------------------------

def test_a_corpus_says_what_it_is_of(source, tok, tmp_path):
    corpus = Corpus(prepare(source, tok, tmp_path).path)
    assert (corpus.eot, corpus.vocab_size) == (tok.eot, tok.vocab_size)
    assert corpus.meta["tokenizer"] == tok.fingerprint


def change(key, value):
    return lambda meta: {**meta, key: value}


BAD_META = {
    "a list": lambda meta: [meta],
    "a number": lambda meta: 3,
    "text for a split": change("train", "many"),
    "null for a split": change("val", None),
    "negative counts": change("train", {"documents": 1, "tokens": -5, "bytes": 1}),
    "a float": change("train", {"documents": 1, "tokens": 1e4, "bytes": 1}),
    "true for a count": change("documents", True),
    "no documents": lambda meta: {key: value for key, value in meta.items() if key != "documents"},
    "no end of text": change("eot", None),
    "an end of text beyond the vocabulary": change("eot", 10**12),
    "no vocabulary": change("vocab_size", 0),
    "text for complete": change("complete", "no"),
    "a source that is text": change("source", "x"),
    "a tokenizer that is a list": change("tokenizer", []),
}


@pytest.mark.parametrize("harm", [*BAD_META, "no JSON", "deep JSON", "not UTF-8", "an odd size", "no bytes"])
def test_damaged_corpora_are_one_line_and_made_anew(source, tok, tmp_path, harm):
    corpus = prepare(source, tok, tmp_path)
    train = corpus.train.tolist()
    meta_path, bin_path = corpus.path / "meta.json", corpus.path / "train.bin"
    if harm in BAD_META:
        meta_path.write_text(json.dumps(BAD_META[harm](corpus.meta)))
    elif harm in ("an odd size", "no bytes"):
        bin_path.write_bytes(bin_path.read_bytes()[:-1] if harm == "an odd size" else b"")
    else:
        meta_path.write_bytes({"no JSON": b"{", "deep JSON": b"[" * 10**5, "not UTF-8": b"\xff\xfe"}[harm])

    with pytest.raises(InputError, match="is damaged: .* make it anew") as error:
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


def test_no_corpus(tmp_path):
    with pytest.raises(InputError, match="is no corpus: it has no meta.json"):
        Corpus(tmp_path)
    with pytest.raises(InputError, match="nothing is no corpus"):
        Corpus(tmp_path / "nothing")


# --- The command ------------------------------------------------------------------------------------------

def test_command(run, tokenizers_dir, source, tmp_path):
    result = run("data.py", "--data", source, "--tokenizer", tokenizers_dir / "gpt2", "--max-tokens", "1e4")
    assert result.returncode == 0, result.stderr
    assert "10,000 tokens" in result.stdout
    assert (tmp_path / result.stdout.splitlines()[-1] / "meta.json").is_file()
    result = run("data.py", "--data", "nothing", "--tokenizer", tokenizers_dir / "gpt2", "--folder", "other")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no data nothing")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("flag, value", [
    *(("--workers", value) for value in ("0", "-1", "1.5", str(2**65), "1025")),
    *(("--max-tokens", value) for value in ("nan", "0", "-3", "1e400", "1e19", "many")),
])
def test_numbers_out_of_range(flag, value):
    with pytest.raises(InputError, match=flag):
        data.parse_args([f"{flag}={value}"])


def test_paths_that_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = data.parse_args(["--folder=~/c", "--data=~/my texts", "--tokenizer=~/t"])
    paths = [args.folder, args.data, args.tokenizer]
    assert paths == [f"{tmp_path}/c", f"{tmp_path}/my texts", f"{tmp_path}/t"]
    assert data.parse_args(["--data", "owner/name:main"]).data == "owner/name:main"
