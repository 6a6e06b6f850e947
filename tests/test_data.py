"""data.py: ids against Hugging Face's own tokenizers, corpora on disk, batches, every kind of bad input."""
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from fakehub import FakeHub

import data
from data import InputError, batch_at, fetch, hold_out, load_tokenizer, prepare

FORMS = pytest.mark.parametrize("form", ["gpt2", "neox"])


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


def pair(tokenizers_dir, form):
    """Our tokenizer and the reference, from the same file."""
    from tokenizers import Tokenizer
    reference = Tokenizer.from_file(str(tokenizers_dir / form / "tokenizer.json"))
    return load_tokenizer(tokenizers_dir / form), lambda text: reference.encode(text).ids


# --- batch_at ---------------------------------------------------------------------------------------------

def test_constant_batches_take_each_token_once_an_epoch():
    tokens = np.arange(1000, dtype=np.uint16)
    targets = []
    for index in range(30):  # 3 epochs of 99 blocks and a bit: batches do not end where epochs do
        ids, following = batch_at(tokens, 7, index, 10, 10)
        assert ids.shape == following.shape == (10, 10) and ids.dtype == following.dtype == np.int64
        assert (following == ids + 1).all()
        targets += following.tolist()
    epochs = [[row[0] for row in targets[e * 99:(e + 1) * 99]] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(1, 991, 10))] * 3
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_batches_are_a_function_of_their_arguments():
    tokens = np.random.default_rng(0).integers(0, 50, 5000).astype(np.uint16)
    first = [batch_at(tokens, 1, i, 4, 16)[0] for i in range(100)]
    data.permutation.cache_clear()
    assert all((batch_at(tokens, 1, i, 4, 16)[0] == first[i]).all() for i in (99, 0, 50))
    assert (batch_at(tokens, 1, 5, 8, 16)[0] == np.concatenate([first[10], first[11]])).all()  # only grouped
    assert not (batch_at(tokens, 2, 0, 4, 16)[0] == first[0]).all()


def test_padded_batches():
    documents = [[0, 5, 6, 7], [0, 8], [0], [0, *range(10, 30)], [0, 9, 9]]
    tokens = np.array([i for document in documents for i in document], np.uint16)
    ids, targets = batch_at(tokens, 3, 0, 4, 8, packing="padded", eot=0)
    lengths = (targets != -100).sum(1)
    seen = [(ids[row, :n].tolist(), targets[row, :n].tolist()) for row, n in enumerate(lengths)]
    assert sorted(seen) == [([0], [8]), ([0, 5, 6], [5, 6, 7]), ([0, 9], [9, 9]),
                    ([0, 10, 11, 12, 13, 14, 15, 16], [10, 11, 12, 13, 14, 15, 16, 17])]
    for row, n in enumerate(lengths):
        assert (ids[row, n:] == 0).all() and (targets[row, n:] == -100).all()


def test_padded_batches_of_a_corpus(source, tok, tmp_path):
    corpus = prepare(source, tok, tmp_path)
    n = corpus.meta["train"]["documents"]
    first = [batch_at(corpus.train, 0, i, 1, 64, "padded", tok.eot) for i in range(n)]
    counted = sum(int((targets != -100).sum()) for _, targets in first)
    lengths = np.diff(np.append(np.flatnonzero(corpus.train == tok.eot), len(corpus.train)))
    assert counted == np.minimum(lengths - 1, 64).sum() and all(ids[0, 0] == tok.eot for ids, _ in first)


def test_too_few_tokens_for_a_block():
    with pytest.raises(InputError, match="16 tokens make no block of 16"):
        batch_at(np.zeros(16, np.uint16), 0, 0, 1, 16)
    assert batch_at(np.zeros(17, np.uint16), 0, 0, 1, 16)[0].shape == (1, 16)

