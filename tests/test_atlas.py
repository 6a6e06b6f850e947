"""extras/atlas.py and extras/atlas_page.py: the plan, the runs that are done, and the page made of them."""
import math
import shlex

import pytest
import torch

import distill
from extras import atlas, atlas_page
from support import options
from support.cli import InputError


def test_every_run_of_the_plan_can_be_made():
    for flags in atlas.plan().values():
        args = distill.parse_args(shlex.split(f"{atlas.BASE} {flags}"))
        options.check(args)
        assert not args.control and args.precision == "bf16"


def test_rows_that_are_done_are_runs_of_the_plan():
    """A row whose flags are not those of the plan would be called by a name that is not its own."""
    plan = atlas.plan()
    for name, row in atlas.finished().items():
        assert row["flags"] == plan[name], name
        args = distill.parse_args(shlex.split(f"{atlas.BASE} {row['flags']}"))
        assert (row["seed"], row["steps"]) == (args.seed, args.steps), name
        T = args.temperature
        assert f"T = {T:g})" in row["objective"] or not args.kd_weight, name


def test_student_and_control_of_a_budget_see_as_many_tokens():
    plan = atlas.plan()
    for prefix, budgets, size in (("", atlas.BUDGETS, 2), ("first: ", atlas.FIRST_BUDGETS, 4)):
        for steps in budgets:
            student, control = (distill.parse_args(shlex.split(plan[f"{prefix}{who} {steps} steps, seed 0"]))
                                for who in ("student", "control"))
            assert student.steps * student.batch_size == control.steps * control.batch_size == size * steps
            assert student.clm_weight < control.clm_weight == 1


def test_the_demo_is_what_the_plan_says_and_its_control_the_best_that_was_tried():
    """All that was tried at the demo's tokens, in both rounds; up to what a seed is worth."""
    shipped, demo, control = (distill.parse_args(shlex.split(f"{atlas.BASE} {flags}"))
                              for flags in ("", atlas.DEMO, atlas.CONTROL))
    for args in (shipped, demo, control):
        options.check(args)
    assert vars(demo) == vars(shipped)
    assert vars(control) | {"role": "control", "out": "out/control"} == vars(options.control_of(shipped))

    tried = [row for name, row in atlas.finished().items() if row["tokens"] == 614_400 and row["seed"] == 0
             and name.startswith(("tune control", "again: control"))]
    assert len(tried) == options.CONTROLS_TRIED
    best = atlas.finished()["control 1200 steps, seed 0"]
    assert best["loss"] <= min(row["loss"] for row in tried) + 0.003


def test_averaged_weights_are_the_mean_of_the_last_quarter():
    student = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    with atlas.averaged(student, 8):
        student.weight.data.zero_()
        for _ in range(8):
            student.weight.grad = torch.tensor([[-1.0]])
            optimizer.step()  # the weight is 1, 2, ..., 8
    assert student.weight.item() == 7.5

    student.weight.grad = torch.tensor([[-1.0]])
    optimizer.step()
    assert student.weight.item() == 8.5  # nobody watches any more


# ------------------------------------------------------------------------------------ the page
def row(loss, seed=0, **rest):
    return {"loss": loss, "seed": seed, "teacher_loss": 3.0, "kl": 0.1, "same_top_1": 0.5, **rest}


BUDGETS = {
    "student 300 steps, seed 0": row(3.4), "student 300 steps, seed 1": row(3.7, 1),
    "student 600 steps, seed 0": row(3.3), "control 300 steps, seed 0": row(4.0),
    "control 600 steps, seed 0": row(3.6)}


def test_budgets_compare_at_equal_tokens_and_at_equal_seconds():
    recipe = atlas_page.Recipe("", (300, 600), 512, {"student": 0.05 * math.sqrt(2), "control": 0.05})
    header, _, first, second = atlas_page.budgets_table(BUDGETS, recipe).splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells[2:4] == ["2", "3.5500 (3.4000 to 3.7000)"]
    assert cells[5] == "45%"  # (4.0 - 3.55) / (4.0 - 3.0)
    # After 21.2 s the control is half way between its 15 s and its 30 s: the axis is one of log seconds.
    assert cells[6:] == ["3.800", "31%"]
    assert [cell.strip() for cell in second.strip("|").split("|")][6:] == ["", ""]  # nobody knows beyond


def test_each_arm_has_its_seeds_in_order():
    found = atlas_page.arms({"a, seed 2": row(1.0, 2), "a, seed 0": row(2.0), "b": row(3.0)})
    assert {arm: [one["seed"] for one in of] for arm, of in found.items()} == {"a": [0, 2], "b": [0]}


def test_only_marked_places_are_filled():
    page = "before <!-- table: layers -->old\n<!-- end --> after"
    rows = {"layers 0,1,2, 100 steps": row(3.2, before=3.9), "layers 0,1,3, 100 steps": row(3.1, before=4.0)}
    filled = atlas_page.fill(page, rows)
    assert filled.startswith("before <!-- table: layers -->\n| layers")
    assert filled.endswith("<!-- end --> after")
    assert "old" not in filled and filled.index("0,1,3") < filled.index("0,1,2")
    assert atlas_page.fill(filled, rows) == filled
    with pytest.raises(InputError, match="nothing"):
        atlas_page.fill("<!-- table: nothing --><!-- end -->", rows)


def test_the_page_has_the_tables_of_today():
    page = atlas_page.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == len(atlas_page.TABLES)
    assert atlas_page.fill(page, atlas.finished()) == page


def test_the_pictures_are_drawn_from_what_there_is():
    pytest.importorskip("matplotlib")
    for draw in (atlas_page.draw_budgets, atlas_page.draw_divergences):
        for rows in (atlas.finished(), BUDGETS):
            assert draw(rows).axes
