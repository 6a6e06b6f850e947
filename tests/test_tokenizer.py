"""support/tokenizer.py: the ids of Hugging Face's own library, files of both forms, and what is refused."""
import copy
import json
import random
import shutil
import sys
import unicodedata

import pytest
from conftest import REPO
from tokenizers import Tokenizer as Reference

from support.cli import InputError
from support.tokenizer import Tokenizer, load_tokenizer, shared_vocabulary

FORMS = pytest.mark.parametrize("form", ["gpt2", "neox"])


@pytest.fixture
def tok(tokenizers_dir):
    return load_tokenizer(tokenizers_dir / "gpt2")


def read_spec(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def spec(tokenizers_dir):
    """The content of a tokenizer.json of GPT-2's form, with <|endoftext|> in the vocabulary, as GPT-2's."""
    content = read_spec(tokenizers_dir / "gpt2")
    content["model"]["vocab"]["<|endoftext|>"] = 599
    return content


def made(spec, indent=None):
    return Tokenizer(json.dumps(spec, indent=indent).encode())


def pair(spec):
    """Our tokenizer and the reference: a function from text to ids, special tokens included."""
    reference = Reference.from_str(json.dumps(spec))
    return made(spec), lambda text: reference.encode(text, add_special_tokens=False).ids


def check_same(spec, texts):
    ours, reference = pair(spec)
    for text in texts:
        assert ours.encode(text, allow_special=True) == reference(text), repr(text)
    return ours


# ------------------------------------------------------------------------------------ ids
TEXTS = {
    "prose": "It's the dogs' day, isn't it? They'll say we've 3 of 1,000. \u201cNa\u00efve\u201d caf\u00e9s; "
             "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \U0001f600\U0001f468\u200d\U0001f469",
    "code": "def f(x):\n    if x:\n        return [\n" + " " * 31 + "1,\n\t\t  2 ]  # two\n\n\n    \n  end  ",
    "decomposed": "Cafe\u0301 e\u0301\u0323 \u1e9b\u0323 \u212b \u1100\u1161\u11a8 o\u0308\u0304",
    "control": "".join(map(chr, range(32))) + "\x7f\x80\x85\x9f\xa0\ufeff\u2028\u2029\u200b",
    "crlf": "one\r\n\r\n  two\r\n\rthree\r \r\n    four",
    "special": "a<|endoftext|>b <|endoftext|> <|padding|>  <|endoftext|><|endof text|><|endoftext",
    "empty": "", "space": " ", "spaces": "  ", "blank lines": "\n \n  \n   \n",
}


@FORMS
def test_ids_equal_the_reference(tokenizers_dir, form):
    draw = random.Random(0)
    parts = [" ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "word", "'ll", "'", "7", "\u00e9", "e\u0301",
             "\u4e2d", "!", "x  y", "<|endoftext|>", "<|padding|>", "\x1c", "\x85"]
    texts = list(TEXTS.values())
    for _ in range(1000):
        length = draw.randint(1, 12)
        texts.append("".join(draw.choice(parts) * draw.choice([1, 1, 1, 2, 3, 26]) for _ in range(length)))
    check_same(read_spec(tokenizers_dir / form), texts)


@FORMS
def test_ids_equal_the_reference_on_every_code_point(tokenizers_dir, form):
    ours, reference = pair(read_spec(tokenizers_dir / form))
    points = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for chunk in (points[start:start + 512] for start in range(0, len(points), 512)):
        if ours.encode("".join(chunk)) != reference("".join(chunk)):  # then look at each of them
            bad = [c for c in chunk if ours.encode(f"a{c} {c}") != reference(f"a{c} {c}")]
            categories = {unicodedata.category(c) for c in bad}  # new ones in one of the two Unicode tables
            assert form == "neox" and categories <= {"Mn", "Cn"}


@FORMS
def test_a_million_of_whitespace(tokenizers_dir, form):
    """tiktoken itself would panic."""
    ours = check_same(read_spec(tokenizers_dir / form), ["x" + " " * 1_200_000 + "y"])  # cuts leave no trace
    text = "x" + "\t \n" * 400_000 + "y"
    assert ours.decode(ours.encode(text)) == text


@FORMS
def test_ids_and_bytes(tokenizers_dir, form):
    """Texts come back, each byte has a token, and no text makes a special token."""
    ours = load_tokenizer(tokenizers_dir / form)
    for seed in range(50):
        text = random.Random(seed).randbytes(300).decode("latin-1")
        expected = unicodedata.normalize("NFC", text) if form == "neox" else text
        assert ours.decode(ours.encode(text)) == expected
    single = {ours.decode_bytes([i]) for i in range(ours.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single
    assert ours.decode_bytes([ours.vocab_size + 7]) == b""  # models pad their vocabulary
    assert ours.decode(ours.encode("a\ud83db")) == "a?b"  # half a surrogate pair

    assert ours.eot not in ours.encode(TEXTS["special"])
    assert ours.decode(ours.encode(TEXTS["special"])) == TEXTS["special"]
    assert ours.encode("<|endoftext|>", allow_special=True) == [ours.eot]


@FORMS
def test_the_export_opens_in_transformers_and_keeps_what_the_tokenizer_knew(tokenizers_dir, form, tmp_path):
    """The same ids, pad token, other special tokens, chat template; of GPT-2's form also in older files."""
    from transformers import AutoTokenizer, GPT2Tokenizer
    plain = load_tokenizer(tokenizers_dir / form)
    plain.save(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = AutoTokenizer.from_pretrained(tmp_path / "plain")
    for text in TEXTS.values():
        assert theirs(text)["input_ids"] == plain.encode(text, allow_special=True)
    assert theirs.decode(plain.encode(TEXTS["code"])) == TEXTS["code"]
    assert list(theirs("a")) == ["input_ids", "attention_mask"]

    names = ["<|user|>", "<|bot|>"]
    theirs.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": names})
    theirs.chat_template = "{{ messages[0]['content'] }}"
    theirs.save_pretrained(tmp_path / "teacher")
    ours = load_tokenizer(tmp_path / "teacher")
    ours.save(tmp_path / "out", max_length=64)
    (tmp_path / "out" / "config.json").write_text('{"model_type": "gpt2"}')
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.pad_token, again.pad_token_id) == ("[PAD]", theirs.pad_token_id)
    assert again.chat_template == theirs.chat_template and set(names) <= set(again.all_special_tokens)
    assert again.model_max_length == 64 and again.eos_token_id == ours.eot
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["additional_special_tokens"] == names  # transformers 4 fails on transformers 5's name
    # transformers 4 reads this setting only from the file; without it, it adds token_type_ids
    assert config["model_input_names"] == ["input_ids", "attention_mask"]

    text = "It's<|user|> a [PAD]<|endoftext|>  test"
    assert again(text)["input_ids"] == theirs(text)["input_ids"] == ours.encode(text, allow_special=True)
    for file in ("vocab.json", "merges.txt", "added_tokens.json"):
        assert (tmp_path / "out" / file).exists() == (form == "gpt2")
    if form == "gpt2":
        (tmp_path / "out" / "tokenizer.json").unlink()
        assert load_tokenizer(tmp_path / "out").fingerprint == ours.fingerprint
        slow = GPT2Tokenizer.from_pretrained(tmp_path / "out")
        assert slow(text)["input_ids"] == theirs(text)["input_ids"]


# ------------------------------------------------------------------------------------ fingerprints
def test_fingerprints_of_tokenizers_that_exist_never_change():
    """Corpora on disk are named by them."""
    assert load_tokenizer(REPO / "demo" / "teacher").fingerprint == "19ccf904467f974d"


@FORMS
def test_fingerprint_is_of_the_ids_not_of_the_file(tokenizers_dir, form):
    spec = read_spec(tokenizers_dir / form)
    fewer = {**spec["model"], "merges": spec["model"]["merges"][:-1]}
    other = {"type": "NFC"} if spec["normalizer"] is None else None
    variants = [spec, {**spec, "normalizer": other}, {**spec, "model": fewer}]
    assert len({made(variant).fingerprint for variant in variants}) == 3
    assert made(spec, indent=7).fingerprint == load_tokenizer(tokenizers_dir / form).fingerprint


def with_special(spec, *texts):
    """A copy with more special tokens, behind all others."""
    spec = copy.deepcopy(spec)
    for text in texts:
        first, n = spec["added_tokens"][0], len(spec["added_tokens"])
        spec["added_tokens"].append({**first, "content": text, "id": first["id"] + n})
    return spec


def test_shared_vocabulary(spec, tokenizers_dir):
    plain, padded = made(spec), made(with_special(spec, "[PAD]"))
    chat = made(with_special(spec, "<|im_start|>", "<|im_end|>"))
    assert [t.vocab_size for t in (plain, padded, chat)] == [600, 601, 602]
    assert shared_vocabulary(plain, plain) == shared_vocabulary(plain, chat) == 600
    assert shared_vocabulary(padded, plain) == shared_vocabulary(padded, chat) == 600
    assert shared_vocabulary(chat, made(with_special(spec, "<|im_start|>"))) == 601
    assert padded.fingerprint != plain.fingerprint

    # Tokenizers that share nothing.
    neox = read_spec(tokenizers_dir / "neox")
    renamed = copy.deepcopy(neox)
    renamed["added_tokens"][1]["content"] = "<pad>"  # before the ids of texts
    renamed["model"]["vocab"]["<pad>"] = renamed["model"]["vocab"].pop("<|padding|>")
    fewer = {**spec["model"], "merges": spec["model"]["merges"][:-1]}
    assert shared_vocabulary(made(neox), made(neox)) == made(neox).vocab_size
    assert shared_vocabulary(made(neox), made(renamed)) == 0
    for other in (neox, {**spec, "normalizer": {"type": "NFC"}}, {**spec, "model": fewer}):
        assert shared_vocabulary(plain, made(other)) == 0


# ------------------------------------------------------------------------------------ merges
def test_entries_that_no_merge_makes(spec):
    """They have an id, and texts have others; as in the library."""
    for text in ("\u0120covidfoo", "covid", "\u00e9", "\u4e2d", "two words", "[PAD]"):
        spec["model"]["vocab"].setdefault(text, len(spec["model"]["vocab"]))
    ours = check_same(spec, ["the covidfoo x", "covid", "\u4e2d", "two words [PAD]"])
    reference = Reference.from_str(json.dumps(spec))
    for i in range(ours.vocab_size):
        assert ours.decode([i]) == reference.decode([i], skip_special_tokens=False)


def random_merges(spec, draw):
    """Few letters, so that everything meets: merges in any order, twice, of unmade tokens; unmade entries."""
    letters = [text for text in spec["model"]["vocab"] if len(text) == 1]
    vocab = {text: i for i, text in enumerate(letters)}
    pool, merges = list("abc\u0120"), []
    for _ in range(draw.randint(1, 12)):
        pair = draw.choice(merges) if merges and draw.random() < 0.15 else draw.choices(pool, k=2)
        merges.append(pair)
        vocab.setdefault("".join(pair), len(vocab))
        pool.append("".join(pair))
    if draw.random() < 0.2:
        draw.shuffle(merges)
    if draw.random() < 0.3:
        del merges[draw.randrange(len(merges))]
    for _ in range(draw.randint(0, 2)):
        vocab.setdefault("".join(draw.choices(pool[:4], k=3)), len(vocab))

    vocab["<|endoftext|>"] = len(vocab)
    added = [{**spec["added_tokens"][0], "id": vocab["<|endoftext|>"]}]
    return {**spec, "added_tokens": added, "model": {**spec["model"], "vocab": vocab, "merges": merges}}


def test_random_merges_give_the_ids_of_the_reference_or_are_refused(spec):
    accepted = 0
    for seed in range(300):
        draw = random.Random(seed)
        changed = random_merges(spec, draw)
        texts = ["".join(draw.choices("abc ", k=draw.randint(1, 20))) for _ in range(20)]
        try:
            check_same(changed, texts)
            accepted += 1
        except ValueError as error:
            assert "order" in str(error)
    assert accepted > 150


# ------------------------------------------------------------------------------------ what is read
def sequence(key, *steps):
    return {"type": "Sequence", key: [*steps]}


def template(*pieces):
    return {"type": "TemplateProcessing", "single": [*pieces], "pair": [TEXT, TEXT], "special_tokens": {
        "<|endoftext|>": {"id": "<|endoftext|>", "ids": [599], "tokens": ["<|endoftext|>"]}}}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_what_changes_no_id_of_a_text_is_read(spec, tok, tmp_path):
    for section, value in [
            ("post_processor", sequence("processors", BYTE_LEVEL, template(BOS, TEXT, BOS))),
            ("pre_tokenizer", sequence("pretokenizers", sequence("pretokenizers", BYTE_LEVEL))),
            ("normalizer", sequence("normalizers"))]:
        assert check_same({**spec, section: value}, TEXTS.values()).fingerprint == tok.fingerprint

    wrapped = made({**spec, "normalizer": sequence("normalizers", {"type": "NFC"})})
    assert wrapped.nfc and wrapped.fingerprint == made({**spec, "normalizer": {"type": "NFC"}}).fingerprint
    wrapped.save(tmp_path)
    assert not (tmp_path / "vocab.json").exists()  # it would mean the same without NFC


def test_longer_special_tokens_come_first(spec):
    texts = ["a<|im_start|>b<|im", "<|im<|im_start|><|endoftext|>"]
    check_same(with_special(spec, "<|im", "<|im_start|>"), texts)


REFUSED = [  # what is said; where in a tokenizer.json something else stands; what that is (None: nothing)
    ("'NFKC' is not supported", ["normalizer"], {"type": "NFKC"}),
    ("'Lowercase'", ["normalizer"], sequence("normalizers", {"type": "NFC"}, {"type": "Lowercase"})),
    ("pre_tokenizer of 0 steps", ["pre_tokenizer"], None),
    ("add_prefix_space True", ["pre_tokenizer", "add_prefix_space"], True),
    ("dropout 0.1", ["model", "dropout"], 0.1),
    ("TemplateProcessing", ["post_processor"], template(TEXT, TEXT)),
    ("no token for the byte 33", ["model", "vocab", "!"], None),
    ("each of them once", ["model", "vocab", "!"], 2),
    ("not whole numbers", ["model", "vocab", "!"], 0.0),
    ("lstrip True", ["added_tokens", 0, "lstrip"], True),
    ("no special token <|endoftext|>", ["added_tokens"], []),
    ("or an empty one", ["added_tokens", 1], {"special": True, "content": "", "id": 600}),
    ("has id 7, but the tokenizers library reads 599", ["added_tokens", 0, "id"], 7),
    ("'\\\\' is also an ordinary token", ["added_tokens", 1], {"special": True, "content": "\\", "id": 59}),
    ("ordinary added token with content", ["added_tokens", 1], {"special": False, "content": "a", "id": 67}),
    # GPT-NeoX's runs of spaces: those that are not normalized would come first in the library.
    ("ordinary added token with normalized", ["added_tokens", 1],
     {"special": False, "content": "  ", "id": 600, "normalized": False}),
]


@pytest.mark.parametrize("said, place, value", REFUSED)
def test_what_would_give_other_ids_is_refused(spec, tmp_path, said, place, value):
    *path, last = place
    node = spec
    for key in path:
        node = node[key]
    if value is None:
        del node[last]
    elif last == 1:
        node.append(value)
    else:
        node[last] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError) as error:
        load_tokenizer(tmp_path)
    assert said in str(error.value) and f"{tmp_path}/tokenizer.json" in str(error.value)


def test_ids_and_merges_in_another_order(spec):
    reversed_ = {**spec["model"], "merges": spec["model"]["merges"][::-1]}
    with pytest.raises(ValueError, match="in another order"):
        made({**spec, "model": reversed_})

    # A gap in the vocabulary: its ids go beyond its size, where those of added tokens start.
    del spec["model"]["vocab"]["\u00fe"]  # the character of a byte that UTF-8 never has
    for i, said in ((600, "PAD.* has id 600, but the tokenizers library reads 599"), (599, "of them once")):
        padded = with_special(spec, "[PAD]")
        padded["added_tokens"][1]["id"] = i
        with pytest.raises(ValueError, match=said):
            made(padded)


# ------------------------------------------------------------------------------------ old files
@pytest.fixture
def old_files(spec, tmp_path):
    """A folder as GPT-2's first fine-tunes have it."""
    merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return tmp_path


def test_vocab_json_and_merges_txt(old_files, tok, hub):
    assert load_tokenizer(old_files).fingerprint == tok.fingerprint
    (old_files / "added_tokens.json").write_text('{"<|user|>": 601, "[PAD]": 600}')
    named = {"pad_token": "[PAD]", "additional_special_tokens": [{"content": "<|user|>", "lstrip": False}]}
    (old_files / "special_tokens_map.json").write_text(json.dumps(named))
    (hub.root / "models" / "someone").mkdir(parents=True, exist_ok=True)
    shutil.copytree(old_files, hub.root / "models" / "someone" / "old")
    for name in (old_files, "someone/old"):
        assert load_tokenizer(name).special == {"<|endoftext|>": 599, "[PAD]": 600, "<|user|>": 601}
        assert shared_vocabulary(load_tokenizer(name), tok) == 600

    for name, content, said in (
            ("special_tokens_map.json", "{}", "ordinary added token with content .* is not supported"),
            ("tokenizer_config.json", '{"add_prefix_space": true}', "add_prefix_space True"),
            ("special_tokens_map.json", '{"pad_token": ' + "[" * 9999, "special_tokens_map.json is not")):
        (old_files / name).write_text(content)
        with pytest.raises(InputError, match=said):
            load_tokenizer(old_files)
    (old_files / "special_tokens_map.json").unlink()
    (old_files / "merges.txt").unlink()
    with pytest.raises(InputError, match="has no tokenizer.json"):
        load_tokenizer(old_files)


# ------------------------------------------------------------------------------------ the real Hub
@pytest.mark.hub
def test_real_tokenizers(real_hub, run, tmp_path):
    (tmp_path / "script.py").write_text("""
from tokenizers import Tokenizer
from support.hub import need
from support.text import stdlib_documents
from support.tokenizer import load_tokenizer
texts = [text for _, text in stdlib_documents()][:100]
for name in ("gpt2", "EleutherAI/pythia-70m"):
    ours, reference = load_tokenizer(name), Tokenizer.from_file(str(need(name, "tokenizer.json")))
    assert all(ours.encode(text, allow_special=True) == reference.encode(text).ids for text in texts)
""")
    result = run(tmp_path / "script.py", **real_hub)
    assert result.returncode == 0, result.stderr
