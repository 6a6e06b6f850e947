"""What is said of a run: the plan on the screen before it, the model card of the student after it.

  formula, origin   the loss and the student, in a line each
  print_plan        what is about to happen
  write_card        README.md of the exported student
"""
import platform
from pathlib import Path

import torch

from support.files import replaced
from support.log import read_log, seconds_of

DIVERGENCES = {
    "forward": "KL(teacher || student",
    "reverse": "KL(student || teacher",
    "jsd": "JSD(teacher, student",
}


def formula(args):
    """The loss with its numbers: "loss = 0.5 * 2² * KL(teacher || student, T = 2) + 0.5 * CLM"."""
    T = f"{args.temperature:g}"
    cached = getattr(args, "teacher_cache", None)  # settings of older runs have none
    draws = f", {args.cache_draws} draws" if cached else ""
    terms = {
        f"{T}² * {DIVERGENCES[args.divergence]}, T = {T}{draws})": args.kd_weight,
        "CLM": args.clm_weight,
        "(1 - cos)": args.cos_weight,
    }
    return "loss = " + " + ".join(f"{weight:g} * {term}" for term, weight in terms.items() if weight)


def origin(args):
    """Where the student comes from: "layers 0,2,5 of demo/teacher"."""
    source = f"layers {args.student_layers} of {args.teacher}" if args.student_layers else args.student
    return f"{source}, the shape alone with random weights" if args.student_init == "random" else source


def print_plan(args, teacher, student, corpus, memory, ranks):
    """What is about to happen, before it does. `memory`: the line of support/outlook.py."""
    for role, name, network in (("teacher", args.teacher, teacher), ("student", origin(args), student)):
        if network:
            millions = network.num_parameters() / 1e6
            print(f"{role:10} {name}: {len(network.blocks)} layers, {millions:.1f}M parameters")

    tokens = args.grad_accum * args.batch_size * args.seq_len
    print(f"objective  {formula(args)}")
    print(f"data       {args.data}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out")
    print(f"steps      {args.steps:,} of {args.grad_accum} x {args.batch_size} x {args.seq_len} = {tokens:,} "
          f"tokens; rate {args.lr:g}, {args.schedule} after {args.warmup:.0%} warm-up")
    print(f"memory     {memory}")
    print(f"on         {ranks.world} x {ranks.device}, {args.precision}; all goes to {args.out}/", flush=True)

    if args.precision == "bf16-pure":
        print("warning    bf16-pure: weights and sums of gradients lose small updates (see the README)")


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
    """README.md of the student, from the settings and the log. `table`: its results, as Markdown."""
    about = {"teacher": "none", "tags": "", "made": "trained", "inherited": ""}
    if args.teacher != "none":
        about = {"teacher": f"`{args.teacher}`", "tags": "\ntags: [distillation]", "made": "distilled",
                 "inherited": INHERITED}

    rows = read_log(Path(args.out, "log.csv"))
    about["tokens"] = int(sum(row["tokens"] for row in rows))
    about["hours"] = seconds_of(rows) / 3600
    about["ranks"] = ranks.world
    about["hardware"] = f"{platform.machine()} CPU"
    if ranks.device.type == "cuda":
        about["hardware"] = torch.cuda.get_device_name()

    about |= {"origin": origin(args), "formula": formula(args), "table": table}
    with replaced(Path(args.out, "README.md")) as file:
        # A name can hold bytes that are no letters; the card is not worth failing for them.
        file.write_text(CARD.format(**vars(args) | about), encoding="utf-8", errors="replace")
