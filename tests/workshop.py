"""Runs of distill.py in miniature: two small models, some text, and the command in this process."""
import csv
import random
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import distill
from model import GPT2, GPTNeoX, load
from support.cli import run_cli

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "demo" / "teacher" / "tokenizer.json"


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """Documents of very different lengths, and two small untrained models that share a tokenizer."""
    folder = tmp_path_factory.mktemp("workshop")
    words = (ROOT / "LICENSE").read_text().split()
    rng = random.Random(0)
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i:02}.txt").write_text(" ".join(rng.choices(words, k=rng.choice([3, 20, 200]))))

    torch.manual_seed(0)
    gpt2 = GPT2.config(vocab_size=4096, context=64, width=32, n_layer=4, n_head=2, eos=4095)
    neox = GPTNeoX.config(vocab_size=4200, context=64, width=16, n_layer=2, n_head=2, mlp_width=64)
    for name, model in (("teacher", GPT2(gpt2)), ("small", GPTNeoX(neox))):
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)  # so that the answers are not all alike
        model.save(folder / name)
        (folder / name / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return folder


def flags(workshop, out, **changes):
    """Flags of a short run: flags(workshop, "out", grad_accum=1, control=True, student_layers=None)."""
    settings = {"teacher": workshop / "teacher", "student-layers": 2, "data": workshop / "text",
                "seq-len": 16, "batch-size": 2, "grad-accum": 4, "steps": 3, "lr": 1e-3, "precision": "fp32",
                "device": "cpu", "data-folder": workshop / "corpora", "workers": 1, "out": out,
                "kd-weight": 0.5, "clm-weight": 0.5, "eval-tokens": 500}
    settings |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in settings.items() if value is not None
            for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


class Ended(NamedTuple):
    code: int
    printed: str
    error: str


def call(monkeypatch, capsys, argv):
    """Run the command in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["distill.py", *map(str, argv)])
    try:
        run_cli(distill.main)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return Ended(code, *capsys.readouterr())


@pytest.fixture
def distil(workshop, monkeypatch, capsys):
    """distil(out, steps=1): a run with these flags, which has to succeed. Returns what it printed."""
    def distil(out, **changes):
        ended = call(monkeypatch, capsys, flags(workshop, out, **changes))
        assert ended.code == 0, ended.error
        return ended.printed
    return distil


@pytest.fixture
def refused(workshop, monkeypatch, capsys):
    """refused(out, "part of the message", steps=-1): a run that has to end in one clear line."""
    def refused(out, *parts, **changes):
        code, _, error = call(monkeypatch, capsys, flags(workshop, out, **changes))
        last = error.strip().splitlines()[-1] if error.strip() else ""
        assert code == 2 and last.startswith("error: ") and "Traceback" not in error, (code, error)
        for part in parts:
            assert part in last
        return last
    return refused


def weights(out):
    return load(out).state_dict()


def log_rows(out):
    return list(csv.DictReader((Path(out) / "log.csv").open()))


def difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a)
