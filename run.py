"""What surrounds the training loop, so that distill.py can be read without it.

Read in this order:
  Ranks                       one process, or the many that torchrun started
  check                       settings that cannot work
  Log, print_plan, validate   what a person sees: before, during, after
  stop_signals                Ctrl-C and SIGTERM
  claim, save_state, resume   --out belongs to one run, and that run survives being killed at any moment
  write_card                  the README.md of the exported student
"""
import contextlib
import csv
import ctypes
import json
import math
import os
import platform
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data import InputError, replaced
from eval_ppl import compare


class Ranks:
    """The processes of a run: one, or as many as torchrun started. Rank 0 prints and writes."""

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        if self.world > 1:
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(days=1))  # rank 0 may tokenise for hours

    def sum(self, tensor):
        """Add `tensor` up over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):
        """Whether `flag` is true on some rank; all ranks must ask."""
        if self.world == 1:
            return bool(flag)
        return self.sum(torch.tensor(float(bool(flag)), device=self.device)).item() > 0

    def close(self):
        if self.world > 1:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def rank_0_first(self):
        """Rank 0 downloads and prepares; the others then find it done."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.world > 1:
            dist.barrier()


def keep_memory():
    """Let glibc keep the memory of freed tensors. It gives large ones back to the system, which clears their
    pages one by one when the next step asks for them again: a tenth of a GPT-2 step on a CPU."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation of its own for any tensor
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def bf16_is_fast(device):
    """GPUs say so. On a CPU a product is timed: without bf16 instructions it is several times slower."""
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(512, 512, dtype=dtype)
        a @ a  # the first product sets things up
        started = time.perf_counter()
        for _ in range(10):
            a @ a
        seconds.append(time.perf_counter() - started)
    return seconds[0] < seconds[1]


def check(args):
    """Refuse what can be refused before anything is loaded."""
    def refuse(names, condition, wanted):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not condition(value):
                raise InputError(f"--{name.replace('_', '-')} {value}: must be {wanted}")

    refuse("temperature batch_size grad_accum seq_len steps epochs lr eps chunk_size save_interval "
           "eval_tokens workers",
           lambda value: 0 < value < math.inf, "above 0")
    refuse("kd_weight clm_weight cos_weight weight_decay grad_clip eval_interval",
           lambda value: 0 <= value < math.inf, "0 or more")
    refuse("warmup dropout attention_dropout", lambda value: 0 <= value < 1, "at least 0 and below 1")
    refuse("betas", lambda pair: all(0 <= beta < 1 for beta in pair), "at least 0 and below 1")
    refuse("seed", lambda value: value >= 0, "0 or more")
    if not args.teacher:
        raise InputError("--teacher is missing: name a model, or `none` to train on the text alone")
    if bool(args.student) == bool(args.student_layers):
        raise InputError("name one student: --student-layers (of the teacher) or --student (another model)")
    if args.teacher == "none":
        if args.student_layers:
            raise InputError("--student-layers are a teacher's; with --teacher none name a --student")
        args.kd_weight = args.cos_weight = 0.0
    if args.kd_weight + args.clm_weight + args.cos_weight == 0:
        raise InputError("all weights of the loss are 0: nothing would be learned; raise one of them")


def precision(args, ranks):
    """--precision, with `auto` resolved: what a run to resume has had, otherwise bf16 where it is fast."""
    if args.precision != "auto":
        return args.precision
    if args.resume and "precision" in settings_of(args.out):
        return settings_of(args.out)["precision"]
    if not ranks.any(not bf16_is_fast(ranks.device)):
        return "bf16"
    if ranks.rank == 0:
        print("note       bf16 is not fast on this device, so fp32")
    return "fp32"


# ------------------------------------------------------------------------------------ what a person sees
def formula(args):
    """The loss with its numbers."""
    T = f"{args.temperature:g}"
    terms = {f"{T}² * KL(teacher || student, T = {T})": args.kd_weight, "CLM": args.clm_weight,
             "(1 - cos)": args.cos_weight}
    return "loss = " + " + ".join(f"{weight:g} * {term}" for term, weight in terms.items() if weight)


def origin(args):
    """Where the student comes from."""
    source = f"layers {args.student_layers} of {args.teacher}" if args.student_layers else args.student
    return f"{source}, the shape alone with random weights" if args.student_init == "random" else source


def print_plan(args, teacher, student, corpus, ranks):
    """What is about to happen, before it does."""
    tokens = args.grad_accum * args.batch_size * args.seq_len
    for role, name, network in (("teacher", args.teacher, teacher), ("student", origin(args), student)):
        if network:
            millions = network.num_parameters() / 1e6
            print(f"{role:10} {name}: {len(network.blocks)} layers, {millions:.1f}M parameters")
    print(f"objective  {formula(args)}")
    print(f"data       {args.data}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out")
    print(f"steps      {args.steps:,} of {args.grad_accum} x {args.batch_size} x {args.seq_len} = {tokens:,} "
          f"tokens; rate {args.lr:g}, {args.schedule} after {args.warmup:.0%} warm-up")
    print(f"on         {ranks.world} x {ranks.device}, {args.precision}; all goes to {args.out}/", flush=True)
    if args.precision == "bf16-pure":
        print("warning    bf16-pure: weights and sums of gradients lose small updates (see the README)")
    if ranks.device.type == "cpu" and tokens * args.steps > 30_000_000:
        print("note       this is work for a GPU; on a CPU try --steps 10 --grad-accum 2 --batch-size 2 "
              "--seq-len 128")


class Log:
    """out/log.csv, one row a step, and a progress bar with the same figures; silent on ranks above 0."""
    COLUMNS = ("step", "loss", "kl", "clm", "cos", "teacher_clm", "lr", "grad_norm", "tokens",
               "tokens_per_second")

    def __init__(self, args, first, ranks):
        from tqdm import tqdm
        self.first, self.steps, self.silent = first, args.steps, ranks.rank > 0
        self.bar = tqdm(total=args.steps, initial=first, unit="step", disable=self.silent,
                        desc="distilling" if args.kd_weight else "training")
        if not self.silent:
            path = Path(args.out) / "log.csv"
            rows = list(csv.reader(path.open())) if first else [self.COLUMNS]
            with replaced(path) as temporary, open(temporary, "w", newline="") as file:
                # steps after the last saved state will be made again
                csv.writer(file).writerows(row for row in rows if row[0] == "step" or int(row[0]) <= first)
            self.file, self.started = open(path, "a", newline="", buffering=1), time.time()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if not self.silent:
            self.file.close()

    def say(self, text):
        if not self.silent:
            self.bar.write(text)

    def write(self, step, losses, **rest):
        if self.silent:
            return
        row = (step, *losses, *rest.values())
        csv.writer(self.file).writerow(f"{v:.7g}" if isinstance(v, float) else v for v in row)
        shown = {"loss": losses.loss, "KL": losses.kl, "CLM": losses.clm, "teacher": losses.teacher_clm}
        shown = {name: f"{value:.3f}" for name, value in shown.items() if value}
        self.bar.set_postfix(shown | {"tok/s": rest["tokens_per_second"]}, refresh=False)
        self.bar.update()
        if step == self.first + 3 < self.steps:
            left = timedelta(seconds=round((time.time() - self.started) / 3 * (self.steps - step)))
            self.say(f"at this speed the {self.steps - step:,} steps to come take {left} (h:mm:ss)")


def validate(networks, corpus, vocab_size, args, autocast):
    """Scores of several models on the start of the held-out text; a teacher comes first."""
    modes = [network.training for network in networks]
    tokens = torch.from_numpy(corpus.val[:args.eval_tokens + 1].astype("int64"))
    length = min(args.seq_len, len(tokens) - 1)
    device = networks[0].embed.weight.device
    batches = ((block[:, :-1].to(device), block[:, 1:].to(device))  # each (B, T)
               for block in tokens.unfold(0, length + 1, length).split(args.batch_size))
    sums = compare([network.eval() for network in networks], batches, vocab_size, lambda: autocast)
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)
    bytes_per_token = corpus.meta["val"]["bytes"] / corpus.meta["val"]["tokens"]
    rows = []
    for network, s in zip(networks, sums, strict=True):
        loss = s["nll"] / s["tokens"]
        rows.append({"parameters": network.num_parameters(), "loss": loss, "perplexity": math.exp(loss),
                     "bits per byte": loss / bytes_per_token / math.log(2)})
        if len(networks) > 1:
            rows[-1] |= {"KL to teacher": s["kl"] / s["tokens"], "same top-1": s["agree"] / s["tokens"]}
    return rows


# ------------------------------------------------------------------------------------ stopping and surviving
@contextlib.contextmanager
def stop_signals():
    """A list that fills when Ctrl-C or SIGTERM asks to stop; asked twice, the process ends at once."""
    asked = []

    def ask(number, frame):
        if asked:
            sys.exit(128 + number)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


RUN_FILES = ("args.json", "log.csv", "train_state.pt", "config.json", "generation_config.json",
             "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


def claim(args):
    """Hold --out for this process alone. Refuses a folder that holds another run; deletes nothing."""
    from filelock import FileLock, Timeout  # torch and huggingface_hub bring it along
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"--out {out} is in use by another process; choose another --out") from error
    except OSError as error:
        raise InputError(f"--out {out} cannot be written ({error.strerror}); choose another --out") from error
    before = settings_of(out)
    if args.resume and not before:
        raise InputError(f"--resume: there is no run in {out}")
    demo_again = args.recipe == before.get("recipe") == "demo" and (out / "README.md").exists()  # finished
    if any((out / name).exists() for name in RUN_FILES) and not (args.resume or args.overwrite or demo_again):
        raise InputError(f"--out {out} holds another run: --resume goes on with it, --overwrite replaces it")
    return lock


def settings_of(out):
    """The args.json of the run in a folder; {} if there is none."""
    path = Path(out, "args.json")
    return json.loads(path.read_text()) if path.exists() else {}


CHANGES_NOTHING = ("recipe", "out", "resume", "overwrite", "device", "data_folder", "workers", "compile",
                   "control", "eval_interval", "eval_tokens", "save_interval")


def identity(args, corpus):
    """What makes a run the one that it is."""
    kept = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING}
    return {**kept, "training tokens": len(corpus.train)}


def save_state(args, corpus, student, optimizer, step, ranks):
    """Replace out/train_state.pt, so that a complete one is on disk at every moment.

    No random state is in it: data order and dropout follow from the seed and the step, so the step is enough.
    """
    if ranks.rank == 0:
        state = {"step": step, "settings": identity(args, corpus), "student": student.state_dict(),
                 "optimizer": optimizer.state_dict()}
        with replaced(Path(args.out) / "train_state.pt") as path, open(path, "wb") as file:
            torch.save(state, file)


def resume(args, corpus, student, optimizer):
    """Put weights and optimizer back from out/train_state.pt. Returns the number of finished steps."""
    path = Path(args.out) / "train_state.pt"
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    then, now = state["settings"], identity(args, corpus)
    if changed := [f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
                   for name in {**then, **now} if then.get(name) != now.get(name)]:
        raise InputError(f"--resume of {args.out} with other settings: {'; '.join(changed)}")
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ------------------------------------------------------------------------------------ the student's README.md
CARD = """---
library_name: transformers
pipeline_tag: text-generation{tags}
---
# A {made} GPT

