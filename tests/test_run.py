"""A run around its loop: nobody's bytes are lost, only the same run goes on, damage is one line.

Most tests drive support/run.py with a model of two layers, `train` below; the last ones run distill.py.
"""
import contextlib
import csv
import errno
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from workshop import call, difference, flags, weights

import distill
from model import load
from support import files, report
from support import run as run_module
from support.chunked_loss import Losses
from support.cli import InputError, open_bar
from support.ranks import Ranks
from support.run import COLUMNS, MODEL_FILES, Run, claim, published, read_held_out, read_log

RANKS = Ranks("cpu")
CORPUS = SimpleNamespace(train=np.arange(999), fingerprint="text A")
OTHER_TEXT = SimpleNamespace(train=np.arange(999), fingerprint="text B")
SHORT = vars(distill.flags.parse_args("", distill.LossSettings(), (
    "--teacher some/teacher --student-layers 0,3 --data some/text --seq-len 16 --batch-size 2 --grad-accum 2 "
    "--steps 4 --lr 0.01 --warmup 0 --schedule constant --precision fp32 --save-interval 2").split()))


class Net(torch.nn.Module):
    """A model, and with another seed another one. `config` is what fingerprints ask for."""
    config = "two layers"

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = torch.nn.Linear(3, 8)
        self.down = torch.nn.Linear(8, 1)

    def forward(self, x):
        return self.down(self.up(x).tanh())


TEACHER = Net(1)


def settings(out, **changes):
    """Those of distill.py for a run of four steps."""
    return SimpleNamespace(**SHORT | {"objective": "loss", "out": str(out), **changes})


def train(out, corpus=CORPUS, network=TEACHER, at=(), **changes):
    """A command: claim, train, leave a model, a card and results. network: the teacher; at: {step: what
    happens in it}. Returns the student, or None if the run was finished already."""
    args = settings(out, **changes)
    with claim(args, RANKS) as finished:
        if finished:
            run_module.refuse_other_content(args, corpus, Net(), network)
            return None
        student = loop(args, corpus, network, at)
        with published(args.out) as new:
            for name in (*MODEL_FILES, "README.md"):
                (new / name).write_text(f"{name} after {args.steps} steps")
        Path(args.out, "results.json").write_text("{}")
    return student


def loop(args, corpus=CORPUS, network=TEACHER, at=()):
    student = Net()
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, fused=True)
    with Run(args, student, optimizer, corpus, RANKS, network) as run:
        for step in run.steps():
            x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
            loss = student(x).square().mean()
            loss.backward()
            for _ in range(args.grad_accum):
                if step in at:
                    at[step](student)
                run.after_micro_batch(step)
            losses = Losses(loss.item(), 1.0, 2.0, 0.0, 3.0, 10)
            run.check(step, losses, 1.0, distill.lr_at(step, args))
            distill.take_step(optimizer, distill.lr_at(step, args))
            run.finish_step(step, losses, 10, distill.lr_at(step, args), 1.0)
    return student


@pytest.fixture
def out(tmp_path):
    """The folder of a finished run."""
    train(tmp_path / "out")
    return tmp_path / "out"


