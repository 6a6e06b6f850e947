"""support/hub.py and support/files.py: a model's files, what strangers can put into them, safe writes."""
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REPO
from fakehub import FakeHub
from safetensors.torch import save_file

from support import hub as hub_module
from support.cli import InputError
from support.files import replaced
from support.hub import fetch, read_tensors, weight_files


def message_of(function, *args):
    """The one line with which a call is refused."""
    with pytest.raises(InputError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- fetch ------------------------------------------------------------------------------------------------

def test_fetch_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "vocab.json").mkdir()
    assert fetch(tmp_path, "config.json") == tmp_path / "config.json"
    assert fetch(tmp_path, "model.safetensors", required=False) is None
    for missing in ("model.safetensors", "vocab.json", "x" * 300):
        assert f"has no {missing}" in message_of(fetch, tmp_path, missing)


@pytest.fixture
def no_hub(monkeypatch):
    """A fetch that asks the Hub fails the test."""
    def asked(name, filename, required):
        raise AssertionError(f"the Hub was asked for {name}")
    monkeypatch.setattr(hub_module, "download", asked)


def test_what_can_only_be_a_path_is_missing_at_once(tmp_path, monkeypatch, no_hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "teacher").mkdir(parents=True)
    (tmp_path / "weights.bin").write_bytes(b"")
    for name in (tmp_path / "nowhere", "./nowhere", "../nowhere", "nowhere/", "out", "~/nowhere", "a/b/c",
                 r"runs\one", "/" + "x" * 5000):
        assert message_of(fetch, name, "config.json").startswith(f"no folder {str(name):.200}")
    assert message_of(fetch, "demo/techer", "a.json") == "no folder demo/techer; did you mean demo/teacher?"
    assert "./demo/teacher?" in message_of(fetch, "./demo/teachr", "a.json")
    assert "weights.bin is no model: name its folder" in message_of(fetch, "weights.bin", "config.json")
    assert "an empty name" in message_of(fetch, "", "config.json")


def test_what_can_be_a_name_on_the_hub_is_asked_for_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "download", lambda name, filename, required: Path(name))
    (tmp_path / "EleutherAI" / "pythia-70m").mkdir(parents=True)
    (tmp_path / "gpt-2").mkdir()
    for name in ("gpt2", "EleutherAI/pythia-160m", "openai-community/gpt2"):
        assert fetch(name, "config.json") == Path(name)


def test_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert fetch("~/model", "config.json") == tmp_path / "model" / "config.json"


def test_a_lora_adapter_is_called_by_its_name(tmp_path, hub):
    served = hub.root / "models" / "someone" / "lora"
    for folder in (tmp_path, served):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
    for name in (tmp_path, "someone/lora"):
        assert "is a LoRA adapter" in message_of(fetch, name, "config.json")
        assert fetch(name, "config.json", required=False) is None


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


def test_a_silent_hub_is_asked_once_about_a_new_model(tmp_path):
    script = """
import huggingface_hub
from support.hub import fetch
asked, real = [], huggingface_hub.hf_hub_download
huggingface_hub.hf_hub_download = lambda *args, **more: asked.append(args) or real(*args, **more)
try:
    fetch("someone/model", "model.safetensors", required=False)
except ValueError as error:
    print(len(asked), error)
"""
    env = {**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True)
    assert result.stdout.startswith("1 model.safetensors of someone/model is neither here"), result.stderr


def test_without_network_a_model_comes_from_the_cache_and_nobody_waits(hub):
    """Files that it lacks are not asked for again and again; that the cache is believed, is said."""
    folder = hub.root / "models" / "someone" / "used"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("before")
    fetch("someone/used", "config.json")
    (folder / "config.json").write_text("now")
    script = """
import time
from support.hub import fetch
def sleep(seconds):
    raise SystemExit("it waits")
time.sleep = sleep
print(fetch("someone/used", "config.json").read_text(), fetch("someone/used", "x.json", required=False))
try:
    fetch("someone/used", "model.safetensors")
except ValueError as error:
    print(error)
"""
    def run_with(**changes):
        env = {**os.environ, **hub.env, "PYTHONPATH": str(REPO), **changes}
        return subprocess.run([sys.executable, "-c", script], env=env, text=True, capture_output=True)

    silent = run_with(HF_ENDPOINT="http://127.0.0.1:9")
    assert silent.stdout.startswith("before None\nmodel.safetensors of someone/used is neither here nor")
    assert silent.stderr.count("the Hub cannot be reached; models come from its cache") == 1
    assert run_with(HF_HUB_OFFLINE="1").stdout == silent.stdout
    there = run_with()
    assert there.stdout.startswith("now None\nmodel.safetensors of someone/used is not on the Hub")
    assert there.stderr == ""


