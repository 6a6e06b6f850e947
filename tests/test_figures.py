"""extras/figures.py: the README's pictures and texts show what they say they show."""
import json
import sys

import pytest
import torch
from conftest import README
from workshop import flags

import distill
from data import load_tokenizer
from extras import bench, figures, play, plot
from model import load, student_from
from support.cli import InputError


def test_one_token_on_paper():
    """The numbers that the README works out by hand, and their gradient by autograd."""
    one, two = figures.work_token(1), figures.work_token(2)
    assert one["p"].tolist() == pytest.approx([0.867, 0.117, 0.016], abs=5e-4)
    assert two["q"].tolist() == pytest.approx((figures.STUDENT / 2).softmax(-1).tolist())
    assert (one["kl"], two["kl"], 4 * two["kl"]) == pytest.approx((0.437, 0.171, 0.683), abs=1e-3)
    for T, found in ((1, one), (2, two)):
        s = figures.STUDENT.clone().requires_grad_()
        log_p, log_q = (figures.TEACHER / T).log_softmax(-1), (s / T).log_softmax(-1)
        (log_p.exp() * (log_p - log_q)).sum().backward()
        assert torch.allclose(found["gradient"], s.grad, atol=1e-6)

    logits, _, softened, gradient = ([[bar.get_height() for bar in bars] for bars in axes.containers]
                                     for axes in figures.draw_token())
    assert logits == [figures.TEACHER.tolist(), figures.STUDENT.tolist()]
    assert softened == [two["p"].tolist(), two["q"].tolist()]
    assert gradient == [g.tolist() for g in (one["gradient"], two["gradient"], 4 * two["gradient"])]


def test_copied_layers():
    """An arrow for each of 0,4,5 and of 0,2,4,7,9,11, and for embedding and head."""
    for axes, copied in zip(figures.draw_layers(), ("0 4 5", "0 2 4 7 9 11"), strict=True):
        boxes = [text for text in axes.texts if text.get_bbox_patch()]
        at = {(text.get_text(), text.get_position()[1]): text.get_position()[0] for text in boxes}
        names = ["embed", *copied.split(), "head"]
        assert [text.get_text() for text in boxes if text.get_position()[1] == 0] == names
        assert {(arrow.xyann[0], arrow.xy[0]) for arrow in axes.texts if hasattr(arrow, "xyann")} \
            == {(at[name, 1], at[name, 0]) for name in names}


def test_t_squared_is_why_the_gradient_stays(monkeypatch):
    """On real positions: from T = 8 to 16 the gradient of the KL falls to a quarter, with T² it stays."""
    monkeypatch.setattr(figures, "TEMPERATURES", [1, 8, 16])
    sizes = figures.gradient_sizes()
    plain, scaled = sizes["without T²"], sizes["with T²"]
    assert scaled == pytest.approx([T**2 * size for T, size in zip((1, 8, 16), plain, strict=True)], rel=1e-3)
    assert plain[2] / plain[1] == pytest.approx(1 / 4, rel=0.15)
    assert 0.1 < plain[0] < sizes["CLM"] < 1.5  # of q - p and of q - onehot: lengths of at most sqrt(2)


@torch.no_grad()
def test_probabilities_are_the_models():
    tokenizer = load_tokenizer(figures.DEMO_TEACHER)
    ids = torch.tensor([tokenizer.encode("    if not isinstance(value,")])
    teacher = load(figures.DEMO_TEACHER)
    before = student_from(teacher, [0, 4, 5])
    after = student_from(teacher, [0, 1, 5])
    V = tokenizer.vocab_size
    p = {name: (model(ids)[0, -1, :V].double() / T).softmax(-1)
         for name, model, T in (("teacher, T = 1", teacher, 1), ("T = 2", teacher, 2), ("T = 4", teacher, 4),
                                ("student before", before, 1), ("after", after, 1))}
    order = p["teacher, T = 1"].argsort(descending=True)
    shown = order[[*range(10), 99, 999]]
    expected = {name: [*values[shown].tolist(), 1 - values[shown].sum().item()] for name, values in p.items()}

    both = figures.draw_distribution(after)
    rows = [label.get_text() for label in both[0].get_yticklabels()]
    assert rows[:10] == [ascii(tokenizer.decode([token])) for token in shown[:10]]
    assert rows[11] == f"1,000th: {ascii(tokenizer.decode([shown[11]]))}"
    assert rows[12] == f"all {V - 12:,} others"
    drawn = [{line.get_label(): line for line in axes.lines if line.get_label() in p} for axes in both]
    assert [*drawn[0]] == ["teacher, T = 1", "T = 2", "T = 4"]
    assert [*drawn[1]] == ["teacher, T = 1", "student before", "after"]
    for name, line in (*drawn[0].items(), *drawn[1].items()):
        assert [*line.get_xdata()] == pytest.approx(expected[name], rel=1e-6), name
        assert [*line.get_ydata()] == [*range(13)]


