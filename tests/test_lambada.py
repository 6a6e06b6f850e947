"""extras/lambada*.py: the text, the passages, what is measured, the routed objective, the plan, the page."""
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import distill
import eval_ppl
from extras import lambada, lambada_items, lambada_page, lambada_real, lambada_scores, lambada_text
from model import build, load
from support.chunked_loss import LossSettings
from support.cli import InputError, run_cli
from support.tokenizer import load_tokenizer

TEACHER = str(lambada.ROOT / "demo" / "teacher")
NAMES = ["heap", "item", "queue", "title", "wait", "shape", "short", "other"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TEACHER)


def library(monkeypatch, modules):
    """{path: text} in the place of the standard library; b.py is held out."""
    for module in (lambada_text, lambada_items):
        monkeypatch.setattr(module, "stdlib_documents", lambda: modules.items())
        monkeypatch.setattr(module, "stdlib_held_out", lambda path: path == "b.py")


# ------------------------------------------------------------------------------------ the text
def test_each_name_gets_one_other_name():
    text = "def push(heap, item):\n    heap.append(item)  # heap, item_count"
    new = lambada_text.rename(text, NAMES, np.random.default_rng(0))
    heap, item = re.match(r"def push\((\w+), (\w+)\)", new).groups()
    assert heap != item and {heap, item} <= set(NAMES)
    assert new == f"def push({heap}, {item}):\n    {heap}.append({item})  # {heap}, item_count"
    assert new != lambada_text.rename(text, NAMES, np.random.default_rng(1))


def test_a_list_stands_there_twice_and_only_in_training(monkeypatch):
    monkeypatch.setattr(lambada_text, "LIST_NAMES", (2, 5))
    library(monkeypatch, {"a.py": "heap\n" * 99, "b.py": "item = 1"})
    train = [*lambada_text.texts(NAMES, False)]
    lists = [text for text in train if text.count("\n") == 2]
    assert len(train) - len(lists) == lambada_text.COPIES
    for text in lists:
        first, second, end = text.split("\n")
        assert first == second and end == ""
    share = sum(map(len, lists)) / sum(map(len, train))
    assert 0.2 < share < 0.35
    held_out, = lambada_text.texts(NAMES, True)
    assert re.fullmatch(r"\w+ = 1", held_out)


def test_prose_is_docstrings(tmp_path, monkeypatch):
    code = '"""Of the module."""\ndef f():\n    """Of f."""\n    return "no docstring"\n'
    library(monkeypatch, {"a.py": code, "b.py": code, "c.py": "x = 1"})
    folder = lambada_text.write_prose(tmp_path / "prose")
    for split in ("train", "val"):
        assert json.loads((folder / f"{split}.jsonl").read_text()) == {"text": "Of the module.\n\nOf f."}


# ------------------------------------------------------------------------------------ the passages
def test_candidates_by_hand(monkeypatch, tokenizer):
    """A word that stands in the passage and not in its last line; after a space; not too near to the last."""
    text = ("# first line\n"
            "heap = item\n"  # `item` does not stand there before
            "def push(heap):\n"
            "    return heap\n"  # stands in the passage: taken
            "    return heap\n"  # too near to the last
            "    wait(heap, heap)\n"  # in its last line
            "    with unseen, push:\n")  # taken
    library(monkeypatch, {"a.py": text, "b.py": text})
    monkeypatch.setattr(lambada_items, "rename", lambda text, *_: text)
    monkeypatch.setattr(lambada_items, "APART", 20)
    found = [*lambada_items.candidates(["heap"], tokenizer)]
    assert [lambada_items.last_line(item["text"]) for item in found] == [
        "    return heap", "    with unseen, push"]
    assert [item["drawn"] for item in found] == [True, False]
    for item in found:
        word = item["text"].split()[-1]
        assert text[item["position"]:].startswith(word) and item["text"].startswith("heap = item\n")


def test_chosen_are_those_that_the_passage_helps():
    items = [*"abcd"]
    with_passage = np.array([1.0, 1.0, 5.0, 2.0])
    alone = np.array([9.0, 3.5, 6.0, 4.0])  # the second can be guessed, the third is not helped
    assert lambada_items.choose(items, with_passage, alone) == ["a", "d"]


