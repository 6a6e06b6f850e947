"""support/documents.py, support/readers.py: what --data can name, what is held out, and all bad files."""
import gzip
import importlib.util
import json
import os
import random
import subprocess

import pytest
from texts import make_texts, write

from data import load_tokenizer, prepare
from support import corpus, documents, readers
from support.cli import InputError
from support.documents import hold_out, open_data
from support.wikitext import wikitext_articles

WITH_ZSTD = importlib.util.find_spec("zstandard") is not None


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


def by_split(pairs):
    """Pairs (split, text) -> {"train": texts, "val": texts}."""
    pairs = list(pairs)
    return {split: [text for s, text in pairs if s == split] for split in ("train", "val")}


def read(path, column="text"):
    return "".join(text for _, text in open_data(str(path), column).documents)


def refusal(path, column="text"):
    """The one line that reading a file ends in."""
    with pytest.raises(InputError) as error:
        read(path, column)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


# --- The standard library ---------------------------------------------------------------------------------

def test_stdlib():
    modules = dict(documents.stdlib_documents())
    assert list(modules) == sorted(modules) and len(modules) > 300
    assert 5e6 < sum(map(len, modules.values())) < 3e7
    assert "argparse.py" in modules and "json/decoder.py" in modules
    assert not [n for n in modules if "test" in n.split("/") or "site-packages" in n or "idlelib" in n]
    assert [name for name in modules if documents.stdlib_held_out(name)][:3] == [
        "asyncio/sslproto.py", "asyncio/subprocess.py", "collections/abc.py"]  # the same on every machine

    pairs = list(documents.stdlib_split())
    held_out = {text for name, text in modules.items() if documents.stdlib_held_out(name)}
    assert {text for split, text in pairs if split == "val"} == held_out
    splits = [split for split, _ in pairs]
    assert len(pairs) == len(modules) and splits == sorted(splits, reverse=True)  # "val" first


# --- What is held out -------------------------------------------------------------------------------------

MANY_SIZES = [int(300 * random.Random(i).paretovariate(1.1)) for i in range(3000)]


