"""The questions of the LAMBADA study, put to models as they are: is what they lose on LAMBADA copying?

    python -m extras.lambada_real EleutherAI/pythia-70m pythia/control pythia
    python -m extras.lambada_real out-a out-b --data docs/lambada-items.jsonl

A column for each model. LAMBADA's words are parted in those that stand in their passage and those that do
not. The former are asked once more, with another text's word wherever they stood before: what a model loses
there, too, is not copying. At last, random tokens that stand there twice.
"""
import math
from argparse import Namespace

import numpy as np
import torch

from eval_ppl import LAMBADA, TEST_SETS, read_texts
from extras.lambada_items import exchanged, losses, stands_in
from extras.lambada_scores import copy_accuracy, random_twice
from model import load
from support.cli import InputError, checked, format_table, new_parser, pick_device, run_cli, user_path
from support.tokenizer import load_tokenizer


def last_word(text):
    return text.rpartition(" ")[2]


def part(texts):
    """Texts -> those whose last word stands in them before, the same with it exchanged, the other ones."""
    rng = np.random.default_rng(0)
    words = sorted({last_word(text) for text in texts})
    copied = [text for text in texts if stands_in(last_word(text), text.rpartition(" ")[0])]
    others = [text for text in texts if text not in set(copied)]

    without = []
    for text in copied:
        foreign = [word for word in rng.permutation(words).tolist() if word and not stands_in(word, text)]
        if not foreign:
            raise InputError("each of these texts has the last words of all others: too few to exchange them")
        without.append(exchanged(text, foreign[0]))
    return copied, without, others


def ask(model, tokenizer, texts, args):
    """{what: figure} of a model."""
    args = Namespace(**vars(args) | {"context": model.context, "protocol": "lambada"})
    copied, without, others = part(texts)
    found = {"parameters": model.num_parameters()}
    for what, of in (("all words", texts), ("in the passage", copied), ("these, exchanged", without),
                     ("not in the passage", others)):
        if of:
            nll, right = losses(model, of, tokenizer, args)
            found[f"{what} ({len(of)}): perplexity"] = math.exp(min(700, nll.mean()))
            found[f"{what}: accuracy"] = float(right.mean())

    n = min(64, model.context // 2)
    windows = random_twice(n, tokenizer)
    found[f"{n} random tokens twice: copied"] = copy_accuracy(model, windows, tokenizer, args)
    return found


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.lambada_real MODEL [MODEL ...] [options]")
    add = parser.add_argument
    add("models", nargs="+", type=user_path, metavar="MODEL", help="folders, or names on the Hub")
    add("--data", type=user_path, default=LAMBADA,
        help="passages with a last word: a file, or a data set of the Hub with a test split")
    add("--batch-size", type=checked(int, "1 or more", lambda n: n >= 1), default=16, metavar="N",
        help="passages at a time")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first of them that is there")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    texts = read_texts(TEST_SETS.get(args.data, args.data), "lambada", "text")
    columns = {}
    for name in args.models:
        tokenizer = load_tokenizer(name)
        columns[name] = ask(load(name, torch.device(args.device)), tokenizer, texts, args)
    figures = [*columns[args.models[0]]]
    rows = [{"": figure, **{name: of[figure] for name, of in columns.items()}} for figure in figures]
    print(format_table(rows))


if __name__ == "__main__":
    run_cli(main)
