"""eval_ppl.py: windows by hand, scores by definition, against lm-evaluation-harness, with bad input."""
import json
import math
import random
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from texts import train_tokenizer
from torch.nn import functional as F

import eval_ppl
from data import prepare
from model import GPT2, GPTNeoX, load, student_from
from support import scoring
from support.cli import InputError, run_cli
from support.tokenizer import load_tokenizer
from support.wikitext import detokenize_wikitext

ROOT = Path(__file__).parent.parent
CONTEXT = 64
PAGES = [  # as WikiText has them, with something for each rule of the detokeniser
    " = Otter = \n \n The otter 's den is 2 @.@ 5 m wide , and 1 @,@ 000 m away ; it isn 't deep . \n \n"
    " = = Diet = = \n \n It eats \" fish ( carp ) \" , ' crabs ' and [ rarely ] birds : why ? A well @-@ "
    "known N . \n At 5 ° C the otters ' fur is dry ! \n \n ",
    " = Heron = \n \n" + " A heron stands still , waits and strikes . The bank is its home . \n" * 9 + " \n"]
WIKITEXT = " \n" + "\n".join(PAGES)  # the file; the Hub has a row a line, and blank ones without anything
ROWS = ["" if line == " " else line + "\n" for line in WIKITEXT.split("\n")[:-1]]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory, tokenizers_dir):
    """Exported models: gpt2, its student, neox with a padded vocabulary, neox-wide with more padding."""
    folder = tmp_path_factory.mktemp("zoo")
    shape = {"context": CONTEXT, "width": 32, "n_head": 2}
    gpt2 = GPT2(GPT2.config(**shape, vocab_size=600, n_layer=3, eos=599))
    wide = shape | {"width": 48, "mlp_width": 96}
    models = {"gpt2": gpt2, "student": student_from(gpt2, [0, 2]),
              "neox": GPTNeoX(GPTNeoX.config(**shape, vocab_size=640, n_layer=2)),
              "neox-wide": GPTNeoX(GPTNeoX.config(**wide, vocab_size=656, n_layer=2))}
    torch.manual_seed(0)
    for name, model in models.items():
        for parameter in model.parameters():  # at the usual std of 0.02 all answers are nearly alike
            parameter.data += torch.randn(parameter.shape) * 0.2
        model.save(folder / name)
        load_tokenizer(tokenizers_dir / ("neox" if "neox" in name else "gpt2")).save(folder / name)
    return folder


@torch.no_grad()
def foreseen(folder):
    """Two texts: the model finds the last word of the first likeliest; of the second only its first token."""
    model, tokenizer, rng = load(folder), load_tokenizer(folder), random.Random(0)
    for _ in range(1000):
        text = " ".join("".join(rng.choices("abcdehilmnoprstu", k=3)) for _ in range(5))
        ids = tokenizer.encode(text)
        word = tokenizer.decode([model(torch.tensor([ids]))[0, -1].argmax()])
        if re.fullmatch(r" [A-Za-z]+", word) and len(tokenizer.encode(text + word)) == len(ids) + 1:
            return [text + word, text + word + "!?"]
    raise AssertionError("this model never foresees a word")


@pytest.fixture(scope="session")
def datasets(request, zoo):
    """Rows in the Hub's form: WikiText by line and by page, and LAMBADA."""
    root = request.config.hub.root / "datasets"

    def write(repo, rows, config="data"):
        splits = ("train", "validation", "test")
        for split in splits:
            path = root / repo / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in splits]
        card = {"configs": [{"config_name": "default" if config == "data" else config, "data_files": files}]}
        (root / repo / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")

    write("Salesforce/wikitext", [{"text": row} for row in ROWS], "wikitext-2-raw-v1")
    write("EleutherAI/wikitext_document_level", [{"page": page} for page in PAGES], "wikitext-2-raw-v1")
    texts = ["The fox ran into the wood . Nobody saw the fox", "Rain fell all night, then more rain",
             "\"You,\" she said , \"are not the one I\"  wanted", "Yes: no\n\nmaybe so"]
    texts += foreseen(zoo / "student") + foreseen(zoo / "neox")
    write("EleutherAI/lambada_openai", [{"text": text} for text in texts])
    write("EleutherAI/lambada_openai@old", [{"text": "Only one"}])


@pytest.fixture
def measure(monkeypatch, capsys, zoo):
    """measure("gpt2", "--data", ...) -> the JSON of `python eval_ppl.py`; its "results" by model."""
    def measure(*argv):
        argv = [str(zoo / arg) if (zoo / str(arg)).is_dir() else str(arg) for arg in argv]
        monkeypatch.setattr(sys, "argv", ["eval_ppl.py", *argv, "--json", "--device", "cpu"])
        capsys.readouterr()  # lm_eval prints, too
        eval_ppl.main()
        found = json.loads(capsys.readouterr().out)
        found["results"] = {Path(name).name: figures for name, figures in found["results"].items()}
        return found
    return measure


def value(figures, name):
    return figures[name][0] if isinstance(figures[name], list) else figures[name]


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"The {a} of the {b}\n{a}s and {b}s,  all\n\n" for a in ("cat", "dog", "emu")
                            for b in ("tree", "sea", "hill")), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------ protocols
