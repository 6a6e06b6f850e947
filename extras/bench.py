"""A distillation step against the usual code: how long it takes, how much memory, how exact it is.

    python -m extras.bench                               GPT-2 in bf16
    python -m extras.bench --rounds 1                    a first look
    python -m extras.bench --precision fp32 --batch-size 4
    python -m extras.bench --peers ours --against ../before
    python -m extras.bench --peers ours --no-exact --shape pythia
    python -m extras.bench --peers ours,ours-cache,hf,script

Read in this order:
  PEERS           who is compared: each function loads two models and says how it computes the loss
  step            in a process of its own: a few steps of one peer, their time, memory and loss
  exactness       the loss and the gradient of a peer against the definition in float64
  child           starts one of these functions in a fresh process
  measure_steps   the peers in turns (A B C A B C ...), so that a busy minute does not hit one of them alone

The models have true shapes and random weights, the same for all peers, and losses and gradients are compared
with float64: nobody wins by computing something else. Run it on a machine that does nothing else. The load
before each process is printed beside its time, so that a reader of the figures can see whether that was so.

Shapes: B sequences, L tokens of each, V vocabulary. T is the temperature.
"""
if not __package__:  # started as a file, from which Python does not find the rest of the project
    raise SystemExit("error: run this from the project's folder, as `python -m extras.bench`")

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from distill import LossSettings, divide_and_clip, losses_of
from model import DTYPES, GPT, GPT2, GPTNeoX, load
from support import ROOT
from support.chunked_loss import chunked_loss
from support.cli import InputError, format_table, new_parser, run_cli, user_path
from support.flags import count
from support.ranks import Ranks, autocast, keep_memory, pick_device
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
class Peer(NamedTuple):
    """One way to compute the loss of a step."""
    student: torch.nn.Module
    loss: Callable  # ids, targets (B, L) -> what backward() starts from
    is_sum: bool = False  # over tokens, so that gradients have to be divided; otherwise it is a mean
    skips_last_clm: bool = False  # of each sequence


def ours(folder, args):
    """This project: the lines of distill.train, with the teacher in the precision in which it computes."""
    if args.device == "cpu":
        keep_memory()
    teacher = load(folder / "teacher", args.device, DTYPES[args.precision]).requires_grad_(False)
    student = load(folder / "student", args.device).train()
    if args.peer == "ours-compile":
        for block in [*student.blocks, *teacher.blocks]:
            block.compile()
    settings = LossSettings(temperature=T, kd_weight=KD, clm_weight=CLM, chunk_size=args.chunk_size,
                            compile=args.peer == "ours-compile")

    def loss(ids, targets):
        with torch.no_grad():
            teacher_hidden = teacher.hidden(ids).flatten(0, 1)
        student_hidden = student.hidden(ids).flatten(0, 1)
        losses = losses_of(student_hidden, student.head_weight, teacher_hidden, teacher.head_weight,
                           targets.flatten(), settings)
        return losses.loss
    return Peer(student, loss, is_sum=True)


def ours_cache(folder, args):
    """This project with --teacher-cache: no teacher in memory, and draws for each token in its place.

    Here they are random tokens, as time and memory do not depend on which. So the loss of this peer means
    nothing; tests/test_teacher_cache.py has the tests with true draws.
    """
    if args.device == "cpu":
        keep_memory()
    student = load(folder / "student", args.device).train()
    settings = LossSettings(temperature=T, kd_weight=KD, clm_weight=CLM, chunk_size=args.chunk_size)

    def loss(ids, targets):
        n = targets.numel()
        zeros = torch.zeros(n, device=args.device)
        drawn = torch.randint(student.config.vocab_size, (n, DRAWS), device=args.device)
        draws = Draws(drawn, torch.full((n, DRAWS), 1 / DRAWS, device=args.device), zeros, zeros)
        student_hidden = student.hidden(ids).flatten(0, 1)
        losses = chunked_loss(draws_loss, student_hidden, student.head_weight, draws, None,
                              targets.flatten(), settings)
        return losses.loss
    return Peer(student, loss, is_sum=True)


def hf(folder, args):
    """The usual code: whole logits of both models, kl_div and cross_entropy."""
    student, teacher = hf_models(folder, args)

    def loss(ids, targets):
        with torch.no_grad():
            t = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (B * L, V)
        s = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (B * L, V)

        kl = F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")
        return KD * T**2 * kl + CLM * F.cross_entropy(s, targets.flatten())
    return Peer(student, loss)


