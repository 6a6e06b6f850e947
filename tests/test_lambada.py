"""extras/lambada.py: its text, what it asks of models, its runs, its page, and the real models."""
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import distill
from data import load_tokenizer
from extras import lambada
from extras.lambada import STUDY
from model import build
from support import flags

TEACHER = str(lambada.ROOT / "demo" / "teacher")
NAMES = ["heap", "item", "queue", "title", "wait", "shape", "short", "other"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TEACHER)


def library(monkeypatch, modules):
    """{path: text} instead of the standard library; b.py is held out."""
    monkeypatch.setattr(lambada, "stdlib_documents", lambda: modules.items())
    monkeypatch.setattr(lambada, "stdlib_held_out", lambda path: path == "b.py")


# ------------------------------------------------------------------------------------ the text
def test_each_name_becomes_one_other_name():
    text = "def push(heap, item):\n    heap.append(item)  # heap, item_count"
    new = lambada.rename(text, NAMES, np.random.default_rng(0))
    heap, item = re.match(r"def push\((\w+), (\w+)\)", new).groups()
    assert new == f"def push({heap}, {item}):\n    {heap}.append({item})  # {heap}, item_count"
    assert new != lambada.rename(text, NAMES, np.random.default_rng(1))
    all_names = " ".join(NAMES)
    assert sorted(lambada.rename(all_names, NAMES, np.random.default_rng(0)).split()) == sorted(NAMES)


def test_lists_are_repeated_and_only_in_training(monkeypatch):
    monkeypatch.setattr(lambada, "LIST_NAMES", (2, 5))
    library(monkeypatch, {"a.py": "heap\n" * 99, "b.py": "item = 1"})
    train = [*lambada.renamed_modules(NAMES, False)]
    lists = [text for text in train if text.count("\n") == 2]
    assert len(train) - len(lists) == lambada.COPIES
    for text in lists:
        first, second, end = text.split("\n")
        assert first == second and end == ""
    assert 0.2 < sum(map(len, lists)) / sum(map(len, train)) < 0.35
    held_out, = lambada.renamed_modules(NAMES, True)
    assert re.fullmatch(r"\w+ = 1", held_out)


def test_other_text_is_docstrings(tmp_path, monkeypatch):
    code = '"""Of the module."""\ndef f():\n    """Of f."""\n    return "no docstring"\n'
    library(monkeypatch, {"a.py": code, "b.py": code, "c.py": "x = 1"})
    lambada.write_text(tmp_path / "prose", lambada.docstrings)
    for split in ("train", "val"):
        line, = (tmp_path / "prose" / f"{split}.jsonl").read_text().splitlines()
        assert json.loads(line) == {"text": "Of the module.\n\nOf f."}


# ------------------------------------------------------------------------------------ what a model is asked
class Copies:
    """A model that says what followed the present token when it last occurred; otherwise token 0."""
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


def test_copying_is_seen_where_it_happens(tokenizer):
    for copies, low, high in ((True, 0.95, 1.0), (False, 0.0, 0.05)):
        windows = lambada.random_twice(16, tokenizer, 4)
        assert low <= lambada.copy_accuracy(Copies(4096, copies), windows, tokenizer) <= high

    window, = lambada.random_twice(16, tokenizer, 1)
    scored = window.ids[-window.n_scored:]
    assert window.n_scored == 15 and (scored == window.ids[2:17]).all() and window.ids[0] == tokenizer.eot
    window, = lambada.names_twice(NAMES, tokenizer, 1)
    scored = tokenizer.decode(window.ids[-window.n_scored:].tolist())
    line = tokenizer.decode(window.ids[1:].tolist()).partition("\n")[0]
    assert scored == line[line.index(" "):]  # all but the first name


def test_pairs_and_new_tokens():
    #                       a  b  c  a  b  c  c  a  d
    blocks = torch.tensor([[1, 2, 3, 1, 2, 3, 3, 1, 4]])
    pair, new = lambada.pairs_and_new(blocks)
    assert pair[0].tolist() == [False, False, False, True, True, False, True, False]
    assert new[0].tolist() == [True, True, False, False, False, False, False, True]


