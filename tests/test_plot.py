"""extras/plot.py: lines hold what the log holds, probabilities are the models', bad input is one line."""
import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
from data import load_tokenizer
from extras import plot
from model import GPT2, load, student_from
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
    args = settings("--teacher", "gpt2", "--student-layers", "0,3", "--out", folder, *flags)
    (folder / "args.json").write_text(json.dumps({**vars(args), "hash of the text": text or str(folder)}))
    rows = {name: {"loss": found, "KL to teacher": kl, "same top-1": 0.5, "perplexity": None}
            for name, found, kl in (("teacher", 3.0, 0), ("student", loss, 0.125), ("control", 3.75, 0.625))}
    (folder / "results.json").write_text(json.dumps({"rows": rows}))


def settings(*flags):
    return distill.parse_args([*map(str, flags), "--device", "cpu", "--precision", "fp32", "--seq-len", "16"])


@pytest.fixture
def folder(tmp_path):
    write_log(tmp_path / "out", 60)
    return tmp_path / "out"


@pytest.fixture
def three(tmp_path):
    """Two finished runs, and one that is going on, with names that matplotlib would not take as they are."""
    folders = [tmp_path / name for name in ("_warm", "cold $x^$", r"new$\frac")]
    for folder, steps, easier in zip(folders, (60, 80, 20), (0, 0.5, 0.25), strict=True):
        write_log(folder, steps, easier=easier)
    finish(folders[0], "--steps", 60)
    finish(folders[1], "--steps", 80, "--temperature", 4, "--seed", 3, "--workers", 7, loss=2.75)
    return folders


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizers_dir):
    """A teacher with a padded vocabulary, and a run of distill.py with two of its layers."""
    root, tokenizer = tmp_path_factory.mktemp("plot"), load_tokenizer(tokenizers_dir / "gpt2")
    torch.manual_seed(0)
    teacher = GPT2(GPT2.config(vocab_size=tokenizer.vocab_size + 40, context=32, width=32, n_layer=4,
                               n_head=2, eos=tokenizer.eot))
    for parameter in teacher.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    student = student_from(teacher, [0, 3])
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for name, model in (("teacher", teacher), ("out", student)):
        model.save(root / name)
        tokenizer.save(root / name)
    args = settings("--teacher", root / "teacher", "--student-layers", "0,3")
    (root / "out" / "args.json").write_text(json.dumps(vars(args)))
    return root