def script(folder, args):
    """Like DistilGPT2's training script: the KL over logits that a boolean mask has picked, the CLM over a
    shifted copy of them, so that each sequence has one position less in the CLM than in the KL."""
    student, teacher = hf_models(folder, args)

    def loss(ids, targets):
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
    return Peer(student, loss, skips_last_clm=True)


def hf_models(folder, args):
    """Student and teacher in transformers, both in float32 as from_pretrained gives them."""
    from transformers import AutoModelForCausalLM
    models = []
    for role in ("student", "teacher"):
        model = AutoModelForCausalLM.from_pretrained(
            folder / role, dtype=torch.float32, attn_implementation="sdpa")
        model.to(args.device).eval()  # eval: without dropout, as ours
        if args.peer == "hf-compile":
            model.compile()
        models.append(model)
    student, teacher = models
    return student, teacher.requires_grad_(False)


PEERS = {"ours": ours, "ours-compile": ours, "ours-cache": ours_cache, "hf": hf, "hf-compile": hf,
         "script": script}


# ------------------------------------------------------------------------------------ one step
def batch(args, vocab_size):
    """ids and targets (B, L), random, the same in every process."""
    torch.manual_seed(1)
    tokens = torch.randint(vocab_size, (args.batch_size, args.seq_len + 1))
    return tokens[:, :-1], tokens[:, 1:]


def step(folder, args):
    """Forward, backward, clip, AdamW, as in distill.train. The first step warms up, and gives the loss."""
    peer = PEERS[args.peer](folder, args)
    student = peer.student
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    ranks = Ranks(args.device)
    ids, targets = (x.to(args.device) for x in batch(args, student.config.vocab_size))
    tokens = torch.tensor(targets.numel(), device=args.device)

    def one_step():
        with autocast(args, ranks.device):
            loss = peer.loss(ids, targets)
        loss.backward()
        if peer.is_sum:
            divide_and_clip(student, tokens, CLIP, ranks)
        else:
            torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item() / (targets.numel() if peer.is_sum else 1)

    _, first_loss = timed(args.device, one_step)
    seconds = [timed(args.device, one_step)[0] for _ in range(args.steps)]
    return {"loss": first_loss, "seconds": seconds, "peak": peak_bytes(args.device)}


def timed(device, function):
    """(seconds, result) of a call, with the work that it left to a GPU."""
    started = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def peak_bytes(device):
    """The most memory that this process has held: on the GPU, or all of it on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------------ exactness
def exactness(folder, args):
    """How far the loss and the gradient of a peer are from float64, on a text of 64 tokens:
    {"loss": |loss - loss64|, "gradient": |g - g64| / |g64| over all parameters of the student}."""
    args.batch_size, args.seq_len = 1, min(64, args.seq_len)  # float64 takes its time
    peer = PEERS[args.peer](folder, args)
    ids, targets = batch(args, peer.student.config.vocab_size)
    with autocast(args, torch.device(args.device)):
        loss = peer.loss(ids.to(args.device), targets.to(args.device))
    if peer.is_sum:
        loss = loss / targets.numel()
    loss.backward()

    student = load(folder / "student", "cpu", torch.float64)
    exact = exact_loss(student, load(folder / "teacher", "cpu", torch.float64), ids, targets, peer)
    exact.backward()

    theirs = checkpoint_gradients(student)
    error = 0.0
    length = 0.0
    for name, found in checkpoint_gradients(peer.student).items():
        error += (found.cpu().double() - theirs[name]).norm().item() ** 2
        length += theirs[name].norm().item() ** 2
    return {"loss": abs(loss.item() - exact.item()), "gradient": math.sqrt(error / length)}


def exact_loss(student, teacher, ids, targets, peer):
    """The mean loss per token, by definition."""
    s = student(ids).flatten(0, 1)  # (L, V)
    with torch.no_grad():
        t = teacher(ids).flatten(0, 1)
    log_q = (s / T).log_softmax(-1)
    log_p = (t / T).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (L)
    clm = F.cross_entropy(s, targets.flatten(), reduction="none")
    return KD * T**2 * kl.mean() + CLM * (clm[:-1] if peer.skips_last_clm else clm).mean()


def checkpoint_gradients(student):
    """{name in checkpoints: gradient}, the same names for our models and for transformers'."""
    parameters = student.named_parameters()
    if not isinstance(student, GPT):
        return {name: p.grad for name, p in parameters}
    names = student.checkpoint_names()
    return {names[name]: student.to_disk(name, p.grad) for name, p in parameters}


