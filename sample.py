"""Let a model write: one prompt, several continuations, other models beside it.

    python sample.py                             the student in out/
    python sample.py --compare demo/teacher      ... and its teacher
    python sample.py --model gpt2 --compare distilgpt2 --prompt "A fox" --num 3

Read in this order:
  draw            logits -> the next token: temperature, top-k, top-p
  continuations   a prompt -> texts; the loop over tokens is model.generate

Shapes: B continuations, L tokens so far, V vocabulary.
"""
try:
    import support  # noqa: F401  (first: Ctrl-C ends in one line while PyTorch loads)
except ModuleNotFoundError as error:  # python -I, python -P, PYTHONSAFEPATH
    raise SystemExit("error: start Python without -I or -P, or set PYTHONPATH to this folder") from error

import math
import sys
from functools import partial
from pathlib import Path

import torch

from model import DTYPES, likeliest, load
from support.cli import InputError, checked, new_parser, note, run_cli, user_path
from support.ranks import pick_device
from support.tokenizer import load_tokenizer

DEFAULT_PROMPT = "def read_config(path):"


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Logits (B, V) -> one token for each row (B, 1).

    At temperature 0 it is the likeliest token. Otherwise it is drawn from the `top_k` likeliest (0: from all)
    and, of these, from the fewest that together have probability `top_p` (Holtzman et al. 2019, arXiv
    1904.09751).
    """
    if not logits.amax(-1).isfinite().all():  # -inf for some tokens is fine: they are never drawn
        raise InputError("its logits are NaN or infinite, so there is nothing to draw from: the weights are "
                         "broken, or too large for this --precision")
    if temperature == 0:
        return likeliest(logits)

    scaled = logits.float() / temperature
    if not scaled.amax(-1).isfinite().all():  # T is so small that they overflow; the likeliest wins
        return likeliest(logits)

    if top_k:
        kth = scaled.topk(min(top_k, scaled.size(-1))).values[:, -1:]  # (B, 1)
        scaled = scaled.masked_fill(scaled < kth, -torch.inf)

    if top_p < 1:
        descending, order = scaled.sort(descending=True)
        p = descending.softmax(-1)
        enough = p.cumsum(-1) - p >= top_p  # the tokens before this one already suffice
        descending = descending.masked_fill(enough, -torch.inf)
        scaled = torch.empty_like(scaled).scatter(-1, order, descending)

    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)


def check_fit(name, model, tokenizer):
    """InputError if the tokenizer has ids for which the model `name` has no embedding."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(f"{name}: its tokenizer has {tokenizer.vocab_size} tokens and its model only "
                         f"{model.config.vocab_size}: these files do not belong together")


def continuations(name, args):
    """Yield the texts that the model `name` writes after the prompt."""
    tokenizer = load_tokenizer(name)
    model = load(name, args.device, DTYPES[args.precision])
    check_fit(name, model, tokenizer)

    # <|endoftext|> in a prompt means the token. Without a prompt the text starts like a document.
    prompt = tokenizer.encode(args.prompt, allow_special=True) or [tokenizer.eot]
    if len(prompt) >= model.context:
        note(f"the prompt has {len(prompt)} tokens; {name} only sees the last {model.context}")

    generator = torch.Generator(args.device).manual_seed(args.seed)
    choose = partial(draw, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                     generator=generator)
    ids = torch.tensor([prompt] * args.num, device=args.device)  # (B, L)
    try:
        ids = model.generate(ids, args.tokens, choose)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error

    for written in ids[:, len(prompt):].tolist():
        if tokenizer.eot in written:
            written = written[:written.index(tokenizer.eot)]
        yield tokenizer.decode(written)


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--model", type=user_path, default="out", metavar="MODEL",
        help="the model that writes: a folder, or a name on the Hub such as gpt2")
    add("--compare", type=user_path, nargs="+", default=[], metavar="MODEL",
        help="other models that continue the same prompt, such as the teacher")
    add("--precision", choices=DTYPES, default="fp32",
        help="of the weights; bf16 needs half the memory, and less time on a GPU")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first one that is available")

    add = parser.add_argument_group("text").add_argument
    add("--prompt", default=DEFAULT_PROMPT, metavar="TEXT",
        help="the text to continue; - reads it from standard input; <|endoftext|> means the token between "
             "documents")
    add("--tokens", type=checked(int, "1 to 1000000", lambda n: 1 <= n <= 10**6), default=120, metavar="N",
        help="length of each continuation, unless the document ends before that")
    add("--num", type=checked(int, "1 to 1000", lambda n: 1 <= n <= 1000), default=1, metavar="N",
        help="continuations by each model; they are written at the same time, so more need more memory")

    add = parser.add_argument_group("choice of the next token").add_argument
    add("--temperature", type=checked(float, "0 or more", lambda t: 0 <= t < math.inf), default=0.7,
        metavar="T", help="logits are divided by it: below 1 the text is safer, above 1 wilder; 0 always "
                          "takes the likeliest token")
    add("--top-k", type=checked(int, "0 or more", lambda k: 0 <= k < 2**63), default=50, metavar="K",
        help="draw from the K likeliest tokens only, as unlikely ones derail a text; 0: from all")
    add("--top-p", type=checked(float, "above 0 and at most 1", lambda p: 0 < p <= 1), default=1.0,
        metavar="P", help="draw from the fewest tokens that together have probability P: few if the model is "
                          "sure, many if it is not; 1: from all")
    add("--seed", type=checked(int, "0 to 2^63 - 1", lambda n: 0 <= n < 2**63), default=0, metavar="N",
        help="of the random draws; the same seed gives the same texts")
    return parser.parse_args(argv)


def read_prompt(text):
    """--prompt as text; `-` stands for standard input."""
    try:
        if text == "-":
            raw = sys.stdin.buffer.read()
        else:
            raw = text.encode("utf-8", "surrogateescape")  # the bytes that the shell passed
        return raw.decode("utf-8-sig")
    except UnicodeError as error:
        raise InputError(f"--prompt {text} is not UTF-8 text: see its byte {error.start}") from error


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    args.prompt = read_prompt(args.prompt)
    if args.model == "out" and not Path("out/config.json").exists():
        raise InputError("no student in out/ yet: run `python distill.py` first, or pass --model gpt2")

    for name in dict.fromkeys([args.model, *args.compare]):
        for i, text in enumerate(continuations(name, args), 1):
            print(f"--- {name}" + (f", {i} of {args.num}" if args.num > 1 else ""))
            print(args.prompt + text + "\n")


if __name__ == "__main__":
    run_cli(main)
