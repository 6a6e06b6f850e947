"""The command line of distill.py: named recipes, the table of flags, and what is refused before any work.

  RECIPES      each shipped or published run, as data
  parse_args   flags win over the recipe, the recipe over the defaults
  check        refuses settings that are fine one by one but do not go together
  control_of   the settings of the control: those of the run, but with the text alone
  runs_of      the run and its control
"""
import argparse
import os
from pathlib import Path

from support import ROOT
from support.cli import InputError, checked, new_parser, user_path
from support.hub import check_hub_name
from support.text import open_data

DEMO_TEACHER = "demo/teacher" if Path.cwd() == ROOT else str(ROOT / "demo" / "teacher")

RECIPES = {
    # `--teacher gpt2 --student-layers 6` and nothing else: the defaults of the flags, 131M tokens.
    "plain": {},

    # Offline, from what the repository ships. Layers, rates and batches of student and control are the best
    # of those tried for each; see docs/atlas.md.
    "demo": {
        "teacher": DEMO_TEACHER, "student_layers": "0,4,5", "data": "stdlib", "seq_len": 256,
        "batch_size": 2, "grad_accum": 1, "steps": 1200, "lr": 1e-3, "kd_weight": 0.9, "clm_weight": 0.1,
        "schedule": "linear", "betas": [0.9, 0.999],
        "control": True, "control_lr": 5e-4, "eval_interval": 600, "eval_tokens": 200_000},

    # How the demo's teacher was made: the shape of demo/teacher/config.json, fresh weights, no teacher.
    "demo-teacher": {
        "teacher": "none", "student": DEMO_TEACHER, "student_init": "random", "data": "stdlib",
        "seq_len": 256, "batch_size": 16, "grad_accum": 1, "epochs": 9, "clm_weight": 1.0, "lr": 2e-3,
        "warmup": 0.02, "weight_decay": 0.1, "dropout": 0.1, "attention_dropout": 0.0,
        "eval_interval": 500, "eval_tokens": 200_000},

    # DistilGPT2. Published: teacher, layers, data, context, T, optimizer, schedule, clip, dropout, epochs,
    # and 2,000 sequences a step (5 x 50 x 8 GPUs). Never published: the loss weights; these are the
    # defaults of its script.
    "distilgpt2": {
        "teacher": "gpt2", "student_layers": "6", "data": "openwebtext", "seq_len": 1024,
        "batch_size": 5, "grad_accum": 400, "epochs": 3, "temperature": 2.0, "kd_weight": 0.5,
        "clm_weight": 0.5, "lr": 5e-4, "betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.0,
        "warmup": 0.05, "schedule": "linear", "grad_clip": 5.0, "dropout": 0.1},

    # DistilPythia, from its model card, which names neither AdamW's betas nor a clip. The card's run had
    # bf16 weights: that is `--precision bf16-pure`.
    "distilpythia": {
        "teacher": "EleutherAI/pythia-160m", "student": "EleutherAI/pythia-70m", "data": "pile",
        "seq_len": 2048, "batch_size": 2, "grad_accum": 2048, "steps": 64, "temperature": 2.0,
        "kd_weight": 0.5, "clm_weight": 0.5, "lr": 1e-4, "warmup": 0.0, "schedule": "constant"},

    # The protocol usually meant by "WikiText-103 perplexity after fine-tuning" (gpt2 16.3, distilgpt2 21.1).
    "finetune-wikitext103": {
        "teacher": "none", "data": "wikitext-103", "seq_len": 1024, "batch_size": 4, "grad_accum": 1,
        "epochs": 1, "clm_weight": 1.0, "lr": 5e-5, "weight_decay": 0.0, "warmup": 0.0,
        "schedule": "linear", "grad_clip": 1.0},
}

CONTROLS_TRIED = 31  # settings of the demo's control, on the same number of tokens: docs/atlas.md

