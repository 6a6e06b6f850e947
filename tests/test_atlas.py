"""extras/atlas.py: the plan, the runs that are done, and the page made of them."""
import math
import shlex
from types import SimpleNamespace

import pytest
import torch

import distill
from extras import atlas
from extras.atlas import STUDY
from support import flags


def parsed(command):
    return distill.parse_args(shlex.split(f"{atlas.BASE} {command}"))


def test_rows_are_runs_of_the_plan_and_every_run_can_be_made():
    """A row whose flags are not those of the plan would be called by a name that is not its own."""
    rows = STUDY.rows()
    older = {name.split()[0] for name in rows.keys() - STUDY.plan.keys()}
    assert older == {"tune", "layers", "again:", "first:"}, "finished: their plan is in 4cd76ba"
    for name, command in STUDY.plan.items():
        args = parsed(command)
        assert not args.control and args.precision == "bf16"
        if name in rows:
            row = rows[name]
            assert (row["flags"], row["seed"], row["steps"]) == (command, args.seed, args.steps), name
            assert f"T = {args.temperature:g})" in row["objective"] or not args.kd_weight, name


def test_student_and_control_of_a_budget_see_the_same_number_of_tokens():
    for steps in atlas.BUDGETS:
        student, control = (parsed(STUDY.plan[f"{who} {steps} steps, seed 0"])
                            for who in ("student", "control"))
        assert student.steps * student.batch_size == control.steps * control.batch_size == 2 * steps
        assert student.clm_weight < control.clm_weight == 1


def test_the_demo_is_what_the_plan_says_and_its_control_the_best_that_was_tried():
    """All that was tried on the demo's number of tokens, in both rounds; up to what a seed is worth."""
    shipped, demo, control = parsed(""), parsed(atlas.DEMO), parsed(atlas.CONTROL)
    assert vars(demo) == vars(shipped)
    wanted = vars(flags.control_of(shipped))
    same = {"role": wanted["role"], "out": wanted["out"], "objective": wanted["objective"]}
    assert vars(control) | same == wanted

    rows = STUDY.rows()
    tried = [row["loss"] for name, row in rows.items() if row["tokens"] == 614_400 and row["seed"] == 0
             and name.startswith(("tune control", "again: control"))]
    assert len(tried) == flags.CONTROLS_TRIED
    assert rows["control 1200 steps, seed 0"]["loss"] <= min(tried) + 0.003


def test_a_run_and_its_figures(workshop, monkeypatch):
    """With the demo's own code and small models."""
    models = (f"--teacher {workshop / 'teacher'} --data {workshop / 'text'} --data-folder "
              f"{workshop / 'corpora'} --seq-len 16 --eval-tokens 300 --student-layers 0,2,3 --steps 2 "
              "--grad-accum 2")
    monkeypatch.setattr(atlas, "reverse_kl", lambda *_: 0.5)
    monkeypatch.setattr(atlas, "sample_figures", lambda *_: {"distinct_3": 0.5})
    figures = atlas.one_run("an arm", f"{atlas.STUDENT} {models}")
    columns = {"seed", "steps", "tokens", "loss", "teacher_loss", "kl", "same_top_1", "reverse_kl",
               "distinct_3", "objective", "seconds"}
    assert figures.keys() == columns and figures["tokens"] == 2 * 2 * 2 * 16


def test_figures_of_the_students_texts():
    """With a teacher who says that token i comes next after any, with a score of i."""
    text = torch.randint(1, 9, (4, 11), generator=torch.Generator().manual_seed(1))
    text[:, 0] = 0
    student = SimpleNamespace(generate=lambda start, length, choose: text)

    class Teacher(torch.nn.Module):
        def forward(self, ids):
            return torch.arange(10.0).expand(*ids.shape, 10)

    found = atlas.sample_figures(Teacher(), student, SimpleNamespace(eot=0), n=4, length=10)
    written = text[:, 1:]
    triples = {tuple(row[i:i + 3].tolist()) for row in written for i in range(8)}
    nll = torch.arange(10.0).logsumexp(0) - written.float().mean()
    assert found["teacher_nll_of_samples"] == pytest.approx(nll.item())
    assert found["distinct_3"] == len(triples) / 32


# ------------------------------------------------------------------------------------ the page
def row(loss, seed=0, **rest):
    return {"loss": loss, "seed": seed, "teacher_loss": 3.0, "kl": 0.1, "same_top_1": 0.5, **rest}


BUDGETS = {
    "student 300 steps, seed 0": row(3.4), "student 300 steps, seed 1": row(3.7, 1),
    "student 600 steps, seed 0": row(3.3), "control 300 steps, seed 0": row(4.0),
    "control 600 steps, seed 0": row(3.6)}


def test_budgets_compare_at_equal_tokens_and_at_equal_seconds():
    recipe = atlas.Recipe("", (300, 600), 512, {"student": 0.05 * math.sqrt(2), "control": 0.05})
    first, second = atlas.budgets_table(BUDGETS, recipe)
    assert first["seeds"] == 2 and first["student"] == "3.5500 (3.4000 to 3.7000)"
    assert first["closes"] == "45%"  # (4.0 - 3.55) / (4.0 - 3.0)
    # After 21.2 s the control is half way between its 15 s and its 30 s: the axis is one of log seconds.
    assert (first["control, equal seconds"], first["closes then"]) == ("3.800", "31%")
    assert (second["control, equal seconds"], second["closes then"]) == ("", "")  # beyond its last budget


def test_layers_are_sorted_by_what_they_came_to():
    rows = {"layers 0,1,2, 100 steps": row(3.2, before=3.9), "layers 0,1,3, 100 steps": row(3.1, before=4.0)}
    assert [line["layers"] for line in atlas.layers_table(rows)] == ["0,1,3", "0,1,2"]


def test_the_page_has_the_tables_of_today():
    page = STUDY.file(".md").read_text(encoding="utf-8")
    assert STUDY.filled(page, STUDY.rows()) == page, "python -m extras.atlas --page"


def test_the_pictures_are_drawn_from_what_there_is():
    pytest.importorskip("matplotlib")
    for draw in STUDY.pictures.values():
        for rows in (STUDY.rows(), BUDGETS):
            assert draw(rows).axes
