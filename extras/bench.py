"""A distillation step against the usual code: how long it takes, how much memory, how exact it is.

    python -m extras.bench                               GPT-2 in bf16
    python -m extras.bench --rounds 1                    a first look
    python -m extras.bench --precision fp32 --batch-size 4
    python -m extras.bench --peers ours --no-exact --shape pythia
    python -m extras.bench --peers ours,ours-cache,hf,script

Read in this order:
  PEERS      who is compared: how each one loads two models, and how it computes the loss
  step       a few steps of one peer, in a process of its own: their time, memory and loss
  exactness  the loss and the gradient of a peer against the definition in float64
  measure    the peers in turns (A B C A B C ...), so that a busy minute does not hit one of them alone

The models have true shapes and random weights, the same for all peers. Losses and gradients are compared with
float64, so no peer can win by computing something else. Run it on a machine that does nothing else: beside
each time you see the load before it, the processes that wanted a core in the last minute (this bench, too).

Shapes: B sequences, L tokens of each, V vocabulary. T is the temperature.
"""
if not __package__:  # started as a file, from which Python does not find the rest of the project
    raise SystemExit("error: run this from the project's folder, as `python -m extras.bench`")

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from distill import LossSettings, divide_and_clip, losses_of
from model import DTYPES, GPT2, GPTNeoX, load
from support import ROOT
from support.chunked_loss import chunked_loss
from support.cli import InputError, format_table, new_parser, run_cli
from support.flags import count
from support.ranks import Ranks, autocast, keep_memory, peak_memory, pick_device
from support.teacher_cache import Draws, draws_loss

T, KD, CLM = 2.0, 0.5, 0.5  # temperature and weights of the loss that all compute
DRAWS = 12  # of the teacher, for each token of a cache
CLIP = 1.0

TINY = {"vocab_size": 512, "width": 64, "n_head": 2}
PYTHIA = {"vocab_size": 50304, "context": 2048}
PYTHIA_160M = GPTNeoX.config(**PYTHIA, width=768, n_layer=12, n_head=12)
SHAPES = {  # --shape: class, teacher, student
    "tiny": (GPT2, GPT2.config(**TINY, n_layer=4), GPT2.config(**TINY, n_layer=2)),
    "gpt2": (GPT2, GPT2.config(), GPT2.config(n_layer=6)),
    "gpt2-medium": (GPT2, GPT2.config(width=1024, n_layer=24, n_head=16),
                    GPT2.config(width=1024, n_layer=12, n_head=16)),
    "pythia": (GPTNeoX, PYTHIA_160M, GPTNeoX.config(**PYTHIA, width=512, n_layer=6, n_head=8)),
    "pythia-410m": (GPTNeoX, GPTNeoX.config(**PYTHIA, width=1024, n_layer=24, n_head=16), PYTHIA_160M),
}

# What glibc and PyTorch can be told about large tensors: to keep their memory, and to use huge pages.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(2**33),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
}


# ------------------------------------------------------------------------------------ who is compared
def our_models(folder, peer, args):
    """Student and teacher as distill.py loads them: the teacher in the precision in which it computes."""
    if args.device == "cpu":
        keep_memory()
    student = load(folder / "student", args.device).train()
    if peer == "ours-cache":
        return student, None
    teacher = load(folder / "teacher", args.device, DTYPES[args.precision]).requires_grad_(False)
    if peer == "ours-compile":
        for block in [*student.blocks, *teacher.blocks]:
            block.compile()
    return student, teacher


def hf_models(folder, peer, args):
    """Student and teacher in transformers, both in float32 as from_pretrained gives them."""
    from transformers import AutoModelForCausalLM
    models = []
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(
            folder / role, dtype=torch.float32, attn_implementation="sdpa")
        model.to(args.device).eval()  # eval: without dropout, as ours
        if peer == "hf-compile":
            model.compile()
        models.append(model)
    student, teacher = models
    return student, teacher.requires_grad_(False)


