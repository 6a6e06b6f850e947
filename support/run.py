"""A run around its loop, which is distill.train: its folder, its log, its saved state, its end.

Read in this order:
  claim      hold --out for this process, and find out whether this run may begin or go on there
  content_of, refuse_differences   only the same run goes on
  Run        the steps to come; a row of log.csv for each; held-out losses; saves; Ctrl-C saves and ends
  restore    puts a saved state back
  published  how model and card reach the folder: text that someone has edited there stays
  read_settings, read_log, read_held_out   what a run has left, for those who look at it later

A run can be killed at any moment: every file is replaced as a whole (support/files.py). A run takes over its
folder when it saves for the first time, after its first step. Until then an old run there is unchanged.
"""
import contextlib
import csv
import hashlib
import inspect
import json
import math
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from support import teacher_cache
from support.cli import InputError, note, open_bar, reading, say
from support.files import locked, read_object, replaced, sync
from support.flags import runs_of
from support.ranks import autocast, peak_memory, stop_signals
from support.scoring import validate

COLUMNS = ("step", "loss", "kl", "clm", "cos", "teacher_clm", "lr", "grad_norm", "tokens",
           "tokens_per_second")
LOGS = {"log.csv": COLUMNS, "held-out.csv": ("step", "loss")}

MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
RESULTS = "results.json"  # written last: a run that has it is finished
WRITTEN = ".distil-written.json"  # hashes of the texts that `published` wrote
RUN_FILES = {"args.json", *LOGS, "train_state.pt", *MODEL_FILES, "README.md", "generation_config.json",
             "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", RESULTS, WRITTEN,
             "loss.png", "runs.png", "distribution.png"}

# Settings that may differ between a run and its resumption: what is learned does not depend on them.
CHANGES_NOTHING = {"recipe", "role", "out", "resume", "resume_if_there", "overwrite", "device", "data_folder",
                   "workers", "compile", "control", "control_lr", "eval_interval", "eval_tokens",
                   "save_interval", "is_demo", "loss_code"}
# These may differ if content_of is the same: a folder may have a new name, a run may become longer.
BY_CONTENT = {"teacher", "student", "data", "teacher_cache", "steps", "epochs", "warmup", "schedule"}


# ------------------------------------------------------------------------------------ whose folder it is
@contextlib.contextmanager
def claim(args, ranks):
    """Hold args.out for this process; yields whether the run that the flags describe is there and finished.

    InputError if the folder contains anything that the flags do not say to continue or to replace. Nothing is
    deleted here. Decides args.resume for --resume-if-there, and sets it if the run is finished.
    """
    with locked(args.out, f"--out {args.out}") if ranks.is_first else contextlib.nullcontext():
        finished = ranks.any(ranks.is_first and look(args))
        args.resume = ranks.any(args.resume or finished)
        yield finished


def look(args):
    """Whether the run is finished; InputError if it may neither begin nor go on in its folder."""
    # Whatever the flags are, files that did not come from such a run stay.
    runs = runs_of(args)
    for run in runs:
        here = files_of_run(run.out)
        if here and read_settings(run.out).get("role") != run.role:
            raise InputError(f"{run.out} contains {here[0]}, but not a {run.role}'s run: choose another "
                             "--out")

    # Begin?
    there = files_of_run(args.out)
    if args.resume_if_there:
        args.resume = bool(there)
    if args.resume and not there:
        raise InputError(f"--resume: there is no run in {args.out}")
    if not there or args.overwrite and not args.resume:
        return False

    # Go on, or is there nothing more to do?
    for run in runs:
        if then := read_settings(run.out):
            refuse_differences(run, then)
    finished = RESULTS in there and all(map(has_all_steps, runs))
    if not finished and not args.resume:
        raise InputError(f"--out {args.out} contains this run already: --resume goes on with it, --overwrite "
                         "replaces it. Or choose another --out NAME")
    return finished


def has_all_steps(args):
    """Whether the run in args.out is as long as it should be, and its model is there."""
    then = read_settings(args.out)
    length = "epochs" if args.epochs else "steps"
    is_as_long = all(then.get(name) == getattr(args, name) for name in (length, "eval_tokens"))
    return is_as_long and {*MODEL_FILES} <= {*files_of_run(args.out)}


def files_of_run(folder):
    """The names in a folder that a run writes to, sorted."""
    return sorted(name for name in RUN_FILES if os.path.lexists(Path(folder, name)))


def read_settings(folder):
    """The args.json of the run in a folder; {} if there is none, or none that a run has written."""
    settings = read_object(Path(folder, "args.json"))
    return settings if {"recipe", "teacher", "kd_weight"} <= settings.keys() else {}


