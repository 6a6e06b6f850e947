"""extras/plot.py: lines hold what the log holds, probabilities are the models', bad input is one line."""
import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
from extras import plot
from model import GPT2, load, student_from
from support.card import write_card
from support.chunked_loss import Losses
from support.cli import format_table, run_cli
from support.log import COLUMNS, HELD_OUT, HELD_OUT_COLUMNS, shown, write_rows
from support.runtime import Ranks
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
PROMPT = "    def add_argument(self,"


# ------------------------------------------------------------------------------------ a run to draw
def write_log(folder, steps, teacher=True, kd_weight=0.5, clm_weight=0.5, T=2, easier=0.0):
    """log.csv as a run would write it, of losses that are made up."""
    folder.mkdir(exist_ok=True, parents=True)
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(1, steps + 1):
            clm = 4 / math.sqrt(step) + step % 3 - easier
            kl = 1 / step if teacher else 0.0
            losses = Losses(kd_weight * T**2 * kl + clm_weight * clm, kl, clm, 0.0, 1.5 + step % 5, 256)
            if not teacher:
                losses = losses._replace(teacher_clm=0.0)
            writer.writerow(map(shown, (step, *losses[:5], 1e-3, 1.0, 256, 1024)))


@pytest.fixture
def folder(tmp_path):
    write_log(tmp_path / "out", 60)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tokenizers_dir):
    """A teacher with a padded vocabulary, and a run of distill.py with two of its layers."""
    root, tokenizer = tmp_path_factory.mktemp("plot"), load_tokenizer(tokenizers_dir / "gpt2")
    torch.manual_seed(0)
    config = GPT2.config(vocab_size=tokenizer.vocab_size + 40, context=32, width=32, n_layer=4, n_head=2,
                         eos=tokenizer.eot)
    teacher = GPT2(config)
    for parameter in teacher.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    teacher.save(root / "teacher")
    tokenizer.save(root / "teacher")
    args = settings("--teacher", root / "teacher", "--student-layers", "0,3")
    _, _, student = distill.load_models(args, torch.device("cpu"))
    for parameter in student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    student.save(root / "out")
    tokenizer.save(root / "out")
    (root / "out" / "args.json").write_text(json.dumps(vars(args)))
    return root


def settings(*flags):
    return distill.parse_args([*map(str, flags), "--device", "cpu", "--precision", "fp32", "--seq-len", "16"])


def main(monkeypatch, capsys, *argv):
    """Exit code and stderr of python -m extras.plot."""
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, argv)])
    capsys.readouterr()
    try:
        run_cli(plot.main)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


# ------------------------------------------------------------------------------------ loss.png
def lines(axes):
    """{label: (pale line, running mean)}: plot.py draws the two one after the other."""
    return {mean.get_label(): (pale.get_xydata().T, mean.get_xydata().T)
            for pale, mean in zip(axes.lines[::2], axes.lines[1::2], strict=True)}


@pytest.mark.parametrize("control", [True, False])
def test_lines_hold_the_log(folder, control):
    if control:
        write_log(folder / "control", 60, teacher=False)
    drawn = lines(plot.draw_loss(folder))
    rows = list(csv.DictReader((folder / "log.csv").open()))
    expected = {"student's loss": "loss", "student's CLM": "clm", "student's KL\nto the teacher": "kl",
                "teacher's CLM,\nthe bar to reach": "teacher_clm"}
    assert {*drawn} - {*expected} == ({"control's CLM,\nwithout the teacher"} if control else set())
    for label, column in expected.items():
        (steps, values), (mean_steps, _) = drawn[label]
        assert [*steps] == [*mean_steps] == [*range(1, 61)]
        assert [*values] == [float(row[column]) for row in rows], label
    if control:
        rows = list(csv.DictReader((folder / "control" / "log.csv").open()))
        (_, values), _ = drawn["control's CLM,\nwithout the teacher"]
        assert [*values] == [float(row["clm"]) for row in rows]


def test_each_line_is_named_once_at_its_end_and_no_two_names_touch(folder):
    write_log(folder / "control", 60, teacher=False)  # its CLM is the student's: two ends meet
    axes = plot.draw_loss(folder)
    assert sorted(text.get_text() for text in axes.texts) == sorted(lines(axes))
    assert {text.get_text(): text.get_color() for text in axes.texts} \
        == {line.get_label(): line.get_color() for line in axes.lines[1::2]}
    axes.figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in zip(boxes, boxes[1:], strict=False))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "nats per token")