def test_exchanged_words_cannot_be_copied():
    text = "def push(heap):\n    heaps = heap.heap\n    heap"
    assert lambada_items.exchanged(text, "queue") == "def push(queue):\n    heaps = queue.queue\n    heap"
    items = [{"text": f"{' '.join(NAMES[:-1])} heap"}]
    assert lambada_items.add_others(items, NAMES)[0]["other"] == "other"


def test_the_shipped_passages_keep_the_rule(tokenizer):
    items = lambada_items.read_items()
    assert len(items) == lambada_items.N_ITEMS == len({item["text"] for item in items})
    for item in items:
        before, _, word = item["text"].rpartition(" ")
        assert lambada_items.stands_in(word, before) and not before[-1].isspace()
        assert not lambada_items.stands_in(word, lambada_items.last_line(before))
        assert not lambada_items.stands_in(item["other"], item["text"])
        assert len(tokenizer.encode(" " + word)) <= lambada_items.WORD_TOKENS


def test_the_shipped_passages_are_made_again(tokenizer):
    """Where the library is the one that they were made of; another version has other modules."""
    items = lambada_items.read_items()
    first = items[0]["module"]
    texts = {item["text"] for item in lambada_items.candidates(lambada_text.find_names(tokenizer), tokenizer)
             if item["module"] == first}
    made = [item["text"] for item in items if item["module"] == first]
    if sys.version_info[:3] != (3, 11, 7) and not set(made) & texts:
        pytest.skip("another version of the standard library")
    assert set(made) <= texts and len(made) >= 3


# ------------------------------------------------------------------------------------ what is measured
class Copies:
    """A model that says what followed the present token when it stood there last; else token 0."""
    training = False

    def __init__(self, vocab_size, copies=True):
        self.copies = copies
        self.head_weight = 20 * torch.eye(vocab_size)

    def hidden(self, ids):
        said = torch.zeros_like(ids)
        for row, tokens in enumerate(ids.tolist()):
            followed = {}
            for i, token in enumerate(tokens):
                if i:
                    followed[tokens[i - 1]] = token
                if self.copies:
                    said[row, i] = followed.get(token, 0)
        return F.one_hot(said, len(self.head_weight)).float()


def test_copying_is_seen_where_it_is(tokenizer):
    for copies, low, high in ((True, 0.95, 1.0), (False, 0.0, 0.05)):
        model = Copies(4096, copies)
        random = lambada_scores.copy_accuracy(model, lambada_scores.random_twice(16, tokenizer, 4), tokenizer)
        assert low <= random <= high
    names = [f"{a}{b}ap" for a in "bcdfgh" for b in "aeiou"]  # some tokens of different names are the same
    windows = lambada_scores.names_twice(names, tokenizer, 4)
    assert lambada_scores.copy_accuracy(Copies(4096), windows, tokenizer) > 0.3


def test_all_but_the_first_of_the_second_time_are_scored(tokenizer):
    window, = lambada_scores.random_twice(16, tokenizer, 1)
    scored = window.ids[-window.n_scored:]
    assert window.n_scored == 15 and (scored == window.ids[2:17]).all() and window.ids[0] == tokenizer.eot
    window, = lambada_scores.names_twice(NAMES, tokenizer, 1)
    scored = tokenizer.decode(window.ids[-window.n_scored:].tolist())
    line = tokenizer.decode(window.ids[1:].tolist()).partition("\n")[0]
    assert scored == line[line.index(" "):]


def test_kinds_of_targets():
    #                        a  b  c  a  b  c  c  a  d
    inputs = torch.tensor([[1, 2, 3, 1, 2, 3, 3, 1]])
    targets = torch.tensor([[2, 3, 1, 2, 3, 3, 1, 4]])
    kinds = lambada_scores.kinds_of_targets(inputs, targets)
    named = ["".join(kind for kind, where in kinds.items() if where[0, i]) for i in range(8)]
    assert named == ["new", "new", "near", "pair", "pair", "near", "pair", "new"]

    far = torch.tensor([[9, *range(20, 60)]])
    kinds = lambada_scores.kinds_of_targets(far, torch.tensor([[*range(20, 60), 9]]))
    assert kinds["far"][0, -1] and kinds["new"].sum() == 40
    assert (sum(where.int() for where in kinds.values()) == 1).all()  # each target is of one kind


