"""Text -> token ids -> text: byte-level BPE, from the files of GPT-2 and GPT-NeoX into tiktoken.

Read in this order:
  Tokenizer           encode, decode, save
  apply_merges        BPE itself; `mergeable` says which tokens it can make
  read_spec           a tokenizer.json, checked: what would give other ids than its own library is refused
  load_tokenizer      the tokenizer of a model: tokenizer.json, or the older vocab.json and merges.txt
  shared_vocabulary   whether teacher and student mean the same by their ids, and how far
  train_tokenizer     one of GPT-2's form, from texts

A tokenizer.json holds a vocabulary in GPT-2's letters for bytes ("Ġthe" is " the"), the list of merges, and
tokens that are added from outside. tiktoken gives the same ids as its library, several times as fast.

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

from support.cli import InputError
from support.files import replaced
from support.hub import fetch, read_json

EOT = "<|endoftext|>"

# How GPT-2 cuts text into words before it merges bytes: no token crosses a cut. {S} is whitespace. The last
# two alternatives: a run of it without its last character, which leads the next word; a single one.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|(?:{S}(?!\S))++|\s"
MAX_RUN = 24 * 2**13  # tiktoken fails on a million of whitespace; 24 is GPT-NeoX's longest run

NEVER_IN_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that UTF-8 has no use for; GPT-NeoX lacks them
MOST_WORK = 2**25  # squares of the lengths of what merges make, summed up; GPT-NeoX's: 3.3 million


def word_pattern(n_spaces):
    """The pattern for a tokenizer with tokens for runs of n_spaces + 1, ..., 2 spaces.

    GPT-NeoX has such runs, up to 24. They come first, and the longest of them before all others; so what the
    other alternatives take for whitespace may not start one.
    """
    if not n_spaces:
        return WORDS.replace("{S}", r"\s")
    return f" {{2,{n_spaces + 1}}}|" + WORDS.replace("{S}", r"(?: (?! )|[^\S ])")


def byte_letters():
    """GPT-2's letter for each byte, as vocabulary files hold no raw bytes: {33: '!', ..., 32: 'Ġ', ...}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return letters


LETTER_BYTES = {letter: byte for byte, letter in byte_letters().items()}


def entry_bytes(text):
    """The bytes that an entry of a vocabulary stands for: "Ġthe" -> b" the". One in other letters is text."""
    if set(text) <= LETTER_BYTES.keys():
        return bytes(LETTER_BYTES[letter] for letter in text)
    return text.encode()


def digest(content):
    """16 letters that change when this content (of lists, numbers, texts) does."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


class Tokenizer:
    """Byte-level BPE, from the bytes of a tokenizer.json.

      eot                the id of <|endoftext|>
      vocab_size         the highest id + 1
      special            {"<|endoftext|>": id, ...}: tokens that no text makes
      fingerprint        equal for tokenizers with equal ids, however their files are laid out
      text_fingerprint   equal for tokenizers that give equal ids for every text: special ones do not count
    """

    def __init__(self, source, name="tokenizer.json"):
        import tiktoken
        self.source = source
        spec = read_spec(source, name)
        vocab = spec["model"]["vocab"]
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}

        # What texts are made of, and other entries of the vocabulary: these have an id, and no text makes it.
        made = mergeable(vocab, merge_ranks(spec, name), name)
        check_made(made, added, name)
        words = {entry_bytes(text): vocab[text] for text in made}
        spaces = {text.encode(): i for text, i in added.items() if text not in self.special}
        unused = {vocab[text]: entry_bytes(text) for text in vocab.keys() - made - added.keys()}

        # tiktoken has ranks in place of merges: it joins the neighbours whose bytes together have the lowest
        # rank. Ids serve as ranks, as `mergeable` has made sure that they are in the order of the merges.
        self.bpe = tiktoken.Encoding(
            name, pat_str=word_pattern(len(spaces)), mergeable_ranks=words | spaces,
            special_tokens={EOT: added[EOT]})  # never used, but without one tiktoken is slow
        longest_first = sorted(self.special, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.nfc = bool(spec["normalizer"])

        self.bytes = {i: text for text, i in [*words.items(), *spaces.items()]} | unused
        self.bytes |= {i: text.encode() for text, i in self.special.items()}
        self.eot = added[EOT]
        self.vocab_size = max(self.bytes) + 1
        self.last_text_id = max([*words.values(), *spaces.values()])

        # Corpora on disk are named by the fingerprint: it may never change for a tokenizer that exists.
        decisive = [sorted((i, text.hex()) for i, text in self.bytes.items()), sorted(self.special), self.nfc]
        self.fingerprint = digest(decisive + [sorted(unused)] if unused else decisive)
        ranks = sorted((i, text.hex()) for text, i in (words | spaces).items())
        self.text_fingerprint = digest([ranks, len(spaces), self.nfc])

    def encode(self, text, allow_special=False):
        """Ids of a text. "<|endoftext|>" in it is ordinary characters, or with `allow_special` the token."""
        pieces = self.special_pattern.split(text) if allow_special else [text]
        ids = []
        for i, piece in enumerate(pieces):
            if i % 2:  # split by a pattern with a group: text, special, text, ...
                ids.append(self.special[piece])
            else:
                ids.extend(self.encode_array(piece).tolist())
        return ids

    def encode_array(self, text):
        """Ids of a text, uint32, none of them special. Other Python threads run meanwhile."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text
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
        """Text of some ids. Bytes that are no UTF-8, such as half a letter, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder, max_length=None):
        """Write what transformers' AutoTokenizer needs to give the same ids. `max_length`: the context."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # transformers 4 would hand over token_type_ids, too: GPT-2 adds their embeddings to the tokens',
            # so the text gets worse without a word; GPT-NeoX refuses them.
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": EOT, "eos_token": EOT, "unk_token": EOT,
            "clean_up_tokenization_spaces": False,
        }
        if max_length:
            config["model_max_length"] = max_length

        with replaced(Path(folder, "tokenizer.json")) as file:
            file.write_bytes(self.source)
        with replaced(Path(folder, "tokenizer_config.json")) as file:
            file.write_text(json.dumps(config, indent=2) + "\n")


