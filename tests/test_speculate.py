"""extras/speculate.py writes what the teacher alone would write."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from extras import speculate as module
from extras.speculate import speculate
from model import GPT2, GPTNeoX
from support.cli import run_cli

V = 5


def models(V=V, std=1.0):
    """A teacher and a draft that differ a lot, in float64: no two tokens are nearly equal."""
    torch.manual_seed(0)
    teacher = GPT2(GPT2.config(vocab_size=V, context=48, width=8, n_layer=2, n_head=2)).double()
    draft = GPTNeoX(GPTNeoX.config(vocab_size=V, context=48, width=8, n_layer=1, n_head=2)).double()
    for model in (teacher, draft):
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=std)
    return teacher.eval(), draft.eval()


@torch.no_grad()
def test_several_tokens_go_on_from_a_cache():
    """What speculation needs of both models: a block of tokens after some past."""
    for model in models():
        ids = torch.randint(V, (2, 20))
        cache = model.new_cache(2, 20)
        parts = []
        past = 0
        for block in ids.split([7, 1, 5, 7], 1):
            parts.append(model.hidden(block, cache, past))
            past += block.size(1)
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden(ids))


def test_greedy_is_the_teachers_own_text():
    teacher, draft = models(V=50)
    ids = torch.tensor([[3, 1, 4]])
    alone = teacher.generate(ids, 40)
    for drafter in (draft, teacher):
        for ahead in (0, 1, 4, 60):
            text, (drafted, kept) = speculate(teacher, drafter, ids, 40, ahead, 50, temperature=0)
            assert torch.equal(text, alone), ahead
            assert kept == drafted if drafter is teacher else kept < drafted or not ahead
    assert len({*alone[0, 3:].tolist()}) > 5  # not one token again and again


@torch.no_grad()
def test_draws_have_the_teachers_distribution():
    """Chi-square of two drawn tokens against p(a) p(b | a): 24 degrees of freedom, 51.2 in one of 1,000."""
    teacher, draft = models()
    ids = torch.tensor([[3, 1, 4]])
    temperature = 1.5
    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))  # (V * V, 2)

    def of_pairs(model):
        logits = model(torch.cat((ids.expand(V * V, -1), pairs), 1))[:, 2:4] / temperature
        return logits.log_softmax(-1).gather(-1, pairs[..., None]).sum((1, 2)).exp()  # (V * V,)

    n = 1500
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(V * V)
    kept = 0
    for _ in range(n):
        text, (_, n_kept) = speculate(teacher, draft, ids, 2, 1, V, temperature, generator)
        counts[text[0, 3] * V + text[0, 4]] += 1
        kept += n_kept

    expected = n * of_pairs(teacher)
    assert ((counts - expected) ** 2 / expected).sum() < 51.2
    drafts = n * of_pairs(draft)
    assert ((drafts - expected) ** 2 / expected).sum() > 300  # the draft's own texts would not pass

    # How often a first token is kept is sum over V of min(p, q): the acceptance of support/scoring.py.
    p, q = ((model(ids)[0, -1] / temperature).softmax(-1) for model in (teacher, draft))
    acceptance = torch.minimum(p, q).sum().item()
    assert kept / n == pytest.approx(acceptance, abs=4 * (acceptance * (1 - acceptance) / n) ** 0.5)


def test_the_command(workshop, tmp_path, monkeypatch, capsys):
    """The student and, found beside it, its control; a model as its own draft keeps everything."""
    (tmp_path / "out").mkdir()
    for name, of in (("out", "teacher"), ("out/control", "small")):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for file in (workshop / of).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)

    def command(*argv):
        flags = ["--model", str(workshop / "teacher"), "--tokens", "20", "--num", "2", "--prompt", "def f"]
        monkeypatch.setattr(sys, "argv", ["speculate", *flags, *argv])
        try:
            run_cli(module.main)
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    code, printed = command("--temperature", "0")
    rows = [line.split("|")[1:4] for line in printed.splitlines() if line.startswith("|")][2:]
    assert code == 0 and printed.count("the text is the same") == 2, printed
    assert [row[0].strip() for row in rows] == ["none", "out", "out/control"]
    assert rows[1][1].strip() == "100.0%" and float(rows[1][2]) == 5.0
    assert float(rows[2][2]) < 2
    assert "the rest of the draft is thrown away" in " ".join(printed.split())

    moments = iter((0, 2, 2, 4, 4, 5, 5, 9))  # none twice, out, out/control
    with monkeypatch.context() as patch:
        patch.setattr(module, "time", SimpleNamespace(perf_counter=moments.__next__))
        assert command()[1].splitlines()[-1].startswith("slower here: drafts of out/control cost more")

    code, printed = command("--tokens", "100")
    assert code == 2 and "fewer --tokens" in printed
    (tmp_path / "out/config.json").unlink()
    code, printed = command()
    assert code == 2 and "no student in out/ yet" in printed


def test_a_draft_of_another_family_is_refused(workshop, tmp_path, monkeypatch, capsys):
    for file in (workshop / "small").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((workshop / "small" / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    flags = ["--model", str(workshop / "teacher"), "--draft", str(tmp_path), "--tokens", "2", "--num", "1"]
    monkeypatch.setattr(sys, "argv", ["speculate", *flags])
    with pytest.raises(SystemExit):
        run_cli(module.main)
    assert "different tokenizers" in capsys.readouterr().err
