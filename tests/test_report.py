"""What a run says: verdicts that are true in all cases, advice that works, commands to paste."""
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from workshop import ROOT, call, flags

import distill
from data import load_tokenizer
from support import report, scoring
from support.scoring import SCORES


# ------------------------------------------------------------------------------------ the whole story
def test_a_run_tells_its_story(distil, refused, tmp_path, monkeypatch):
    """In 80 columns; the command that it suggests works from another folder; results.json has the table, and
    the same command tells it again."""
    monkeypatch.chdir(tmp_path)
    printed = distil("my out", control=True)
    place = 0
    for title in ("teacher ", "control ", "objective ", "steps ", "teacher    needs", "memory ",
                  "control    now learns", "| model", "KL to teacher is at T = 1; the kl in log.csv is",
                  "± is", "| model", "Acceptance is", "After the words", "the text has", "the student",
                  "the control", "The student is in", "Next:"):
        place = printed.index(title, place) + 1  # in this order
    long = [line for line in printed.splitlines() if len(line) > 80]
    assert [line for line in long if max(map(len, line.split())) < 50] == [], "but for long paths"
    assert printed.count("\nmemory ") == 1

    sample = re.search(r"cd .* sample\.py (?:.*\\\n)*.*", printed)[0].replace("python", sys.executable, 1)
    done = subprocess.run(f"{sample} --tokens 2 --precision fp32", shell=True, cwd="/", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"---") == 9 and done.stdout.count(b"def read_config") == 9  # three texts each

    out = tmp_path / "my out"
    results = json.loads((out / "results.json").read_text())
    rows = results["rows"]
    assert [*rows] == ["teacher", "student", "control"] and results["settings"]["steps"] == 3
    for name, row in rows.items():
        assert f"| {name} | {row['loss']:.4f} |" in printed
    assert rows["teacher"]["acceptance"] == pytest.approx(1) and 0 < rows["student"]["acceptance"] < 1
    assert rows["student"]["tokens per second"] > 1
    assert results["differences"]["control - student"][0] == pytest.approx(
        rows["control"]["loss"] - rows["student"]["loss"])
    card = (out / "README.md").read_text()
    assert "# A distilled GPT" in card and results["objective"] in card and results["verdict"] in card

    again = distil("my out", control=True)
    assert "is finished" in again and "After the words" not in again
    end = printed[printed.index("| model"):printed.index("After the words")]  # tables and verdict
    assert end in again and "Next:" in again
    for damage in ("", "[]", '{"rows": 7, "verdict": ""}'):
        (out / "results.json").write_text(damage)
        refused("my out", "results.json is not the results of a run", control=True)


def test_text_alone_says_whether_it_helped(workshop, distil, tmp_path, monkeypatch):
    """And results.json is JSON even if a perplexity overflows."""
    monkeypatch.setattr(scoring, "exp", lambda nats: math.inf)
    argv = {"teacher": "none", "student": workshop / "small", "student-layers": None, "kd-weight": None}
    printed = distil(tmp_path / "out", **argv)
    assert not re.search("(?<!demo/)teacher|Acceptance|± is", printed)
    before = re.search(r"step 0 +held-out loss (\d+\.\d{3})", printed)[1]
    assert re.search(rf"\n\nHeld-out loss: before {before}, after \d+\.\d{{3}}\.\n\n", printed)
    assert "# A trained GPT" in (tmp_path / "out" / "README.md").read_text()

    worse = distil(tmp_path / "worse", **argv, lr=1, grad_clip=0)
    assert re.search(rf"before {before}, after .*: training made it worse; take fewer --steps\.\n", worse)
    text = (tmp_path / "out" / "results.json").read_text()
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["rows"]
    assert rows["student"]["perplexity"] is None
    assert "finished" in distil(tmp_path / "out", **argv)