def validated(folder, *points):
    """held-out.csv as --eval-interval leaves it: pairs (step, loss)."""
    write_rows(folder / HELD_OUT, HELD_OUT_COLUMNS,
               [dict(zip(HELD_OUT_COLUMNS, point, strict=True)) for point in points])


def test_held_out_losses_are_drawn_as_they_are(folder):
    validated(folder, (20, 3.5), (40, 3.25), (80, 3.0))  # the last one of steps that a kill has taken
    axes = plot.draw_loss(folder)
    line, = (line for line in axes.lines if line.get_marker() == "o")
    assert [*line.get_xdata()] == [20, 40] and [*line.get_ydata()] == [3.5, 3.25]
    assert line.get_label() in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("n", [2, 39, 40, 100])
def test_running_mean(n):
    values = np.random.default_rng(0).normal(size=n)
    half = n // 40
    expected = [values[max(0, i - half):i + half + 1].mean() for i in range(n)]
    assert np.allclose(plot.running_mean(values), expected, atol=1e-12)


def test_text_alone_has_no_teacher_to_draw(folder):
    write_log(folder, 60, teacher=False)
    assert {*lines(plot.draw_loss(folder))} == {"student's CLM"}


@pytest.mark.parametrize("weights, drawn", [
    ({"kd_weight": 1.0, "clm_weight": 0.0}, False), ({"kd_weight": 0.3, "clm_weight": 0.0, "T": 3}, False),
    ({"kd_weight": 0.0, "clm_weight": 1.0}, False), ({"kd_weight": 0.5, "clm_weight": 0.5}, True),
    ({"kd_weight": 1.0, "clm_weight": 0.001}, True)])
def test_a_loss_that_is_another_line_times_a_number_is_left_out(folder, weights, drawn):
    write_log(folder, 60, **weights)
    assert ("student's loss" in lines(plot.draw_loss(folder))) == drawn
    assert "student's KL\nto the teacher" in lines(plot.draw_loss(folder))


@pytest.mark.parametrize("steps", [20, 90])
def test_a_control_with_another_number_of_steps(folder, steps):
    write_log(folder / "control", steps, teacher=False)
    axes = plot.draw_loss(folder)
    (drawn, _), (mean_steps, _) = lines(axes)["control's CLM,\nwithout the teacher"]
    assert [*drawn] == [*mean_steps] == [*range(1, steps + 1)]
    assert axes.get_xlim() == (0, max(60, steps))
    axes.figure.draw_without_rendering()


def test_title_is_the_objective(folder):
    assert plot.draw_loss(folder).get_title("left") == ""
    args = settings("--teacher", "gpt2", "--student-layers", "6", "--temperature", "3")
    (folder / "args.json").write_text(json.dumps(vars(args)))
    assert plot.draw_loss(folder).get_title("left") \
        == "loss = 0.9 * 3² * KL(teacher || student, T = 3) + 0.1 * CLM"


# ------------------------------------------------------------------------------------ several runs
def finish(folder, *flags, loss=3.25):
    """What else a finished run has: its settings, and a card with its table."""
    args = settings("--teacher", "gpt2", "--student-layers", "0,3", "--out", folder, *flags)
    (folder / "args.json").write_text(json.dumps(vars(args)))
    rows = [{"model": name, "parameters": 1234567, "loss": found, "perplexity": 7.0, "KL to teacher": kl,
             "same top-1": 0.5} for name, found, kl in (("teacher", 3.0, 0.0), ("student", loss, 0.125),
                                                        ("control", 3.75, 0.625))]
    write_card(args, Ranks("cpu"), format_table(rows))


@pytest.fixture
def three(tmp_path):
    """Two finished runs, and one that is going on."""
    folders = [tmp_path / name for name in ("warm", "cold", "new")]
    for folder, steps, easier in zip(folders, (60, 80, 20), (0, 0.5, 0.25), strict=True):
        write_log(folder, steps, easier=easier)
    finish(folders[0], "--steps", 60)
    finish(folders[1], "--steps", 80, "--temperature", 4, "--seed", 3, "--workers", 7, loss=2.75)
    return folders