def test_our_lambada_is_that_of_eval_ppl(tokenizer):
    """The same perplexity and accuracy as `eval_ppl.py --protocol lambada` has; the model stays as it is."""
    model = load(TEACHER)
    items = lambada_items.read_items()[:4]
    head = model.head_weight.clone()
    found = lambada_scores.on_items(model, items, tokenizer)
    args = lambada_items.ARGS
    windows = [window for item in items for window in eval_ppl.lambada(item["text"], tokenizer, args)]
    scores = eval_ppl.score_windows({"": model}, windows, args, tokenizer.vocab_size)[0]
    expected = eval_ppl.figures(scores, windows, "lambada", False)
    assert found["lambada perplexity"] == pytest.approx(expected["perplexity_per_word"][0], rel=1e-4)
    assert found["lambada accuracy"] == pytest.approx(expected["accuracy"][0])
    assert found["rescaled perplexity"] <= found["lambada perplexity"] * 1.000001
    assert np.exp(np.mean(found["items exchanged"])) == pytest.approx(found["exchanged perplexity"], rel=1e-3)
    assert torch.equal(model.head_weight, head)


# ------------------------------------------------------------------------------------ the objective
def test_routed_tokens_learn_from_the_text_alone():
    """Where the teacher is sure the gradient is that of the text, elsewhere that of the published loss."""
    generator = torch.Generator().manual_seed(0)
    student_head, teacher_head = (torch.randn(11, 5, generator=generator) for _ in range(2))
    teacher_hidden = torch.randn(6, 5, generator=generator)
    teacher_hidden[:3] *= 30
    student_hidden = torch.randn(6, 5, generator=generator, requires_grad=True)
    targets = torch.tensor([1, 2, -100, 3, 4, 5])
    settings = LossSettings(temperature=2.0, kd_weight=0.5, clm_weight=0.5)
    models = student_hidden, student_head, teacher_hidden, teacher_head

    losses = lambada.routed_losses(*models, targets, settings)
    gradient, = torch.autograd.grad(losses.loss, student_hidden)
    clm = F.cross_entropy(F.linear(student_hidden, student_head), targets, reduction="sum")
    of_text, = torch.autograd.grad(clm, student_hidden)
    both = distill.plain_losses(*models, targets, settings)
    of_both, = torch.autograd.grad(both.loss, student_hidden)

    torch.testing.assert_close(gradient[:2], of_text[:2])
    torch.testing.assert_close(gradient[3:], of_both[3:])
    assert (gradient[2] == 0).all() and (gradient[:2] - of_both[:2]).abs().max() > 0.1
    assert losses.tokens == 5
    torch.testing.assert_close(losses.clm, both.clm)


