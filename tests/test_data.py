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


# --- fetch ------------------------------------------------------------------------------------------------

def test_fetch_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert fetch(tmp_path, "config.json") == tmp_path / "config.json"
    assert fetch(tmp_path, "model.safetensors", required=False) is None
    with pytest.raises(InputError, match="has no model.safetensors"):
        fetch(tmp_path, "model.safetensors")
    for name in (tmp_path / "nowhere", "./nowhere", "../nowhere", "nowhere/", "out"):
        with pytest.raises(InputError, match="no folder"):
            fetch(name, "config.json")


def test_fetch_from_the_hub(hub, tmp_path):
    folder = hub.root / "models" / "someone" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    assert fetch("someone/model", "config.json").read_text() == '{"a": 1}'
    assert fetch("someone/model", "other.json", required=False) is None
    with pytest.raises(InputError, match="other.json of someone/model is not on the Hub"):
        fetch("someone/model", "other.json")
    with pytest.raises(InputError, match="someone/else is neither a folder here nor a model on the Hub"):
        fetch("someone/else", "config.json")
    with pytest.raises(InputError, match="no name"):
        fetch("some one", "config.json")
    hub.gated.add("someone/model")
    with pytest.raises(InputError, match="HF_TOKEN"):
        fetch("someone/model", "weights.bin")
    hub.gated.clear()
    hub.cut.add("weights.bin")
    try:  # the client goes on where the download broke off, or gives up; half a file is never handed out
        path = fetch("someone/model", "weights.bin")
    except InputError:
        path = fetch("someone/model", "weights.bin")
    assert not hub.cut and path.read_bytes() == bytes(range(256)) * 1000


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_no_network(run, tokenizers_dir, tmp_path, env):
    """In a process of its own, as the clients read their settings once; without the pauses between tries."""
    script = "import time, data\ntime.sleep = lambda seconds: None\ndata.run_cli(data.main)"
    (tmp_path / "command.py").write_text(script)
    for args in (["--tokenizer", "someone/model"],
                 ["--tokenizer", tokenizers_dir / "gpt2", "--data", "someone/texts"]):
        result = run(tmp_path / "command.py", *args, HF_HOME=str(tmp_path / "empty"), **env)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        message = result.stderr.splitlines()[-1]
        assert message.startswith("error: ") and args[-1] in message and "Hub cannot be reached" in message
        assert "`python distill.py` needs no Hub" in message


# --- Documents --------------------------------------------------------------------------------------------

def test_stdlib():
    documents = dict(data.stdlib_documents())
    assert list(documents) == sorted(documents) and len(documents) > 300
    assert 5e6 < sum(map(len, documents.values())) < 3e7
    assert "argparse.py" in documents and "json/decoder.py" in documents
    assert not [n for n in documents if "test" in n.split("/") or "site-packages" in n or "idlelib" in n]
    assert [name for name in documents if data.stdlib_held_out(name)][:3] == [
        "asyncio/sslproto.py", "asyncio/subprocess.py", "collections/abc.py"]  # the same on every machine
    pairs = list(data.stdlib_split())
    held_out = {text for name, text in documents.items() if data.stdlib_held_out(name)}
    assert {text for split, text in pairs if split == "val"} == held_out
    splits = [split for split, _ in pairs]
    assert len(pairs) == len(documents) and splits == sorted(splits, reverse=True)  # "val" first


def test_hold_out_by_hash():
    texts = [f"text {i % 9000}" for i in range(10_000)]  # the last thousand are copies of the first
    pairs = list(hold_out(texts))
    assert [text for _, text in pairs] == texts
    splits = {split: {text for s, text in pairs if s == split} for split in ("train", "val")}
    assert not splits["train"] & splits["val"] and pairs[0][0] == "val"
    assert 0.003 < len(splits["val"]) / 9000 < 0.007
    assert [split for split, _ in hold_out(["", "a", "", "b"], 10**9)] == ["val", "train"]


def test_hold_out_of_a_lone_text():
    text = "".join(f"line {i}\n" for i in range(1000))
    (a, val), (b, train) = hold_out([text])
    assert (a, b) == ("val", "train") and train + val == text
    assert train.endswith("\n") and 0.1 <= len(val) / len(text) < 0.102