def content(folder):
    """{name: bytes} of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@contextlib.contextmanager
def unchanged(folder, *parts):
    """InputError with all `parts`; what was in the folder is still there, and nothing else."""
    before = content(folder)
    with pytest.raises(InputError) as error:
        yield
    assert all(part in str(error.value) for part in parts), error.value
    assert content(folder) == before


def steps_in_log(out):
    """As another program would read them."""
    return [int(row["step"]) for row in csv.DictReader((out / "log.csv").open())]


def state_of(out):
    return torch.load(out / "train_state.pt", weights_only=True)


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def poison(student):
    student.up.weight.data[0] = math.nan


class Killed(BaseException):
    """What ends a process in the middle of a step."""


def kill(student):
    raise Killed


def interrupted(out, step, **changes):
    """A run that was killed in a step."""
    with pytest.raises(Killed):
        train(out, at={step: kill}, **changes)


# ------------------------------------------------------------------------------------ nobody's bytes are lost
def test_folders_that_are_not_a_runs_are_refused(tmp_path):
    """Whatever the flags are."""
    out = tmp_path / "out"
    out.mkdir()
    a_control = json.dumps({"recipe": 1, "teacher": 2, "kd_weight": 3, "role": "control"})
    for name, text in (("README.md", "precious"), ("args.json", '{"a": 1}'), ("args.json", a_control)):
        (out / name).write_text(text)
        for how in ({}, {"overwrite": True}, {"resume": True}, {"resume_if_there": True}):
            with unchanged(out, f"contains {name}, but not a student's run: choose another --out"):
                train(out, **how)
        (out / name).unlink()
    train(out)


def test_a_foreign_folder_called_control_is_never_touched(out):
    """Only one whose args.json says that it is a control goes with an old run."""
    control = out / "control"
    control.mkdir()
    ours = json.loads((out / "args.json").read_text())
    (control / "README.md").write_text("precious")
    for role in ({}, {"role": "student"}):
        (control / "args.json").write_text(json.dumps({**ours, "role": None, **role}))
        before = content(control)
        with unchanged(out, "control contains README.md, but not a control's run"):
            train(out, overwrite=True, control=True)
        train(out, overwrite=True)
        assert content(control) == before

    (control / "args.json").write_text(json.dumps(ours | {"role": "control"}))
    train(out, overwrite=True)
    assert not control.exists(), "the old run's own control goes with it"


def test_a_finished_run_is_not_replaced_unasked(out):
    """The line says how it differs and names the ways on; the very same command has nothing to do."""
    with unchanged(out, "other settings: kd_weight was 0.9, now 0.4; seed was", "--out NAME", "--overwrite"):
        train(out, seed=1, kd_weight=0.4)
    for changes in ({"steps": 5}, {"control": True}):  # there is more to do
        with unchanged(out, "--resume goes on with it", "--overwrite", "--out NAME"):
            train(out, **changes)
    before = content(out)
    for how in ({}, {"resume": True}, {"resume_if_there": True}):
        assert train(out, **how) is None
        assert content(out) == before

    assert train(out, resume=True, eval_tokens=99) is not None, "the table is another one"
    for name in (*MODEL_FILES, "results.json"):  # what is missing is made again
        (out / name).unlink()
        assert train(out, resume=True) is not None
        assert content(out).keys() == before.keys()
    interrupted(out, 5, resume=True, steps=6)
    assert not (out / "results.json").exists(), "it is not finished any more"

    train(out, resume=True, steps=6)
    (out / "train_state.pt").unlink()
    assert train(out, steps=6) is None
    with unchanged(out, "train_state.pt could not be read"):
        train(out, resume=True, steps=9)


def test_overwrite_keeps_the_old_run_until_the_new_one_has_saved(out, monkeypatch):
    """It saves after its first step. If that fails, nothing has been touched."""
    new = {"overwrite": True, "seed": 1}
    before = content(out)
    interrupted(out, 0, **new)
    assert content(out) == before
    with unchanged(out, "up.weight is not finite"):
        train(out, at={0: poison}, **new)
    for place, name in ((files.os, "fsync"), (files.os, "replace"), (torch, "save"), (run_module, "sync")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full_disk)
            with unchanged(out, "cannot be written (No space left on device)"):
                train(out, **new)

    interrupted(out, 1, **new)
    assert {*content(out)} == {"args.json", "log.csv", "train_state.pt"}
    assert json.loads((out / "args.json").read_text())["seed"] == 1
    assert steps_in_log(out) == [1] and state_of(out)["step"] == 1


def test_what_was_edited_stays(out, capsys):
    """A card or configuration that somebody has changed; what is as we wrote it is brought up to date."""
    edited = {"README.md": "by hand", "config.json": '{"by": "hand"}'}
    for name, text in edited.items():
        (out / name).write_text(text)
    train(out, resume=True, steps=6)
    assert {name: (out / name).read_text() for name in edited} == edited
    said = capsys.readouterr().err
    assert all(f"{out / name} has been edited" in said for name in edited) and said.count("has been") == 2
    assert (out / "tokenizer.json").read_text() == "tokenizer.json after 6 steps"

    (out / "README.md").unlink()
    train(out, resume=True, steps=8)
    train(out, resume=True, steps=10)
    assert (out / "README.md").read_text() == "README.md after 10 steps"


def test_one_process_at_a_time(tmp_path):
    """The second is refused and leaves the first one's lock alone; at the end nothing is left of either."""
    args = settings(tmp_path / "a" / "out")
    with claim(args, RANKS):
        for _ in range(2):
            with pytest.raises(InputError, match=r"--out .*out is in use"), claim(args, RANKS):
                pass
    interrupted(tmp_path / "a" / "out", 0)
    assert not (tmp_path / "a").exists(), "neither of them has made a step"


