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


# --- Tokenizer --------------------------------------------------------------------------------------------

TEXTS = {
    "prose": "It's the dogs' day, isn't it? They'll say we've 3 of 1,000. \u201cNa\u00efve\u201d caf\u00e9s; "
             "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \U0001f600\U0001f468\u200d\U0001f469",
    "code": "def f(x):\n    if x:\n        return [\n" + " " * 31 + "1,\n\t\t  2 ]  # two\n\n\n    \n  end  ",
    "decomposed": "Cafe\u0301 e\u0301\u0323 \u1e9b\u0323 \u212b \u1100\u1161\u11a8 o\u0308\u0304",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x85\x9f\xa0\ufeff\u2028\u2029\u200b",
    "crlf": "one\r\n\r\n  two\r\n\rthree\r \r\n    four",
    "special": "a<|endoftext|>b <|endoftext|> <|padding|>  <|endoftext|><|endof text|><|endoftext",
    "empty": "", "space": " ", "spaces": "  ", "blank lines": "\n \n  \n   \n",
}


@FORMS
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_equal_the_reference(tokenizers_dir, form, text):
    ours, reference = pair(tokenizers_dir, form)
    assert ours.encode(text, allow_special=True) == reference(text)


@FORMS
def test_ids_equal_the_reference_on_random_mixtures(tokenizers_dir, form):
    ours, reference = pair(tokenizers_dir, form)
    draw = random.Random(0)
    parts = [" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "word", "'ll", "'", "7", "\u00e9", "e\u0301",
             "\u4e2d", "!", "x  y", "<|endoftext|>", "<|padding|>", "\x1c", "\x85"]
    for _ in range(3000):
        length = draw.randint(1, 12)
        text = "".join(draw.choice(parts) * draw.choice([1, 1, 1, 2, 3, 26]) for _ in range(length))
        assert ours.encode(text, allow_special=True) == reference(text), repr(text)


@FORMS
def test_ids_equal_the_reference_on_every_code_point(tokenizers_dir, form):
    ours, reference = pair(tokenizers_dir, form)
    points = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for chunk in (points[start:start + 512] for start in range(0, len(points), 512)):
        if ours.encode("".join(chunk)) != reference("".join(chunk)):  # then look at each of them
            bad = [c for c in chunk if ours.encode(f"a{c} {c}") != reference(f"a{c} {c}")]
            categories = {unicodedata.category(c) for c in bad}  # new ones in one of the two Unicode tables
            assert form == "neox" and categories <= {"Mn", "Cn"}