def write(path, texts, column="text"):
    """The same documents in each of the forms that can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=50)
    else:
        for i, text in enumerate(texts):
            (path.parent / f"{i:04}.txt").write_bytes(text.encode())


def make_texts(n, seed=0):
    """Documents of about 300 characters, no two alike, some with what tends to go wrong."""
    draw = random.Random(seed)
    words = ["def", "return", "self", "\n    ", "\r\n", "<|endoftext|>", "\u00e9", "\u65e5\u672c", "  "]
    return [f"{i} " + " ".join(draw.choice(words) for _ in range(draw.randint(1, 120))) for i in range(n)]


def write_config(folder, config, splits, column="text"):
    """A data set as the Hub has it: a configuration with several splits, declared at the top of README.md."""
    for split, texts in splits.items():
        write(folder / config / f"{split}-00000-of-00001.parquet", texts, column)
    lines = [f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits]
    head = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
    (folder / "README.md").write_text(head + "".join(lines) + "---\n")


def split_ids(tok, pairs):
    """What train.bin and val.bin must hold, put together in the plainest way."""
    pairs = list(pairs)
    return {split: [i for s, text in pairs if s == split for i in [tok.eot, *tok.encode(text)]]
            for split in ("train", "val")}


def test_all_forms_hold_the_same_corpus(tok, hub, tmp_path):
    texts = make_texts(300)
    expected = split_ids(tok, hold_out(texts, one_in=20))
    assert len(expected["val"]) > 1000
    write(tmp_path / "a" / "x.jsonl", texts)
    write(tmp_path / "b" / "x.parquet", texts)
    write(tmp_path / "c" / "x.txt", texts)
    write(tmp_path / "d" / "1.jsonl", texts[:100])
    write(tmp_path / "d" / "sub" / "2.parquet", texts[100:])
    (tmp_path / "d" / "README.md").write_text("not data")
    for source in ("a/x.jsonl", "a", "b/x.parquet", "c", "d"):
        corpus = prepare(str(tmp_path / source), tok, tmp_path / "corpora")
        assert corpus.train.tolist() == expected["train"] and corpus.val.tolist() == expected["val"], source
        assert corpus.meta["complete"] and corpus.meta["train"]["tokens"] == len(corpus.train)
        sizes = [corpus.meta[split]["bytes"] for split in ("train", "val")]
        assert sum(sizes) == sum(len(text.encode()) for text in texts)
        assert corpus.meta["train"]["documents"] + corpus.meta["val"]["documents"] == 300


def test_text_column(tok, tmp_path):
    write(tmp_path / "x.jsonl", make_texts(50), column="content")
    with pytest.raises(InputError, match="line 1 has no column 'text', only .*content.*--text-column"):
        prepare(str(tmp_path / "x.jsonl"), tok, tmp_path)
    assert len(prepare(str(tmp_path / "x.jsonl"), tok, tmp_path, text_column="content").train) > 1000
    with pytest.raises(InputError, match="'id' is int, not text"):
        prepare(str(tmp_path / "x.jsonl"), tok, tmp_path, text_column="id")


def test_a_large_text_file_is_read_in_pieces(tmp_path):
    text = "".join(f"{i} \u00e9\n" for i in range(1_000_000))
    (tmp_path / "x.txt").write_bytes(text.encode())
    pieces = list(data.read_txt(tmp_path / "x.txt", None))
    assert len(pieces) > 2 and "".join(pieces) == text and all(piece.endswith("\n") for piece in pieces)
    (tmp_path / "y.txt").write_bytes(text.encode()[:9_000_000] + b"\xff")
    with pytest.raises(InputError, match="y.txt is not UTF-8 text: see its byte 9000000"):
        list(data.read_txt(tmp_path / "y.txt", None))


def test_hub_data_is_streamed(tok, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(data.batched, "__defaults__", (2**14,))  # small batches for small shards
    texts = make_texts(600)
    folder = hub.root / "datasets" / "someone" / "texts" / "data"
    for shard in range(3):
        write(folder / f"train-{shard:05}-of-00003.parquet", texts[shard * 200:][:200])
    small = prepare("someone/texts", tok, tmp_path / "small", max_tokens=2000)
    assert len(small.train) == 2000 and not small.meta["complete"] and len(small.val) > 0
    assert "someone/texts/data/train-00000-of-00003.parquet" in hub.requests
    assert "someone/texts/data/train-00002-of-00003.parquet" not in hub.requests  # was not needed
    whole = prepare("someone/texts", tok, tmp_path / "whole")
    expected = split_ids(tok, hold_out(texts))
    assert whole.train.tolist() == expected["train"] and whole.val.tolist() == expected["val"]
    assert small.train.tolist() == expected["train"][:2000]


def test_hub_data_with_its_own_validation(tok, hub, tmp_path):
    texts = make_texts(60, seed=1)
    splits = {"train": texts[:40] + [""], "validation": texts[40:50], "test": texts[50:]}
    write_config(hub.root / "datasets" / "someone" / "splits", "main", splits, column="content")
    corpus = prepare("someone/splits:main", tok, tmp_path, text_column="content")
    expected = split_ids(tok, [("train", t) for t in texts[:40]] + [("val", t) for t in texts[40:50]])
    assert corpus.train.tolist() == expected["train"] and corpus.val.tolist() == expected["val"]
    with pytest.raises(InputError, match="main"):
        prepare("someone/splits:other", tok, tmp_path, text_column="content")
    with pytest.raises(InputError, match="no column 'text', only .*content"):
        prepare("someone/splits:main", tok, tmp_path)


def test_hub_data_that_is_not_there(tok, hub, tmp_path):
    with pytest.raises(InputError, match="someone/nothing is neither a file here nor a data set on the Hub"):
        prepare("someone/nothing", tok, tmp_path)
    write(hub.root / "datasets/someone/test-only/data/test-00000-of-00001.parquet", make_texts(5))
    with pytest.raises(InputError, match="no train split, only test"):
        prepare("someone/test-only", tok, tmp_path)


def test_wikitext_is_read_by_article(tok, hub, tmp_path):
    lines = [" \n", " = One = \n", " \n", " First . \n", " = = Part = = \n", " = = = Sub = = = \n", " \n",
             " more \n", " = Two words = \n", " \n", " Second = 2 . \n"]
    rows = ["" if not line.strip() else line for line in lines]  # as the Hub has them
    pages = list(data.wikitext_articles(rows))
    assert "\n".join(["", *pages]).split() == "".join(lines).split() and len(pages) == 2
    assert pages[0] == "".join(lines[1:8])[:-1] and pages[1] == "".join(lines[8:])
    splits = {"train": rows, "validation": rows}
    write_config(hub.root / "datasets" / "Salesforce" / "wikitext", "wikitext-2-raw-v1", splits)
    corpus = prepare("wikitext-2", tok, tmp_path)
    assert corpus.meta["train"]["documents"] == corpus.meta["val"]["documents"] == 2
    expected = [i for page in pages for i in [tok.eot, *tok.encode(page)]]
    assert corpus.train.tolist() == corpus.val.tolist() == expected


# --- prepare ----------------------------------------------------------------------------------------------

@pytest.fixture
def source(tmp_path, monkeypatch):
    """A file of documents, about 1 MB, and batches small enough for some 15 of them."""
    monkeypatch.setattr(data.batched, "__defaults__", (2**16,))
    write(tmp_path / "x.jsonl", make_texts(4000))
    return str(tmp_path / "x.jsonl")


def files_of(corpus):
    return [(corpus.path / f"{split}.bin").read_bytes() for split in ("train", "val")]


def test_workers_change_nothing(source, tok, tmp_path):
    one, two = (prepare(source, tok, tmp_path / str(n), workers=n) for n in (1, 2))
    assert files_of(one) == files_of(two) and one.meta == two.meta and len(one.train) > 300_000


def test_documents_are_not_read_far_ahead(tok):
    taken = itertools.count()
    batches = ([("train", "word " * 100)] for _ in iter(lambda: next(taken), None))  # endless
    for _ in itertools.islice(data.tokenized(batches, tok, workers=2), 10):
        pass
    assert next(taken) < 20


def test_no_held_out_document_is_trained_on(source, tok, tmp_path):
    corpus = prepare(source, tok, tmp_path)
    documents = {}
    for split in ("train", "val"):
        text = tok.decode(getattr(corpus, split)).split("<|endoftext|>")  # cuts within some documents too
        documents[split] = {part for part in text if len(part) > 40}
    assert documents["val"] and not documents["train"] & documents["val"]
    assert corpus.train[0] == corpus.val[0] == tok.eot
    assert (corpus.train == tok.eot).sum() == corpus.meta["train"]["documents"]


def test_a_budget_is_kept_exactly(source, tok, tmp_path):
    whole = prepare(source, tok, tmp_path / "whole")
    part = prepare(source, tok, tmp_path, max_tokens=12_345)
    assert len(part.train) == 12_345 and not part.meta["complete"]
    assert (part.train == whole.train[:12_345]).all() and (part.val == whole.val[:len(part.val)]).all()
    assert (part.train == tok.eot).sum() == part.meta["train"]["documents"]
    stamp = (part.path / "meta.json").stat().st_mtime_ns
    assert prepare(source, tok, tmp_path, max_tokens=12_000).path == part.path  # enough: taken as it is
    assert (part.path / "meta.json").stat().st_mtime_ns == stamp
    assert len(prepare(source, tok, tmp_path, max_tokens=20_000).train) == 20_000
    assert files_of(prepare(source, tok, tmp_path)) == files_of(whole)
    assert prepare(source, tok, tmp_path, max_tokens=10**9).meta["complete"]  # there is no more to be had


KILLED = """
import sys, time, data
data.SAVE_SECONDS, data.batched.__defaults__ = 0, (2**18,)
save, wait = data.save, float(sys.argv[4])
def slow(*args):
    save(*args)
    print(args[0].name, flush=True)
    time.sleep(wait)