def test_routed_tokens_learn_from_the_text_alone():
    """Where the teacher is sure, the gradient is that of the text; elsewhere that of the published loss."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 11, generator=generator)
    teacher[:3] *= 30
    student = torch.randn(6, 11, generator=generator, requires_grad=True)
    targets = torch.tensor([1, 2, -100, 3, 4, 5])
    settings = distill.LossSettings(temperature=2.0, kd_weight=0.5, clm_weight=0.5)

    loss, _, clm = lambada.routed_loss(student, teacher, targets, settings)
    gradient, = torch.autograd.grad(loss, student)
    of_text, = torch.autograd.grad(F.cross_entropy(student, targets, reduction="sum"), student)
    both, _, clm_of_both = distill.plain_loss(student, teacher, targets, settings)
    of_both, = torch.autograd.grad(both, student)

    torch.testing.assert_close(gradient[:2], of_text[:2])
    torch.testing.assert_close(gradient[3:], of_both[3:])
    assert (gradient[2] == 0).all() and (gradient[:2] - of_both[:2]).abs().max() > 0.1
    torch.testing.assert_close(clm, clm_of_both)


# ------------------------------------------------------------------------------------ the runs
def make_model(folder):
    folder.mkdir(parents=True)
    shape = {"model_type": "gpt2", "vocab_size": 4096, "n_positions": 16, "n_embd": 8, "n_layer": 1,
             "n_head": 1, "eos_token_id": 4095}
    (folder / "config.json").write_text(json.dumps(shape))
    build(folder).save(folder)
    load_tokenizer(TEACHER).save(folder, 16)


def test_a_run_is_asked_and_routed(tmp_path, monkeypatch):
    """Two steps of a small student. All is routed to the text, so that arm trains as the text alone does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lambada, "SURE", 100.0)
    monkeypatch.setattr(lambada, "BASE", f"{lambada.BASE} --seq-len 16 --batch-size 2 --precision fp32")
    models = Path("out-lambada")
    monkeypatch.setattr(lambada, "warm_start",
                        lambda start: (models, lambda model: model.head_weight.detach().clone()))
    lambada.write_text(Path("out-lambada/text"), lambda held_out: ["def f(x):\n    return x\n" * 99])
    for who in ("teacher", "student"):
        make_model(Path("out-lambada", who))

    before = lambada.one_run("student", "")["states"]["0"]
    arms = {"published, seed 0": "", "routed, seed 0": "",
            "text alone, seed 0": "--kd-weight 0 --clm-weight 1"}
    published, routed, text = (lambada.one_run(name, f"--steps 2 {changed}")["states"]["2"]
                               for name, changed in arms.items())
    assert torch.allclose(routed, text, rtol=0, atol=1e-6)
    assert (published - text).abs().max() > 1e-5 and (before - text).abs().max() > 1e-5


def test_a_long_run_is_asked_on_its_way():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = -torch.ones(1)
    for last, expected in ((300, {4: 4.0, 16: 16.0, 64: 64.0, 256: 256.0, 300: 300.0}), (64, {64: 64.0})):
        parameter.data.zero_()
        states = {}
        with lambada.asked(last, parameter, lambda model: model.item(), states):
            for _ in range(last):
                optimizer.step()
        for _ in range(lambada.MARKS[-1]):
            optimizer.step()  # nobody asks any more
        assert states == {str(steps): value for steps, value in expected.items()}


