"""A run around its loop, which is distill.train: its folder, its log, its saved state, its end.

Read in this order:
  claim           hold --out for this process, and find out whether this run may begin or go on there
  identity        what makes a run the one that it is: only the same run goes on
  Run             the steps to come; a row of log.csv for each; held-out losses; saves; Ctrl-C saves and ends
  restore         puts a saved state back, after all of it has been checked
  published       how model and card reach the folder: text that someone has edited there stays
  read_settings, read_log, read_held_out   what a run has left, for those who look at it later

A run can be killed at any moment: every file is replaced as a whole (support/files.py). With --overwrite the
old run stays until the new one has saved its state.
"""
import contextlib
import csv
import hashlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from support import teacher_cache
from support.cli import InputError, note, reading, say
from support.files import locked, read_object, replaced
from support.flags import control_of
from support.ranks import autocast, exit_code, stop_signals
from support.scoring import validate

COLUMNS = ("step", "loss", "kl", "clm", "cos", "teacher_clm", "lr", "grad_norm", "tokens",
           "tokens_per_second")
LOGS = {"log.csv": COLUMNS, "held-out.csv": ("step", "loss")}

MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
RESULTS = "results.json"  # written last: a run that has it is finished
WRITTEN = ".distil-written.json"  # hashes of the texts that `published` wrote
EDITABLE = ("README.md", "config.json", "generation_config.json", "tokenizer_config.json")
RUN_FILES = {"args.json", *LOGS, "train_state.pt", *MODEL_FILES, *EDITABLE, "vocab.json", "merges.txt",
             "special_tokens_map.json", RESULTS, WRITTEN, "loss.png", "runs.png", "distribution.png"}

# Settings that may differ between a run and its resumption: what is learned does not depend on them.
CHANGES_NOTHING = {"recipe", "role", "out", "resume", "resume_if_there", "overwrite", "device", "data_folder",
                   "workers", "compile", "control", "control_lr", "control_batch_size", "eval_interval",
                   "eval_tokens", "save_interval", "is_demo", "content"}
NAMES = {"teacher", "student", "data", "teacher_cache"}  # may differ if the content is the same
LENGTH = {"steps", "epochs", "warmup"}  # may differ if the learning rates of the steps so far are the same


# ------------------------------------------------------------------------------------ whose folder it is
@contextlib.contextmanager
def claim(args, ranks):
    """Hold args.out for this process; yields whether the run that the flags describe is there and finished.

    InputError if the folder contains anything that the flags do not say to go on with or to replace. Nothing
    is deleted here. Decides args.resume for --resume-if-there, and sets it if the run is finished.
    """
    with contextlib.ExitStack() as stack:
        finished = False
        if ranks.is_first:
            stack.enter_context(locked(args.out, f"--out {args.out}"))
            finished = look(args)
        finished = ranks.any(finished)
        args.resume = ranks.any(args.resume or finished)
        yield finished


def look(args):
    """Whether the run is finished; InputError if it may neither begin nor go on in its folder."""
    if args.resume_if_there:
        args.resume = bool(files_of_run(args.out))
    runs = [args]
    if args.control and args.teacher != "none":
        runs.append(control_of(args))

    for run in runs:
        refuse_others_files(run)
    if args.resume and not files_of_run(args.out):
        raise InputError(f"--resume: there is no run in {args.out}")
    if args.overwrite and not args.resume:
        return False
    if all(is_finished(run) for run in runs):
        return True

    for run in runs:
        before, now = read_settings(run.out), known_settings(run)
        if run.role == "control" and not Path(run.out, "train_state.pt").exists():
            continue  # it has not saved anything yet, so it starts again with what is asked for now
        if before and args.resume:
            refuse_differences(run.out, before, now)
        elif before:
            found = differences(before, now)
            what = f" with other settings: {shown(found)}" if found else "; --resume goes on with it"
            raise InputError(f"--out {run.out} contains a run{what}. Choose another --out NAME, or replace "
                             "that run with --overwrite")
    return False


def refuse_others_files(args):
    """InputError if args.out contains what this project, or a run in this role, has not written."""
    folder = Path(args.out)
    here = files_of_run(folder)
    before = read_settings(folder)
    fix = "choose another --out" + (", or --no-control" if args.role == "control" else "")
    if folders := [name for name in here if (folder / name).is_dir()]:
        raise InputError(f"{folder} has a folder called {folders[0]}: {fix}")
    if before == {} and args.role == "student":
        if not args.overwrite or args.resume:
            raise InputError(f"{folder / 'args.json'} is damaged; --overwrite starts the run again")
    elif here and (before or {}).get("role") != args.role:
        raise InputError(f"{folder} contains files that were not made by a {args.role}'s run, such as "
                         f"{here[0]}: {fix}")