def test_the_stand_in_stops(tmp_path):
    hub = FakeHub(tmp_path)
    hub.close()


# --- Weights ----------------------------------------------------------------------------------------------

def test_shards_are_files_beside_their_index(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a.bin", "b.bin", "../outside.bin"):
        torch.save({"x": torch.ones(2)}, folder / name)
    (folder / "directory.bin").mkdir()
    index = folder / "pytorch_model.bin.index.json"

    def files(*names):
        index.write_text(json.dumps({"weight_map": dict(zip("xyz", names, strict=False))}))
        return weight_files(folder)

    assert files("b.bin", "a.bin", "b.bin") == [folder / "a.bin", folder / "b.bin"]
    outside = str(tmp_path / "outside.bin")
    for name in ("../outside.bin", outside, "./a.bin", r"..\outside.bin", "C:a.bin", "/etc/passwd",
                 "config.json", "", "x" * 300 + ".bin", 7, None, ["a.bin"], True):
        assert f"{index} names" in message_of(files, "a.bin", name)
    assert "has no directory.bin" in message_of(files, "a.bin", "directory.bin")
    assert "weight_map" in message_of(files)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff{}", b"[" * 100_000, b'{"weight_map": [1]}',
                                     b'{"weight_map": "a.bin"}', b"null"], ids=lambda content: content[:20])
def test_a_damaged_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    assert "index.json is damaged" in message_of(weight_files, tmp_path)


