"""How fast, how small, how exact: a distillation step, decoding and tokenisation against the usual code.

    python -m extras.bench                          GPT-2 in bf16: all three
    python -m extras.bench --only step --rounds 1   a first look
    python -m extras.bench --only step --precision fp32 --batch-size 4
    python -m extras.bench --only step --peers ours --against ../before
    python -m extras.bench --only step --peers ours --no-exact --shape pythia
    python -m extras.bench --only step --peers ours,ours-cache,hf,script

Read in this order:
  PEERS           who is compared, each a function that loads two models and says how it computes the loss
  step            in a process of its own: a few steps of one peer, their time, memory and loss
  answering       how long the teacher takes to make a cache, for the peer that learns from one
  reference       the same loss by definition in float64, and a gradient; `gradient` holds a peer against it
  decode          greedy text, ours against transformers' generate
  tokenise        text into a corpus, ours against datasets.map and a memory map
  child           starts one of these functions in a fresh process
  measure_steps   the peers in turns (A B C A B C ...), as a busy minute should not hit one of them alone

Models have true shapes and random weights, the same for all peers, and losses and gradients are held against
float64: nobody wins by computing something else. Run it on a machine that does nothing else. The load before
each process is printed with its time, so that a reader of the figures can see whether that was so.

Shapes: B sequences, L tokens of each, V vocabulary. T is the temperature.
"""
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
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from data import prepare
from distill import divide_and_clip
from model import DTYPES, GPT, GPT2, GPTNeoX, load
from support.chunked_loss import LossSettings, chunked_losses
from support.cli import InputError, format_table, new_parser, pick_device, run_cli, user_path
from support.documents import stdlib_documents
from support.options import DEMO_TEACHER, count
from support.runtime import Ranks, autocast, keep_memory
from support.sparse_loss import Draws
from support.teacher_cache import answers_to
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
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


def ours(folder, args):
    """This project: the lines of distill.train, with the teacher in the precision in which it computes."""
    if args.device == "cpu":
        keep_memory()
    teacher = load(folder / "teacher", args.device, DTYPES[args.precision]).requires_grad_(False)
    student = load(folder / "student", args.device).train()
    if args.peer == "ours-compile":
        for block in [*student.blocks, *teacher.blocks]:
            block.compile()
    settings = LossSettings(T, KD, CLM, chunk_size=args.chunk_size, compile=args.peer == "ours-compile")

    def loss(ids, targets):
        with torch.no_grad():
            teacher_hidden = teacher.hidden(ids).flatten(0, 1)
        student_hidden = student.hidden(ids).flatten(0, 1)
        losses = chunked_losses(student_hidden, student.head_weight, teacher_hidden, teacher.head_weight,
                                targets.flatten(), settings)
        return losses.loss
    return Peer(student, loss, is_sum=True)


def ours_cache(folder, args):
    """This project with --teacher-cache: no teacher in memory, and draws for each token in its place.

    Here they are any tokens, as time and memory do not depend on which. So the loss of this peer is held
    against nothing; that what comes of true draws is right is tested in tests/test_teacher_cache.py.
    """
    if args.device == "cpu":
        keep_memory()
    student = load(folder / "student", args.device).train()
    settings = LossSettings(T, KD, CLM, chunk_size=args.chunk_size)

    def loss(ids, targets):
        n = targets.numel()
        zeros = torch.zeros(n, device=args.device)
        drawn = torch.randint(student.config.vocab_size, (n, DRAWS), device=args.device)
        draws = Draws(drawn, torch.full((n, DRAWS), 1 / DRAWS, device=args.device), zeros, zeros)
        student_hidden = student.hidden(ids).flatten(0, 1)
        losses = chunked_losses(student_hidden, student.head_weight, draws, None, targets.flatten(), settings)
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
    """As DistilGPT2's training script: the KL over logits that a boolean mask has picked, the CLM over a
    shifted copy of them, which thereby has a position less than the KL in each sequence."""
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
    return Peer(student, loss)


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