def is_finished(args):
    """Whether all that a run with these settings leaves is in its folder."""
    wanted = MODEL_FILES if args.role == "control" else (*MODEL_FILES, "README.md", RESULTS)
    settings = known_settings(args) | {"eval_tokens": args.eval_tokens}  # which the table depends on
    there = {*wanted} <= {*files_of_run(args.out)}
    return there and not differences(read_settings(args.out) or {}, settings)


def files_of_run(folder):
    """The names in a folder that a run writes to, sorted."""
    return sorted(name for name in RUN_FILES if os.path.lexists(Path(folder, name)))


def read_settings(folder):
    """The args.json of the run in a folder: {} if it is damaged, None if there is none, or not a run's."""
    path = Path(folder, "args.json")
    settings = read_object(path) if path.exists() else None
    if settings and not {"recipe", "teacher", "kd_weight"} <= settings.keys():
        return None
    return settings


# ------------------------------------------------------------------------------------ what makes a run
def known_settings(args):
    """The settings that decide what is learned, as far as they are known before models and text are read."""
    settings = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING}
    later = {name for name in NAMES if os.path.exists(settings[name] or "")}  # their content is compared
    if args.seq_len is None:
        later.add("seq_len")
    if args.precision == "auto":
        later.add("precision")
    if args.epochs:
        later.add("steps")
    if "," not in (args.student_layers or ","):  # how many, but not yet which
        later.add("student_layers")
    return {name: value for name, value in settings.items() if name not in later}


TOKENS = "number of training tokens"


def content_of(args, corpus, student, teacher):
    """What a run starts from, by content: the files behind a name can change."""
    content = {TOKENS: len(corpus.train), "hash of the text": corpus.fingerprint}
    if teacher is not None:
        content["hash of the teacher"] = teacher_cache.fingerprint(teacher)
    elif args.teacher_cache:
        content["hash of the teacher"] = teacher_cache.read_header(args.teacher_cache)["weights"]
    if args.student and args.student_init == "teacher":
        content["hash of the first student"] = teacher_cache.fingerprint(student)
    return content


def identity(args, content):
    """What makes a run the one that it is: its settings, and its content_of."""
    settings = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING | NAMES}
    return settings | content


def differences(then, now):
    """{name: (value then, value now)} of the settings in `now` that were not the same then."""
    return {name: (then.get(name), value) for name, value in sorted(now.items()) if then.get(name) != value}


def refuse_differences(folder, then, now):
    """InputError unless a run with the settings `then` may go on with the settings `now`.

    It may become longer if each step so far had the learning rate that it would have now: then it ends with
    the same bits as if it had been that long from the start.
    """
    found = differences(then, now)
    reason = ""
    if found.keys() & LENGTH:
        reason = why_not_longer(folder, then, now)
        if not reason:
            found = {name: values for name, values in found.items() if name not in LENGTH}
        if TOKENS in found:
            reason = " (a run of this many steps reads more of --data, in another order from the start)"
    if found:
        raise InputError(f"{folder} contains a run with other settings: {shown(found)}{reason}. Give the "
                         "same ones to go on with it, choose another --out, or replace it with --overwrite")


def why_not_longer(folder, then, now):
    """How the rates of the steps so far depend on the number of all steps; "" if they do not."""
    with reading(Path(folder, "args.json"), "what a run writes"):
        if not then["schedule"] == now["schedule"] == "constant":
            return " (only with --schedule constant do the rates of its steps not depend on their number)"
        if "steps" not in now:  # with --epochs the corpus decides them, and this is asked again
            return ""
        before, after = (math.ceil(settings["warmup"] * settings["steps"]) for settings in (then, now))
    share = max(0, before - 0.5) / now["steps"]  # rounds up to the same number of steps, safely
    return f" (--warmup {share:.6g} keeps its warm-up of {before} steps)" if before != after else ""


def shown(found):
    """{"seed": (0, 1), "hash of the text": (8, 9)} -> "--seed was 0, now 1; hash of the text was 8, ..."."""
    parts = []
    for name, (then, now) in found.items():
        if name == "objective" and len(found) > 1:
            continue  # it follows from the other settings, unless someone has edited the loss
        flag = name if " " in name or name == "objective" else "--" + name.replace("_", "-")
        parts.append(f"{flag} was {then!r:.99}, now {now!r:.99}")
    return "; ".join(parts)