data.save = slow
data.prepare(sys.argv[1], data.load_tokenizer(sys.argv[2]), sys.argv[3], workers=int(sys.argv[5]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again(source, tok, tokenizers_dir, tmp_path, monkeypatch, workers):
    whole = prepare(source, tok, tmp_path / "whole")
    args = [source, str(tokenizers_dir / "gpt2"), str(tmp_path), "60", str(workers)]
    process = subprocess.Popen([sys.executable, "-c", KILLED, *args], cwd=REPO, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "progress.json\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    part = tmp_path / (whole.path.name + ".part")
    with open(part / "train.bin", "ab") as file:
        file.write(b"half a document that was written but not yet noted")
    assert not (tmp_path / whole.path.name).exists()  # nothing to use yet
    encoded, encode = [], data.Tokenizer.encode_array
    monkeypatch.setattr(data.Tokenizer, "encode_array", lambda *args: encoded.append(args) or encode(*args))
    again = prepare(source, tok, tmp_path)
    assert files_of(again) == files_of(whole) and again.meta == whole.meta and not part.exists()
    assert 0 < len(encoded) < 3400  # what had been done was not done twice


def test_killed_at_any_other_moment(source, tok, tmp_path, monkeypatch):
    """An exception at each place where a kill could leave something behind."""
    whole = prepare(source, tok, tmp_path / "whole")
    old = prepare(source, tok, tmp_path, max_tokens=5000)
    stamp = (old.path / "meta.json").stat().st_mtime_ns
    places = [(data.os, "fsync"), (data.os, "replace"), (data.shutil, "rmtree"), (Path, "rename")]
    monkeypatch.setattr(data, "SAVE_SECONDS", 0)

    class Killed(BaseException):
        pass

    def die(*args, **kwargs):
        raise Killed

    for place, name in places:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, name, die)
            prepare(source, tok, tmp_path)
        if name != "rename":  # until the new one is complete, the old one stays in use
            assert (old.path / "meta.json").stat().st_mtime_ns == stamp
            assert (prepare(source, tok, tmp_path, max_tokens=5000).train == old.train).all()
    assert files_of(prepare(source, tok, tmp_path)) == files_of(whole)


def fill_disk(monkeypatch, after):
    """So many writes still succeed."""
    calls = itertools.count()

    def fsync(number):
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data, "SAVE_SECONDS", 0)
    monkeypatch.setattr(data.os, "fsync", fsync)


def test_full_disk(source, tok, tmp_path, monkeypatch):
    whole = prepare(source, tok, tmp_path / "whole")
    with monkeypatch.context() as patch:
        fill_disk(patch, after=7)
        with pytest.raises(InputError, match="No space left on device.*start again"):
            prepare(source, tok, tmp_path)
    done = json.loads((tmp_path / (whole.path.name + ".part") / "progress.json").read_text())
    assert done["documents"] > 200  # nothing lost
    assert files_of(prepare(source, tok, tmp_path)) == files_of(whole)


def test_another_tokenizer_or_changed_data_is_noticed(source, tok, tokenizers_dir, tmp_path):
    first = prepare(source, tok, tmp_path)
    other = prepare(source, load_tokenizer(tokenizers_dir / "neox"), tmp_path)
    assert other.meta["tokenizer"] != first.meta["tokenizer"] and len(other.train) != len(first.train)
    for key, value in {"tokenizer": "0" * 16, "source": {"data": "stdlib"}}.items():
        meta = {**first.meta, key: value}
        (first.path / "meta.json").write_text(json.dumps(meta))
        assert prepare(source, tok, tmp_path).meta == first.meta
    with open(source, "a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    assert prepare(source, tok, tmp_path).meta["documents"] == first.meta["documents"] + 1


def test_half_a_corpus_of_other_data_is_not_gone_on_with(source, tok, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(InputError):
        fill_disk(patch, after=7)
        prepare(source, tok, tmp_path)
    write(Path(source), make_texts(4000, seed=1))
    assert files_of(prepare(source, tok, tmp_path)) == files_of(prepare(source, tok, tmp_path / "new"))


@pytest.mark.parametrize("harm", ["no meta.json", "half a meta.json", "half a train.bin", "no val.bin"])
def test_half_a_corpus_is_never_used(source, tok, tmp_path, harm):
    corpus = prepare(source, tok, tmp_path)
    before = files_of(corpus)
    path = corpus.path / harm.split()[-1]
    content = path.read_bytes()
    path.unlink()
    if harm.startswith("half"):
        path.write_bytes(content[:len(content) // 2])
    assert files_of(prepare(source, tok, tmp_path)) == before


def test_two_at_once_build_once(source, tok, tmp_path, monkeypatch):
    builds, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: (builds.append(1), time.sleep(0.2), build(*args)))
    threads = [threading.Thread(target=prepare, args=(source, tok, tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and prepare(source, tok, tmp_path).meta["complete"]


@pytest.mark.parametrize("name, content, message", [
    ("x.txt", b"", "no text"),
    ("x.txt", b"only one line", "no text for train"),
    ("x.txt", b"abc\n\xff\xfe", "see its byte 4"),
    ("x.jsonl", b"", "no text"),
    ("x.jsonl", b'{"text": "one document, of one line"}', "no text for train"),
    ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2 is not JSON"),
    ("x.jsonl", b'{"text": "a"}\n["b"]', "line 2 has no column"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "b\xff"}', "line 2 is not JSON"),
    ("x.parquet", b"PAR1 and then nothing of the kind", "cannot be read as parquet"),
    ("x.csv", b"text\n1\n", "no .txt, .jsonl, .parquet file"),
])
def test_bad_files(tok, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        prepare(str(tmp_path / name), tok, tmp_path / "corpora")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_data_and_large_vocabulary(tok, tmp_path):
    with pytest.raises(InputError, match="no data wikitext-104: there is stdlib, openwebtext, "):
        prepare("wikitext-104", tok, tmp_path)
    tok.vocab_size = 2**16 + 1
    with pytest.raises(InputError, match="65537"):
        prepare("stdlib", tok, tmp_path)


def test_a_name_of_ours_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pile", "owner/name"):
        write(tmp_path / name / "x.txt", ["a", "b"])
    assert "files" not in data.open_data("pile")[0] and "files" in data.open_data("owner/name")[0]


def test_unwritable_folder(tok, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        prepare(source, tok, tmp_path / "file")


def test_command(run, tokenizers_dir, source, tmp_path):
    result = run("data.py", "--data", source, "--tokenizer", tokenizers_dir / "gpt2", "--max-tokens", "1e4")
    assert result.returncode == 0, result.stderr
    assert "10,000 tokens" in result.stdout and (tmp_path / "corpora").is_dir()
    for args, message in ((["--data", "nothing"], "no data nothing"), (["--workers", "0"], "at least 1")):
        result = run("data.py", "--tokenizer", tokenizers_dir / "gpt2", *args)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr


def test_ctrl_c_is_exit_code_130(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        data.run_cli(main)
    assert stop.value.code == 130


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


def test_the_stand_in_stops(tmp_path):
    hub = FakeHub(tmp_path)
    hub.close()
