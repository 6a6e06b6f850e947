"""How fast, how small, how exact: one distillation step, decoding and tokenisation against the usual code.

    python bench.py                                             a GPT-2 step in bf16, decoding, tokenisation
    python bench.py --precision fp32 --batch-size 4 --only step
    python bench.py --shape pythia --batch-size 8 --seq-len 2048 --device cuda --peers ours,hf,hf-compile

Read in this order:
  PEERS      who is compared, each a function: a batch of tokens -> the loss of a step
  step       in a process of its own: a few steps of one peer, its time, its memory, its loss
  decode     greedy text, ours against transformers' generate
  tokenise   text into a corpus, ours against datasets.map and a memory map
  main       starts those processes in turns (A B A B ...), prints the table

Models have true shapes and random weights, the same for all peers. Losses and gradients are held against
float64, so that nobody wins by computing something else. A process that measures runs alone.
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
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import distill
import model as models
import run
from data import InputError, format_table, load_tokenizer, prepare, run_cli, stdlib_documents

T, KD, CLM = 2.0, 0.5, 0.5
PYTHIA = {"vocab_size": 50304, "max_position_embeddings": 2048}
SHAPES = {  # (teacher, student)
    "tiny": [models.GPT2Config(vocab_size=512, n_embd=64, n_head=2, n_layer=layers) for layers in (4, 2)],
    "gpt2": [models.GPT2Config(n_layer=layers) for layers in (12, 6)],
    "pythia": [models.GPTNeoXConfig(**PYTHIA, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                                    intermediate_size=3072),
               models.GPTNeoXConfig(**PYTHIA, hidden_size=512, num_hidden_layers=6, num_attention_heads=8,
                                    intermediate_size=2048)]}
TUNED = {  # what glibc and PyTorch can be told about large tensors: keep their memory, use huge pages
    "MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1"}


def new_model(config):
    """With random weights."""
    return (models.GPT2 if isinstance(config, models.GPT2Config) else models.GPTNeoX)(config)


# ------------------------------------------------------------------------------------ who is compared
def ours(folder, args):
    """This project: hidden states, loss in chunks, teacher in the precision that it computes in."""
    run.keep_memory()
    held = models.DTYPES[args.precision]
    teacher = models.load(folder / "teacher", args.device, held).requires_grad_(False)
    student = models.load(folder / "student", args.device).train()
    settings = SimpleNamespace(temperature=T, kd_weight=KD, clm_weight=CLM, cos_weight=0.0,
                               chunk_size=args.chunk_size)
    if args.peer == "ours-compile":
        for block in (*student.blocks, *teacher.blocks):
            block.compile()
    objective = distill.Objective(student, teacher, student.config.vocab_size, settings)
    return student, lambda ids, targets: objective(ids, targets).loss / targets.numel()


def hf(folder, args):
    """The usual code: whole logits of both models, kl_div and cross_entropy."""
    student, teacher = hf_models(folder, args)

    def loss(ids, targets):
        with torch.no_grad():
            t = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)  # (N, V)
        s = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        kl = F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")
        return KD * T**2 * kl + CLM * F.cross_entropy(s, targets.flatten())
    return student, loss


def script(folder, args):
    """As DistilGPT2's training script: logits of counted positions chosen by a boolean mask, for the KL; a
    shifted copy of them for the CLM, which thereby has a position less than the KL in each sequence."""
    student, teacher = hf_models(folder, args)

    def loss(ids, targets):
        attention_mask = torch.ones_like(ids)
        with torch.no_grad():
            t = teacher(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits  # (B, T, V)
        s = student(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
        counted = attention_mask.bool()[:, :, None].expand_as(s)
        s_chosen, t_chosen = (x.masked_select(counted).view(-1, x.size(-1)) for x in (s, t))
        kl = F.kl_div(F.log_softmax(s_chosen / T, -1), F.softmax(t_chosen / T, -1), reduction="batchmean")
        shifted, labels = s[:, :-1].contiguous(), ids[:, 1:].contiguous()
        return KD * T**2 * kl + CLM * F.cross_entropy(shifted.view(-1, s.size(-1)), labels.view(-1))
    return student, loss


def hf_models(folder, args):
    """Student and teacher in transformers, both in float32 as from_pretrained gives them."""
    from transformers import AutoModelForCausalLM
    load = AutoModelForCausalLM.from_pretrained
    student, teacher = (load(folder / role, dtype=torch.float32, attn_implementation="sdpa").to(args.device)
                        for role in ("student", "teacher"))
    if args.peer == "hf-compile":
        student.compile()
        teacher.compile()
    return student.eval(), teacher.eval().requires_grad_(False)  # eval: without dropout, as ours


PEERS = {"ours": ours, "ours-compile": ours, "hf": hf, "hf-compile": hf, "script": script}


# ------------------------------------------------------------------------------------ one step
def batch(args, vocab_size):
    """ids and targets (B, T), random, the same in every process."""
    torch.manual_seed(1)
    tokens = torch.randint(vocab_size, (args.batch_size, args.seq_len + 1))
    return tokens[:, :-1].to(args.device), tokens[:, 1:].to(args.device)


def step(folder, args):
    """Forward, backward, clip, AdamW, as in distill.train; the first step warms up and gives the loss."""
    student, loss_of = PEERS[args.peer](folder, args)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
    ids, targets = batch(args, student.config.vocab_size)

    def one():
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = loss_of(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    seconds, losses = zip(*(timed(args.device, one) for _ in range(args.steps + 1)), strict=True)
    return {"loss": losses[0], "seconds": seconds[1:], "peak": peak_bytes(args.device)}


def reference(folder, args):
    """By definition, in float64: {"loss": all positions in both terms, "script": its way}. The gradient of
    the first on a short text goes into gradient.safetensors."""
    load = partial(models.load, device="cpu", dtype=torch.float64)
    student, teacher, args.device = load(folder / "student"), load(folder / "teacher"), "cpu"

    def terms(ids, targets):
        """(KL, CLM) of each position of one sequence, (T,)."""
        s, t = (network.hidden(ids[None])[0] @ network.head_weight.T for network in (student, teacher))
        log_q, log_p = (s / T).log_softmax(-1), (t / T).log_softmax(-1)  # each (T, V)
        return (log_p.exp() * (log_p - log_q)).sum(-1), F.cross_entropy(s, targets, reduction="none")

    with torch.no_grad():
        found = [terms(*row) for row in zip(*batch(args, student.config.vocab_size), strict=True)]
    kl, clm = (torch.stack(of) for of in zip(*found, strict=True))  # each (B, T)
    losses = {way: (KD * T**2 * kl.mean() + CLM * c.mean()).item()
              for way, c in (("loss", clm), ("script", clm[:, :-1]))}
    kl, clm = terms(*short_text(args, student))
    (KD * T**2 * kl + CLM * clm).mean().backward()
    save_file(checkpoint_gradient(student), folder / "gradient.safetensors")
    return losses


def gradient(folder, args):
    """|g - g64| / |g64| over all parameters of the student."""
    student, loss_of = PEERS[args.peer](folder, args)
    ids, targets = (x[None].to(args.device) for x in short_text(args, student))
    with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
        loss = loss_of(ids, targets)
    loss.backward()
    exact, squares = load_file(folder / "gradient.safetensors"), torch.zeros(2, dtype=torch.float64)
    for name, found in checkpoint_gradient(student).items():
        squares += torch.stack(((found.cpu().double() - exact[name]).norm() ** 2, exact[name].norm() ** 2))
    return math.sqrt(squares[0] / squares[1])


def short_text(args, student, length=64):
    """ids and targets (T,) of a text that float64 can be waited for."""
    ids, targets = batch(args, student.config.vocab_size)
    return ids[0, :length].cpu(), targets[0, :length].cpu()


def checkpoint_gradient(student):
    """{name on the Hub: gradient}, of our models and of transformers'."""
    if not isinstance(student, models.GPT):
        return {name: p.grad for name, p in student.named_parameters()}
    names = student.checkpoint_names()
    return {names[name]: student.layout(name, p.grad, saving=True).contiguous()
            for name, p in student.named_parameters()}


