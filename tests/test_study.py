"""extras/study.py: runs that are missing are made, rows are kept, tables are put between their marks."""
import copy
import json
from argparse import Namespace

import pytest
import torch

import distill
from extras import study
from extras.study import Study, arms, spread, trained
from support.cli import InputError

PLAN = {"a, seed 0": "--lr 1", "a, seed 1": "--lr 1 --seed 1", "b": "--lr 2"}


def table(rows):
    return [{"arm": arm, "loss": spread(seeds)} for arm, seeds in arms(rows).items()]


@pytest.fixture
def made(monkeypatch, tmp_path):
    """A study in a folder of its own; `made.runs` are the runs that it made."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    runs = []

    def one_run(name, flags):
        runs.append((name, flags))
        return {"loss": float(len(runs)), "seed": 1 if "seed 1" in name else 0}

    made = Study("my_study", "What is it?", PLAN, one_run, {"losses": table}, page="my-page")
    made.runs = runs
    return made


def test_runs_that_are_missing_are_made(made, tmp_path, capsys):
    made.main(["--only", "seed 1"])
    made.main([])
    made.main([])  # nothing is missing
    assert made.runs == [("a, seed 1", "--lr 1 --seed 1"), ("a, seed 0", "--lr 1"), ("b", "--lr 2")]

    lines = (tmp_path / "docs" / "my-page.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 3 and first.keys() == {
        "name", "flags", "loss", "seed", "threads", "torch", "commit", "date"}
    assert (first["name"], first["flags"], first["loss"]) == ("a, seed 1", "--lr 1 --seed 1", 1.0)
    assert first["torch"] == torch.__version__ and first["commit"].startswith("?")

    capsys.readouterr()
    made.main(["--list", "--only", "seed"])
    assert capsys.readouterr().out.splitlines() == [
        "2.0000 a, seed 0 | --lr 1", "1.0000 a, seed 1 | --lr 1 --seed 1"]


def test_a_run_that_fails_loses_no_rows(made, tmp_path):
    made.main(["--only", "seed 0"])

    def stopped(name, flags):
        raise KeyboardInterrupt

    made.one_run = stopped
    with pytest.raises(KeyboardInterrupt):
        made.main([])
    assert [*made.rows()] == ["a, seed 0"]

    # Another process has made one in the meantime; of two rows with one name the later one counts.
    made.add({"name": "b", "loss": 7.0, "seed": 0})
    made.add({"name": "a, seed 0", "loss": 9.0, "seed": 0})
    assert made.rows()["a, seed 0"]["loss"] == 9.0
    with open(tmp_path / "docs" / "my-page.jsonl", "a") as file:
        file.write('{"name": "a, se')
    with pytest.raises(InputError, match="my-page.jsonl is not a list of runs"):
        made.rows()


def test_tables_are_put_between_their_marks(made, tmp_path):
    page = tmp_path / "docs" / "my-page.md"
    page.write_text("# Ü\n<!-- table: losses -->\nold\n<!-- end -->\nrest <!-- end -->\n", encoding="utf-8")
    with pytest.raises(InputError, match="my-page.jsonl has no runs yet"):
        made.main(["--page"])

    made.main([])
    made.main(["--page"])
    assert page.read_text(encoding="utf-8") == (
        "# Ü\n<!-- table: losses -->\n"
        "| arm |                      loss |\n"
        "| --- | ------------------------: |\n"
        "| a   | 1.5000 (1.0000 to 2.0000) |\n"
        "| b   |                    3.0000 |\n"
        "<!-- end -->\nrest <!-- end -->\n")
    before = page.read_text(encoding="utf-8")
    made.main(["--page"])
    assert page.read_text(encoding="utf-8") == before

    for text, message in (("no marks", "no place for the table 'losses'"),
                          (before + "<!-- table: gone --><!-- end -->", "a table 'gone', but")):
        page.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=message):
            made.main(["--page"])
        assert page.read_text(encoding="utf-8") == text


def test_pictures_are_files(made, tmp_path):
    figure = Namespace(savefig=lambda file, format: file.write_text(f"{format} of {len(made.rows())} rows"))
    made.tables = {}
    made.pictures = {"loss.png": lambda rows: figure}
    (tmp_path / "docs" / "my-page.md").write_text("")
    made.main([])
    made.main(["--page"])
    assert (tmp_path / "assets" / "loss.png").read_text() == "png of 3 rows"


def test_a_name_that_the_plan_does_not_have(made):
    with pytest.raises(InputError, match="--only c: no run of the plan"):
        made.main(["--only", "c"])


def test_arms_have_their_seeds_in_order():
    found = arms({"a, seed 2": {"seed": 2}, "a, seed 0": {"seed": 0}, "b": {"seed": 3}})
    assert {arm: [row["seed"] for row in seeds] for arm, seeds in found.items()} == {"a": [0, 2], "b": [3]}


def test_what_is_trained(workshop, monkeypatch):
    """The flags decide who teaches; the hooks see the run; nothing is left behind."""
    monkeypatch.chdir(workshop)
    base = (f"--teacher {workshop / 'teacher'} --student-layers 2 --data {workshop / 'text'} --data-folder "
            f"{workshop / 'corpora'} --precision fp32 --device cpu --seq-len 16 --batch-size 2 --steps 2 "
            "--no-control --seed 3 ")
    honest = distill.losses_of
    order = []

    def losses_of(student_hidden, student_head, teacher_hidden, teacher_head, *rest):
        order.append("teacher" if teacher_hidden is not None else "text")
        return honest(student_hidden, student_head, teacher_hidden, teacher_head, *rest)

    class Around:
        def __init__(self, args, teacher, student, corpus, tokenizer):
            pass

        def __enter__(self):
            order.append("before")

        def __exit__(self, *error):
            order.append("after")

    def score(args, teacher, student, corpus, tokenizer):
        order.append("score")
        assert len(teacher.blocks) == 4 and len(student.blocks) == 2 and not student.training
        return {"val": len(corpus.val), "vocab": tokenizer.vocab_size, "temperature": args.temperature}

    def shorter(teacher, student, corpus):
        short = copy.copy(corpus)
        short.val = corpus.val[:7]
        return teacher, student, short

    here = {*workshop.iterdir()} - {workshop / "corpora"}
    found = trained(base + "--temperature 3", score, losses_of, shorter, Around)
    assert found.pop("seconds") > 0
    assert found == {"seed": 3, "steps": 2, "val": 7, "vocab": 4096, "temperature": 3.0}
    assert order[0] == "before" and {*order[1:-2]} == {"teacher"} and order[-2:] == ["after", "score"]
    trained(base + "--kd-weight 0 --clm-weight 1", score, losses_of)
    assert order.pop() == "score" and order.pop() == "text"
    assert distill.losses_of is honest and {*workshop.iterdir()} - {workshop / "corpora"} == here