# ------------------------------------------------------------------------------------ the table of flags
count = checked(int, "a whole number from 1 to 1,000,000,000", lambda n: 1 <= n <= 10**9)
count_or_0 = checked(int, "a whole number from 0 to 1,000,000,000", lambda n: 0 <= n <= 10**9)
seed = checked(int, "a whole number from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63)
positive = checked(float, "above 0 and at most 1,000,000", lambda x: 0 < x <= 10**6)
weight = checked(float, "from 0 to 1,000,000", lambda x: 0 <= x <= 10**6)
share = checked(float, "at least 0 and below 1", lambda x: 0 <= x < 1)
inner_share = checked(float, "above 0 and below 1", lambda x: 0 < x < 1)
share_or_all = checked(float, "from 0 to 1", lambda x: 0 <= x <= 1)
temperature = checked(float, "from 0.001 to 1000", lambda x: 0.001 <= x <= 1000)

LARGEST_MICRO_BATCH = 2**28  # tokens; more would not fit into the memory of any machine


def make_parser(doc, loss_settings):
    """All flags, with their defaults. Those of the loss are the fields of `loss_settings`."""
    parser = new_parser(doc)
    parser.add_argument(
        "--recipe", choices=RECIPES, metavar="NAME",
        help=f"a named set of defaults: {', '.join(RECIPES)}; without it `demo` if no model is named, "
             "otherwise `plain`. A flag wins over the recipe")
    for title, add_flags in {"model": model_flags, "data": data_flags, "loss": loss_flags,
                             "optimisation": optimisation_flags, "precision and device": device_flags,
                             "running": running_flags}.items():
        add_flags(parser.add_argument_group(title).add_argument)
    parser.set_defaults(**vars(loss_settings))
    return parser


def model_flags(add):
    add("--teacher", type=user_path, metavar="MODEL",
        help="the model to learn from, a folder or a Hub name (name@revision for a certain version); `none` "
             "trains on the text alone")
    add("--teacher-cache", type=user_path, metavar="DIR",
        help="let the teacher answer once for the whole corpus and keep the answers in this folder; students "
             "then learn without a teacher in memory (docs/teacher-cache.md)")
    add("--cache-draws", type=count, default=12, metavar="K",
        help="tokens drawn from each of the teacher's distributions for the cache; more take more room and "
             "make the gradient less noisy")
    add("--student-layers", metavar="LAYERS",
        help="make the student of the teacher's layers: a number of them, evenly spread, or a list such as "
             "0,2,4,7,9,11. Keeping the first and the last works best")
    add("--student", type=user_path, metavar="MODEL",
        help="start from a smaller model with the same tokenizer instead: a folder or a Hub name "
             "(as DistilPythia did)")
    add("--student-init", choices=["teacher", "random"], default="teacher",
        help="random: the same shape, but from scratch, which takes far longer to get as good")


def data_flags(add):
    add("--data", type=user_path, default="openwebtext", metavar="TEXT",
        help="openwebtext, pile, wikitext-103, wikitext-2, stdlib, a data set of the Hub as "
             "owner/name[@revision][:config], or a file or folder of your own text")
    add("--text-column", default="text", metavar="NAME", help="the column or field with a document's text")
    add("--data-folder", type=user_path, default="corpora", metavar="DIR",
        help="where tokenised corpora are kept, to be used again by later runs")
    add("--workers", type=count, default=os.cpu_count() or 1, metavar="N", help="threads that tokenise")
    add("--packing", choices=["constant", "padded"], default="constant",
        help="constant: documents joined and cut into blocks, no token wasted; padded: one document "
             "per example")
    add("--seq-len", type=count, metavar="N",
        help="tokens of an example, at most the context of the models (default: the smaller context, but "
             "not above 1024)")
    add("--eval-tokens", type=count, default=100_000, metavar="N", help="held-out tokens to score, at most")


def loss_flags(add):
    add("--temperature", type=temperature, metavar="T",
        help="softens both distributions: a higher T gives unlikely tokens more weight (Hinton et al. 2015); "
             "1 with --teacher-cache, unless you or the recipe name one")
    add("--kd-weight", type=weight, metavar="W", help="weight of T^2 * KL(teacher || student)")
    add("--clm-weight", type=weight, metavar="W",
        help="weight of the usual loss on the next token of the text; 1 without a teacher. A little of it "
             "beside the teacher did better than none, and than half (docs/atlas.md)")
    add("--cos-weight", type=weight, metavar="W",
        help="weight of 1 - cos(final hidden states), which needs a student as wide as its teacher "
             "(Sanh et al. 2019)")
    add("--divergence", choices=["forward", "reverse", "jsd"],
        help="what to imitate. forward: all that the teacher finds likely, KL(teacher || student); reverse: "
             "nothing that it finds unlikely; jsd: in between (arXiv 2306.13649)")
    add("--jsd-weight", type=inner_share, metavar="W",
        help="weight of the teacher in jsd's mixture: near 0 it acts like forward, near 1 like reverse")
    add("--on-policy", type=share_or_all, default=0.0, metavar="P",
        help="share of the micro-batches in which the student learns from what it writes itself, in the "
             "second half of each example; takes several times as long")
    add("--chunk-size", type=count, metavar="N",
        help="tokens whose logits exist at a time; fewer need less memory and change no result (default: 512 "
             "on a CPU, 1024 on a GPU)")


def optimisation_flags(add):
    add("--steps", type=count, default=1000, metavar="N", help="optimizer steps")
    add("--epochs", type=positive, metavar="X", help="passes over the corpus, instead of --steps")
    add("--batch-size", type=count, default=8, metavar="N",
        help="examples of a micro-batch: as many as fit in memory")
    add("--grad-accum", type=count, default=16, metavar="N",
        help="micro-batches of a step, over all GPUs together; with --batch-size it makes the size of a step")
    add("--lr", type=positive, default=5e-4, metavar="RATE",
        help="AdamW's learning rate after the warm-up; lower it if the loss jumps")
    add("--betas", type=share, nargs=2, default=[0.9, 0.95], metavar="B",
        help="how long AdamW remembers the gradient and its square")
    add("--eps", type=positive, default=1e-8, metavar="X", help="keeps AdamW from dividing by 0")
    add("--weight-decay", type=weight, default=0.0, metavar="W", help="pulls matrices towards 0 (AdamW)")
    add("--warmup", type=share, default=0.05, metavar="SHARE",
        help="share of the steps in which the learning rate rises")
    add("--schedule", choices=["constant", "linear", "cosine"], default="cosine",
        help="of the rate after the warm-up; linear and cosine end at 0")
    add("--grad-clip", type=weight, default=1.0, metavar="NORM",
        help="largest norm of a step's gradient; 0: no limit")
    add("--dropout", type=share, default=0.0, metavar="P",
        help="of the student in training; for many passes over little text")
    add("--attention-dropout", type=share, metavar="P",
        help="of attention weights, if it should differ from --dropout (slow on CPUs)")


def device_flags(add):
    add("--precision", choices=["auto", "bf16", "fp32", "bf16-pure"], default="auto",
        help="bf16: autocast, with weights in float32; bf16-pure: weights in bf16, too, which loses "
             "small steps; auto: bf16 where it is fast")
    add("--device", default="auto", metavar="NAME",
        help="cuda, mps or cpu; auto: the first of them that works here")
    add("--compile", action="store_true", help="torch.compile layers and loss; for long runs on a GPU")


def running_flags(add):
    add("--out", type=user_path, default="out", metavar="DIR",
        help="folder of the student, its log and its state")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--resume-if-there", action="store_true",
        help="go on with the run in --out if there is one, otherwise start it: one command for machines that "
             "may be taken away")
    add("--overwrite", action="store_true",
        help="replace the run in --out, once the new one has saved something")
    add("--control", action=argparse.BooleanOptionalAction, default=False,
        help="afterwards train the same student on the text alone, to see what the teacher was worth")
    add("--control-lr", type=positive, metavar="RATE",
        help="the control's own learning rate; text alone often needs a smaller one (default: --lr)")
    add("--seed", type=seed, default=0, metavar="N", help="of data order, dropout and random weights")
    add("--eval-interval", type=count_or_0, default=0, metavar="N",
        help="steps between validations, the first before training; their losses go to held-out.csv; "
             "0: only at the end")
    add("--save-interval", type=count, default=100, metavar="N", help="steps between saves of the state")