ODD = {
    "a list": lambda: [torch.ones(2)],
    "a number as a name": lambda: {7: torch.ones(2)},
    "names of two types": lambda: {7: torch.ones(2), "x": torch.ones(3)},
    "a state within": lambda: {"model": {"x": torch.ones(2)}, "step": 5},
    "a meta tensor": lambda: {"x": torch.empty(2, device="meta")},
    "a sparse tensor": lambda: {"x": torch.eye(3).to_sparse()},
    "a compressed sparse tensor": lambda: {"x": torch.eye(3).to_sparse_csr()},
    "a quantised tensor": lambda: {"x": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    "nothing": lambda: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_bin_that_holds_something_else(tmp_path, content, legacy):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content(), path, _use_new_zipfile_serialization=not legacy)
    message = message_of(lambda: [*read_tensors(path)])
    assert message.startswith(str(path))


@pytest.mark.parametrize("size", [0, 1, 100, -1])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_file_that_breaks_off(tmp_path, suffix, size):
    path = tmp_path / f"model.{suffix}"
    write = torch.save if suffix == "bin" else save_file
    write({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:size])
    assert "is damaged or no weights" in message_of(lambda: [*read_tensors(path)])


def test_a_bin_that_was_packed_again(tmp_path):
    """Mapped into memory as it lies there, what is compressed would be read as weights."""
    torch.save({"x": torch.ones(1000)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as stored:
        with zipfile.ZipFile(tmp_path / "b.bin", "w", zipfile.ZIP_DEFLATED) as packed:
            for name in stored.namelist():
                packed.writestr(name, stored.read(name))
    assert "b.bin was packed again" in message_of(lambda: [*read_tensors(tmp_path / "b.bin")])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_tensor_with_more_elements_than_the_file_holds(tmp_path, legacy):
    """By strides of 0 a file of 1 kB can ask for any amount of memory."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(1).expand(2**20, 2**20)}, path, _use_new_zipfile_serialization=not legacy)
    assert "x has more elements than the file holds" in message_of(lambda: [*read_tensors(path)])
    numbers = torch.arange(6.0)
    views = {"x": numbers.view(2, 3).t(), "y": numbers[3:5], "z": numbers.expand(1, 6)}
    torch.save(views, path, _use_new_zipfile_serialization=not legacy)
    for name, tensor in read_tensors(path):
        assert torch.equal(tensor, views[name])


def test_tensors_are_read_as_they_are(tmp_path):
    tensors = {
        "small": torch.tensor([float("-inf"), float("nan")]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "large": torch.arange(2**20 + 1),
        "half": torch.ones(2, 2, dtype=torch.float16),
    }
    torch.save(tensors, tmp_path / "a.bin")
    save_file({name: tensor.data for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    for file in ("a.bin", "a.safetensors"):
        read = dict(read_tensors(tmp_path / file))
        assert list(read)[0] == "large" and read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and not read[name].requires_grad
            assert torch.equal(read[name].nan_to_num(), tensor.data.nan_to_num())


# --- replaced ---------------------------------------------------------------------------------------------

def write(path, text="new"):
    with replaced(path) as temporary:
        temporary.write_text(text)


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_replaced(tmp_path):
    write(tmp_path / "a" / "b.json", "old")
    write(tmp_path / "a" / "b.json")
    assert (tmp_path / "a" / "b.json").read_text() == "new"
    assert listing(tmp_path) == ["a", "a/b.json"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, RuntimeError])
def test_an_error_changes_nothing(tmp_path, error):
    write(tmp_path / "a.json", "old")
    with pytest.raises(InputError if error is OSError else error), replaced(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise error
    assert (tmp_path / "a.json").read_text() == "old" and listing(tmp_path) == ["a.json"]


def test_a_full_disk(tmp_path):
    """A limit to the size of files stands for it. torch and safetensors have errors of their own for that."""
    write(tmp_path / "a", "old")
    script = """
import resource, signal, torch
from safetensors.torch import save_file
from support.cli import InputError
from support.files import replaced
zeros = torch.zeros(10**6)
ways = [lambda name: open(name, "wb").write(bytes(10**6)), lambda name: torch.save(zeros, open(name, "wb")),
        lambda name: torch.save(zeros, name), lambda name: save_file({"x": zeros}, name)]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for way in ways:
    try:
        with replaced("a") as temporary:
            way(temporary)
    except InputError as error:
        print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    lines = result.stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("a cannot be written (") for line in lines), result.stderr
    assert (tmp_path / "a").read_text() == "old" and listing(tmp_path) == ["a"]


def test_a_kill_in_the_middle_leaves_nothing_for_ever(tmp_path):
    """safetensors writes to a temporary file of its own, beside the name that it is given."""
    script = """
import os, signal, threading, time, torch
from pathlib import Path
from safetensors.torch import save_file
from support.files import replaced
def kill():
    while not [*Path().glob("a.safetensors.tmp/*")]:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
weights = {str(i): torch.zeros(2**22) for i in range(20)}
threading.Thread(target=kill).start()
with replaced("a.safetensors") as temporary:
    save_file(weights, temporary)
"""
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env)
    assert killed.returncode == -signal.SIGKILL and listing(tmp_path)[0] == "a.safetensors.tmp"
    write(tmp_path / "a.safetensors")
    assert listing(tmp_path) == ["a.safetensors"]


def test_leftovers_of_a_kill_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "a.tmp").write_text("left by a kill")
    write(tmp_path / "a")
    (tmp_path / "b.tmp").mkdir()
    (tmp_path / "b.tmp" / "mine").write_text("somebody's")
    assert "b.tmp" in message_of(write, tmp_path / "b")
    assert listing(tmp_path) == ["a", "b.tmp", "b.tmp/mine"]


def test_a_written_file_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        with replaced(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.ones(2)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_link_is_replaced_not_what_it_points_to(tmp_path):
    (tmp_path / "blob").write_text("old")
    (tmp_path / "a").symlink_to("blob")
    write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "blob").read_text() == "old"


@pytest.mark.parametrize("name", ["folder", ".", "..", "x" * 300, "x" * 5000, "file/x", "file/x/y"])
def test_a_name_that_cannot_be_written(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    assert "cannot be written" in message_of(write, f"{tmp_path}/{name}")
    assert listing(tmp_path) == ["file", "folder"]


def test_nothing_written(tmp_path):
    with pytest.raises(InputError, match="cannot be written"), replaced(tmp_path / "a"):
        pass
    assert listing(tmp_path) == []
