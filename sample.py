"""Let a model write: one prompt, several continuations, and a second model beside it if you like.

    python sample.py                                the student in out/
    python sample.py --compare demo/teacher         ... and its teacher, after the same prompt
    python sample.py --model gpt2 --compare distilgpt2 --prompt "The horse raced" --num 3
"""
import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from data import load_tokenizer
from model import DTYPES, likeliest, load
from support.cli import InputError, run_cli

DEFAULT_PROMPT = "def read_config(path):"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--model", default="out", help="Hub id or folder")
    add("--compare", nargs="+", default=[], metavar="MODEL", help="more models, after the same prompt")
    add("--prompt", default=DEFAULT_PROMPT, help="the text to go on from; `-` reads it from standard input")
    add("--num", type=int, default=1, help="continuations of each model")
    add("--tokens", type=int, default=120, help="tokens of each continuation")
    add("--temperature", type=float, default=0.7, help="0: always the likeliest token")
    add("--top-k", type=int, default=50, help="draw from the k likeliest tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="draw from the fewest tokens with this much probability")
    add("--seed", type=int, default=0, help="of the draws")
    add("--precision", choices=DTYPES, default="fp32", help="of the weights; bf16 is faster")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cpu or mps")
    return parser.parse_args(argv)


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Logits (B, V) -> a token each (B, 1): the likeliest at temperature 0, otherwise drawn, from the `top_k`
    likeliest (0: all), from the fewest with probability `top_p` (Holtzman et al. 2019, arXiv 1904.09751)."""
    if temperature == 0:
        return likeliest(logits)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        descending, order = logits.sort(descending=True)
        p = descending.softmax(-1)
        descending[p.cumsum(-1) - p >= top_p] = -torch.inf  # what stands before it already suffices
        logits = torch.empty_like(logits).scatter(-1, order, descending)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


def continuations(name, args):
    """Yields the texts that the model `name` writes after the prompt."""
    model, tokenizer = load(name, args.device, DTYPES[args.precision]), load_tokenizer(name)
    prompt = tokenizer.encode(args.prompt) or [tokenizer.eot]  # an empty prompt: the start of any document
    if len(prompt) >= model.context:
        print(f"note: the prompt has {len(prompt)} tokens; {name} sees the last {model.context} at a time",
              file=sys.stderr)
    ids = torch.tensor([prompt] * args.num, device=args.device)  # (num, T)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    ids = model.generate(ids, args.tokens, partial(
        draw, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, generator=generator))
    for row in ids[:, len(prompt):].tolist():
        yield tokenizer.decode(row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row)


def main():
    args = parse_args()
    for flag, good in (("num", args.num > 0), ("tokens", args.tokens > 0), ("top_k", args.top_k >= 0),
                       ("temperature", args.temperature >= 0), ("top_p", 0 < args.top_p <= 1)):
        if not good:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is out of range; see --help")
    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    if args.model == "out" and not Path("out/config.json").exists():
        raise InputError("no student in out/ yet: run `python distill.py` first, or pass --model gpt2")
    for name in [args.model, *args.compare]:
        print(f"--- {name}")
        for text in continuations(name, args):
            print(args.prompt + text + "\n")


if __name__ == "__main__":
    run_cli(main)
