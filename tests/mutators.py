"""Ways to damage a file, for test_mutations.py.

  damage              a file, in the way that suits its name
  damage_bytes        any bytes
  damage_json         values, keys and lists become odd ones
  damage_pickle       what torch.save writes: the objects in it, its parts, its bytes
  damage_safetensors  the header, or a tensor
  damage_rows ...     a line of .jsonl, a cell of .csv, a table of .parquet

Each takes `draw`, a random.Random, and returns the damaged content. The same `draw` does the same damage.
"""
import copy
import gzip
import io
import json
import math
import os
import struct
import warnings
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch

# Parts of a file that are damaged more often, because more depends on them.
TELLING = {"tokenizer.json": ["model", "added_tokens"],
           "train_state.pt": ["settings", "student", "optimizer"]}


def damage(draw, path):
    path.write_bytes(damaged(draw, path.name, path.read_bytes()))


def damaged(draw, name, content):
    base, _, ending = name.rpartition(".")
    if draw.random() < 0.25:
        return damage_bytes(draw, content)
    if ending == "gz":
        return gzip.compress(damaged(draw, base, gzip.decompress(content)), mtime=0)
    within = draw.choice([None, *TELLING.get(name, [])])
    if ending == "json":
        return damage_json(draw, content, within)
    if name in ("pytorch_model.bin", "train_state.pt"):
        return damage_pickle(draw, content, within)
    ways = {"safetensors": damage_safetensors, "jsonl": damage_rows, "parquet": damage_table,
            "csv": damage_cells}
    return ways.get(ending, damage_bytes)(draw, content)


# ------------------------------------------------------------------------------------ bytes
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
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        way = draw.choice(["flip a bit", *WAYS])  # the least damage most often
        start = draw.randint(0, len(content))
        end = min(len(content), start + draw.choice([1, 2, 8, 64, 1000]))
        content = WAYS[way](content, start, end, draw.choice(PIECES))
    return content


# ------------------------------------------------------------------------------------ trees: JSON, pickles
RAW = {  # what json.dumps cannot write: it writes the name, which is then replaced
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


def damage_json(draw, content, within=None):
    """`within`: a key at the top, the only place where something is changed."""
    text = json.dumps(damage_tree(draw, json.loads(content), odd_json, within))
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    start = draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b" \n", b"\0"]) if draw.random() < 0.05 else b""
    return start + text.encode()


def damage_tree(draw, tree, odd, within=None):
    """Change a tree of dicts and lists, once to three times. odd(draw, value): a different value for one."""
    if within in tree:
        tree[within] = damage_tree(draw, tree[within], odd)
        return tree
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if not isinstance(tree, (dict, list)) or not tree or draw.random() < 0.02:
            tree = odd(draw, tree)
            continue

        node, key = somewhere(draw, tree)
        other, other_key = draw.choice([somewhere(draw, tree), somewhere(draw, node)])
        way = draw.choice(["set", "set", "set", "copy", "exchange", "delete", "rename", "repeat"])
        value = odd(draw, node[key])
        if way == "delete":
            del node[key]
        elif way == "copy":
            node[key] = copy.deepcopy(other[other_key])  # the same object could make a cycle
        elif way == "exchange" and node is other:
            node[key], node[other_key] = node[other_key], node[key]
        elif way == "rename" and isinstance(node, dict):
            node[odd_name(draw, key)] = node.pop(key)
        elif way == "repeat" and isinstance(node, list):
            node.insert(draw.randint(0, len(node)), node[key])
        else:
            node[key] = value
    return tree


def somewhere(draw, tree):
    """A (dict or list, key) of a tree, found by walking down. If all entries had the same chance, the
    thousand entries of a vocabulary would hide the settings beside it."""
    node = tree
    while True:
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        below = node[key]
        if not isinstance(below, (dict, list)) or not below or draw.random() < 0.2:
            return node, key
        node = below


def odd_name(draw, name):
    return draw.choice([*NAMES, f"{name}x", f"{name}"[:-1]])