# ------------------------------------------------------------------------------------ processes
class Contender(NamedTuple):
    """A row of the table."""
    peer: str  # a key of PEERS
    tuned: bool = False  # in the environment TUNED
    checkout: Path = ROOT  # the folder whose code runs

    @property
    def name(self):
        before = "" if self.checkout == ROOT else " before"
        return self.peer + before + (", tuned" if self.tuned else "")


TASKS = {"step": step, "exactness": exactness}


def child(folder, args, task, contender):
    """What the function `task` returns in a fresh process, which has memory and threads of its own."""
    settings = {**vars(args), "task": task, "peer": contender.peer, "folder": str(folder)}
    env = {**os.environ, "PYTHONPATH": str(contender.checkout), "TQDM_DISABLE": "1"}
    if contender.tuned:
        env |= TUNED
    command = [sys.executable, "-m", "extras.bench", "--child", json.dumps(settings, default=str)]
    done = subprocess.run(command, cwd=contender.checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed"]
        raise InputError(f"{task} of {contender.name} failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine_load():
    """Processes that wanted a core, on average over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def measure_steps(folder, args, contenders):
    """{contender: what `step` returned, with the load before, of each round}, in turns; prints each one."""
    runs = {contender: [] for contender in contenders}
    for number in range(1, args.rounds + 1):
        for contender, rounds in runs.items():
            load_before = machine_load()
            found = child(folder, args, "step", contender)
            rounds.append({**found, "load": load_before})
            median = statistics.median(found["seconds"])
            print(f"round {number}  {contender.name:22} {median:8.3g} s a step, load before "
                  f"{spread([load_before])}", flush=True)
    return runs


# ------------------------------------------------------------------------------------ tables
def spread(values, form=".2f"):
    """The range of some values: "5.41 to 6.02"; one number if there is one, "-" if there is none."""
    values = [value for value in values if value is not None]
    shown = sorted({format(value, form) for value in values}, key=float)
    return " to ".join([shown[0], shown[-1]] if len(shown) > 1 else shown) or "-"


def cost_rows(runs, args):
    """Time, memory, and the loss of the first step, which the same code has computed."""
    first = next(iter(runs.values()))
    first_medians = [statistics.median(run["seconds"]) for run in first]

    rows = []
    for contender, rounds in runs.items():
        seconds = [s for run in rounds for s in run["seconds"]]
        median = statistics.median(seconds)

        # Ratios within a round, in which both were measured within minutes: a slow hour hits both.
        medians = [statistics.median(run["seconds"]) for run in rounds]
        ratios = [mine / other for mine, other in zip(medians, first_medians, strict=True)]
        rows.append({
            "": contender.name,
            "median, s": f"{median:.3g}",
            "range, s": spread(seconds, ".3g"),
            "time": f"{statistics.median(ratios):.2f}x",
            "by round": spread(ratios),
            "tokens/s": f"{args.batch_size * args.seq_len / median:,.0f}",
            "peak, GB": f"{max(run['peak'] for run in rounds) / 1e9:.2f}",
            "loss": "-" if contender.peer == "ours-cache" else f"{rounds[0]['loss']:.6f}",
            "load before": spread([run["load"] for run in rounds]),
        })
    return rows


def exactness_rows(folder, args, contenders):
    """Each way to compute the loss once: the environment changes no number, and random draws have no loss."""
    rows = []
    for contender in contenders:
        if contender.tuned or contender.peer == "ours-cache" or contender.checkout != ROOT:
            continue
        found = child(folder, args, "exactness", contender)
        rows.append({"": contender.name, "loss off by": f"{found['loss']:.1e}",
                     "gradient off by": f"{found['gradient']:.1e}"})
    return rows


def print_tables(folder, args, contenders):
    runs = measure_steps(folder, args, contenders)
    print(f"\nA step of {args.batch_size} x {args.seq_len} tokens, {args.shape}, {args.precision}: "
          f"{args.rounds} rounds of {args.steps} steps.\n")
    print(format_table(cost_rows(runs, args)), flush=True)

    cores = os.cpu_count() or 1
    print("\nTime: the median of the rounds' ratios to the first row. Load: processes that wanted a core in\n"
          f"the minute before, the last one of this bench included; there are {cores} cores.")
    loads = [run["load"] for rounds in runs.values() for run in rounds if run["load"] is not None]
    if loads and max(loads) > 1.25 * cores:
        print("The machine was busy with something else: measure again when it is quiet.")

    rows = exactness_rows(folder, args, contenders) if args.exact else []
    if rows:
        print("\nAgainst the definition in float64, on one text of 64 tokens:\n\n" + format_table(rows))


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.bench [options]")
    add = parser.add_argument_group("what is measured").add_argument
    add("--peers", default="ours,hf,script", metavar="NAMES",
        help=f"who makes the steps, of {', '.join(PEERS)}; the first is the measure of the others")
    add("--against", type=user_path, metavar="FOLDER",
        help="also the steps of `ours` in another checkout of this project, such as the commit before "
             "a change")
    add("--exact", action=argparse.BooleanOptionalAction, default=True,
        help="also hold losses and gradients against float64, which takes minutes and memory for large "
             "models")
    add("--tuned", action=argparse.BooleanOptionalAction, default=False,
        help="each peer once more, in an environment in which large tensors keep their memory: what the "
             "usual code could gain without a change")

    add = parser.add_argument_group("the step").add_argument
    add("--shape", choices=SHAPES, default="gpt2",
        help="gpt2: 12 layers teach 6; gpt2-medium: 24 teach 12; pythia: 160m teaches 70m; pythia-410m: "
             "it teaches 160m; tiny: to try this command")
    add("--batch-size", type=count, default=2, metavar="N", help="sequences of a step")
    add("--seq-len", type=count, default=1024, metavar="N", help="tokens of a sequence")
    add("--precision", choices=["bf16", "fp32"], default="bf16",
        help="bf16 is autocast, with weights in float32")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    add("--chunk-size", type=count, metavar="N",
        help="tokens whose logits exist at a time, in ours; lower needs less memory (default: as distill.py)")

    add = parser.add_argument_group("how often").add_argument
    add("--rounds", type=count, default=5, metavar="N",
        help="fresh processes of each peer, in turns; with fewer the range says little")
    add("--steps", type=count, default=3, metavar="N",
        help="measured steps in a process, after one that warms up")

    add("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def find_contenders(args):
    """The rows of the table: the peers, `ours` of another checkout, and all of them tuned."""
    peers = args.peers.split(",")
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise InputError(f"--peers {unknown[0]}: choose from {', '.join(PEERS)}")
    contenders = [Contender(peer) for peer in peers]
    if args.against:
        checkout = Path(args.against).resolve()
        if not (checkout / "extras" / "bench.py").exists():
            raise InputError(f"--against {checkout}: this is not a checkout of this project; `git worktree "
                             f"add {checkout} COMMIT` makes one")
        contenders.insert(1, Contender("ours", checkout=checkout))
    if args.tuned:
        contenders += [contender._replace(tuned=True) for contender in contenders]
    return contenders


def describe_machine(device):
    """Hardware, system and libraries, in a line."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    try:
        libraries = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    except PackageNotFoundError as error:
        raise InputError(f"extras.bench needs {error.name}: "
                         "python -m pip install -r requirements-dev.txt") from error
    return ", ".join([f"{device} ({hardware})", platform.platform(),
                      f"Python {platform.python_version()}", *libraries])


def main():
    args = parse_args()
    if args.child:
        settings = argparse.Namespace(**args.child)
        print(json.dumps(TASKS[settings.task](Path(settings.folder), settings)))
        return

    contenders = find_contenders(args)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = pick_device(args.device)
    print(describe_machine(args.device) + "\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model_class, teacher, student = SHAPES[args.shape]
        for role, config in (("teacher", teacher), ("student", student)):
            torch.manual_seed(len(role))
            model_class(config).save(Path(folder, role))
        print_tables(Path(folder), args, contenders)


if __name__ == "__main__":
    run_cli(main)
