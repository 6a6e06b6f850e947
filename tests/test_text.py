"""support/text.py: what --data can name, what is held out, and files that are not what they seem."""
import bz2
import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from texts import by_split, make_texts, split_ids, write

from data import load_tokenizer, prepare
from support import corpus, text
from support.cli import InputError
from support.text import hold_out, open_data
from support.wikitext import wikitext_articles


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


def read(path, column="text"):
    return "".join(text for _, text in open_data(str(path), column).documents)


def refusal(function, *args, **settings):
    """The one line with which a call is refused."""
    with pytest.raises(InputError) as error:
        function(*args, **settings)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 1000
    return str(error.value)


# ------------------------------------------------------------------------------------ what is held out
def test_stdlib():
    modules = dict(text.stdlib_documents())
    assert "json/decoder.py" in modules and 5e6 < sum(map(len, modules.values())) < 3e7
    assert not [n for n in modules if "test" in n.split("/") or "site-packages" in n or "idlelib" in n]
    held_out = [name for name in modules if text.stdlib_held_out(name)]
    assert held_out[:3] == ["asyncio/sslproto.py", "asyncio/subprocess.py", "collections/abc.py"]
    others = [name for name in sorted(modules) if name not in held_out]
    assert list(text.stdlib_split()) == [  # the same on every machine
        *(("val", modules[name]) for name in held_out), *(("train", modules[name]) for name in others)]