def ceiling(folder, args):
    """FLOP/s of a large square matrix product, the best of a few: no step can be faster."""
    n = 8192 if args.device == "cuda" else 2048
    a = torch.ones(n, n, dtype=models.DTYPES[args.precision], device=args.device)
    return {"flops": 2 * n**3 / min(timed(args.device, lambda: a @ a)[0] for _ in range(10))}


def step_flops(args):
    """Multiplications and additions in the matrix products of a step: 2 per weight and token forward, 4 more
    backward for the student, and those of causal attention (T / 2 keys per query, on average)."""
    total = 0
    for role, config in zip(("teacher", "student"), SHAPES[args.shape], strict=True):
        with torch.device("meta"):
            network = new_model(config)
        matrices = sum(p.numel() for p in network.blocks.parameters() if p.dim() == 2)
        width = len(network.norm.weight)
        attention = len(network.blocks) * 2 * width * args.seq_len / 2
        weights = matrices + attention + width * config.vocab_size
        total += args.batch_size * args.seq_len * weights * (2 if role == "teacher" else 6)
    return total


def timed(device, function):
    """(seconds, result) of a call, the work that it left to a GPU included."""
    started = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def peak_bytes(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------ text out, text in
def decode(folder, args, tokens=128):
    """Greedy tokens/s of the student, 1 and 5 sequences, ours and transformers' in turns; the same ids?"""
    from transformers import AutoModelForCausalLM
    dtype = models.DTYPES[args.precision]
    mine = models.load(folder / "student", args.device, dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=dtype).to(args.device).eval()
    result = {}
    for sequences in (1, 5):
        ids = batch(args, mine.config.vocab_size)[0][:1, :32].repeat(sequences, 1)
        greedily = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        ways = {"ours": partial(mine.generate, ids, tokens),
                "hf": partial(theirs.generate, ids, attention_mask=mask, **greedily)}
        best, texts = dict.fromkeys(ways, math.inf), {}
        for _ in range(4):
            for name, generate in ways.items():
                seconds, texts[name] = timed(args.device, generate)
                best[name] = min(best[name], seconds)
        result[sequences] = {name: sequences * tokens / seconds for name, seconds in best.items()}
        result[sequences]["same"] = (texts["ours"] == texts["hf"]).float().mean().item()
    return result


def tokenise(folder, args, document=5000):
    """MB/s of text into a corpus: prepare(), and the usual way, nanoGPT's: datasets.map, then a memory map.
    Both start from one parquet file; that the usual way loads it into an Arrow cache is not counted."""
    import numpy as np
    import pyarrow
    from datasets import disable_caching, disable_progress_bars, load_dataset
    from pyarrow.parquet import write_table
    disable_caching()  # or a second map() would be free
    disable_progress_bars()
    tokenizer = load_tokenizer(args.tokenizer)
    library = "".join(text for _, text in stdlib_documents())
    starts = [i * document % (len(library) - document) for i in range(args.megabytes * 10**6 // document)]
    texts = [f"{n}\n{library[start:start + document]}" for n, start in enumerate(starts)]
    write_table(pyarrow.table({"text": texts}), folder / "text.parquet")
    dataset = load_dataset("parquet", data_files=str(folder / "text.parquet"), split="train",
                           cache_dir=str(folder / "cache"))

    def encode(row):
        ids = [*tokenizer.bpe.encode_ordinary(row["text"]), tokenizer.eot]
        return {"ids": ids, "length": len(ids)}

    def usual():
        rows = dataset.map(encode, remove_columns=["text"], num_proc=args.workers)
        out = np.memmap(folder / "usual.bin", np.uint16, "w+", shape=(sum(rows["length"]),))
        at = 0
        for shard in range(64):
            ids = np.concatenate(rows.shard(64, shard, contiguous=True).with_format("numpy")["ids"])
            out[at:at + len(ids)] = ids
            at += len(ids)
        out.flush()
        return at

    best, size = {"ours": math.inf, "hf": math.inf}, sum(len(text.encode()) for text in texts)
    for turn in range(3):
        mine = partial(prepare, folder / "text.parquet", tokenizer, folder / str(turn), workers=args.workers)
        seconds, corpus = timed("cpu", mine)
        best["ours"] = min(best["ours"], seconds)
        seconds, tokens = timed("cpu", usual)
        best["hf"] = min(best["hf"], seconds)
        if tokens != len(corpus.train) + len(corpus.val):
            raise InputError("datasets.map and prepare() found different numbers of tokens")
    return {name: size / 1e6 / seconds for name, seconds in best.items()}


# ------------------------------------------------------------------------------------ the table
def child(folder, args, task, peer="", tuned=False):
    """What the function `task` returns in a fresh process, through JSON."""
    settings = json.dumps({**vars(args), "task": task, "peer": peer, "folder": str(folder)})
    env = {**os.environ, "TQDM_DISABLE": "1", **(TUNED if tuned else {})}
    command = [sys.executable, __file__, "--child", settings]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{task} {peer} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def step_table(folder, args, peers):
    """The rows of the step: the peers in turns, every round in fresh processes."""
    top, exact = child(folder, args, "ceiling")["flops"], child(folder, args, "reference")
    runs = {(peer, tuned): [] for peer in peers for tuned in ((False, True) if args.tuned else (False,))}
    for _ in range(args.rounds):
        for peer, tuned in runs:
            runs[peer, tuned].append(child(folder, args, "step", peer, tuned))
    median = {key: statistics.median(s for run in of for s in run["seconds"]) for key, of in runs.items()}
    errors = {peer: child(folder, args, "gradient", peer) for peer in peers if peer != "script"}
    n, flops, first = args.batch_size * args.seq_len, step_flops(args), next(iter(median.values()))
    print(f"A step of {args.batch_size} x {args.seq_len} tokens, {args.shape}, {args.precision}. The largest "
          f"matrix product reaches {top / 1e9:,.0f} GFLOP/s.\n")
    rows = []
    for (peer, tuned), of in runs.items():
        seconds, loss = median[peer, tuned], of[0]["loss"]
        rows.append({"": f"{peer}, tuned" if tuned else peer, "median, s": f"{seconds:.2f}",
                     "tokens/s": f"{n / seconds:,.0f}", "time": f"{seconds / first:.2f}x",
                     "peak, GB": f"{max(run['peak'] for run in of) / 1e9:.2f}",
                     "of the ceiling": f"{flops / seconds / top:.0%}", "loss": f"{loss:.6f}",
                     "float64": f"{exact['script' if peer == 'script' else 'loss']:.6f}",
                     "gradient off by": f"{errors[peer]:.1e}" if peer in errors else "-"})
    print(format_table(rows), flush=True)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="gpt2", help="gpt2: 12 layers teach 6; pythia: 160m teaches 70m")
    add("--batch-size", type=int, default=2, help="sequences of a step")
    add("--seq-len", type=int, default=1024, help="tokens of a sequence")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="bf16: under autocast")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
        help="where")
    add("--peers", default="ours,hf,script", help=f"of {', '.join(PEERS)}; the first is the measure")
    add("--tuned", action=argparse.BooleanOptionalAction, default=False,
        help="each peer once more with an environment in which large tensors keep their memory")
    add("--chunk-size", type=int, default=512, help="tokens whose logits exist at a time, in ours")
    add("--rounds", type=int, default=2, help="fresh processes of each peer, in turns")
    add("--steps", type=int, default=3, help="measured steps in a process, after one to warm up")
    add("--only", choices=["step", "decode", "tokenise"], help="one part alone")
    add("--tokenizer", default="demo/teacher", help="a model whose tokenizer tokenises: folder or Hub name")
    add("--megabytes", type=int, default=40, help="text to tokenise")
    add("--workers", type=int, default=2, help="cores that tokenise")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main():
    args = parse_args()
    if args.child:
        args = argparse.Namespace(**args.child)
        task = {f.__name__: f for f in (step, gradient, reference, ceiling, decode, tokenise)}[args.task]
        print(json.dumps(task(Path(args.folder), args)))
        return
    peers = args.peers.split(",")
    if unknown := [peer for peer in peers if peer not in PEERS]:
        raise InputError(f"--peers {unknown[0]}: choose from {', '.join(PEERS)}")
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    try:
        libraries = [f"{name} {version(name)}" for name in ("torch", "transformers", "datasets")]
    except PackageNotFoundError as error:
        raise InputError(f"bench.py needs {error.name}: pip install -r requirements-dev.txt") from error
    print(f"{args.device} ({hardware}), {platform.platform()}, Python {platform.python_version()},",
          ", ".join(libraries) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        for role, config in zip(("teacher", "student"), SHAPES[args.shape], strict=True):
            torch.manual_seed(len(role))
            new_model(config).save(Path(folder, role))
        if args.only in (None, "step"):
            step_table(folder, args, peers)
        if args.only in (None, "decode"):
            print(f"\nGreedy decoding of the student, {args.precision}: tokens/s, the best of 4\n")
            print(format_table([{"sequences": sequences, "ours": f"{of['ours']:.0f}", "hf": f"{of['hf']:.0f}",
                                 "ours is": f"{of['ours'] / of['hf']:.2f}x", "same ids": f"{of['same']:.0%}"}
                                for sequences, of in child(folder, args, "decode").items()]), flush=True)
        if args.only in (None, "tokenise"):
            of = child(folder, args, "tokenise")
            print(f"\nTokenisation with {args.workers} workers: ours {of['ours']:.1f} MB/s, datasets.map and "
                  f"a memory map {of['hf']:.1f} MB/s; ours is {of['ours'] / of['hf']:.2f}x as fast")


if __name__ == "__main__":
    run_cli(main)
