"""Ways to damage a file, for test_mutations.py: bytes, JSON, tensors, pickles, archives.

  damage_bytes                        any file
  damage_json                         values, keys and lists of a JSON file become odd ones
  damage_pickle, damage_zip           what torch.save writes: the objects in it, its parts
  damage_safetensors                  the header, most of the time
  odd_tensor                          a tensor of another kind in place of one

Each takes `draw`, a random.Random, and with the same one does the same. What damages returns what it made and
a recipe, a few words for people.
"""
import copy
import io
import json
import math
import os
import struct
import warnings
import zipfile

import torch

# --- Bytes ------------------------------------------------------------------------------------------------

PIECES = [
    b"\0", b"\xff", b"\x80", b"\x7f\xff\xff\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80",
    b"\xe2\x80\xa8", b"\n", b"\r\n", b"\r", b",", b'"', b"{", b"-", b"0", b"#version", b"9" * 400,
    b"[" * 50_000, b" " * 100_000]
WAYS = {  # of damaging content: with its part from a to b, and a piece that is foreign to it
    "cut off": lambda content, a, b, piece: content[:a],
    "flip a bit": lambda content, a, b, piece: content[:a] + flipped(content[a:a + 1], b) + content[a + 1:],
    "delete": lambda content, a, b, piece: content[:a] + content[b:],
    "repeat": lambda content, a, b, piece: content[:b] + content[a:b] * 3 + content[b:],
    "insert": lambda content, a, b, piece: content[:a] + piece + content[a:],
    "overwrite": lambda content, a, b, piece: content[:a] + piece[:b - a] + content[a + len(piece[:b - a]):],
    "turn around": lambda content, a, b, piece: content[b:] + content[:a],
}


def flipped(byte, n):
    return bytes(value ^ 1 << n % 8 for value in byte)


def damage_bytes(draw, content):
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        way = draw.choice(["flip a bit", *WAYS])
        start = draw.randint(0, len(content))
        end = min(len(content), start + draw.choice([1, 2, 8, 64, 1000]))
        piece = draw.choice(PIECES)
        content = WAYS[way](content, start, end, piece)
        done.append(f"{way} at {start} to {end}, {piece[:12]!r}")
    return content, "; ".join(done)


# --- Trees of dicts and lists -----------------------------------------------------------------------------

# What json.dumps cannot write stands as a name until it has written the rest.
RAW = {
    "<1e400>": "1e400",
    "<5000 digits>": "1" * 5000,
    **{f"<{n} lists>": "[" * n + "]" * n for n in (50, 900, 960, 980, 990, 1000, 5000, 100_000)},
    **{f"<{n} objects>": '{"a":' * n + "1" + "}" * n for n in (900, 960, 990, 5000)},
}
ODD = [
    None, True, False, *RAW, [], [[]], [0], [None], [1, "a"], {}, {"": {}}, {"type": "Sequence"},
    -1, 0, 1, 2, 3, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30,
    0.5, -0.0, 2.0, 1e-300, 1e300, math.nan, math.inf, -math.inf,
    "", " ", "0", "a", "gelu", "NaN", "x" * 100_000, "../x", "/etc/passwd", "two\nlines", "\ud800", "\x00",
    "\u2028", "\ufeff"]
NAMES = ["", "x", "two\nlines", "\ud800", "\u0120\u0120", "a" * 2000]


def somewhere(draw, tree):
    """A (dict or list, key) of a tree. It is found by walking down: by number, the thousand entries of a
    vocabulary would hide the settings beside it."""
    node = tree
    while True:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        below = node[key]
        if not isinstance(below, (dict, list)) or not below or draw.random() < 0.2:
            return node, key
        node = below


def damage_tree(draw, tree, odd):
    """Change a tree in place, once to three times. `odd(draw, value)` gives another value for one."""
    done = []
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if not isinstance(tree, (dict, list)) or not tree or draw.random() < 0.02:
            tree = odd(draw, tree)
            done.append(f"all of it = {tree!r:.60}")
            continue

        node, key = somewhere(draw, tree)
        other, other_key = draw.choice([somewhere(draw, tree), somewhere(draw, node)])
        way = draw.choice(["set", "set", "set", "copy", "exchange", "delete", "rename", "repeat"])
        value = odd(draw, node[key])
        if way == "delete":
            del node[key]
        elif way == "copy":
            node[key] = copy.deepcopy(other[other_key])  # not the same one, which could make a cycle
        elif way == "exchange" and node is other:
            node[key], node[other_key] = node[other_key], node[key]
        elif way == "rename" and isinstance(node, dict):
            node[odd_name(draw, key)] = node.pop(key)
        elif way == "repeat" and isinstance(node, list):
            node.insert(draw.randint(0, len(node)), node[key])
        else:
            node[key] = value
        done.append(f"{way} {key!r:.40}, {other_key!r:.40}, {value!r:.60}")
    return tree, "; ".join(done)


def odd_name(draw, name):
    return draw.choice([*NAMES, f"{name}x", f"{name}"[:-1]])


def odd_json(draw, old):
    """A value for JSON: an odd one, or one near the old."""
    if type(old) in (int, float) and math.isfinite(old) and draw.random() < 0.4:
        return draw.choice([old + 1, old - 1, -old, old * 2, old // 2, float(old), str(old), [old]])
    if isinstance(old, str) and draw.random() < 0.4:
        at = draw.randint(0, len(old))
        letter = draw.choice("a\u00e9 \n\ud800/.")
        return draw.choice([old[:at], old + " ", old[:at] + letter + old[at:], [old]])
    return draw.choice(ODD)


def damage_json(draw, content, within=None):
    """A JSON file: as a tree, or once in four as bytes. `within`: a key at its top, the only place where
    something is changed."""
    tree = json.loads(content)
    if within:
        tree[within], recipe = damage_tree(draw, tree[within], odd_json)
    elif draw.random() < 0.25:
        return damage_bytes(draw, content)
    else:
        tree, recipe = damage_tree(draw, tree, odd_json)
    text = json.dumps(tree)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)

    mark = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b" \n", b"\0"]) if draw.random() < 0.05 else b""
    return mark + text.encode(), f"{recipe}; starts with {mark!r}"