# ------------------------------------------------------------------------------------ the runs
@pytest.fixture
def small(tmp_path, monkeypatch):
    """A workshop with a small text, a small teacher and a student of it, and two arms of two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lambada, "OUT", tmp_path / "made")
    monkeypatch.setattr(lambada.options, "DEMO_TEACHER", TEACHER)
    monkeypatch.setattr(lambada, "RESULTS", tmp_path / "docs" / "results.jsonl")
    monkeypatch.setattr(lambada, "BASE", f"{lambada.BASE} --seq-len 16 --batch-size 2 --precision fp32")
    monkeypatch.setattr(lambada, "SHORT_ARMS", {"published": "--steps 2", "routed": "--steps 2 --loss plain"})
    monkeypatch.setattr(lambada, "LONG_ARMS", {})
    monkeypatch.setattr(lambada, "SEEDS", (0, 1))
    monkeypatch.setattr(lambada, "SURE", 100.0)  # so that all is routed to the text
    monkeypatch.setattr(lambada, "warm_start", lambda: None)
    monkeypatch.setattr(lambada, "questions", lambda: answer)
    monkeypatch.setattr(sys, "argv", ["lambada"])
    lambada_text.write_splits(tmp_path / "made" / "text", lambda held_out: ["def f(x):\n    return x\n" * 99])
    for who in ("teacher", "student"):
        make_model(tmp_path / "made" / who)
    return tmp_path


def answer(model):
    """In the place of figures: the norm tells students apart."""
    norm = float(model.norm.weight.detach().norm())
    return {"perplexity": 20.0, "lambada perplexity": 100.0, "lambada accuracy": 0.25, "norm": norm}


def make_model(folder):
    folder.mkdir()
    shape = {"model_type": "gpt2", "vocab_size": 4096, "n_positions": 16, "n_embd": 8, "n_layer": 1,
             "n_head": 1, "eos_token_id": 4095}
    (folder / "config.json").write_text(json.dumps(shape))
    build(folder).save(folder)
    load_tokenizer(TEACHER).save(folder, 16)


def test_the_plan_is_made_and_goes_on(small, monkeypatch, capsys):
    lambada.main()
    rows = lambada.read_rows(lambada.RESULTS)
    assert [*rows] == ["teacher", "student", "published, seed 0", "routed, seed 0", "published, seed 1",
                       "routed, seed 1"]
    trained = [rows[name]["states"]["2"]["norm"] for name in lambada.plan()]
    assert len({*trained, rows["student"]["states"]["0"]["norm"]}) == 5  # each is another student

    lines = lambada.RESULTS.read_text().splitlines()
    lambada.RESULTS.write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    made = []
    monkeypatch.setattr(lambada, "one_run", lambda name, *_: made.append(name) or rows[name])
    lambada.main()
    assert made == ["routed, seed 0"] and lambada.read_rows(lambada.RESULTS) == rows

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["lambada", "--list", "--only", "routed"])
    lambada.main()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[:5] == ["20.00", "100.0", "0.250", "routed,", "seed"]


def test_teacher_and_student_are_made_by_the_command_line(tmp_path, monkeypatch):
    """Each from the one before; the student with three of the teacher's layers. What is there stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lambada, "OUT", Path("made"))
    monkeypatch.setattr(lambada.options, "DEMO_TEACHER", TEACHER)
    monkeypatch.setattr(lambada, "write_text", lambda folder, tokenizer: folder)
    monkeypatch.setattr(lambada, "write_prose", lambda folder: folder)
    made = []

    def distil(command, check):
        args = distill.parse_args([*map(str, command[2:])])
        distill.options.check(args)
        made.append((args.student, args.out, args.lr))
        shutil.copytree(args.student, args.out)

    monkeypatch.setattr(lambada.subprocess, "run", distil)
    lambada.warm_start()
    assert made == [(TEACHER, "made/teacher", 1.5e-3), ("made/layers", "made/student-1e-3", 1e-3),
                    ("made/student-1e-3", "made/student", 1e-4)]
    assert len(load("made/student").blocks) == 3
    lambada.warm_start()
    assert len(made) == 3


def test_a_long_run_is_asked_on_its_way():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = -torch.ones(1)
    for last, expected in ((300, {4: 4.0, 16: 16.0, 64: 64.0, 256: 256.0, 300: 300.0}), (64, {64: 64.0})):
        parameter.data.zero_()
        with lambada.asked_at(last, parameter, lambda model: model.item()) as states:
            for _ in range(last):
                optimizer.step()
        for _ in range(lambada.MARKS[-1]):
            optimizer.step()  # nobody asks any more
        assert states == {str(steps): value for steps, value in expected.items()}


def test_flags_of_the_real_plan(monkeypatch):
    seen = []
    monkeypatch.setattr(distill, "load_models", lambda args, device: seen.append(args) or (None, None, None))
    for flags in lambada.plan().values():
        lambada.start(flags, "folder")
    assert len({str(vars(args)) for args in seen}) == len(seen) == 45
    assert {args.lr for args in seen} == {1e-4, 1e-3} and {args.warmup for args in seen} == {0.0, 0.25}
    assert {args.steps for args in seen} == {64, 1024}
    assert sum(args.precision == "bf16-pure" for args in seen) == 3