class Characters:
    """A tokenizer whose tokens are characters, so that windows can be written down; eot is `.`."""
    eot = ord(".")

    def encode_array(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)


WINDOWS = {  # (protocol, text, context, stride): read|scored; sliding is the loop of Hugging Face's guide
    ("sliding", "abcdefg", 4, 2): ["a|bcd", "cd|ef", "ef|g"],
    ("sliding", "abcdefg", 4, 4): ["a|bcd", "e|fg"],
    ("sliding", "abcdef", 4, 1): ["a|bcd", "bcd|e", "cde|f"],  # nothing is left for a window from d on
    ("sliding", "abcde", 4, 4): ["a|bcd"],  # e would have nothing before it
    ("sliding", "a", 4, 4): [],
    ("blocks", "abcdefghij", 4, 4): ["a|bcd", "e|fgh"],
    ("blocks", "abc", 4, 4): [],
    ("pages", "abcdefg", 3, 3): [".|abc", "c|def", "def|g"],
    ("pages", "abcdef", 3, 3): [".|abc", "c|def"],
    ("pages", "", 3, 3): [],
    ("lambada", "a bc def", 9, 9): ["a bc| def"],
    ("lambada", "a bc def", 5, 5): ["bc| def"],
    ("lambada", "abc", 9, 9): ["a|bc"],
    ("lambada", "", 9, 9): [],
}


def test_windows_by_hand():
    """As in the docstrings; a window has its share of the bytes, one for each character."""
    for (protocol, text, context, stride), expected in WINDOWS.items():
        args = Namespace(context=context, stride=stride, data="x")
        windows = list(eval_ppl.PROTOCOLS[protocol](text, Characters(), args))
        shown = []
        for window in windows:
            read = "".join(map(chr, window.ids))
            cut = len(read) - window.n_scored
            shown.append(f"{read[:cut]}|{read[cut:]}")
        assert shown == expected, (protocol, text)
        scored = sum(window.n_scored for window in windows)
        assert sum(window.bytes for window in windows) == pytest.approx(scored)
        if protocol in eval_ppl.JOINED:
            assert sum(window.words for window in windows) == pytest.approx(scored / len(text))


