"""extras/plot.py: lines hold what the log holds, verdicts what the seeds say, bad input is one line."""
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import distill
from extras import plot
from support.cli import run_cli
from support.run import COLUMNS

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------ a run to draw
def write_log(folder, steps, teacher=True, kd_weight=0.5, clm_weight=0.5, easier=0.0, tokens=256):
    """log.csv as a run would write it, of losses that are made up."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(1, steps + 1):
            clm = 4 / math.sqrt(step) + step % 3 - easier
            kl = 1 / step if teacher else 0.0
            loss = kd_weight * 4 * kl + clm_weight * clm
            row = (step, loss, kl, clm, 0, (1.5 + step % 5) * teacher, 1e-3, 1, tokens, 1024)
            writer.writerow(f"{x:.7g}" for x in row)


def write_held_out(folder, *points):
    rows = "".join(f"{step},{loss}\n" for step, loss in points)
    (folder / "held-out.csv").write_text("step,loss\n" + rows)


def finish(folder, *flags, loss=3.25, text=None):
    """What else a finished run has: its settings and its results."""
    args = distill.parse_args(["--teacher", "gpt2", "--student-layers", "2", "--out", str(folder),
                               *map(str, flags)])
    (folder / "args.json").write_text(json.dumps({**vars(args), "hash of the text": text or str(folder)}))
    rows = {name: {"loss": found, "KL to teacher": kl, "same top-1": 0.5, "perplexity": None}
            for name, found, kl in (("teacher", 3.0, 0), ("student", loss, 0.125), ("control", 3.75, 0.625))}
    (folder / "results.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture
def folder(tmp_path):
    write_log(tmp_path / "out", 60)
    return tmp_path / "out"


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Two finished runs, and one that is going on, with names that matplotlib would not take as they are."""
    monkeypatch.chdir(tmp_path)
    folders = ["_warm", "cold $x^$", r"new$\frac"]
    for name, steps, easier in zip(folders, (60, 80, 20), (0, 0.5, 0.25), strict=True):
        write_log(Path(name), steps, easier=easier)
    finish(Path(folders[0]), "--steps", 60)
    finish(Path(folders[1]), "--steps", 80, "--temperature", 4, "--seed", 3, "--workers", 7, loss=2.75)
    return folders


@pytest.fixture
def main(monkeypatch, capsys):
    """main("out") -> exit code, stdout and stderr of python -m extras.plot."""
    def main(*argv):
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, argv)])
        capsys.readouterr()
        try:
            run_cli(plot.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return main


def cells(table):
    return {row[0]: row[1:] for line in table.splitlines() if line.startswith("|")
            for row in [[cell.strip() for cell in line.strip("|").split("|")]]}


def logged(folder, column):
    return [float(row[column]) for row in csv.DictReader((Path(folder) / "log.csv").open())]


# ------------------------------------------------------------------------------------ one run
def lines(axes):
    """{name: (steps, values as logged, their running mean)} of the lines on the training text."""
    means = [line for line in axes.lines if line.get_label() in {name for name, _ in plot.LINES.values()}]
    before = dict(zip(axes.lines[1:], axes.lines, strict=False))  # a pale line comes just before its mean
    return {mean.get_label(): (*before[mean].get_xydata().T, mean.get_ydata()) for mean in means}


def points(axes):
    """{role: [(step, loss)]} of the dots."""
    return {line.get_label().split(",")[0]: [tuple(point) for point in line.get_xydata().tolist()]
            for line in axes.lines if "held-out" in line.get_label()}


def test_lines_hold_the_log(folder):
    write_log(folder / "control", 60, teacher=False)  # its CLM is the student's: two ends meet
    axes = plot.draw_loss(folder)
    assert {*lines(axes)} == {name for name, _ in plot.LINES.values()}
    for column, (name, _) in plot.LINES.items():
        expected = logged(folder / "control", "clm") if column == "control" else logged(folder, column)
        steps, values, mean = lines(axes)[name]
        assert [*steps] == [*range(1, 61)] and [*values] == expected, column
        assert mean == pytest.approx([np.mean(expected[max(0, i - 1):i + 2]) for i in range(60)])

    # The names are at the ends of the lines, and do not touch.
    assert {text.get_text(): text.get_color() for text in axes.texts} == dict(plot.LINES.values())
    axes.figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:], strict=False))


