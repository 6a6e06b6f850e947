"""eval_ppl.py: against float64 by definition, against lm-evaluation-harness, with input that is no good."""
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
import pytest
import torch

import eval_ppl
from data import prepare
from model import GPT2, GPTNeoX, load, student_from
from support import scoring
from support.cli import InputError, run_cli
from support.tokenizer import load_tokenizer, train_tokenizer
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


def widen(model, seed):
    """Weights with which answers differ: at the usual std of 0.02 all are nearly alike."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory, tokenizers_dir):
    """Exported models: gpt2, its student, neox with a padded vocabulary, neox-wide with more padding."""
    folder = tmp_path_factory.mktemp("zoo")
    shape = {"context": CONTEXT, "width": 32, "n_head": 2}
    gpt2 = widen(GPT2(GPT2.config(**shape, vocab_size=600, n_layer=3, eos=599)), 0)
    models = {"gpt2": gpt2, "student": widen(student_from(gpt2, [0, 2]), 1),
              "neox": widen(GPTNeoX(GPTNeoX.config(**shape, vocab_size=640, n_layer=2)), 2),
              "neox-wide": widen(GPTNeoX(GPTNeoX.config(
                  **shape | {"width": 48}, vocab_size=656, n_layer=2, mlp_width=96)), 3)}
    for name, model in models.items():
        model.save(folder / name)
        load_tokenizer(tokenizers_dir / ("neox" if "neox" in name else "gpt2")).save(folder / name)
    return folder


@torch.no_grad()
def foreseen(folder):
    """Two texts: their last word is to the model the likeliest one; only its first token is."""
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
    """Rows in the Hub's form: WikiText by line and by page, LAMBADA, two rows for each task of Table 1."""
    import pyarrow
    import pyarrow.parquet
    root = request.config.hub.root / "datasets"

    def write(repo, rows, config="data", splits=("test",)):
        for split in splits:
            path = root / repo / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        names = sorted(path.name for path in (root / repo).iterdir() if path.is_dir())
        card = "".join(f"- config_name: {'default' if name == 'data' else name}\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits) for name in names)
        (root / repo / "README.md").write_text(f"---\nconfigs:\n{card}---\n")

    every = ("train", "validation", "test")
    for config in ("wikitext-2-raw-v1", "wikitext-103-raw-v1"):
        write("Salesforce/wikitext", [{"text": row} for row in ROWS], config, every)
    pages = [{"page": page} for page in PAGES]
    write("EleutherAI/wikitext_document_level", pages, "wikitext-2-raw-v1", every)
    write("EleutherAI/lambada_openai", [{"text": text} for text in (
        "The fox ran into the wood . Nobody saw the fox", "Rain fell all night, and then there was more rain",
        "\"You,\" she said , \"are not the one I\"  wanted", "Yes: no\n\nmaybe so", *foreseen(zoo / "gpt2"),
        *foreseen(zoo / "neox"))])
    write("baber/piqa", [{"goal": f"To dry {x},", "sol1": "hang it up.", "sol2": "drown it.", "label": 0}
                         for x in ("a shirt", "hay")], splits=("train", "validation"))
    write("allenai/winogrande", [{"sentence": f"The {x} did not fit in the box, as _ was too large.",
                                  "option1": f"the {x}", "option2": "the box", "answer": "1"}
                                 for x in ("cup", "hat")], "winogrande_xl", ("train", "validation"))
    write("allenai/ai2_arc", [{"id": x, "question": f"What does {x} need?", "answerKey": "B", "choices": {
        "text": ["sand", "light", "noise"], "label": ["A", "B", "C"]}} for x in ("a leaf", "grass")],
          "ARC-Challenge", every)
    write("allenai/sciq", [{"question": f"What is {x}?", "distractor1": "a stone", "distractor2": "a gas",
                            "distractor3": "a plant", "correct_answer": "a metal", "support": f"{x} shines."}
                           for x in ("Tin", "Zinc")], splits=every)
    write("aps/super_glue", [{"text": f"The {x} chased the dog because it was angry .", "span1_index": 1,
                              "span2_index": 6, "span1_text": x, "span2_text": "it", "idx": 0, "label": 1}
                             for x in ("cat", "bird")], "wsc.fixed", every)
    return root


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
def guide(model, ids, context, stride):
    """The guide's loop in float64: (sum of NLL, tokens scored)."""
    nll, scored, done = 0.0, 0, 1
    for start in range(0, len(ids), stride):
        end = min(start + context, len(ids))
        logp = model(ids[None, start:end]).log_softmax(-1)[0]
        for i in range(max(done, start + 1), end):
            nll, scored = nll - logp[i - 1 - start, ids[i]].item(), scored + 1
        done = end
        if end == len(ids):
            return nll, scored


@pytest.mark.parametrize("name", ["gpt2", "neox"])
@pytest.mark.parametrize("stride", [1, 7, 16, 32])
@torch.no_grad()
def test_sliding_is_the_guides(measure, zoo, book, name, stride):
    text = book.read_text()
    ids = torch.tensor(load_tokenizer(zoo / name).encode(text))
    nll, scored = guide(load(zoo / name, dtype=torch.float64), ids, 32, stride)
    flags = "--data", book, "--context", 32, "--stride", stride, "--batch-size", 5
    found = measure(name, *flags)["results"][name]
    assert found["tokens"] == scored == len(ids) - (1 if stride < 32 else math.ceil(len(ids) / 32))
    assert value(found, "perplexity_per_token") == pytest.approx(math.exp(nll / scored), rel=1e-5)
    per_byte = nll / scored * len(ids) / len(text.encode())  # of all bytes the share that is scored
    assert value(found, "bits_per_byte") == pytest.approx(per_byte / math.log(2), rel=1e-5)
    per_word = nll / scored * len(ids) / len(text.split())
    assert value(found, "perplexity_per_word") == pytest.approx(math.exp(per_word), rel=1e-4)


@torch.no_grad()
def test_blocks_are_disjoint_and_whole(measure, zoo, book):
    ids = torch.tensor(load_tokenizer(zoo / "gpt2").encode(book.read_text()))
    blocks = ids[:len(ids) // 32 * 32].view(-1, 32)
    assert len(ids) % 32 > 1  # there is a partial block to drop
    logp = load(zoo / "gpt2", dtype=torch.float64)(blocks)[:, :-1].log_softmax(-1)
    loss = -logp.gather(2, blocks[:, 1:, None]).mean().item()
    found = measure("gpt2", "--data", book, "--context", 32, "--protocol", "blocks")["results"]["gpt2"]
    assert found["tokens"] == 31 * len(blocks)
    assert value(found, "perplexity_per_token") == pytest.approx(math.exp(loss), rel=1e-5)


class Letters:
    """A tokenizer whose tokens are letters, so that windows can be written down; eot is `.`."""
    eot = ord(".")

    def encode_array(self, text):
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)


@pytest.mark.parametrize("protocol, text, context, stride, expected", [
    ("sliding", "abcdefg", 4, 2, ["a|bcd", "cd|ef", "ef|g"]),
    ("sliding", "abcdefg", 4, 4, ["a|bcd", "e|fg"]),
    ("sliding", "abcdefg", 9, 9, ["a|bcdefg"]),
    ("sliding", "abcde", 4, 4, ["a|bcd"]),  # e would have nothing before it
    ("sliding", "a", 4, 4, []),
    ("blocks", "abcdefghij", 4, 4, ["a|bcd", "e|fgh"]),
    ("blocks", "abcd", 4, 4, ["a|bcd"]),
    ("blocks", "abc", 4, 4, []),
    ("pages", "abcdefg", 3, 3, [".|abc", "c|def", "def|g"]),
    ("pages", "abcdef", 3, 3, [".|abc", "c|def"]),
    ("pages", "ab", 3, 3, [".|ab"]),
    ("pages", "", 3, 3, []),
    ("lambada", "a bc def", 9, 9, ["a bc| def"]),
    ("lambada", "a bc def", 5, 5, ["bc| def"]),
    ("lambada", "abc", 9, 9, ["a|bc"]),
    ("lambada", "", 9, 9, []),
])
def test_windows_by_hand(protocol, text, context, stride, expected):
    """What is read | what is scored, as in the docstrings; a window holds its share of the bytes."""
    generator, _ = eval_ppl.PROTOCOLS[protocol]
    windows = list(generator(text, Letters(), Namespace(context=context, stride=stride, data="x")))
    shown = ["".join(map(chr, window.ids)) for window in windows]
    cut = [len(window.ids) - window.n_scored for window in windows]
    assert [f"{ids[:n]}|{ids[n:]}" for ids, n in zip(shown, cut, strict=True)] == expected
    scored = sum(window.n_scored for window in windows)
    assert sum(window.bytes for window in windows) == pytest.approx(scored)  # a letter is a byte


def test_what_each_protocol_makes_of_wikitext(datasets):
    expected = {"pages": PAGES, "blocks": [WIKITEXT], "sliding": ["\n\n".join(ROWS)]}
    for protocol, texts in expected.items():
        assert eval_ppl.read_texts(eval_ppl.WIKITEXT, protocol, "text") == texts, protocol


def test_what_else_is_data(tmp_path, monkeypatch):
    """jsonl: a text a line; txt: one text, in whatever pieces it is read; stdlib: what the demo held out."""
    lines, text = tmp_path / "two.jsonl", tmp_path / "long.txt"
    lines.write_text('{"body": "one"}\n{"body": "two"}\n')
    assert eval_ppl.read_texts(str(lines), "pages", "body") == ["one", "two"]
    assert eval_ppl.read_texts(str(lines), "sliding", "body") == ["one\n\ntwo"]
    text.write_bytes(b"long line\r\n" * 500_000)
    assert eval_ppl.read_texts(str(text), "pages", "text") == ["long line\r\n" * 500_000]
    marked, rows = tmp_path / "marked.txt", tmp_path / "ROWS.JSON"
    marked.write_text("text", encoding="utf-8-sig")
    assert eval_ppl.read_texts(str(marked), "pages", "text") == ["text"]
    rows.write_text('[{"text": "one"}, {"text": "two"}]')
    assert eval_ppl.read_texts(str(rows), "pages", "text") == ["one", "two"]  # not the JSON's markup
    pairs = [("val", "a"), ("train", "b"), ("val", "c")]
    monkeypatch.setattr(eval_ppl, "open_data", lambda data: Namespace(documents=iter(pairs)))
    assert eval_ppl.read_texts("stdlib", "blocks", "text") == ["a\n\nc"]


@pytest.mark.parametrize("argv, data, protocol", [
    (["gpt2"], eval_ppl.WIKITEXT, "sliding"), ([str(ROOT)], "stdlib", "sliding"),
    ([str(ROOT), "gpt2"], eval_ppl.WIKITEXT, "sliding"),
    (["gpt2", "--data", "lambada"], eval_ppl.LAMBADA, "lambada"),
    ([str(ROOT), "--protocol", "pages"], eval_ppl.WIKITEXT, "pages"),
    ([str(ROOT), "--protocol", "lambada"], eval_ppl.LAMBADA, "lambada")])
def test_defaults(argv, data, protocol):
    """Of folders alone the demo's data, so that they need no Hub; but pages are WikiText's, and so on."""
    eval_ppl.settle(args := eval_ppl.parse_args(argv), [Namespace(context=64), Namespace(context=32)])
    assert (args.data, args.protocol, args.context, args.stride) == (data, protocol, 32, 32)


def test_limit(measure, datasets):
    found = measure("gpt2", "--data", "wikitext-2", "--limit", 2)["results"]["gpt2"]
    assert found["tokens"] == 2 * (CONTEXT - 1)


def test_precision(measure, book):
    """bf16 takes half of the memory and rounds: other digits, the same story."""
    exact, rounded = (measure(ROOT / "demo/teacher", "--data", book, "--precision", precision)
                      ["results"]["teacher"] for precision in ("fp32", "bf16"))
    assert (exact["parameters"], exact["megabytes"], rounded["megabytes"]) == (3_505_152, 14, 7)
    bits = value(exact, "bits_per_byte"), value(rounded, "bits_per_byte")
    assert bits[0] != bits[1] and bits[0] == pytest.approx(bits[1], rel=0.02)


def test_long_texts_are_encoded_in_pieces_that_change_nothing(tokenizers_dir, tmp_path):
    rng = random.Random(0)
    parts = ["\n", " ", "  ", "a", "def f(", "'s", "é",
             "e\u0301", "\r\n", "\t", "9", "\x85", "\u2003", "\u0301"]
    texts = ["".join(rng.choices(parts, k=20_000)) for _ in range(10)]
    train_tokenizer(texts, 600, tmp_path)  # has tokens for whitespace of all kinds
    for folder in (tmp_path, tokenizers_dir / "gpt2", tokenizers_dir / "neox"):
        tokenizer = load_tokenizer(folder)
        for text in texts:
            ids, words, size = eval_ppl.whole_text(text, tokenizer)
            assert ids.tolist() == tokenizer.encode(text)
            assert (words, size) == (len(text.split()), len(text.encode()))


def test_scores_of_several_models(zoo):
    """KL, agreement and NLL by definition, with heads that are padded differently."""
    models = [load(zoo / name) for name in ("neox", "neox-wide")]
    vocab = load_tokenizer(zoo / "neox").vocab_size
    assert vocab < 640
    ids = torch.randint(vocab, (3, 20), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[:, -1] = targets[1, :9] = -100
    found = scoring.compare(models, [(ids[:2], targets[:2]), (ids[2:], targets[2:])], vocab)
    with torch.no_grad():
        logits = [model.double()(ids)[targets != -100] for model in models]
    p, q = (z[:, :vocab].softmax(-1) for z in logits)
    twice = scoring.compare(models[:1] * 2, [(ids, targets)], vocab)
    assert twice[1] == pytest.approx(twice[0]) and twice[0] == pytest.approx(found[0])
    assert twice[1]["kl"] == 0, "KL(model || itself)"
    assert found[0]["kl"] == 0 and found[0]["agree"] == found[0]["tokens"] == found[1]["tokens"] == 48
    assert found[1]["kl"] == pytest.approx((p * (p.log() - q.log())).sum().item(), rel=1e-5)
    assert found[1]["accepted"] == pytest.approx(torch.minimum(p, q).sum().item(), rel=1e-5)
    assert found[0]["accepted"] == 48, "a model accepts all of its own tokens"
    for z, sums in zip(logits, found, strict=True):
        target = targets[targets != -100]
        nll = -z.log_softmax(-1).gather(1, target[:, None]).sum().item()
        assert sums["nll"] == pytest.approx(nll, rel=1e-6)
        assert sums["agree"] == (z.argmax(-1) == logits[0].argmax(-1)).sum()
        assert sums["right"] == (z.argmax(-1) == target).sum()
    alone = scoring.compare([models[1].float()], [(ids, targets)], vocab)[0]
    assert alone["agree"] == 48 and alone["nll"] == pytest.approx(found[1]["nll"])


def test_logits_exist_for_a_chunk_at_a_time(zoo, monkeypatch):
    model, shapes = load(zoo / "gpt2"), []
    linear = torch.nn.functional.linear

    def watched(*args):
        shapes.append((out := linear(*args)).shape)
        return out

    monkeypatch.setattr(scoring.F, "linear", watched)
    ids = torch.randint(600, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    chunked = scoring.score([model, model], ids, ids, 600, chunk_size=50)
    assert max(shape[0] for shape in shapes if shape[-1] == 600) == 50
    assert torch.allclose(chunked, scoring.score([model, model], ids, ids, 600))


def test_models_side_by_side(measure, book):
    found = measure("gpt2", "neox", "student", "gpt2", "--data", book, "--context", 32)["results"]
    assert list(found) == ["gpt2", "student", "neox"]  # those of one tokenizer side by side
    assert value(found["gpt2"], "KL_to_first") == 0 and value(found["gpt2"], "same_top_1_as_first") == 1
    assert value(found["student"], "KL_to_first") > 0.1 and value(found["student"], "same_top_1_as_first") < 1
    assert "KL_to_first" not in found["neox"]  # other tokens
    assert all(figures["bits_per_byte"][1] > 0 for figures in found.values())
    assert found["student"]["parameters"] < found["gpt2"]["parameters"]
    alone = measure("student", "--data", book, "--context", 32)["results"]["student"]
    assert alone["perplexity_per_byte"] == pytest.approx(found["student"]["perplexity_per_byte"], rel=1e-6)
    assert "KL_to_first" not in alone


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


def test_validate(zoo, tmp_path):
    """The rows of a run's table: over the first --eval-tokens, in blocks; modes stay; no overflow."""
    models = [load(zoo / "gpt2"), load(zoo / "student").train()]
    corpus = corpus_of(tmp_path, load_tokenizer(zoo / "gpt2"))
    args = Namespace(eval_tokens=100, seq_len=32, batch_size=2)
    teacher, student = scoring.validate(models, corpus, 600, args, nullcontext())
    assert [model.training for model in models] == [False, True]

    ids = torch.from_numpy(corpus.val[:97].astype("int64"))
    blocks = torch.stack([ids[start:start + 33] for start in (0, 32, 64)])
    sums = scoring.compare([models[0], models[1].eval()], [(blocks[:, :-1], blocks[:, 1:])], 600)
    for row, total in zip((teacher, student), sums, strict=True):
        assert row["loss"] == pytest.approx(total["nll"] / 96)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["KL to teacher"] == pytest.approx(total["kl"] / 96)
    counts = corpus.meta["val"]
    per_byte = teacher["loss"] * counts["tokens"] / counts["bytes"]
    assert teacher["bits per byte"] == pytest.approx(per_byte / math.log(2))

    models[0].norm.weight.data *= 1e4
    row, = scoring.validate(models[:1], corpus, 600, args, nullcontext())
    assert row["loss"] > 1000 and row["perplexity"] == math.inf and "KL to teacher" not in row
    with pytest.raises(InputError, match="1 held-out tokens are too few"):
        scoring.validate(models, corpus, 600, Namespace(**vars(args) | {"eval_tokens": 0}), nullcontext())


def corpus_of(folder, tokenizer):
    """A prepared corpus of a few documents."""
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
    bits = nll / found["tokens"] * len(corpus.val) / corpus.meta["val"]["bytes"] / math.log(2)
    assert value(found, "bits_per_byte") == pytest.approx(bits, rel=1e-6)


def test_the_table_says_what_it_is(monkeypatch, capsys, zoo, datasets):
    monkeypatch.setattr(sys, "argv", ["eval_ppl.py", str(zoo / "gpt2"), "--protocol=pages", "--device=cpu"])
    eval_ppl.main()
    out = capsys.readouterr().out
    assert out.startswith(f"data {eval_ppl.WIKITEXT}, ")
    assert all(f", {setting}, " in out for setting in ("protocol pages", "context 64", "stride 64"))
    assert "WikiText is detokenised; words and bytes: the page's before that" in out
    for name in ("parameters", "megabytes", "tokens", "words", "bytes", "tokens per second"):
        assert re.search(rf"^\| {name} +\| +[\d,]+ \|$", out, re.M), name
    for name in ("perplexity per token", "perplexity per word", "perplexity per byte", "bits per byte"):
        assert re.search(rf"^\| {name} +\| +[\d.]+ ± [\d.]+ \|$", out, re.M), name


# ------------------------------------------------------------------------------------ lm-evaluation-harness
@pytest.fixture(scope="session")
def harness(zoo, datasets):
    """harness("gpt2", "wikitext", ...) -> what lm_eval.simple_evaluate returns, and its model."""
    import lm_eval
    from lm_eval import tasks
    from lm_eval.models.huggingface import HFLM
    here = Path(tasks.__file__).parent
    needed = ("wikitext", "lambada", "piqa", "winogrande", "arc", "sciq", "super_glue/wsc")
    manager = tasks.TaskManager(include_path=[str(here / name) for name in needed], include_defaults=False)

    def harness(name, *names):
        lm = HFLM(pretrained=str(zoo / name), dtype="float32", device="cpu", batch_size=4)
        return lm, lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=10)
    return harness


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_pages_and_lambada_are_the_harnesss(harness, measure, name):
    """To six digits, through the files that we export."""
    _, results = harness(name, "wikitext", "lambada_openai")
    theirs = results["results"]
    pages = measure(name, "--protocol", "pages")["results"][name]
    for ours, key in (("perplexity_per_word", "word_perplexity"), ("perplexity_per_byte", "byte_perplexity"),
                      ("bits_per_byte", "bits_per_byte")):
        assert value(pages, ours) == pytest.approx(theirs["wikitext"][f"{key},none"], rel=1e-6), ours
    lambada = measure(name, "--data", "lambada", "--batch-size", 3)["results"][name]
    theirs = theirs["lambada_openai"]
    assert value(lambada, "perplexity_per_word") == pytest.approx(theirs["perplexity,none"], rel=1e-6)
    assert lambada["accuracy"] == pytest.approx([theirs["acc,none"], theirs["acc_stderr,none"]])
    words = [text.rpartition(" ")[2] for text in eval_ppl.read_texts(eval_ppl.LAMBADA, "lambada", "text")]
    assert lambada["words"] == len(words) == 8 and lambada["accuracy"][0] > 0 and "accuracy" not in pages
    assert lambada["bytes"] == sum(len(f" {word}".encode()) for word in words)


def test_detokeniser_is_the_harnesss():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer
    rng = random.Random(0)
    bits = ["s '", "/' 5/", "@-@ ", "@,@ ", "@.@ ", *"()[]{}\"'=\n", "° ", "N ", "'s", "= = = =", "ab", "  "]
    bits += [" "] * 8 + [f"{c} " for c in ":;.!?,"] * 3
    for text in PAGES + ["".join(rng.choices(bits, k=rng.randrange(60))) for _ in range(3000)]:
        assert detokenize_wikitext(text) == wikitext_detokenizer({"page": text}), repr(text)
    page = ' = Oz = \n It is " 1 @.@ 5 " km . \n'
    assert detokenize_wikitext(page) == ' = Oz =\nIt is "1.5" km.\n'


@torch.no_grad()
def test_table_1_of_distilpythia(harness, zoo):
    """An exported student in the harness: its log-likelihoods are our model's for the same tokens."""
    tasks = ("piqa", "winogrande", "lambada_openai", "arc_challenge", "sciq", "wsc")
    lm, results = harness("student", *tasks)
    student = load(zoo / "student", dtype=torch.float64)
    seen = 0
    for task in tasks:
        for sample in results["samples"][task]:
            for pair, [(theirs, greedy)] in zip(sample["arguments"], sample["resps"], strict=True):
                context, continuation = lm._encode_pair(*pair)
                ids = torch.tensor([context + continuation])[:, -CONTEXT - 1:]
                logp = student(ids[:, :-1]).log_softmax(-1)[0, -len(continuation):]  # (continuation, V)
                target = torch.tensor(continuation)
                assert theirs == pytest.approx(logp.gather(1, target[:, None]).sum().item(), rel=1e-5)
                assert greedy == (logp.argmax(-1) == target).all().item()
                seen += 1
    assert seen == 2 * 2 + 2 * 2 + 8 + 2 * 3 + 2 * 4 + 2 * 2


# ------------------------------------------------------------------------------------ memory, bad input
def test_memory_does_not_grow_with_the_text(tmp_path, zoo):
    """1.5 MB of text, 870,000 tokens, 2.1 GB of logits: a run needs what one over 5% of them does."""
    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    line = "for i, (start, end) in enumerate(spans): yield number + 1, 'word', [i]\n"
    short.write_text(line * 1000)
    long.write_text(line * 20_000)
    code = f"""
import resource, sys, torch, eval_ppl
torch.set_num_threads(1)
for data in {str(short)!r}, {str(long)!r}:
    sys.argv = ["eval_ppl.py", {str(zoo / "student")!r}, "--data", data, "--device=cpu", "--batch-size=32"]
    eval_ppl.main()
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    peaks = [int(mb) for mb in re.findall(r"^peak (\d+)", done.stdout, re.M)]
    assert len(peaks) == 2, done.stderr
    assert peaks[1] - peaks[0] < 40, peaks  # about 20: the text, its ids, a few hundred bytes a window


def broken_models(source, narrow, broken):
    """A model with fewer embeddings than tokens; one whose finite weights lead beyond what a float holds."""
    model = load(source)
    model.norm.weight.data *= 1e38
    model.save(broken)
    shape = {"context": CONTEXT, "width": 8, "n_head": 2, "n_layer": 1}
    GPT2(GPT2.config(**shape, vocab_size=500, eos=499)).save(narrow)
    for folder in (narrow, broken):
        load_tokenizer(source).save(folder)


@pytest.mark.parametrize("argv, message", [
    (["gpt2", "--data", "EMPTY"], "too short"),
    (["gpt2", "--data", "LETTER"], "too short"),
    (["gpt2", "--data", "EMPTY", "--protocol", "pages"], "too short"),
    (["gpt2", "--data", "WORDS", "--protocol", "blocks"], "too short: no window for blocks, --context 64"),
    (["gpt2", "--data", "LATIN1"], "latin1.txt is not UTF-8 text: see its byte 9"),
    (["gpt2", "--data", "WORDS", "--stride", "0"], "--stride 0: must be 1 or more"),
    (["gpt2", "--data", "WORDS", "--stride", "65"], "--stride 65"),
    (["gpt2", "--data", "WORDS", "--context", "32", "--stride", "33"], "--stride 33"),
    (["gpt2", "--data", "WORDS", "--stride", "5", "--protocol", "blocks"], "--stride 5: must be 64 to 64"),
    (["gpt2", "--data", "WORDS", "--context", "65"], "--context 65: must be 2 to 64"),
    (["gpt2", "--data", "WORDS", "--context", "1"], "--context 1: must be 2 to 64"),
    (["neox", "--data", "WORDS", "--context", "9" * 30], f"--context {'9' * 30}: must be 1 or more"),
    (["gpt2", "--data", "WORDS", "--limit", "9" * 30], "--limit 9999"),
    (["gpt2", "--data", "WORDS", "--batch-siez", "1"], "did you mean --batch-size?"),
    (["gpt2", "--data", "WORDS", "--device", "cuda:99"], "--device cuda:99: there is no such device here"),
    (["gpt2", "--data", "WORDS", "--batch-size", "0"], "--batch-size 0"),
    (["BARE", "--data", "WORDS"], "no tokenizer.json"),
    (["NARROW", "--data", "WORDS"], "narrow: its tokenizer has 600 tokens and its model only 500"),
    (["BROKEN", "--data", "WORDS"], "broken: its logits are NaN or infinite"),
    (["gpt2", "--data", "OBJECT"], "is not a list of JSON objects"),
    (["gpt2", "--data", "FOLDER"], "could not be read as a data set with a test split: name a file in it"),
    (["gpt2", "--data", "SLIP"], "did you mean"),
    (["gpt2", "--data", "wikitext-9"], "wikitext-9 is neither a file here nor a data set on the Hub: did you "
                                       "mean wikitext-2?"),
    (["gpt2", "--data", "missing/text.txt"], "missing/text.txt is neither a file here nor a data set"),
    (["gpt2", "--data", "gpt2"], "gpt2 could not be read"),
    (["gpt2", "--data", "Salesforce/wikitext:wikitext-9-raw-v1"], "'wikitext-9-raw-v1' not found"),
    (["gpt2", "--data", "nobody/nothing"], "nobody/nothing"),
    (["neox", "--data", "CORPUS"], "holds token ids of one tokenizer: take --protocol sliding or blocks, "
     "and models with that tokenizer"),
    (["gpt2", "--data", "CORPUS", "--protocol", "pages"], "take --protocol sliding or blocks"),
])
def test_bad_input(monkeypatch, capsys, tmp_path, zoo, datasets, argv, message):
    """One line on stderr that names the thing, and exit code 2."""
    files = {"EMPTY": b"", "LETTER": b"a", "WORDS": b"few words, not 64", "LATIN1": b"na\xc3\xafve na\xefve"}
    paths = {name: tmp_path / f"{name.lower()}.txt" for name in files}
    paths["OBJECT"] = tmp_path / "object.json"
    files["OBJECT"] = b'{"text": "one"}'
    for name, content in files.items():
        paths[name].write_bytes(content)
    paths |= {"gpt2": zoo / "gpt2", "neox": zoo / "neox", "SLIP": tmp_path / "wrods.txt"}
    paths |= {name: tmp_path / name.lower() for name in ("BARE", "NARROW", "BROKEN", "FOLDER")}
    if "BARE" in argv:
        load(zoo / "gpt2").save(paths["BARE"])
    if "NARROW" in argv or "BROKEN" in argv:
        broken_models(zoo / "gpt2", paths["NARROW"], paths["BROKEN"])
    paths["FOLDER"].mkdir()
    if "CORPUS" in argv:
        paths["CORPUS"] = corpus_of(tmp_path, load_tokenizer(zoo / "gpt2")).path
    argv = [str(paths.get(arg, arg)) for arg in argv]
    monkeypatch.setattr(sys, "argv", ["eval_ppl.py", "--device", "cpu", *argv])
    with pytest.raises(SystemExit) as exit:
        run_cli(eval_ppl.main)
    assert exit.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_rotary_models_read_beyond_their_context(measure, book):
    assert measure("neox", "--data", book, "--context", 2 * CONTEXT)["results"]["neox"]["tokens"] > CONTEXT
