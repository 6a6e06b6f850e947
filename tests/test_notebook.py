"""docs/lesson.ipynb runs as it stands, from an empty folder; what is committed of it is whole and small."""
import base64
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from conftest import README, REPO
from nbclient import NotebookClient

NOTEBOOK = REPO / "docs" / "lesson.ipynb"
PYTHON_311 = sys.version_info[:2] == (3, 11)


def code_cells():
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def markdown():
    return "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells
                     if cell.cell_type == "markdown")


def losses(notebook):
    """{model: loss on held-out text} from the notebook's table, below four pictures."""
    data = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    pictures = [base64.b64decode(found["image/png"]) for found in data if "image/png" in found]
    assert len(pictures) == 4 and sum(map(len, pictures)) < 300_000

    table, = (found["text/markdown"] for found in data if "bits per byte |" in found.get("text/markdown", ""))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: float(row[rows[0].index("loss")]) for row in rows[2:]}


def run_in_an_empty_folder(folder):
    """The notebook after a run in an empty folder, as on Colab, but of 20 steps instead of 100.

    Its address leads to a repository with the files that are here now. An empty module takes pip's place, as
    a test installs nothing.
    """
    hosted = folder / "hosted"
    for name in ("support", "extras", "demo"):
        shutil.copytree(REPO / name, hosted / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*REPO.glob("*.py"), REPO / "requirements.txt", REPO / "pyproject.toml"):
        shutil.copy(path, hosted)
    git = ["git", "-C", str(hosted), "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "test"]):
        subprocess.run([*git, *command], check=True)

    fake = folder / "fake" / "pip"
    fake.mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "__main__.py").touch()
    env = {
        **os.environ, "PYTHONPATH": str(fake.parent),
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{hosted.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": re.search('REPOSITORY = "(.+)"', code_cells()[0].source)[1],
        "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}

    empty = folder / "empty"
    empty.mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    training, = (cell for cell in notebook.cells if '"--steps", "100"' in cell.source)
    training.source = training.source.replace('"--steps", "100"', '"--steps", "20"')
    client = NotebookClient(notebook, kernel_name="python3", timeout=300,
                            resources={"metadata": {"path": str(empty)}})
    client.execute(env=env)  # an error in a cell is raised here, with the cell
    return notebook


def test_it_runs_from_an_empty_folder(tmp_path):
    executed = run_in_an_empty_folder(tmp_path)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", ())]
    printed = [output.text for output in outputs if "text" in output]
    assert any(f"PyTorch {torch.__version__} on " in text for text in printed)
    found = losses(executed)
    assert found["teacher"] < found["student"] < found["control"] < found["student, untrained"]
    if PYTHON_311:  # whose standard library is the text
        assert found["student"] == pytest.approx(3.502, abs=0.02)


def test_a_torch_that_is_there_stays(monkeypatch):
    """Otherwise pip would replace it by a version of the range. Where there is none, it is installed."""
    requirements = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    packages = {line for line in requirements if line[:1].isalpha()}
    for found in (True, None):
        asked = []
        with monkeypatch.context() as patch:
            patch.chdir(REPO)
            patch.setattr("sys.path", [])
            patch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
            patch.setattr(subprocess, "run", lambda command, check, asked=asked: asked.extend(command))
            exec(code_cells()[0].source, {})
        torch_asked = {word for word in asked if word.startswith("torch")}
        assert len(torch_asked) == (0 if found else 1)
        assert packages - {*asked} == {word for word in packages if found and word.startswith("torch")}


def test_what_is_committed_comes_from_one_whole_run():
    """Made by `OMP_NUM_THREADS=1 jupyter execute --inplace docs/lesson.ipynb`, which runs all cells anew."""
    assert [cell.execution_count for cell in code_cells()] == [*range(1, len(code_cells()) + 1)]
    assert not any(output.output_type == "error" for cell in code_cells() for output in cell.outputs)
    found = losses(nbformat.read(NOTEBOOK, as_version=4))
    assert found["teacher"] < found["student"] < found["control"] < found["student, untrained"]
    said = re.search(r"ended between ([\d.]+) and ([\d.]+) ", " ".join(markdown().split())).groups()
    low, high = map(float, said)
    assert low - 5e-4 <= found["student"] <= high + 5e-4


def test_it_names_what_exists():
    """README, notebook and CITATION.cff name one repository; links, functions and commands exist."""
    text = markdown()
    whole = text + "".join(cell.source for cell in code_cells())
    citation = (REPO / "CITATION.cff").read_text(encoding="utf-8")
    owners = [set(re.findall(r"github(?:\.com)?/([\w-]+)/distil-from-scratch", page))
              for page in (README, whole, citation)]
    assert owners[0] == owners[1] == owners[2] and len(owners[0]) == 1, owners
    for name in re.findall(r"distil-from-scratch/blob/main/([\w./]+)", whole):
        assert (REPO / name).exists(), name
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", README, re.M)}
    assert set(re.findall(r"distil-from-scratch#([\w-]+)", whole)) <= anchors

    code = "\n".join(path.read_text(encoding="utf-8") for path in REPO.glob("*.py"))
    names = set(re.findall(r"`([a-z]+_?[a-z]+)`", text)) - {"padded"}
    assert {"plain_loss", "train", "batch_at", "draw", "student_from"} <= names
    assert all(f"def {name}(" in code for name in names), names
    for module in re.findall(r"python -m (extras\.\w+)", text):
        assert importlib.util.find_spec(module), module