def test_runs_by_step_and_by_second(three):
    validated(three[0], (20, 3.5), (40, 3.25))
    by_step, by_second = plot.draw_runs(three)
    for axes, x in ((by_step, [20, 40]), (by_second, [5, 10])):
        dots, = ([*zip(*line.get_data(), strict=True)] for line in axes.lines
                 if line.get_marker() == "o" and len(line.get_xdata()))
        assert dots == [*zip(x, (3.5, 3.25), strict=True)]
    for folder, steps in zip(three, (60, 80, 20), strict=True):
        log = list(csv.DictReader((folder / "log.csv").open()))
        means = plot.running_mean(np.array([float(row["clm"]) for row in log]))
        left, right = (next(line for line in axes.lines if line.get_label() == str(folder))
                       for axes in (by_step, by_second))
        assert np.allclose(left.get_ydata(), means) and np.allclose(right.get_ydata(), means)
        assert [*left.get_xdata()] == [*range(1, steps + 1)]
        assert np.allclose(right.get_xdata(), np.arange(1, steps + 1) / 4), "256 of 1,024 tokens a second"
        assert left.get_color() == right.get_color()
    for axes, ends in ((by_step, (60, 80)), (by_second, (15, 20))):
        diamonds = [(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == "D"]
        assert diamonds == [(ends[0], 3.25), (ends[1], 2.75)], "held-out losses of those that have one"
    colours = {line.get_color() for line in by_step.lines if line.get_marker() == "None"}
    assert len(colours) == 3
    assert [text.get_text() for text in by_step.figure.legends[0].get_texts()] == [*map(str, three)]
    by_step.figure.draw_without_rendering()


def test_the_table_of_runs(three):
    header, _, warm, cold, new = ([cell.strip() for cell in line.strip("|").split("|")]
                                  for line in plot.compare(three).splitlines())
    assert header == ["run", "seed", "temperature", "steps", "seconds", "last CLM", "last KL",
                      "held-out loss", "held-out KL to teacher", "held-out same top-1"]
    assert warm[1:5] == ["0", "2.0", "60", "15"] and warm[7:] == ["3.2500", "0.1250", "0.5000"]
    assert cold[1:5] == ["3", "4.0", "80", "20"] and cold[7:] == ["2.7500", "0.1250", "0.5000"]
    assert new[1:5] == ["-", "-", "20", "5"] and new[7:] == ["-", "-", "-"]

    last = (78, 79, 80)  # the twentieth of 80 steps around the last one: two before it
    clm = [4 / math.sqrt(i) + i % 3 - 0.5 for i in last]
    assert float(cold[5]) == pytest.approx(np.mean(clm), abs=1e-4)
    assert float(cold[6]) == pytest.approx(np.mean([1 / i for i in last]), abs=1e-4)


def test_a_control_is_in_the_card_of_its_run(three):
    write_log(three[0] / "control", 60, teacher=False)
    row = plot.compare([three[0], three[0] / "control"]).splitlines()[-1]
    last_kl, *held_out = re.split(r"[ |]+", row)[-5:-1]
    assert last_kl == "-" and held_out == ["3.7500", "0.6250", "0.5000"]


def test_several_runs_at_the_command_line(three, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, three)])
    plot.main()
    assert capsys.readouterr().out.startswith(f"{plot.compare(three)}\n\n{three[0] / 'runs.png'}")
    assert (three[0] / "runs.png").read_bytes()[:4] == b"\x89PNG"
    code, error = main(monkeypatch, capsys, *three, "--distribution")
    assert code == 2 and "--distribution is of one run" in error


# ------------------------------------------------------------------------------------ distribution.png
def reference(name, ids, vocab_size, T):
    """softmax(logits / T) of the next token, by numpy."""
    with torch.no_grad():
        z = load(name)(torch.tensor([ids]))[0, -1, :vocab_size].numpy().astype("float64") / T
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


