"""support/hub.py: a model's files, from folders, the Hub and its cache, and hostile ones."""
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import save_file

from support import hub as hub_module
from support.cli import InputError
from support.hub import check_hub_name, fetch, hub_error, need, read_json, read_tensors, weight_files


def message_of(function, *args):
    """The one line with which a call is refused."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def read_all(path):
    return dict(read_tensors(path))


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
        assert f"has no {missing}: not a complete model folder" in message_of(need, folder, missing)

    put(hub.root / "models/someone/lora", adapter_config={})
    put(folder, adapter_config={})
    for name in (folder, "someone/lora"):
        assert "is a LoRA adapter" in message_of(need, name, "model.safetensors")


def test_what_can_only_be_a_path_is_missing_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "download", lambda *args: pytest.fail(f"the Hub was asked: {args}"))
    for folder in ("demo/teacher", "EleutherAI/pythia-70m", "gpt-2", "tuned"):
        Path(folder).mkdir(parents=True)
    Path("weights.bin").touch()
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere/", "out", "~/nowhere", "a/b/c", r"runs\one",
                 "/" + "x" * 5000):
        assert message_of(fetch, name, "config.json").startswith(f"no folder {str(name):.200}")
    assert message_of(fetch, "demo/techer", "a.json") == "no folder demo/techer; did you mean demo/teacher?"
    assert message_of(fetch, "tunde", "a.json") == "no folder tunde; did you mean tuned?"
    assert message_of(fetch, "nope", "a.json") == "no folder nope; models on the Hub are called owner/name"
    assert "weights.bin is not a model: give its folder" in message_of(fetch, "weights.bin", "config.json")
    assert "an empty name" in message_of(fetch, "", "config.json")

    # Names of models on the Hub differ in their numbers; an empty folder of that name may be ours.
    for name in ("gpt2", "EleutherAI/pythia-160m", "EleutherAI/pythia-70m", "EleutherAI/pythia-70m@step3000"):
        check_hub_name(name)


def test_an_empty_folder_is_not_taken_for_the_model(hub, tmp_path, monkeypatch):
    """`--teacher someone/model --out someone/model`: --out is made and locked before the teacher is read."""
    put(hub.root / "models/someone/model", config={"a": 1})
    monkeypatch.chdir(tmp_path)
    (put(tmp_path / "someone/model") / ".distil-lock").touch()
    assert read_json(need("someone/model", "config.json")) == {"a": 1}
    assert "is an empty folder" in message_of(fetch, "./someone/model", "config.json")
    put(tmp_path / "someone/model", config={"a": 2})
    assert read_json(need("someone/model", "config.json")) == {"a": 2}


def test_what_may_not_be_read_is_not_called_damaged_or_missing():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, where only its owner may look
        path = Path(folder, "model.safetensors")
        save_file({"x": torch.ones(2)}, path)
        path.chmod(0)
        for mode, read, *args in ((0o755, read_all, path), (0o644, need, folder, "config.json")):
            Path(folder).chmod(mode)  # without x no file opens
            if user == 0:
                os.seteuid(65534)  # root may read everything
            try:
                assert message_of(read, *args) == f"{args[0]} could not be read: Permission denied"
            finally:
                os.seteuid(user)


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
            ("someone/model", "other.json", "other.json of someone/model is not on the Hub"),
            ("someone/model@step4", "config.json", "is on the Hub, but not with this revision"),
            ("someone/else", "config.json", "else is neither a folder here nor a model on the Hub"),
            ("some one/model", "config.json", "not a name that a model on the Hub could have")):
        assert message in message_of(need, name, file)
    hub.gated.add("someone/model")
    assert "HF_TOKEN" in message_of(fetch, "someone/model", "weights.bin")
    hub.gated.clear()
    full = hub_error("someone/model", OSError(28, "No space left on device"))  # not the Hub's fault
    assert str(full) == "someone/model could not be downloaded: [Errno 28] No space left on device"

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


def test_without_network_models_come_from_the_cache(hub):
    """Nobody waits, the user is told once, and a model that is not in the cache is refused."""
    used = hub.root / "models/someone/used"
    put(used, config={"a": 1})
    put(used.with_name("used@step3"), config={"a": 3})
    fetch("someone/used", "config.json")
    fetch("someone/used@step3", "config.json")
    put(used, config={"a": 2})

    said, notes = run_script(hub, HF_ENDPOINT="http://127.0.0.1:9")
    assert said[0] == "someone/used {'a': 1} [None]", notes
    assert said[2] == "someone/used@step3 {'a': 3} [None]", notes
    assert "model.safetensors of someone/used is not in the Hub's cache, and the Hub cannot be" in said[1]
    assert said[4].startswith("someone/new is neither a folder here nor in the Hub's cache, and the Hub")
    assert notes.count("note: ") == notes.count("models come from its cache") == 1

    said, notes = run_script(hub, HF_HUB_OFFLINE="1")
    assert said[0] == "someone/used {'a': 1} [None]" and "HF_HUB_OFFLINE" in said[4] and not notes
    assert "`python distill.py` needs no Hub" in said[4]
    said, notes = run_script(hub)
    assert said[0] == "someone/used {'a': 2} [None]" and not notes


def test_why_the_hub_is_silent(hub, tmp_path):
    """Addresses, tokens and proxies that cannot work: the reason and the settings in use are in the line."""
    for reason, settings in {
            "Connection refused (set: HF_ENDPOINT)": {},
            "missing an 'http://' or 'https://'": {"HF_ENDPOINT": "huggingface"},
            "Invalid IPv6 URL (set: HF_ENDPOINT)": {"HF_ENDPOINT": "http://["},
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
        for zipped in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            assert "pytorch_model.bin is not a file of weights, or is damaged" in message_of(read_all, path)


def saved(folder, tensors):
    """Write tensors in each of the forms that we read: the files."""
    files = [folder / name for name in ("a.safetensors", "new.bin", "old.bin", "packed.bin")]
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, files[0])
    torch.save(tensors, files[1])
    torch.save(tensors, files[2], _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(files[1]) as stored, zipfile.ZipFile(
            files[3], "w", zipfile.ZIP_DEFLATED) as packed:  # mapped, it would be read as noise
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    return files


def test_tensors_are_read_as_they_are(tmp_path):
    numbers = torch.arange(6.0)
    tensors = {
        "special": torch.tensor([float("-inf"), float("nan")]),
        "large": torch.arange(2**20 + 1),
        "half": torch.ones(2, 2, dtype=torch.float16),
        "view": numbers[3:5], "transposed": numbers.view(2, 3).t(), "expanded": numbers.expand(1, 6)}
    for path in saved(tmp_path, tensors):
        read = read_all(path)
        assert list(read)[0] == "large" and read.keys() == tensors.keys()  # so that the peak of memory is low
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name].nan_to_num(), tensor.nan_to_num())

    torch.save({"x": torch.nn.Parameter(torch.ones(3))}, tmp_path / "new.bin")
    assert not read_all(tmp_path / "new.bin")["x"].requires_grad