def answering(folder, args):
    """Seconds in which the teacher answers for 1,000 tokens of a cache, of each time but the first."""
    if args.device == "cpu":
        keep_memory()
    teacher = load(folder / "teacher", args.device, DTYPES[args.precision]).requires_grad_(False)
    V = teacher.config.vocab_size
    ids, targets = (x.numpy() for x in batch(args, V))
    asked = argparse.Namespace(teacher="the teacher", temperature=T, precision=args.precision)
    header = {"vocab_size": V, "draws": DRAWS}

    answer = partial(answers_to, teacher, ids, targets, range(len(ids)), asked, header)
    timed(args.device, answer)
    return [timed(args.device, answer)[0] * 1000 / targets.size for _ in range(args.steps)]


def step_flops(args, with_teacher=True):
    """Multiplications and additions in the matrix products of a step.

    Forward 2 for each weight and token, and for the student 4 more backward. Causal attention multiplies a
    query with L / 2 keys on average, and as many values with what that gives.
    """
    model_class, *configs = SHAPES[args.shape]
    total = 0
    for config, per_weight in zip(configs, (2, 6), strict=True):  # teacher, student
        with torch.device("meta"):  # shapes alone, without memory
            network = model_class(config)
        matrices = sum(p.numel() for p in network.blocks.parameters() if p.dim() == 2)
        attention = config.n_layer * 2 * config.width * args.seq_len / 2
        head = config.width * config.vocab_size
        if per_weight == 2 and not with_teacher:
            continue
        total += per_weight * args.batch_size * args.seq_len * (matrices + attention + head)
    return total


def ceiling(folder, args):
    """FLOP/s of a large square matrix product, the best of a few: no step can be faster."""
    n = 8192 if args.device == "cuda" else 2048
    a = torch.ones(n, n, dtype=DTYPES[args.precision], device=args.device)
    fastest = min(timed(args.device, lambda: a @ a)[0] for _ in range(10))
    return {"flops": 2 * n**3 / fastest}


# ------------------------------------------------------------------------------------ exactness
def reference(folder, args):
    """The loss by definition, in float64: {"loss": over all positions, "script": without each last CLM}.

    The gradient of the first on a short text goes into gradient.safetensors, for `gradient`.
    """
    student = load(folder / "student", "cpu", torch.float64)
    teacher = load(folder / "teacher", "cpu", torch.float64).requires_grad_(False)

    def terms(ids, targets):
        """(KL, CLM) of each position of one sequence, each (L,)."""
        s = student(ids[None])[0]  # (L, V)
        t = teacher(ids[None])[0]  # (L, V)
        log_q = (s / T).log_softmax(-1)
        log_p = (t / T).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1), F.cross_entropy(s, targets, reduction="none")

    with torch.no_grad():  # one sequence at a time: float64 logits of all of them would be large
        found = [terms(*row) for row in zip(*batch(args, student.config.vocab_size), strict=True)]
    kl, clm = (torch.stack(rows) for rows in zip(*found, strict=True))  # each (B, L)
    losses = {
        "loss": (KD * T**2 * kl.mean() + CLM * clm.mean()).item(),
        "script": (KD * T**2 * kl.mean() + CLM * clm[:, :-1].mean()).item(),
    }

    kl, clm = terms(*short_text(args, student))
    (KD * T**2 * kl + CLM * clm).mean().backward()
    save_file(checkpoint_gradient(student), folder / "gradient.safetensors")
    return losses


def gradient(folder, args):
    """|g - g64| / |g64| over all parameters of the student, on the short text of `reference`."""
    peer = PEERS[args.peer](folder, args)
    ids, targets = (x[None].to(args.device) for x in short_text(args, peer.student))
    with autocast(args, torch.device(args.device)):
        loss = peer.loss(ids, targets)
    if peer.is_sum:
        loss = loss / targets.numel()
    loss.backward()

    exact = load_file(folder / "gradient.safetensors")
    error = 0.0
    length = 0.0
    for name, found in checkpoint_gradient(peer.student).items():
        error += (found.cpu().double() - exact[name]).norm().item() ** 2
        length += exact[name].norm().item() ** 2
    return math.sqrt(error / length)