@pytest.mark.parametrize("prompt", [PROMPT, "", 40 * "long "])
def test_probabilities_are_the_models(finished, tmp_path, prompt):
    tokens, panels = plot.distributions(finished / "out", prompt)
    tokenizer = load_tokenizer(finished / "out")
    ids, V = (tokenizer.encode(prompt) or [tokenizer.eot])[-32:], tokenizer.vocab_size  # 32 positions
    before = student_from(load(finished / "teacher"), [0, 3])
    before.save(tmp_path)
    order = np.argsort(-reference(finished / "teacher", ids, V, 1))
    shown = [order[rank - 1] for rank in plot.RANKS if rank < V]
    assert len(shown) == 11 and tokens[:10] == [ascii(tokenizer.decode([i])) for i in shown[:10]]
    assert tokens[10:] == [f"100th: {ascii(tokenizer.decode([shown[10]]))}", f"all {V - 11} others"]
    expected = {("what temperature does", "teacher, T = 1"): (finished / "teacher", 1),
                ("what temperature does", "T = 2"): (finished / "teacher", 2),
                ("what temperature does", "T = 4"): (finished / "teacher", 4),
                ("what distillation does", "teacher, T = 1"): (finished / "teacher", 1),
                ("what distillation does", "student before"): (tmp_path, 1),
                ("what distillation does", "after"): (finished / "out", 1)}
    assert [(panel, name) for panel, series in panels.items() for name in series] == [*expected]
    for (panel, name), (source, T) in expected.items():
        p = reference(source, ids, V, T)
        wanted = [*p[shown], 1 - p[shown].sum()]
        assert np.allclose(panels[panel][name], wanted, rtol=1e-5, atol=1e-9), (panel, name)


def test_the_picture_holds_the_probabilities(finished):
    tokens, panels = plot.distributions(finished / "out", PROMPT)
    both = plot.draw_distribution(finished / "out", PROMPT)
    for axes, series in zip(both, panels.values(), strict=True):
        points = {line.get_label(): line for line in axes.lines if line.get_label() in series}
        assert {name: [*line.get_xdata()] for name, line in points.items()} == series
        assert all([*line.get_ydata()] == [*range(len(tokens))] for line in points.values())
        assert {line.get_linestyle() for line in points.values()} == {"None"}, "nothing between two tokens"
        assert len(axes.lines) == len(points) + 1  # and the rule over the last row
    assert [label.get_text() for label in both[0].get_yticklabels()] == tokens
    assert both[0].get_ylim()[0] > both[0].get_ylim()[1]  # the likeliest on top


@pytest.mark.parametrize("flags", [
    ["--student-layers", "2"], ["--student-layers", "1"], ["--student-layers", "3,"],
    ["--student-layers", "1,2,2"],
    ["--student-layers", "2", "--student-init", "random", "--seed", "7"],
    ["--student", "teacher"], ["--student", "teacher", "--student-init", "random"]])
def test_student_before_is_the_one_that_distill_started_from(finished, monkeypatch, flags):
    monkeypatch.chdir(finished)
    args = settings("--teacher", "teacher", *flags)
    _, teacher, student = distill.load_models(args, torch.device("cpu"))
    before = plot.student_before(json.loads(json.dumps(vars(args))), teacher)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    assert not before.training


def test_text_is_never_a_formula(finished, monkeypatch):
    """Matplotlib would typeset what stands between two dollar signs, or fail to."""
    monkeypatch.setattr(plot, "ascii", lambda text: r"'$\frac$'", raising=False)
    plot.draw_distribution(finished / "out", r"$\frac$")[0].figure.draw_without_rendering()


# ------------------------------------------------------------------------------------ the command
def test_where_pictures_go(finished, monkeypatch, capsys):
    write_log(finished / "out", 60)
    for argv, name in (([], "loss.png"), (["--distribution"], "distribution.png"),
                       (["--distribution", r"a\nb"], "distribution.png"),
                       (["--save", finished / "l.svg"], "../l.svg"),
                       (["--save", finished / "l.pdf"], "../l.pdf")):
        path = finished / "out" / name
        path.unlink(missing_ok=True)
        assert main(monkeypatch, capsys, finished / "out", *argv) == (0, "")
        assert path.read_bytes()[:4] == {".png": b"\x89PNG", ".svg": b"<?xm", ".pdf": b"%PDF"}[path.suffix]
    assert not [*finished.rglob("*.tmp")]


def test_backslash_n_is_a_line_break(folder, monkeypatch, capsys):
    class Drawn(Exception):
        pass

    def draw(folder, prompt):
        raise Drawn(prompt)

    monkeypatch.setattr(plot, "draw_distribution", draw)
    with pytest.raises(Drawn, match="^import os\nimport$"):
        main(monkeypatch, capsys, folder, "--distribution", r"import os\nimport")


def test_same_run_same_picture_whatever_the_users_settings(folder, monkeypatch, capsys):
    import matplotlib
    main(monkeypatch, capsys, folder)
    before = (folder / "loss.png").read_bytes()
    matplotlib.rcParams.update({"lines.linestyle": "--", "font.size": 20, "figure.facecolor": "red"})
    main(monkeypatch, capsys, folder)
    assert (folder / "loss.png").read_bytes() == before
    pixels = matplotlib.image.imread(folder / "loss.png")
    assert pixels.shape[1] == 1200 and pixels[0, 0, 3] == 0, "transparent, for light and dark pages"