def test_what_is_data(tmp_path, monkeypatch, datasets):
    """Rows are texts; a file of text is one text, however it is read; stdlib: what the demo holds out.
    WikiText as each protocol's published numbers have it."""
    def texts_of(data, protocol="pages", column="text"):
        return eval_ppl.read_texts(str(data), protocol, column)

    for protocol, texts in {"pages": PAGES, "blocks": [WIKITEXT], "sliding": ["\n\n".join(ROWS)]}.items():
        assert texts_of(eval_ppl.WIKITEXT, protocol) == texts, protocol
    assert texts_of("EleutherAI/lambada_openai@old:default", "lambada") == ["Only one"]

    lines = '{"text": "one"}\n{"text": "two"}\n'
    files = {"two.jsonl": lines, "TWO.JSON": '[{"text": "one"}, {"text": "two"}]',
             "long.txt": "long line\r\n" * 500_000, "valid.txt": "valid", "train.txt": "train"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
        expected = [content] if name.endswith("txt") else ["one", "two"]
        assert texts_of(tmp_path / name) == expected, name
    assert texts_of(tmp_path / "two.jsonl", "sliding") == ["one\n\ntwo"]
    assert texts_of(tmp_path / "two.jsonl", "pages", "") == [lines]
    for name in ("two.jsonl", "TWO.JSON", "long.txt"):
        (tmp_path / name).unlink()
    assert texts_of(tmp_path, "sliding") == ["valid"], "as distill.py"

    pairs = [("val", "a"), ("train", "b"), ("val", "c")]
    monkeypatch.setattr(eval_ppl, "open_data", lambda data, column: Namespace(documents=iter(pairs)))
    assert texts_of("stdlib", "blocks") == ["a\n\nc"]


def test_defaults():
    """Folders alone are scored on the demo's data, which needs no Hub; pages are WikiText's, and so on."""
    here = str(ROOT)
    for argv, data, protocol in [
            (["gpt2"], eval_ppl.WIKITEXT, "sliding"), ([here], "stdlib", "sliding"),
            ([here, "gpt2"], eval_ppl.WIKITEXT, "sliding"),
            (["gpt2", "--data", "lambada"], eval_ppl.LAMBADA, "lambada"),
            ([here, "--protocol", "pages"], eval_ppl.WIKITEXT, "pages"),
            ([here, "--protocol", "lambada"], eval_ppl.LAMBADA, "lambada")]:
        args = eval_ppl.parse_args(argv)
        eval_ppl.settle(args, [Namespace(context=64), Namespace(context=32)])
        assert (args.data, args.protocol, args.context, args.stride) == (data, protocol, 32, 32)


def test_precision(measure, book):
    """bf16 takes half the memory and rounds: different digits, the same story."""
    flags = ROOT / "demo/teacher", "--data", book, "--limit", 1, "--precision"
    exact, rounded = (measure(*flags, name)["results"]["teacher"] for name in ("fp32", "bf16"))
    assert (exact["parameters"], exact["megabytes"], rounded["megabytes"]) == (3_505_152, 14, 7)
    bits = exact["bits_per_byte"], rounded["bits_per_byte"]  # one window has no standard error
    assert bits[0] != bits[1] == pytest.approx(bits[0], rel=0.02)


def test_long_texts_are_encoded_in_pieces_that_change_nothing(tokenizers_dir, tmp_path):
    """Encoded as a whole, they would need too much memory."""
    rng = random.Random(0)
    parts = ["\n", " ", "  ", "a", "def f(", "'s", "é",
             "e\u0301", "\r\n", "\t", "9", "\x85", "\u2003", "\u0301"]
    texts = ["".join(rng.choices(parts, k=20_000)) for _ in range(3)]
    train_tokenizer(texts, 600, tmp_path)  # has tokens for whitespace of all kinds
    for folder in (tmp_path, tokenizers_dir / "gpt2", tokenizers_dir / "neox"):
        tokenizer = load_tokenizer(folder)
        for text in texts:
            ids, words, size = eval_ppl.whole_text(text, tokenizer)
            assert ids.tolist() == tokenizer.encode(text)
            assert (words, size) == (len(text.split()), len(text.encode()))


# ------------------------------------------------------------------------------------ scores
def test_scores_of_several_models(zoo):
    """KL, agreement and NLL by definition, with heads that are padded differently."""
    models = [load(zoo / name) for name in ("neox", "neox-wide")]
    vocab = load_tokenizer(zoo / "neox").vocab_size
    assert vocab < 640
    ids = torch.randint(vocab, (3, 20), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = targets[1, :9] = -100
    first, second = scoring.compare(models, [(ids[:2], targets[:2]), (ids[2:], targets[2:])], vocab)
    same, twice = scoring.compare(models[:1] * 2, [(ids, targets)], vocab)
    assert twice == pytest.approx(same) and same == pytest.approx(first)
    assert twice["kl"] == 0, "KL(model || itself)"

    with torch.no_grad():
        logits = [model.double()(ids)[targets != -100] for model in models]
    p, q = (z[:, :vocab].softmax(-1) for z in logits)
    y = targets[targets != -100]
    n = float(len(y))
    for z, sums, kl, accepted in [
            (logits[0], first, 0, n),  # a model accepts all of its own tokens
            (logits[1], second, (p * (p.log() - q.log())).sum(), torch.minimum(p, q).sum())]:
        top = z.argmax(-1)
        expected = {"nll": F.cross_entropy(z, y, reduction="sum"), "kl": kl, "accepted": accepted,
                    "agree": (top == logits[0].argmax(-1)).sum(), "right": (top == y).sum(), "tokens": n}
        assert sums == pytest.approx({name: float(total) for name, total in expected.items()}, rel=1e-5)


def test_logits_exist_for_a_chunk_at_a_time(zoo, monkeypatch):
    """They are the largest tensors; cutting them changes no score."""
    model = load(zoo / "gpt2")
    ids = torch.randint(600, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    whole = scoring.score([model, model], ids, ids, 600)
    rows = []
    entropy = F.cross_entropy
    monkeypatch.setattr(scoring.F, "cross_entropy",
                        lambda z, y, **how: rows.append(len(z)) or entropy(z, y, **how))
    assert torch.allclose(scoring.score([model, model], ids, ids, 600, chunk_size=50), whole)
    assert max(rows) == 50


def test_models_side_by_side(measure, book):
    """Those of one tokenizer are compared; each has the figures that it has alone. Rotary models can read
    beyond their context."""
    found = measure("gpt2", "neox", "student", "gpt2", "--data", book, "--context", 32)["results"]
    assert list(found) == ["gpt2", "student", "neox"]  # those of one tokenizer side by side
    assert value(found["gpt2"], "KL_to_first") == 0 and value(found["gpt2"], "same_top_1_as_first") == 1
    assert value(found["student"], "KL_to_first") > 0.1 and value(found["student"], "same_top_1_as_first") < 1
    assert "KL_to_first" not in found["neox"]  # other tokens
    assert found["student"]["parameters"] < found["gpt2"]["parameters"]
    alone = measure("student", "--data", book, "--context", 32)["results"]["student"]
    assert alone["perplexity_per_byte"] == pytest.approx(found["student"]["perplexity_per_byte"], rel=1e-6)
    assert "KL_to_first" not in alone
    assert measure("neox", "--data", book, "--context", 2 * CONTEXT)["results"]["neox"]["tokens"] > CONTEXT


def test_standard_error_is_the_jackknifes():
    """Leave out one window at a time: the spread of the results is the standard error that we state."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 20, 400)
    nll, size = tokens * (3 + rng.normal(size=400)), tokens * 4 + rng.integers(9, size=400)
    scores = torch.stack([torch.tensor(row) for row in (nll, nll, nll, nll, nll, tokens)])
    windows = [eval_ppl.Window(None, n, n / 2, b) for n, b in zip(tokens, size, strict=True)]
    figures = eval_ppl.figures(scores, windows, "pages", several=False)
    without = (nll.sum() - nll) / (size.sum() - size)
    for name, values in (("bits_per_byte", without / math.log(2)), ("perplexity_per_byte", np.exp(without))):
        assert figures[name][1] == pytest.approx(math.sqrt(399 * values.var()), rel=0.01), name

    diverged = eval_ppl.figures(10_000 * scores, windows, "pages", several=False)
    as_json = json.loads(eval_ppl.to_json({"x": diverged}, Namespace()))["results"]["x"]
    assert as_json["perplexity_per_byte"] is None, "JSON has no infinity"
    assert as_json["bits_per_byte"][0] > 1000


def test_validate(zoo, tmp_path):
    """The rows of a run's table: over the first --eval-tokens, in blocks; modes stay; no overflow."""
    models = [load(zoo / "gpt2"), load(zoo / "student").train()]
    models[1].set_dropout(0.5, 0.0)
    corpus = corpus_of(tmp_path, load_tokenizer(zoo / "gpt2"))
    args = Namespace(eval_tokens=100, seq_len=32, batch_size=2)
    rows = scoring.validate(models, corpus, 600, args, nullcontext())
    assert [model.training for model in models] == [False, True]

    ids = torch.from_numpy(corpus.val[:97].astype("int64"))
    blocks = torch.stack([ids[start:start + 33] for start in (0, 32, 64)])
    sums = scoring.compare([models[0], models[1].eval()], [(blocks[:, :-1], blocks[:, 1:])], 600)
    counts = corpus.meta["val"]
    for row, total in zip(rows, sums, strict=True):
        loss = total["nll"] / 96
        bits = loss * counts["tokens"] / counts["bytes"] / math.log(2)
        expected = {"loss": loss, "perplexity": math.exp(loss), "bits per byte": bits,
                    "KL to teacher": total["kl"] / 96}
        assert {name: row[name] for name in expected} == pytest.approx(expected)

    models[0].norm.weight.data *= 1e4
    row, = scoring.validate(models[:1], corpus, 600, args, nullcontext())
    assert row["loss"] > 1000 and row["perplexity"] == math.inf and "KL to teacher" not in row
    args.eval_tokens = 0
    with pytest.raises(InputError, match="1 held-out tokens are too few"):
        scoring.validate(models, corpus, 600, args, nullcontext())


def corpus_of(folder, tokenizer):
    """A prepared corpus of a few documents."""
    folder.mkdir(exist_ok=True)
    path = folder / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"Number {i}. " * 40}) + "\n" for i in range(99)))
    return prepare(str(path), tokenizer, folder / "corpora")


