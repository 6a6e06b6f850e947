"""A LAMBADA of our own: passages of held-out code whose last word can be copied, and hardly guessed.

    python -m extras.lambada_items out-lambada/teacher    choose them anew

Read in this order:
  candidates   places in the held-out modules whose word stands earlier in the passage, not in the last line
  choose       those that the teacher cannot guess from the last line, and finds likelier with the passage
  exchanged    the control: the same passage without the word in it

LAMBADA's authors asked people: the last word had to be plain with the passage, and not to be guessed from the
last sentence alone (Paperno et al. 2016, arXiv 1606.06031). Here the teacher is asked. It does not have to
be right: an item is taken if the passage makes its word e² times as likely. docs/lambada-items.jsonl has a
line for each, and `eval_ppl.py --data docs/lambada-items.jsonl --protocol lambada` reads it as it is.
"""
import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np

from eval_ppl import lambada, score_windows
from extras.lambada_text import NAME, find_names, rename
from model import load
from support.cli import new_parser, run_cli, user_path
from support.documents import stdlib_documents, stdlib_held_out
from support.files import replaced
from support.tokenizer import load_tokenizer

ITEMS = Path(__file__).parent.parent / "docs" / "lambada-items.jsonl"
ARGS = Namespace(context=256, batch_size=16, device="cpu", protocol="lambada")

LONGEST = 500  # characters of a passage; about 170 tokens
APART = 250  # characters, at least, from the end of a passage to that of the next
CANNOT_GUESS = 4.0  # nats that the teacher needs for the word after the last line alone, at least: p < 2%
MADE_LIKELIER = 2.0  # nats that the passage saves it, at least
WORD_TOKENS = 2  # of a word, at most: longer names are mostly spelling
N_ITEMS = 300


def stands_in(word, text):
    """Whether a text has the word as a whole."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def candidates(names, tokenizer):
    """Items that may be chosen, in the order of the modules: passages of whole lines but for the last.

    A word is a name of 4 letters or more after a single space, as in LAMBADA's protocol. Its passage has it
    before, but not in its last line. `drawn`: whether it is one that `rename` has drawn.
    """
    def may_be_copied(word, before):
        return (stands_in(word, before) and not stands_in(word, last_line(before))
                and len(tokenizer.encode(" " + word)) <= WORD_TOKENS)

    rng = np.random.default_rng(1)  # that of the held-out text; see lambada_text.texts
    known = set(names)
    for path, original in stdlib_documents():
        if not stdlib_held_out(path):
            continue
        text = rename(original, names, rng)
        last_end = 0
        for match in re.finditer(rf"(?<=\S ){NAME.pattern}(?!\w)", text):
            start, end = match.span()
            begin = text.find("\n", max(0, end - LONGEST), start) + 1
            before = text[begin:start - 1]
            word = match[0]
            if begin and end >= last_end + APART and may_be_copied(word, before):
                last_end = end
                yield {"text": f"{before} {word}", "module": path, "position": start, "drawn": word in known}


def losses(model, texts, tokenizer, args=ARGS):
    """Nats that a model needs for the last word of each text, and whether it is right in all its tokens."""
    windows = [window for text in texts for window in lambada(text, tokenizer, args)]
    nll, _, _, right, tokens = score_windows({"model": model}, windows, args, tokenizer.vocab_size)[0]
    return nll.numpy(), (right == tokens).numpy()


def choose(items, with_passage, last_line_alone):
    """The items whose word the teacher cannot guess from the last line, and that the passage makes likelier.

    with_passage, last_line_alone: nats of each item's word. At most N_ITEMS, evenly spread over the modules.
    """
    hard = last_line_alone >= CANNOT_GUESS
    helped = last_line_alone - with_passage >= MADE_LIKELIER
    chosen = [items[i] for i in np.flatnonzero(hard & helped)]
    kept = np.linspace(0, len(chosen) - 1, min(N_ITEMS, len(chosen))).round().astype(int)
    return [chosen[i] for i in kept]


def last_line(text):
    return text.rpartition("\n")[2]


def exchanged(text, other):
    """The passage with another name wherever its last word stood before, so that this cannot be copied.

    "def push(heap):\\n    heap", "queue" -> "def push(queue):\\n    heap"
    """
    before, _, word = text.rpartition(" ")
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", other, before) + " " + word


def add_others(items, names):
    """Give each item the name that `exchanged` puts in the place of its word: one that its passage lacks."""
    rng = np.random.default_rng(2)
    for item in items:
        other = None
        while other is None or stands_in(other, item["text"]):
            other = str(rng.choice(names))
        item["other"] = other
    return items


def make_items(teacher, tokenizer):
    """All of it: (items, how many candidates there were)."""
    names = find_names(tokenizer)
    found = [*candidates(names, tokenizer)]
    with_passage, _ = losses(teacher, [item["text"] for item in found], tokenizer)
    alone, _ = losses(teacher, [last_line(item["text"]) for item in found], tokenizer)
    return add_others(choose(found, with_passage, alone), names), len(found)


def read_items():
    return [json.loads(line) for line in ITEMS.read_text(encoding="utf-8").splitlines()]


def write_items(items):
    with replaced(ITEMS) as file:
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.lambada_items TEACHER")
    parser.add_argument("teacher", type=user_path, help="the folder of the model that is asked")
    return parser.parse_args(argv)


def main():
    folder = parse_args().teacher
    items, n_candidates = make_items(load(folder), load_tokenizer(folder))
    write_items(items)
    print(f"{len(items)} items of {n_candidates} candidates: {ITEMS}")


if __name__ == "__main__":
    run_cli(main)