# ------------------------------------------------------------------------------------ the same run goes on
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", steps=7, save_interval=3)
    out = tmp_path / "killed"
    same = {"steps": 7, "save_interval": 3, "resume_if_there": True}
    for step, saved in ((2, 1), (5, 3)):
        interrupted(out, step, **same)
        assert steps_in_log(out) == [*range(1, step + 1)] and state_of(out)["step"] == saved
    assert same_bits(whole, train(out, **same))
    losses = [[row["loss"] for row in read_log(folder / "log.csv")] for folder in (tmp_path / "whole", out)]
    assert losses[0] == losses[1] and len(losses[0]) == 7
    assert train(out, **same) is None, "one command that starts, goes on, and is done"


def test_a_signal_saves_and_ends(tmp_path, monkeypatch, capfd):
    """At the end of the micro-batch, with the signal's code; the first step has to be done. A second one
    during a save ends it there, in one line, and leaves the state of before."""
    whole = train(tmp_path / "whole")
    honest = torch.save

    class Slow:
        """A file during whose second write the second signal comes."""
        def __init__(self, file):
            self.file = file
            self.flush = file.flush

        def write(self, data):
            asked.append("written")
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return self.file.write(data)

    for number, step, saved, twice in ((signal.SIGINT, 0, 0, False), (signal.SIGTERM, 1, 1, False),
                                       (signal.SIGHUP, 3, 3, False), (signal.SIGINT, 2, 1, True)):
        out = tmp_path / f"{number.name} {step}"
        asked = []

        def ask(student, number=number, asked=asked, twice=twice):
            if not asked:
                asked.append("once")
                os.kill(os.getpid(), number)
                if twice:
                    patch.setattr(torch, "save", lambda state, file: honest(state, Slow(file)))

        with pytest.raises(SystemExit) as stopped, monkeypatch.context() as patch:
            train(out, save_interval=100, at={step: ask})
        assert stopped.value.code == 128 + number
        said = f"the same command with --resume goes on after step {saved} of 4 of the student\n"
        ended = capfd.readouterr()
        assert (ended.err if twice else ended.out).endswith(said if step else "so nothing was saved\n")
        assert out.exists() == bool(step)
        assert not step or state_of(out)["step"] == saved
        assert not [*out.glob(".distil*")]
        assert same_bits(train(out, resume_if_there=True), whole)
        assert steps_in_log(out) == [1, 2, 3, 4]
        assert (f"resume     after step {saved} of 4 of" in capfd.readouterr().out) == bool(step)