def test_prepared_corpus(measure, zoo, tmp_path):
    """Its held-out tokens as they are, an end-of-text before each document."""
    corpus = corpus_of(tmp_path, load_tokenizer(zoo / "gpt2"))
    found = measure("gpt2", "--data", corpus.path, "--protocol", "blocks", "--limit", 3)["results"]["gpt2"]
    assert found["tokens"] == 3 * (CONTEXT - 1)
    assert "words" not in found and "perplexity_per_word" not in found
    blocks = torch.from_numpy(corpus.val[:3 * CONTEXT].astype("int64")).view(3, CONTEXT)
    nll = scoring.compare([load(zoo / "gpt2")], [(blocks[:, :-1], blocks[:, 1:])], 600)[0]["nll"]
    loss = nll / found["tokens"]
    bits = loss * len(corpus.val) / corpus.meta["val"]["bytes"] / math.log(2)
    assert value(found, "bits_per_byte") == pytest.approx(bits, rel=1e-6)
    assert value(found, "perplexity_per_token") == pytest.approx(math.exp(loss), rel=1e-6)


def test_the_table_says_what_it_is(monkeypatch, capsys, zoo, datasets):
    """Data, protocol, windows; each figure with its error; in 80 columns."""
    monkeypatch.setattr(sys, "argv", ["eval_ppl.py", str(zoo / "gpt2"), "--protocol=pages", "--device=cpu"])
    eval_ppl.main()
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for said in (f"data {eval_ppl.WIKITEXT}, ", "protocol pages, ", "context 64, ", "is detokenised"):
        assert said in words
    assert re.search(r"^\| tokens +\| +[\d,]+ \|$", out, re.M)
    assert re.search(r"^\| bits per byte +\| +[\d.]+ ± [\d.]+ \|$", out, re.M)
    for figure, text in ((1234, 1234), (0.24954, "0.2495"), (math.inf, "inf"),
                         ((24.76871, 0.32154), "24.769 ± 0.322"), ((11016.53, 153.26), "1.102e+04 ± 153.3")):
        assert eval_ppl.shown(figure) == text
    args = eval_ppl.parse_args(["gpt2", "--protocol", "sliding", "--data", "a/long/name/of/a.txt"])
    three = dict.fromkeys(("demo/teacher", "out", "out/control"), {"perplexity_per_word": (987.65, 12.346)})
    assert max(map(len, [*out.splitlines(), *eval_ppl.report(three, args).splitlines()])) <= 80