# ------------------------------------------------------------------------------------ from flags to settings
# Flags that mean nothing unless another one has a certain value: (flag, what it needs, whether that is so).
NEEDS = [
    ("jsd_weight", "--divergence jsd", lambda args: args.divergence == "jsd"),
    ("cache_draws", "--teacher-cache", lambda args: args.teacher_cache),
    ("control_lr", "--control", lambda args: args.control),
]
NOT_TUNED = {"recipe", "out", "resume", "resume_if_there", "overwrite", "device", "data_folder", "workers",
             "seed", "precision", "eval_interval", "eval_tokens", "save_interval", "chunk_size",
             "cache_draws"}


def parse_args(doc, loss_settings, argv=None):
    """Flags win over the recipe, the recipe over the defaults. Returns all settings, as a Namespace.

    loss_settings: LossSettings(), whose fields are the defaults of the loss's flags.
    """
    # argparse does not say which flags were given. So parse twice: once for the defaults, and once into a
    # namespace in which every setting is None, so that those that are not None afterwards were given.
    parser = make_parser(doc, loss_settings)
    defaults = vars(parser.parse_args([]))
    blank = argparse.Namespace(**dict.fromkeys(defaults))
    given = {name: value for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None}

    recipe = given.get("recipe") or ("plain" if given.keys() & {"teacher", "student"} else "demo")
    settings = {**defaults, **RECIPES[recipe]}
    if given.keys() & {"student", "student_layers"}:  # the user's student replaces the recipe's
        settings.update(student=None, student_layers=None)
    if given.get("teacher") == "none":
        settings["clm_weight"] = 1.0
    if "teacher_cache" in given and "temperature" not in RECIPES[recipe]:
        settings["temperature"] = 1.0  # at which draws are least noisy: docs/teacher-cache.md
    if "steps" in given:
        settings["epochs"] = None
    args = argparse.Namespace(**{**settings, **given})

    if {"steps", "epochs"} <= given.keys():
        raise InputError("--steps and --epochs both say how long to train: take one of them")
    for name, needed, is_met in NEEDS:
        if name in given and not is_met(args):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} means nothing without {needed}: add that, or leave {flag} out")

    args.recipe = recipe
    args.role = "student"  # or "control": see control_of
    args.is_demo = recipe == "demo" and given.keys() <= NOT_TUNED  # so that its tuning holds
    return args