def test_only_the_same_run_goes_on(tmp_path, monkeypatch):
    """Other settings, other text of the same length, another teacher: refused, and said which."""
    out = tmp_path / "out"
    interrupted(out, 3)
    for name, value in {"lr": 0.02, "student_layers": "0,2", "dropout": 0.1}.items():
        with unchanged(out, f"other settings: {name} was"), claim(
                settings(out, resume=True, **{name: value}), RANKS):
            raise AssertionError("it is refused before any model is loaded")

    for how in ({"resume": True}, {}):  # a finished run is compared as well
        with unchanged(out, "settings: hash of the text was 'text A', now 'text B'."):
            train(out, OTHER_TEXT, data="/", **how)
        with unchanged(out, "settings: hash of the teacher was"):
            train(out, network=Net(2), **how)
        with unchanged(out, "settings: the code of the loss in distill.py is different."):
            train(out, loss_code="edited", **how)
        train(out, **how)

    student = {"student": "small", "student_layers": None}
    interrupted(tmp_path / "two", 3, **student)
    monkeypatch.setattr(run_module.teacher_cache, "fingerprint", lambda network: "another")
    with unchanged(tmp_path / "two", "hash of the first student was"):
        train(tmp_path / "two", resume=True, **student)


def test_names_may_differ_and_flags_be_left_open(tmp_path):
    """Content is compared, not names of folders. And what follows from models, such as a --seq-len that is
    not given, is compared when they are there."""
    out = tmp_path / "out"
    interrupted(out, 3)
    same = {"teacher": "copy", "data": "the/same/text", "resume": True}
    for name, value in (("seq_len", None), ("precision", "auto"), ("student_layers", "2")):
        with claim(settings(out, **same | {name: value}), RANKS):
            pass
        with unchanged(out, f"{name} was"):
            loop(settings(out, **same | {name: "another"}))
    assert train(out, **same) is not None


def test_a_longer_run_has_the_bits_of_one_that_was_as_long_from_the_start(tmp_path):
    """Where no step so far would have had another rate; how the warm-up stays is said, and works."""
    for warmup, longer in ((0.0, 0.0), (0.25, 0.25 * 4 / 9)):
        out = tmp_path / str(warmup)
        train(out, warmup=warmup)
        whole = train(tmp_path / f"whole {warmup}", steps=9, warmup=longer)
        assert same_bits(train(out, resume=True, steps=9, warmup=longer), whole)
        assert steps_in_log(out) == [*range(1, 10)]
        with unchanged(out, "has made 9 steps"):
            train(out, resume=True, steps=5, warmup=warmup and 0.2)
    with unchanged(out, "rates was 'constant, after 1 steps of warm-up', now 'constant, after 20 steps"):
        train(out, resume=True, steps=80, warmup=0.25)

    train(tmp_path / "cosine", schedule="cosine")
    for how in ({}, {"resume": True}):
        with unchanged(tmp_path / "cosine", "settings: learning rates was 'cosine over 4 steps"):
            train(tmp_path / "cosine", schedule="cosine", steps=9, **how)


def test_passes_over_the_text_may_become_more(out):
    """--epochs: the corpus decides on the steps, so they are compared when it is there."""
    train(out, overwrite=True, epochs=1.0)
    assert train(out, epochs=2.0, resume=True, steps=8) is not None
    more_text = SimpleNamespace(train=np.arange(1500), fingerprint="text A and more")
    with unchanged(out, "number of training tokens (more for more steps) was 999, now 1500"):
        train(out, more_text, epochs=3.0, resume=True, steps=9)


def test_a_resumed_bar_counts_from_where_the_run_was(tmp_path):
    """One tick for each micro-batch of the command; what was done before took none of its time."""
    bar = open_bar(title="distilling", total=8)
    interrupted(tmp_path / "out", 3)
    args = settings(tmp_path / "out", resume=True)
    student = Net()
    optimizer = torch.optim.AdamW(student.parameters())
    with claim(args, RANKS), Run(args, student, optimizer, CORPUS, RANKS, TEACHER, bar) as run:
        assert bar.n == bar.initial == bar.last_print_n == 2 * 2
        run.after_micro_batch(2)
        run.finish_step(2, Losses(1.2034, 0.5, 3.881, 0.0, 3.04, 10), 10, 1.0, 1.0)
        assert bar.n == 5 and str(bar).startswith("loss 1.20 CLM 3.88 teacher 3.04: "), "not cut off"
        run.finish_step(3, Losses(3.0, 0.0, 3.0, 0.0, 0.0, 5), 10, 1.0, 1.0)
        assert str(bar).startswith("loss 3.00: "), "text alone has one loss"