Made by distil-from-scratch. Teacher: {teacher}. Student: {origin}.

    {formula}

{steps:,} steps, {tokens:,} tokens of `{data}` ({packing} packing, sequences of {seq_len}). AdamW, learning
rate {lr:g} ({schedule}), seed {seed}, {precision}. Settings: `args.json`; every step: `log.csv`.
Hardware: {ranks} x {hardware}, {hours:.2f} hours of training steps. Energy and CO2 were not measured.

## Results on held-out text of the same data

{table}

## Limitations

{inherited}Read the card of the model that it comes from before using it, and measure it on your task.
"""
INHERITED = """The student learns to say what its teacher says: the errors and biases of the teacher become
its own, and being smaller it adds some. """


def write_card(args, ranks, table):
    """The model card, from the settings and the log."""
    rows = list(csv.DictReader((Path(args.out) / "log.csv").open()))
    hardware = torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{platform.machine()} CPU"
    about = {"teacher": "none", "tags": "", "made": "trained", "inherited": ""}
    if args.teacher != "none":
        about = {"teacher": f"`{args.teacher}`", "tags": "\ntags: [distillation]", "made": "distilled",
                 "inherited": INHERITED}
    text = CARD.format(**vars(args) | about, origin=origin(args), formula=formula(args), table=table,
                       ranks=ranks.world, hardware=hardware, tokens=sum(int(row["tokens"]) for row in rows),
                       hours=sum(int(row["tokens"]) / int(row["tokens_per_second"]) for row in rows) / 3600)
    (Path(args.out) / "README.md").write_text(text, encoding="utf-8")