def check(args):
    """Refuse what does not go together. Without a teacher the weights of its terms become 0."""
    if args.teacher == "none":
        args.kd_weight = 0.0
        args.cos_weight = 0.0
    if not args.teacher_cache:
        args.cache_draws = None  # so that it is not a setting of the run

    for message, is_wrong in contradictions(args).items():
        if is_wrong:
            raise InputError(message)
    for name in (args.teacher, args.student):
        if name and name != "none" and not Path(name).is_dir():
            check_hub_name(name)  # finds folders that are misspelt

    # Say this before models are looked for on the Hub, which takes a while without a network.
    if args.data != "stdlib" and not os.path.exists(args.data):
        open_data(args.data)


def contradictions(args):
    """{message: whether the settings are wrong in this way}"""
    tokens = args.batch_size * (args.seq_len or 1)  # without --seq-len: the models' context, which is more
    no_teacher = args.teacher == "none"
    found = {
        "--teacher is missing: name a model, or `none` to train on the text alone": not args.teacher,
        "name one student: --student-layers (of the teacher) or --student (another model)":
            bool(args.student) == bool(args.student_layers),
        "--student-layers are a teacher's; with --teacher none name a --student":
            no_teacher and args.student_layers,
        "all weights of the loss are 0: nothing would be learned; raise one of them":
            args.kd_weight + args.clm_weight + args.cos_weight == 0,
        # A name that os.path shortens to nothing is the current folder, or the root of the disk.
        f"--out {args.out!r}: a run needs a folder of its own, such as out":
            not args.out or Path(args.out).resolve() in (Path.cwd(), Path(Path.cwd().anchor)),
        f"--batch-size {args.batch_size} and --seq-len {args.seq_len}: a micro-batch of {tokens:,} tokens; "
        f"take at most {LARGEST_MICRO_BATCH:,}, and more --grad-accum": tokens > LARGEST_MICRO_BATCH,
    }
    for role, model in (("teacher", args.teacher), ("student", args.student)):
        for verb, folder in (("is", args.out), ("contains", os.path.join(args.out, "control"))):
            found[f"--out {args.out} {verb} the {role}: choose another --out"] = (
                model not in (None, "none") and Path(model).resolve() == Path(folder).resolve())
    return found | {
        # There is no right next token in what the student writes, so the CLM cannot count it.
        "--on-policy needs a teacher and a --seq-len of 2 or more; add --kd-weight 1 --clm-weight 0, and use "
        "--packing constant": args.on_policy and (
            no_teacher or args.clm_weight or args.packing == "padded" or args.seq_len == 1),
        # Draws have no hidden states, and fit only a divergence that is linear in the teacher.
        "--teacher-cache needs a --teacher, --divergence forward, --on-policy 0 and --cos-weight 0":
            args.teacher_cache and (
                no_teacher or args.divergence != "forward" or args.on_policy or args.cos_weight),
    }


def check_ranks(args, ranks):
    """InputError, from the first process alone, if the micro-batches of a step cannot be shared evenly."""
    if args.grad_accum % ranks.world == 0:
        return
    if not ranks.is_first:
        raise SystemExit(2)
    raise InputError(f"--grad-accum {args.grad_accum} cannot be shared evenly by {ranks.world} processes: "
                     f"take a multiple of {ranks.world}")


def control_of(args):
    """The control: the same student and number of tokens, but the text alone, at a rate of its own.

    It has to be the best that we can find: against a weak control every teacher looks good.
    """
    changes = {
        "role": "control",
        "out": str(Path(args.out, "control")),
        "objective": "loss = 1 * CLM",  # distill.text_alone
        "kd_weight": 0.0,
        "cos_weight": 0.0,
        "clm_weight": 1.0,
        "lr": args.control_lr or args.lr,
        "on_policy": 0.0,
        "teacher_cache": None,
        "cache_draws": None,
    }
    return argparse.Namespace(**vars(args) | changes)


def runs_of(args):
    """The settings of the trainings that a command consists of: its own, and perhaps the control's."""
    return [args, control_of(args)] if args.control and args.teacher != "none" else [args]