# ------------------------------------------------------------------------------------ damage
def change(path, how):
    """how(state): what happens to a saved state."""
    state = torch.load(path, weights_only=True)
    how(state)
    torch.save(state, path)


def in_averages(name, new):
    """new(old): what becomes of one of AdamW's averages, or of its number of steps."""
    def damage(state):
        for slot in state["optimizer"]["state"].values():
            slot[name] = new(slot[name])
    return damage


DAMAGE = [
    lambda state: state.pop("settings"),
    lambda state: state.update(step=2),
    lambda state: state["student"].update({"up.weight": torch.full((8, 3), math.nan)}),
    lambda state: state["student"].update({"up.weight": 7}),
    lambda state: state["optimizer"]["state"].pop(0),
    in_averages("exp_avg", lambda old: torch.zeros(())),  # AdamW would read and write beyond its end
    in_averages("exp_avg_sq", lambda old: old * math.nan),
]


def test_a_damaged_state_is_one_line(out):
    path = out / "train_state.pt"
    whole = path.read_bytes()
    for number, damage in enumerate([*DAMAGE, None]):
        path.write_bytes(whole if damage else whole[:900])
        if damage:
            change(path, damage)
        with unchanged(out, "train_state.pt", "is damaged", "--overwrite"):
            train(out, resume=True, steps=9)
            raise AssertionError(f"number {number}")


def test_a_state_of_another_pytorch(out):
    """What its optimizer has beside the averages does not matter, nor their order in memory."""
    def of_another_pytorch(state):
        for group in state["optimizer"]["param_groups"]:
            group.pop("decoupled_weight_decay", None)
            group.update(from_the_future=1, weight_decay=0.5)  # that of the flags counts

    change(out / "train_state.pt", of_another_pytorch)
    change(out / "train_state.pt", in_averages("exp_avg", lambda old: old.t().contiguous().t()))
    assert same_bits(train(out, resume=True, steps=9), train(out.parent / "whole", steps=9))


def test_a_log_is_only_a_record(tmp_path, capsys):
    """Whatever happens to it, the run goes on."""
    header = ",".join(COLUMNS).encode() + b"\n"
    for i, damage in enumerate((b"", header + b"1,2,3", b"\xff\xfe\0\x80" * 50)):
        out = tmp_path / str(i)
        interrupted(out, 3)
        (out / "log.csv").unlink()
        if damage:
            (out / "log.csv").write_bytes(damage)
        train(out, resume=True)
        assert steps_in_log(out) == [3, 4]
        assert "has lost 2 of the steps so far" in capsys.readouterr().err

    path = tmp_path / "log.csv"
    for column, cell in (("loss", "nan"), ("lr", ""), ("step", "1"), ("step", "2.5"), ("tokens", "0")):
        rows = [dict.fromkeys(COLUMNS, str(step)) for step in (1, 2, 3)]
        rows[1][column] = cell  # one that cannot be
        path.write_text("\n".join(",".join(row) for row in (COLUMNS, *(row.values() for row in rows))))
        assert [row["step"] for row in read_log(path)] == [1, 3], (column, cell)

    path.write_text("step,cos\n1,2\n")
    assert read_log(path) == []


