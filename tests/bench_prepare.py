"""How fast text becomes a corpus: prepare() against the usual way, on the same text with the same tokenizer.

The usual way, nanoGPT's, is datasets.map(num_proc=N) with encode_ordinary and an end-of-text id per document,
then a second pass that joins the results into a memory map. Both start from the same parquet file and end
with the same tokens on disk. That the usual way loads the file into an Arrow cache first is not counted;
prepare() reads the file itself.

    python tests/bench_prepare.py --tokenizer demo/teacher --megabytes 60 --workers 2
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402

DOCUMENT = 5000  # characters, about the mean of OpenWebText


def write_text(path, megabytes):
    """The standard library in documents of DOCUMENT characters, repeated, each with its number in front."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    library = "".join(text for _, text in data.stdlib_documents())
    starts = [i * DOCUMENT % (len(library) - DOCUMENT) for i in range(megabytes * 10**6 // DOCUMENT)]
    texts = [f"{n}\n{library[start:start + DOCUMENT]}" for n, start in enumerate(starts)]
    pq.write_table(pa.table({"text": texts}), path)
    return sum(len(text.encode()) for text in texts)


def usual_way(dataset, tokenizer, path, workers, shards=64):
    """Tokens of all documents in one file; returns how many."""
    bpe, eot = tokenizer.bpe, tokenizer.eot

    def process(row):
        ids = bpe.encode_ordinary(row["text"])
        ids.append(eot)
        return {"ids": ids, "len": len(ids)}

    done = dataset.map(process, remove_columns=["text"], num_proc=workers)
    out = np.memmap(path, np.uint16, "w+", shape=(int(np.sum(done["len"])),))
    at = 0
    for i in range(shards):
        shard = np.concatenate(done.shard(shards, i, contiguous=True).with_format("numpy")["ids"])
        out[at:at + len(shard)] = shard
        at += len(shard)
    out.flush()
    return at


def main():
    parser = argparse.ArgumentParser(description="Throughput of preparing a corpus, against datasets.map.")
    parser.add_argument("--tokenizer", default="demo/teacher", help="model folder or Hub name")
    parser.add_argument("--megabytes", type=int, default=60, help="how much text")
    parser.add_argument("--workers", type=int, default=2, help="workers of either way")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way, in turns; the best counts")
    args = parser.parse_args()
    from datasets import disable_caching, load_dataset
    disable_caching()  # or the second map() would be free
    tokenizer = data.load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "text.parquet")
        size = write_text(source, args.megabytes)
        dataset = load_dataset("parquet", data_files=str(source), split="train", cache_dir=f"{folder}/cache")
        seconds = {"datasets.map": [], "prepare": []}
        for repeat in range(args.repeats):
            start = time.perf_counter()
            theirs = usual_way(dataset, tokenizer, Path(folder, "usual.bin"), args.workers)
            seconds["datasets.map"].append(time.perf_counter() - start)
            start = time.perf_counter()
            corpus = data.prepare(source, tokenizer, Path(folder, f"corpora{repeat}"), workers=args.workers)
            seconds["prepare"].append(time.perf_counter() - start)
            assert theirs == len(corpus.train) + len(corpus.val)
    print(f"{size / 1e6:.0f} MB of text, {theirs:,} tokens, {args.workers} workers, best of {args.repeats}")
    for way, times in seconds.items():
        print(f"{way:14}{min(times):7.2f} s {size / 1e6 / min(times):7.1f} MB/s")
    print(f"{min(seconds['datasets.map']) / min(seconds['prepare']):.1f} times as fast")


if __name__ == "__main__":
    data.run_cli(main)