# ------------------------------------------------------------------------------------ what makes a run
def content_of(args, corpus, student, teacher):
    """What a run learns from, besides its settings. Models and texts are told apart by their content, because
    the files behind a name can change."""
    content = {
        "learning rates": rates(args),
        "number of training tokens (more for more steps)": len(corpus.train),
        "hash of the text": corpus.fingerprint,
    }
    if teacher is not None:
        content["hash of the teacher"] = teacher_cache.fingerprint(teacher)
    elif args.teacher_cache:
        content["hash of the teacher"] = teacher_cache.read_header(args.teacher_cache)["weights"]
    if args.student and args.student_init == "teacher":
        content["hash of the first student"] = teacher_cache.fingerprint(student)
    return content


def rates(args):
    """The learning rate of each step, relative to --lr, in words.

    If these words do not depend on the number of steps, a run can be made longer: it ends with the same bits
    as one that was as long from the start.
    """
    over = "" if args.schedule == "constant" else f" over {args.steps} steps"
    return f"{args.schedule}{over}, after {math.ceil(args.warmup * args.steps)} steps of warm-up"


def refuse_differences(args, then, content=None):
    """InputError unless the run that was begun with the settings `then` may go on with these.

    content: its content_of; None before models and text are read. What depends on them is compared later.
    """
    now = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING | BY_CONTENT}
    if content is not None:
        now |= content
    else:
        undecided = [name for name, value in now.items() if value in (None, "auto")
                     or name == "student_layers" and "," not in value]  # how many, but not yet which
        now = {name: value for name, value in now.items() if name not in undecided}
        if not args.epochs:
            now["learning rates"] = rates(args)

    differ = [f"{name} was {then.get(name)!r:.99}, now {value!r:.99}"
              for name, value in sorted(now.items()) if then.get(name) != value]
    if then.get("loss_code") != vars(args).get("loss_code"):
        differ.append("the code of the loss in distill.py is different")
    if differ:
        raise InputError(f"{args.out} contains a run with other settings: {'; '.join(differ)}. Give the same "
                         "ones to go on with it, choose another --out NAME, or replace it with --overwrite")


def hash_of_code(*functions):
    """Changes when someone edits one of them. A function of a notebook may have no source."""
    with contextlib.suppress(OSError, TypeError):
        return hash_of("".join(map(inspect.getsource, functions)).encode())


def hash_of(content):
    return hashlib.sha256(content).hexdigest()[:16]


def refuse_other_content(args, corpus, student, teacher):
    """InputError unless the finished run in args.out had this text and these models."""
    refuse_differences(args, read_settings(args.out), content_of(args, corpus, student, teacher))


