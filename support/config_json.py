"""config.json: what an untrusted file says about a model, checked value by value.

  read_config_json   the file as a dictionary, with one form of the rotary settings
  check_value        type and range of one value; the table of them is FIELDS in model.py
"""
import json

from support.cli import InputError

ROTARY_NAMES = {  # transformers 5's name: the Hub's files' name
    "partial_rotary_factor": "rotary_pct",
    "rope_theta": "rotary_emb_base",
    "type": "rope_type",
}


def read_config_json(path):
    """config.json -> dict, in which rotary settings have the names of the Hub's files.

    transformers 5 groups them:
    {"rope_parameters": {"rope_theta": 10000.0}} -> {"rope_parameters": ..., "rotary_emb_base": 10000.0}
    """
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} describes no model: {error}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} describes no model: it holds no JSON object")

    rotary = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rotary, dict):
        raise InputError(f"{path}: rotary settings {rotary!r:.50} are no JSON object")
    return raw | {ROTARY_NAMES.get(name, name): value for name, value in rotary.items()}


def check_value(where, value, kind, low=None, high=None):
    """InputError if `value` is not of `kind`, or not from `low` to `high`.

    JSON's types are not Python's: True is an int there, 2.0 is no number of heads, and NaN is no number at
    all although json.loads reads it. kind "ids": one token id, a list of them, or null.
    """
    if kind == "ids":
        ids = value if isinstance(value, list) else [value]
        if not all(item is None or type(item) is int and low <= item <= high for item in ids):
            raise InputError(f"{where} {value!r:.50}: must be a token id, a list of them, or null")
        return

    types = (int, float) if kind is float else (kind,)
    if type(value) not in types:
        raise InputError(f"{where} {value!r:.50}: must be of type {kind.__name__}")
    if low is not None and not low <= value <= high:  # false for NaN, too
        raise InputError(f"{where} {value!r:.50}: must be from {low:g} to {high:g}")