# ------------------------------------------------------------------------------------ BPE
def apply_merges(word, ranks):
    """BPE: join the two neighbours whose merge comes first in the list, again and again, from the left.

    ("hello", {("l", "l"): 0, ("h", "e"): 1, ("he", "ll"): 2}) -> ["hell", "o"] and 2, the last merge's rank
    """
    parts = list(word)
    last = -1
    while len(parts) > 1:
        found = [ranks.get(pair, math.inf) for pair in itertools.pairwise(parts)]
        first = min(found)
        if first == math.inf:
            break
        last = first
        i = found.index(first)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts, last


def merge_ranks(spec, name):
    """The list of merges as {("Ġ", "t"): 0, ("Ġ", "a"): 1, ...}."""
    vocab = spec["model"]["vocab"]
    ranks = {}
    for rank, merge in enumerate(spec["model"]["merges"]):
        pair = tuple(merge.split(" ") if isinstance(merge, str) else merge)  # older files: "Ġ t"
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise InputError(f"{name}: merge {merge!r:.60} is no pair of tokens that make a third one")
        ranks[pair] = rank  # of a pair that is there twice the later place counts, as in the library

    # To make a token takes time as the square of its length, and a file can hold any number of long ones.
    lengths = [len("".join(pair)) for pair in ranks]
    if sum(length**2 for length in lengths) > MOST_WORK:
        raise InputError(f"{name}: {len(lengths)} tokens of up to {max(lengths)} letters are not implemented")
    return ranks


def mergeable(vocab, ranks, name):
    """The entries of a vocabulary that texts are made of: letters, and what merges make of its own letters.

    Letters that merges join to one token alone are joined in the same way wherever they stand in a text, as
    long as nothing reaches across their two ends: what happens between these depends on nothing else. For the
    same reason an entry that stays in parts alone is never made at all, and an entry that is made has always
    the same last merge. So tiktoken, which knows no merges, finds the same tokens if it is given these alone,
    in the order of their last merges.
    """
    last_merges = {}
    for text in {"".join(pair) for pair in ranks}:
        parts, last = apply_merges(text, ranks)
        if parts == [text] and set(text) <= LETTER_BYTES.keys():
            last_merges[text] = last

    words = sorted(last_merges, key=last_merges.get)
    if any(vocab[first] > vocab[second] for first, second in itertools.pairwise(words)):
        raise InputError(f"{name}: ids in another order than the merges' are not implemented")
    return {letter for letter in LETTER_BYTES if letter in vocab} | set(words)