def test_a_name_that_no_run_has(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lambada", "--only", "seed 9"])
    with pytest.raises(SystemExit):
        run_cli(lambada.main)
    assert "seed 9: no run of the plan has this in its name" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ the page
def state(items, exchanged, loss=3.0):
    word = float(np.exp(np.mean(items)))
    return {"items": [*items], "items exchanged": [*exchanged], "loss": loss, "loss pair": 1.0,
            "perplexity": float(np.exp(loss)), "lambada perplexity": word, "rescaled perplexity": word,
            "lambada accuracy": 0.2, "copy names": 0.9, "copy random 64": 0.1, "loss new": 4.0}


def test_shares_by_hand():
    """Each word loses 1 nat, 0.75 of it only where it can be copied; with text alone 0.4, all of it there."""
    before = state(np.arange(8.0), np.arange(8.0) + 3)
    after = [state(np.arange(8.0) + 1, np.arange(8.0) + 3.25)] * 3
    found = lambada_page.change(before, after)
    assert found.total.shape == (3, 8) and (found.total == 1).all()
    assert (found.copying == 0.75).all() and (found.elsewhere == 0.25).all()
    assert lambada_page.share_of_copying(found) == "75% (75% to 75%)"
    assert lambada_page.share_of_copying(lambada_page.change(before, [before])) == "-"
    rows = {"student": {"states": {"0": before}}, "teacher": {"states": {"0": before}}}
    rows |= {f"published, seed {seed}": {"states": {"64": figures}} for seed, figures in enumerate(after)}
    rows |= {f"text alone, seed {seed}": {"states": {"64": state(np.arange(8.0) + 0.4, np.arange(8.0) + 3)}}
             for seed in range(3)}
    published, alone = lambada_page.shares_table(rows).splitlines()[2:]
    cells = [cell.strip() for cell in published.split("|")]
    assert cells[3:6] == ["+1.000 (+1.000 to +1.000)", "+0.750 (+0.750 to +0.750)", "+0.250"]
    assert cells[6:8] == ["+0.600 (+0.600 to +0.600)", "+0.350 (+0.350 to +0.350)"]
    assert [cell.strip() for cell in alone.split("|")][6:8] == ["-", "-"]
    assert lambada_page.arms_table(rows).count("\n") == 5


def test_intervals_hold_both_seeds_and_items():
    rng = np.random.default_rng(1)
    seeds = np.repeat([[0.0], [1.0], [2.0]], 100, 1)  # only seeds differ
    items = np.repeat(rng.normal(size=(1, 100)), 3, 0)  # only items do
    low, high = lambada_page.interval(seeds)
    assert low < 0.5 and high > 1.5
    low, high = lambada_page.interval(items)
    assert 0.3 < high - low < 0.5 and low < items.mean() < high


def test_the_page_is_that_of_the_results():
    """Tables of docs/lambada.md are made of docs/lambada.jsonl."""
    rows = lambada.read_rows(lambada.RESULTS)
    page = (lambada.ROOT / "docs" / "lambada.md").read_text(encoding="utf-8")
    assert lambada_page.arms_table(rows) in page and lambada_page.shares_table(rows) in page
    assert set(lambada.plan()) <= set(rows)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    rows = lambada.read_rows(lambada.RESULTS)
    lambada_page.save(lambada_page.draw(rows), tmp_path / "picture.png")
    assert 5000 < (tmp_path / "picture.png").stat().st_size < 200_000


@pytest.mark.parametrize("module", [lambada, lambada_items, lambada_page, lambada_real])
def test_help_fits_into_80_columns(module, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 80 and f"python -m {module.__name__}" in out


def test_the_command_for_the_real_models_parses():
    """The one command of docs/lambada.md that decides it: its flags exist, and its names fit together."""
    page = (lambada.ROOT / "docs" / "lambada.md").read_text(encoding="utf-8")
    command, = re.findall(r"^python distill.py (.*) && python -m extras.lambada_real (.*)$", page, re.M)
    args = distill.parse_args(command[0].split())
    distill.options.check(args)
    asked = lambada_real.parse_args(command[1].split()).models
    assert asked == [args.student, distill.options.control_of(args).out, args.out]


# ------------------------------------------------------------------------------------ models as they are
def test_words_are_parted_by_what_can_be_copied():
    texts = ["the fox saw the fox", "rain and then more snow", "a snow cap on snow"]
    copied, without, others = lambada_real.part(texts)
    assert copied == [texts[0], texts[2]] and others == [texts[1]]
    assert without == ["the snow saw the fox", "a fox cap on snow"]
    with pytest.raises(InputError, match="too few to exchange them"):
        lambada_real.part(["a fox and a fox"])


def test_the_questions_for_models_as_they_are(small, capsys, monkeypatch):
    data = small / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in (
        "the fox saw the fox", "rain and then more snow", "a snow cap on snow")))
    teacher, student = (str(small / "made" / who) for who in ("teacher", "student"))
    command = ["lambada_real", teacher, student, "--data", str(data), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    lambada_real.main()
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == ["parameters", "all words (3): perplexity", "all words: accuracy",
                    "in the passage (2): perplexity", "in the passage: accuracy",
                    "these, exchanged (2): perplexity", "these, exchanged: accuracy",
                    "not in the passage (1): perplexity", "not in the passage: accuracy",
                    "8 random tokens twice: copied"]
