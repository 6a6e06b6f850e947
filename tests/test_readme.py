"""The README tells the truth: its commands, its names, its files, its recipes, its arithmetic."""
import importlib
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import BLOCKS, README

import distill
from support import flags

ROOT = Path(__file__).parent.parent
COMMANDS = [command for block in BLOCKS for command in block]


def parser_of(name):
    """None for a file that has no flags."""
    module = importlib.import_module(name)
    return getattr(getattr(module, "STUDY", module), "parse_args", None)


EXTRAS = [path.stem for path in (ROOT / "extras").glob("*.py") if path.stem not in ("__init__", "study")]
PARSERS = {f"-m extras.{name}": parser for name in EXTRAS if (parser := parser_of(f"extras.{name}"))}
PARSERS |= {f"{name}.py": parser_of(name) for name in ("data", "distill", "eval_ppl", "sample")}
OURS = [command for command in COMMANDS if any(script in command for script in PARSERS)]


def test_the_two_commands_are_there():
    """Install and train; install and test. Each works as it stands: no command needs a second one first."""
    for command in ("requirements.txt && python distill.py", "requirements-dev.txt && python -m pytest"):
        command = f"python -m pip install -r {command}"
        assert any(line.startswith(command) for line in COMMANDS), command


def test_commands_parse(monkeypatch):
    """Every flag and choice in the README exists."""
    for check in ("open_data", "check_hub_name"):  # the reader's own texts and models, which are not here
        monkeypatch.setattr(flags, check, lambda name: None)
    assert len(OURS) > 20
    for command in OURS:
        script = next(script for script in PARSERS if script in command)
        PARSERS[script](shlex.split(command.partition(script)[2]))


def test_help_reads_well(capsys, monkeypatch):
    """--help says something about each flag, beyond its name and its default, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    for script, parse in PARSERS.items():
        with pytest.raises(SystemExit):
            parse(["--help"])
        whole = capsys.readouterr().out
        printed, *_ = whole.partition("\n    python")  # the examples at the end
        narrow = printed if "--only" in whole else whole  # those who repeat a study have wide terminals
        assert max(map(len, narrow.splitlines())) <= 80, script
        entries = re.split(r"\n  (?=-)", printed)[1:]
        assert len(entries) >= 2
        for entry in entries:
            names, _, explanation = entry.partition("  ")
            explanation = re.sub(r"\(default: .*?\)", "", " ".join(explanation.split()))
            assert len(explanation.split()) >= 2 or "--help" in names or "--version" in names, (script, entry)


def test_git_ignores_what_the_commands_make(tmp_path):
    shutil.copy(ROOT / ".gitignore", tmp_path)
    pages = README + (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
    made = re.findall(r"--(?:out|teacher-cache|save) ([\w./-]+)", pages)
    texts = re.findall(r"\bmy_\w+(?:\.py|/)", pages)
    assert {"T8", "T8-0", "cached", "cache", "my_texts/", "my_lab.py"} <= {*made, *texts}
    names = {name if "." in name else name.rstrip("/") + "/" for name in (*made, *texts)}
    git = ["git", "-C", tmp_path]
    subprocess.run([*git, "init", "--quiet"], check=True)
    done = subprocess.run([*git, "check-ignore", *names], capture_output=True, text=True)
    assert {*done.stdout.split()} == names


def test_flags_of_distill_come_in_groups(capsys):
    with pytest.raises(SystemExit):
        distill.parse_args(["--help"])
    groups = re.findall(r"^([a-z ]+):$", capsys.readouterr().out, re.M)
    wanted = ["model", "data", "loss", "optimisation", "precision and device", "running"]
    assert [group for group in groups if group in wanted] == wanted


def test_every_file_named_exists():
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|txt|json))`", README)
    names += re.findall(r"\]\(((?:assets|demo|docs|tests|support)/[^)#]+|\w+\.py)\)", README)
    generated = ("tokenizer.json", "args.json", "vocab.json", "merges.txt", "config.json")
    for name in names:
        assert (ROOT / name).exists() or name in generated, name


def test_what_the_lesson_points_to_exists():
    """Names in the lesson are functions, classes or fields of the files that it reads."""
    lesson = README[README.index("### 1. What the teacher"):README.index("### Exercises")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    names = set(re.findall(r"`([A-Za-z]\w+)`", lesson))
    assert {"plain_loss", "train", "batch_at", "Block", "student_from"} <= names
    for name in names:
        assert re.search(rf"\b{name}\b", code), name


def test_the_worked_token():
    """The three-token example of the lesson, as the reader would work it out."""
    def softmax(logits, T):
        e = [math.exp(x / T) for x in logits]
        return [x / sum(e) for x in e]

    teacher, student = (4, 2, 0), (2, 2, 1)
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
            for line in README.splitlines()
            if line.startswith(("| teacher, p", "| student, q", "| gradient"))}
    for column, T in ((1, 1), (2, 2)):
        p, q = softmax(teacher, T), softmax(student, T)
        gradient = [T * (b - a) for a, b in zip(p, q, strict=True)]
        assert rows["teacher, p"][column] == ", ".join(f"{x:.3f}" for x in p)
        assert rows["student, q"][column] == ", ".join(f"{x:.3f}" for x in q)
        assert rows["gradient, T · (q - p)"][column] == ", ".join(f"{x:+.3f}" for x in gradient)
    p, q = softmax(teacher, 1), softmax(student, 1)
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert f"{kl:.3f} at T = 1" in README and f"-log 0.422 = {-math.log(q[0]):.3f}" in README


def test_pictures_are_small_and_all_shown():
    for path in (ROOT / "assets").iterdir():
        assert path.stat().st_size < 200_000, path
        pages = [README, *(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))]
        assert any(path.name in page for page in pages), path


def test_pages_of_docs_are_linked():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README, page


def test_recipes_are_all_named():
    pages = README + (ROOT / "docs" / "published-runs.md").read_text(encoding="utf-8")
    assert all(f"`{recipe}`" in pages for recipe in distill.RECIPES if recipe != "plain")
