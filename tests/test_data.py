"""data.py: batches as a function of their arguments, corpora opened, the command."""
import hashlib
import json

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
def sorted_pairs(ids, targets):
    return sorted(zip(ids.tolist(), targets.tolist(), strict=True))


def test_constant_batches_take_each_token_once_an_epoch():
    """In a different order each time; batches do not end where epochs do."""
    tokens = np.arange(1000, dtype=np.uint16)
    targets = []
    for index in range(30):  # 3 epochs of 99 blocks and a bit
        ids, following = batch_at(tokens, 7, index, 10, 10)
        assert ids.shape == (10, 10) and ids.dtype == following.dtype == np.int64
        assert (following == ids + 1).all()
        targets += following[:, 0].tolist()
    epochs = [targets[start:start + 99] for start in (0, 99, 198)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(1, 991, 10)]] * 3
    assert sorted(epochs[0]) != epochs[0] != epochs[1] != epochs[2]


def test_batches_are_a_function_of_their_arguments():
    """Otherwise a resumed run would read other text; larger batches only group the same examples."""
    tokens = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint16)
    first = [batch_at(tokens, 1, i, 4, 16)[0] for i in range(100)]
    data.permutation.cache_clear()  # the order is not remembered from call to call, but found again
    assert all((batch_at(tokens, 1, i, 4, 16)[0] == first[i]).all() for i in (99, 0, 50))
    assert (batch_at(tokens, 1, 5, 8, 16)[0] == np.concatenate([first[10], first[11]])).all()
    assert not (batch_at(tokens, 2, 0, 4, 16)[0] == first[0]).all()


def test_the_order_of_data_never_changes():
    """The batches of published runs: another order of the same data would be another run."""
    tokens = (np.arange(20_000) * 7919 % 251).astype(np.uint16)
    for packing, digest in {"constant": "3811f8df96b139b5", "padded": "20f9d06156719452"}.items():
        batches = [batch_at(tokens, 5, index, 6, 32, packing, eot=0) for index in range(120)]
        assert hashlib.sha256(np.array(batches).tobytes()).hexdigest()[:16] == digest, packing


def test_examples_by_hand():
    """As in the docstring. The end of a document is a target, unless it is cut: so a model learns to stop."""
    tokens = np.array([0, 5, 6, 7, 0, 8, 0, 1, 2, 3, 4, 9], np.uint16)
    assert sorted_pairs(*batch_at(tokens, 0, 0, 2, 4)) == [
        ([0, 5, 6, 7], [5, 6, 7, 0]), ([0, 8, 0, 1], [8, 0, 1, 2])]
    assert sorted_pairs(*batch_at(tokens, 0, 0, 3, 4, "padded", eot=0)) == [
        ([0, 1, 2, 3], [1, 2, 3, 4]), ([0, 5, 6, 7], [5, 6, 7, 0]), ([0, 8, 0, 0], [8, 0, -100, -100])]
    assert target_offsets(tokens, 4, "padded", 0).tolist() == [0, 4, 6, 10]

    tokens = np.array([0, 0, 5, 0, *range(40, 43), 0, 9, 9], np.uint16)  # the first document is empty
    ids, targets = batch_at(tokens, 3, 0, 3, 4, packing="padded", eot=0)
    assert sorted_pairs(ids, targets) == [
        ([0, 5, 0, 0], [5, 0, -100, -100]), ([0, 9, 9, 0], [9, 9, 0, -100]),
        ([0, 40, 41, 42], [40, 41, 42, 0])]
    n_targets = np.diff(target_offsets(tokens, 4, "padded", 0))
    assert n_targets[numbers_at(3, 0, 3, 3)].tolist() == (targets != -100).sum(1).tolist()


def test_documents_are_looked_for_once_in_each_array(monkeypatch):
    """In a large corpus that takes seconds; and a different corpus has different documents."""
    arrays = [np.array([0, 5, 6, 0, 7], np.uint16) for _ in range(2)]  # equal, and not the same
    searched = []
    search = np.flatnonzero
    monkeypatch.setattr(np, "flatnonzero", lambda array: searched.append(1) or search(array))
    for i in range(6):
        batch_at(arrays[i % 2], 0, i, 1, 4, "padded", eot=0)
    assert len(searched) == 2


def test_too_few_tokens():
    assert batch_at(np.zeros(17, np.uint16), 0, 0, 1, 16)[0].shape == (1, 16)
    for packing, message in (("constant", "16 tokens are too few"), ("padded", "no document that has any")):
        with pytest.raises(InputError, match=message):
            batch_at(np.zeros(16, np.uint16), 0, 0, 1, 16, packing, eot=0)


# ------------------------------------------------------------------------------------ corpora
def test_broken_corpora_are_one_line_and_made_anew(source, tok, tmp_path):
    """test_mutations.py has many more kinds of damage."""
    corpus = prepare(source, tok, tmp_path)
    assert (corpus.eot, corpus.vocab_size) == (tok.eot, tok.vocab_size)
    train = corpus.train.tolist()
    half = (corpus.path / "train.bin").read_bytes()[:len(train)]
    for name, content in (("meta.json", json.dumps({**corpus.meta, "train": "many"}).encode()),
                          ("meta.json", None), ("train.bin", half), ("val.bin", None)):
        (corpus.path / name).unlink()
        if content is not None:
            (corpus.path / name).write_bytes(content)
        with pytest.raises(InputError, match="is not a complete corpus: "):
            Corpus(corpus.path)
        assert prepare(source, tok, tmp_path).train.tolist() == train

    (tmp_path / "meta.json").write_text('{"title": "my notes"}')  # of the user: not a damaged corpus
    with pytest.raises(InputError, match="is not a complete corpus") as error:
        Corpus(tmp_path)
    assert not any(advice in str(error.value).lower() for advice in ("delete", "damaged", "move it"))


def test_a_corpus_is_known_by_its_content(source, tok, tmp_path):
    """A run is not resumed on other text, even if that has the same tokens in another order."""
    corpus = prepare(source, tok, tmp_path)
    for name in ("train.bin", "val.bin"):
        assert Corpus(corpus.path).fingerprint == corpus.fingerprint
        ids = np.fromfile(corpus.path / name, np.uint16)
        swapped = ids.copy()
        swapped[1:3] = ids[2], ids[1]
        assert swapped[1] != swapped[2]
        swapped.tofile(corpus.path / name)
        assert Corpus(corpus.path).fingerprint != corpus.fingerprint
        ids.tofile(corpus.path / name)

    ids[-1] = 65535
    ids.tofile(corpus.path / name)
    with pytest.raises(InputError, match=f"id 65535 in a vocabulary of {tok.vocab_size}"):
        Corpus(corpus.path)


def test_of_a_large_corpus_a_sample_is_hashed(source, tok, tmp_path):
    """Reading all of OpenWebText would take minutes at each start."""
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
    tokenizer = tokenizers_dir / "gpt2"
    done = run("data.py", "--data", source, "--tokenizer", tokenizer, "--max-tokens", "1e4")
    assert done.returncode == 0, done.stderr
    assert "10,000 tokens" in done.stdout
    assert (tmp_path / done.stdout.splitlines()[-1] / "meta.json").is_file()
    for flag in ("--workers=0", "--workers=1.5", f"--workers={2**65}", "--max-tokens=nan", "--max-tokens=0"):
        with pytest.raises(InputError, match=flag.partition("=")[0]):
            data.parse_args([flag])