def test_teacher_and_student_are_made_by_the_command_line(tmp_path, monkeypatch):
    """Each from the one before; the student has three of the teacher's layers. What is there stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lambada, "prepare", lambda *_: SimpleNamespace(val=None))
    monkeypatch.setattr(lambada, "write_text", lambda *_: None)
    made = []

    def distil(command, check):
        args = distill.parse_args([*map(str, command[2:])])
        flags.check(args)
        made.append((args.teacher, args.student or args.student_layers, args.out, args.lr, args.seed))
        assert (args.kd_weight, args.clm_weight) == (0, 1)
        Path(args.out).mkdir(parents=True)
        (Path(args.out) / "model.safetensors").touch()

    monkeypatch.setattr(lambada.subprocess, "run", distil)
    for start in (0, 0, 2):
        lambada.warm_start.cache_clear()
        lambada.warm_start(start)
        teacher, rough, student = (
            f"out-lambada/start-{start}/{who}" for who in ("teacher", "student-1e-3", "student"))
        seed = 10 * start
        assert made[-3:] == [("none", TEACHER, teacher, 1.5e-3, seed),
                             (teacher, "0,2,5", rough, 1e-3, seed + 1),
                             ("none", rough, student, 1e-4, seed + 2)]
    assert len(made) == 6
    lambada.warm_start.cache_clear()


def test_flags_of_the_real_plan():
    """Each arm is a valid command, and different from the others; `routed` differs in its loss alone."""
    seen = []
    for name, changed in lambada.PLAN.items():
        if name.split(", ")[-1] not in lambada.WARM_START:
            args = distill.parse_args(f"{lambada.BASE} {changed} --out folder".split())
            flags.check(args)
            seen.append(args)
    # The ladder repeats arms from other warm starts: new are text alone x4, and both arms x16.
    assert len(seen) == 45 + 54 and len({str(vars(args)) for args in seen}) == 42 + 9
    assert {args.lr for args in seen} == {1e-4, 1e-3} and {args.warmup for args in seen} == {0.0, 0.25}


# ------------------------------------------------------------------------------------ the page
def test_the_page_is_that_of_the_rows(tmp_path):
    page = STUDY.file(".md").read_text(encoding="utf-8")
    rows = STUDY.rows()
    assert STUDY.filled(page, rows) == page and rows.keys() <= lambada.PLAN.keys()
    assert all(name.startswith("ladder") for name in lambada.PLAN.keys() - rows.keys())

    # The figures of its summary: published less text alone, and T = 2 less T = 1, seed by seed.
    items = {label: lambada.column(seeds, "items") for label, seeds in lambada.states_of(rows).items()}
    text = " ".join(page.split())
    for more, less, words in (("published", "text alone", "by {} nats a word (95% interval {} to {})"),
                              ("published", "T 1", "by {} nats a word ({} to {})"),
                              ("teacher alone", "teacher alone, T 1", "by {} ({} to {})")):
        found = re.findall(r"[\d.]+", lambada.interval(items[more] - items[less]))
        assert words.format(*found) in text

    pytest.importorskip("matplotlib")
    lambada.draw(rows).savefig(tmp_path / "picture.png")
    assert 5000 < (tmp_path / "picture.png").stat().st_size < 200_000


def test_changes_by_hand():
    """Each word loses 1 nat, with the text alone 0.4."""
    def state(more):
        items = np.arange(8.0) + more
        return {"items": items.tolist(), "loss": 3.0 + more, "copy names": 0.9 - more / 10,
                "copy random 64": 0.5}

    rows = {"student": {"states": {"0": state(0.0)}}}
    for seed in range(3):
        rows[f"published, seed {seed}"] = {"states": {"64": state(1.0)}}
        rows[f"text alone, seed {seed}"] = {"states": {"64": state(0.4)}}
    published, alone = ([*line.values()] for line in lambada.changes_table(rows))
    assert published == ["published", "+1.000", "+1.000 (+1.000 to +1.000)", "+0.600 (+0.600 to +0.600)",
                         "-0.060 (-0.060 to -0.060)", "+0.000 (+0.000 to +0.000)"]
    assert alone[3:] == ["-", "-", "-"]


# ------------------------------------------------------------------------------------ the real models
def test_the_command_for_the_real_models_parses():
    page = STUDY.file(".md").read_text(encoding="utf-8")
    train, ask = re.findall(r"^python distill.py (.*) && python -m extras.lambada ask (.*)$", page, re.M)[0]
    args = distill.parse_args(train.split())
    flags.check(args)
    assert lambada.parse_ask(ask.split()).models == [args.student, flags.control_of(args).out, args.out]


def test_questions_for_models_that_you_have(tmp_path, capsys):
    data = tmp_path / "texts.jsonl"
    texts = ["the fox saw the fox", "rain and then more snow", "a snow cap on snow"]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    make_model(tmp_path / "small")
    lambada.main(["ask", str(tmp_path / "small"), TEACHER, "--data", str(data), "--device", "cpu"])
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == ["parameters", "8 random tokens twice: copied", "all words (3): perplexity",
                    "all words: accuracy", "in the passage (2): perplexity", "in the passage: accuracy",
                    "not in it (1): perplexity", "not in it: accuracy"]
