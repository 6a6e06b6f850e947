"""A run's folder, its flags, what it says: nobody's files are lost, damage is one line, time is told."""
import argparse
import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_distill import call, difference, flags, log_rows, weights
from test_distill import workshop as workshop  # the fixture

import distill
from data import load_tokenizer
from model import GPT2
from support import closing, files, hub, log, options, outlook, progress, runtime, state
from support import run as run_module
from support.chunked_loss import Losses
from support.cli import InputError
from support.runtime import Ranks
from support.state import RunFolder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(workshop, tmp_path_factory):
    """A finished run with its control; each test gets a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = subprocess.run([sys.executable, str(ROOT / "distill.py"), *flags(workshop, out, control=True)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def out(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def content(folder):
    """{name: bytes} of all files below a folder, but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"}


def refused(result, *parts):
    """Exit code 2 and one last line of error with all `parts`."""
    code, _, error = result
    last = error.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "Traceback" not in error, error
    assert all(part in last for part in parts), last


# ------------------------------------------------------------------------------------ nobody's bytes are lost
FOREIGN = ("model.safetensors", "config.json", "README.md", "args.json")


@pytest.mark.parametrize("settings", [b"precious", b"", b'{"my": 1}'])
def test_a_foreign_folder_called_control_is_never_touched(
        workshop, tmp_path, monkeypatch, capsys, settings):
    control = tmp_path / "out" / "control"
    control.mkdir(parents=True)
    for name in FOREIGN:
        (control / name).write_bytes(b"precious")
    (control / "args.json").write_bytes(settings)
    before = content(control)

    argv = flags(workshop, tmp_path / "out")
    refused(call(monkeypatch, capsys, [*argv, "--control"]), "no control's", "--no-control")
    assert not (tmp_path / "out" / "args.json").exists(), "it is refused before anything is written"
    for more in ([], ["--overwrite"], ["--resume"]):
        assert call(monkeypatch, capsys, argv + more)[0] == 0
        assert content(control) == before


def test_a_run_of_its_own_in_out_control_is_no_control(out, workshop, monkeypatch, capsys):
    settings = json.loads((out / "control" / "args.json").read_text())
    (out / "control" / "args.json").write_text(json.dumps({**settings, "role": "student"}))
    before = content(out / "control")
    assert call(monkeypatch, capsys, flags(workshop, out, overwrite=True))[0] == 0
    assert content(out / "control") == before


def test_the_old_control_goes_with_the_old_run(out, workshop, monkeypatch, capsys):
    assert call(monkeypatch, capsys, flags(workshop, out, overwrite=True, seed=1))[0] == 0
    assert not (out / "control").exists()


@pytest.mark.parametrize("changes", [
    {"weight-decay": 1e300, "steps": 1}, {"batch-size": 10**9}, {"batch-size": 10**5},
    {"teacher": "./nowhere"}])
def test_the_old_run_stays_if_the_new_one_makes_no_step(out, workshop, monkeypatch, capsys, changes):
    """Settings that pass the checks of each flag, and fail at the first step or before it."""
    before = content(out)
    monkeypatch.setattr(outlook, "memory_there", lambda device: 10**9)
    refused(call(monkeypatch, capsys, flags(workshop, out, overwrite=True, warmup=0, **changes)))
    assert content(out) == before


def test_a_full_disk_at_the_first_write_keeps_the_old_run(out, workshop, monkeypatch, capsys):
    before = content(out)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        refused(call(patch, capsys, flags(workshop, out, overwrite=True, seed=1)),
                "args.json cannot be written (No space left on device)")
    assert content(out) == before
    assert call(monkeypatch, capsys, flags(workshop, out, overwrite=True, seed=1))[0] == 0
    assert json.loads((out / "args.json").read_text())["seed"] == 1


@pytest.mark.parametrize("name", ["args.json", "log.csv", "train_state.pt", "model.safetensors",
                                  "config.json", "tokenizer_config.json", "README.md"])
def test_a_full_disk_at_any_file_is_one_line_and_resume_gets_out(
        workshop, tmp_path, monkeypatch, capsys, name):
    """A new run whose disk is full when `name` is to be put in its place, and then has room again."""
    honest = os.replace

    def full(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        refused(call(patch, capsys, flags(workshop, tmp_path / "out")), "No space left on device", name)
    resume = (tmp_path / "out" / "args.json").exists()
    code, _, error = call(monkeypatch, capsys, flags(workshop, tmp_path / "out", resume=resume or None))
    assert code == 0, error
    assert not [*(tmp_path / "out").rglob("*.tmp")]


# ------------------------------------------------------------------------------------ damage
@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 100_000, b"[]", b"7", b"null", b'"text"', b"\0" * 500,
                                    b"\xff\xfe{}", b"{}"])
def test_damaged_args_json(out, workshop, monkeypatch, capsys, damage):
    (out / "args.json").write_bytes(damage)
    before = content(out)
    for how in ({}, {"resume": True}):
        refused(call(monkeypatch, capsys, flags(workshop, out, **how)), "damaged", "--overwrite")
        assert content(out) == before
    assert call(monkeypatch, capsys, flags(workshop, out, overwrite=True))[0] == 0


