"""extras/lambada.py: what it asks of models, and its page."""
import json
import re
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import distill
from data import load_tokenizer
from extras import lambada
from extras.lambada import STUDY
from model import build
from support import ROOT, flags
from support.cli import InputError

TEACHER = str(ROOT / "demo" / "teacher")
ASKING = Namespace(context=256, batch_size=16, device="cpu", protocol="lambada")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TEACHER)


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
        assert low <= lambada.copy_accuracy(Copies(4096, copies), windows, tokenizer, ASKING) <= high

    window, = lambada.random_twice(16, tokenizer, 1)
    scored = window.ids[-window.n_scored:]
    assert window.n_scored == 15 and (scored == window.ids[2:17]).all() and window.ids[0] == tokenizer.eot


def make_model(folder):
    folder.mkdir(parents=True)
    shape = {"model_type": "gpt2", "vocab_size": 4096, "n_positions": 16, "n_embd": 8, "n_layer": 1,
             "n_head": 1, "eos_token_id": 4095}
    (folder / "config.json").write_text(json.dumps(shape))
    build(folder).save(folder)
    load_tokenizer(TEACHER).save(folder, 16)


# ------------------------------------------------------------------------------------ the page
def test_the_page_is_that_of_the_rows(tmp_path):
    page = STUDY.file(".md").read_text(encoding="utf-8")
    rows = STUDY.rows()
    assert STUDY.filled(page, rows) == page and len(rows) == 101

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
    texts = ["the fox saw the fox", "unsnow snows and then more snow", "a snow cap on snow"]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    make_model(tmp_path / "small")
    lambada.main(["ask", str(tmp_path / "small"), TEACHER, "--data", str(data), "--device", "cpu"])
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == ["parameters", "8 random tokens twice: copied", "all words (3): perplexity",
                    "all words: accuracy", "in the passage (2): perplexity", "in the passage: accuracy",
                    "not in it (1): perplexity", "not in it: accuracy"]


def test_finished_runs_are_not_made_again():
    with pytest.raises(InputError, match="commit 4cd76ba"):
        lambada.main([])
