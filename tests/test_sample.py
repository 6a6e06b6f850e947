"""sample.py: what the prompt means, how tokens are drawn, and bad input."""
import io
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import sample
from model import GPT2, load
from support.cli import run_cli
from support.tokenizer import load_tokenizer

TEACHER = str(Path(__file__).parent.parent / "demo" / "teacher")


@pytest.fixture
def write(monkeypatch, capsys):
    """write("--prompt", "x", stdin=b"") -> (exit code, what is printed, what is said on stderr)."""
    def write(*argv, stdin=b"", model=TEACHER):
        argv = ["sample.py", "--model", model, "--device", "cpu", "--tokens", "8", *argv]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = 0
        try:
            run_cli(sample.main)
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()
    return write


@pytest.fixture
def small(tmp_path, tokenizers_dir):
    """small(vocab_size, scale): a folder with a model whose final norm is multiplied by `scale`."""
    def small(vocab_size=600, scale=1.0):
        tokenizer = load_tokenizer(tokenizers_dir / "gpt2")
        model = GPT2(GPT2.config(vocab_size=vocab_size, context=16, width=8, n_layer=1, n_head=2,
                                 eos=tokenizer.eot))
        model.norm.weight.data *= scale
        model.save(tmp_path)
        tokenizer.save(tmp_path)
        return str(tmp_path)
    return small


# ------------------------------------------------------------------------------------ draws
def test_what_is_drawn():
    """Shares of 20,000 draws. A token that is cut off never comes, and the logits stay as they were."""
    usual = torch.tensor([0.2, 0.5, 0.05, 0.25]).log()
    extreme = torch.tensor([-30.0, 1000.0, 999.0])
    for logits, options, expected in [
            (usual, {}, [0.2, 0.5, 0.05, 0.25]),
            (usual, {"temperature": 0.5}, [0.04 / 0.355, 0.25 / 0.355, 0.0025 / 0.355, 0.0625 / 0.355]),
            (usual, {"top_k": 2}, [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
            (usual, {"top_p": 0.7}, [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
            (usual, {"top_p": 0.76}, [0.2 / 0.95, 0.5 / 0.95, 0, 0.25 / 0.95]),
            (usual, {"top_k": 3, "top_p": 0.6}, [0, 0.5 / 0.75, 0, 0.25 / 0.75]),
            (extreme, {"temperature": 1e30}, [1 / 3] * 3),
            *((extreme, {"temperature": T}, [0, 1, 0]) for T in (0, 1e-320, 1e-39, 1e-30, 1e-9)),
            (torch.tensor([0.0, -torch.inf, 0.0]), {"temperature": 0.5}, [0.5, 0, 0.5])]:
        rows = logits.expand(20_000, -1).clone()
        generator = torch.Generator().manual_seed(0)
        drawn = sample.draw(rows, **{"temperature": 1.0} | options, generator=generator)
        shares = drawn.flatten().bincount(minlength=len(logits)) / len(rows)
        assert shares.tolist() == pytest.approx(expected, abs=0.015), options
        assert not shares[torch.tensor(expected) == 0].any() and (rows == logits).all(), options


def test_the_same_seed_gives_the_same_text(write, small):
    write = partial(write, model=small())
    assert write("--seed", "3") == write("--seed", "3") != write("--seed", "4")


# ------------------------------------------------------------------------------------ the command
def test_a_prompt_and_what_follows_it(write, monkeypatch):
    """<|endoftext|> in a prompt means the token, and the text ends where the model writes it."""
    tokenizer = load_tokenizer(TEACHER)
    written = torch.tensor([[*tokenizer.encode("yes"), tokenizer.eot, *tokenizer.encode("no")]])
    seen = []

    def generate(model, ids, *_):
        seen.append(ids.tolist())
        return torch.cat((ids, written.expand(len(ids), -1)), 1)

    monkeypatch.setattr(GPT2, "generate", generate)
    a, b, eot = tokenizer.encode("a"), tokenizer.encode("b"), tokenizer.eot
    for prompt, ids in {"": [eot], "<|endoftext|>": [eot], "a<|endoftext|>b": [*a, eot, *b]}.items():
        assert write("--prompt", prompt) == (0, f"--- {TEACHER}\n{prompt}yes\n\n", "")
        assert seen.pop() == [ids]

    # A name that is given twice writes once; several texts are numbered.
    _, out, _ = write("--num", "2", "--compare", TEACHER)
    headings = [line for line in out.splitlines() if line.startswith("---")]
    assert headings == [f"--- {TEACHER}, 1 of 2", f"--- {TEACHER}, 2 of 2"]


def test_prompt_from_standard_input(write, small):
    """UTF-8 whatever the console's encoding is; a byte order mark is not text."""
    write = partial(write, model=small())
    code, out, _ = write("--prompt", "-", stdin="# é\ndef f".encode("utf-8-sig"))
    assert code == 0 and out == write("--prompt", "# é\ndef f")[1]


BAD_INPUT = [
    (["--temperature", "nan"], "--temperature nan"),
    (["--top-p", "0"], "--top-p 0"),
    (["--seed", "9" * 20], "must be 0 to 2^63 - 1"),
    (["--tokens", "0"], "--tokens 0"),
    (["--device", "nonsense"], "--device nonsense does not work here"),
    (["--prompt", "a\udcffb"], r"--prompt a\udcffb is not UTF-8 text: see its byte 1"),
    (["--prompt", "a\ud800"], "is not UTF-8 text"),
    (["--prompt", "-"], "--prompt - is not UTF-8 text: see its byte 2"),
    (["--model", "out"], "run `python distill.py` first"),
    (["--model", "outt"], "no folder outt; did you mean out?"),
]


def test_bad_input(write, small, tmp_path, monkeypatch):
    """One line that names the thing. The largest values work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for argv, message in BAD_INPUT:
        code, out, errors = write(*argv, stdin=b"ab\xff")
        assert (code, out) == (2, ""), argv
        assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors, errors

    largest = str(2**63 - 1)
    code, _, errors = write("--seed", largest, "--top-k", largest, "--prompt", "a b c d " * 9, model=small())
    assert code == 0 and "only sees the last 16" in errors


def test_broken_models_are_named(write, small):
    """Weights that are finite, but lead beyond what a float holds; fewer embeddings than tokens."""
    broken = small(scale=3e38)
    load(broken)
    for temperature in ("0", "1"):
        code, _, errors = write("--temperature", temperature, model=broken)
        assert code == 2 and errors.startswith(f"error: {broken}: its logits are NaN or infinite")
    code, _, errors = write(model=small(vocab_size=500))
    assert code == 2 and "its tokenizer has 600 tokens and its model only 500" in errors