def odd_json(draw, old):
    """A value for JSON: an odd one, or one close to the old one."""
    if type(old) in (int, float) and math.isfinite(old) and draw.random() < 0.4:
        return draw.choice([old + 1, old - 1, -old, old * 2, old // 2, float(old), str(old), [old]])
    if isinstance(old, str) and draw.random() < 0.4:
        at = draw.randint(0, len(old))
        letter = draw.choice("a\u00e9 \n\ud800/.")
        return draw.choice([old[:at], old + " ", old[:at] + letter + old[at:], [old]])
    return copy.deepcopy(draw.choice(ODD))  # what is damaged next may be inside it


# ------------------------------------------------------------------------------------ tensors
FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
OTHERS = (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)
DENSE = [  # what safetensors can hold, too
    lambda draw, x: x.to(draw.choice(FLOATS)),
    lambda draw, x: x.to(draw.choice(OTHERS)),
    lambda draw, x: x.flatten(),
    lambda draw, x: x[None],
    lambda draw, x: x.reshape(x.shape[::-1]),
    lambda draw, x: torch.zeros(()),
    lambda draw, x: torch.zeros(0),
    lambda draw, x: x.flatten()[:-1],
    lambda draw, x: torch.cat([x.flatten(), torch.zeros(1)]),
    lambda draw, x: x.float() * draw.choice([math.nan, math.inf, 1e38, 1e20, 0.0, -1.0]),
    lambda draw, x: x.float().masked_fill(torch.arange(x.numel()).view(x.shape) == 0, math.nan),
]
STRANGE = [
    lambda draw, x: x.to("meta"),
    lambda draw, x: x.to_sparse(),
    lambda draw, x: x.view(1, -1).to_sparse_csr(),
    lambda draw, x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    lambda draw, x: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda draw, x: torch.nn.Parameter(x.float()),
    lambda draw, x: torch.ones(1).expand(x.shape),
    lambda draw, x: torch.ones(x.numel() + 9).as_strided(x.shape, [1] * x.dim()),
    lambda draw, x: x.to(torch.complex64).conj(),
    lambda draw, x: x.tolist(),
    lambda draw, x: bytes(100),
    lambda draw, x: x.shape,
    lambda draw, x: x.dtype,
]


def odd_object(draw, old):
    """A value in a pickle of tensors."""
    if isinstance(old, torch.Tensor) and draw.random() < 0.8:
        try:
            return draw.choice(DENSE + STRANGE)(draw, old.detach())
        except (RuntimeError, NotImplementedError):  # not every kind can be made of every other
            return torch.empty(3, device="meta")
    return torch.ones(2) if draw.random() < 0.1 else odd_json(draw, old)


class Payload:
    """Unpickled without care, it makes a folder called EXECUTED."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


def saved(value, legacy=False):
    """torch.save, as bytes; `legacy` as before 2020, without an archive."""
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def damage_pickle(draw, content, within=None):
    """Different objects in it, sometimes code; or its bytes; or the parts of its archive."""
    value = torch.load(io.BytesIO(content), weights_only=True)
    legacy = draw.random() < 0.3
    if draw.random() < 0.4:
        if legacy or draw.random() < 0.5:
            return damage_bytes(draw, saved(value, legacy))
        return damage_zip(draw, saved(value))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse and nested tensors are called experimental
        try:
            value = damage_tree(draw, value, odd_object, within)
            if draw.random() < 0.03:
                value = draw.choice([Payload(), {"x": Payload()}, [value, Payload()]])
            return saved(value, legacy)
        except (RuntimeError, NotImplementedError, AttributeError):  # not all that is odd can be saved
            return saved(["odd"], legacy)


def damage_zip(draw, content):
    """One part of an archive is damaged, missing, there twice or renamed, or all parts are compressed."""
    before = zipfile.ZipFile(io.BytesIO(content))
    names = before.namelist()
    pickled = next(name for name in names if name.endswith(".pkl"))
    chosen = draw.choice([pickled, draw.choice(names)])
    way = draw.choice(["damage", "damage", "damage", "drop", "twice", "pack", "rename"])
    new = damage_bytes(draw, before.read(chosen))

    packing = zipfile.ZIP_DEFLATED if way == "pack" else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", packing) as after:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name in names:
            is_chosen = name == chosen
            if not (is_chosen and way in ("damage", "drop")):
                after.writestr(name + "x" if is_chosen and way == "rename" else name, before.read(name))
            if is_chosen and way in ("damage", "twice"):
                after.writestr(name, new)
    return buffer.getvalue()


def damage_safetensors(draw, content):
    """The header or a tensor. In front are 8 bytes with the header's length, then comes JSON, such as
    {"wte.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, and then the data."""
    if draw.random() < 0.4:
        tensors = safetensors.torch.load(content)
        name = draw.choice(list(tensors))
        tensor = draw.choice(DENSE)(draw, tensors.pop(name)).contiguous()
        if draw.random() < 0.3:
            name = odd_name(draw, name).replace("\ud800", "\u2028")  # which UTF-8 cannot hold
        return safetensors.torch.save(tensors | {name: tensor})

    length, = struct.unpack("<Q", content[:8])
    header = damage_json(draw, content[8:8 + length])
    if draw.random() < 0.1:
        dtype = draw.choice(["F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64"])
        header = header.replace(b'"F32"', f'"{dtype}"'.encode(), draw.choice([1, -1]))
    stated = len(header)
    if draw.random() < 0.05:
        stated = draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(content)])
    return struct.pack("<Q", stated) + header + content[8 + length:]


# ------------------------------------------------------------------------------------ rows
def damage_rows(draw, content):
    """One line of .jsonl."""
    lines = content.splitlines(keepends=True)
    i = draw.randrange(len(lines))
    lines[i] = damage_json(draw, lines[i]) + b"\n"
    return b"".join(lines)


def damage_cells(draw, content):
    """One cell of .csv."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    row = draw.choice(rows)
    row[draw.randrange(len(row))] = draw.choice(
        ["nan", "inf", "-1", "1e400", "", "2.5", "1_0", "\u0662", '"', "9" * 400])
    return "\n".join(map(",".join, rows)).encode()


COLUMNS = [
    lambda texts: pa.array([*texts, None]).dictionary_encode(),
    lambda texts: pa.array(texts, pa.large_string()),
    lambda texts: pa.array(["a" * 10**6] * 40),
    lambda texts: pa.array([], pa.string()),
    lambda texts: pa.array([None, None]),
    lambda texts: pa.array([b"\xff", b"a"]),
    lambda texts: pa.array([1, None]),
    lambda texts: pa.array([["a"], None]),
    lambda texts: pa.array([{"text": "a"}]),
    lambda texts: pa.array([2**62], pa.timestamp("us")),  # later than Python's dates
]


def damage_table(draw, content):
    """Another table: a different kind of column, name or compression."""
    texts = pq.read_table(io.BytesIO(content))["text"].to_pylist()
    column = draw.choice(COLUMNS)(texts)
    name = draw.choice(["text", "text", "text", "", "text.text", "two\nlines"])
    packing = draw.choice(["NONE", "SNAPPY", "GZIP", "ZSTD"])
    buffer = io.BytesIO()
    pq.write_table(pa.table([column], [name]), buffer, compression=packing)
    return damage_bytes(draw, buffer.getvalue()) if draw.random() < 0.3 else buffer.getvalue()