# ------------------------------------------------------------------------------------ around the loop
class Run:
    """Used as a context: `with Run(...) as run: for step in run.steps(): ... run.finish_step(...)`.

    bar: a tqdm bar over micro-batches, which also shows the losses; or None.
    """

    def __init__(self, args, student, optimizer, corpus, ranks, teacher=None, bar=None):
        self.args = args
        self.student = student
        self.optimizer = optimizer
        self.corpus = corpus
        self.ranks = ranks
        self.bar = open_bar(disable=True) if bar is None else bar
        self.folder = Path(args.out)
        content = content_of(args, corpus, student, teacher)  # before the student changes
        self.settings = vars(args) | content  # saved in args.json, and with the state
        self.first_step = restore(args, content, student, optimizer) if args.resume else 0
        self.saved_step = self.first_step
        self.has_folder = False  # until its first save
        self.signals = stop_signals(ranks.is_first, way_on=self.way_on)

    def __enter__(self):
        if not self.bar.disable:  # the steps so far took no time now, so its speed must not count them
            done = self.first_step * len(self.ranks.share(self.args.grad_accum))
            self.bar.n += done
            self.bar.initial += done
            self.bar.last_print_n += done
        self.loss_before = None
        if self.first_step:
            self.say(f"resume     {self.saved()}")
        elif self.args.eval_interval or self.args.teacher == "none":  # the end says whether training helped
            self.loss_before = self.held_out_loss(0)
        self.stop = self.signals.__enter__()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        return self.signals.__exit__(*error)

    def steps(self):
        """The steps to come: from 0, or from where the resumed run was."""
        return range(self.first_step, self.args.steps)

    def say(self, text):
        if self.ranks.is_first:
            say(text)

    def after_micro_batch(self, step):
        """Count it. After a signal to stop, on any rank, save the state after `step` steps and end."""
        self.bar.update()
        if not self.ranks.any(self.stop):
            return
        if step > self.first_step:
            self.save(step)
        self.bar.close()  # nothing is drawn below the last line
        self.say("stopped" + self.way_on())
        number = self.stop[0] if self.stop else signal.SIGTERM  # if it was another rank that was asked
        sys.exit(128 + number)

    def saved(self):
        """Where --resume goes on, in words."""
        return f"after step {self.saved_step:,} of {self.args.steps:,} of the {self.args.role}"

    def way_on(self):
        """What to add to "stopped"."""
        if self.saved_step or self.args.role == "control":
            return f"; the same command with --resume goes on {self.saved()}"
        return " before the first step was done, so nothing was saved"

    def check(self, step, mean_losses, gradient_norm, lr):
        """InputError if the loss or its gradient is not finite."""
        if math.isfinite(gradient_norm + mean_losses.loss):
            return
        raise InputError(f"step {step + 1}: loss {mean_losses.loss:.3g}, gradient {gradient_norm:.3g} at "
                         f"learning rate {lr:.2g}, teacher's CLM {mean_losses.teacher_clm:.3g}. Start again "
                         "with a lower --lr, more --warmup, or --precision fp32; nothing in "
                         f"{self.folder} was changed by it")

    def finish_step(self, step, mean_losses, tokens, lr, gradient_norm):
        """Log the step; save and validate if that is due."""
        seconds = time.perf_counter() - self.started
        done = step + 1
        if step == self.first_step:
            n_bytes = peak_memory(self.ranks.device)
            if n_bytes and self.args.role == "student" and not self.bar.disable:
                self.say(f"memory     {n_bytes / 1e9:.2f} GB so far")
            self.save(done)  # the folder becomes this run's; a full disk shows now, not after hours
            if self.loss_before:
                self.log("held-out.csv", self.loss_before)

        shown = f"loss {mean_losses.loss:.2f}"
        if mean_losses.teacher_clm:
            shown += f" CLM {mean_losses.clm:.2f} teacher {mean_losses.teacher_clm:.2f}"
        self.bar.set_description(shown, refresh=False)  # in front, because the end may be cut off
        self.log("log.csv", {"step": done, **mean_losses._asdict(), "lr": lr, "grad_norm": gradient_norm,
                             "tokens": int(tokens), "tokens_per_second": max(1, round(tokens / seconds))})

        if self.args.eval_interval and done % self.args.eval_interval == 0:
            self.log("held-out.csv", self.held_out_loss(done))
        is_due = done % self.args.save_interval == 0 or done == self.args.steps
        if is_due and step > self.first_step:
            self.save(done)
        self.started = time.perf_counter()

    def held_out_loss(self, done):
        """A row of held-out.csv, after `done` steps. The first process scores the student for all."""
        if not self.ranks.is_first:
            return None
        row, = validate([self.student], self.corpus, None, self.args, autocast(self.args, self.ranks.device))
        self.say(f"step {done:<5} held-out loss {row['loss']:.4f}")
        return {"step": done, "loss": row["loss"]}

    # -------------------------------------------------------- what is written, by the first rank alone
    def save(self, step):
        """Replace train_state.pt, so that a complete one is on disk at every moment.

        No random state is in it: data order and dropout follow from the seed and the step.
        """
        if name := first_not_finite(dict(self.student.named_parameters())):
            raise InputError(f"step {step}: the student's {name} is not finite any more. Start again with a "
                             f"lower --lr; the state that was saved in {self.folder} before is unchanged")
        if not self.ranks.is_first:
            return
        state = {"step": step, "settings": self.settings,
                 "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replaced(self.folder / "train_state.pt") as path, open(path, "wb") as file:
            torch.save(state, file)
            if not self.has_folder:
                sync(file)  # what can fail, as on a full disk, fails before anything is deleted
                self.take_over()
        self.saved_step = step

    def take_over(self):
        """Once: args.json says whose folder it is from now on, and an old run goes."""
        with replaced(self.folder / "args.json") as path:
            path.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
        (self.folder / RESULTS).unlink(missing_ok=True)  # what was finished is not any more
        if self.args.role == "control":
            (self.folder.parent / RESULTS).unlink(missing_ok=True)

        if self.args.resume:
            for name in LOGS:
                self.cut_log(name)
        else:
            remove_run(self.folder, keep={"args.json"})
            if read_settings(self.folder / "control").get("role") == "control":
                remove_run(self.folder / "control")
        self.has_folder = True

    def cut_log(self, name):
        """Cut a log to the steps so far, as those after the last save are made again."""
        path = self.folder / name
        rows = [row for row in read_log(path) if row["step"] <= self.first_step]
        if name == "log.csv" and len(rows) < self.first_step:
            note(f"{path} has lost {self.first_step - len(rows)} of the steps so far")
        if path.exists():
            with replaced(path) as new:
                write_rows(new, rows)

    def log(self, name, row):
        """Add a row to log.csv or held-out.csv."""
        if not self.ranks.is_first:
            return
        path = self.folder / name
        try:
            write_rows(path, [row])
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); the same command with --resume "
                             "goes on from the last saved state") from error