def our_loss(student, teacher, ids, targets, settings):
    """This project: the lines of distill.train."""
    with torch.no_grad():
        teacher_hidden = teacher.hidden(ids).flatten(0, 1)
    student_hidden = student.hidden(ids).flatten(0, 1)
    return losses_of(student_hidden, student.head_weight, teacher_hidden, teacher.head_weight,
                     targets.flatten(), settings).loss


def cache_loss(student, teacher, ids, targets, settings):
    """This project with --teacher-cache: no teacher in memory, and draws for each token in its place.

    Here they are random tokens, as time and memory do not depend on which. So the loss of this peer means
    nothing; tests/test_teacher_cache.py has the tests with true draws.
    """
    drawn = torch.randint(student.config.vocab_size, (targets.numel(), DRAWS), device=ids.device)
    zeros = torch.zeros(targets.numel(), device=ids.device)
    draws = Draws(drawn, torch.full(drawn.shape, 1 / DRAWS, device=ids.device), zeros, zeros)
    student_hidden = student.hidden(ids).flatten(0, 1)
    return chunked_loss(draws_loss, student_hidden, student.head_weight, draws, None, targets.flatten(),
                        settings).loss


def hf_loss(student, teacher, ids, targets, settings):
    """The usual code: whole logits of both models, kl_div and cross_entropy."""
    with torch.no_grad():
        t = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (B * L, V)
    s = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (B * L, V)

    kl = F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")
    return KD * T**2 * kl + CLM * F.cross_entropy(s, targets.flatten())


def script_loss(student, teacher, ids, targets, settings):
    """Like DistilGPT2's training script: the KL over logits that a boolean mask has picked, the CLM over a
    shifted copy of them, so that each sequence has one position less in the CLM than in the KL."""
    mask = torch.ones_like(ids)
    with torch.no_grad():
        t = teacher(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, L, V)
    s = student(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, L, V)

    V = s.size(-1)
    counted = mask.bool()[:, :, None].expand_as(s)
    s_picked = s.masked_select(counted).view(-1, V)
    t_picked = t.masked_select(counted).view(-1, V)
    log_q = F.log_softmax(s_picked / T, -1)
    kl = F.kl_div(log_q, F.softmax(t_picked / T, -1), reduction="batchmean")

    shifted = s[:, :-1].contiguous()
    labels = ids[:, 1:].contiguous()
    return KD * T**2 * kl + CLM * F.cross_entropy(shifted.view(-1, V), labels.view(-1))


class Peer(NamedTuple):
    """One way to compute the loss of a step."""
    models: Callable  # folder, peer, args -> student, teacher
    loss: Callable  # student, teacher, ids, targets, settings -> what backward() starts from
    is_sum: bool = False  # over tokens, so that gradients have to be divided; otherwise it is a mean
    skips_last_clm: bool = False  # of each sequence


PEERS = {
    "ours": Peer(our_models, our_loss, is_sum=True),
    "ours-compile": Peer(our_models, our_loss, is_sum=True),
    "ours-cache": Peer(our_models, cache_loss, is_sum=True),
    "hf": Peer(hf_models, hf_loss),
    "hf-compile": Peer(hf_models, hf_loss),
    "script": Peer(hf_models, script_loss, skips_last_clm=True),
}


# ------------------------------------------------------------------------------------ one step
def batch(args, vocab_size):
    """ids and targets (B, L), random, the same in every process."""
    torch.manual_seed(1)
    tokens = torch.randint(vocab_size, (args.batch_size, args.seq_len + 1))
    return tokens[:, :-1], tokens[:, 1:]


def prepare(folder, peer, args):
    """The student of a peer, and its loss as a function without arguments, which gives a mean or a sum."""
    student, teacher = PEERS[peer].models(folder, peer, args)
    ids, targets = (x.to(args.device) for x in batch(args, student.config.vocab_size))
    settings = LossSettings(temperature=T, kd_weight=KD, clm_weight=CLM, compile=peer == "ours-compile")

    def loss():
        with autocast(args, torch.device(args.device)):
            return PEERS[peer].loss(student, teacher, ids, targets, settings)
    return student, loss


