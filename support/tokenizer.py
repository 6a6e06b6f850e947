"""tokenizer.json -> tiktoken: one path for GPT-2, GPT-NeoX and our own.

Byte-level BPE is from Radford et al. 2019 (GPT-2), GPT-NeoX's form of it from Black et al. 2022
(arXiv 2204.06745).
"""
import hashlib
import itertools
import json
import re
import unicodedata
from pathlib import Path

import numpy as np

from support.cli import InputError
from support.hub import fetch

EOT = "<|endoftext|>"

# How GPT-2 cuts text into words before it merges bytes: no token crosses a cut. {S} is whitespace. The last
# two alternatives: a run of it without its last character, which leads the next word; a single one.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|(?:{S}(?!\S))++|\s"
MAX_RUN = 24 * 2**13  # tiktoken fails on a million of whitespace; divisible by the length of any token of it

NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that are in no UTF-8 text; GPT-NeoX has no tokens for them

READABLE = {  # what decides ids in a tokenizer.json, and the values that are implemented here
    "model.type": [None, "BPE"], "model.dropout": [None, 0], "model.ignore_merges": [None, False],
    "model.byte_fallback": [None, False], "model.continuing_subword_prefix": [None, ""],
    "model.end_of_word_suffix": [None, ""], "normalizer.type": [None, "NFC"],
    "pre_tokenizer.type": ["ByteLevel"], "pre_tokenizer.add_prefix_space": [False],
    "pre_tokenizer.use_regex": [None, True], "post_processor.type": [None, "ByteLevel"]}


def check_readable(spec, name):
    """InputError for a tokenizer.json that would not give the same ids here as in its own library."""
    for setting, values in READABLE.items():
        section, key = setting.split(".")
        if (value := (spec[section] or {}).get(key)) not in values:
            raise InputError(f"{name}: {setting} {value!r} is not implemented; {values} is")
    added, vocab = spec["added_tokens"], spec["model"]["vocab"]
    spaces = [token["content"] for token in added if not token["special"]]
    if odd := set(spaces) - {" " * n for n in range(2, len(spaces) + 2)}:
        raise InputError(f"{name}: added token {min(odd)!r} is not implemented; runs of 2, 3, ... spaces are")
    for token, flag in itertools.product(added, ("lstrip", "rstrip", "single_word")):
        if token.get(flag):
            raise InputError(f"{name}: {flag} of {token['content']!r} is not implemented")
    if EOT not in [token["content"] for token in added if token["special"]]:
        raise InputError(f"{name} has no special token {EOT}, which has to stand between documents")
    order = [vocab["".join(pair).replace(" ", "")] for pair in spec["model"]["merges"]]
    if order != sorted(order):
        raise InputError(f"{name}: ids in another order than the merges' are not implemented")
    if missing := {byte for byte, letter in byte_letters().items() if letter not in vocab} - NEVER:
        raise InputError(f"{name} has no token for the byte {min(missing)}, so it cannot encode every text")


def byte_letters():
    """GPT-2's letter for each byte, as vocabulary files hold no raw bytes: {33: '!', ..., 32: 'Ġ', ...}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """Byte-level BPE, from the bytes of a tokenizer.json. `eot`: id of <|endoftext|>; `vocab_size`: highest
    id + 1; `fingerprint`: equal for tokenizers that give equal ids, however their files are laid out."""

    def __init__(self, source, name="tokenizer.json"):
        import tiktoken
        self.source, spec = source, json.loads(source)
        check_readable(spec, name)
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
        byte_of, vocab = {letter: byte for byte, letter in byte_letters().items()}, spec["model"]["vocab"]
        words = {bytes(byte_of[c] for c in text): i for text, i in vocab.items() if text not in added}
        spaces = {text.encode(): i for text, i in added.items() if text not in self.special}
        pattern = WORDS.replace("{S}", r"\s")
        if spaces:  # GPT-NeoX: runs of 24..2 spaces, longest first, before all else; {S} starts no such run
            pattern = f" {{2,{len(spaces) + 1}}}|" + WORDS.replace("{S}", r"(?: (?! )|[^\S ])")
        self.bpe = tiktoken.Encoding(  # ranks are ids: merge order; without a special token it is slow
            name, pat_str=pattern, mergeable_ranks=words | spaces, special_tokens={EOT: added[EOT]})
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        self.nfc = spec["normalizer"] is not None
        self.bytes = {i: text for text, i in [*words.items(), *spaces.items()]}
        self.bytes |= {i: text.encode() for text, i in self.special.items()}
        self.eot, self.vocab_size = added[EOT], max(self.bytes) + 1
        decisive = [sorted((i, t.hex()) for i, t in self.bytes.items()), sorted(self.special), self.nfc]
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def encode(self, text, allow_special=False):
        """Ids of a text. "<|endoftext|>" in it is ordinary characters, or with `allow_special` the token."""
        ids = []
        for i, piece in enumerate(self.special_pattern.split(text) if allow_special else [text]):
            ids += [self.special[piece]] if i % 2 else self.encode_array(piece).tolist()
        return ids

    def encode_array(self, text):
        """Ids of a text, uint32, none of them special. Other Python threads run meanwhile."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        long_runs = re.finditer(r"\s+", text) if len(text) > MAX_RUN else ()
        cuts = [i for run in long_runs for i in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
        pieces = (text[start:end] for start, end in itertools.pairwise([0, *cuts, None]))
        return np.concatenate([self.bpe.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def decode_bytes(self, ids):
        """Bytes of some ids. An id that only pads a model's vocabulary has none."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder):
        """Write what transformers' AutoTokenizer needs to give the same ids."""
        Path(folder, "tokenizer.json").write_bytes(self.source)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOT, "eos_token": EOT,
                  "unk_token": EOT, "clean_up_tokenization_spaces": False}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_tokenizer(name_or_dir):
    """Tokenizer of a model, given its folder or its name on the Hub."""
    path = fetch(name_or_dir, "tokenizer.json")
    try:
        return Tokenizer(path.read_bytes(), f"{name_or_dir}/tokenizer.json")
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no tokenizer.json of a byte-level BPE: {error!r}") from error


def train_tokenizer(texts, vocab_size, folder):
    """Train a tokenizer of GPT-2's form into folder/tokenizer.json. Needs the `tokenizers` library."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    bpe.add_special_tokens([EOT])  # after training, so that the ids before it are the merge order
    Path(folder).mkdir(parents=True, exist_ok=True)
    bpe.save(str(Path(folder, "tokenizer.json")))
