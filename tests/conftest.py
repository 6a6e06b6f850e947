"""What all tests share: a stand-in for the Hub, small tokenizers of both forms, commands run as users do."""
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

# Before torch is imported. Processes of two threads each on two cores are ten times slower, not two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
from fakehub import FakeHub  # noqa: E402
from workshop import distil, refused, workshop  # noqa: E402, F401

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = README + (REPO / "docs" / "published-runs.md").read_text(encoding="utf-8")  # with commands to run
BLOCKS = [[line.split("  #")[0].strip() for line in block.splitlines()
           if line.startswith(("python ", "torchrun ", "lm_eval ", "hf "))]
          for block in re.findall(r"^```\w*\n(.*?)^```", PAGES, re.S | re.M)]


def pytest_configure(config):
    """Runs before any test module: huggingface_hub reads these settings when it is imported."""
    config.hub_root = tempfile.TemporaryDirectory()
    config.hub = FakeHub(config.hub_root.name)
    os.environ.update(config.hub.env)


def pytest_unconfigure(config):
    config.hub.close()
    config.hub_root.cleanup()


@pytest.fixture
def hub(request):
    """The stand-in Hub: `hub.root / "models"`, `hub.root / "datasets"` are what it serves; see fakehub.py."""
    yield request.config.hub
    request.config.hub.gated.clear()
    request.config.hub.cut.clear()


@pytest.fixture
def real_hub():
    """Settings with which a command meets the real Hub; skips where that cannot be reached."""
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError as error:
        pytest.skip(f"the real Hub cannot be reached: {error}")
    return {"HF_ENDPOINT": "https://huggingface.co", "HF_HOME": os.path.expanduser("~/.cache/huggingface")}


@pytest.fixture
def run(tmp_path):
    """run("data.py", "--help", HF_HUB_OFFLINE="1"): a command of this project, in an empty folder."""
    def run(script, *args, **env):
        command = [sys.executable, str(REPO / script), *map(str, args)]
        env = {**os.environ, "PYTHONPATH": str(REPO), **env}
        return subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True, timeout=300)
    return run


@pytest.fixture(scope="session")
def tokenizers_dir(tmp_path_factory):
    """A folder with gpt2/tokenizer.json and neox/tokenizer.json: about 600 tokens in the form of each."""
    from texts import train_tokenizer
    folder = tmp_path_factory.mktemp("tokenizers")
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / name for name in ("argparse.py", "heapq.py", "textwrap.py")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    train_tokenizer(texts, 600, folder / "gpt2")
    spec = json.loads((folder / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "neox").mkdir()
    (folder / "neox" / "tokenizer.json").write_text(json.dumps(neox_form(spec)), encoding="utf-8")
    return folder


def neox_form(spec):
    """A tokenizer.json in GPT-2's form -> GPT-NeoX's: special tokens first, runs of spaces last, NFC."""
    vocab = {"<|endoftext|>": 0, "<|padding|>": 1}
    vocab |= {text: i + 2 for text, i in spec["model"]["vocab"].items() if text != "<|endoftext|>"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    added = [{"id": i, "content": text, "special": True, "normalized": False, **flags}
             for i, text in enumerate(["<|endoftext|>", "<|padding|>"])]
    added += [{"id": len(vocab) + i, "content": " " * n, "special": False, "normalized": True, **flags}
              for i, n in enumerate(range(24, 1, -1))]
    model = {**spec["model"], "vocab": vocab}
    return {**spec, "added_tokens": added, "normalizer": {"type": "NFC"}, "model": model}