def test_held_out_losses_have_a_file_of_their_own(tmp_path, monkeypatch):
    """A row for each validation, also before the first step; a resumed run makes some again, once."""
    losses = iter(range(1, 99))
    monkeypatch.setattr(run_module, "validate", lambda *_: [{"loss": float(next(losses))}])
    out = tmp_path / "out"
    interrupted(out, 3, eval_interval=1)
    assert [(row["step"], row["loss"]) for row in read_held_out(out)] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    train(out, eval_interval=1, resume=True)
    rows = [(row["step"], row["loss"]) for row in read_held_out(out)]
    assert rows == [(0, 1), (1, 2), (2, 3), (3, 5), (4, 6)]
    train(out, overwrite=True, seed=1)
    assert read_held_out(out) == [], "the old run's go with it"
    train(out, overwrite=True, teacher="none")
    assert [row["step"] for row in read_held_out(out)] == [0], "whether training helped is always known"


def test_what_is_not_finite_is_named(tmp_path):
    """The message shows whether it is the teacher's fault. The last step may break a student whose loss was
    fine."""
    run = Run(settings(tmp_path / "out"), Net(), None, CORPUS, RANKS, TEACHER)
    with pytest.raises(InputError, match="step 3: loss nan.*teacher's CLM nan.*lower --lr"):
        run.check(2, Losses(math.nan, 1.0, 1.0, 0.0, math.nan, 5), 1.0, 0.1)

    with pytest.raises(InputError, match="step 4: the student's up.weight is not finite"):
        train(tmp_path / "out", save_interval=1, at={3: poison})
    assert state_of(tmp_path / "out")["step"] == 3


# ------------------------------------------------------------------------------------ by the command
def test_the_same_command_again_shows_the_table(workshop, distil, refused, tmp_path, monkeypatch):
    """Nothing is written, and a card that was edited stays; but it has to be the same teacher and loss."""
    out = tmp_path / "out"
    first = distil(out, control=True)
    (out / "README.md").write_text("by hand")
    before = content(out)
    row = next(line for line in first.splitlines() if line.startswith("| control"))
    shutil.copytree(workshop / "teacher", tmp_path / "teacher")
    for how in ({}, {"resume": True}, {"teacher": tmp_path / "teacher"}):
        printed = distil(out, control=True, **how)
        assert row in printed and "finished" in printed
        assert content(out) == before

    def edited(*inputs):
        return distill.plain_loss(*inputs)

    edited.formula = distill.plain_loss.formula
    with monkeypatch.context() as patch:
        patch.setitem(distill.LOSSES, "forward", edited)
        refused(out, "the code of the loss in distill.py is different", control=True)

    other = load(tmp_path / "teacher")
    other.blocks[1].mlp.down.bias.data[0] += 1
    other.save(tmp_path / "teacher")
    refused(out, "hash of the teacher was", control=True, teacher=tmp_path / "teacher")
    assert content(out) == before