def test_args_json_of_another_program(out, workshop, monkeypatch, capsys):
    (out / "args.json").write_text('{"verbose": true}')
    before = content(out)
    for how in ({}, {"overwrite": True}):
        refused(call(monkeypatch, capsys, flags(workshop, out, **how)), "no run's", "another --out")
    assert content(out) == before


def changed_state(change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)
    return damage


def averages(change):
    """Change each of AdamW's averages."""
    def change_all(state):
        for slot in state["optimizer"]["state"].values():
            change(slot)
    return changed_state(change_all)


def set_in(place, key, value):
    """Change state[key], or state[place][key]."""
    return changed_state(lambda state: (state[place] if place else state).update({key: value}))


def stretched(slot):
    """A tensor of the right shape, with memory behind one element only."""
    slot["exp_avg"] = torch.zeros(()).expand(slot["exp_avg"].shape)


EMBED = "embed.weight"
DAMAGED_STATES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:9000]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(b"\0" * 9000),
    "a list": lambda path: torch.save([1, 2], path),
    "no settings": changed_state(lambda state: state.pop("settings")),
    "tensors as settings": set_in("settings", "lr", torch.ones(2)),
    "no student": changed_state(lambda state: state.pop("student")),
    "a student that is a list": set_in("", "student", []),
    "step -1": set_in("", "step", -1),
    "step NaN": set_in("", "step", math.nan),
    "step 1.5": set_in("", "step", 1.5),
    "step True": set_in("", "step", True),
    "step None": set_in("", "step", None),
    "step 10^9": set_in("", "step", 10**9),
    "step 2 of 3": set_in("", "step", 2),
    "step as a tensor": set_in("", "step", torch.tensor(3)),
    "another tensor": set_in("student", "stranger", torch.zeros(2)),
    "a tensor less": changed_state(lambda state: state["student"].pop(EMBED)),
    "another shape": set_in("student", EMBED, torch.zeros(2, 2)),
    "another dtype": changed_state(lambda s: s["student"].update({EMBED: s["student"][EMBED].double()})),
    "half precision": changed_state(lambda s: s["student"].update({EMBED: s["student"][EMBED].bfloat16()})),
    "NaN": set_in("student", EMBED, torch.full((4096, 32), math.nan)),
    "sparse": set_in("student", EMBED, torch.zeros(4096, 32).to_sparse()),
    "meta": set_in("student", EMBED, torch.zeros(4096, 32, device="meta")),
    "no tensor": set_in("student", EMBED, 7),
    "no optimizer": changed_state(lambda state: state.pop("optimizer")),
    "an optimizer that is a number": set_in("", "optimizer", 7),
    "no averages": set_in("optimizer", "state", {}),
    "averages of one parameter": changed_state(lambda s: s["optimizer"]["state"].pop(0)),
    "averages without shape": averages(lambda slot: slot.update(exp_avg=torch.zeros(()))),
    "short averages": averages(lambda slot: slot.update(exp_avg_sq=slot["exp_avg_sq"].flatten()[:1])),
    "averages in another dtype": averages(lambda slot: slot.update(exp_avg=slot["exp_avg"].double())),
    "averages without memory": averages(stretched),
    "averages that are NaN": averages(lambda slot: slot["exp_avg"].fill_(math.nan)),
    "squares below 0": averages(lambda slot: slot["exp_avg_sq"].fill_(-1e-9)),
    "nested averages": averages(
        lambda slot: slot.update(exp_avg=torch.nested.nested_tensor([torch.ones(2)]))),
    "another key": averages(lambda slot: slot.update(max_exp_avg_sq=torch.zeros(()))),
    "another number of steps": averages(lambda slot: slot["step"].fill_(7)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("damage", DAMAGED_STATES)
def test_damaged_state(out, workshop, monkeypatch, capsys, damage):
    DAMAGED_STATES[damage](out / "train_state.pt")
    before = content(out)
    result = call(monkeypatch, capsys, flags(workshop, out, resume=True))
    refused(result, "train_state.pt is damaged", "--overwrite")
    assert content(out) == before


def test_a_state_of_another_run(out, workshop, monkeypatch, capsys):
    """args.json agrees, but the state beside it was copied from elsewhere."""
    set_in("settings", "precision", "bf16-pure")(out / "train_state.pt")
    before = content(out)
    result = call(monkeypatch, capsys, flags(workshop, out, resume=True))
    refused(result, "--precision was 'bf16-pure', now 'fp32'")
    assert content(out) == before


def test_a_state_with_another_pytorchs_fields_goes_on(out, workshop, monkeypatch, capsys):
    def older(state):
        for group in state["optimizer"]["param_groups"]:
            group.pop("decoupled_weight_decay", None)
            group["from_the_future"] = 1
    changed_state(older)(out / "train_state.pt")
    before = weights(out)
    assert call(monkeypatch, capsys, flags(workshop, out, resume=True))[0] == 0
    assert difference(before, weights(out)) == 0


HEADER = ",".join(log.COLUMNS).encode() + b"\n"
DAMAGED_LOGS = {
    "missing": None,
    "empty": b"",
    "header alone": HEADER,
    "no header": b"1,2,3,4,5,6,7,8,9,10\n",
    "blank lines": HEADER + b"\n\n1,2,3,4,5,6,7,8,9,10\n\n",
    "half a row": HEADER + b"1,2,3",
    "not UTF-8": b"\xff\xfe\x00\x80" * 50,
    "NUL": b"\0" * 5000,
    "a row of NUL": HEADER + b"\0" * 99,
    "a giant field": HEADER + b"1" * 200_000,
    "quotes": HEADER + b'"1,2\n3',
    "NaN": HEADER + b"nan,1,1,1,1,1,1,1,nan,1\n1,1,1,1,1,1,1,1,nan,1\n",
    "infinity": HEADER + b"inf,1,1,1,1,1,1,1,1,1\n1,1,1,1,1,1,1,1,inf,1e999\n",
    "speed 0": HEADER + b"1,1,1,1,1,1,1,1,1,0\n2,1,1,1,1,1,1,1,1,-5\n",
}


@pytest.mark.parametrize("damage", DAMAGED_LOGS)
def test_damaged_log(out, workshop, monkeypatch, capsys, damage):
    """It is only a record: the run goes on, and the card is written."""
    (out / "log.csv").unlink()
    if DAMAGED_LOGS[damage] is not None:
        (out / "log.csv").write_bytes(DAMAGED_LOGS[damage])
    for name in ("README.md", "model.safetensors"):
        (out / name).unlink()
    code, _, error = call(monkeypatch, capsys, flags(workshop, out, resume=True))
    assert code == 0, error
    assert "# A distilled GPT" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cell", ["nan", "inf", "-inf", "1e400", "", "x"])
@pytest.mark.parametrize("column", log.COLUMNS)
def test_a_row_of_the_log_has_numbers_alone(tmp_path, column, cell):
    rows = [dict.fromkeys(log.COLUMNS, str(step)) for step in (1, 2, 3)]
    rows[1][column] = cell
    lines = [",".join(row.values()) for row in (dict(zip(log.COLUMNS, log.COLUMNS, strict=True)), *rows)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    assert [row["step"] for row in log.read_log(tmp_path / "log.csv")] == [1, 3]


def test_held_out_losses_are_kept_in_a_file_of_their_own(workshop, tmp_path, monkeypatch, capsys):
    """A row for each validation, the last one the table's; a resumed run goes on after what it had."""
    out = tmp_path / "out"
    more = {"eval-interval": 1, "save-interval": 1, "resume": True}
    printed = call(monkeypatch, capsys, flags(workshop, out, **more | {"resume": None}))[1]
    rows = log.read_held_out(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    losses = [row["loss"] for row in rows]
    assert [*map(float, re.findall("step .: held-out loss (.*)", printed))] == pytest.approx(losses, abs=1e-4)
    table = next(line for line in printed.splitlines() if line.startswith("| student"))
    assert float(table.split("|")[2]) == pytest.approx(losses[-1], abs=1e-4)

    scored = weights(out)
    assert call(monkeypatch, capsys, flags(workshop, out, overwrite=True))[0] == 0
    assert log.read_held_out(out) == [], "the old run's go with it"
    assert difference(scored, weights(out)) == 0, "to be scored on the way changes nothing"
    log.write_rows(out / log.HELD_OUT, log.HELD_OUT_COLUMNS, [{"step": step, "loss": 9} for step in (1, 3)])
    (out / "train_state.pt").unlink()
    assert call(monkeypatch, capsys, flags(workshop, out, **more))[0] == 0
    assert log.read_held_out(out) == rows, "what is made again is written again"


def test_a_control_that_is_half_done_goes_on(out, workshop, monkeypatch, capsys):
    """Killed in the control's second step: the student is finished, the control ends with the same bits."""
    before = weights(out / "control")
    shutil.rmtree(out / "control")
    honest = run_module.Run.finish_step

    def killed(run, step, *rest):
        if run.args.role == "control" and step == 1:
            raise KeyboardInterrupt
        honest(run, step, *rest)

    more = {"control": True, "save-interval": 1, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "finish_step", killed)
        assert call(patch, capsys, flags(workshop, out, **more))[0] == 130
    assert len(log_rows(out / "control")) == 1
    assert call(monkeypatch, capsys, flags(workshop, out, **more))[0] == 0
    assert difference(before, weights(out / "control")) == 0 and len(log_rows(out / "control")) == 3


# ------------------------------------------------------------------------------------ the command line
def test_what_resume_refuses_it_refuses_first(out, workshop, monkeypatch, capsys):
    def too_late(*_):
        raise AssertionError("models were loaded before")
    monkeypatch.setattr(distill, "load_models", too_late)
    control = {"control": True, "control-lr": 1}
    for changes in ({"seed": 1}, {"lr": 2e-3}, {"student-layers": "0,2"}, {"steps": 5}, control):
        argv = flags(workshop, out, resume=True, **changes)
        refused(call(monkeypatch, capsys, argv), "with other settings")


def test_the_control_has_a_rate_of_its_own(out, workshop, monkeypatch, capsys):
    """Another one does not invalidate the finished student, and is named where the control is judged."""
    student = weights(out)
    shutil.rmtree(out / "control")
    argv = flags(workshop, out, resume=True, control=True, **{"control-lr": 3e-4})
    code, printed, error = call(monkeypatch, capsys, argv)
    assert code == 0, error
    assert difference(student, weights(out)) == 0 and "Rate 0.0003" in printed
    assert json.loads((out / "control" / "args.json").read_text())["lr"] == 3e-4
    assert float(log_rows(out / "control")[0]["lr"]) == 3e-4  # the warm-up of 3 steps is one step
    assert float(log_rows(out)[0]["lr"]) == 1e-3


@pytest.mark.parametrize("name", ["", "/", ".", "x" * 5000, "file", "file/out", "a\nb/" + "x" * 300])
def test_out_that_can_be_no_folder(workshop, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    refused(call(monkeypatch, capsys, flags(workshop, name)), "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_start_leaves_no_folder_behind(workshop, tmp_path, monkeypatch, capsys):
    argv = flags(workshop, tmp_path / "a" / "b" / "out", teacher=tmp_path / "nowhere")
    refused(call(monkeypatch, capsys, argv))
    assert not (tmp_path / "a").exists()


def test_out_with_a_folder_where_a_file_goes(workshop, tmp_path, monkeypatch, capsys):
    (tmp_path / "out" / "log.csv").mkdir(parents=True)
    refused(call(monkeypatch, capsys, flags(workshop, tmp_path / "out")), "a folder called log.csv")


def test_odd_names_work(workshop, tmp_path, monkeypatch, capsys):
    """~ as elsewhere, spaces, letters, a line break, bytes that are no UTF-8."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("~/plain", "~/with space", "~/\u6587\u7ae0", "~/a\nb", "~/\udcff"):
        code, printed, error = call(monkeypatch, capsys, flags(workshop, name))
        assert code == 0, error
        assert (tmp_path / name[2:] / "README.md").exists()
    assert not Path("~").exists()


@pytest.mark.parametrize("text, message", [
    ("", "name one student"), ("-1", "choose 1 to 4"), ("9" * 9, "choose 1 to 4"),
    (",".join("0" * 1001), "1001 layers"),
    *[(text, "expected a number") for text in (",", "1,,2", "9" * 21, "\u0663", "1_0", "0x1", "1.5", "a\nb")],
])
def test_student_layers_that_are_none(workshop, tmp_path, monkeypatch, capsys, text, message):
    argv = flags(workshop, tmp_path / "out", **{"student-layers": text})
    refused(call(monkeypatch, capsys, argv), message)
    assert not (tmp_path / "out").exists()


def test_layers_may_be_taken_twice():
    assert distill.parse_layers("0,0,5", 6) == [0, 0, 5] and distill.parse_layers("4,", 6) == [4]
    assert distill.parse_layers("0, 2", 6) == [0, 2] and distill.parse_layers("2", 6) == [0, 5]


NUMBERS = [action.option_strings[0] for action in options.make_parser("")._actions
           if getattr(action.type, "__name__", "") == "convert"]


@pytest.mark.parametrize("flag", NUMBERS)
def test_numbers_out_of_range_are_refused_at_once(flag):
    for value in ("nan", "inf", "-1", "1e400", "-" + "9" * 30, "9" * 5000, "", "text"):
        values = [value, "0.5"] if flag == "--betas" else [value]
        with pytest.raises(InputError, match="must be|expected"):
            distill.parse_args([flag, *values])


@pytest.mark.parametrize("flag", ["--seq-len", "--batch-size", "--grad-accum", "--steps", "--seed",
                                  "--workers", "--eval-tokens", "--eval-interval", "--save-interval"])
def test_whole_numbers_beyond_64_bits(flag):
    for value in (2**63, 2**64, 10**30):
        with pytest.raises(InputError, match="must be"):
            distill.parse_args([flag, str(value)])


def test_products_that_cannot_fit_are_refused_before_anything_is_made(
        workshop, tmp_path, monkeypatch, capsys):
    huge = {"batch-size": 10**9, "seq-len": 10**9, "grad-accum": 10**9}
    refused(call(monkeypatch, capsys, flags(workshop, tmp_path / "out", **huge)), "a micro-batch of")
    huge["seq-len"] = 64
    refused(call(monkeypatch, capsys, flags(workshop, tmp_path / "out", **huge)), "a micro-batch of")
    huge["batch-size"] = 2**22
    refused(call(monkeypatch, capsys, flags(workshop, tmp_path / "out", **huge)), "GB", "--batch-size")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("env, message", [
    ({"WORLD_SIZE": "two"}, "torchrun"), ({"WORLD_SIZE": "2"}, "RANK is None"),
    ({"WORLD_SIZE": "2", "RANK": "x"}, "torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "cannot work together"),
    ({"WORLD_SIZE": "2", "RANK": "-1", "MASTER_PORT": "1", "MASTER_ADDR": "localhost"}, "torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "7", "MASTER_PORT": "1", "MASTER_ADDR": "localhost"}, "torchrun"),
])
def test_world_size_without_torchrun(workshop, tmp_path, monkeypatch, capsys, env, message):
    """Nothing waits for processes that will never come."""
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    refused(call(monkeypatch, capsys, flags(workshop, tmp_path / "out")), message)


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        distill.parse_args(["--version"])
    assert stopped.value.code == 0
    assert f'version = "{capsys.readouterr().out.strip()}"' in (ROOT / "pyproject.toml").read_text()


def test_help_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        distill.parse_args(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_the_sequence_is_as_long_as_the_smaller_context(workshop, tmp_path, monkeypatch, capsys):
    argv = flags(workshop, tmp_path / "out", **{"seq-len": None, "steps": 1})
    assert call(monkeypatch, capsys, argv)[0] == 0
    assert json.loads((tmp_path / "out" / "args.json").read_text())["seq_len"] == 64
    assert call(monkeypatch, capsys, [*argv, "--resume"])[0] == 0


# ------------------------------------------------------------------------------------ stopping
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["load_models", "load_corpus", "export"])
def test_signals_outside_of_the_loop(workshop, tmp_path, monkeypatch, capfd, number, moment):
    """One line, the shell's exit code, within a second; and nothing is left by a run that made no step."""
    def slow(*_):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(distill, moment, slow)
    started = time.monotonic()
    code, _, error = call(monkeypatch, capfd, flags(workshop, tmp_path / "a" / "out"))
    assert code == 128 + number and time.monotonic() - started < 4
    assert error.strip().splitlines()[-1] == f"stopped by {number.name}" and "Traceback" not in error
    assert (tmp_path / "a").exists() == (moment == "export")


def test_stopped_before_the_first_step(out, workshop, monkeypatch, capsys):
    """--overwrite has not replaced anything by then."""
    honest = distill.micro_batch

    def asked(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return honest(*rest)

    before = content(out)
    monkeypatch.setattr(distill, "micro_batch", asked)
    code, printed, _ = call(monkeypatch, capsys, flags(workshop, out, overwrite=True, seed=1))
    assert code == 143 and "before the first step" in printed
    assert content(out) == before


# ------------------------------------------------------------------------------------ numbers that are none
def test_what_is_not_finite_is_named(workshop, tmp_path, monkeypatch, capsys):
    honest = distill.load_models

    def poisoned(args, device):
        tokenizer, teacher, student = honest(args, device)
        whom = {"teacher": teacher, "student": student}[args.text_column]
        whom.blocks[1].mlp.down.bias.data[0] = math.nan
        return tokenizer, teacher, student

    monkeypatch.setattr(distill, "load_models", poisoned)
    monkeypatch.setattr(distill, "warn_of_unknown_text", lambda *_: None)
    for whom, said in (("teacher", "the teacher, answers with NaN"), ("student", "first in the gradient of")):
        argv = flags(workshop, tmp_path / whom, **{"text-column": whom})
        refused(call(monkeypatch, capsys, argv), said, "step 1")


def test_a_step_that_breaks_the_student_is_not_saved(workshop, tmp_path, monkeypatch, capsys):
    """Its last step: the loss was fine, and what AdamW made of it is not."""
    honest = distill.take_step

    def broken(optimizer, lr):
        honest(optimizer, lr)
        if optimizer.state_dict()["state"][0]["step"] == 3:
            optimizer.param_groups[0]["params"][0].data[0] = math.inf

    monkeypatch.setattr(distill, "take_step", broken)
    argv = flags(workshop, tmp_path / "out", **{"save-interval": 1})
    refused(call(monkeypatch, capsys, argv), "step 3", "embed.weight is not finite any more")
    assert torch.load(tmp_path / "out" / "train_state.pt", weights_only=True)["step"] == 2


# ------------------------------------------------------------------------------------ time and memory
def test_time_left_covers_what_follows(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    left = progress.TimeLeft(total=10, done=2, later=5)
    assert left.seconds() is None
    for seconds, expected in ((30, 30 * (7 + 5)), (2, 2 * (6 + 5)), (2, 2 * (5 + 5))):
        now[0] += seconds  # the first unit takes long, and is forgotten as soon as there is another
        left.advance()
        assert left.seconds() == pytest.approx(expected)


def test_when_the_time_left_can_be_told(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for seconds, units in ((1, 4), (21, 1), (15, 2)):
        left = progress.TimeLeft(total=10, done=2)
        for unit in range(units):
            assert not left.is_reliable(), (seconds, unit)
            now[0] += seconds
            left.advance()
        assert left.is_reliable(), seconds


def test_the_line_is_shortened_to_the_terminal():
    line = progress.Progress("distilling", 600, 0, silent=True)
    line.place = "12/600"
    line.shown = ["loss 1.203", "CLM 3.881", "teacher's 3.040", "4,312 tok/s", "KL 0.301"]
    line.time.marks += [(1, line.time.marks[0][1] + 1)]
    full = line.line(200)
    assert full.endswith("KL 0.301") and "left" in full
    assert [part for part in line.shown[:3] if part not in line.line(79)] == []
    for width in range(1, 120):
        assert len(line.line(width)) <= width and full.startswith(line.line(width))


class Terminal:
    def __init__(self, is_one):
        self.is_one = is_one
        self.text = ""

    def isatty(self):
        return self.is_one

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("is_one", [True, False])
def test_a_bar_is_lines_where_there_is_no_terminal(monkeypatch, is_one):
    monkeypatch.setattr(sys, "stderr", Terminal(is_one))
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.01)
    for _ in progress.open_bar(range(3), "texts", unit="text"):
        time.sleep(0.02)
    written = sys.stderr.text
    assert "3/3" in written and "texts" in written
    assert is_one or "\r" not in written and written.count("\n") > 1


def test_a_terminal_is_redrawn_and_a_file_gets_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for is_one in (True, False):
        stream = Terminal(is_one)
        monkeypatch.setattr(sys, "stderr", stream)
        line = progress.Progress("distilling", 100)
        for i in range(1, 101):
            now[0] += 1
            line.advance(f"{i}/100", [])
        line.close()
        if is_one:
            assert stream.text.count("\n") == 1 and stream.text.count("\r") > 90
        else:
            lines = stream.text.splitlines()
            assert "\r" not in stream.text and len(lines) == 4 == len(set(lines)) and "100/100" in lines[-1]


def test_a_full_stderr_does_not_end_the_work(monkeypatch):
    monkeypatch.setattr(sys, "stderr", open("/dev/full", "w") if Path("/dev/full").exists() else None)
    line = progress.Progress("distilling", 1)
    line.advance("1/1", [])
    line.close()


def test_long_steps_show_their_micro_batches(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    args = distill.parse_args(["--steps", "9", "--grad-accum", "4", "--out", str(tmp_path)])
    records = log.Log(args, 0, Ranks("cpu"), 8.0)
    for _ in range(3):
        now[0] += 60
        records.tick()
    assert records.line.line(79).startswith("distilling 0/9 and 3/4  41:00 left")  # 33 + 8 micro-batches
    now[0] += 60
    records.tick()
    records.write(1, Losses(1.0, 2.0, 3.0, 0.0, 4.0, 5), lr=1, grad_norm=1, tokens=5, tokens_per_second=7)
    assert re.split(" {2,}", records.line.line(79)) == [
        "distilling", "1/9", "40:00 left", "loss 1.000", "CLM 3.000", "teacher's 4.000"]


def test_text_alone_shows_one_loss():
    assert log.figures(Losses(3.0, 0.0, 3.0, 0.0, 0.0, 5), 7) == ["loss 3.000", "7 tok/s"]


def test_a_run_of_days_says_so_and_what_to_change():
    args = distill.parse_args(["--teacher", "gpt2", "--student-layers", "6"])
    args.seq_len = 1024
    ranks = Ranks("cpu")
    note = outlook.duration_note(args, 50 * 3600, ranks)
    shorter = distill.parse_args(["--teacher", "t", "--student-layers", "2", *note.split("with")[1].split()])
    tokens = shorter.steps * shorter.grad_accum * shorter.batch_size * shorter.seq_len
    assert "2.1 days" in note
    assert tokens == pytest.approx(1000 * 16 * 8 * 1024 / 100, rel=0.1)  # a hundredth: 30 minutes of 50 hours
    assert "Ctrl-C" not in outlook.duration_note(args, 3600, ranks)


@pytest.mark.parametrize("seconds", [7201, 10**5, 10**7, 10**9])
@pytest.mark.parametrize("shape", [(16, 8, 1024), (1, 1, 16), (400, 5, 1024), (2048, 2, 2048)])
def test_advice_is_always_possible(seconds, shape):
    args = argparse.Namespace(steps=1000, grad_accum=shape[0], batch_size=shape[1], seq_len=shape[2])
    for world in (1, 2, 3):
        ranks = argparse.Namespace(world=world)
        words = outlook.advice(args, seconds, ranks).split()
        found = {flag: int(value) for flag, value in zip(words[::2], words[1::2], strict=True)}
        assert min(found.values()) >= 1 and found["--grad-accum"] % world == 0
        assert found["--batch-size"] <= shape[1] and found["--seq-len"] <= shape[2]


def test_memory_is_estimated_and_refused(monkeypatch):
    args = distill.parse_args(["--teacher", "gpt2", "--student-layers", "6"])
    args.seq_len, args.precision = 1024, "fp32"
    args.chunk_size = 512  # a CPU's; these models are on none
    with torch.device("meta"):
        teacher, student = (GPT2(GPT2.config(n_layer=layers)) for layers in (12, 6))
    needed = outlook.memory_needed(args, teacher, student, 50257)
    assert 3e9 < needed < 12e9  # 82M parameters with AdamW are 1.3 GB, the teacher 0.5, activations the rest

    ranks = Ranks("cpu")
    monkeypatch.setattr(outlook, "memory_there", lambda device: 2 * needed)
    assert "GB of" in outlook.check_memory(args, teacher, student, 50257, ranks)
    monkeypatch.setattr(outlook, "memory_there", lambda device: 0.8 * needed)
    note = outlook.check_memory(args, teacher, student, 50257, ranks)
    assert re.search("take --batch-size 2 --grad-accum 64$", note)  # as large a step as before
    monkeypatch.setattr(outlook, "memory_there", lambda device: 0.6 * needed)
    with pytest.raises(InputError, match="take --batch-size [12] --grad-accum"):
        outlook.check_memory(args, teacher, student, 50257, ranks)
    monkeypatch.setattr(outlook, "memory_there", lambda device: 1e6)
    with pytest.raises(InputError, match="a smaller model"):
        outlook.check_memory(args, teacher, student, 50257, ranks)
    monkeypatch.setattr(outlook, "memory_there", lambda device: None)  # where the system does not say
    assert "GB" in outlook.check_memory(args, teacher, student, 50257, ranks)
    assert args.batch_size == 8
    args.loss = "plain"
    assert outlook.memory_needed(args, teacher, student, 50257) > needed + 10e9


# ------------------------------------------------------------------------------------ the end
def rows(**losses):
    return {name: {"loss": loss, "bits per byte": loss / 2} for name, loss in losses.items()}


@pytest.mark.parametrize("losses, said", [
    ({"teacher": 3.0, "student": 3.25, "control": 3.5},
     "closes 50% of the gap between control and teacher"),
    ({"teacher": 3.0, "student": 3.6, "control": 3.5}, "did better than the student, by 0.100"),
    ({"teacher": 3.0, "student": 2.8, "control": 2.9}, "both beat the teacher"),
    ({"teacher": 3.0, "student": 2.9, "control": 3.1}, "closes 200%"),
    ({"teacher": 3.0, "student": 3.2}, "only a control tells"),
    ({"student": 3.0}, ""),
])
def test_the_verdict(losses, said):
    verdict = closing.verdict(rows(**losses), distill.parse_args([]))
    assert said in verdict and bool(said) == bool(verdict)
    assert all(len(line) <= 110 for line in verdict.splitlines())


@pytest.mark.parametrize("argv, said", [
    ([], "rate 0.0005 and 2 sequences a step,\nchosen among 31 settings that were tried: docs/atlas.md"),
    (["--control-lr", "3e-4"], "rate 0.0003 and 2 sequences a step."),
    (["--seed", "3", "--out", "x"], "chosen among 31 settings that were tried: docs/atlas.md"),
    (["--steps", "60"], "rate 0.0005 and 2 sequences a step."),  # nobody tuned it for these
    (["--data", "my_texts"], "rate 0.0005 and 2 sequences a step."),
    (["--betas", "0.8", "0.9"], "rate 0.0005 and 2 sequences a step."),
    (["--teacher", "t", "--student-layers", "2"], "rate 0.0005 and 128 sequences a step,\nthe student's; "
     "--control-lr gives it a rate of its own."),
    (["--teacher", "t", "--student-layers", "2", "--control-batch-size", "2"], "and 32 sequences a step."),
])
def test_how_the_control_was_chosen_is_said(argv, said):
    assert closing.effort(distill.parse_args(argv)).endswith(said)


def test_a_control_with_a_batch_of_its_own_reads_as_many_tokens(workshop, tmp_path, monkeypatch, capsys):
    argv = flags(workshop, tmp_path / "out", steps=6, control=True, **{"control-batch-size": 4})
    assert call(monkeypatch, capsys, argv)[0] == 0
    student, control = (log.read_log(tmp_path / "out" / folder / "log.csv") for folder in ("", "control"))
    assert (len(student), len(control)) == (6, 3)
    assert sum(row["tokens"] for row in student) == sum(row["tokens"] for row in control)


def test_a_teacher_that_does_not_know_the_text(workshop, tmp_path, monkeypatch, capsys):
    """Random weights know none: it is said before the training and after it, with what to do instead."""
    sentences = [f"The cat number {i} sat on the mat number {i * i}. " for i in range(400)]
    documents = [json.dumps({"text": sentence * 9}) for sentence in sentences]
    (tmp_path / "cats.jsonl").write_text("\n".join(documents))
    argv = flags(workshop, tmp_path / "out", data=tmp_path / "cats.jsonl", **{"eval-tokens": 5000})
    code, printed, error = call(monkeypatch, capsys, argv)
    assert code == 0, error
    assert printed.count("does not know this text") == 2 and "xz" in printed
    assert "--teacher none --student" in printed and "again with --teacher tuned-teacher" in printed

    # Where no model was named, the teacher that is named now does not change the recipe.
    own = ["--data", str(tmp_path / "cats.jsonl")]
    advice = closing.tuning(distill.parse_args(own))
    again = distill.parse_args([*own, *re.search("again with (--teacher.*)", advice)[1].split()])
    assert (again.recipe, again.teacher) == ("demo", "tuned-teacher")

    args = distill.parse_args([])
    def warning(**losses):
        return closing.unknown_text(args, rows(**losses), os.urandom(400).hex())
    assert "the student passes it" in warning(teacher=3.0, student=2.9)
    assert warning(teacher=3.0, student=3.1) == "" == warning(student=3.0)
    assert "xz" in warning(teacher=30.0, student=31.0)


def test_the_end_tells_the_story(out, workshop, tmp_path, monkeypatch, capsys):
    """Models side by side after words of the held-out text, in 80 columns; commands that can be pasted."""
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = call(monkeypatch, capsys, flags(workshop, tmp_path / "my out", control=True))
    assert code == 0
    roles = re.compile("After the words|the (text has|teacher|student|control)( |$)")
    story = [line for line in printed.splitlines() if roles.match(line)]
    assert [line[:18].strip() for line in story] == [
        "After the words", "the text has", "the teacher", "the student", "the control"]
    ending, _, shown = printed[printed.index("| model"):].partition("Next")
    sentences = [line for line in ending.splitlines() if not line.startswith("  python")]
    assert max(map(len, sentences)) <= 80
    assert "--model '" in shown and "python -m extras.plot '" in shown
    command, = re.findall("python (sample.py .*)", shown)
    argv = [sys.executable, *shlex.split(command), "--tokens", "2"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b"---") >= 3


def test_two_lines_of_a_text(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = "\n  \n\tif x:\n" + "y" * 50 + "\nthird"
    first, second = closing.two_lines("the student", text).split("\n")
    assert first == "the student           if x:"
    assert second == " " * 18 + "y" * 17 + " ..." and len(second) == 39
    assert closing.two_lines("the text has", "\n") == "the text has"


def test_the_opening_ends_with_a_line_where_it_can(workshop):
    tokenizer = load_tokenizer(ROOT / "demo" / "teacher")
    ids = tokenizer.encode("import os, sys, re, json\nimport math\nx = 1" + " + 2" * 100)
    corpus = SimpleNamespace(val=np.array([tokenizer.eot, *ids]), eot=tokenizer.eot)
    opening, rest = closing.document(corpus, tokenizer)
    assert tokenizer.decode(opening).endswith("import math\n") and tokenizer.decode(rest).startswith("x = 1")
    flat = tokenizer.encode("one two three " * 200)
    opening, _ = closing.document(SimpleNamespace(val=np.array(flat), eot=tokenizer.eot), tokenizer)
    assert len(opening) == 32
    few = np.array(tokenizer.encode("import os\nx = 1"))
    opening, rest = closing.document(SimpleNamespace(val=few, eot=tokenizer.eot), tokenizer)
    assert opening == few.tolist() and not rest


def test_settings_are_called_as_their_reader_knows_them():
    assert state.flag_or_name("grad_accum") == "--grad-accum"
    assert state.flag_or_name("training tokens") == "training tokens"


def test_names_that_are_misspelt_are_said_before_the_hub_is_asked(workshop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "teacher").mkdir()
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("the Hub is asked"))
    argv = ["--teacher", "gpt2", "--student-layers", "6", "--data", "my_text"]
    refused(call(monkeypatch, capsys, argv), "did you mean my_texts?")
    refused(call(monkeypatch, capsys, ["--teacher", "models/techer"]), "did you mean models/teacher?")


def test_a_picture_where_it_can_be_drawn(workshop, tmp_path, monkeypatch, capsys):
    """After a long run whose reader has matplotlib; otherwise the command for it."""
    out = tmp_path / "my out"
    monkeypatch.setattr(closing, "WORTH_A_PICTURE", 0)
    printed = call(monkeypatch, capsys, flags(workshop, out))[1]
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG" and f"  {out / 'loss.png'} has it" in printed
    assert "extras.plot" not in printed

    args = argparse.Namespace(out=str(out))
    command = f"python -m extras.plot '{out}'"
    corpus = argparse.Namespace(path="corpus")
    (out / "log.csv").write_text("damaged")
    assert closing.picture(args) is None, "the picture that is there is of another log"
    monkeypatch.setattr(closing.importlib.util, "find_spec", lambda name: None)
    assert closing.picture(args) is None
    told = closing.next_steps(distill.parse_args(["--out", str(out)]), {}, corpus, None)
    assert command in told

    assert call(monkeypatch, capsys, flags(workshop, out, overwrite=True))[0] == 0
    assert not (out / "loss.png").exists(), "it goes with its run"


def test_a_folder_claimed_by_one_is_not_released_by_another(tmp_path):
    """Of two processes on one --out the one that is refused leaves the lock alone."""
    args = distill.parse_args(["--out", str(tmp_path / "out")])
    first, second = RunFolder(args, Ranks("cpu")), RunFolder(args, Ranks("cpu"))
    first.claim()
    with pytest.raises(InputError, match="in use"):
        second.claim()
    second.release()
    assert (tmp_path / "out" / ".lock").exists()
    first.release()


def test_one_process_needs_no_network(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert runtime.Ranks("cpu").world == 1