def test_one_character_in_twenty_is_held_out(tmp_path):
    draw = random.Random(0)
    many_sizes = [int(300 * draw.paretovariate(1.1)) for _ in range(1000)]
    lines = ["".join(draw.choices("abcdef ", k=59)) + "\n" for _ in range(1000)]
    for sizes in ([4_300_000], [1_000_000, 1_000], [1_000, 1_000_000], [300] * 1000, many_sizes):
        texts = ["".join(draw.choices(lines, k=size // 60 + 1))[:size] for size in sizes]
        write(tmp_path / "x.jsonl", texts)
        pairs = list(open_data(str(tmp_path / "x.jsonl")).documents)
        held_out = sum(len(text) for split, text in pairs if split == "val")
        assert 0.04 < held_out / sum(sizes) < 0.08, sizes[:9]
        assert "".join(text for _, text in pairs) == "".join(texts)

    texts = [f"{i} " + "x" * (i % 700) for i in range(20_000)]  # of the Hub's data one in 200
    held_out = by_split(hold_out(texts))["val"]
    assert 0.0045 < sum(map(len, held_out)) / sum(map(len, texts)) < 0.0055
    assert held_out[0] == texts[0]  # so there is something, however few tokens are asked for


def test_copies_stay_together(monkeypatch):
    for remembered in (text.REMEMBERED, 1000):  # also when there are too many texts to remember
        monkeypatch.setattr(text, "REMEMBERED", remembered)
        texts = [f"text {i % 9000} of many\n" * 9 for i in range(10_000)]  # the last thousand are copies
        found = by_split(hold_out(texts, one_in=20))
        assert not set(found["val"]) & set(found["train"])
        assert len(found["val"] + found["train"]) == 10_000
        assert 0.04 < len(found["val"]) / 10_000 < 0.06

    found = by_split(hold_out(["the same again\n" * 10] * 1000, one_in=20, longest=512))
    assert 0.04 < len(found["val"]) / 1000 < 0.11  # what is copied without end is not all held out
    texts = [f"{'the same start ' * 100}{i}\n" for i in range(50)]  # the same pieces are no copies of a text
    assert sum(map(len, by_split(hold_out(texts, 20, 512))["val"])) < 0.07 * sum(map(len, texts))


def test_pieces_are_of_whole_lines_or_words():
    assert list(text.pieces("one\ntwo three\n", 8)) == ["one\n", "two ", "three\n"]
    assert list(text.pieces("abcdefgh", 3)) == ["abc", "def", "gh"]
    pairs = list(hold_out(["".join(f"line {i}\n" for i in range(1000))], 20, longest=200))
    assert all(text.endswith("\n") for _, text in pairs)
    assert all(a != b for (a, _), (b, _) in zip(pairs, pairs[1:], strict=False))  # neighbours are joined


# ------------------------------------------------------------------------------------ files
def test_a_large_text_file_is_read_in_blocks(tmp_path):
    path = tmp_path / "x.txt"
    content = "".join(f"{i} \u00e9\n" for i in range(700_000))
    for text_ in (content, content.replace("\n", "\u20ac")):  # also where there is a single line
        path.write_bytes(text_.encode())
        blocks = list(text.read_file(path))
        assert len(blocks) > 1 and "".join(blocks) == text_ and max(map(len, blocks)) < 5_000_000
        assert text_ != content or all(block.endswith("\n") for block in blocks)


def packed(path, content):
    """Write bytes as the ending of the name says."""
    if path.suffix.lower() == ".gz":
        content = gzip.compress(content[:5]) + gzip.compress(content[5:])  # a file can be several parts
    elif path.suffix == ".zst":
        content = b"".join(pa.compress(part, "zstd", asbytes=True) for part in (content[:5], content[5:]))
    path.write_bytes(content)


def test_kinds_of_files(tmp_path):
    rows = [{"text": "one\n"}, {"text": None}, {"text": "two\n"}]
    lines = "\n \n".join(map(json.dumps, rows))
    for names, content in {
        "x x.tex X.TXT x.txt.gz x.txt.zst": "one\ntwo\n",
        "X.JSONL x.ndjson x.ldjson.gz x.jsonl.zst": lines,
        "x.json x.JSON.GZ": json.dumps(rows),
    }.items():
        for name in names.split():
            for mark in ("", "\ufeff"):  # a byte order mark is not text
                packed(tmp_path / name, (mark + content).encode())
                assert read(tmp_path / name) == "one\ntwo\n", name

    for name in ("y.jsonl", "y.parquet"):
        write(tmp_path / name, make_texts(9), column="content")
        assert "no column 'text', only ['id', 'content']: see --text-column" in refusal(read, tmp_path / name)
        assert "'id' is int, not text" in refusal(read, tmp_path / name, "id")
        assert read(tmp_path / name, "content") == "".join(make_texts(9))


def test_json_lines_by_another_name_are_not_taken_for_text(tmp_path):
    lines = "".join(json.dumps({"url": i, "body": f"tale {i}"}) + "\n" for i in range(9))
    for name in ("x.jl", "x", "x.txt.gz"):
        packed(tmp_path / name, lines.encode())
        assert "starts with a JSON object: call it .jsonl" in refusal(read, tmp_path / name, "body")
        assert read(tmp_path / name, column="") == lines  # a way on for whoever wants the JSON itself
    for content in ("{not JSON}\n", "[1]\n[2]\n", "", "prose\n" + lines):
        (tmp_path / "x.txt").write_text(content)
        assert read(tmp_path / "x.txt") == content


REFUSED = [  # name, content, what is said
    ("a.jsonl.bz2", bz2.compress(b'{"text": "one"}\n'), "is packed, a PDF or a parquet file"),
    ("a.jsonl", gzip.compress(b'{"text": "one"}\n'), "is packed, a PDF or a parquet file"),
    ("a.pdf", b"%PDF-1.4\n1 0 obj", "is packed, a PDF or a parquet file"),
    ("a.md", b"\0\1\2", "or is damaged: it has a NUL byte"),
    ("a.csv", b"text\n1\n", "is a table: write its column of texts as .jsonl"),
    ("a.txt", "caf\u00e9\n".encode("UTF-16"), "is not UTF-8 text (iconv -f ENCODING -t UTF-8 FILE > NEW)"),
    ("b.txt", b"ab\xc3", "is not UTF-8 text (iconv -f ENCODING -t UTF-8 FILE > NEW)"),
    ("d.txt.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ("e.jsonl", b'{"text": "a"}\n{"text": ', "e.jsonl, line 2 is not JSON"),
    ("e.jsonl", b'{"text": "a"}\n["b"]', "line 2 has no column 'text', only ['b']: see --text-column"),
    ("e.jsonl", b"[" * 10**6, "line 1 is not JSON"),
    ("e.jsonl", json.dumps({f"column {i}": 1 for i in range(9999)}).encode(), "no column 'text', only ["),
    ("e.json", b'{"text": "a"}', "is not a list of JSON objects (if it has one object per line, call it"),
    ("e.json", b'[{"text": "a"}, 3]', "row 2 has no column 'text', only 3"),
    ("e.parquet", b"PAR1" + b"\0" * 50 + b"\xff\xff\xff\x7fPAR1", "e.parquet"),
    ("f.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-20], "f.txt.gz could not be read: "),
]


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    for name, content, message in REFUSED:
        (tmp_path / name).write_bytes(content)
        assert message in refusal(read, tmp_path / name), name


def test_memory_stays_bounded(tmp_path):
    """A small file can stand for a text of any size."""
    (tmp_path / "named").mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / "named" / name).write_text(json.dumps({"text": "a word " * 1_000_000}))
    lengths = [len(text_) for _, text_ in open_data(str(tmp_path / "named")).documents]
    assert max(lengths) <= text.LONGEST and sum(lengths) == 14_000_000

    rows = pa.array(["x" * 2**22]).dictionary_encode().take(pa.array([0] * 300))
    pq.write_table(pa.table({"text": rows}), tmp_path / "x.parquet", compression="zstd",
                   dictionary_pagesize_limit=2**24, store_schema=False)
    del rows
    before = pa.total_allocated_bytes()
    texts = text.read_file(tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 4000 and len(next(texts)) == 2**22
    assert pa.total_allocated_bytes() < before + 20 * 2**22


# ------------------------------------------------------------------------------------ folders
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
    taken = ["B.TXT", "a.txt", "c.md", "p.py", "q.CPP", "sub/d.jsonl", "sub/deeper/e.txt"]
    hidden = ["._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "sub/.git/x.txt"]
    fill(tmp_path, [*taken, *hidden, "meta.json", "x.csv", "LICENSE"])
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert names_in([read(tmp_path)]) == taken
    note = capsys.readouterr().err.strip()
    assert note.splitlines() == [note] and note.startswith(f"note: {tmp_path}: 3 .txt, ")
    for left_out in ("3 hidden", "1 .json", "1 .csv", "1 without an ending", "2 .txt"):
        assert left_out in note.split("; left out: ")[1]

    fill(tmp_path, ["far/a.txt", "here/b.txt"])  # linked folders are read, and only once
    (tmp_path / "here" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "here" / "other-link").symlink_to(tmp_path / "far")
    assert read(tmp_path / "here").count("far/a.txt 1") == 1

    fill(tmp_path / "empty", ["a.csv", ".c.txt"])
    assert "source file to train on; left out: 1 hidden, 1 .csv" in refusal(read, tmp_path / "empty")


def test_names_of_splits_count_if_every_file_has_one(tmp_path, capsys):
    for i, (train, val, others) in enumerate((
        (["train.txt"], ["valid.txt"], ["test.txt"]),
        (["train/x.txt", "train/y.txt"], ["validation/z.md"], []),
        (["train-00000-of-00001.jsonl"], ["dev-00000-of-00001.jsonl"], ["README.md"]),
        (["train/1.txt"], ["train/valid.txt"], ["prepare.py"]),  # a script beside the data
    )):
        fill(tmp_path / str(i), train + val + others)
        pairs = list(open_data(str(tmp_path / str(i))).documents)
        found = by_split(pairs)
        assert (names_in(found["train"]), names_in(found["val"])) == (train, val)
        assert pairs[0][0] == "val"  # all of it, however few tokens are asked for
        note = capsys.readouterr().err
        assert f"by their names {len(train)} to train on and {len(val)} held out" in note
        assert ("left out: 1 not named train or valid" in note) == bool(others)

    for i, names in enumerate((
        [*(f"note {n}.md" for n in range(9)), "training.md", "dev/a.md"],
        ["train.py", "model.py", "test.py", "sub/c.py"],  # a program
        ["test.txt"],
        ["latest.txt", "test-drive.txt", "trainer.txt", "developer.md"],
    )):
        fill(tmp_path / f"not {i}", names)
        assert names_in([read(tmp_path / f"not {i}")]) == sorted(names)
        assert ("read like the others" in capsys.readouterr().err) == (i < 3)


def test_the_same_data_spelt_another_way(tmp_path, monkeypatch):
    fill(tmp_path, ["texts/a.txt", "x.txt", "pile/x.txt"])
    (tmp_path / "link").symlink_to("texts")
    monkeypatch.chdir(tmp_path)
    for first, *others in (("texts", "./texts/", f"{tmp_path}/texts", "link"), ("x.txt", "texts/../x.txt")):
        for name in others:
            assert open_data(name)[::2] == open_data(first)[::2]  # identity and name
    assert "files" not in open_data("pile").identity  # a name of ours is not a folder


def test_what_is_not_there_or_cannot_be_read(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, ["my_texts/books/a.txt", "my_texts/b.txt"])
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo("pipe")
    requests = len(hub.requests)
    for name, message in {
        "": "there is no file or folder ; --data takes stdlib, openwebtext, ",
        "wikitext-104": "there is no file or folder wikitext-104; --data takes stdlib, ",
        "no/file.txt": "there is no file or folder no/file.txt; ",
        "a" * 5000: "there is no file or folder aaa",
        "link": "there is no file or folder link",
        "pipe": "there is no file or folder pipe",
    }.items():
        assert message in refusal(open_data, name)
    assert len(hub.requests) == requests

    assert "boks is not here (did you mean my_texts/books?)" in refusal(open_data("my_texts/boks").pinned)
    documents = open_data("my_texts").documents
    (tmp_path / "my_texts/b.txt").unlink()
    assert "b.txt could not be read: No such file" in refusal(list, documents)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert "my_texts could not be read: Permission denied" in refusal(open_data, "my_texts")


# ------------------------------------------------------------------------------------ the Hub
def write_config(folder, config, splits, column="text"):
    """A data set as the Hub has it: a configuration with several splits, declared at the top of README.md."""
    for split, texts in splits.items():
        write(folder / config / f"{split}-00000-of-00001.parquet", texts, column)
    lines = [f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits]
    head = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
    (folder / "README.md").write_text(head + "".join(lines) + "---\n")


def test_hub_data_is_streamed(tok, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_CHARS", 2**14)  # small batches for small shards
    texts = make_texts(600)
    for shard in range(3):
        write(hub.root / f"datasets/someone/texts/data/train-{shard:05}-of-00003.parquet",
              texts[shard * 200:][:200])
    small = prepare("someone/texts", tok, tmp_path / "small", max_tokens=2000)
    assert not small.meta["complete"] and len(small.val) > 0
    assert "someone/texts/data/train-00000-of-00003.parquet" in hub.requests
    assert "someone/texts/data/train-00002-of-00003.parquet" not in hub.requests  # was not needed
    whole = prepare("someone/texts", tok, tmp_path / "whole")
    expected = split_ids(tok, hold_out(texts))
    assert whole.train.tolist() == expected["train"] and whole.val.tolist() == expected["val"]
    assert small.train.tolist() == expected["train"][:2000]


def test_hub_data_with_its_own_validation(tok, hub, tmp_path, capsys):
    texts = make_texts(60, seed=1)
    expected = split_ids(tok, [("train", t) for t in texts[:40]] + [("val", t) for t in texts[40:50]])
    for name in ("validation", "dev"):
        splits = {"train": texts[:40] + [""], name: texts[40:50], "test": texts[50:]}
        data = f"someone/splits-{name}"
        write_config(hub.root / "datasets" / data, "main", splits, column="content")
        made = prepare(f"{data}:main", tok, tmp_path, text_column="content")
        assert made.train.tolist() == expected["train"] and made.val.tolist() == expected["val"]
        assert f"note: {data}: its split {name} is held out" in capsys.readouterr().err
    assert "main" in refusal(prepare, f"{data}:other", tok, tmp_path, text_column="content")
    assert "no column 'text', only ['id', 'content']" in refusal(prepare, f"{data}:main", tok, tmp_path)


def test_hub_data_of_a_revision(tok, hub, tmp_path):
    """A build that was killed goes on with the version that it began with, and says which one that is."""
    def write_version(name, seed):
        write(hub.root / f"datasets/someone/{name}/data/train-00000-of-00001.parquet", make_texts(300, seed))

    write_version("versions", seed=0)
    write_version("versions@v1.0", seed=1)
    made = [prepare(f"someone/versions{name}", tok, tmp_path) for name in ("", "@v1.0:default")]
    commits = [corpus_.meta["source"]["revision"] for corpus_ in made]
    assert made[0].path != made[1].path and commits[0] != commits[1] and len(commits[0]) == 40
    expected = [split_ids(tok, hold_out(make_texts(300, seed)))["train"] for seed in (0, 1)]
    assert [corpus_.train.tolist() for corpus_ in made] == expected
    assert "Revision 'v2' doesn't exist" in refusal(
        prepare, "someone/versions@v2", tok, tmp_path)

    # What a kill leaves half-way, after which there is a newer version.
    part = Path(f"{made[0].path}.part")
    made[0].path.rename(part)
    (part / "meta.json").unlink()
    (part / "progress.json").write_text(json.dumps({**made[0].meta, "complete": False}))
    (hub.root / "datasets/someone/versions").rename(hub.root / "datasets/someone/versions@old")
    write_version("versions", seed=2)
    again = prepare("someone/versions", tok, tmp_path)
    assert again.meta["source"]["revision"] == commits[0] and again.train.tolist() == expected[0]

    # A finished corpus is taken as it is, also one from before revisions were noted.
    del again.meta["source"]["revision"]
    (again.path / "meta.json").write_text(json.dumps(again.meta))
    assert prepare("someone/versions", tok, tmp_path).meta == again.meta


def test_hub_data_that_is_not_there(tok, hub, tmp_path):
    message = refusal(prepare, "someone/nothing", tok, tmp_path / "corpora")
    assert "someone/nothing is not here, and could not be downloaded: Dataset" in message
    assert not (tmp_path / "corpora").exists()
    write(hub.root / "datasets/someone/test-only/data/test-00000-of-00001.parquet", make_texts(5))
    assert "no train split, only test" in refusal(prepare, "someone/test-only", tok, tmp_path)


def test_wikitext_is_read_by_article(tok, hub, tmp_path):
    lines = [" \n", " = One = \n", " \n", " First . \n", " = = Part = = \n", " = = = Sub = = = \n", " \n",
             " more \n", " = Two words = \n", " \n", " Second = 2 . \n"]
    rows = ["" if not line.strip() else line for line in lines]  # as the Hub has them
    pages = list(wikitext_articles(rows))
    assert pages == ["".join(lines[1:8])[:-1], "".join(lines[8:])]
    splits = {"train": rows, "validation": rows}
    write_config(hub.root / "datasets" / "Salesforce" / "wikitext", "wikitext-2-raw-v1", splits)
    made = prepare("wikitext-2", tok, tmp_path)
    assert made.meta["train"]["documents"] == made.meta["val"]["documents"] == 2
    expected = [i for page in pages for i in [tok.eot, *tok.encode(page)]]
    assert made.train.tolist() == made.val.tolist() == expected
