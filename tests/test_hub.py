"""support/hub.py: a model's files, from folders, the Hub and its cache, and hostile ones."""
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import REPO
from safetensors.torch import save_file

from support import hub as hub_module
from support.cli import InputError
from support.hub import check_hub_name, fetch, need, read_json, read_tensors, weight_files


def message_of(function, *args):
    """The one line with which a call is refused."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def put(folder, **files):
    """Write files into a folder: put(folder, config={}) -> config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return folder


# ------------------------------------------------------------------------------------ folders
def test_files_of_a_folder(hub, tmp_path, monkeypatch):
    folder = put(tmp_path / "model", config={})
    (folder / "vocab.json").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (folder, str(folder), "~/model"):
        assert fetch(name, "config.json", "merges.txt") == [folder / "config.json", None]
    for missing in ("model.safetensors", "vocab.json"):
        assert f"has no {missing}: not a complete model" in message_of(need, folder, missing)


def test_what_can_only_be_a_path_is_missing_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "download", lambda *args: pytest.fail(f"the Hub was asked: {args}"))
    (tmp_path / "tuned").mkdir()
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere/", "out", "a/b/c", r"a\b", "/" + "x" * 5000):
        assert message_of(fetch, name, "config.json").startswith(f"no folder {str(name):.200}")
    assert message_of(fetch, "tunde", "a.json") == "no folder tunde; did you mean tuned?"
    assert message_of(fetch, "nope", "a.json") == "no folder nope; models on the Hub are owner/name"
    for name in ("gpt2", "distilgpt2@v1", "EleutherAI/pythia-160m", "EleutherAI/pythia-70m@step3000"):
        check_hub_name(name)


def test_an_empty_folder_is_not_taken_for_the_model(hub, tmp_path, monkeypatch):
    """`--teacher someone/model --out someone/model`: --out is made and locked before the teacher is read."""
    put(hub.root / "models/someone/model", config={"a": 1})
    monkeypatch.chdir(tmp_path)
    (put(tmp_path / "someone/model") / ".distil-lock").touch()
    assert read_json(need("someone/model", "config.json")) == {"a": 1}
    put(tmp_path / "someone/model", config={"a": 2})
    assert read_json(need("someone/model", "config.json")) == {"a": 2}


# ------------------------------------------------------------------------------------ the Hub
def test_files_of_the_hub(hub):
    folder = put(hub.root / "models/someone/model", config={"a": 1})
    put(hub.root / "models/someone/model@step3", config={"a": 3})
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    path, missing = fetch("someone/model", "config.json", "other.json")
    assert read_json(path) == {"a": 1} and missing is None
    assert read_json(need("someone/model@step3", "config.json")) == {"a": 3}
    assert not [name for name in hub.requests if "weights" in name]

    for name, file, message in (
            ("someone/model", "other.json", "someone/model has no other.json: not a complete model"),
            ("someone/model@step4", "config.json", "could not be downloaded: .*Revision Not Found"),
            ("someone/modle", "config.json", "could not be downloaded: .*Repository Not Found"),
            ("some-one./..", "config.json", "could not be downloaded: Repo id must use")):
        assert re.search(message, message_of(need, name, file)), name
    hub.gated.add("someone/model")
    assert "Cannot access gated repo" in message_of(fetch, "someone/model", "weights.bin")
    hub.gated.clear()

    hub.cut.add("weights.bin")
    try:  # the client goes on where the download broke off, or gives up; half a file is never handed out
        path, = fetch("someone/model", "weights.bin")
    except InputError:
        path, = fetch("someone/model", "weights.bin")
    assert not hub.cut and path.read_bytes() == bytes(range(256)) * 1000


SCRIPT = """
import time
from support.hub import fetch, need, read_json
def sleep(seconds):
    raise SystemExit("it waits")
time.sleep = sleep
for name in ("someone/used", "someone/used@step3", "someone/new"):
    try:
        print(name, read_json(need(name, "config.json")), fetch(name, "x.json"))
        need(name, "model.safetensors")
    except ValueError as error:
        print(error)
"""


def run_script(hub, **settings):
    """In a process of its own, because the Hub's clients read their settings once."""
    env = {**os.environ, **hub.env, "PYTHONPATH": str(REPO), **settings}
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, env=env, text=True, capture_output=True, timeout=60)
    return result.stdout.splitlines(), result.stderr