@pytest.fixture
def main(monkeypatch, capsys):
    """main("out", "--save", path) -> the exit code and stderr of python -m extras.plot."""
    def main(*argv):
        monkeypatch.setattr(sys, "argv", ["plot", *map(str, argv)])
        capsys.readouterr()
        try:
            run_cli(plot.main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err
    return main


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


# ------------------------------------------------------------------------------------ loss.png
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
        log = folder / "log.csv"
        if column == "control":
            log, column = folder / "control" / "log.csv", "clm"
        expected = [float(row[column]) for row in csv.DictReader(log.open())]
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
    assert axes.get_title("left") == settings().objective


def test_which_lines_there_are(folder):
    """A control may have another number of steps; with one term alone the loss is another line times a
    number."""
    for steps in (20, 90):
        write_log(folder / "control", steps, teacher=False)
        axes = plot.draw_loss(folder)
        assert [*lines(axes)["control's CLM,\nwithout the teacher"][0]] == [*range(1, steps + 1)]
        assert axes.get_xlim() == (0, max(60, steps))
    (folder / "control" / "log.csv").unlink()
    for kd_weight, clm_weight, drawn in ((1, 0, False), (0, 1, False), (0.5, 0.5, True), (1, 0.001, True)):
        write_log(folder, 60, kd_weight=kd_weight, clm_weight=clm_weight)
        assert ("student's loss" in lines(plot.draw_loss(folder))) == drawn
    write_log(folder, 60, teacher=False)
    assert {*lines(plot.draw_loss(folder))} == {"student's CLM"}


# ------------------------------------------------------------------------------------ several runs
def test_runs_by_step_and_by_second(three):
    write_held_out(three[0], (0, 5.0), (20, 3.5), (40, 3.25))
    by_step, by_second = plot.draw_runs(three)
    for axes, speed, ends in ((by_step, 1, (60, 80)), (by_second, 4, (15, 20))):  # 4 steps a second
        curves = [line for line in axes.lines if line.get_marker() == "None"]
        assert len({line.get_color() for line in curves}) == 3
        for line, folder, steps in zip(curves, three, (60, 80, 20), strict=True):
            clm = np.array([float(row["clm"]) for row in csv.DictReader((folder / "log.csv").open())])
            assert np.allclose(line.get_xdata(), np.arange(1, steps + 1) / speed)
            assert np.allclose(line.get_ydata(), plot.running_mean(clm))
        dots, = (line.get_xydata().tolist() for line in axes.lines
                 if line.get_marker() == "o" and len(line.get_xdata()))
        assert dots == [[0, 5.0], [20 / speed, 3.5], [40 / speed, 3.25]]
        diamonds = [tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "D"]
        assert diamonds == [(ends[0], 3.25), (ends[1], 2.75)], "held-out losses of those that have one"
        low, high = axes.get_ylim()
        assert low < 2 and 3.5 < high < 4, "the range after a tenth of the steps"

    # matplotlib leaves out names that begin with _, and typesets what is between two dollar signs.
    figure = by_step.figure
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*map(str, three)]
    figure.draw_without_rendering()


def test_the_table_of_runs(three, monkeypatch):
    """A column for each run, in 80 columns. KLs on the training text are at T, so only at one T alike."""
    write_log(three[0] / "control", 60, teacher=False)
    monkeypatch.chdir(three[0].parent)
    folders = ["_warm", "cold $x^$", r"new$\frac", "_warm/control"]
    *table, about = plot.compare(folders).splitlines()
    assert max(map(len, [*table, about])) <= 80 and "T = 1" in about
    names, warm, cold, new, control = zip(*cells("\n".join(table)), strict=True)
    assert [*names[2:]] == ["seed", "temperature", "steps", "seconds", "last CLM", "held-out loss",
                            "held-out KL to teacher", "held-out same top-1"]
    assert warm[2:6] == ("0", "2.0", "60", "15") and warm[7:] == ("3.2500", "0.1250", "0.5000")
    assert cold[2:6] == ("3", "4.0", "80", "20") and cold[7:] == ("2.7500", "0.1250", "0.5000")
    assert new[2:6] == ("-", "-", "20", "5") and new[7:] == ("-", "-", "-")
    assert control[7:] == ("3.7500", "0.6250", "0.5000"), "from the results of its student"
    last = (78, 79, 80)  # the twentieth of 80 steps around the last one: two before it
    assert float(cold[6]) == pytest.approx(np.mean([4 / math.sqrt(i) + i % 3 - 0.5 for i in last]), abs=1e-4)

    kl, = (row[1:] for row in cells(plot.compare(folders[1:])) if row[0] == "last KL")
    assert float(kl[0]) == pytest.approx(np.mean([1 / i for i in last]), abs=1e-4) and kl[2] == "-"


