"""A model's files, from a folder or the Hub's cache, and the tensors in them.

Read in this order:
  fetch          the path of one file of a model
  weight_files   the files with its weights: safetensors or .bin, one or many
  read_tensors   the tensors of such a file, one by one
  read_json      a small file that holds a JSON object
  hub_error      what went wrong on the Hub, in one line

All of these files come from strangers. What they say is checked before it is believed, no code in them is run
(a .bin is a pickle), and no file is opened outside of the model's own folder.
"""
import contextlib
import functools
import json
import os
import re
import sys
import zipfile
from pathlib import Path

from support.cli import InputError, lookalike

PATIENCE = 5  # seconds until the Hub counts as silent
NO_NETWORK = ("plain `python distill.py` needs no Hub, nor do --teacher demo/teacher --student-layers 3 and "
              "text of your own")
HUB_ERRORS = {  # class of an error of the Hub's clients -> what it means here; the first that fits
    "GatedRepoError": "is gated: accept its terms on the Hub, then set HF_TOKEN",
    "RepositoryNotFoundError": "is neither a folder here nor a model on the Hub (or private: set HF_TOKEN)",
    "DatasetNotFoundError": "is neither a file here nor a data set on the Hub (or private: set HF_TOKEN)",
    "HFValidationError": "is no folder here, and no name that a model on the Hub could have",
    "LocalEntryNotFoundError": "is neither here nor in the Hub's cache, and the Hub cannot be reached; "
                               + NO_NETWORK,
    "RemoteEntryNotFoundError": "is not on the Hub",
    "ConnectionError": f"cannot be had, as the Hub cannot be reached; {NO_NETWORK}",
}


def hub_error(name, error):
    """The InputError for what the Hub's clients raised about `name`."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    for cls, meaning in HUB_ERRORS.items():
        if cls in classes:
            return InputError(f"{name} {meaning}")
    return InputError(f"{name} could not be read: {' '.join(str(error).split())[:300]}")


# ------------------------------------------------------------------------------------ files
def fetch(name_or_dir, filename, required=True):
    """Path of a model's file; None if the model has no such file and it is not `required`.

    ("demo/teacher", "config.json") -> demo/teacher/config.json
    ("gpt2", "config.json")         -> ~/.cache/huggingface/hub/models--gpt2/snapshots/.../config.json
    """
    name = str(name_or_dir)
    folder = os.path.expanduser(name)  # shells leave the ~ in --teacher=~/x alone
    if name and os.path.isdir(folder):
        path = Path(folder, filename)
        path = path if os.path.isfile(path) else None
        missing = f"{name} has no {filename}: not a complete model folder"
    else:
        check_hub_name(name)
        path = download(name, filename, required)
        missing = f"{filename} of {name} is not on the Hub"

    adapter = "adapter_config.json"
    if path is None and required:
        if filename != adapter and fetch(name, adapter, required=False):
            missing = (f"{name} is a LoRA adapter ({adapter}, no {filename}), not a model: merge it into its "
                       "base model and save that (peft's merge_and_unload)")
        raise InputError(missing)
    return path


def check_hub_name(name):
    """InputError for a name that can only have meant a folder, as asking the Hub takes half a minute offline.

    "demo/techer", where there is a demo/teacher, is a slip. "EleutherAI/pythia-160m" beside a folder
    EleutherAI/pythia-70m is not: names of models differ in their numbers.
    """
    if not name or os.path.isfile(os.path.expanduser(name)):
        raise InputError(f"{name or 'an empty name'} is no model: name its folder, or its name on the Hub")
    near = lookalike(os.path.expanduser(name))
    hint = f"; did you mean {near}?" if near else ""

    is_path = re.match(r"[./~]|out(/|$)|.*/$|.*\\|.*/.*/", name)
    is_slip = near and "/" in name and re.findall(r"\d+", near) == re.findall(r"\d+", name)
    if is_path or is_slip:
        raise InputError(f"no folder {name}{hint}")


def download(name, filename, required):
    """Path of a file in the Hub's cache, fetched if it is not there; None if the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    cached = in_cache(name)
    silent = hub_is_silent()
    if cached and silent:
        say_that_the_cache_is_used()
    try:
        return Path(hf_hub_download(name, filename, local_files_only=silent))
    except LocalEntryNotFoundError as error:
        # The Hub is silent. Of a model that has been used before, the cache has what there is. Of another
        # one, say so at once: each further question would take half a minute.
        if required or not cached:
            raise hub_error(f"{filename} of {name}", error) from error
        return None
    except EntryNotFoundError:
        return None
    except Exception as error:  # of a dozen classes, from two HTTP libraries
        near = lookalike(name)
        raise hub_error(f"{name} (did you mean {near}?)" if near else name, error) from error


