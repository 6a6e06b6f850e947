"""The README tells the truth: its line counts, its commands, its recipes."""
import re
import shlex
from pathlib import Path

import pytest
from conftest import BLOCKS, README

import bench
import data
import distill
import eval_ppl
import plot
import run
import sample

ROOT = Path(__file__).parent.parent
COMMANDS = [command for block in BLOCKS for command in block]
PARSERS = {script.__name__: script.parse_args for script in (bench, data, distill, eval_ppl, plot, sample)}
OURS = [command for command in COMMANDS if re.search(rf"\b({'|'.join(PARSERS)})\.py", command)]


def test_line_counts():
    counts = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in counts} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in counts:
        assert int(lines) == len((ROOT / name).read_text(encoding="utf-8").splitlines()), name


def test_the_two_commands_stand_there_and_ci_runs_them():
    assert "python -m pip install -r requirements.txt && python distill.py" in COMMANDS
    assert "python -m pip install -r requirements-dev.txt && python -m pytest" in COMMANDS


@pytest.mark.parametrize("command", OURS)
def test_commands_parse(command):
    """Every flag and choice in the README exists."""
    script, *argv = re.split(r"(\w+)\.py", command)[1:]
    args = PARSERS[script](shlex.split("".join(argv)))
    if script == "distill":
        run.check(args)


@pytest.mark.parametrize("script", PARSERS)
def test_every_flag_is_explained(script, capsys):
    """--help says something of each flag, beyond its name and its default."""
    with pytest.raises(SystemExit):
        PARSERS[script](["--help"])
    entries = re.split(r"\n  (?=-|\w+ )", capsys.readouterr().out.partition("options:")[2])[1:]
    assert len(entries) > 2
    for entry in entries:
        explanation = re.sub(r"\(default: .*?\)$", "", " ".join(entry.split()))
        explanation = re.sub(r"^(-+[\w-]+( \{.*?\}| \[?[A-Z][A-Z_ .\[\]]*)?,? ?)+", "", explanation)
        assert len(explanation.split()) >= 1 and not explanation.startswith("-"), entry


def test_every_file_named_exists():
    names = re.findall(r"`((?:\w+/)*\w+\.(?:py|toml|txt|json))`", README)
    for name in names + re.findall(r"\]\(((?:assets|demo|tests)/[^)]+)\)", README):
        path = ROOT / name
        assert path.exists() or path.name in ("tokenizer.json", "args.json"), path


def test_what_the_lesson_points_to_exists():
    code = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    pointers = re.findall(r"^Look for: (.*?)\n\n", README, re.M | re.S)
    assert len(pointers) == 4
    for name in re.findall(r"`(\w+)`", " ".join(pointers)):
        assert re.search(rf"^(def |class )?{name}\b[(:]|^{name} = ", code, re.M), name


def test_pictures_are_small():
    for path in (ROOT / "assets").iterdir():
        assert path.stat().st_size < 200_000, path


def test_recipes_are_all_named():
    assert all(f"`{recipe}`" in README for recipe in distill.RECIPES if recipe != "plain")


def test_nothing_heavy_is_imported_to_start():
    """`--help` must not wait for libraries that only some runs need."""
    import subprocess
    import sys
    code = "import sys, distill, sample; print([m for m in sys.modules if m in " \
           "('datasets', 'transformers', 'pandas', 'tokenizers', 'lm_eval')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
