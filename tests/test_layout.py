"""The house: which files there are, and who may import whom."""
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LESSON = {"model", "distill", "data", "sample", "eval_ppl"}
MAY_IMPORT = {".": LESSON | {"support"}, "support": {"support"}, "extras": LESSON | {"support", "extras"}}


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


def test_nothing_is_imported_upwards():
    """The top level is the lesson. Its files import support and each other; support imports no lesson file;
    nothing imports extras, and nothing but a test or extras runs them."""
    assert {path.stem for path in ROOT.glob("*.py")} == LESSON
    for folder, allowed in MAY_IMPORT.items():
        for path in (ROOT / folder).glob("*.py"):
            found = imports(path)
            assert found & (LESSON | {"support", "extras", "tests", "demo"}) <= allowed, path
            assert folder == "extras" or not found & {"subprocess", "runpy"}, f"{path} runs another command"


def test_importing_a_lesson_file_does_nothing(tmp_path):
    """No file is written, nothing printed, no flag read, and no library loaded that only some runs need."""
    heavy = {"datasets", "transformers", "pandas", "tokenizers", "lm_eval", "matplotlib", "pyarrow"}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv.append('--no-such-flag'); import "
    code += ", ".join(sorted(LESSON)) + f"; sys.exit(sorted({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not [*tmp_path.iterdir()]