def short_text(args, student, length=64):
    """ids and targets (L,) of a text that float64 can be waited for."""
    ids, targets = batch(args, student.config.vocab_size)
    return ids[0, :length], targets[0, :length]


def checkpoint_gradient(student):
    """{name in checkpoints: gradient}, the same for our models and for transformers'."""
    parameters = student.named_parameters()
    if not isinstance(student, GPT):
        return {name: p.grad for name, p in parameters}
    names = student.checkpoint_names()
    return {names[name]: student.to_disk(name, p.grad).contiguous() for name, p in parameters}


# ------------------------------------------------------------------------------------ text out, text in
def decode(folder, args, new_tokens=128):
    """{sequences: tokens/s of each way, and the share of equal ids}: greedy text of the student."""
    from transformers import AutoModelForCausalLM
    dtype = DTYPES[args.precision]
    mine = load(folder / "student", args.device, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=dtype).to(args.device).eval()
    greedily = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens,
                "pad_token_id": 0}

    result = {}
    for sequences in (1, 5):
        ids, _ = batch(args, mine.config.vocab_size)
        prompts = ids[:1, :32].repeat(sequences, 1).to(args.device)
        mask = torch.ones_like(prompts)
        ways = {"ours": partial(mine.generate, prompts, new_tokens),
                "hf": partial(theirs.generate, prompts, attention_mask=mask, **greedily)}

        fastest = dict.fromkeys(ways, math.inf)
        texts = {}
        for _ in range(4):  # in turns, as the steps are
            for name, generate in ways.items():
                seconds, texts[name] = timed(args.device, generate)
                fastest[name] = min(fastest[name], seconds)

        result[sequences] = {name: sequences * new_tokens / seconds for name, seconds in fastest.items()}
        result[sequences]["same"] = (texts["ours"] == texts["hf"]).float().mean().item()
    return result


def tokenise(folder, args):
    """MB/s of text into a corpus: prepare(), and the usual way, nanoGPT's: datasets.map, then a memory map.

    Both start from one parquet file; that the usual way loads it into an Arrow cache is not counted.
    """
    import pyarrow
    from datasets import disable_caching, disable_progress_bars, load_dataset
    from pyarrow.parquet import write_table
    disable_caching()  # or a second map() would be free
    disable_progress_bars()
    tokenizer = load_tokenizer(args.tokenizer)
    texts = library_texts(args.megabytes)
    text_file = folder / "text.parquet"
    write_table(pyarrow.table({"text": texts}), text_file)
    dataset = load_dataset(
        "parquet", data_files=str(text_file), split="train", cache_dir=str(folder / "cache"))

    fastest = {"ours": math.inf, "hf": math.inf}
    for turn in range(3):
        mine = partial(prepare, text_file, tokenizer, folder / str(turn), workers=args.workers)
        seconds, corpus = timed("cpu", mine)
        fastest["ours"] = min(fastest["ours"], seconds)

        usual = partial(map_and_write, dataset, tokenizer, folder / "usual.bin", args.workers)
        seconds, tokens = timed("cpu", usual)
        fastest["hf"] = min(fastest["hf"], seconds)
        if tokens != len(corpus.train) + len(corpus.val):
            raise InputError("datasets.map and prepare() found different numbers of tokens")

    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {name: megabytes / seconds for name, seconds in fastest.items()}


