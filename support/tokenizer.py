"""Text -> token ids -> text: byte-level BPE, from the files of GPT-2 and GPT-NeoX into tiktoken.

Read in this order:
  Tokenizer           encode, decode, save
  apply_merges        BPE itself; `ordinary_tokens` finds the tokens that it can make
  check_form          refuses files that would give other ids in Hugging Face's own library
  load_tokenizer      the tokenizer of a model: tokenizer.json, or the older vocab.json and merges.txt
  shared_vocabulary   whether teacher and student mean the same by their ids, and up to which id

A tokenizer.json holds a vocabulary in which each character stands for a byte ("Ġthe" is " the"), the list of
merges, and added tokens. tiktoken gives the same ids as Hugging Face's library, several times as fast.

Byte-level BPE: Radford et al. 2019 (GPT-2). GPT-NeoX's form of it: Black et al. 2022 (arXiv 2204.06745).
"""
import hashlib
import itertools
import json
import math
import re
import unicodedata
from pathlib import Path

import numpy as np

from support.cli import reading
from support.files import replaced
from support.hub import fetch, need, read_json

EOT = "<|endoftext|>"

# How GPT-2 cuts text into words before it merges bytes: no token crosses a cut. {S} is whitespace. The last
# two alternatives are a run of whitespace without its last character (which leads the next word), and a
# single whitespace character.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|(?:{S}(?!\S))++|\s"
MAX_RUN = 24 * 2**13  # of whitespace: tiktoken fails on a million; 24 spaces are GPT-NeoX's longest token

# GPT-2's character for each byte, because vocabulary files hold text: {"!": 33, ..., "Ġ": 32, ...}.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}
NEVER_IN_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 does not use; GPT-NeoX lacks them

# What a model's tokenizer_config.json says beyond ids; `save` passes it on.
KEPT = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
        "additional_special_tokens", "extra_special_tokens", "chat_template", "padding_side",
        "truncation_side")


def word_pattern(n_spaces):
    """The pattern for a tokenizer with tokens for runs of n_spaces + 1, ..., 2 spaces.

    GPT-NeoX has such tokens, up to 24 spaces. The longest run is matched first, before all other
    alternatives, so what those take for whitespace must not begin a run.
    """
    if not n_spaces:
        return WORDS.replace("{S}", r"\s")
    return f" {{2,{n_spaces + 1}}}|" + WORDS.replace("{S}", r"(?: (?! )|[^\S ])")


def entry_bytes(text):
    """The bytes of an entry of a vocabulary: "Ġthe" -> b" the". An entry with other characters is text."""
    if set(text) <= BYTES.keys():
        return bytes(BYTES[character] for character in text)
    return text.encode()


