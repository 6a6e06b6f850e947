"""A model's files, from a folder or the Hub's cache, and the tensors in them.

  fetch          the path of one file of a model
  weight_files   the files with its weights: safetensors or .bin, one or many
  read_tensors   the tensors of such a file, one by one
"""
import functools
import json
import re
import zipfile
from pathlib import Path

from support.cli import InputError

HUB_ERRORS = {  # class of an error of the Hub's clients -> what it means here; the first that fits
    "GatedRepoError": "is gated: accept its terms on the Hub, then set HF_TOKEN",
    "RepositoryNotFoundError": "is neither a folder here nor a model on the Hub (or private: set HF_TOKEN)",
    "DatasetNotFoundError": "is neither a file here nor a data set on the Hub (or private: set HF_TOKEN)",
    "HFValidationError": "is no folder here, and no name that a model on the Hub could have",
    "RemoteEntryNotFoundError": "is not on the Hub",
    "LocalEntryNotFoundError": "is neither here nor in the Hub's cache, and the Hub cannot be reached; "
                               "plain `python distill.py` needs no Hub",
    "ConnectionError": "cannot be had, as the Hub cannot be reached; plain `python distill.py` needs no Hub"}


def hub_error(name, error):
    """The InputError for what the Hub's clients raised about `name`."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    known = next((meaning for cls, meaning in HUB_ERRORS.items() if cls in classes), None)
    return InputError(f"{name} {known or 'could not be read: ' + ' '.join(str(error).split())[:300]}")


def fetch(name_or_dir, filename, required=True):
    """Path of a model's file, in a folder or the Hub's cache; None if it is missing and not `required`."""
    if Path(name_or_dir).is_dir():
        path = Path(name_or_dir, filename)
        if required and not path.is_file():
            raise InputError(f"{name_or_dir} has no {filename}: not a complete model folder")
        return path if path.is_file() else None
    if re.match(r"[./~]|out(/|$)|.*/$", str(name_or_dir)):
        raise InputError(f"no folder {name_or_dir}")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    try:
        return Path(hf_hub_download(str(name_or_dir), filename))
    except Exception as error:
        if not isinstance(error, EntryNotFoundError):
            raise hub_error(name_or_dir, error) from error
        if required:
            raise hub_error(f"{filename} of {name_or_dir}", error) from error
        return None


def weight_files(name_or_dir):
    """The files with the weights: safetensors before .bin, one file before shards."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if path := fetch(name_or_dir, whole, required=False):
            return [path]
        if index := fetch(name_or_dir, whole + ".index.json", required=False):
            try:
                shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise InputError(f"{index} is damaged ({error!r:.99}): delete and fetch it again") from error
            return [fetch(name_or_dir, shard) for shard in shards]
    return [fetch(name_or_dir, "model.safetensors")]  # says that there is none, or that the Hub is silent


def read_tensors(path):
    """Yield (name, tensor) of one checkpoint file, large ones first. It is mapped into memory, anew after
    each of them to free the pages that were read. No code in a pickle is run."""
    import torch
    from safetensors.torch import load_file
    mapped = path.suffix != ".bin" or zipfile.is_zipfile(path)  # a .bin from before 2020 is read as a whole
    unpickle = functools.partial(torch.load, path, map_location="cpu", weights_only=True, mmap=mapped)
    read = unpickle if path.suffix == ".bin" else functools.partial(load_file, path)
    try:
        tensors = read()
        for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
            yield name, tensors[name]
            if mapped and tensors[name].numel() > 2**20:
                tensors = read()
    except Exception as error:  # damage shows as errors of a dozen kinds
        raise InputError(f"{path} is damaged or no weights ({error!r:.99}): fetch it again") from error
