"""A model's files, from a folder or the Hub's cache, and the tensors in them.

Read in this order:
  fetch            paths of a model's files, downloaded if the model is not a folder
  need             the path of one file that the model must have
  weight_files     the files with the weights: safetensors or .bin, one or many
  read_tensors     the tensors of such a file, one by one
  asking_the_hub   turns whatever the Hub's clients raise into an InputError

These files come from strangers: no code in them is run (a .bin is a pickle), and no file outside the model's
own folder is opened.
"""
import contextlib
import functools
import json
import os
import re
import zipfile
from pathlib import Path

from support.cli import InputError, lookalike, reading, reason_of
from support.files import note_once

PATIENCE = 5  # seconds until the Hub counts as silent
NO_NETWORK = ("plain `python distill.py` needs no Hub, nor do --teacher demo/teacher --student-layers 3 and "
              "text of your own")
NETWORK_SETTINGS = ("HF_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
WITHOUT_OWNER = r"(distil)?gpt2(-medium|-large|-xl)?"  # on the Hub all other names are owner/name
SHARD = r"[\w.-]{1,200}\.(safetensors|bin)"  # no "../" and no absolute path, which could name any file
HUB_ERRORS = {  # class of an error of the Hub's clients -> what it means here; the first match counts
    "GatedRepoError": "is gated: accept its terms on the Hub, then set HF_TOKEN",
    "RevisionNotFoundError": "is on the Hub, but not with this revision (the branch, tag or commit after @)",
    "RepositoryNotFoundError": "is neither a folder here nor a model on the Hub (or private: set HF_TOKEN)",
    "DatasetNotFoundError": "is neither a file here nor a data set on the Hub (or private: set HF_TOKEN)",
    "HFValidationError": "is not a folder here, and not a name that a model on the Hub could have",
}


# ------------------------------------------------------------------------------------ files of a model
def fetch(name_or_dir, *filenames):
    """Paths of a model's files; None for each file that the model does not have.

    ("demo/teacher", "config.json", "merges.txt") -> [demo/teacher/config.json, None]
    ("gpt2", "config.json")                       -> [~/.cache/huggingface/hub/models--gpt2/.../config.json]
    ("EleutherAI/pythia-70m@step3000", ...)       -> the files of that revision
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))  # shells leave the ~ in --teacher=~/x alone
    # `--teacher gpt2 --out gpt2` has already made an empty folder gpt2, with a hidden lock file in it.
    if not name or not os.path.isdir(folder) or all(entry.startswith(".") for entry in os.listdir(folder)):
        check_hub_name(name)
        folder = download(name, filenames)
    with reading(folder, "a model's folder"):
        return [path if path.is_file() else None for path in (folder / filename for filename in filenames)]


def need(name_or_dir, filename):
    """The path of a file that the model must have."""
    path, adapter = fetch(name_or_dir, filename, "adapter_config.json")
    if path:
        return path
    if adapter:
        raise InputError(f"{name_or_dir} is a LoRA adapter (adapter_config.json, no {filename}), not a "
                         "model: merge it into its base model and save that (peft's merge_and_unload)")
    if os.path.isdir(os.path.expanduser(name_or_dir)):
        raise InputError(f"{name_or_dir} has no {filename}: not a complete model folder")
    silence = why_the_hub_is_silent()
    where = f"in the Hub's cache, and {silence}" if silence else "on the Hub"
    raise InputError(f"{filename} of {name_or_dir} is not {where}")


def check_hub_name(name):
    """InputError for a name that can only mean a folder: offline, asking the Hub about it takes long.

    "demo/techer" next to a folder demo/teacher is a slip. "EleutherAI/pythia-160m" next to a folder
    EleutherAI/pythia-70m is not: names of models differ in their numbers.
    """
    name, _, _ = name.partition("@")
    folder = os.path.expanduser(name)
    if not name or os.path.isfile(folder):
        raise InputError(f"{name or 'an empty name'} is not a model: give its folder, or its name on the Hub")

    is_path = (re.match(r"[./~]|out/|.*/$|.*\\|.*/.*/", name)
               or "/" not in name and not re.fullmatch(WITHOUT_OWNER, name))
    if is_path and os.path.isdir(folder):
        raise InputError(f"{name} is an empty folder, not a model")
    near = lookalike(folder)
    is_slip = (near not in (None, folder) and "/" in name
               and re.findall(r"\d+", near) == re.findall(r"\d+", name))
    if is_path or is_slip:
        hint = "; models on the Hub are called owner/name" if "/" not in name else ""
        raise InputError(f"no folder {name}" + (f"; did you mean {near}?" if near else hint))


# ------------------------------------------------------------------------------------ the Hub
def download(name, filenames):
    """The folder in the Hub's cache that holds these files of a model, as far as the model has them."""
    repo, _, revision = name.partition("@")
    silence = why_the_hub_is_silent()
    with asking_the_hub(name):
        from huggingface_hub import snapshot_download, try_to_load_from_cache
        from huggingface_hub.utils import tqdm

        class LateBar(tqdm):  # shown only if there is more than a second of work
            __init__ = functools.partialmethod(tqdm.__init__, delay=1)

        if not silence:
            wanted = ["config.json", *filenames]  # config.json marks what is in the cache
            return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted,
                                          tqdm_class=LateBar))
        cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    if not isinstance(cached, str):
        raise InputError(f"{name} is neither a folder here nor in the Hub's cache, and {silence}; "
                         f"{NO_NETWORK}")
    if "HF_HUB_OFFLINE" not in silence:
        note_once(f"{silence}; models come from its cache, as they were")
    return Path(cached).parent