def test_verdicts_over_seeds(tmp_path, monkeypatch, capsys):
    """The difference of each pair with one seed, against twice its standard deviation, from 3 seeds on."""
    losses = {"1": (3.0, 3.2, 3.1), "2": (2.9, 3.1, 3.0), "4": (3.15, 3.1, 3.3), "8": (3.5, 3.71, 3.6)}
    folders = []
    for T, found in losses.items():
        for seed, loss in enumerate(found):
            folders.append(tmp_path / f"{T}-{seed}")
            write_log(folders[-1], 60)
            finish(folders[-1], "--temperature", T, "--seed", seed, "--workers", seed + 1, loss=loss,
                   text="one")

    def verdicts(folders):
        text = plot.verdicts(folders)
        assert max(map(len, text.splitlines())) <= 80
        return {row[0]: row[1:] for row in cells(text) if len(row) > 1}

    found = verdicts(folders)
    assert found.pop("temperature") == ["seeds", "loss minus the other's", "verdict"]
    assert len(found) == 1 + 4 + 3
    assert [found[f"{T}.0 against 1.0"] for T in "248"] == [
        ["3", "-0.1000 ± 0.0000", "BETTER"],
        ["3", "+0.0833 ± 0.3215", "CANNOT TELL"],
        ["3", "+0.5033 ± 0.0115", "WORSE"]]
    assert found["1.0 against its control"] == ["3", "-0.6500 ± 0.2000", "BETTER"]
    two_seeds = verdicts([*folders[:2], *folders[3:5]])
    assert two_seeds["2.0 against 1.0"] == ["2", "-0.1000 ± 0.0000", "CANNOT TELL"]

    assert verdicts(folders[:3])["student against its control"][0] == "3"
    assert plot.verdicts([folders[0], folders[3]]) == plot.ONE_SEED
    assert plot.verdicts([folders[0], folders[4]]) == plot.ONE_SEED, "no seed in common"
    finish(folders[1], "--temperature", 1, "--seed", 1, text="another")
    assert plot.verdicts(folders[:2]) == plot.ONE_SEED, "another text"
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, folders[3:9])])
    plot.main()
    assert "BETTER |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ distribution.png
def test_probabilities_are_the_models(finished, tmp_path, monkeypatch):
    student_from(load(finished / "teacher"), [0, 3]).save(tmp_path)
    tokenizer = load_tokenizer(finished / "out")
    V = tokenizer.vocab_size
    series = {"teacher, T = 1": (finished / "teacher", 1), "T = 2": (finished / "teacher", 2),
              "T = 4": (finished / "teacher", 4), "student before": (tmp_path, 1),
              "after": (finished / "out", 1)}
    for prompt in ("    def add_argument(self,", "", 40 * "long "):
        tokens, panels = plot.distributions(finished / "out", prompt)
        ids = torch.tensor([(tokenizer.encode(prompt) or [tokenizer.eot])[-32:]])  # 32 positions
        with torch.no_grad():
            p = {name: (load(folder)(ids)[0, -1, :V].double() / T).softmax(-1).numpy()
                 for name, (folder, T) in series.items()}
        order = np.argsort(-p["teacher, T = 1"])
        shown = [order[rank - 1] for rank in (*range(1, 11), 100)]  # it has fewer than 1,000 tokens
        assert tokens == [*(ascii(tokenizer.decode([i])) for i in shown[:10]),
                          f"100th: {ascii(tokenizer.decode([shown[10]]))}", f"all {V - 11} others"]
        for panel in panels.values():
            for name, found in panel.items():
                expected = [*p[name][shown], 1 - p[name][shown].sum()]
                assert np.allclose(found, expected, rtol=1e-5, atol=1e-9), name

    both = plot.draw_distribution(finished / "out", prompt)
    for axes, panel in zip(both, panels.values(), strict=True):
        drawn = {line.get_label(): line for line in axes.lines if line.get_label() in panel}
        assert {name: [*line.get_xdata()] for name, line in drawn.items()} == panel
    assert [label.get_text() for label in both[0].get_yticklabels()] == tokens
    monkeypatch.setattr(plot, "ascii", lambda text: r"'$\frac$'", raising=False)
    plot.draw_distribution(finished / "out", r"$\frac$")[0].figure.draw_without_rendering()


