"""Texts for the tests of data, and the files that hold them."""
import json
import random


def make_texts(n, seed=0):
    """Documents of about 300 characters, no two alike, some with what tends to go wrong."""
    draw = random.Random(seed)
    words = ["def", "return", "self", "\n    ", "\r\n", "<|endoftext|>", "\u00e9", "\u65e5\u672c", "  "]
    return [f"{i} " + " ".join(draw.choice(words) for _ in range(draw.randint(1, 120))) for i in range(n)]


def write(path, texts, column="text"):
    """Write the same documents in any of the forms that can be read; of .txt, a file for each."""
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