def step(folder, peer, args):
    """Forward, backward, clip, AdamW, as in distill.train. The first step warms up, and gives the loss."""
    student, loss_of_peer = prepare(folder, peer, args)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    ranks = Ranks(args.device)
    is_sum = PEERS[peer].is_sum
    tokens = torch.tensor(args.batch_size * args.seq_len, device=args.device)

    def one_step():
        """(seconds, loss)"""
        started = time.perf_counter()
        loss = loss_of_peer()
        loss.backward()
        if is_sum:
            divide_and_clip(student, tokens, CLIP, ranks)
        else:
            torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()  # the work that was left to the GPU
        return time.perf_counter() - started, (loss / tokens if is_sum else loss).item()

    _, first_loss = one_step()
    seconds = [one_step()[0] for _ in range(args.steps)]
    return {"loss": first_loss, "seconds": seconds, "peak": peak_memory(torch.device(args.device))}


# ------------------------------------------------------------------------------------ exactness
def exactness(folder, peer, args):
    """How far the loss and the gradient of a peer are from float64, on a text of 64 tokens:
    |loss - loss64|, and |g - g64| / |g64| over all parameters of the student."""
    args = argparse.Namespace(**{**vars(args), "batch_size": 1, "seq_len": min(64, args.seq_len)})
    student, loss_of_peer = prepare(folder, peer, args)
    exact_student = copy.deepcopy(student).cpu().double()  # the same class, so its gradients pair up
    loss = loss_of_peer() / (args.seq_len if PEERS[peer].is_sum else 1)
    loss.backward()

    ids, targets = batch(args, student.config.vocab_size)
    teacher = load(folder / "teacher", "cpu", torch.float64)
    exact = exact_loss(exact_student(ids), teacher(ids), targets[0], PEERS[peer].skips_last_clm)
    exact.backward()

    g, g64 = (parameters_to_vector(p.grad.cpu() for p in network.parameters())
              for network in (student, exact_student))
    return abs(loss.item() - exact.item()), ((g - g64).norm() / g64.norm()).item()


