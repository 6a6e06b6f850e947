"""Texts for the tests of data, and the files that hold them."""
import json
import random


def make_texts(n, seed=0):
    """Documents of about 300 characters, no two alike, some with text that tends to go wrong."""
    draw = random.Random(seed)
    words = ["def", "return", "self", "\n    ", "\r\n", "<|endoftext|>", "\u00e9", "\u65e5\u672c", "  "]
    return [f"{i} " + " ".join(draw.choice(words) for _ in range(draw.randint(1, 120))) for i in range(n)]


def write(path, texts, column="text"):
    """Write the same documents in any of the forms that can be read; as .txt in a file for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts)))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=50)
    else:
        for i, text in enumerate(texts):
            (path.parent / f"{i:04}.txt").write_bytes(text.encode())


def train_tokenizer(texts, vocab_size, folder):
    """Train a tokenizer of GPT-2's form into folder/tokenizer.json, as that of demo/teacher was."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()

    alphabet = pre_tokenizers.ByteLevel.alphabet()  # each byte is a token, so that any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens(["<|endoftext|>"])  # after training, so the ids before it are the merge order
    folder.mkdir(exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))


def by_split(pairs):
    """Pairs (split, text) -> {"train": texts, "val": texts}."""
    pairs = list(pairs)
    return {split: [text for s, text in pairs if s == split] for split in ("train", "val")}


def split_ids(tok, pairs):
    """What train.bin and val.bin must hold, put together in the plainest way."""
    return {split: [i for text in texts for i in [tok.eot, *tok.encode(text)]]
            for split, texts in by_split(pairs).items()}
