"""Let a student draft what its teacher writes: the same text, from fewer reads of the teacher.

    python -m extras.speculate --model demo/teacher --draft out
    python -m extras.speculate --model gpt2-xl --draft gpt2 --temperature 0

A model takes little longer to read five tokens than to read one. So the student writes a few tokens, and the
teacher reads them all at once. It keeps them as long as it might have drawn them itself, and replaces the
first one that it refuses. What is written has exactly the teacher's distribution, however bad the draft is; a
bad draft only costs time (Leviathan et al. 2023, arXiv 2211.17192). Read this beside GPT.tokens in model.py.

If the draft's folder holds its control, that drafts, too: does distilling make a better draft?

Shapes: L tokens, n of them drafted, V vocabulary. p is the teacher's distribution, q the draft's.
"""
import math
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from model import DTYPES, load
from sample import DEFAULT_PROMPT
from support.cli import InputError, checked, format_table, new_parser, run_cli, user_path
from support.ranks import pick_device
from support.tokenizer import load_tokenizer, shared_vocabulary


class Reader:
    """A model, and how much of a text is in its key-value cache."""

    def __init__(self, model, room, vocab_size, temperature):
        self.model = model
        self.cache = model.new_cache(1, room)
        self.past = 0  # tokens in the cache that still belong to the text
        self.vocab_size = vocab_size
        self.temperature = temperature

    def read(self, ids):
        """Text ids (1, L) -> the distribution after each of its tokens that were not read yet (unread, V)."""
        unread = ids[:, self.past:].to(self.cache.device)
        hidden = self.model.hidden(unread, self.cache, self.past)[0]  # (unread, C)
        self.past = ids.size(1)
        logits = F.linear(hidden, self.model.head_weight)[:, :self.vocab_size]
        logits = logits.cpu().double()  # p - q is a difference of nearly equal numbers
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), self.vocab_size).double()
        return (logits / self.temperature).softmax(-1)

    def forget(self, length):
        """Keep only the first `length` tokens: what comes later in the cache is written over."""
        self.past = min(self.past, length)


def one_round(teacher, student, ids, n, generator):
    """Text ids (1, L) -> the text with 1 to n + 1 more tokens, and how many of them were drafted."""
    def draw(p):
        return torch.multinomial(p, 1, generator=generator)  # (1,)

    # The student writes n tokens, one at a time. A token is drawn from q, and q is kept.
    L = ids.size(1)
    q = []
    text = ids
    for _ in range(n):
        q.append(student.read(text)[-1])  # (V,)
        text = torch.cat((text, draw(q[-1])[None]), 1)

    # The teacher reads all of them at once: p after the text, and after each drafted token.
    p = teacher.read(text)[-n - 1:]  # (n + 1, V)

    # Keep a token x with probability min(1, p(x) / q(x)). The first one that is refused is drawn again from
    # where p exceeds q: together, x is written with probability min(p, q) + max(0, p - q) = p.
    kept = 0
    for i in range(n):
        x = text[0, L + i]
        chance = torch.rand((), generator=generator, dtype=torch.double)
        if chance * q[i][x] >= p[i][x]:
            break
        kept += 1

    # The teacher's own token comes for nothing: it has read the text up to there.
    last = draw((p[kept] - q[kept]).clamp(min=0)) if kept < n else draw(p[n])
    text = torch.cat((text[:, :L + kept], last[None]), 1)
    for reader in (teacher, student):
        reader.forget(L + kept)
    return text, kept


@torch.no_grad()
def speculate(model, draft, ids, max_new_tokens, ahead, vocab_size, temperature=1.0, generator=None):
    """Text ids (1, L) -> (1, L + max_new_tokens) as `model` writes it; (tokens drafted, of these kept).

    ahead: how many tokens `draft` writes before `model` reads them. temperature 0: the likeliest tokens.
    """
    length = ids.size(1) + max_new_tokens
    if length > min(model.context, draft.context):
        raise InputError(f"{length} tokens with the prompt, but the models look at {model.context} and "
                         f"{draft.context}: pass fewer --tokens")
    teacher, student = (Reader(network, length, vocab_size, temperature) for network in (model, draft))
    drafted = kept = 0
    while ids.size(1) < length:
        n = min(ahead, length - ids.size(1) - 1)  # the teacher adds one itself
        ids, n_kept = one_round(teacher, student, ids, n, generator)
        drafted += n
        kept += n_kept
    return ids, (drafted, kept)