def test_without_network_models_come_from_the_cache(hub, monkeypatch):
    """Without waiting; the user is told once, and a model that is not in the cache is refused."""
    used = hub.root / "models/someone/used"
    put(used, config={"a": 1})
    put(used.with_name("used@step3"), config={"a": 3})
    fetch("someone/used", "config.json")
    fetch("someone/used@step3", "config.json")
    put(used, config={"a": 2})
    with monkeypatch.context() as patch:
        patch.setattr(hub_module, "why_the_hub_is_silent", lambda: "a slow network")
        assert read_json(need("someone/used", "config.json")) == {"a": 1}  # it was not asked

    said, notes = run_script(hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert said[0] == "someone/used {'a': 1} [None]", notes
    assert said[2] == "someone/used@step3 {'a': 3} [None]", notes
    assert "has no model.safetensors: not a complete model in the Hub's cache, and the Hub cannot" in said[1]
    assert "someone/new is not here, and could not be downloaded: the Hub cannot be reached" in said[4]
    assert notes.count("note: ") == notes.count("models come from its cache") == 1

    said, notes = run_script(hub, HF_HUB_OFFLINE="1")
    assert said[0] == "someone/used {'a': 1} [None]" and "HF_HUB_OFFLINE" in said[4] and not notes
    assert "`python distill.py` needs no Hub" in said[4]
    said, notes = run_script(hub)
    assert said[0] == "someone/used {'a': 2} [None]" and not notes


def test_why_the_hub_is_silent(hub, tmp_path):
    """Addresses, tokens and proxies that cannot work: the reason is in the line."""
    for reason, settings in {
            "Connection refused": {},
            "missing an 'http://' or 'https://'": {"HF_ENDPOINT": "huggingface"},
            "Invalid IPv6 URL": {"HF_ENDPOINT": "http://["},
            "proxy URL": {"HTTP_PROXY": "htp://x"},
            "'ascii' codec can't encode": {"HF_TOKEN": "hf_\u201cabc\u201d"}}.items():
        settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), **settings}
        said, stderr = run_script(hub, **settings)
        assert "the Hub cannot be reached: " in said[-1] and reason in said[-1], (reason, said, stderr)
        assert "abc" not in said[-1]  # a token is a secret


# ------------------------------------------------------------------------------------ weights
def test_shards_are_files_beside_their_index(tmp_path):
    folder = put(tmp_path / "model")
    for name in ("a.bin", "b.bin", "../outside.bin"):
        torch.save({"x": torch.ones(2)}, folder / name)

    def files(*names):
        put(folder, **{"pytorch_model.bin.index": {"weight_map": dict(enumerate(names))}})
        return weight_files(folder)

    assert files("b.bin", "a.bin", "b.bin") == [folder / "a.bin", folder / "b.bin"]
    for name in ("../outside.bin", str(tmp_path / "outside.bin"), r"..\outside.bin", "a.json", "", 7):
        assert "pytorch_model.bin.index.json is not an index of weights" in message_of(files, name)
    assert "has no c.bin" in message_of(files, "a.bin", "c.bin")


class Code:
    """Unpickled without care it ends the tests."""

    def __reduce__(self):
        return sys.exit, ("the code in a pickle was run",)


@pytest.mark.filterwarnings("ignore")
def test_files_that_hold_something_else_than_weights(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    for content in ([torch.ones(2)], {7: torch.ones(2)}, {"model": {"x": torch.ones(2)}}, {"x": Code()},
                    {"x": torch.empty(2, device="meta")}, {"x": torch.eye(3).to_sparse()},
                    {"x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}):
        torch.save(content, path)
        said = message_of(lambda: dict(read_tensors(path)))
        assert "pytorch_model.bin is not a file of weights, or is damaged" in said


def test_tensors_are_read_as_they_are(tmp_path):
    """In .safetensors, in a .bin, in one from before 2020, and in one with packed parts."""
    numbers = torch.arange(6.0)
    tensors = {
        "special": torch.tensor([float("-inf"), float("nan")]),
        "large": torch.arange(2**20 + 1),
        "half": torch.ones(2, 2, dtype=torch.float16),
        "view": numbers[3:5], "transposed": numbers.view(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(3))}
    files = [tmp_path / name for name in ("a.safetensors", "new.bin", "old.bin", "packed.bin")]
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, files[0])
    torch.save(tensors, files[1])
    torch.save(tensors, files[2], _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(files[1]) as stored, zipfile.ZipFile(files[3], "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))

    for path in files:
        read = dict(read_tensors(path))
        assert list(read)[0] == "large" and read.keys() == tensors.keys()  # so that the peak of memory is low
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and not read[name].requires_grad
            assert torch.equal(read[name].nan_to_num(), tensor.nan_to_num())