class Tokenizer:
    """Byte-level BPE, from the bytes of a tokenizer.json. ValueError says why a file is not supported.

      eot                the id of <|endoftext|>
      vocab_size         the highest id + 1
      special            {"<|endoftext|>": id, ...}: tokens that ordinary text never makes
      fingerprint        equal for tokenizers with equal ids, however their files are laid out
      settings           from the model's tokenizer_config.json, such as its pad token; `save` keeps them
    """

    def __init__(self, source, settings=None):
        import tiktoken
        self.source = source
        self.settings = settings or {}
        self.spec = json.loads(source.decode("utf-8"))
        vocab = self.spec["model"]["vocab"]
        self.nfc = check_form(self.spec)
        added, self.special = added_tokens(vocab, self.spec["added_tokens"])
        self.eot = self.special[EOT]

        # The tokens that text is made of. Other entries of the vocabulary have ids that no text gets.
        made = ordinary_tokens(self.spec["model"])
        if both := made & added.keys():
            raise ValueError(f"added token {min(both)!r:.60} is also an ordinary token")
        words = {entry_bytes(text): vocab[text] for text in made}
        spaces = {text.encode(): i for text, i in added.items() if text not in self.special}
        unused = {vocab[text]: entry_bytes(text) for text in vocab.keys() - made - added.keys()}

        # tiktoken has no merges: it joins the neighbours whose bytes together have the lowest rank. Ids serve
        # as ranks, because `ordinary_tokens` has checked that they are in the order of the merges.
        self.ranks = words | spaces
        self.n_spaces = len(spaces)
        self.bpe = tiktoken.Encoding(
            "BPE", pat_str=word_pattern(self.n_spaces), mergeable_ranks=self.ranks,
            special_tokens={EOT: self.eot})  # never used, but without one tiktoken is slow

        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.bytes = {i: text for text, i in [*words.items(), *spaces.items()]} | unused
        self.bytes |= {i: text.encode() for text, i in self.special.items()}
        self.vocab_size = max(self.bytes) + 1

        # Corpora on disk are named by the fingerprint: it must never change for an existing tokenizer.
        decisive = [sorted((i, text.hex()) for i, text in self.bytes.items()), sorted(self.special), self.nfc]
        if unused:
            decisive.append(sorted(unused))
        self.fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16]

    def encode(self, text, allow_special=False):
        """Ids of a text. "<|endoftext|>" in it is ordinary characters, or with `allow_special` the token."""
        pieces = self.special_pattern.split(text) if allow_special else [text]
        ids = []
        for i, piece in enumerate(pieces):
            # Splitting by a pattern with a group gives text, special, text, ...
            ids.extend([self.special[piece]] if i % 2 else self.encode_array(piece).tolist())
        return ids

    def encode_array(self, text):
        """Ids of a text, uint32, none of them special. Other Python threads can run meanwhile."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is not text
        if self.nfc:
            text = unicodedata.normalize("NFC", text)

        cuts = []
        if len(text) > MAX_RUN:
            for run in re.finditer(r"\s+", text):
                cuts.extend(range(run.start() + MAX_RUN, run.end(), MAX_RUN))
        pieces = [text[start:end] for start, end in itertools.pairwise([0, *cuts, None])]
        return np.concatenate([self.bpe.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def decode_bytes(self, ids):
        """Bytes of some ids. An id that only pads a model's vocabulary has none."""
        return b"".join(self.bytes.get(int(i), b"") for i in ids)

    def decode(self, ids):
        """Text of some ids. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder, max_length=None):
        """Write what transformers' AutoTokenizer needs to give the same ids. `max_length`: the context."""
        config = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT, **self.settings}
        config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Without this, transformers 4 also makes token_type_ids. GPT-2 would add their embeddings to
            # those of the tokens, which makes the text worse without a warning; GPT-NeoX refuses them.
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        if max_length:
            config["model_max_length"] = max_length

        files = {"tokenizer.json": self.source.decode(),
                 "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
        if not self.nfc and not self.n_spaces:  # of GPT-2's form
            files |= old_files(self.spec["model"], self.special)
        for filename, content in files.items():
            with replaced(Path(folder, filename)) as file:
                file.write_bytes(content.encode())


# ------------------------------------------------------------------------------------ BPE
def apply_merges(word, ranks):
    """BPE: join the two neighbours whose merge comes first in the list, again and again, from the left.

    ("hello", {("l", "l"): 0, ("h", "e"): 1, ("he", "ll"): 2}) -> ["hell", "o"] and 2, the last merge's rank
    """
    parts = list(word)
    last = -1
    while len(parts) > 1:
        found = [ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        if min(found) == math.inf:
            break
        last = min(found)
        i = found.index(last)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts, last


def ordinary_tokens(model):
    """The entries of a vocabulary that texts are made of: single bytes, and what merges make of the
    characters of an entry alone.

    An entry that stays in parts on its own is not made inside a longer word either. Given only these entries,
    in the order of their last merges, tiktoken finds the same tokens without merges
    (test_random_merges_give_the_ids_of_the_reference_or_are_refused).
    """
    ranks = {}
    for rank, merge in enumerate(model["merges"]):
        first, second = merge.split(" ") if isinstance(merge, str) else merge  # older files: "Ġ t"
        ranks[first, second] = rank  # if a pair is there twice the later one counts, as in the library

    last_merges = {}
    for text in {first + second for first, second in ranks}:
        parts, last = apply_merges(text, ranks)
        if parts == [text] and set(text) <= BYTES.keys():
            last_merges[text] = last
    words = sorted(last_merges, key=last_merges.get)
    if words != sorted(words, key=model["vocab"].__getitem__):
        raise ValueError("ids in another order than the merges are not supported")

    characters = BYTES.keys() & model["vocab"].keys()
    if missing := {BYTES[character] for character in BYTES.keys() - characters} - NEVER_IN_TEXT:
        raise ValueError(f"no token for the byte {min(missing)}, so it cannot encode every text")
    return characters | set(words)


# ------------------------------------------------------------------------------------ tokenizer.json
PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
OFF = [None, False]
SUPPORTED = {  # settings of a tokenizer.json that decide ids, and their values in GPT-2's and GPT-NeoX's form
    "model": {"type": [None, "BPE"], "dropout": OFF, "ignore_merges": OFF, "byte_fallback": OFF,
              "continuing_subword_prefix": [None, ""], "end_of_word_suffix": [None, ""]},
    "normalizer": {"type": ["NFC"]},
    "pre_tokenizer": {"type": ["ByteLevel"], "add_prefix_space": [False], "use_regex": [None, True]},
    "post_processor": {"type": ["ByteLevel", "TemplateProcessing"]},
    "added token": {"lstrip": OFF, "rstrip": OFF, "single_word": OFF},
}


def steps(section, parts):
    """A section of a tokenizer.json as a list: {"type": "Sequence", parts: [a, b]} -> [a, b]; null -> []."""
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    return [step for inner in section[parts] for step in steps(inner, parts)]


def check_form(spec):
    """Whether a tokenizer.json NFC-normalises text. ValueError if its own library would give other ids."""
    found = {section: steps(spec.get(section), parts) for section, parts in PARTS.items()}
    found["model"] = [spec["model"]]
    found["added token"] = spec.setdefault("added_tokens", [])
    found["ordinary added token"] = [token for token in found["added token"] if not token["special"]]

    # GPT-NeoX has tokens for runs of 2, 3, ... spaces. The library would look first for those that are not
    # normalized, even inside a longer run.
    ordinary = {token["content"] for token in found["ordinary added token"]}
    runs = [" " * n for n in range(2, len(ordinary) + 2)]
    supported = SUPPORTED | {"ordinary added token": {"content": runs, "normalized": [True]}}
    for section, settings in supported.items():
        for part, (key, values) in itertools.product(found[section], settings.items()):
            value = part.get(key)
            if value not in values:
                raise ValueError(f"{section} with {key} {value!r:.60} is not supported, only {values}")
    if len(found["pre_tokenizer"]) != 1:
        raise ValueError(f"a pre_tokenizer of {len(found['pre_tokenizer'])} steps is not supported")

    # A template puts special tokens around a text, which has to come through once and unchanged.
    for step in found["post_processor"]:
        texts = [piece for piece in step.get("single", []) if "SpecialToken" not in piece]
        if step["type"] == "TemplateProcessing" and [text["Sequence"]["id"] for text in texts] != ["A"]:
            raise ValueError("a TemplateProcessing that changes plain text is not supported")
    return bool(found["normalizer"])


def added_tokens(vocab, added):
    """Ids of all added tokens, and of the special ones: {"<|endoftext|>": 0, "  ": 50276, ...}.

    The library ignores their ids in the file. A text that is in the vocabulary has its id there; others are
    numbered from the vocabulary's size on, even if it has those ids itself.
    """
    ids = dict(vocab)
    for token in added:
        expected = ids.setdefault(token["content"], len(ids))
        if token["id"] != expected:
            raise ValueError(f"added token {token['content']!r:.60} has id {token['id']!r:.40}, but the "
                             f"tokenizers library reads {expected}")
    values = list(ids.values())
    if {*map(type, values)} != {int} or min(values) < 0 or len(set(values)) < len(values):
        raise ValueError("ids of tokens are not whole numbers from 0 on, each of them once")

    special = {token["content"]: ids[token["content"]] for token in added if token["special"]}
    if EOT not in special or "" in special:
        raise ValueError(f"no special token {EOT}, which separates documents, or an empty one")
    return {token["content"]: ids[token["content"]] for token in added}, special


# ------------------------------------------------------------------------------------ tokenizers of models
def load_tokenizer(name_or_dir):
    """Tokenizer of a model, given its folder or its name on the Hub."""
    path, vocab, merges, template, *others = fetch(
        name_or_dir, "tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja",
        "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
    added, named, config = [read_json(other) if other else {} for other in others]
    settings = kept_settings(named | config)
    if template:
        with reading(template, "a chat template"):
            settings["chat_template"] = template.read_text(encoding="utf-8")

    if path or not (vocab and merges):
        path = path or need(name_or_dir, "tokenizer.json")
        with reading(path, "a tokenizer of the form of GPT-2 or GPT-NeoX"):
            return Tokenizer(path.read_bytes(), settings)
    with reading(vocab, "a vocabulary with merges.txt beside it"):
        lines = merges.read_text(encoding="utf-8").split("\n")
        spec = spec_of_old_files(read_json(vocab), lines, added, settings,
                                 config.get("add_prefix_space", False))
        return Tokenizer(json.dumps(spec).encode(), settings)


def kept_settings(config):
    """What `save` passes on, as strings and lists of strings.

    {"pad_token": {"content": "[PAD]", "lstrip": false}, "auto_map": ...} -> {"pad_token": "[PAD]"}
    """
    settings = {}
    for name in KEPT:
        value = config.get(name)
        tokens = value if isinstance(value, list) else [value]
        texts = [token.get("content") if isinstance(token, dict) else token for token in tokens]
        if all(isinstance(text, str) for text in texts):
            name = name.replace("extra_", "additional_")  # transformers 5's name, on which 4 fails
            settings[name] = texts if isinstance(value, list) else texts[0]
    return settings


def spec_of_old_files(vocab, lines, added, settings, add_prefix_space):
    """The content of tokenizer.json that means the same as GPT-2's first files.

    vocab, lines      {"!": 0, ...} of vocab.json; ["#version: 0.2", "Ġ t", ...] of merges.txt
    added, settings   {"[PAD]": 50257} of added_tokens.json; {"pad_token": "[PAD]"}
    """
    named = [value if isinstance(value, list) else [value] for value in settings.values()]
    special = {EOT}.union(*named)
    ids = {EOT: vocab[EOT], **added} if EOT in vocab else added
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [{"id": ids[text], "content": text, "special": text in special, **flags}
              for text in sorted(ids, key=ids.get)]

    byte_level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True}
    merges = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def old_files(model, special):
    """The inverse of spec_of_old_files, for the slow tokenizers of transformers 4: {name: content}."""
    vocab = model["vocab"] | {EOT: special[EOT]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    files = {"vocab.json": json.dumps(vocab), "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}
    if more := {text: i for text, i in special.items() if text not in vocab}:
        files["added_tokens.json"] = json.dumps(more)
    return files


def shared_vocabulary(a, b):
    """How many ids, from 0, mean the same in two tokenizers; 0 if their models cannot be compared.

    They can be if both tokenizers give the same ids to every text and to <|endoftext|>. Other special tokens
    may differ if their ids are higher: GPT-2 and GPT-2 with [PAD] share 50257 ids.
    """
    if (a.ranks, a.n_spaces, a.nfc) != (b.ranks, b.n_spaces, b.nfc):
        return 0
    differing = [i for i in a.bytes.keys() | b.bytes.keys() if a.bytes.get(i) != b.bytes.get(i)]
    shared = min([a.vocab_size, b.vocab_size, *differing])
    return shared if shared > max(a.eot, *a.ranks.values()) else 0