# ------------------------------------------------------------------------------------ the plan and the bar
def test_the_plan_counts_passes_over_the_text(workshop, tmp_path, monkeypatch):
    """A warning above 10, with a number of steps that is not too many."""
    said = []
    monkeypatch.setattr(report, "say", said.append)
    counts = {"documents": 40, "tokens": 2002}
    corpus = SimpleNamespace(train=range(1001), val=range(50), meta={"train": counts})
    student = distill.load(workshop / "small")
    for packing, steps, passes, enough in (  # of 8 examples; padded, half of the documents are used
            ("constant", 100, 8, None), ("constant", 200, 16, 125), ("padded", 25, 10, None),
            ("padded", 40, 16, 25)):
        args = distill.parse_args(flags(workshop, tmp_path, steps=steps, packing=packing, seq_len=10))
        said.clear()
        report.print_plan(args, None, student, corpus, SimpleNamespace(world=1, device="cpu"))
        plan = " ".join(" ".join(said).split())
        assert f"80 tokens (4 x 2 x 10): {passes} passes over the text" in plan
        warning = f"same text {passes} times and may learn it by heart: take more text, or --steps {enough}"
        assert (warning in plan) == ("warning" in plan) == (enough is not None)


def test_the_bar_covers_all_the_work(distil, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(report, "open_bar", lambda open_bar=report.open_bar, **settings:
                        bars.append(open_bar(**settings)) or bars[-1])
    for resume, tokens in ((None, 500), (True, 400)):  # what was done before counts, too
        distil(tmp_path / "out", control=True, resume=resume, grad_accum=2, eval_tokens=tokens)
        assert bars[-1].n == bars[-1].total == 3 * 2 + 3 * 2 + math.ceil(tokens / 16 / 2)
        assert bars[-1].desc == "scoring: "


def test_peak_memory_is_measured():
    """A tensor that is larger by 1,000 MB moves it by the same amount; larger than what importing takes, and
    than this process, whose peak a new process may start from."""
    code = ("import torch; from support.ranks import peak_memory as peak; cpu = torch.device('cpu'); "
            "[print(torch.ones(n).device, peak(cpu)) for n in (5 * 10**8, 75 * 10**7)]")
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    small, large = map(int, re.findall(r"\d+", printed))
    assert 900e6 < large - small < 1100e6


# ------------------------------------------------------------------------------------ an unknown text
def test_a_teacher_that_does_not_know_the_text(workshop, distil, tmp_path, monkeypatch, capsys):
    """Random weights do not. It is asked before the first step, and the advice is not refused."""
    monkeypatch.chdir(tmp_path)
    printed = distil("out")
    assert "trains it on the text first" in " ".join(printed.split("memory")[0].split())
    assert "bits for each byte" not in printed.split("memory")[1]
    tune, again = (shlex.split(words.replace("\\\n", ""))
                   for words in re.findall(r"^  python distill\.py ((?:.*\\\n)*.*)", printed, re.M))
    assert call(monkeypatch, capsys, tune).code == 0
    assert again[:2] == ["--student-layers", "2"] and again[-2:] == ["--out", "out-2"]
    code, printed, _ = call(monkeypatch, capsys, again)
    assert code == 0 and "teacher    tuned-teacher: " in printed and Path("out-2", "results.json").exists()
    assert "teacher    needs" in printed
    assert "bits for each byte" not in printed, "it has been tuned on this text already"


def test_a_teacher_that_knows_the_text_is_not_accused(tmp_path, monkeypatch):
    """The demo's teacher knows modules of Python, and not this; the length of the text does not matter."""
    tokenizer = load_tokenizer(ROOT / "demo" / "teacher")
    teacher = distill.load(ROOT / "demo" / "teacher")
    said = []
    monkeypatch.setattr(report, "say", said.append)
    args = distill.parse_args(["--precision", "fp32", "--out", str(tmp_path / "out")])
    shouted = (ROOT / "LICENSE").read_text().upper() * 9
    texts = {"module": Path(textwrap.__file__).read_text(), "prose": shouted}
    for name, text in texts.items():
        for n_tokens in (300, 2000):
            ids = tokenizer.encode(text)[:n_tokens]
            n_bytes = len(tokenizer.decode(ids).encode())
            corpus = SimpleNamespace(train=np.zeros(102_401), val=np.array(ids), eot=tokenizer.eot,
                                     meta={"val": {"bytes": n_bytes, "tokens": len(ids)}})
            said.clear()
            report.warn_of_unknown_text(args, teacher, corpus, tokenizer)
            assert re.fullmatch(r"teacher    needs about \d\.\d\d bits per byte of this text: .*", said[0])
            assert bool(said[1:]) == (name == "prose"), (name, n_tokens)
            if said[1:]:  # the run reads this text six times; the teacher is tuned on a third of that
                assert "--steps 400" in said[2]


# ------------------------------------------------------------------------------------ what the table means
def verdict(*losses, noise=0.01):
    """Of teacher, student and perhaps control, as one line."""
    named = dict(zip(("teacher", "student", "control"), losses, strict=False))
    gaps = {f"{b} - {a}": (named[b] - named[a], noise) for a, b in itertools.combinations(named, 2)}
    text = report.verdict(distill.parse_args([]), {"student": (losses[1], 20 * noise), **gaps}, [])
    assert all(len(line) <= 80 for line in text.splitlines())
    return " ".join(text.split())


def test_each_order_of_the_three_has_its_own_true_sentences():
    """Nats come first; a share only of a gap that is there; what lies within the noise is a tie."""
    passed = "has trained on this text and the teacher has not, so it can be better here"
    cases = [  # losses of teacher, student and control; what is said, and what is not
        ((3.0, 3.2, 3.5), ["student is 0.300 nats (± 0.010) better than the control", "closes 60% of the gap",
                           "0.500 nats"], [passed, "tied"]),
        ((3.0, 2.8, 2.9), ["student is 0.100 nats", "student is 0.200 nats (± 0.010) better than the teacher",
                           "control is 0.100 nats (± 0.010) better than the teacher",
                           f"The student {passed}"], ["closes"]),
        ((3.0, 3.2, 2.9), ["control is 0.300 nats (± 0.010) better than the student", "teacher is 0.200 nats",
                           "Text alone was worth more", "control is 0.100 nats", f"The control {passed}"],
         ["closes"]),
        ((3.0, 3.6, 3.5), ["control is 0.100 nats", "teacher is 0.600 nats"], ["closes", passed]),
        ((3.0, 3.005, 3.3), ["student is 0.295 nats", "The teacher and the student are tied, 0.005 nats"],
         ["closes", passed]),
        ((3.0, 3.2, 3.205), ["The student and the control are tied", "no gain from the teacher shows",
                             "teacher is 0.200 nats"], ["closes", passed]),
        ((3.0, 3.2), ["teacher is 0.200 nats", "the command with --resume --control."], ["closes"]),
    ]
    for losses, said, unsaid in cases:
        text = verdict(*losses)
        assert [part for part in said if part not in text] == [], (losses, text)
        assert [part for part in unsaid if part in text] == [], (losses, text)
        assert "± is two standard errors" in text and "by up to 0.200, but all of them together" in text

    few = verdict(3.0, 3.2, 3.5, noise=math.inf)
    assert "too short" in few and few.count("tied") == 2 and "±" not in few


def test_a_model_that_got_worse_is_said(tmp_path):
    """Beyond the noise, and only if the losses on the way are of as much text as the table's."""
    args = distill.parse_args(["--out", str(tmp_path)])
    for folder, lines in ((tmp_path, "600,3.30"), (tmp_path / "control", "600,3.695\n1200,3.932")):
        folder.mkdir(exist_ok=True)
        (folder / "held-out.csv").write_text(f"step,loss\n0,5.0\n{lines}\n")
        (folder / "args.json").write_text(json.dumps(vars(args)))

    def said(student, control, noise=0.05):
        gaps = {"student": (student, 1), "student - teacher": (student - 3, noise),
                "control - teacher": (control - 3, noise), "control - student": (control - student, noise)}
        worse = report.got_worse(args, {"student": {"loss": student}, "control": {"loss": control}}, gaps)
        return " ".join(report.verdict(args, gaps, worse).split())

    control = "The control got worse after step 600, where it had 3.695: it has read the text too often"
    student = "The student got worse after step 600, where it had 3.300: it has read the text too often."
    worth = "what the teacher was worth"
    fair = "compare the two at their best: the student had 3.300, the control 3.695."
    assert f"{control}. So {fair}" in said(3.32, 3.932) and worth not in said(3.32, 3.932)
    assert "closes" not in said(3.45, 3.932), "a share of a gap that is too large"
    assert student in said(3.4, 3.7) and worth not in said(3.4, 3.7) and "control got" not in said(3.4, 3.7)
    assert f"{control}. " in said(3.9, 3.932) and "no gain from the teacher" in said(3.9, 3.932)
    assert "at their best" not in said(3.9, 3.932)
    assert worth in said(3.32, 3.73) and "got worse" not in said(3.32, 3.73)
    assert "got worse" not in said(3.4, 3.932, noise=math.inf)
    args.eval_tokens = 99
    assert worth in said(3.32, 3.932)


def test_how_the_control_was_chosen_is_said():
    own = "--teacher gpt2 --student-layers 2 --control"
    for argv, said in (
            ("--seed 3", "rate 0.0005 and 2 sequences a step, the best of 31 settings that were tried (docs/"
                         "atlas.md)."),
            ("--steps 60", "rate 0.0005 and 2 sequences a step."),  # not tuned for these
            ("--control-lr 3e-4", "rate 0.0003 and 2 sequences a step."),
            (own, "128 sequences a step, like the student; --control-lr gives it a rate of its own.")):
        assert report.effort(distill.parse_args(argv.split())).endswith(said), argv


def test_noise_of_a_difference():
    """Paired: what is hard for both cancels. Neighbours that are alike do not count as new evidence."""
    rng = torch.Generator().manual_seed(0)
    def scores_of(nll):  # (M, W) -> (M, 6, W)
        scores = torch.zeros(len(nll), len(SCORES), nll.size(1), dtype=torch.float64)
        scores[:, SCORES.index("nll")] = nll
        scores[:, SCORES.index("tokens")] = 64
        return scores

    hard = 64 * (3 + torch.randn(32, generator=rng))  # for both models
    gain = 64 * (0.2 + 0.1 * torch.randn(32, generator=rng))
    scores = scores_of(torch.stack([hard, hard + gain]))
    mean, noise = scoring.difference(scores, 1, 0)
    assert mean == pytest.approx(gain.mean().item() / 64)
    assert noise == pytest.approx(2 * gain.std().item() / 64 / math.sqrt(32))
    assert scoring.difference(scores, 0)[1] > 5 * noise, "the loss itself"

    again = scoring.difference(scores_of(torch.stack([hard, hard + gain]).repeat_interleave(16, 1)), 1, 0)
    assert again == pytest.approx((mean, noise)), "16 times the same piece"
    assert scoring.difference(scores[..., :4], 1, 0)[1] == math.inf


def test_what_is_scored_does_not_depend_on_pieces(workshop):
    """The loss is the mean over the tokens; pieces are cut from blocks that follow each other."""
    model = distill.load(workshop / "teacher")
    ids = np.random.default_rng(0).integers(4000, size=400)
    corpus = SimpleNamespace(val=ids, eot=4095, meta={"val": {"bytes": 1600, "tokens": 400}})
    args = SimpleNamespace(eval_tokens=300, seq_len=50, batch_size=4)
    scores = scoring.score_held_out([model, model], corpus, 4095, args, torch.no_grad())
    assert scores[0, SCORES.index("tokens")].tolist() == [64, 64, 64, 8, 64, 36]  # batches of 200 and 100
    row, _ = scoring.validate([model, model], corpus, 4095, args, torch.no_grad())
    assert row["loss"] == pytest.approx(scores[0, 0].sum().item() / 300)
    assert scoring.difference(scores, 1, 0)[0] == 0


def test_writing_speed_is_measured_and_does_not_take_long(monkeypatch):
    class Writer:
        head_weight = torch.zeros(1)
        context = 10**6

        def generate(self, ids, n_tokens):
            time.sleep(0.002 * n_tokens)
            return ids

    monkeypatch.setattr(report, "SPEED_SECONDS", 0.2)
    started = time.perf_counter()
    assert 300 < report.writing_speed(Writer(), 0) < 520
    assert time.perf_counter() - started < 0.5


# ------------------------------------------------------------------------------------ texts and commands
def test_the_passage_ends_with_a_line_where_it_can():
    """Best with one that opens a block, whichever line is in the middle. The models go on from it."""
    tokenizer = load_tokenizer(ROOT / "demo" / "teacher")
    code = "".join(f"def name_{i}(self):\n    a = {i}\n    return a\n\n" for i in range(99))
    for documents, end, start in (
            (["import os", code, "import sys"], "(self):", "\n    a = "),
            (["import os", "x = 1\n" * 9 + code, "import sys"], "(self):", "\n    a = "),
            (["one line of prose\n" * 300], "prose", "\none line"),
            (["one two three " * 300], "", " "),
            (["x"], "", "")):
        ids = [token for text in documents for token in (tokenizer.eot, *tokenizer.encode(text))]
        corpus = SimpleNamespace(val=np.array(ids), eot=tokenizer.eot)
        before, after = map(tokenizer.decode, report.passage(corpus, tokenizer))
        assert before.endswith(end) and after.startswith(start) and before + after in "".join(documents)


def test_three_lines_of_a_text():
    text = "\n  \n\tif x:\n" + "y" * 90 + "\nthird\x00\nfourth"
    first, second, third = report.titled("the student", text).split("\n")
    assert first == "the student           if x:"
    assert second == " " * 18 + "y" * 58 + " ..." and len(second) == 80
    assert third == " " * 18 + "third\\x00"
    assert report.titled("After", text, slice(-1, None)) == "After             fourth"
    assert report.titled("the text has", "\n") == "the text has"


def test_commands_can_be_pasted(tmp_path, monkeypatch):
    words = ["sample.py", "--model", "it's a folder; rm -rf $HOME", *["word" * 9] * 6]
    monkeypatch.chdir(ROOT)
    lines = report.command(*words).split("\n")
    assert len(lines) > 3 and max(map(len, lines)) <= 80
    printed = subprocess.check_output(["sh", "-c", "printf '%s|' " + "\n".join(lines)], text=True)
    assert printed.split("|")[:-1] == ["python", *words]
    monkeypatch.chdir(tmp_path)
    assert report.command("x.py").strip() == f"cd {ROOT} && python x.py"


def test_next_steps_suggest_nothing_that_has_been_done(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    results = {"rows": {"teacher": {}, "student": {}}}
    demo = report.next_steps(distill.parse_args([]), results)
    assert "my_texts/" in demo and "extras.plot" in demo
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "loss.png").touch()
    own = distill.parse_args(["--data", str(tmp_path)])
    assert "my_texts/" not in report.next_steps(own, results)
    assert "extras.plot" not in report.next_steps(own, results)
    assert "extras.play" not in report.next_steps(own, {"rows": {"student": {}}})
    assert "eval_ppl.py" not in demo + report.next_steps(own, results)
    for data in ("stdlib", str(tmp_path)):
        plain = distill.parse_args(["--teacher", "gpt2", "--student-layers", "6", "--data", data])
        hint = re.search(r"--data\s(\\\s+)?wikitext-2", report.next_steps(plain, results))
        assert bool(hint) == (data != "stdlib"), "a text in English"
