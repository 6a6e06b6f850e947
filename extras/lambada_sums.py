"""DistilPythia's open question, in small: why did its student get worse? (lambada perplexity 140.8 -> 420.7)

    python -m extras.lambada_sums         half an hour on a CPU; can be stopped
    python -m extras.lambada_sums --list  which runs there are, what is done

DistilPythia again, at a fiftieth of its size, with the shipped teacher. The student, a GPT-NeoX, has half of
its layers and two thirds of its width, as pythia-70m has of pythia-160m. It is trained on text alone, then
distilled by distill.py's own `train`, again and again: PLAN changes one suspect at a time. Each result goes
into out-experiment/results.json as it comes, and what stands there is not run again.

Read in this order:
  SMALL, PLAN      the setting, and what is varied
  warm_start       the student before distillation
  one_run, Watch   a run; and beside each of its steps the one that float32 would have made
  gradient_sums    what is lost in adding n micro-gradients up, n = 1 to 2048

What came of it is told in docs/lambada.md.
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

from data import prepare
from distill import load_models, make_optimizer, micro_batch, parse_args, train
from support import options
from support.chunked_loss import LossSettings, chunked_losses
from support.cli import format_table, new_parser, run_cli
from support.files import replaced
from support.log import COLUMNS, read_log
from support.options import DEMO_TEACHER
from support.runtime import Ranks, autocast
from support.scoring import validate

ROOT = Path(__file__).parent.parent
OUT = Path("out-experiment")
CPU = torch.device("cpu")
DATA = "stdlib"

# ------------------------------------------------------------------------------------ what is varied
# The student's shape, as config.json.
SHAPE = {
    "model_type": "gpt_neox", "vocab_size": 4096, "max_position_embeddings": 256, "hidden_size": 128,
    "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 512, "eos_token_id": 4095}

# Its training on text alone, in two stages. A step of AdamW is as large as its rate, whatever the loss; so
# rates keep their relation to what was before: pythia-70m's fell from 1e-3 to 1e-4 in pre-training, and
# DistilPythia took 1e-4. It is the same here.
TEXT = "--teacher none --seq-len 64 --grad-accum 1 --schedule constant --precision fp32"
STAGES = (
    f"--student-init random --batch-size 16 --steps 600 --lr 1e-3 --warmup 0.05 {TEXT}",
    f"--student-init teacher --batch-size 32 --steps 60 --lr 1e-4 --warmup 0 {TEXT}",
)

# Distillation. What is not named here is the recipe's: T = 2, 0.5 / 0.5, rate 1e-4, constant, no warm-up.
SMALL = ("--recipe distilpythia --device cpu --seq-len 64 --batch-size 1 --grad-accum 32 --steps 32 "
         "--eval-tokens 10000")
BF16 = ["bf16"]
BOTH = ["bf16", "bf16-pure"]
SUMS = "sums"  # the one entry that is no run: see gradient_sums
PLAN = [  # what it is, flags that differ from SMALL, precisions
    ("constant, seed 0", "", BOTH),
    ("padded, seed 0", "--packing padded", BOTH),
    ("T 1", "--temperature 1", BF16),
    ("text alone 0 / 1", "--kd-weight 0 --clm-weight 1", BF16),  # the control
    ("teacher alone 1 / 0", "--kd-weight 1 --clm-weight 0", BF16),
    ("lr 1e-5", "--lr 1e-5", BOTH),
    (SUMS, None, []),
    ("lr 1e-3", "--lr 1e-3", BOTH),
    ("lr 1e-3, warm-up", "--lr 1e-3 --warmup 0.25", BF16),
    ("T 4", "--temperature 4", BF16),
    ("256 micro-batches, 4 steps", "--grad-accum 256 --steps 4", BOTH),
    ("constant, seed 1", "--seed 1", BOTH),
    ("padded, seed 1", "--seed 1 --packing padded", BOTH),
    ("T 1, teacher alone 1 / 0", "--temperature 1 --kd-weight 1 --clm-weight 0", BF16),
    ("lr 1e-4, warm-up", "--warmup 0.25", BF16),
    ("AdamW beta2 0.999", "--betas 0.9 0.999", BOTH),
    ("96 steps", "--steps 96", BF16),
]
COUNTS = (1, 4, 16, 64, 256, 1024, 2048)  # of micro-gradients that are added up


def all_runs():
    """{name: flags} of PLAN, in its order; of the gradient sums, which are no run, the flags are None."""
    runs = {}
    for what, flags, precisions in PLAN:
        if what == SUMS:
            runs[SUMS] = None
        for precision in precisions:
            runs[f"{what}, {precision}"] = f"{flags} --precision {precision}"
    return runs


# ------------------------------------------------------------------------------------ before distillation
def warm_start():
    """Train the student on text alone, from the command line, unless that is done. Returns its folder."""
    student = OUT / "student"
    if (student / "model.safetensors").exists():
        return student

    shape = OUT / "shape"
    shape.mkdir(parents=True, exist_ok=True)
    (shape / "config.json").write_text(json.dumps(SHAPE))
    shutil.copy(Path(DEMO_TEACHER, "tokenizer.json"), shape)

    places = (shape, OUT / "stage1", student)
    for flags, source, target in zip(STAGES, places, places[1:], strict=False):
        subprocess.run([sys.executable, str(ROOT / "distill.py"), *flags.split(), "--data", DATA,
                        "--student", source, "--out", target, "--overwrite"], check=True)
    return student


def start(flags, name):
    """What distill.py has before it trains: args, tokenizer, teacher, student, corpus."""
    folder = OUT / "runs" / name.replace(" ", "_").replace("/", "-")
    models = ["--teacher", DEMO_TEACHER, "--student", str(OUT / "student")]
    args = parse_args([*SMALL.split(), *models, "--data", DATA, *flags.split(), "--out", str(folder)])
    options.check(args)
    tokenizer, teacher, student = load_models(args, CPU)
    corpus = prepare(args.data, tokenizer, args.data_folder)
    if args.packing == "padded":
        corpus = paragraphs(corpus, tokenizer)
    return args, tokenizer, teacher, student, corpus


def paragraphs(corpus, tokenizer):
    """The training text with an end of document after each blank line. The held-out text stays as it is.

    A module fills an example, so there would be nothing to pad; a paragraph (the median is 45 tokens) often
    does not.
    """
    blank = [i for i in range(tokenizer.eot) if tokenizer.decode_bytes([i]).count(b"\n") > 1]
    ends = np.flatnonzero(np.isin(corpus.train, blank)) + 1
    train_ids = np.insert(corpus.train, ends, tokenizer.eot)
    return SimpleNamespace(train=train_ids, val=corpus.val, meta=corpus.meta, eot=corpus.eot)


# ------------------------------------------------------------------------------------ one distillation
def one_run(name, flags):
    """One distillation: perplexity before and after, what its steps did, and how far the weights came."""
    args, tokenizer, teacher, student, corpus = start(flags, name)
    folder = Path(args.out)
    weights = vector(student.parameters())
    row = {"before": perplexity(student, args, tokenizer, corpus)}

    watch = Watch(student, args)
    hooks = [register_optimizer_step_pre_hook(watch.before), register_optimizer_step_post_hook(watch.after)]
    train(args, student, teacher, corpus, tokenizer.vocab_size, Ranks("cpu"))
    for hook in hooks:
        hook.remove()
    row["after"] = perplexity(student, args, tokenizer, corpus)
    row |= {what: float(np.mean([step[what] for step in watch.steps])) for what in watch.steps[0]}

    # The way that the weights came: how long it is, and how much it points where the same run in bf16 went.
    way = vector(student.parameters()) - weights
    torch.save(way, folder / "way.pt")
    in_bf16 = torch.load(Path(args.out.replace("bf16-pure", "bf16"), "way.pt"))
    row["cosine"] = float(torch.cosine_similarity(way, in_bf16, dim=0))
    row["way"] = float(way.norm() / weights.norm())

    # Divided logits heal a student that is only too sure (1.2), or not sure enough (0.85).
    for divisor in (0.85, 1.2):
        other = copy.deepcopy(student)
        other.head.weight.data /= divisor
        row[f"after / {divisor}"] = perplexity(other, args, tokenizer, corpus)

    (folder / "train_state.pt").unlink()  # the largest file, which nobody needs
    log = read_log(folder / "log.csv")
    return row | {column: [step[column] for step in log] for column in COLUMNS}


class Watch:
    """At each step a float32 twin gets the student's weights and gradients, and makes its own AdamW step.

    Both methods are hooks of all optimizers, the twin's own included.
    """

    def __init__(self, student, args):
        self.student = student
        self.twin = copy.deepcopy(student).float()
        self.optimizer = make_optimizer(self.twin, args)
        self.steps = []

    def before(self, optimizer, *_):
        """The twin is where the student is, and is told to go where the student is told to go."""
        if optimizer is self.optimizer:
            return
        self.weights = vector(self.student.parameters())
        for ours, real in zip(self.twin.parameters(), self.student.parameters(), strict=True):
            ours.data.copy_(real)
            ours.grad = real.grad.float()

    def after(self, optimizer, *_):
        """The student has made its step: the twin makes its own, and the two are compared."""
        if optimizer is self.optimizer:
            return
        for group, real in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = real["lr"]
        self.optimizer.step()

        step = vector(self.student.parameters()) - self.weights
        exact = vector(self.twin.parameters()) - self.weights
        self.steps.append({
            "moved": float((step != 0).double().mean()),  # the share of the weights that did
            "float32": float((exact != 0).double().mean()),
            "length": float(step.norm() / exact.norm()),
            "error": distance(step, exact),
        })


def perplexity(network, args, tokenizer, corpus):
    """On the same held-out blocks for all, in the precision of the run."""
    scoring = copy.copy(args)
    scoring.batch_size = 64
    row, = validate([network], corpus, tokenizer.vocab_size, scoring, autocast(args, CPU))
    return row["perplexity"]


def vector(tensors):
    """All of them as one vector, in float64."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def distance(a, b):
    """|a - b| / |b|."""
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------ sums of gradients
def gradient_sums():
    """Relative errors of the sum of the first n micro-gradients at the warm start, against float64."""
    sums = {(precision, n): pair for precision in BOTH for n, pair in sums_of(precision).items()}
    rows = []
    for n in COUNTS:
        row = {"n": n}
        row["1/n, n times"] = float(sum([torch.tensor(1 / n).bfloat16()] * n))  # the worst case
        for precision in BOTH:
            row[f"sum, {precision}"] = distance(*sums[precision, n])
        # All that goes wrong in bf16-pure, not the adding alone: against the exact sum of bf16's gradients.
        row["all, bf16-pure"] = distance(sums["bf16-pure", n][0], sums["bf16", n][1])
        rows.append(row)
    return rows