def test_longer_and_killed_runs_with_a_control_have_the_same_bits(
        workshop, distil, tmp_path, monkeypatch, capsys):
    """As if they had been as long from the start. Killed in the control's last step: the student is finished,
    the control goes on, and the table is made anew."""
    out = tmp_path / "out"
    settings = {"schedule": "constant", "warmup": 0, "control": True, "save-interval": 1}
    distil(tmp_path / "whole", steps=5, **settings)
    distil(out, steps=3, **settings)
    distil(out, steps=5, resume=True, **settings | {"control": None})
    honest = Run.finish_step

    def killed(run, step, *rest):
        if run.args.role == "control" and step == 4:
            raise KeyboardInterrupt
        honest(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_step", killed)
        longer = flags(workshop, out, steps=5, resume=True, **settings)
        assert call(patch, capsys, longer).code == 130
    assert steps_in_log(out / "control") == [1, 2, 3, 4]
    assert not (out / "results.json").exists(), "the table has no control"
    printed = distil(out, steps=5, resume=True, **settings)
    assert re.findall(r"resume +(.*)", printed) == [
        "after step 5 of 5 of the student", "after step 4 of 5 of the control"]
    for folder in ("", "control"):
        assert difference(weights(out / folder), weights(tmp_path / "whole" / folder)) == 0
        assert steps_in_log(out / folder) == [1, 2, 3, 4, 5]
    one, other = (json.loads((folder / "results.json").read_bytes()) for folder in (out, tmp_path / "whole"))
    assert one["rows"]["control"]["loss"] == other["rows"]["control"]["loss"]


def test_a_full_disk_is_one_line_and_resume_gets_out(distil, refused, tmp_path, monkeypatch):
    """Whichever file is to be put in its place; and a row of the log."""
    honest = os.replace
    out = tmp_path / "out"
    for name in ("args.json", "model.safetensors", "results.json"):
        def full(source, target, name=name):
            if Path(target).name == name:
                full_disk()
            honest(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "replace", full)
            refused(out, "No space left on device", name, **{"resume-if-there": True})
        assert {*content(out)} <= run_module.RUN_FILES if out.exists() else name == "args.json"
    with monkeypatch.context() as patch:
        patch.setattr(run_module.csv, "writer", full_disk)
        refused(out, "log.csv cannot be written (No space left on device)", steps=2, overwrite=True)
    distil(out, resume=True, steps=2)
    assert {"README.md", "results.json", *MODEL_FILES} <= {*content(out)}


def test_signals_outside_of_the_loop(workshop, tmp_path, monkeypatch, capfd):
    """One line, the shell's exit code, at once; and nothing is left by a run that made no step."""
    for number, place, moment in (
            (signal.SIGINT, distill, "load_models"), (signal.SIGHUP, distill, "load_corpus"),
            (signal.SIGTERM, distill, "export"), (signal.SIGINT, report, "texts")):
        def slow(*_, number=number):
            os.kill(os.getpid(), number)
            time.sleep(5)

        with monkeypatch.context() as patch:
            patch.setattr(place, moment, slow)
            started = time.monotonic()
            code, _, error = call(patch, capfd, flags(workshop, tmp_path / moment / "out"))
        assert code == 128 + number and time.monotonic() - started < 4
        way_on = "; the same command with --resume scores the models" * (moment == "texts")
        assert error.strip().splitlines()[-1] == f"stopped by {number.name}{way_on}"
        assert "Traceback" not in error
        assert (tmp_path / moment).exists() == (moment in ("export", "texts"))


def test_odd_names_work(distil, refused, tmp_path, monkeypatch):
    """~, spaces, letters, a line break, bytes that are not UTF-8; the rest is refused in one line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/with space \u6587\u7ae0", "~/a\nb\udcff"):
        distil(name, steps=1)
        assert (tmp_path / name[2:] / "README.md").exists()
    here = content(tmp_path)
    for name in ("", "/", ".", "x" * 5000, "a\nb\udcff/README.md/out"):
        refused(name, "--out")
    assert content(tmp_path) == here


def test_models_that_the_run_would_replace(distil, refused, tmp_path):
    """Neither its teacher nor its student, whatever their names are; nor are they its control."""
    out = tmp_path / "out"
    distil(out, control=True)
    before = content(out)
    (tmp_path / "link").symlink_to(out)
    for role, others in (("teacher", {"student-layers": "1"}), ("student", {"student-layers": None})):
        for model, verb in ((out, "is"), (tmp_path / "link", "is"), (out / "control", "contains")):
            refused(out, f"--out {out} {verb} the {role}: choose another --out", overwrite=True,
                    **others | {role: model})
    refused(out / "control", "but not a student's run: choose another --out")
    assert content(out) == before


def test_several_processes_without_torchrun(refused, tmp_path, monkeypatch):
    """Nothing waits for processes that will never come."""
    torchruns = ("WORLD_SIZE", "RANK", "MASTER_PORT", "MASTER_ADDR")
    for values in (("two",), ("2",), ("2", "0", "1")):
        with monkeypatch.context() as patch:
            for name in torchruns:
                patch.delenv(name, raising=False)
            for name, value in zip(torchruns, values, strict=False):
                patch.setenv(name, value)
            refused(tmp_path / "out", "cannot work together", "torchrun")