def test_a_failed_picture_leaves_the_old_one(folder, monkeypatch, capsys):
    from matplotlib.figure import Figure

    def half(figure, path, **_):
        Path(path).write_bytes(b"half a pic")
        raise OSError(28, "No space left on device")

    (folder / "loss.png").write_bytes(b"the old picture")
    monkeypatch.setattr(Figure, "savefig", half)
    code, error = main(monkeypatch, capsys, folder)
    assert code == 2 and "No space left" in error and error.count("\n") == 1
    assert (folder / "loss.png").read_bytes() == b"the old picture"


HEADER = ",".join(COLUMNS) + "\n"
ROW = "1,3.1,0.5,3,0,2.5,0.001,1,256,1000\n"


@pytest.mark.parametrize("text", ["", HEADER, HEADER + ROW, HEADER + ROW + "2,3.1,0.5\n", HEADER + 3 * ROW,
                                  HEADER + ROW + "2,3.1,0.5,nan,0,2.5,0.001,1,256,1000\n",
                                  HEADER + ROW + "\0\0\0\xff\n", "a,b\n1,2\n2,3\n"])
@pytest.mark.parametrize("whose", ["", "control"])
def test_a_log_with_less_than_two_steps(folder, monkeypatch, capsys, text, whose):
    (folder / whose).mkdir(exist_ok=True)
    (folder / whose / "log.csv").write_text(text, encoding="latin-1")
    code, error = main(monkeypatch, capsys, folder)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert f"{folder / whose / 'log.csv'}: steps so far: " in error and "a line needs two" in error


def test_damaged_lines_are_left_out_and_counted(folder, monkeypatch, capsys):
    """A run that is going on, or was killed, ends in half a row."""
    with open(folder / "log.csv", "a") as file:
        file.write("\0\0\n61,3.1,0.5,inf,0,2.5,0.001,1,256,1000\n62,3.1")
    (steps, _), _ = lines(plot.draw_loss(folder))["student's CLM"]
    assert [*steps] == [*range(1, 61)]
    capsys.readouterr()
    code, note = main(monkeypatch, capsys, folder)
    assert code == 0 and note == f"note: {folder / 'log.csv'}: 3 of 64 lines left out, which hold no step\n"


def test_bad_folders(tmp_path, folder, finished, monkeypatch, capsys):
    def refused(*argv):
        code, error = main(monkeypatch, capsys, *argv)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    nowhere = tmp_path / "nowhere"
    assert f"{nowhere / 'log.csv'}: No such file" in refused(nowhere)
    assert f"{nowhere / 'args.json'}: No such file" in refused(nowhere, "--distribution")
    assert "Not a directory" in refused(folder / "log.csv")
    assert "args.json: No such file" in refused(folder, "--distribution")
    assert "must end in .png" in refused(folder, "--save", tmp_path / "picture")
    assert "loss.png cannot be written" in refused(folder, "--save", folder / "log.csv" / "loss.png")
    for text in ("{", "[]", "3", "{}", '{"recipe": "demo", "teacher": "gpt2", "kd_weight": 1}',
                 json.dumps({**vars(settings()), "temperature": "2"}),
                 json.dumps({**vars(settings()), "student_layers": 5})):
        (folder / "args.json").write_text(text)
        assert "args.json is damaged or not from distill.py" in refused(folder, "--distribution")
    args = vars(settings("--teacher", finished / "teacher", "--student-layers", "0,3"))
    (folder / "args.json").write_text(json.dumps(args))
    assert "has no tokenizer.json" in refused(folder, "--distribution"), "a run that has not finished"
    load_tokenizer(finished / "out").save(folder)
    (folder / "args.json").write_text(json.dumps({**args, "teacher": "none"}))
    assert "without a teacher" in refused(folder, "--distribution")


def test_without_matplotlib(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for flags in ([], ["--distribution"]):
        assert main(monkeypatch, capsys, folder, *flags) == (
            2, "error: pictures need matplotlib: python -m pip install -r requirements-dev.txt\n")


def test_help_needs_no_matplotlib():
    code = ("import sys; sys.modules['matplotlib'] = None\n"
            "from extras import plot; plot.parse_args(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--distribution" in done.stdout, done.stderr