# --- Tensors ----------------------------------------------------------------------------------------------

FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e8m0fnu)
OTHERS = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)
DENSE = {  # what safetensors can hold, too
    "another float": lambda draw, x: x.to(draw.choice(FLOATS)),
    "no float": lambda draw, x: x.to(draw.choice(OTHERS)),
    "flat": lambda draw, x: x.flatten(),
    "wrapped": lambda draw, x: x[None],
    "transposed": lambda draw, x: x.reshape(x.shape[::-1]),
    "a scalar": lambda draw, x: torch.zeros(()),
    "empty": lambda draw, x: torch.zeros(0),
    "shorter": lambda draw, x: x.flatten()[:-1],
    "longer": lambda draw, x: torch.cat([x.flatten(), torch.zeros(1)]),
    "scaled": lambda draw, x: x.float() * draw.choice([math.nan, math.inf, 1e38, 1e20, 0.0, -1.0]),
    "one NaN": lambda draw, x: x.float().masked_fill(torch.arange(x.numel()).view(x.shape) == 0, math.nan),
}
STRANGE = {
    "meta": lambda draw, x: x.to("meta"),
    "sparse": lambda draw, x: x.to_sparse(),
    "compressed": lambda draw, x: x.view(1, -1).to_sparse_csr(),
    "quantised": lambda draw, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda draw, x: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "a parameter": lambda draw, x: torch.nn.Parameter(x.float()),
    "expanded": lambda draw, x: torch.ones(1).expand(x.shape),
    "overlapping": lambda draw, x: torch.ones(x.numel() + 9).as_strided(x.shape, [1] * x.dim()),
    "conjugated": lambda draw, x: x.to(torch.complex64).conj(),
    "a list": lambda draw, x: x.tolist(),
    "bytes": lambda draw, x: bytes(100),
    "its size": lambda draw, x: x.shape,
    "its dtype": lambda draw, x: x.dtype,
}


def odd_tensor(draw, tensor, makers=DENSE):
    return makers[draw.choice(list(makers))](draw, tensor)


def odd_object(draw, old):
    """A value in a pickle of tensors."""
    if isinstance(old, torch.Tensor) and draw.random() < 0.8:
        try:
            return odd_tensor(draw, old.detach(), DENSE | STRANGE)
        except (RuntimeError, NotImplementedError):  # not every kind can be made of every other
            return torch.empty(3, device="meta")
    return torch.ones(2) if draw.random() < 0.1 else odd_json(draw, old)


# --- Files of tensors -------------------------------------------------------------------------------------

class Payload:
    """Unpickled without care it makes a folder called EXECUTED."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def saved(value, legacy=False):
    """torch.save, as bytes; `legacy` as before 2020, without an archive."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def damage_pickle(draw, value, legacy=False, within=None):
    """A file of torch.save: another tree, now and then with code in it; `within` as in damage_json."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse and nested tensors are called experimental
        if within:
            value[within], recipe = damage_tree(draw, value[within], odd_object)
        else:
            value, recipe = damage_tree(draw, value, odd_object)
        if draw.random() < 0.03:
            value = draw.choice([Payload(), {"x": Payload()}, [value, Payload()]])
            recipe = "with code"
        try:
            return saved(value, legacy), recipe
        except (RuntimeError, NotImplementedError, AttributeError):  # not all that is odd can be saved
            return saved([recipe], legacy), f"a list in place of: {recipe}"


def damage_zip(draw, content):
    """An archive, as torch.save writes: one of its parts is damaged, goes, comes twice, gets another name, or
    all are packed."""
    before = zipfile.ZipFile(io.BytesIO(content))
    names = before.namelist()
    pickled = next(name for name in names if name.endswith(".pkl"))
    chosen = draw.choice([pickled, draw.choice(names)])
    way = draw.choice(["damage", "damage", "damage", "drop", "twice", "pack", "rename"])
    damaged, recipe = damage_bytes(draw, before.read(chosen))

    packing = zipfile.ZIP_DEFLATED if way == "pack" else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", packing) as after:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name in names:
            is_chosen = name == chosen
            if not (is_chosen and way in ("damage", "drop")):
                after.writestr(name + "x" if is_chosen and way == "rename" else name, before.read(name))
            if is_chosen and way in ("damage", "twice"):
                after.writestr(name, damaged)
    return buffer.getvalue(), f"{way} {chosen}: {recipe}"


DTYPES = ["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64"]


def damage_safetensors(draw, content):
    """The header, or once in three any bytes. In front are 8 bytes of its length, then comes JSON, such as
    {"wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, and then the data."""
    if draw.random() < 0.3:
        return damage_bytes(draw, content)
    length, = struct.unpack("<Q", content[:8])
    header, recipe = damage_json(draw, content[8:8 + length])
    if draw.random() < 0.1:
        dtype = draw.choice(DTYPES)
        header = header.replace(b'"F32"', f'"{dtype}"'.encode(), draw.choice([1, -1]))
        recipe += f"; {dtype}"

    stated = len(header)
    if draw.random() < 0.05:
        stated = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(content)])
        recipe += f"; a header of {stated} bytes"
    return struct.pack("<Q", stated) + header + content[8 + length:], recipe