def test_the_student_before_is_the_one_that_distill_started_from(finished, monkeypatch):
    monkeypatch.chdir(finished)
    for flags in (["--student-layers", "2"], ["--student-layers", "3,"], ["--student-layers", "1,2,2"],
                  ["--student-layers", "2", "--student-init", "random", "--seed", "7"],
                  ["--student", "teacher", "--student-init", "random"]):
        args = settings("--teacher", "teacher", *flags)
        _, _, student = distill.load_models(args, torch.device("cpu"))
        Path("first").mkdir(exist_ok=True)
        student.save("first")
        Path("first", "args.json").write_text(json.dumps(vars(args)))
        _, before, after = plot.models_of("first")
        assert not before.training
        for name, tensor in after.state_dict().items():
            assert torch.equal(tensor, before.state_dict()[name]), (flags, name)


# ------------------------------------------------------------------------------------ the command
def test_where_pictures_go(finished, three, main):
    write_log(finished / "out", 60)
    for argv, name in ((["--distribution", r"a\nb"], "distribution.png"),
                       (["--save", finished / "l.svg"], "../l.svg"),
                       (["--save", finished / "l.pdf"], "../l.pdf")):
        path = finished / "out" / name
        assert main(finished / "out", *argv) == (0, "")
        assert path.read_bytes()[:4] == {".png": b"\x89PNG", ".svg": b"<?xm", ".pdf": b"%PDF"}[path.suffix]
    assert main(*three) == (0, "")
    assert (three[0] / "runs.png").exists()


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
    code, error = main(folder)
    assert code == 2 and "No space left" in error and error.count("\n") == 1
    assert (folder / "loss.png").read_bytes() == before, "a failed picture leaves the old one"


def test_damaged_logs(folder, main):
    """A run that is going on, or was killed, ends in half a row; two whole rows make a line."""
    with open(folder / "log.csv", "a") as file:
        file.write("\0\0\n61,3.1,0.5,inf,0,2.5,0.001,1,256,1000\n62,3.1")
    assert [*lines(plot.draw_loss(folder))["student's CLM"][0]] == [*range(1, 61)]
    row = "1,3.1,0.5,3,0,2.5,0.001,1,256,1000\n"
    for text in ("", ",".join(COLUMNS) + "\n" + 3 * row, "a,b\n1,2\n"):
        for place in (folder, folder / "control"):
            write_log(folder, 60)
            place.mkdir(exist_ok=True)
            (place / "log.csv").write_text(text)
            code, error = main(folder)
            assert code == 2 and error.count("\n") == 1
            assert f"{place / 'log.csv'}: steps so far: " in error and "a line needs two" in error


def test_bad_folders_and_files(tmp_path, folder, finished, main):
    def refused(*argv):
        code, error = main(*argv)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    assert f"there is no folder {tmp_path / 'nowhere'}\n" in refused(tmp_path / "nowhere")
    assert f"there is no folder {folder}t; did you mean {folder}?" in refused(f"{folder}t")
    assert f"{tmp_path / 'log.csv'}: steps so far: 0" in refused(tmp_path)
    assert f"{tmp_path / 'args.json'}: there are no settings" in refused(tmp_path, "--distribution")
    assert "must be a name that ends in .png" in refused(folder, "--save", tmp_path / "picture")
    assert "--distribution draws one run" in refused(folder, folder, "--distribution")
    refused(folder, "--save", folder / "log.csv" / "loss.png")
    for text in ("{", "[]", '{"rows": {"student": 7}}'):
        (folder / "results.json").write_text(text)
        assert "results.json" in refused(folder)

    args = vars(settings("--teacher", finished / "teacher", "--student-layers", "0,3"))
    for changes in ({"student_layers": 5}, {"seed": "x"}, {"teacher": "none"}):
        (folder / "args.json").write_text(json.dumps(args | changes))
        assert "args.json" in refused(folder, "--distribution")


def test_without_matplotlib(folder, main, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, error = main(folder)
    assert code == 2 and error.startswith("error: pictures need matplotlib") and error.count("\n") == 1
    code = ("import sys; sys.modules['matplotlib'] = None\n"
            "from extras import plot; plot.parse_args(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--distribution" in done.stdout, done.stderr
