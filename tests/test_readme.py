"""The README tells the truth: its line counts, its commands, its recipes."""
import re
import shlex
from pathlib import Path

import pytest

import data
import distill
import eval_ppl
import run
import sample

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\w*\n(.*?)```", README, re.S)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines()
            if line.startswith(("python ", "torchrun ", "lm_eval "))]
OURS = [command for command in COMMANDS if re.search(r"\b(distill|sample|eval_ppl|data)\.py", command)]


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
    argv = shlex.split("".join(argv))
    parsers = {"distill": distill.parse_args, "sample": sample.parse_args, "eval_ppl": eval_ppl.parse_args,
               "data": data.parse_args}
    args = parsers[script](argv)
    if script == "distill":
        run.check(args)


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
