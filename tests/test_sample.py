"""sample.py: what the prompt means, how tokens are drawn, and bad input."""
import io
import sys
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


def test_end_of_text_in_a_prompt_is_the_token(write, monkeypatch):
    seen = []
    generate = GPT2.generate

    def watched(model, ids, *rest):
        seen.append(ids[0].tolist())
        return generate(model, ids, *rest)

    monkeypatch.setattr(GPT2, "generate", watched)
    tokenizer = load_tokenizer(TEACHER)
    for prompt in ("", "<|endoftext|>", "a<|endoftext|>b"):
        assert write("--prompt", prompt)[0] == 0
    assert seen == [[tokenizer.eot], [tokenizer.eot],
                    [*tokenizer.encode("a"), tokenizer.eot, *tokenizer.encode("b")]]


def test_prompt_from_standard_input(write):
    """UTF-8 whatever the console's encoding is; a byte order mark is not text."""
    greedy = "--temperature", "0"
    code, out, _ = write("--prompt", "-", *greedy, stdin="# é\ndef f".encode("utf-8-sig"))
    assert code == 0 and out.startswith(f"--- {TEACHER}\n# é\ndef f")
    assert out == write("--prompt", "# é\ndef f", *greedy)[1]


def test_near_absolute_zero_the_likeliest_token_is_taken(write):
    for cold in ("1e-20", "1e-39", "5e-324"):
        assert write("--temperature", cold) == write("--temperature", "0")
    logits = torch.tensor([[-30.0, 1000.0, 999.0]])
    assert all(sample.draw(logits, t).item() == 1 for t in (1e-320, 1e-39, 1e-31, 1e-30, 1e-29, 1e-9))


def test_extreme_logits():
    """At a huge T all tokens are alike; -inf is never drawn. (test_model.py has ordinary logits.)"""
    generator = torch.Generator().manual_seed(0)
    for logits, T, expected in [
            ([-30.0, 1000, 999], 1e30, [1 / 3] * 3), ([0.0, -torch.inf, 0], 0.5, [0.5, 0, 0.5])]:
        drawn = sample.draw(torch.tensor([logits]).expand(4000, 3), T, generator=generator)
        shares = drawn.flatten().bincount(minlength=3) / 4000
        assert shares.tolist() == pytest.approx(expected, abs=0.03)
        assert not shares[torch.tensor(expected) == 0].any()


def test_a_text_ends_with_its_document(write, monkeypatch):
    tokenizer = load_tokenizer(TEACHER)
    written = torch.tensor([[*tokenizer.encode("yes"), tokenizer.eot, *tokenizer.encode("no")]])
    monkeypatch.setattr(GPT2, "generate", lambda model, ids, *rest: torch.cat((ids, written), 1))
    assert write("--prompt", "a ")[1] == f"--- {TEACHER}\na yes\n\n"


def test_several_texts_are_numbered(write):
    headings = [line for line in write("--num", "2")[1].splitlines() if line.startswith("---")]
    assert headings == [f"--- {TEACHER}, 1 of 2", f"--- {TEACHER}, 2 of 2"]


def test_a_name_given_twice_writes_once(write):
    assert write("--compare", TEACHER)[1].count("--- ") == 1


BAD_INPUT = [
    (["--temperature", "nan"], "--temperature nan: must be 0 or more"),
    (["--temperature", "-1"], "--temperature -1: must be 0 or more"),
    (["--top-p", "0"], "--top-p 0: must be above 0 and at most 1"),
    (["--top-k", "9" * 20], "--top-k 9999"),
    (["--seed", "9" * 20], "must be 0 to 2^63 - 1"),
    (["--tokens", "0"], "--tokens 0: must be 1 to 1000000"),
    (["--num", "1" + "0" * 30], "--num 1000"),
    (["--device", "nonsense"], "--device nonsense does not work here"),
    (["--prompt", "a\udcffb"], r"--prompt a\udcffb is not UTF-8 text: see its byte 1"),
    (["--prompt", "a\ud800"], "is not UTF-8 text"),
    (["--prompt", "-"], "--prompt - is not UTF-8 text: see its byte 2"),
    (["--model", "out"], "run `python distill.py` first"),
    (["--model", "outt"], "no folder outt; did you mean out?"),
]


def test_bad_input(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for argv, message in BAD_INPUT:
        code, out, errors = write(*argv, stdin=b"ab\xff")
        assert (code, out) == (2, ""), argv
        assert errors.startswith("error: ") and errors.count("\n") == 1 and message in errors, errors

    seed = str(2**63 - 1)  # the largest values work
    assert write("--seed", seed, "--top-k", seed)[0] == 0


def test_a_long_prompt_is_noted(write, small):
    code, _, errors = write("--prompt", "a b c d " * 9, model=small())
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