def test_pictures_are_small_and_transparent(tmp_path, monkeypatch):
    import matplotlib.image
    monkeypatch.setattr(figures, "demo_logits", lambda: (
        torch.randn(8, 50), torch.randn(8, 50), torch.randint(50, (8,))))
    monkeypatch.setattr(sys, "argv", ["figures", "--folder", str(tmp_path / "pictures")])
    figures.main()
    for name in ("gradient", "layers", "token"):
        path = tmp_path / "pictures" / f"{name}.png"
        assert path.stat().st_size < 100_000 and matplotlib.image.imread(path)[0, 0, 3] == 0
    monkeypatch.setattr(sys, "argv", ["figures", "--run", str(tmp_path)])
    with pytest.raises(InputError, match="not a run of the demo"):
        figures.main()


# ------------------------------------------------------------------------------------ texts
def test_texts_are_those_of_the_run(workshop, tmp_path, monkeypatch):
    """Students on the way to what the run ends with; table and samples are those of the commands."""
    honest = distill.main
    students = {}

    def small():
        sys.argv += flags(workshop, tmp_path / "out", steps=3, **{"save-interval": 1})
        honest()

    monkeypatch.setattr(distill, "main", small)
    monkeypatch.setattr(figures, "DEMO_TEACHER", str(workshop / "teacher"))
    monkeypatch.setattr(figures, "DEMO_LAYERS", [0, 3])
    monkeypatch.setattr(figures, "SHOWN_STEPS", (0, 1, 3))
    with monkeypatch.context() as patch:
        patch.setattr(figures, "likeliest_texts", lambda found, teacher: students.update(found) or "texts")
        texts = figures.make_texts(tmp_path)
    teacher = load(workshop / "teacher")
    first, last = student_from(teacher, [0, 3]), load(tmp_path / "out")
    for steps, expected in ((0, first), (3, last)):
        for name, tensor in students[steps].state_dict().items():
            assert torch.equal(tensor, expected.state_dict()[name]), (steps, name)
    assert not any(torch.equal(students[1].head_weight, other.head_weight) for other in (first, last))

    table, sampled, _ = texts.values()
    loss = json.loads((tmp_path / "out" / "results.json").read_bytes())["rows"]["student"]["loss"]
    assert f"{loss:.4f}" in table and "--- demo/teacher\n" in sampled and sampled.startswith("--- out\n")
    said = figures.likeliest_texts(students, teacher)
    assert said.count("def read_config(path):") == 4 and "--- after 1 steps" in said


def test_texts_of_the_readme(tmp_path):
    """docs/texts.txt was written by `python -m extras.figures --texts`; new ones take the places of old."""
    assert len(figures.read_texts()) == 3
    for command, text in figures.read_texts().items():
        assert command in README and text in README, f"the text of `{command}` differs"
    path, readme = tmp_path / "texts.txt", tmp_path / "README.md"
    path.write_text("Made by\n\n$ a\none\n  two\n\n$ b\nsame\n")
    readme.write_text("# Title\none\n  two\nsame\nthe end\n")
    figures.write_texts({"a": "1\n  2  \n\n", "b": "same"}, path, readme)
    assert figures.read_texts(path) == {"a": "1\n  2", "b": "same"}
    assert readme.read_text() == "# Title\n1\n  2\nsame\nthe end\n"


def test_help_fits_into_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for module in (bench, figures, play, plot):
        with pytest.raises(SystemExit):
            module.parse_args(["--help"])
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) < 80 and f"python -m {module.__name__}" in out