def sums_of(precision):
    """{n: (what .grad would hold after n micro-batches, the same gradients added in float64)}."""
    args, tokenizer, teacher, student, corpus = start(f"--precision {precision}", "sums")
    settings = LossSettings.of(args)
    parameters = [*student.parameters()]
    student.train()

    sums = {}
    added = [torch.zeros_like(parameter) for parameter in parameters]
    exact = 0
    for n in range(1, max(COUNTS) + 1):
        ids, targets = micro_batch(corpus, n - 1, args, CPU)
        with torch.no_grad(), autocast(args, CPU):
            teacher_hidden = teacher.hidden(ids).flatten(0, 1)
        with autocast(args, CPU):
            student_hidden = student.hidden(ids).flatten(0, 1)
            losses = chunked_losses(
                student_hidden, student.head_weight[:tokenizer.vocab_size], teacher_hidden,
                teacher.head_weight[:tokenizer.vocab_size], targets, settings)

        gradients = torch.autograd.grad(losses.loss, parameters)
        for total, gradient in zip(added, gradients, strict=True):
            total += gradient  # what backward() does to .grad, in the dtype of the weight
        exact = exact + vector(gradients)
        if n in COUNTS:
            sums[n] = vector(added), exact
    return sums


# ------------------------------------------------------------------------------------ the command
def read_results():
    """{name: result} of what is done."""
    path = OUT / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def print_results(results):
    """Both tables: the runs, and the sums."""
    columns = ("before", "after", "moved", "float32", "length", "error", "way", "cosine")
    rows = [{"run": name} | {column: row[column] for column in columns}
            for name, row in results.items() if name != SUMS]
    if rows:
        print(format_table(rows))
    if SUMS in results:
        print(format_table([{name: f"{value:.3g}" for name, value in row.items()} for row in results[SUMS]]))


def parse_flags(argv=None):
    parser = new_parser(__doc__, "python -m extras.lambada_sums [options]")
    add = parser.add_argument_group("what is done").add_argument
    add("--list", action="store_true", help="show the plan and what is done, and start nothing")
    return parser.parse_args(argv)


def main():
    only_list = parse_flags().list
    results = read_results()
    if only_list:
        for name, flags in all_runs().items():
            print(f"{'done' if name in results else '-':6}{name:40}{flags or ''}")
        return

    warm_start()
    for name, flags in all_runs().items():
        if name not in results:
            results[name] = gradient_sums() if name == SUMS else one_run(name, flags)
            with replaced(OUT / "results.json") as file:
                file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print_results({name: results[name] for name in all_runs()})


if __name__ == "__main__":
    run_cli(main)