def check_made(made, added, name):
    """InputError if some text has no tokens, or an added token takes what is an ordinary one."""
    if missing := {byte for letter, byte in LETTER_BYTES.items() if letter not in made} - NEVER_IN_TEXT:
        raise InputError(f"{name} has no token for the byte {min(missing)}, so it cannot encode every text")
    if ordinary := made & added.keys():
        raise InputError(f"{name}: added token {min(ordinary)!r:.60} is an ordinary one, too")


# ------------------------------------------------------------------------------------ tokenizer.json
SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
SETTINGS = {  # what decides ids in a tokenizer.json, and the values that are implemented here
    "model": {
        "type": [None, "BPE"], "dropout": [None, 0], "ignore_merges": [None, False],
        "byte_fallback": [None, False], "continuing_subword_prefix": [None, ""],
        "end_of_word_suffix": [None, ""]},
    "normalizer": {"type": ["NFC"]},
    "pre_tokenizer": {"type": ["ByteLevel"], "add_prefix_space": [False], "use_regex": [None, True]},
    "post_processor": {"type": ["ByteLevel", "TemplateProcessing"]},
}


def read_spec(source, name):
    """The bytes of a tokenizer.json -> dict; InputError if it would give other ids in its own library."""
    try:
        spec = json.loads(source.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no tokenizer.json: {error!r:.99}") from error

    spec = {"added_tokens": [], **spec} if isinstance(spec, dict) else {}
    model = spec.get("model")
    kinds = {"model": dict, "added_tokens": list, "model.vocab": dict, "model.merges": list}
    found = {**spec, **{f"model.{key}": model.get(key) for key in model}} if isinstance(model, dict) else spec
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            raise InputError(f"{name} is no tokenizer.json of a byte-level BPE: {key} is no {kind.__name__}")

    check_settings(spec, name)
    check_added_tokens(spec, name)
    check_ids(spec, name)
    return spec


def steps(section, parts):
    """A section of a tokenizer.json as a list: {"type": "Sequence", parts: [a, b]} -> [a, b]; null -> []."""
    if section is None:
        return []
    if section.get("type") != "Sequence":
        return [section]
    return [step for inner in section[parts] for step in steps(inner, parts)]


def check_settings(spec, name):
    """InputError for a setting that is not implemented. A section of `spec` becomes the list of its steps."""
    for section, parts in SEQUENCES.items():
        spec[section] = steps(spec.get(section), parts)
    if len(spec["pre_tokenizer"]) != 1:
        raise InputError(f"{name}: pre_tokenizer of {len(spec['pre_tokenizer'])} steps is not implemented, "
                         "only ByteLevel")

    for section, settings in SETTINGS.items():
        for step in [spec["model"]] if section == "model" else spec[section]:
            for key, values in settings.items():
                if step.get(key) not in values:
                    raise InputError(f"{name}: {section}.{key} {step.get(key)!r:.60} is not implemented; "
                                     f"{values} is")

    # A template says where special tokens go, such as one at the start: they come with the library's
    # add_special_tokens alone. Of a plain text it must leave all ids as they are, once.
    for step in spec["post_processor"]:
        if step["type"] == "TemplateProcessing":
            pieces = [piece["Sequence"]["id"] for piece in step["single"] if "SpecialToken" not in piece]
            if pieces != ["A"]:
                raise InputError(f"{name}: a TemplateProcessing that changes plain text is not implemented")


def check_added_tokens(spec, name):
    """InputError for an added token that is neither special nor one of GPT-NeoX's runs of spaces."""
    added = spec["added_tokens"]
    for token in added:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
            raise InputError(f"{name}: added token {token!r:.60} has no text")
        if not isinstance(token.get("special"), bool):
            raise InputError(f"{name}: added token {token['content']!r:.60} is neither special nor not")
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise InputError(f"{name}: {flag} of {token['content']!r:.60} is not implemented")

    spaces = [token["content"] for token in added if not token["special"]]
    if odd := set(spaces) - {" " * n for n in range(2, len(spaces) + 2)}:
        raise InputError(f"{name}: added token {min(odd)!r:.60} is not implemented; runs of 2, 3, ... spaces "
                         "are")
    # The library looks for those that are not normalized first, even where a longer run stands.
    if len({token.get("normalized") for token in added if not token["special"]}) > 1:
        raise InputError(f"{name}: runs of spaces of which some are normalized are not implemented")
    if EOT not in [token["content"] for token in added if token["special"]]:
        raise InputError(f"{name} has no special token {EOT}, which has to stand between documents")


def check_ids(spec, name):
    """InputError unless each token has an id of its own, the one that the library gives it.

    For added tokens the library does not read the ids in the file. A text of the vocabulary has its id there;
    others get the numbers from the vocabulary's size on, in their order, even where it has those ids itself.
    """
    vocab = spec["model"]["vocab"]
    stated = [*vocab.items(), *((token["content"], token.get("id")) for token in spec["added_tokens"])]
    for text, i in stated:
        if type(i) is not int or not 0 <= i < 2**31:  # True is an int in Python
            raise InputError(f"{name}: id {i!r:.40} of {text!r:.60} is no whole number from 0 to 2**31 - 1")

    ids = dict(vocab)
    next_id = len(vocab)
    for text, i in stated[len(vocab):]:
        if text not in ids:
            ids[text] = next_id
            next_id += 1
        expected = ids[text]
        if i != expected:
            raise InputError(f"{name}: added token {text!r:.60} has id {i}, but the tokenizers library reads "
                             f"{expected}")

    owners = {}
    for text, i in ids.items():
        if owners.setdefault(i, text) != text:
            raise InputError(f"{name}: {owners[i]!r:.60} and {text!r:.60} have the same id {i}")


# ------------------------------------------------------------------------------------ tokenizers of models
def load_tokenizer(name_or_dir):
    """Tokenizer of a model, given its folder or its name on the Hub."""
    try:
        source, name = read_source(name_or_dir)
        return Tokenizer(source, name)
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{name_or_dir} has no tokenizer.json of a byte-level BPE: {error!r:.99}") from error


def read_source(name_or_dir):
    """(content, name) of a model's tokenizer.json, made from vocab.json and merges.txt if these are all."""
    if path := fetch(name_or_dir, "tokenizer.json", required=False):
        return path.read_bytes(), f"{name_or_dir}/tokenizer.json"
    vocab = fetch(name_or_dir, "vocab.json", required=False)
    merges = fetch(name_or_dir, "merges.txt", required=False)
    if not vocab or not merges:
        fetch(name_or_dir, "tokenizer.json")  # says what is missing

    optional = ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
    paths = [fetch(name_or_dir, filename, required=False) for filename in optional]
    added, named, config = [read_json(path) if path else {} for path in paths]
    lines = merges.read_text(encoding="utf-8").split("\n")
    spec = spec_of_old_files(read_json(vocab), lines, added, named, config.get("add_prefix_space", False))
    return json.dumps(spec).encode(), f"{name_or_dir}/vocab.json"


def spec_of_old_files(vocab, lines, added, named, add_prefix_space):
    """The tokenizer.json that says what GPT-2's first files say.

    vocab, lines   {"!": 0, ...} of vocab.json; ["#version: 0.2", "Ġ t", ...] of merges.txt
    added, named   {"[PAD]": 50257} of added_tokens.json; {"pad_token": "[PAD]"} of special_tokens_map.json
    """
    special = {EOT}
    for value in named.values():
        for token in value if isinstance(value, list) else [value]:
            special.add(str(token.get("content") if isinstance(token, dict) else token))

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


def shared_vocabulary(a, b):
    """How many ids, from 0, mean the same in two tokenizers; 0 if models with them are not comparable.

    Comparable are two that give equal ids for every text and for <|endoftext|>. What else is special may
    differ, behind these: GPT-2 and GPT-2 with [PAD] share 50257 ids.
    """
    if a.text_fingerprint != b.text_fingerprint:
        return 0
    differing = [i for i in a.bytes.keys() | b.bytes.keys() if a.bytes.get(i) != b.bytes.get(i)]
    shared = min([a.vocab_size, b.vocab_size, *differing])
    return shared if shared > max(a.eot, a.last_text_id) else 0


def train_tokenizer(texts, vocab_size, folder):
    """Train a tokenizer of GPT-2's form into folder/tokenizer.json. Needs the `tokenizers` library."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()

    alphabet = pre_tokenizers.ByteLevel.alphabet()  # each byte is a token, so that any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([EOT])  # after training, so that the ids before it are the merge order
    with replaced(Path(folder, "tokenizer.json")) as file:
        bpe.save(str(file))