# ------------------------------------------------------------------------------------ lm-evaluation-harness
def test_pages_and_lambada_are_the_harnesss(zoo, datasets, measure):
    """To six digits, through the files that we export; one of these models is a student."""
    import lm_eval
    from lm_eval import tasks
    from lm_eval.models.huggingface import HFLM
    here = Path(tasks.__file__).parent
    needed = [str(here / name) for name in ("wikitext", "lambada")]
    manager = tasks.TaskManager(include_path=needed, include_defaults=False)
    for name in ("student", "neox"):
        lm = HFLM(pretrained=str(zoo / name), dtype="float32", device="cpu", batch_size=4)
        theirs = lm_eval.simple_evaluate(lm, tasks=["wikitext", "lambada_openai"], task_manager=manager,
                                         bootstrap_iters=10)["results"]
        pages = measure(name, "--protocol", "pages")["results"][name]
        for ours, key in (("perplexity_per_word", "word_perplexity"), ("bits_per_byte", "bits_per_byte"),
                          ("perplexity_per_byte", "byte_perplexity")):
            assert value(pages, ours) == pytest.approx(theirs["wikitext"][f"{key},none"], rel=1e-6), ours

        lambada = measure(name, "--data", "lambada", "--batch-size", 3)["results"][name]
        theirs = theirs["lambada_openai"]
        assert value(lambada, "perplexity_per_word") == pytest.approx(theirs["perplexity,none"], rel=1e-6)
        assert lambada["accuracy"] == pytest.approx([theirs["acc,none"], theirs["acc_stderr,none"]])
        assert lambada["accuracy"][0] > 0 and "accuracy" not in pages
        texts = eval_ppl.read_texts(eval_ppl.LAMBADA, "lambada", "text")
        words = [text.rpartition(" ")[2] for text in texts]
        assert lambada["words"] == len(words) == 8
        assert lambada["bytes"] == sum(len(f" {word}".encode()) for word in words)


