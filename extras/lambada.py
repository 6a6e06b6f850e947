"""DistilPythia's open question, in small: why did its student get worse? (lambada perplexity 140.8 -> 420.7)

    python -m demo.experiment     half an hour or so on a CPU; runs found in out-experiment/ are kept

DistilPythia again, at a fiftieth of its size, with the shipped teacher. The student, a GPT-NeoX, has half of
its layers and two thirds of its width, as pythia-70m has of pythia-160m. It is trained on text alone, then
distilled by distill.py's own `train`, again and again: PLAN changes one suspect at a time.

Read in this order:
  SMALL, PLAN      the setting, and what is varied
  warm_start       the student before distillation
  one_run, Watch   a run; and beside each of its steps the one that float32 would have made
  gradient_sums    what is lost in adding n micro-gradients up, n = 1 to 2048
"""
import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import distill
import run
from data import format_table, prepare, run_cli

OUT, CPU = Path("out-experiment"), torch.device("cpu")
STUDENT, RESULTS = OUT / "student", OUT / "results.json"
SHAPE = {"model_type": "gpt_neox", "vocab_size": 4096, "max_position_embeddings": 256, "hidden_size": 128,
         "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 512, "eos_token_id": 4095}

# A step of AdamW is as large as its rate, whatever the loss; so rates keep their relation to what was before:
# pythia-70m's fell from 1e-3 to 1e-4 in pre-training, and DistilPythia took 1e-4. It is the same here.
TEXT = "--teacher none --data stdlib --seq-len 64 --grad-accum 1 --schedule constant --precision fp32"
STAGES = (f"--student-init random --batch-size 16 --steps 600 --lr 1e-3 --warmup 0.05 {TEXT}",
          f"--student-init teacher --batch-size 32 --steps 60 --lr 1e-4 --warmup 0 {TEXT}")

# What is not named here is the recipe's: T = 2, 0.5 / 0.5, rate 1e-4, constant, without warm-up.
SMALL = (f"--recipe distilpythia --teacher {distill.DEMO_TEACHER} --student {STUDENT} --data stdlib "
         "--device cpu --seq-len 64 --batch-size 1 --grad-accum 32 --steps 32 --eval-tokens 10000")
BF16, BOTH = ["bf16"], ["bf16", "bf16-pure"]
PLAN = [("constant, seed 0", "", BOTH),
        ("padded, seed 0", "--packing padded", BOTH),
        ("T 1", "--temperature 1", BF16),
        ("text alone 0 / 1", "--kd-weight 0 --clm-weight 1", BF16),  # the control
        ("teacher alone 1 / 0", "--kd-weight 1 --clm-weight 0", BF16),
        ("lr 1e-5", "--lr 1e-5", BOTH),
        ("lr 1e-3", "--lr 1e-3", BOTH),
        ("lr 1e-3, warm-up", "--lr 1e-3 --warmup 0.25", BF16),
        ("T 4", "--temperature 4", BF16),
        ("256 micro-batches, 4 steps", "--grad-accum 256 --steps 4", BOTH),
        ("constant, seed 1", "--seed 1", BOTH),
        ("padded, seed 1", "--seed 1 --packing padded", BOTH),
        ("T 1, teacher alone 1 / 0", "--temperature 1 --kd-weight 1 --clm-weight 0", BF16),
        ("lr 1e-4, warm-up", "--warmup 0.25", BF16),
        ("AdamW beta2 0.999", "--betas 0.9 0.999", BOTH),
        ("96 steps", "--steps 96", BF16)]
RUNS = {f"{what}, {precision}": f"{flags} --precision {precision}"
        for what, flags, precisions in PLAN for precision in precisions}


def warm_start():
    """Train the student on text alone, from the command line."""
    (shape := OUT / "shape").mkdir(parents=True, exist_ok=True)
    (shape / "config.json").write_text(json.dumps(SHAPE))
    shutil.copy(Path(distill.DEMO_TEACHER) / "tokenizer.json", shape)
    for flags, source, target in zip(STAGES, (shape, OUT / "stage1"), (OUT / "stage1", STUDENT), strict=True):
        places = ["--student", source, "--out", target, "--overwrite"]
        subprocess.run([sys.executable, "distill.py", *flags.split(), *places], check=True)


def start(flags, name):
    """What distill.py has before it trains: args, tokenizer, teacher, student, corpus."""
    (folder := OUT / "runs" / name.replace(" ", "_").replace("/", "-")).mkdir(parents=True, exist_ok=True)
    args = distill.parse_args(f"{SMALL} {flags} --out {folder}".split())
    run.check(args)
    tokenizer, teacher, student = distill.load_models(args, CPU)
    corpus = prepare(args.data, tokenizer)
    if args.packing == "padded":
        corpus = paragraphs(corpus, tokenizer)
    return args, tokenizer, teacher, student, corpus


def paragraphs(corpus, tokenizer):
    """The training text with an end of document after each blank line: a module fills an example, a paragraph
    (the median is 45 tokens) often does not. The held-out text stays as it is."""
    blank = [i for i in range(tokenizer.eot) if tokenizer.decode_bytes([i]).count(b"\n") > 1]
    train = np.insert(corpus.train, np.flatnonzero(np.isin(corpus.train, blank)) + 1, tokenizer.eot)
    return SimpleNamespace(train=train, val=corpus.val, meta=corpus.meta)


def perplexity(network, args, tokenizer, corpus):
    """On the same held-out blocks for all, in the precision of the run."""
    args = copy.copy(args)
    args.batch_size = 64
    autocast = distill.autocast(args, CPU)
    return run.validate([network], corpus, tokenizer.vocab_size, args, autocast)[0]["perplexity"]


def vector(tensors):
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def distance(a, b):
    return float((a - b).norm() / b.norm())


class Watch:
    """At each step a float32 twin gets the student's weights and gradients, and makes its own AdamW step."""

    def __init__(self, student, args):
        self.student, self.twin, self.steps = student, copy.deepcopy(student).float(), []
        self.optimizer = distill.make_optimizer(self.twin, args)

    def before(self, optimizer, *_):
        if optimizer is self.optimizer:
            return
        self.weights = vector(self.student.parameters())
        for ours, real in zip(self.twin.parameters(), self.student.parameters(), strict=True):
            ours.data.copy_(real)
            ours.grad = real.grad.float()

    def after(self, optimizer, *_):
        if optimizer is self.optimizer:
            return
        for group, real in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = real["lr"]
        self.optimizer.step()
        step, exact = (vector(network.parameters()) - self.weights for network in (self.student, self.twin))
        self.steps.append({"moved": (step != 0).double().mean(), "float32": (exact != 0).double().mean(),
                           "length": step.norm() / exact.norm(), "error": distance(step, exact)})


def one_run(name):
    """One distillation: perplexity before and after, what its steps did, and how far the weights came."""
    args, tokenizer, teacher, student, corpus = start(RUNS[name], name)
    folder, weights, watch = Path(args.out), vector(student.parameters()), Watch(student, args)
    row = {"before": perplexity(student, args, tokenizer, corpus)}
    hooks = register_optimizer_step_pre_hook(watch.before), register_optimizer_step_post_hook(watch.after)
    distill.train(args, student, teacher, corpus, tokenizer.vocab_size, run.Ranks("cpu"))
    for hook in hooks:
        hook.remove()
    row["after"] = perplexity(student, args, tokenizer, corpus)
    row |= {what: float(np.mean([step[what] for step in watch.steps])) for what in watch.steps[0]}
    way = vector(student.parameters()) - weights
    torch.save(way, folder / "way.pt")
    twin = torch.load(Path(args.out.replace("bf16-pure", "bf16")) / "way.pt")  # the same run in bf16
    row["cosine"] = float(torch.cosine_similarity(way, twin, dim=0))
    row["way"] = float(way.norm() / weights.norm())
    for divisor in (0.85, 1.2):  # of the logits: heals a student that is just too sure, or unsure
        other = copy.deepcopy(student)
        other.head.weight.data /= divisor
        row[f"after / {divisor}"] = perplexity(other, args, tokenizer, corpus)
    log = np.genfromtxt(folder / "log.csv", delimiter=",", names=True)
    (folder / "train_state.pt").unlink()
    return row | {column: log[column].tolist() for column in log.dtype.names}


def gradient_sums(counts=(1, 4, 16, 64, 256, 1024, 2048)):
    """Relative errors of the sum of the first n micro-gradients at the warm start, against float64."""
    sums = {}
    for precision in BOTH:
        args, tokenizer, teacher, student, corpus = start(f"--precision {precision}", "sums")
        objective = distill.Objective(student, teacher, tokenizer.vocab_size, args)
        added, exact = [torch.zeros_like(p) for p in student.parameters()], 0
        for n in range(1, max(counts) + 1):
            ids, targets, _ = distill.micro_batch(corpus, n - 1, args, CPU)
            with distill.autocast(args, CPU):
                losses = objective(ids, targets)
            gradients = torch.autograd.grad(losses.loss, [*student.parameters()])
            for total, gradient in zip(added, gradients, strict=True):
                total += gradient  # what backward() does to .grad, in the dtype of the weight
            exact = exact + vector(gradients)
            if n in counts:
                sums[precision, n] = vector(added), exact
    return [{"n": n, "1/n, n times": float(sum([torch.tensor(1 / n).bfloat16()] * n)),  # the worst case
             **{f"sum, {p}": distance(*sums[p, n]) for p in BOTH},
             "all, bf16-pure": distance(sums["bf16-pure", n][0], sums["bf16", n][1])} for n in counts]


def main():
    if not (STUDENT / "model.safetensors").exists():
        warm_start()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [*list(RUNS)[:9], "sums", *list(RUNS)[9:]]:
        if name not in results:
            results[name] = gradient_sums() if name == "sums" else one_run(name)
            RESULTS.write_text(json.dumps(results, indent=1))
    columns = ("before", "after", "moved", "float32", "length", "error", "way", "cosine")
    print(format_table([{"run": name} | {c: results[name][c] for c in columns} for name in RUNS]))
    print(format_table([{c: f"{v:.3g}" for c, v in row.items()} for row in results["sums"]]))


if __name__ == "__main__":
    run_cli(main)