def refuse_other_content(args, corpus, student, teacher):
    """InputError unless the finished run in args.out had this text and this teacher."""
    before = read_settings(args.out)
    then = before | before.get("content", {})
    now = identity(args, content_of(args, corpus, student, teacher))
    refuse_differences(args.out, then, now)


# ------------------------------------------------------------------------------------ around the loop
class Run:
    """Used as a context: `with Run(...) as run: for step in run.steps(): ... run.finish_step(...)`.

    bar: a tqdm bar over micro-batches, which also shows the losses; or None.
    """

    def __init__(self, args, student, optimizer, corpus, vocab_size, ranks, teacher=None, bar=None):
        self.args = args
        self.student = student
        self.optimizer = optimizer
        self.corpus = corpus
        self.vocab_size = vocab_size
        self.ranks = ranks
        self.bar = bar if ranks.is_first else None
        self.folder = Path(args.out)
        self.content = content_of(args, corpus, student, teacher)  # before the student changes
        self.begun = False  # whether the folder is this run's
        self.waiting = {name: [] for name in LOGS}  # rows, until it is
        self.stack = contextlib.ExitStack()

    def __enter__(self):
        self.first_step = self.resume()
        self.replaces = not self.args.resume and bool(files_of_run(self.folder))
        if self.bar is not None:  # the steps so far took no time now, so its speed must not count them
            done = self.first_step * len(self.ranks.share(self.args.grad_accum))
            self.bar.n += done
            self.bar.initial += done
            self.bar.last_print_n += done
        self.stop = self.stack.enter_context(stop_signals(self.ranks.is_first))
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def steps(self):
        """The steps to come: from 0, or from where the resumed run was."""
        return range(self.first_step, self.args.steps)

    def say(self, text):
        if self.ranks.is_first:
            say(text)

    def after_micro_batch(self, step):
        """Count it. After a signal to stop, on any rank, save the state after `step` steps and end."""
        if self.bar is not None:
            self.bar.update()
        if not self.ranks.any(self.stop):
            return
        if step > self.first_step:
            self.save(step)
        if self.bar is not None:
            self.bar.close()  # nothing is drawn below the last line
        if step or self.args.role == "control":
            self.say(f"stopped after step {step}; the same command with --resume goes on from there")
        else:
            self.say("stopped before the first step was done, so nothing was saved")
        sys.exit(exit_code(self.stop))

    def check(self, step, mean_losses, gradient_norm, lr):
        """InputError if the loss or its gradient is not finite."""
        if math.isfinite(gradient_norm + mean_losses.loss):
            return
        fix = "Start again with a lower --lr, more --warmup, or --precision fp32"
        where = ""
        gradients = {name: p.grad for name, p in self.student.named_parameters() if p.grad is not None}
        if not math.isfinite(mean_losses.teacher_clm):
            where = f", as {self.args.teacher}, the teacher, answers with NaN or infinity"
            fix = "Try --precision fp32, or another teacher"
        elif name := first_not_finite(gradients):
            where = f", first in the gradient of {name}"
        raise InputError(f"step {step + 1}: loss {mean_losses.loss:.3g}, gradient {gradient_norm:.3g} at "
                         f"learning rate {lr:.2g}{where}. {fix}; nothing in {self.folder} was changed by it")

    def check_student(self, step):
        """InputError if a step has broken the student, which then must not replace anything on disk."""
        if name := first_not_finite(dict(self.student.named_parameters())):
            raise InputError(f"step {step}: the student's {name} is not finite any more. Start again with a "
                             f"lower --lr; the state that was saved in {self.folder} before is unchanged")

    def finish_step(self, step, mean_losses, tokens, lr, gradient_norm):
        """Log the step; validate and save if that is due."""
        seconds = time.perf_counter() - self.started
        done = step + 1
        if step == self.first_step:
            self.check_student(done)
            self.say_memory()
            if not self.replaces:
                self.begin()
        if self.bar is not None:
            self.bar.set_postfix_str(figures(mean_losses), refresh=False)
        self.log("log.csv", {"step": done, **mean_losses._asdict(), "lr": lr, "grad_norm": gradient_norm,
                             "tokens": int(tokens), "tokens_per_second": max(1, round(tokens / seconds))})

        every = self.args.eval_interval
        if every and done % every == 0 and self.ranks.is_first:
            row, = validate([self.student], self.corpus, self.vocab_size, self.args,
                            autocast(self.args, self.ranks.device))
            self.log("held-out.csv", {"step": done, "loss": row["loss"]})
            self.say(f"step {done}: held-out loss {row['loss']:.4f}")
        if done % self.args.save_interval == 0 or done == self.args.steps:
            self.save(done)
        self.started = time.perf_counter()

    def say_memory(self):
        """Once in a command, how much memory a step takes; the control's steps take less."""
        from support.report import peak_memory  # which reads logs, so it imports this module
        if self.args.role == "student" and (text := peak_memory(self.ranks.device)):
            self.say(text)

    # -------------------------------------------------------- what is written, by the first rank alone
    def begin(self, state=None):
        """Once: args.json says whose folder it is now, and an old run goes. state: to save before that.

        A run begins with its first step, so a setting that breaks it there costs no files. One that replaces
        another begins when it first saves, and the old run goes after all that can fail, as on a full disk.
        """
        if self.begun or not self.ranks.is_first:
            return
        with replaced(self.folder / "args.json") as file:
            settings = vars(self.args) | {"content": self.content}
            file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            if state:
                self.write_state(state)
            (self.folder / RESULTS).unlink(missing_ok=True)  # what was finished is not any more
            if self.args.role == "control":
                (self.folder.parent / RESULTS).unlink(missing_ok=True)

        if not self.args.resume:
            remove_run(self.folder, keep={"args.json", "train_state.pt"})
            if (read_settings(self.folder / "control") or {}).get("role") == "control":
                remove_run(self.folder / "control")
        for name, columns in LOGS.items():
            self.cut_log(self.folder / name, columns, self.waiting[name])
        self.begun = True

    def cut_log(self, path, columns, more):
        """Cut a log to the steps so far, as those after the last save are made again; add `more` rows."""
        rows = [row for row in read_rows(path, columns) if row["step"] <= self.first_step]
        if path.name == "log.csv" and len(rows) < self.first_step:
            note(f"{path} has lost {self.first_step - len(rows)} of the steps so far")
        if more or path.exists():
            with replaced(path) as new:
                write_rows(new, columns, rows + more)

    def log(self, name, row):
        """Add a row to log.csv or held-out.csv."""
        if not self.ranks.is_first:
            return
        if not self.begun:
            self.waiting[name].append(row)
            return
        path = self.folder / name
        try:
            write_rows(path, LOGS[name], [row])
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}); the same command with --resume "
                             "goes on from the last saved state") from error

    def save(self, step):
        """Replace train_state.pt, so that a complete one is on disk at every moment.

        No random state is in it: data order and dropout follow from the seed and the step.
        """
        self.check_student(step)
        state = {"step": step, "settings": identity(self.args, self.content),
                 "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.begun:
            self.write_state(state)
        else:
            self.begin(state)

    def write_state(self, state):
        with replaced(self.folder / "train_state.pt") as path, open(path, "wb") as file:
            torch.save(state, file)

    def resume(self):
        """Put weights and optimizer back. Returns the number of steps so far, 0 if none was saved."""
        path = self.folder / "train_state.pt"
        if not self.args.resume:
            return 0
        if not path.exists():
            if (self.folder / "model.safetensors").exists():
                raise InputError(f"--resume: {self.folder} has a finished model, but no train_state.pt to "
                                 "go on from")
            return 0
        return restore(path, identity(self.args, self.content), self.student, self.optimizer)


def figures(losses):
    """What the bar shows: "loss 1.203, CLM 3.881, teacher's 3.040"; of text alone, "loss 3.881"."""
    shown = [f"loss {losses.loss:.3f}"]
    if losses.clm != losses.loss:
        shown.append(f"CLM {losses.clm:.3f}")
    if losses.teacher_clm:
        shown.append(f"teacher's {losses.teacher_clm:.3f}")
    return ", ".join(shown)


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


# ------------------------------------------------------------------------------------ what may be put back
def restore(path, now, student, optimizer):
    """Put a saved state back if its run has the settings `now`. Returns its number of steps.

    Nothing changes before all of the state is known to be good.
    """
    with reading_state(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, then = state["step"], state["settings"]
        json.dumps(then)  # fails for what no settings contain, such as tensors
        require(type(step) is int and 0 <= step <= then["steps"], f"its step is {step!r}")
    refuse_differences(path.parent, then, now)
    if step > now["steps"]:
        raise InputError(f"--resume: {path.parent} has made {step} steps, more than --steps {now['steps']}")

    with reading_state(path):
        check_tensors("student", state["student"], student.state_dict())
        averages = check_averages(state["optimizer"]["state"], optimizer, step)
        student.load_state_dict(state["student"])
        # Groups follow from the flags, so they are ours: another PyTorch may have other fields in them.
        optimizer.load_state_dict({"state": averages, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


@contextlib.contextmanager
def reading_state(path):
    """`reading`, with the way out: whatever a damaged state makes PyTorch raise becomes one line."""
    try:
        with reading(path, "the state of this run"):
            yield
    except InputError as error:
        raise InputError(f"{error}. Put a copy of it back, or start again with --overwrite") from error


def require(condition, otherwise):
    if not condition:
        raise ValueError(otherwise)


def check_tensors(what, found, wanted):
    """ValueError unless two dicts of tensors have the same names, shapes and dtypes, and all is finite."""
    require(found.keys() == wanted.keys(), f"its {what} has other tensors than this run")
    for name, tensor in wanted.items():
        other = found[name]
        # Sparse tensors, and those without memory behind all of their elements, have another layout or other
        # strides; nested ones have no shape.
        same = (isinstance(other, torch.Tensor) and other.device.type == "cpu" and not other.is_nested
                and other.layout == tensor.layout and other.dtype == tensor.dtype
                and other.shape == tensor.shape and other.stride() == tensor.stride())
        require(same, f"{what} {name} has another shape or type")
    name = first_not_finite({name: tensor for name, tensor in found.items() if tensor.numel()})
    require(not name, f"{what} {name} is not finite")


def check_averages(states, optimizer, step):
    """AdamW's averages, or ValueError unless it can go on from them. Its fused step would not notice a wrong
    shape: it would read and write beyond the tensor."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    require({*states} == ({*range(len(parameters))} if step else set()), "its optimizer has other parameters")
    for i, state in states.items():
        averages = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
        check_tensors(f"optimizer's {i}", state, averages)
        made = state["step"].item()
        require(made == step, f"its optimizer has made {made:g} steps, not {step}")
        require(state["exp_avg_sq"].min() >= 0, f"optimizer's {i} exp_avg_sq, a mean of squares, is negative")
    return states


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
            if path.name in EDITABLE and place.exists():
                if hash_of(place) not in (hash_of(path), written.get(path.name)):
                    note(f"{place} has been edited, so it stays as it is")
                    continue
            if path.name in EDITABLE:
                written[path.name] = hash_of(path)
            with replaced(place) as temporary:
                path.rename(temporary)
    with replaced(folder / WRITTEN) as file:
        file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def hash_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------ what a run has left
def read_log(path):
    """log.csv -> list of {column: number}, without rows that are cut, foreign or out of order.

    A log can end in half a row after a kill, or be missing; it is only a record, so nothing depends on it.
    """
    return read_rows(path, COLUMNS)


def read_held_out(folder):
    """held-out.csv of a run -> list of {"step", "loss"}: the student's loss at each --eval-interval."""
    return read_rows(Path(folder, "held-out.csv"), LOGS["held-out.csv"])


def read_rows(path, columns):
    """The rows of a .csv that have a finite number in each of `columns`, and steps that rise."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

    rows = []
    for line in lines:
        try:
            row = {name: float(value) for name, value in zip(columns, line.split(","), strict=True)}
        except ValueError:  # the header, half a row, or a line of someone else
            continue
        # A run stops before it writes NaN or infinity, so these are damage, too.
        finite = all(map(math.isfinite, row.values()))
        previous = rows[-1]["step"] if rows else 0
        positive = [row[name] for name in ("step", "tokens", "tokens_per_second") if name in row]
        if finite and previous < row["step"] == int(row["step"]) and min(positive) > 0:
            rows.append(row)
    return rows


def write_rows(path, columns, rows):
    """Add rows to a .csv, below a header if it is new."""
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not file.tell():
            writer.writerow(columns)
        writer.writerows([written_as(row[name]) for name in columns] for row in rows)


def written_as(value):
    """A number in a .csv: 3.0 -> "3", 0.00012345678 -> "0.0001234568"."""
    whole = math.isfinite(value) and value == int(value)
    return str(int(value)) if whole else f"{value:.7g}"


def seconds_of(rows):
    """Seconds of training in the steps of a log."""
    return sum(row["tokens"] / row["tokens_per_second"] for row in rows)