def first_not_finite(tensors):
    """The name of the first tensor with NaN or infinity, or None. Its extremes tell, without a copy."""
    for name, tensor in tensors.items():
        low, high = torch.aminmax(tensor.detach())
        if not math.isfinite(low.item() + high.item()):
            return name
    return None


def remove_run(folder, keep=()):
    """Delete the files of a run but for those in `keep`, and its folder if nothing else is in it."""
    for name in files_of_run(folder):
        if name not in keep:
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


# ------------------------------------------------------------------------------------ what is put back
def restore(args, content, student, optimizer):
    """Put the saved state of this run back. Returns its number of steps, 0 if it was killed before it had
    saved any."""
    path = Path(args.out, "train_state.pt")
    if not path.exists() and not path.with_name("model.safetensors").exists():
        return 0
    with reading(path, "a state to go on from (put a copy back, or start again with --overwrite)"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = int(state["step"])
        refuse_differences(args, state["settings"], content)
        if step > args.steps:
            raise InputError(f"--resume: {args.out} has made {step} steps, more than --steps {args.steps}")

        student.load_state_dict(state["student"])
        if name := first_not_finite(dict(student.named_parameters())):
            raise ValueError(f"{name} is not finite")
        # Groups follow from the flags, so they are ours: another PyTorch may have other fields in them.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(state.pop("optimizer") | {"param_groups": groups})
        check_averages(optimizer, step)
    return step


def check_averages(optimizer, step):
    """ValueError if AdamW's averages are damaged. It would not notice that one of them is too short, and read
    and write beyond its end."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if state[name].shape != parameter.shape:
                    raise ValueError(f"{name} has the shape {[*state[name].shape]}, not {[*parameter.shape]}")
                state[name] = torch.empty_like(parameter).copy_(state[name])  # in the parameter's layout
            if state["step"] != step or first_not_finite(state):
                raise ValueError(f"the averages are not those of step {step}")


# ------------------------------------------------------------------------------------ what is published
@contextlib.contextmanager
def published(folder):
    """A new folder to write files to, which then take their places in `folder`: a model, its card.

    Text that someone has edited there since we wrote it stays, and the user is told.
    """
    folder = Path(folder)
    written = read_object(folder / WRITTEN)
    with tempfile.TemporaryDirectory(prefix=".distil-", dir=folder) as new:
        yield Path(new)
        # config.json comes last, so that a reader never finds half a model.
        for path in sorted(Path(new).iterdir(), key=lambda path: path.name == "config.json"):
            place = folder / path.name
            if path.suffix != ".safetensors":
                new_hash = hash_of(path.read_bytes())
                if place.exists() and hash_of(place.read_bytes()) not in (new_hash, written.get(path.name)):
                    note(f"{place} has been edited, so it stays as it is")
                    continue
                written[path.name] = new_hash
            with replaced(place) as temporary:
                path.rename(temporary)
    with replaced(folder / WRITTEN) as file:
        file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ what a run has left
def read_held_out(folder):
    """held-out.csv of a run: the student's loss at each --eval-interval."""
    return read_log(Path(folder, "held-out.csv"))


def read_log(path):
    """log.csv or held-out.csv -> list of {column: number}, without rows that are damaged or out of order.

    A log can end in half a row after a kill, or be missing; it is only a record, so nothing depends on it.
    """
    rows = []
    with contextlib.suppress(OSError, csv.Error), open(path, encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file):
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a row, or somebody's line
                row = {name: float(line[name]) for name in LOGS[Path(path).name]}
                if is_plausible(row, rows):
                    rows.append(row)
    return rows


def is_plausible(row, before):
    """Whether a run can have written this row after those `before`. It stops before it writes NaN."""
    previous = before[-1]["step"] if before else -1  # held-out text is also scored before the first step
    return (all(map(math.isfinite, row.values()))
            and previous < row["step"] == int(row["step"])
            and row.get("tokens", 1) > 0 < row.get("tokens_per_second", 1))


def write_rows(path, rows):
    """Add rows to a log, below a header if it is new."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOGS[path.name])
        if not file.tell():
            writer.writeheader()
        for row in rows:
            writer.writerow({name: written_as(value) for name, value in row.items()})


def written_as(value):
    """A number in a .csv: 3.0 -> "3", 0.00012345678 -> "0.0001234568"."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.7g}"