# ------------------------------------------------------------------------------------ the command
BELOW_ACCEPTANCE = ("The share kept is below the acceptance in distill.py's table: after a refused\n"
                    "token the rest of the draft is thrown away.")


def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.speculate [options]")
    count = checked(int, "1 to 1000", lambda n: 1 <= n <= 1000)
    add = parser.add_argument
    add("--model", type=user_path, default="demo/teacher", metavar="MODEL", help="the teacher, which decides")
    add("--draft", type=user_path, nargs="+", default=["out"], metavar="MODEL",
        help="who drafts; several are compared. A student's control joins it")
    add("--ahead", type=count, default=4, metavar="N", help="tokens that are drafted at a time")
    add("--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="the text to continue")
    add("--tokens", type=count, default=120, metavar="N", help="length of each continuation")
    add("--num", type=count, default=5, metavar="N", help="continuations; more of them measure better")
    add("--temperature", type=checked(float, "0 or more", lambda t: 0 <= t < math.inf), default=1.0,
        metavar="T", help="of both models; 0: the likeliest token")
    add("--seed", type=checked(int, "0 to 2^62", lambda n: 0 <= n <= 2**62), default=0, metavar="N",
        help="of the random draws")
    add("--precision", choices=DTYPES, default="fp32", help="of the weights")
    add("--device", default="auto", help="cuda, mps or cpu; auto takes the first one that is available")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    args.device = pick_device(args.device)
    drafts = []
    for name in args.draft:
        if name == "out" and not Path("out/config.json").exists():
            raise InputError("no student in out/ yet: run `python distill.py` first, or pass --draft MODEL")
        control = str(Path(name, "control"))
        drafts += [name, control] if Path(control, "config.json").exists() else [name]

    tokenizer = load_tokenizer(args.model)
    model = load(args.model, args.device, DTYPES[args.precision])
    prompt = tokenizer.encode(args.prompt, allow_special=True) or [tokenizer.eot]
    ids = torch.tensor([prompt])  # (1, L)

    def write(name, draft, ahead, vocab_size):
        """--num texts, and a row of the table about them."""
        texts = []
        counts = []
        started = time.perf_counter()
        for i in range(args.num):
            generator = torch.Generator().manual_seed(args.seed + i)
            text, drafted_and_kept = speculate(
                model, draft, ids, args.tokens, ahead, vocab_size, args.temperature, generator)
            texts.append(text[0].tolist())
            counts.append(drafted_and_kept)
        seconds = time.perf_counter() - started

        n_tokens = args.num * args.tokens
        drafted, kept = map(sum, zip(*counts, strict=True))
        row = {"draft": name, "kept of drafted": f"{kept / drafted:.1%}" if drafted else "",
               "tokens per read": f"{n_tokens / (n_tokens - kept):.2f}",  # the teacher adds one each time
               "tokens per second": round(n_tokens / seconds)}
        return texts, row

    # Without a draft. It is measured after a first text, which is slower than those that follow.
    write("none", model, 0, tokenizer.vocab_size)
    own_texts, row = write("none", model, 0, tokenizer.vocab_size)
    rows = [row]
    for name in dict.fromkeys(drafts):
        vocab_size = shared_vocabulary(tokenizer, load_tokenizer(name))
        if not vocab_size:
            raise InputError(f"{name} and {args.model} have different tokenizers: choose a draft of the "
                             "teacher's family")
        draft = load(name, args.device, DTYPES[args.precision])
        texts, row = write(name, draft, args.ahead, vocab_size)
        rows.append(row)
        if args.temperature == 0:
            same = "the same" if texts == own_texts else "not the same, as two tokens were nearly equal"
            print(f"{name} as a draft: the text is {same}")
    print(format_table(rows))
    print(BELOW_ACCEPTANCE)
    slower = [row["draft"] for row in rows if row["tokens per second"] < rows[0]["tokens per second"]]
    if slower:
        print(f"slower here: drafts of {' and of '.join(slower)} cost more time than they save")


if __name__ == "__main__":
    run_cli(main)