def test_detokeniser_is_the_harnesss():
    """A rule too few, and perplexities per word are not those that are published."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    rng = random.Random(0)
    bits = ["s '", "/' 5/", "@-@ ", "@,@ ", "@.@ ", *"()[]{}\"'=\n", "° ", "N ", "'s", "= = = =", "ab", "  "]
    bits += [" "] * 8 + [f"{c} " for c in ":;.!?,"] * 3
    for text in PAGES + ["".join(rng.choices(bits, k=rng.randrange(60))) for _ in range(2000)]:
        assert detokenize_wikitext(text) == wikitext_detokenizer({"page": text}), repr(text)


# ------------------------------------------------------------------------------------ memory, bad input
def test_memory_does_not_grow_with_the_text(tmp_path, zoo):
    """300 kB of text, 175,000 tokens, 420 MB of logits: no more is needed than for 1/8 of them."""
    line = "for i, (start, end) in enumerate(spans): yield number + 1, 'word', [i]\n"
    paths = [tmp_path / "short.txt", tmp_path / "long.txt"]
    for path, n in zip(paths, (500, 4000), strict=True):
        path.write_text(line * n)
    code = f"""
import resource, sys, torch, eval_ppl
torch.set_num_threads(1)
for data in {[*map(str, paths)]!r}:
    sys.argv = ["eval_ppl.py", {str(zoo / "student")!r}, "--data", data, "--device=cpu", "--batch-size=32"]
    eval_ppl.main()
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    peaks = [int(mb) for mb in re.findall(r"^peak (\d+)", done.stdout, re.M)]
    assert len(peaks) == 2, done.stderr
    assert peaks[1] - peaks[0] < 40, peaks  # about 10: the text, its ids, a few hundred bytes a window


BAD_INPUT = [  # test_text.py has files that cannot be read
    ("gpt2 --data EMPTY --protocol pages", "too short"),
    ("gpt2 --data WORDS --protocol blocks", "too short: no window for blocks, --context 64"),
    ("gpt2 --data wikitext-9", "did you mean wikitext-2?"),
    ("gpt2 --data missing/text.ndjson", "neither a file here nor a data set"),
    ("gpt2 --data Salesforce/wikitext:wikitext-9-raw-v1", "'wikitext-9-raw-v1' not found"),
    ("gpt2 --data nobody/nothing", "nobody/nothing"),
    ("gpt2 --data WORDS --context 32 --stride 33", "--stride 33"),
    ("gpt2 --data WORDS --stride 5 --protocol blocks", "--stride 5: must be 64 to 64"),
    ("gpt2 --data WORDS --context 65", "--context 65: must be 2 to 64"),
    ("BARE --data WORDS", "no tokenizer.json"),
    ("NARROW --data WORDS", "its tokenizer has 600 tokens and its model only 500"),
    ("BROKEN --data WORDS", "its logits are NaN or infinite"),
    ("neox --data CORPUS", "holds token ids of one tokenizer"),
    ("gpt2 --data CORPUS --protocol pages", "take --protocol sliding or blocks"),
]


def test_bad_input(monkeypatch, capsys, datasets, zoo, tmp_path):
    """One line on stderr that names the thing, and exit code 2."""
    model, tokenizer = load(zoo / "gpt2"), load_tokenizer(zoo / "gpt2")
    model.save(tmp_path / "bare")
    model.norm.weight.data *= 1e38  # finite weights, and logits that overflow
    model.save(tmp_path / "broken")
    narrow = GPT2.config(context=64, width=8, n_head=2, n_layer=1, vocab_size=500, eos=499)
    GPT2(narrow).save(tmp_path / "narrow")
    for name in ("broken", "narrow"):
        tokenizer.save(tmp_path / name)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "words.txt").write_text("few words, not 64")
    things = {path.stem.upper(): path for path in tmp_path.iterdir()}
    things |= {name: zoo / name for name in ("gpt2", "neox")}
    things["CORPUS"] = corpus_of(tmp_path / "corpus", tokenizer).path

    for command, message in BAD_INPUT:
        argv = [str(things.get(word, word)) for word in command.split()]
        monkeypatch.setattr(sys, "argv", ["eval_ppl.py", "--device", "cpu", *argv])
        with pytest.raises(SystemExit) as exit:
            run_cli(eval_ppl.main)
        assert exit.value.code == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line, (command, line)