def test_the_picture_says_what_is_training_text_and_what_is_held_out(folder):
    """Training losses alone would contradict the table, which is about held-out text."""
    axes = plot.draw_loss(folder)
    assert axes.get_ylabel() == "nats per token on the training text" and not axes.get_legend()
    assert points(axes) == {}

    write_held_out(folder, (0, 5.0), (20, 3.5), (40, 3.25), (80, 3.0))  # the last one's steps fell to a kill
    assert points(plot.draw_loss(folder)) == {"student": [(0, 5.0), (20, 3.5), (40, 3.25)]}
    finish(folder)
    write_log(folder / "control", 30, teacher=False, tokens=512)  # a step of it is two of the student's
    write_held_out(folder / "control", (15, 4.5))
    axes = plot.draw_loss(folder)
    assert points(axes) == {"student": [(0, 5.0), (20, 3.5), (40, 3.25), (60, 3.25)], "teacher": [(60, 3.0)],
                            "control": [(30, 4.5), (60, 3.75)]}
    assert "held-out text" in axes.get_legend().get_texts()[1].get_text()
    assert axes.get_title("left") == json.loads((folder / "args.json").read_text())["objective"]


def test_which_lines_there_are(folder):
    """With one term alone the loss is that term times a number, and a diverged model has no point."""
    for kd_weight, clm_weight, drawn in ((1, 0, False), (0, 1, False), (0.5, 0.5, True), (1, 0.001, True)):
        write_log(folder, 60, kd_weight=kd_weight, clm_weight=clm_weight)
        assert ("student's loss" in lines(plot.draw_loss(folder))) == drawn
    write_log(folder, 60, teacher=False)
    finish(folder, loss=None)
    axes = plot.draw_loss(folder)
    assert {*lines(axes)} == {"student's CLM"} and "student" not in points(axes)
    assert math.isfinite(axes.get_ylim()[1])


# ------------------------------------------------------------------------------------ several runs
def test_runs_by_step_and_by_second(three):
    write_held_out(Path(three[0]), (0, 5.0), (20, 3.5), (40, 3.25))
    both = plot.draw_runs([plot.read_run(folder) for folder in three])
    for axes, speed, ends in zip(both, (1, 4), ((60, 80), (15, 20)), strict=True):  # 4 steps a second
        curves = [line for line in axes.lines if line.get_marker() == "None"]
        assert len({line.get_color() for line in curves}) == 3
        for line, folder, steps in zip(curves, three, (60, 80, 20), strict=True):
            first = steps // 10
            assert np.allclose(line.get_xdata(), np.arange(first + 1, steps + 1) / speed)
            assert np.allclose(line.get_ydata(), plot.running_mean(logged(folder, "clm"))[first:])
        dots, = (line.get_xydata().tolist() for line in axes.lines
                 if line.get_marker() == "o" and len(line.get_xdata()))
        assert dots == [[20 / speed, 3.5], [40 / speed, 3.25]]
        diamonds = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "D"]
        assert diamonds[:2] == [(ends[0], 3.25), (ends[1], 2.75)] and np.isnan(diamonds[2][1])
        low, high = axes.get_ylim()
        assert low < 2 and 3.5 < high < 4, "the range after a tenth of the steps"

    # matplotlib leaves out names that begin with _, and typesets what is between two dollar signs.
    assert [text.get_text() for text in both[0].figure.legends[0].get_texts()] == three
    both[0].figure.draw_without_rendering()


def test_the_table_of_runs(three, main):
    """A column for each run, in 80 columns."""
    code, printed, _ = main(*three)
    table, _, rest = printed.partition("last CLM: ")
    assert code == 0 and Path(three[0], "runs.png").exists() and "one seed each" in rest
    assert max(map(len, printed.splitlines())) <= 80
    rows = {name: row for name, row in cells(table).items() if "---" not in name}
    last = [f"{np.mean([4 / math.sqrt(i) + i % 3 - easier for i in steps]):.4f}"
            for easier, steps in ((0, (59, 60)), (0.5, (78, 79, 80)), (0.25, (20,)))]
    assert rows == {
        "run": three, "seed": ["0", "3", "-"], "temperature": ["2.0", "4.0", "-"],
        "steps": ["60", "80", "20"], "seconds": ["15", "20", "5"], "last CLM": last,
        "held-out loss": ["3.2500", "2.7500", "-"], "held-out KL to teacher": ["0.1250", "0.1250", "-"],
        "held-out same top-1": ["0.5000", "0.5000", "-"]}