def exact_loss(s, t, targets, skips_last_clm):
    """The mean loss per token of one sequence, by definition."""
    s = getattr(s, "logits", s)[0]  # (L, V); transformers' models return more than logits
    log_q = (s / T).log_softmax(-1)
    log_p = (t[0].detach() / T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (L,)
    clm = F.cross_entropy(s, targets, reduction="none")
    return KD * T**2 * kl.mean() + CLM * (clm[:-1] if skips_last_clm else clm).mean()


# ------------------------------------------------------------------------------------ processes
NEW_PROCESS = """
import argparse, json, pathlib, sys
from extras.bench import step
folder, peer, args = json.loads(sys.argv[1])
print(json.dumps(step(pathlib.Path(folder), peer, argparse.Namespace(**args))))
"""


def in_new_process(folder, contender, args):
    """What `step` returns in a fresh process, which has memory and threads of its own.

    contender: "ours" (a key of PEERS), or "ours, tuned": in the environment TUNED.
    """
    peer, _, tuned = contender.partition(", ")
    given = json.dumps([str(folder), peer, vars(args)])
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(TUNED if tuned else {})}
    done = subprocess.run([sys.executable, "-c", NEW_PROCESS, given], env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed"]
        raise InputError(f"a step of {contender} failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder, contenders, args):
    """{contender: what `step` returned in each round, with the load before}, in turns; prints each one."""
    runs = {contender: [] for contender in contenders}
    for number in range(1, args.rounds + 1):
        for contender, rounds in runs.items():
            load_before = os.getloadavg()[0]  # processes that wanted a core, on average over a minute
            found = in_new_process(folder, contender, args)
            rounds.append({**found, "median": statistics.median(found["seconds"]), "load": load_before})
            print(f"round {number}  {contender:22} {rounds[-1]['median']:8.3g} s a step, "
                  f"load before {load_before:.2f}", flush=True)
    return runs


# ------------------------------------------------------------------------------------ tables
def spread(values, form=".2f"):
    """The range of some values, "5.41 to 6.02", or one number if both ends look alike."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def cost_rows(runs, args):
    """Time, memory, and the loss of the first step, which the same code has computed."""
    first = next(iter(runs.values()))
    rows = []
    for contender, rounds in runs.items():
        seconds = [s for run in rounds for s in run["seconds"]]
        median = statistics.median(seconds)

        # Ratios within a round, in which both were measured within minutes: a slow hour hits both.
        ratios = [mine["median"] / other["median"] for mine, other in zip(rounds, first, strict=True)]
        rows.append({
            "": contender,
            "median, s": f"{median:.3g}",
            "range, s": spread(seconds, ".3g"),
            "time": f"{statistics.median(ratios):.2f}x",
            "by round": spread(ratios),
            "tokens/s": f"{args.batch_size * args.seq_len / median:,.0f}",
            "peak, GB": f"{max(run['peak'] for run in rounds) / 1e9:.2f}",
            "loss": "-" if "cache" in contender else f"{rounds[0]['loss']:.6f}",
        })
    return rows


def print_tables(folder, contenders, args):
    runs = measure(folder, contenders, args)
    print(f"\nA step of {args.batch_size} x {args.seq_len} tokens, {args.shape}, {args.precision}: "
          f"{args.rounds} rounds of {args.steps} steps.\n")
    print(format_table(cost_rows(runs, args)), flush=True)

    print("\nTime: the median of the rounds' ratios to the first row.")
    if max(run["load"] for rounds in runs.values() for run in rounds) > 1.25 * (os.cpu_count() or 1):
        print("The machine was busy with something else: measure again when it is quiet.")

    # The environment changes no number, and random draws have no loss to compare.
    rows = []
    for peer in contenders if args.exact else ():
        if peer in PEERS and peer != "ours-cache":
            loss, gradient = exactness(folder, peer, args)
            rows.append({"": peer, "loss off by": f"{loss:.1e}", "gradient off by": f"{gradient:.1e}"})
    if rows:
        print("\nAgainst the definition in float64, on one text of 64 tokens:\n\n" + format_table(rows))


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.bench [options]")
    add = parser.add_argument
    add("--peers", default="ours,hf,script", metavar="NAMES",
        help=f"who makes the steps, of {', '.join(PEERS)}; the first is the measure of the others")
    add("--exact", action=argparse.BooleanOptionalAction, default=True,
        help="also hold losses and gradients against float64: minutes and memory for large models")
    add("--tuned", action="store_true",
        help="each peer once more, in an environment in which large tensors keep their memory: what the "
             "usual code could gain without a change")
    add("--shape", choices=SHAPES, default="gpt2",
        help="gpt2: 12 layers teach 6; gpt2-medium: 24 teach 12; pythia: 160m teaches 70m; pythia-410m: "
             "it teaches 160m; tiny: to try this command")
    add("--batch-size", type=count, default=2, metavar="N", help="sequences of a step")
    add("--seq-len", type=count, default=1024, metavar="N", help="tokens of a sequence")
    add("--precision", choices=["bf16", "fp32"], default="bf16",
        help="bf16 is autocast, with weights in float32")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="where all of them compute")
    add("--rounds", type=count, default=5, metavar="N",
        help="fresh processes of each peer, in turns; with fewer the range says little")
    add("--steps", type=count, default=3, metavar="N",
        help="measured steps in a process, after one that warms up")
    return parser.parse_args(argv)


def find_contenders(args):
    """The rows of the table: the peers, and with --tuned each of them once more."""
    peers = args.peers.split(",")
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise InputError(f"--peers {unknown[0]}: choose from {', '.join(PEERS)}")
    return peers + [f"{peer}, tuned" for peer in peers if args.tuned]


def describe_machine(device):
    """Hardware, system and libraries, in a line."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    parts = [f"{device} ({hardware})", platform.platform(), f"Python {platform.python_version()}"]
    for name in ("torch", "transformers"):
        with suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    return ", ".join(parts)


def main():
    args = parse_args()
    contenders = find_contenders(args)
    args.device = pick_device(args.device)
    print(describe_machine(args.device) + "\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model_class, teacher, student = SHAPES[args.shape]
        for role, config in (("teacher", teacher), ("student", student)):
            torch.manual_seed(len(role))
            model_class(config).save(Path(folder, role))
        print_tables(Path(folder), contenders, args)


if __name__ == "__main__":
    run_cli(main)
