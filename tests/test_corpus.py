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