def library_texts(megabytes, length=5000):
    """Texts of about `length` characters each, from the standard library, all different."""
    library = "".join(text for _, text in stdlib_documents())
    texts = []
    for number in range(megabytes * 10**6 // length):
        start = number * length % (len(library) - length)
        texts.append(f"{number}\n{library[start:start + length]}")  # a number, or copies would be left out
    return texts


def map_and_write(dataset, tokenizer, path, workers):
    """The usual way from texts to ids on disk. Returns how many there are."""
    import numpy as np

    def encode(row):
        ids = [*tokenizer.bpe.encode_ordinary(row["text"]), tokenizer.eot]
        return {"ids": ids, "length": len(ids)}

    rows = dataset.map(encode, remove_columns=["text"], num_proc=workers)
    out = np.memmap(path, np.uint16, "w+", shape=(sum(rows["length"]),))
    at = 0
    for shard in range(64):
        ids = np.concatenate(rows.shard(64, shard, contiguous=True).with_format("numpy")["ids"])
        out[at:at + len(ids)] = ids
        at += len(ids)
    out.flush()
    return at


# ------------------------------------------------------------------------------------ processes
class Contender(NamedTuple):
    """A row of the table of steps."""
    peer: str  # a key of PEERS
    tuned: bool = False  # in the environment TUNED
    checkout: Path = ROOT  # of which commit

    @property
    def name(self):
        before = "" if self.checkout == ROOT else " before"
        return self.peer + before + (", tuned" if self.tuned else "")


TASKS = {task.__name__: task for task in (step, answering, ceiling, reference, gradient, decode, tokenise)}


def child(folder, args, task, contender=None):
    """What the function `task` returns in a fresh process, whose memory and threads are its own alone."""
    contender = contender or Contender("")
    settings = {**vars(args), "task": task, "peer": contender.peer, "folder": str(folder)}
    root = str(contender.checkout)
    env = {**os.environ, "PYTHONPATH": root, "TQDM_DISABLE": "1", **(TUNED if contender.tuned else {})}
    command = [*bench_of(contender.checkout), "--child", json.dumps(settings, default=str)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["killed"]
        raise InputError(f"{task} {contender.name} failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def bench_of(checkout):
    """The command that starts the bench of a checkout, which can be of a commit that has it at its top."""
    at_the_top = checkout / "bench.py"
    if at_the_top.exists():
        return [sys.executable, str(at_the_top)]
    if not (checkout / "extras" / "bench.py").exists():
        raise InputError(f"--against {checkout}: there is no checkout of this project; `git worktree add "
                         f"{checkout} COMMIT` makes one")
    return [sys.executable, "-m", "extras.bench"]


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


def print_steps(folder, args, contenders):
    """Both tables of the step: what it costs and, if that is asked for, how exact it is."""
    top = child(folder, args, "ceiling")["flops"]
    to_check = args.exact and any(contender.peer != "ours-cache" for contender in contenders)
    exact = child(folder, args, "reference") if to_check else None
    runs = measure_steps(folder, args, contenders)
    print(f"\nA step of {args.batch_size} x {args.seq_len} tokens, {args.shape}, {args.precision}: "
          f"{args.rounds} rounds of {args.steps} steps. The largest matrix product reaches "
          f"{top / 1e9:,.0f} GFLOP/s.\n")
    print(format_table(cost_rows(runs, args, top)), flush=True)
    if exact:
        print("\n" + format_table(exactness_rows(folder, runs, args, exact)), flush=True)
    if any(contender.peer == "ours-cache" for contender in contenders):
        print_answering(folder, args)

    cores = os.cpu_count() or 1
    loads = [run["load"] for rounds in runs.values() for run in rounds if run["load"] is not None]
    print("\nTime: the median of the rounds' ratios to the first row. Load: processes that wanted a core in\n"
          f"the minute before, the last one of this bench included; there are {cores} cores.")
    if loads and max(loads) > 1.25 * cores:
        print("The machine was busy with something else: measure again when it is quiet.")


def print_answering(folder, args):
    load_before = machine_load()
    seconds = child(folder, args, "answering")
    print(f"\nFor a cache of {DRAWS} draws the teacher answers for 1,000 tokens in "
          f"{statistics.median(seconds):.3g} s (range\n{spread(seconds, '.3g')}), load before "
          f"{spread([load_before])}. The draws of ours-cache are any tokens, so its\n"
          "loss is compared with none.", flush=True)


def cost_rows(runs, args, top):
    """Time and memory. `top`: FLOP/s of the largest matrix product."""
    first = next(iter(runs.values()))
    first_medians = [statistics.median(run["seconds"]) for run in first]
    tokens = args.batch_size * args.seq_len

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
            "tokens/s": f"{tokens / median:,.0f}",
            "of the ceiling": f"{step_flops(args, contender.peer != 'ours-cache') / median / top:.0%}",
            "peak, GB": f"{max(run['peak'] for run in rounds) / 1e9:.2f}",
            "load before": spread([run["load"] for run in rounds]),
        })
    return rows


def exactness_rows(folder, runs, args, exact):
    """Loss and gradient against float64. `exact`: the losses of `reference`."""
    rows = []
    for contender, rounds in runs.items():
        if contender.tuned or contender.peer == "ours-cache":  # the same loss; a loss of any draws
            continue
        error = "-"
        if contender.peer != "script":  # whose loss has fewer terms, so its gradient is another
            error = f"{child(folder, args, 'gradient', contender):.1e}"
        rows.append({
            "": contender.name,
            "loss": f"{rounds[0]['loss']:.6f}",
            "in float64": f"{exact['script' if contender.peer == 'script' else 'loss']:.6f}",
            "gradient off by": error,
        })
    return rows


def print_decoding(folder, args):
    rows = []
    for sequences, of in child(folder, args, "decode").items():
        rows.append({"sequences": sequences, "ours": f"{of['ours']:.0f}", "hf": f"{of['hf']:.0f}",
                     "ours is": f"{of['ours'] / of['hf']:.2f}x", "same ids": f"{of['same']:.0%}"})
    print(f"\nGreedy decoding of the student, {args.precision}: tokens/s, the best of 4; load before "
          f"{spread([machine_load()])}\n")
    print(format_table(rows), flush=True)


def print_tokenisation(folder, args):
    load_before = machine_load()
    of = child(folder, args, "tokenise")
    print(f"\nTokenisation with {args.workers} workers, the best of 3: ours {of['ours']:.1f} MB/s, "
          f"datasets.map and a memory map {of['hf']:.1f} MB/s;\nours is {of['ours'] / of['hf']:.2f}x as "
          f"fast; load before {spread([load_before])}")


# ------------------------------------------------------------------------------------ the command
def parse_args(argv=None):
    parser = new_parser(__doc__, "python -m extras.bench [options]")
    add = parser.add_argument_group("what is measured").add_argument
    add("--only", choices=["step", "decode", "tokenise"], help="one part alone; without it, all three")
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

    add = parser.add_argument_group("tokenisation").add_argument
    add("--tokenizer", type=user_path, default=DEMO_TEACHER, metavar="MODEL",
        help="a model whose tokenizer is used: folder or Hub name")
    add("--megabytes", type=count, default=40, metavar="N", help="text to tokenise")
    add("--workers", type=count, default=2, metavar="N", help="cores that tokenise")
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
        bench_of(checkout)  # refuses what is none
        contenders.insert(1, Contender("ours", checkout=checkout))
    if args.tuned:
        contenders += [contender._replace(tuned=True) for contender in contenders]
    return contenders


def describe_machine(device):
    """Hardware, system and libraries, in a line."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    try:
        libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "datasets")]
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
    if os.path.exists(args.tokenizer):
        args.tokenizer = os.path.abspath(args.tokenizer)  # processes start in the repository's folder
    print(describe_machine(args.device) + "\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model_class, teacher, student = SHAPES[args.shape]
        for role, config in (("teacher", teacher), ("student", student)):
            torch.manual_seed(len(role))
            model_class(config).save(Path(folder, role))
        if args.only in (None, "step"):
            print_steps(folder, args, contenders)
        if args.only in (None, "decode"):
            print_decoding(folder, args)
        if args.only in (None, "tokenise"):
            print_tokenisation(folder, args)


if __name__ == "__main__":
    run_cli(main)