@FORMS
@pytest.mark.parametrize("run", [" ", "\n", "\r\n", "\t \n"])
def test_a_million_of_whitespace(tokenizers_dir, form, run):
    ours, reference = pair(tokenizers_dir, form)
    text = "x" + run * (1_200_000 // len(run)) + "y"
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    if run in " \n":
        assert ids == reference(text)  # the cuts leave no trace


@FORMS
def test_round_trip_of_arbitrary_bytes(tokenizers_dir, form):
    ours = load_tokenizer(tokenizers_dir / form)
    for seed in range(50):
        text = random.Random(seed).randbytes(300).decode("latin-1")
        expected = unicodedata.normalize("NFC", text) if form == "neox" else text
        assert ours.decode(ours.encode(text)) == expected
    single = {ours.decode_bytes([i]) for i in range(ours.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single
    assert ours.decode_bytes([ours.vocab_size + 7]) == b""  # models pad their vocabulary


@FORMS
def test_text_never_makes_special_ids(tokenizers_dir, form):
    ours = load_tokenizer(tokenizers_dir / form)
    assert ours.eot not in ours.encode(TEXTS["special"])
    assert ours.decode(ours.encode(TEXTS["special"])) == TEXTS["special"]
    assert ours.encode("<|endoftext|>", allow_special=True) == [ours.eot]


def test_half_a_surrogate_pair_is_replaced(tok):
    assert tok.decode(tok.encode("a\ud83db")) == "a?b"


@FORMS
def test_saved_tokenizer_opens_in_transformers(tokenizers_dir, form, tmp_path):
    from transformers import AutoTokenizer
    ours = load_tokenizer(tokenizers_dir / form)
    ours.save(tmp_path)
    architecture = {"gpt2": "gpt2", "neox": "gpt_neox"}[form]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS.values():
        assert theirs(text)["input_ids"] == ours.encode(text, allow_special=True)
    assert theirs.eos_token_id == ours.eot and theirs.decode(ours.encode(TEXTS["code"])) == TEXTS["code"]
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint


@FORMS
def test_fingerprint_is_of_the_ids_not_of_the_file(tokenizers_dir, form):
    spec = json.loads((tokenizers_dir / form / "tokenizer.json").read_text(encoding="utf-8"))

    def fingerprint(indent=None, **changes):
        return data.Tokenizer(json.dumps({**spec, **changes}, indent=indent).encode()).fingerprint

    vocab = spec["model"]["vocab"]
    a, b = list(vocab)[-3:-1]
    swapped = {**spec["model"], "merges": [], "vocab": {**vocab, a: vocab[b], b: vocab[a]}}
    other = {"type": "NFC"} if spec["normalizer"] is None else None
    assert fingerprint(indent=7) == load_tokenizer(tokenizers_dir / form).fingerprint
    assert len({fingerprint(), fingerprint(normalizer=other), fingerprint(model=swapped)}) == 3


@pytest.mark.parametrize("path, value, named", [
    ("normalizer", {"type": "NFKC"}, "normalizer.type 'NFKC'"),
    ("normalizer", {"type": "Sequence", "normalizers": []}, "Sequence"),
    ("pre_tokenizer", {"type": "Metaspace"}, "Metaspace"),
    ("pre_tokenizer", None, "pre_tokenizer.type None"),
    ("pre_tokenizer/add_prefix_space", True, "add_prefix_space"),
    ("pre_tokenizer/use_regex", False, "use_regex"),
    ("model/type", "WordPiece", "WordPiece"),
    ("model/dropout", 0.1, "dropout"),
    ("model/byte_fallback", True, "byte_fallback"),
    ("model/continuing_subword_prefix", "##", "##"),
    ("model/merges", "reversed", "another order than the merges'"),
    ("model/vocab/!", "remove", "no token for the byte 33"),
    ("post_processor", {"type": "TemplateProcessing"}, "TemplateProcessing"),
    ("added_tokens/0/lstrip", True, "lstrip"),
    ("added_tokens/0/content", "<eos>", "<|endoftext|>"),
    ("added_tokens/0/special", False, "<|endoftext|>"),
    ("model", None, "no tokenizer.json"),
])
def test_a_tokenizer_that_is_not_implemented(tokenizers_dir, tmp_path, path, value, named):
    spec = json.loads((tokenizers_dir / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    place = spec
    for key in parents:
        place = place[key]
    place[last] = place[last][::-1] if value == "reversed" else value
    if value == "remove":
        del place[last]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_trained_tokenizer(tok):
    assert tok.eot == tok.vocab_size - 1 == 599
    assert len(tok.encode("def parse_args(self, args=None):")) < 20


# --- The real Hub -----------------------------------------------------------------------------------------

@pytest.mark.hub
@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-70m"])
def test_real_tokenizers(name, real_hub, run, tmp_path):
    script = f"""
import data
from tokenizers import Tokenizer
path = data.fetch({name!r}, "tokenizer.json")
ours, reference = data.load_tokenizer({name!r}), Tokenizer.from_file(str(path))
texts = [text for _, text in data.stdlib_documents()][:100]
assert all(ours.encode(text, allow_special=True) == reference.encode(text).ids for text in texts)
"""
    (tmp_path / "script.py").write_text(script)
    result = run(tmp_path / "script.py", **real_hub)
    assert result.returncode == 0, result.stderr