def test_verdicts_over_seeds(tmp_path):
    """The difference of each pair with one seed, against twice its standard deviation, from 3 seeds on."""
    losses = {"1": (3.0, 3.2, 3.1), "2": (2.9, 3.1, 3.0), "4": (3.15, 3.1, 3.3), "8": (3.5, 3.71, 3.6)}
    folders = []
    for T, found in losses.items():
        for seed, loss in enumerate(found):
            folders.append(tmp_path / f"{T}-{seed}")
            write_log(folders[-1], 60)
            finish(folders[-1], "--temperature", T, "--seed", seed, "--workers", seed + 1, loss=loss,
                   text="one")

    def verdicts(*folders):
        text = plot.verdicts([plot.read_run(folder) for folder in folders])
        assert max(map(len, text.splitlines())) <= 80
        return cells(text) or text

    found = verdicts(*folders)
    assert found["temperature"] == ["seeds", "loss minus the other's", "verdict"] and len(found) == 2 + 4 + 3
    assert found["2.0 against 1.0"] == ["3", "-0.1000 ± 0.0000", "BETTER"]
    assert found["4.0 against 1.0"] == ["3", "+0.0833 ± 0.3215", "CANNOT TELL"]
    assert found["8.0 against 1.0"] == ["3", "+0.5033 ± 0.0115", "WORSE"]
    assert found["1.0 against its control"] == ["3", "-0.6500 ± 0.2000", "BETTER"]
    two_seeds = verdicts(*folders[:2], *folders[3:5])
    assert two_seeds["2.0 against 1.0"] == ["2", "-0.1000 ± 0.0000", "CANNOT TELL"]
    assert verdicts(*folders[:3])["student against its control"][0] == "3"
    assert verdicts(folders[0], folders[4]) == plot.ONE_SEED, "no seed in common"
    finish(folders[1], "--temperature", 1, "--seed", 1, text="another")
    assert verdicts(*folders[:2]) == plot.ONE_SEED, "another text"


# ------------------------------------------------------------------------------------ the command
def test_same_run_same_picture_whatever_the_users_settings(folder, main, monkeypatch):
    import matplotlib
    main(folder)
    before = (folder / "loss.png").read_bytes()
    matplotlib.rcParams.update({"lines.linestyle": "--", "font.size": 20, "figure.facecolor": "red"})
    main(folder)
    assert (folder / "loss.png").read_bytes() == before
    pixels = matplotlib.image.imread(folder / "loss.png")
    assert pixels.shape[1] == 1200 and pixels[0, 0, 3] == 0, "transparent, for light and dark pages"

    def half(figure, path, **_):
        Path(path).write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", half)
    code, _, error = main(folder)
    assert code == 2 and "No space left" in error and error.count("\n") == 1
    assert (folder / "loss.png").read_bytes() == before, "a failed picture leaves the old one"


def test_damaged_runs(folder, main):
    """A run that is going on, or was killed, ends in half a row; what cannot be drawn ends in one line."""
    with open(folder / "log.csv", "a") as file:
        file.write("\0\0\n61,3.1,0.5,inf,0,2.5,0.001,1,256,1000\n62,3.1")
    assert [*lines(plot.draw_loss(folder))["student's CLM"][0]] == [*range(1, 61)]

    def refused(*argv):
        code, _, error = main(*argv)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    for text in ("{", "[]", '{"rows": {"student": 7}}'):
        (folder / "results.json").write_text(text)
        assert "results.json" in refused(folder)
    row = "1,3.1,0.5,3,0,2.5,0.001,1,256,1000\n"
    (folder / "log.csv").write_text(",".join(COLUMNS) + "\n" + 3 * row)
    assert f"{folder / 'log.csv'}: steps so far: 1" in refused(folder)
    assert "steps so far: 0; a line needs two" in refused(folder / "nowhere")


def test_without_matplotlib(folder, main, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = main(folder)
    assert code == 2 and error.startswith("error: pictures need matplotlib") and error.count("\n") == 1
    code = ("import sys; sys.modules['matplotlib'] = None\n"
            "from extras import plot; plot.parse_args(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "RUN" in done.stdout, done.stderr