def in_cache(name):
    """Whether the Hub's cache has a model that was used before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    with contextlib.suppress(HFValidationError):
        return isinstance(try_to_load_from_cache(name, "config.json"), str)


@functools.cache
def hub_is_silent():
    """Whether the Hub cannot be reached: asked once, with little patience.

    Its client would ask again and again, for 23 seconds, and tell of each try. Where there is a network the
    cache alone is never believed: the model may have changed.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    if constants.HF_HUB_OFFLINE:  # as the user wants it; the client knows
        return True
    try:
        get_hf_file_metadata(hf_hub_url("gpt2", "config.json"), timeout=PATIENCE)
    except HfHubHTTPError:  # an answer, too
        return False
    except Exception:  # of a dozen classes, from two HTTP libraries
        return True
    return False


@functools.cache
def say_that_the_cache_is_used():
    """Once. Who asked for that (HF_HUB_OFFLINE) knows it."""
    from huggingface_hub import constants
    if not constants.HF_HUB_OFFLINE:
        print("note: the Hub cannot be reached; models come from its cache, as they were", file=sys.stderr)


def read_json(path):
    """A file that holds a JSON object -> dict."""
    try:
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
        reason = "it holds no JSON object"
    except (ValueError, RecursionError) as error:
        reason = repr(error)
    raise InputError(f"{path} is damaged ({reason:.99}): delete and fetch it again")


# ------------------------------------------------------------------------------------ weights
def weight_files(name_or_dir):
    """The files with the weights: safetensors before .bin, one file before shards."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if path := fetch(name_or_dir, whole, required=False):
            return [path]
        if index := fetch(name_or_dir, whole + ".index.json", required=False):
            return [fetch(name_or_dir, shard) for shard in shard_names(index)]
    return [fetch(name_or_dir, "model.safetensors")]  # says that there is none, or that the Hub is silent


def shard_names(index):
    """The files that an index names: {"weight_map": {"wte.weight": "b.bin", ...}} -> ["a.bin", "b.bin"].

    Only files beside the index: with "../" or an absolute path it could have any file of this machine read.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} is damaged (no weight_map): delete and fetch it again")

    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\:\0]{1,200}\.(safetensors|bin)", shard):
            raise InputError(f"{index} names {shard!r:.60}, which is no .safetensors or .bin file beside it")
    return sorted(set(weight_map.values()))


def read_tensors(path):
    """Yield (name, tensor) of one checkpoint file, large ones first.

    The file is mapped into memory, not read: a page costs memory from when it is used. Mapped anew after each
    large tensor, it never has more than one of them in memory.
    """
    import torch
    from safetensors.torch import load_file
    try:
        mapped = path.suffix != ".bin" or is_archive(path)
        read = functools.partial(load_file, path)
        if path.suffix == ".bin":
            read = functools.partial(torch.load, path, map_location="cpu", weights_only=True, mmap=mapped)
        tensors = read()
        check_tensors(path, tensors)
        for name in sorted(tensors, key=lambda name: -tensors[name].numel()):
            yield name, tensors[name].detach()
            if mapped and tensors[name].numel() > 2**20:
                tensors = read()
    except InputError:
        raise
    except Exception as error:  # damage shows as errors of a dozen kinds
        raise InputError(f"{path} is damaged or no weights ({error!r:.99}): fetch it again") from error


def is_archive(path):
    """Whether a .bin is a zip archive, which can be mapped. One from before 2020 is not: it is read whole."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise InputError(f"{path} was packed again: mapped as they are, its weights would be noise. "
                             "Load it and write it anew with torch.save")
    return True


def check_tensors(path, tensors):
    """InputError unless these are named tensors with a number for each element, in the usual layout.

    A .bin can hold anything that pickles: a whole training state, names that are numbers, shapes without
    elements ("meta" tensors), sparse and quantised ones.
    """
    import torch
    if not isinstance(tensors, dict):
        raise InputError(f"{path} is damaged or no weights: {type(tensors).__name__}, not tensors by name")

    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(f"{path} is damaged or no weights: it has {name!r:.60}: {type(tensor).__name__}")
        plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu":
            raise InputError(f"{path}: {name} is a sparse, nested, quantised or meta tensor, not a plain one")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # by strides of 0
            raise InputError(f"{path}: {name} has more elements than the file holds for it")