@pytest.mark.parametrize("sizes", [
    [20_000], [100_000], [4_300_000], [5_300_000], [8_500_000], [10_000, 10_000], [1_000_000, 1_000],
    [1_000, 1_000_000], [500_000] * 2, [300, 3_000_000, 40, 70_000, 9], [10_000] * 10, [10_000] * 100,
    [300] * 1000, MANY_SIZES,
], ids=lambda sizes: f"{len(sizes)}x{sizes[0]}")
def test_one_character_in_twenty_is_held_out(tmp_path, sizes):
    draw = random.Random(0)
    lines = ["".join(draw.choices("abcdef ", k=59)) + "\n" for _ in range(1000)]
    texts = ["".join(draw.choices(lines, k=size // 60 + 1))[:size] for size in sizes]
    suffix = ".txt" if len(sizes) == 1 else ".jsonl"
    path = tmp_path / f"x{suffix}"
    if suffix == ".txt":
        path.write_text(texts[0])
    else:
        write(path, texts)

    pairs = list(open_data(str(path)).documents)
    held_out = sum(len(text) for split, text in pairs if split == "val")
    assert 0.04 < held_out / sum(sizes) < 0.08
    assert "".join(text for _, text in pairs) == "".join(texts)


def test_one_character_in_200_of_the_hubs_data():
    texts = [f"{i} " + "x" * (i % 700) for i in range(20_000)]
    found = by_split(hold_out(texts))
    assert 0.0045 < sum(map(len, found["val"])) / sum(map(len, texts)) < 0.0055
    assert found["val"][0] == texts[0]  # so there is something, however few tokens are asked for


def test_copies_stay_together():
    texts = [f"text {i % 9000} of many\n" * 9 for i in range(10_000)]  # the last thousand are copies
    found = by_split(hold_out(texts, one_in=20))
    assert not set(found["val"]) & set(found["train"])
    assert len(found["val"] + found["train"]) == 10_000


def test_copies_stay_together_when_there_are_too_many_texts_to_remember(monkeypatch):
    monkeypatch.setattr(documents, "REMEMBERED", 1000)
    texts = [f"text {i % 60_000} of many" for i in range(70_000)]
    found = by_split(hold_out(texts, one_in=20))
    assert not set(found["val"]) & set(found["train"])
    assert 0.045 < len(found["val"]) / 70_000 < 0.055


def test_what_is_copied_without_end_is_not_all_held_out():
    found = by_split(hold_out(["the same again\n" * 10] * 1000, one_in=20, longest=512))
    assert 0.04 < len(found["val"]) / 1000 < 0.11
    texts = [f"{'the same start ' * 100}{i}\n" for i in range(50)]  # the same pieces are no copies of a text
    assert sum(map(len, by_split(hold_out(texts, 20, 512))["val"])) < 0.07 * sum(map(len, texts))


def test_pieces_are_of_whole_lines_or_words():
    assert list(documents.pieces("one\ntwo three\n", 8)) == ["one\n", "two ", "three\n"]
    assert list(documents.pieces("abcdefgh", 3)) == ["abc", "def", "gh"]
    pairs = list(hold_out(["".join(f"line {i}\n" for i in range(1000))], 20, longest=200))
    assert all(text.endswith("\n") for _, text in pairs)
    assert all(a != b for (a, _), (b, _) in zip(pairs, pairs[1:], strict=False))  # neighbours are joined


# --- Files ------------------------------------------------------------------------------------------------

def test_a_large_text_file_is_read_in_blocks(tmp_path):
    text = "".join(f"{i} \u00e9\n" for i in range(1_000_000))
    (tmp_path / "x.txt").write_bytes(text.encode())
    blocks = list(readers.read_txt(tmp_path / "x.txt"))
    assert len(blocks) > 2 and "".join(blocks) == text and all(block.endswith("\n") for block in blocks)
    one_line = text.replace("\n", "\u20ac")
    (tmp_path / "y.txt").write_bytes(one_line.encode())
    blocks = list(readers.read_txt(tmp_path / "y.txt"))
    assert "".join(blocks) == one_line and max(map(len, blocks)) < 5_000_000


def test_wrong_encodings_name_the_byte_and_what_mends_it(tmp_path):
    text = "".join(f"{i} \u00e9\n" for i in range(1_000_000)).encode()
    path = tmp_path / "a b.txt"
    contents = {9_000_000: text[:9_000_000] + b"\xff", 5: b"\xef\xbb\xbfab\xe9 c", 2: b"ab\xc3"}
    for byte, content in contents.items():
        path.write_bytes(content)
        assert f"a b.txt is not UTF-8 text: see its byte {byte};" in refusal(path)
        assert f"iconv -f WINDOWS-1252 -t UTF-8 '{path}' > '{tmp_path}/a b-utf8.txt'" in refusal(path)
    path.write_bytes("one word".encode("utf-16"))
    assert "is UTF-16, not UTF-8" in refusal(path) and "iconv -f UTF-16 -t UTF-8" in refusal(path)
    path.write_bytes("one word".encode("utf-32"))
    assert "iconv -f UTF-32 -t UTF-8" in refusal(path)
    path.write_bytes("one word".encode("utf-16-le"))
    assert "its byte 1 is NUL" in refusal(path) and "iconv -f UTF-16LE -t UTF-8" in refusal(path)


def test_the_command_that_mends_an_encoding_does(tmp_path):
    path = tmp_path / "x y.txt"
    path.write_bytes("caf\u00e9\n".encode("utf-16"))
    subprocess.run(refusal(path).split("UTF-16: ")[1], shell=True, check=True)
    assert read(tmp_path / "x y-utf8.txt") == "caf\u00e9\n"


def test_a_byte_order_mark_is_not_text(tmp_path):
    rows = '{"text": "one"}\n{"text": "two"}\n'
    for name, content in (("x.txt", "onetwo"), ("x.jsonl", rows),
                          ("x.json", '[{"text": "one"}, {"text": "two"}]')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read(tmp_path / name) == "onetwo"
    (tmp_path / "x.txt").write_text("a\ufeffb", encoding="utf-8")
    assert read(tmp_path / "x.txt") == "a\ufeffb"  # elsewhere it is a character


@pytest.mark.parametrize("name", ["x.txt.gz", "x.md.gz", "x.jsonl.gz", "X.TXT", "X.JSONL", "x.md", "x.json",
                                  "x.tex", "x.py", "x", "x.JSON.GZ", "x.jsonl.zst", "x.txt.zst"])
def test_kinds_of_files(tmp_path, name):
    rows = [{"text": "one\n"}, {"text": None}, {"text": "two\n"}]
    contents = {"jsonl": "\n".join(map(json.dumps, rows)), "json": json.dumps(rows)}
    content = contents.get(f"{name}.".lower().split(".")[1], "one\ntwo\n")
    path = tmp_path / name
    path.write_bytes(content.encode())
    if name.lower().endswith(".gz"):
        path.write_bytes(gzip.compress(content.encode(), mtime=0))
    if name.endswith(".zst"):
        if not WITH_ZSTD:
            assert "pip install zstandard" in refusal(path)
            return
        import zstandard
        halves = content.encode()[:5], content.encode()[5:]  # a file can be several frames
        path.write_bytes(b"".join(map(zstandard.compress, halves)))
    assert read(path) == "one\ntwo\n"


@pytest.mark.parametrize("name, content, message", [
    ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl, line 2 is not JSON"),
    ("x.jsonl", b'{"text": "a"}\n["b"]', "line 2 is no JSON object with 'text' in it, but ['b']"),
    ("x.jsonl", b"null", "line 1 is no JSON object"),
    ("x.jsonl", b"42", "line 1 is no JSON object with 'text' in it, but 42"),
    ("x.jsonl", b'"' + b"letters " * 10**5 + b'"', "line 1 is no JSON object with 'text' in it, but 'let"),
    ("x.jsonl", b'{"text": "a"}\n{"text": "b\xff"}', "x.jsonl is not UTF-8 text: see its byte 25;"),
    ("x.jsonl", b"[" * 10**6, "line 1 is"),
    ("x.jsonl", b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}", "'text' is list, not text"),
    ("x.jsonl", b"\0\0\0", "line 1 is not JSON"),
    ("x.jsonl", b'{"text": 1' + b"0" * 5000 + b"}", "line 1 "),
    ("x.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16, not UTF-8"),
    ("x.jsonl", json.dumps({f"column {i}": 1 for i in range(9999)}).encode(), "has no column 'text', only ["),
    ("x.json", b'{"text": "a"}', "is not a list of JSON objects"),
    ("x.json", b'{"text": "a"}\n{"text": "b"}', "call it .jsonl"),
    ("x.json", b'[{"text": "a"}, 3]', "row 2 is no JSON object with 'text' in it, but 3"),
    ("x.parquet", b"", "cannot be read as parquet"),
    ("x.parquet", b"PAR1 and then nothing of the kind", "cannot be read as parquet"),
    ("x.parquet", b"PAR1" + b"\0" * 50 + b"\xff\xff\xff\x7fPAR1", "cannot be read as parquet"),
    ("x.parquet.gz", b"", "unpack it first"),
    ("x.txt.gz", b"plain text", "x.txt.gz cannot be read: Not a gzipped file"),
    ("x.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-20], "x.txt.gz cannot be read:"),
    ("x.csv", b"text\n1\n", "is a table: write its column of texts as .jsonl"),
])
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


def test_damaged_parquet(tmp_path):
    """Whatever byte is wrong: one line, or texts."""
    write(tmp_path / "x.parquet", make_texts(60))
    content = (tmp_path / "x.parquet").read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        kept = draw.choice([len(content), draw.randrange(len(content))])
        (tmp_path / "y.parquet").write_bytes(damaged[:kept])
        try:
            read(tmp_path / "y.parquet")
        except InputError as error:
            refused += 1
            assert "y.parquet" in str(error)
    assert refused > 50


def test_columns(tmp_path):
    for name in ("x.jsonl", "x.parquet"):
        write(tmp_path / name, make_texts(9), column="content")
        assert "no column 'text', only ['id', 'content']: see --text-column" in refusal(tmp_path / name)
        assert read(tmp_path / name, "content") == "".join(make_texts(9))
        assert "'id' is int, not text" in refusal(tmp_path / name, "id")


def test_a_line_of_100_mb_is_many_documents(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a word " * 2_000_000}))
    pairs = list(open_data(str(tmp_path / "x.jsonl")).documents)
    assert max(len(text) for _, text in pairs) <= documents.LONGEST
    assert sum(len(text) for _, text in pairs) == 14_000_000


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_json_too_large_to_be_parsed_at_once(tmp_path, monkeypatch, name):
    """A small .gz can unpack to any size."""
    monkeypatch.setattr(readers, "LARGEST_JSON", 1000)
    path = tmp_path / name

    def fill(size):
        empty = b'{"text": ""}\n' if "jsonl" in name else b'[{"text": ""}]'
        content = empty.replace(b'""', b'"' + b"a" * (size - len(empty)) + b'"')
        path.write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)

    fill(1000)
    assert len(read(path)) in (986, 987)
    fill(1001)
    assert "in one piece: write it as .jsonl" in refusal(path)


def test_few_rows_of_a_table_are_in_memory_at_a_time(tmp_path):
    """A file of 2 kB: one long text, for which each of many rows stands."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    rows = pa.array(["x" * 2**22]).dictionary_encode().take(pa.array([0] * 300))
    pq.write_table(pa.table({"text": rows}), tmp_path / "x.parquet", compression="zstd",
                   dictionary_pagesize_limit=2**24, store_schema=False)
    del rows
    before = pa.total_allocated_bytes()
    assert (tmp_path / "x.parquet").stat().st_size < 4000
    texts = readers.read_file(tmp_path / "x.parquet")
    assert len(next(texts)) == 2**22
    assert pa.total_allocated_bytes() < before + 20 * 2**22


# --- Folders ----------------------------------------------------------------------------------------------

def fill(folder, names):
    """Files that each hold two lines with their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = f"{name} 1\n{name} 2\n"
        path.write_text(json.dumps({"text": line}) if path.suffix == ".jsonl" else line)


def names_in(texts):
    return sorted({line.rsplit(" ", 1)[0] for text in texts for line in text.splitlines()})


def test_what_is_read_of_a_folder(tmp_path, capsys):
    taken = ["B.TXT", "a.txt", "c.md", "sub/d.jsonl", "sub/deeper/e.txt"]
    hidden = ["._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "sub/.git/x.txt"]
    fill(tmp_path, [*taken, *hidden, "p.py", "q.PY", "meta.json", "LICENSE"])
    (tmp_path / "f.txt").mkdir()
    (tmp_path / "g.txt").symlink_to("nowhere")
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    found = by_split(open_data(str(tmp_path)).documents)
    assert names_in(found["train"] + found["val"]) == taken
    note = capsys.readouterr().err.strip()
    assert note.splitlines() == [note]
    assert note.startswith(f"note: {tmp_path}: 5 files (3 .txt, 1 .md, 1 .jsonl)")
    for left_out in ("3 hidden", "2 .py", "1 .json", "1 without an ending", "2 broken links", "1 no regular"):
        assert left_out in note.split("; left out: ")[1]


def test_linked_folders_are_read_once(tmp_path):
    fill(tmp_path, ["far/a.txt", "here/b.txt"])
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "here" / "other-link").symlink_to(tmp_path / "far")
    found = by_split(open_data(str(tmp_path / "here")).documents)
    assert "".join(sorted(found["train"] + found["val"])).count("far/a.txt 1") == 1


@pytest.mark.parametrize("names, train, val", [
    (["train.txt", "valid.txt", "test.txt"], ["train.txt"], ["valid.txt"]),
    (["a.txt", "train/x.txt", "train/y.txt", "validation/z.md"], ["train/x.txt", "train/y.txt"],
     ["validation/z.md"]),
    (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "dev-00000-of-00001.jsonl"],
     ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], ["dev-00000-of-00001.jsonl"]),
    (["book.txt", "Val.txt", "test/c.txt"], ["book.txt"], ["Val.txt"]),
    (["train/valid.txt", "train/1.txt"], ["train/1.txt"], ["train/valid.txt"]),
])
def test_files_called_by_a_split_mean_it(tmp_path, capsys, names, train, val):
    fill(tmp_path, names)
    pairs = list(open_data(str(tmp_path)).documents)
    found = by_split(pairs)
    assert (names_in(found["train"]), names_in(found["val"])) == (train, val)
    assert pairs[0][0] == "val"  # all of it, however few tokens are asked for
    note = capsys.readouterr().err
    assert f"by their names {len(train)} to train on and {len(val)} held out" in note
    assert ("1 called test" in note) == any("test" in name for name in names)
    assert ("1 of no split" in note) == ("a.txt" in names)


def test_train_and_test_without_validation(tmp_path):
    fill(tmp_path, ["train.txt", "test.txt"])
    (tmp_path / "train.txt").write_text("train.txt word\n" * 9999)
    found = by_split(open_data(str(tmp_path)).documents)
    assert names_in(found["train"]) == names_in(found["val"]) == ["train.txt"]
    assert 0.04 < sum(map(len, found["val"])) / (15 * 9999) < 0.07


def test_names_that_only_start_like_a_split(tmp_path):
    names = ["latest.txt", "test-drive.txt", "trainer.txt", "developer.md", "validity.txt"]
    fill(tmp_path, names)
    found = by_split(open_data(str(tmp_path)).documents)
    assert names_in(found["train"] + found["val"]) == sorted(names)


def test_folders_with_nothing_to_read(tmp_path):
    fill(tmp_path, ["a.py", "b.py", ".c.txt"])
    message = f"{tmp_path}: no .txt, .md, .jsonl, .parquet file to train on there; left out: 2 .py, 1 hidden"
    assert refusal(tmp_path) == message
    fill(tmp_path / "only", ["test.txt"])
    assert "left out: 1 called test" in refusal(tmp_path / "only")


def test_what_is_not_there(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, ["my_texts/books/a.txt"])
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo("pipe")
    for name, message in {
        "": "no data : there is stdlib, openwebtext, ",
        "xyz": "no data xyz: there is stdlib, openwebtext, ",
        "wikitext-104": "no data wikitext-104 (did you mean wikitext-103?): there is stdlib, openwebtext, ",
        "my_text": "did you mean my_texts?",
        "my_texts/boks": "did you mean my_texts/books?",
        "no/file.txt": "no data no/file.txt: there is",
        "a" * 5000: "no data aaa",
        "link": "link is a link to what is not there",
        "loop": "loop is a link to what is not there",
        "pipe": "pipe is neither a file nor a folder",
    }.items():
        requests = len(hub.requests)
        with pytest.raises(InputError) as error:
            open_data(name)
        assert message in str(error.value) and len(hub.requests) == requests


def test_files_that_vanish_or_cannot_be_read(tmp_path, monkeypatch):
    fill(tmp_path, ["a.txt", "b.txt"])
    source = open_data(str(tmp_path))
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match="b.txt cannot be read: No such file"):
        list(source.documents)

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(InputError, match="a.txt: Permission denied"):
        patch.setattr(documents.Path, "stat", refuse)
        documents.open_local(tmp_path / "a.txt", "text")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="Permission denied"):
        patch.setattr(os, "scandir", refuse)
        open_data(str(tmp_path))


def test_a_name_of_ours_is_not_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pile", "owner/name"):
        write(tmp_path / name / "x.txt", ["a", "b"])
    assert "files" not in open_data("pile").identity
    assert "files" in open_data("owner/name").identity


# --- The Hub ----------------------------------------------------------------------------------------------

def write_config(folder, config, splits, column="text"):
    """A data set as the Hub has it: a configuration with several splits, declared at the top of README.md."""
    for split, texts in splits.items():
        write(folder / config / f"{split}-00000-of-00001.parquet", texts, column)
    lines = [f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits]
    head = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
    (folder / "README.md").write_text(head + "".join(lines) + "---\n")


def split_ids(tok, pairs):
    """What train.bin and val.bin must hold, put together in the plainest way."""
    found = by_split(pairs)
    return {split: [i for text in found[split] for i in [tok.eot, *tok.encode(text)]] for split in found}


def test_hub_data_is_streamed(tok, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_CHARS", 2**14)  # small batches for small shards
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


@pytest.mark.parametrize("name", ["validation", "dev"])
def test_hub_data_with_its_own_validation(tok, hub, tmp_path, capsys, name):
    texts = make_texts(60, seed=1)
    splits = {"train": texts[:40] + [""], name: texts[40:50], "test": texts[50:]}
    if name == "dev":  # the library calls a file dev-* validation, unless a README says otherwise
        assert "validation" not in splits
    write_config(hub.root / "datasets" / "someone" / f"splits-{name}", "main", splits, column="content")
    data = f"someone/splits-{name}:main"
    made = prepare(data, tok, tmp_path, text_column="content")
    expected = split_ids(tok, [("train", t) for t in texts[:40]] + [("val", t) for t in texts[40:50]])
    assert made.train.tolist() == expected["train"] and made.val.tolist() == expected["val"]
    assert f"note: someone/splits-{name}: its split {name} is held out" in capsys.readouterr().err
    with pytest.raises(InputError, match="main"):
        prepare(f"someone/splits-{name}:other", tok, tmp_path, text_column="content")
    with pytest.raises(InputError, match="no column 'text', only .*content"):
        prepare(data, tok, tmp_path)


def test_hub_data_that_is_not_there(tok, hub, tmp_path):
    with pytest.raises(InputError, match="someone/nothing is neither a file here nor a data set on the Hub"):
        prepare("someone/nothing", tok, tmp_path / "corpora")
    assert not (tmp_path / "corpora").exists()
    write(hub.root / "datasets/someone/test-only/data/test-00000-of-00001.parquet", make_texts(5))
    with pytest.raises(InputError, match="no train split, only test"):
        prepare("someone/test-only", tok, tmp_path)


def test_wikitext_is_read_by_article(tok, hub, tmp_path):
    lines = [" \n", " = One = \n", " \n", " First . \n", " = = Part = = \n", " = = = Sub = = = \n", " \n",
             " more \n", " = Two words = \n", " \n", " Second = 2 . \n"]
    rows = ["" if not line.strip() else line for line in lines]  # as the Hub has them
    pages = list(wikitext_articles(rows))
    assert "\n".join(["", *pages]).split() == "".join(lines).split() and len(pages) == 2
    assert pages[0] == "".join(lines[1:8])[:-1] and pages[1] == "".join(lines[8:])
    splits = {"train": rows, "validation": rows}
    write_config(hub.root / "datasets" / "Salesforce" / "wikitext", "wikitext-2-raw-v1", splits)
    made = prepare("wikitext-2", tok, tmp_path)
    assert made.meta["train"]["documents"] == made.meta["val"]["documents"] == 2
    expected = [i for page in pages for i in [tok.eot, *tok.encode(page)]]
    assert made.train.tolist() == made.val.tolist() == expected
