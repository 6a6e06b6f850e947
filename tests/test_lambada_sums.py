"""extras/lambada_sums.py with a plan and models made small: what it measures, and that it can be stopped."""
import json
import sys
from pathlib import Path

import pytest
import torch

import distill
from extras import lambada_sums as lambada
from support.cli import run_cli

ROOT = Path(__file__).parent.parent
PLAN, SMALL = lambada.PLAN, lambada.SMALL


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study: its folder, and what it made."""
    with pytest.MonkeyPatch.context() as patch:
        folder = shrink(patch, tmp_path_factory.mktemp("lambada"))
        lambada.main()
        yield folder, lambada.read_results()


def shrink(patch, folder):
    """Two short runs and a few sums, on a small text, in `folder`."""
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"def f{i}(x):\n    return x + {i}  # adds {i}" for i in range(2000)))
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["lambada"])
    patch.setattr(lambada, "DATA", str(text))
    patch.setattr(lambada, "DEMO_TEACHER", str(ROOT / "demo" / "teacher"))
    patch.setattr(lambada, "STAGES", [f"{stage} --steps 2 --batch-size 2" for stage in lambada.STAGES])
    patch.setattr(lambada, "SMALL", f"{lambada.SMALL} --grad-accum 2 --steps 3 --eval-tokens 300")
    patch.setattr(lambada, "COUNTS", (1, 4))
    patch.setattr(lambada, "PLAN", [("constant", "", lambada.BOTH), (lambada.SUMS, None, []),
                                    ("padded", "--packing padded", lambada.BF16)])
    return folder


def test_all_of_the_plan_is_made(study):
    folder, results = study
    assert [*results] == ["constant, bf16", "constant, bf16-pure", "sums", "padded, bf16"]
    for name in ("constant, bf16", "constant, bf16-pure", "padded, bf16"):
        row = results[name]
        assert row["step"] == [1, 2, 3] and 1 < row["after"] < 1e5 and row["after"] != row["before"]
    assert not [*folder.rglob("runs/*/train_state.pt")]


def test_the_watch_sees_what_bf16_weights_lose(study):
    """Under autocast weights are float32, so the twin makes the same steps; in pure bf16 it does not."""
    _, results = study
    autocast, pure = results["constant, bf16"], results["constant, bf16-pure"]
    assert autocast["error"] < 1e-6 and autocast["moved"] == autocast["float32"] > 0.5
    assert pure["error"] > 0.1 and pure["moved"] < 0.9 * pure["float32"]
    assert autocast["cosine"] == pytest.approx(1) and 0.1 < pure["cosine"] < 0.99


def test_the_twin_starts_each_step_where_the_student_is():
    student = torch.nn.Linear(8, 8).bfloat16()
    watch = lambada.Watch(student, distill.parse_args(["--device", "cpu"]))
    for parameter in student.parameters():
        parameter.data += 1  # as steps that bf16 made otherwise would
        parameter.grad = torch.ones_like(parameter)
    watch.before(None)
    for ours, real in zip(watch.twin.parameters(), student.parameters(), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, real.float())
        assert torch.equal(ours.grad, real.grad.float())


def test_sums(study):
    _, results = study
    one, four = results["sums"]
    assert (one["n"], four["n"]) == (1, 4) and one["1/n, n times"] == 1
    assert one["sum, bf16"] == one["sum, bf16-pure"] == 0  # nothing is added yet
    assert 0 < four["sum, bf16"] < 1e-6 < 1e-4 < four["sum, bf16-pure"] < four["all, bf16-pure"] < 0.5


def test_what_is_done_is_not_done_again(study, monkeypatch, capsys):
    folder, results = study
    made = []
    monkeypatch.setattr(lambada, "one_run", lambda name, flags: made.append((name, flags)) or results[name])
    monkeypatch.setattr(lambada, "gradient_sums", lambda: made.append("sums"))
    kept = {name: row for name, row in results.items() if name != "constant, bf16-pure"}
    (folder / "out-experiment" / "results.json").write_text(json.dumps(kept))
    lambada.main()
    assert made == [("constant, bf16-pure", " --precision bf16-pure")]
    assert lambada.read_results() == results
    assert "| constant, bf16-pure |" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["lambada", "--list"])
    lambada.main()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["done", "constant,", "bf16-pure", "--precision", "bf16-pure"]
    assert len(made) == 1


def test_the_real_plan_parses(monkeypatch):
    """Every flag of each run exists and goes with the others."""
    monkeypatch.setattr(lambada, "PLAN", PLAN)
    monkeypatch.setattr(lambada, "SMALL", SMALL)
    runs = lambada.all_runs()
    assert len(runs) == 25 and [*runs][9] == lambada.SUMS
    seen = []

    def stop(args, device):
        seen.append(args)
        raise KeyError

    monkeypatch.setattr(lambada, "load_models", stop)
    for name, flags in runs.items():
        if flags is not None:
            with pytest.raises(KeyError):
                lambada.start(flags, name)
    assert len({str(vars(args)) for args in seen}) == 24
    assert {args.temperature for args in seen} == {1.0, 2.0, 4.0}


def test_misspelt_flags_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lambada", "--lits"])
    with pytest.raises(SystemExit):
        run_cli(lambada.main)
    error = capsys.readouterr().err
    assert error == "error: unrecognized arguments: --lits (did you mean --list?); see --help\n"