@functools.cache
def why_the_hub_is_silent():
    """"the Hub cannot be reached: ..." with the reason, or None if it answers. It is asked once.

    The client itself would try again and again for 23 seconds. While there is a network the cache alone is
    never used: the model may have changed.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        with contextlib.suppress(HfHubHTTPError):  # a mirror may lack gpt2, but it answers
            get_hf_file_metadata(hf_hub_url("gpt2", "config.json"), timeout=PATIENCE)
        return None
    except Exception as error:  # TLS, a proxy, a malformed address or token: a dozen classes
        used = [name for name in NETWORK_SETTINGS if name in os.environ or name.lower() in os.environ]
        hint = f" (set: {', '.join(used)})" if used else ""
        return f"the Hub cannot be reached: {reason_of(error).rstrip('.')}{hint}"


@contextlib.contextmanager
def asking_the_hub(name):
    """Errors of the Hub's clients, of a dozen classes from two HTTP libraries, become InputErrors."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        near = lookalike(name)
        hint = f" (did you mean {near}?)" if near and near != name else ""
        raise hub_error(name + hint, error) from error


def hub_error(name, error):
    """The InputError for what the Hub's clients raised about `name`."""
    causes = [error]
    while causes[-1].__cause__:
        causes.append(causes[-1].__cause__)
    classes = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    for cls, meaning in HUB_ERRORS.items():
        if cls in classes:
            return InputError(f"{name} {meaning}")
    if silence := why_the_hub_is_silent():
        return InputError(f"{name} could not be downloaded, as {silence}; {NO_NETWORK}")
    return InputError(f"{name} could not be downloaded: {reason_of(causes[-1])}")


# ------------------------------------------------------------------------------------ what is in the files
def read_json(path):
    """A file that holds a JSON object -> dict."""
    with reading(path, "a JSON object"):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content


def weight_files(name_or_dir):
    """The files with the weights: safetensors before .bin, one file before shards."""
    for filename in ("model.safetensors", "pytorch_model.bin"):
        whole, index = fetch(name_or_dir, filename, f"{filename}.index.json")
        if whole:
            return [whole]
        if index:
            with reading(index, "an index of weights"):
                shards = sorted(set(read_json(index)["weight_map"].values()))
                if odd := [name for name in shards if not re.fullmatch(SHARD, name)]:
                    raise ValueError(f"it names {odd[0]!r:.60}, which is not a weight file beside it")
            fetch(name_or_dir, *shards)  # all in one download
            return [need(name_or_dir, shard) for shard in shards]
    return [need(name_or_dir, "model.safetensors")]  # says what is missing


def read_tensors(path):
    """Yield (name, tensor) of one checkpoint file, large ones first.

    The file is mapped into memory, not read: a page takes memory once it is used. A large tensor's pages are
    given back by mapping the file again, so no more than one of them is in memory.
    """
    from torch import strided
    with reading(path, "a file of weights"):
        tensors, is_mapped = open_weights(path)
        for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
            tensor = tensors[name].detach()
            # A .bin can hold anything that pickles, such as shapes without elements ("meta" tensors).
            found = (type(name), tensor.layout, tensor.device.type, tensor.is_nested)
            if found != (str, strided, "cpu", False):
                raise ValueError(f"{name!r:.60} is not the name of an ordinary tensor")
            yield name, tensor
            if is_mapped and tensor.numel() > 2**20:
                tensors, _ = open_weights(path)


def open_weights(path):
    """({name: tensor}, whether they are mapped into memory) of a checkpoint file."""
    import torch
    from safetensors.torch import load_file
    if path.suffix == ".safetensors":
        return load_file(path), True
    # Before 2020 a .bin was not an archive, and packed parts cannot be mapped: they would be read as noise.
    is_mapped = zipfile.is_zipfile(path) and all(
        part.compress_type == zipfile.ZIP_STORED for part in zipfile.ZipFile(path).infolist())
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped), is_mapped
