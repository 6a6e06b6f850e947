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
MODEL_NAME = r"((distil)?gpt2(-medium|-large|-xl)?|[\w-][\w.-]*/[\w.-]+)(@.+)?"  # on the Hub; @revision
SHARD = r"[\w.-]{1,200}\.(safetensors|bin)"  # no "../" and no absolute path, which could name any file


# ------------------------------------------------------------------------------------ files of a model
def fetch(name_or_dir, *filenames):
    """Paths of a model's files; None for each file that the model does not have.

    ("demo/teacher", "config.json", "merges.txt") -> [demo/teacher/config.json, None]
    ("gpt2", "config.json")                       -> [~/.cache/huggingface/hub/models--gpt2/.../config.json]
    ("EleutherAI/pythia-70m@step3000", ...)       -> the files of that revision
    """
    name = str(name_or_dir)
    folder = Path(os.path.expanduser(name))  # shells leave the ~ in --teacher=~/x alone
    if not name or not os.path.isdir(folder):
        check_hub_name(name)
        folder = download(name, filenames)
    elif re.fullmatch(MODEL_NAME, name) and all(entry.startswith(".") for entry in os.listdir(folder)):
        # `--teacher gpt2 --out gpt2` has already made an empty folder gpt2, with a hidden lock file in it.
        folder = download(name, filenames)
    with reading(folder, "a model's folder"):
        return [path if path.is_file() else None for path in (folder / filename for filename in filenames)]


def need(name_or_dir, filename):
    """The path of a file that the model must have."""
    path, = fetch(name_or_dir, filename)
    if path is None:
        silence = not os.path.isdir(os.path.expanduser(name_or_dir)) and why_the_hub_is_silent()
        raise InputError(f"{name_or_dir} has no {filename}: not a complete model"
                         + (f" in the Hub's cache, and {silence}" if silence else ""))
    return path


def check_hub_name(name):
    """InputError for a name that can only mean a folder: without a network, asking the Hub takes long."""
    if not re.fullmatch(MODEL_NAME, name):
        near = lookalike(os.path.expanduser(name))
        hint = f"did you mean {near}?" if near not in (None, name) else "models on the Hub are owner/name"
        raise InputError(f"no folder {name}; {hint}")


# ------------------------------------------------------------------------------------ the Hub
def download(name, filenames):
    """The folder in the Hub's cache that holds these files of a model, as far as the model has them."""
    repo, _, revision = name.partition("@")
    silence = why_the_hub_is_silent()
    with asking_the_hub(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class LateBar(tqdm):  # shown only if there is more than a second of work
            __init__ = functools.partialmethod(tqdm.__init__, delay=1)

        # While there is a network the cache alone is never used: the model may have changed.
        wanted = ["config.json", *filenames]  # the client warns if a model has none of the files
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=wanted,
                                   local_files_only=bool(silence), tqdm_class=LateBar)
    if silence and "HF_HUB_OFFLINE" not in silence:
        note_once(f"{silence}; models come from its cache, as they were")
    return Path(folder)


@functools.cache
def why_the_hub_is_silent():
    """"the Hub cannot be reached: ..." with the reason, or None if it answers. It is asked once, because the
    client itself would try again and again for 23 seconds."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        with contextlib.suppress(HfHubHTTPError):  # a mirror may lack gpt2, but it answers
            get_hf_file_metadata(hf_hub_url("gpt2", "config.json"), timeout=PATIENCE)
        return None
    except Exception as error:  # TLS, a proxy, a malformed address or token: a dozen classes
        return (f"the Hub cannot be reached: {reason_of(error).rstrip('.')} (HF_ENDPOINT, HF_TOKEN and your "
                "proxy decide how)")


@contextlib.contextmanager
def asking_the_hub(name):
    """Errors of the Hub's clients, of a dozen classes from two HTTP libraries, become InputErrors."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise hub_error(name, error) from error


def hub_error(name, error):
    """The InputError for what the Hub's clients raised about a model or a data set."""
    near = lookalike(name)
    hint = f" (did you mean {near}?)" if near not in (None, name) else ""
    silence = why_the_hub_is_silent()
    reason = f"{silence}; {NO_NETWORK}" if silence else reason_of(error)
    return InputError(f"{name} is not here{hint}, and could not be downloaded: {reason}")


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
