"""The house: which files there are, and who may import whom."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LESSON = {"model", "distill", "data", "sample", "eval_ppl"}
SOURCES = sorted(path for folder in (ROOT, ROOT / "support", ROOT / "extras") for path in folder.glob("*.py"))


def imports(path):
    """First parts of the names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports have the whole name"
            found.add(node.module.partition(".")[0])
    return found


def test_the_top_level_is_the_lesson():
    assert {path.stem for path in ROOT.glob("*.py")} == LESSON


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_imported_upwards(path):
    """Lesson files import support and each other; support imports no lesson file; nobody imports extras."""
    ours = imports(path) & (LESSON | {"support", "extras", "tests", "demo"})
    if path.parent.name == "support":
        assert ours <= {"support"}
    elif path.parent.name == "extras":
        assert "tests" not in ours
    else:
        assert ours <= LESSON | {"support"}


def test_importing_a_lesson_file_does_nothing(tmp_path):
    """No file is written, nothing printed, no flag read."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv.append('--no-such-flag'); import "
    done = subprocess.run([sys.executable, "-c", code + ", ".join(sorted(LESSON))], cwd=tmp_path, text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not [*tmp_path.iterdir()]
