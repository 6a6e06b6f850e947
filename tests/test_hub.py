"""data.py: ids against Hugging Face's own tokenizers, corpora on disk, batches, every kind of bad input."""
import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO
from fakehub import FakeHub

import data
from data import InputError, batch_at, fetch, hold_out, load_tokenizer, prepare

FORMS = pytest.mark.parametrize("form", ["gpt2", "neox"])


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


def pair(tokenizers_dir, form):
    """Our tokenizer and the reference, from the same file."""
    from tokenizers import Tokenizer
    reference = Tokenizer.from_file(str(tokenizers_dir / form / "tokenizer.json"))
    return load_tokenizer(tokenizers_dir / form), lambda text: reference.encode(text).ids


# --- fetch ------------------------------------------------------------------------------------------------

def test_fetch_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert fetch(tmp_path, "config.json") == tmp_path / "config.json"
    assert fetch(tmp_path, "model.safetensors", required=False) is None
    with pytest.raises(InputError, match="has no model.safetensors"):
        fetch(tmp_path, "model.safetensors")
    for name in (tmp_path / "nowhere", "./nowhere", "../nowhere", "nowhere/", "out"):
        with pytest.raises(InputError, match="no folder"):
            fetch(name, "config.json")


def test_fetch_from_the_hub(hub, tmp_path):
    folder = hub.root / "models" / "someone" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    assert fetch("someone/model", "config.json").read_text() == '{"a": 1}'
    assert fetch("someone/model", "other.json", required=False) is None
    with pytest.raises(InputError, match="other.json of someone/model is not on the Hub"):
        fetch("someone/model", "other.json")
    with pytest.raises(InputError, match="someone/else is neither a folder here nor a model on the Hub"):
        fetch("someone/else", "config.json")
    with pytest.raises(InputError, match="no name"):
        fetch("some one", "config.json")
    hub.gated.add("someone/model")
    with pytest.raises(InputError, match="HF_TOKEN"):
        fetch("someone/model", "weights.bin")
    hub.gated.clear()
    hub.cut.add("weights.bin")
    try:  # the client goes on where the download broke off, or gives up; half a file is never handed out
        path = fetch("someone/model", "weights.bin")
    except InputError:
        path = fetch("someone/model", "weights.bin")
    assert not hub.cut and path.read_bytes() == bytes(range(256)) * 1000


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=str)
def test_no_network(run, tokenizers_dir, tmp_path, env):
    """In a process of its own, as the clients read their settings once; without the pauses between tries."""
    script = "import time, data\ntime.sleep = lambda seconds: None\ndata.run_cli(data.main)"
    (tmp_path / "command.py").write_text(script)
    for args in (["--tokenizer", "someone/model"],
                 ["--tokenizer", tokenizers_dir / "gpt2", "--data", "someone/texts"]):
        result = run(tmp_path / "command.py", *args, HF_HOME=str(tmp_path / "empty"), **env)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        message = result.stderr.splitlines()[-1]
        assert message.startswith("error: ") and args[-1] in message and "Hub cannot be reached" in message
        assert "`python distill.py` needs no Hub" in message




def test_the_stand_in_stops(tmp_path):
    hub = FakeHub(tmp_path)
    hub.close()
