"""The folder of a run: nobody's files are lost in it, and the run in it survives being killed at any moment.

  RunFolder.claim    hold the folder for this process; refuse one that holds something else
  RunFolder.begin    the moment at which an old run gives way: when the new one has made its first step
  RunFolder.save     replace train_state.pt, so that a complete one is on disk at every moment
  RunFolder.resume   put a saved state back, after all of it has been checked
"""
import contextlib
import json
import math
import shutil
from pathlib import Path

import torch

from support.cli import InputError
from support.files import replaced
from support.options import control_of

RUN_FILES = ("args.json", "log.csv", "held-out.csv", "train_state.pt", "config.json",
             "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
             "README.md", "loss.png", "runs.png", "distribution.png")

# Flags that may differ between a run and its resumption: what is learned does not depend on them.
CHANGES_NOTHING = ("recipe", "role", "out", "resume", "overwrite", "device", "data_folder", "workers",
                   "compile", "control", "control_lr", "control_batch_size", "eval_interval", "eval_tokens",
                   "save_interval")


class RunFolder:
    """args.out and what lies there. Only rank 0 writes."""

    def __init__(self, args, ranks):
        self.args = args
        self.ranks = ranks
        self.path = Path(args.out)
        self.lock = None
        self.begun = False
        self.new_folders = []  # which were made for it

    # ------------------------------------------------------------------------ whose folder it is
    def claim(self):
        """Hold the folder for this process alone. Refuses one that holds another run, or files that no run
        left; deletes nothing."""
        if not self.ranks.is_first:
            return
        self.take_lock()
        try:
            self.refuse_others_files()
        except InputError:
            self.release()
            raise

    def take_lock(self):
        from filelock import FileLock, Timeout  # torch and huggingface_hub bring it along
        try:
            self.new_folders = [folder for folder in self.path.parents if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            message = f"--out {self.path} is in use by another process; choose another --out"
            raise InputError(message) from error
        except OSError as error:
            remove_empty(self.new_folders)
            raise InputError(f"--out {self.path} cannot be written ({error.strerror}); "
                             "choose another --out") from error
        self.lock = lock

    def refuse_others_files(self):
        """InputError if something lies here that this run must not replace."""
        args = self.args
        here = [name for name in RUN_FILES if (self.path / name).exists()]
        if folders := [name for name in here if (self.path / name).is_dir()]:
            raise InputError(f"--out {self.path} has a folder called {folders[0]}: choose another --out")
        before = read_settings(self.path)

        if args.resume and before is None:
            raise InputError(f"--resume: there is no run in {self.path}")
        if args.resume and before == {}:
            raise InputError(f"--resume: {self.path}/args.json is damaged; --overwrite starts the run again")
        if here and before is None:
            raise InputError(f"--out {self.path} holds files that are no run's, such as {here[0]}: "
                             "choose another --out")

        finished_demo = before and args.recipe == before.get("recipe") == "demo" and "README.md" in here
        if before == {} and not args.overwrite:
            raise InputError(f"{self.path}/args.json is damaged; --overwrite starts the run again")
        if here and not (args.resume or args.overwrite or finished_demo):
            raise InputError(f"--out {self.path} holds another run: --resume goes on with it, "
                             "--overwrite replaces it")
        if args.resume:
            refuse_other_settings(self.path, before, args)
        elif finished_demo:
            print(f"note       {self.path} has a finished demo, which goes when this one has made a step")
        self.refuse_others_control()

    def refuse_others_control(self):
        """The same for the folder of the control, if there is to be one."""
        args = control_of(self.args)
        path = Path(args.out)
        here = [name for name in RUN_FILES if (path / name).exists()]
        if not args.control or not here:
            return
        if not is_control(path):
            raise InputError(f"{path} holds files that are no control's, such as {here[0]}: "
                             "choose another --out, or --no-control")
        if args.resume and (path / "train_state.pt").exists():
            refuse_other_settings(path, read_settings(path), args)

    def release(self):
        """Give the folder back; if nothing was written to it, it goes, and so do those made for it."""
        if not self.lock:
            return
        self.lock.release()
        self.lock = None
        with contextlib.suppress(OSError):
            if [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                remove_empty([self.path, *self.new_folders])

    def begin(self):
        """Once, before the first thing is written: args.json says whose folder it is now, the old run goes.

        The first step has been made by then, so a setting that breaks a run at its start costs no files.
        """
        if self.begun or not self.ranks.is_first:
            return
        self.begun = True

        # First what can fail, as on a full disk. After a kill between the two --resume finds a state of
        # other settings, and says so.
        with replaced(self.path / "args.json") as file:
            file.write_text(json.dumps(vars(self.args), indent=2) + "\n", encoding="utf-8")
        if not self.args.resume:
            remove_run(self.path, keep="args.json")
            if is_control(self.path / "control"):  # the old run's own; somebody else's folder stays
                remove_run(self.path / "control")

    # ------------------------------------------------------------------------ what a run is made of
    def save(self, corpus, student, optimizer, step):
        """Replace train_state.pt.

        No random state is in it: data order and dropout follow from the seed and the step.
        """
        if not self.ranks.is_first:
            return
        self.begin()
        state = {"step": step, "settings": identity(self.args, corpus), "student": student.state_dict(),
                 "optimizer": optimizer.state_dict()}
        with replaced(self.path / "train_state.pt") as path, open(path, "wb") as file:
            torch.save(state, file)

    def resume(self, corpus, student, optimizer):
        """Put weights and optimizer back. Returns the number of finished steps, 0 if none was saved.

        Nothing is changed, in memory or on disk, before all of the state is known to be good.
        """
        path = self.path / "train_state.pt"
        if not self.args.resume or not path.exists():
            return 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damage shows as errors of a dozen kinds
            raise damaged(path, f"{error!r:.80}") from error
        if not isinstance(state, dict) or not is_json_object(state.get("settings")):
            raise damaged(path, "it is no state of a run")

        then, now = state["settings"], identity(self.args, corpus)
        refuse_changes(self.path, then, now, {**then, **now})

        check_step(path, state.get("step"), self.args.steps)
        check_tensors(path, "student", state.get("student"), student.state_dict())
        averages = check_optimizer(path, state.get("optimizer"), optimizer, state["step"])
        student.load_state_dict(state["student"])
        # Groups follow from the flags, so they are ours: another PyTorch may have other fields in them.
        optimizer.load_state_dict({"state": averages, "param_groups": optimizer.state_dict()["param_groups"]})
        return state["step"]


def read_settings(folder):
    """The args.json of the run in a folder: {} if it is damaged, None if there is none, or if it is another
    program's."""
    path = Path(folder, "args.json")
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(settings, dict) or not settings:
        return {}
    return settings if {"recipe", "teacher", "kd_weight"} <= settings.keys() else None


def is_control(folder):
    """Whether a folder holds a control. One whose args.json is damaged does not say so, and is left alone."""
    settings = read_settings(folder)
    return bool(settings) and settings.get("role", "control") == "control"


def remove_run(folder, keep=""):
    """Delete the files of a run, but for the one called `keep`."""
    for name in RUN_FILES:
        if name != keep:
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "train_state.pt.tmp", ignore_errors=True)
    remove_empty([folder])


def remove_empty(folders):
    """Remove folders, each inside of the next one, as long as there is nothing in them."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def identity(args, corpus):
    """What makes a run the one that it is: its settings, and how much it has to read."""
    kept = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING}
    return {**kept, "training tokens": len(corpus.train)}


def refuse_other_settings(folder, before, args):
    """InputError if flags of a run to resume differ from its args.json, before any time is spent. What models
    and corpus have yet to decide is compared later, with the state."""
    now = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING}
    undecided = {"seq_len"} if now["seq_len"] is None else set()
    if now["precision"] == "auto":
        undecided.add("precision")
    if now["epochs"]:
        undecided.add("steps")
    if "," not in (now["student_layers"] or ","):  # how many, not yet which
        undecided.add("student_layers")
    refuse_changes(folder, before, now, now.keys() - undecided)


def refuse_changes(folder, then, now, names):
    """InputError if one of `names` has another value now."""
    changed = [f"{flag_or_name(name)} was {then.get(name)!r:.99}, now {now.get(name)!r:.99}"
               for name in names if then.get(name) != now.get(name)]
    if changed:
        raise InputError(f"--resume of {folder} with other settings: {'; '.join(sorted(changed))}")


# ------------------------------------------------------------------------------------ what may be put back
def flag_or_name(name):
    """A setting as messages name it: "grad_accum" -> "--grad-accum"; "training tokens" stays."""
    return name if " " in name else "--" + name.replace("_", "-")


def damaged(path, why):
    return InputError(f"{path} is damaged ({why}): put a copy of it back, or start again with --overwrite")


def is_json_object(value):
    """Whether a dict has in it what args.json can hold alone. Tensors, say, are not to be compared by !=."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, dict)


def check_step(path, step, steps):
    """InputError unless `step` is a number of steps that a run of `steps` can have finished."""
    if type(step) is not int or not 0 <= step <= steps:
        raise damaged(path, f"its step is {step!r}")


def check_tensors(path, what, found, wanted):
    """InputError unless two dicts of tensors have the same names, shapes and dtypes, and all is finite."""
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        raise damaged(path, f"its {what} has other tensors than this run")
    for name, tensor in wanted.items():
        other = found[name]
        # What is sparse, or has no memory behind all of its elements, has another layout or other strides;
        # what is nested has no shape to ask for.
        same = (isinstance(other, torch.Tensor) and other.device.type == "cpu" and not other.is_nested
                and other.layout == tensor.layout and other.dtype == tensor.dtype
                and other.shape == tensor.shape and other.stride() == tensor.stride())
        if not same:
            raise damaged(path, f"{what} {name} has another shape or type")
        if other.numel() and not math.isfinite(sum(x.item() for x in torch.aminmax(other))):
            raise damaged(path, f"{what} {name} holds NaN or infinity")


def check_optimizer(path, found, optimizer, step):
    """AdamW's averages in `found`, or InputError unless it can go on from them. Its fused step would not
    notice a wrong shape: it would read and write beyond the tensor."""
    states = found.get("state") if isinstance(found, dict) else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = {*range(len(parameters))} if step else set()
    if not isinstance(states, dict) or {*states} != wanted:
        raise damaged(path, "its optimizer has averages of other parameters")

    for i, state in states.items():
        averages = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
        check_tensors(path, f"optimizer's {i}", state, averages)
        if state["step"].item() != step:
            raise damaged(path, f"its optimizer has made {state['step'].item():g} steps, not {step}")
        if state["exp_avg_sq"].min() < 0:  # its root would be NaN
            raise damaged(path, f"optimizer's {i} exp_avg_sq, a mean of squares, is negative")
    return states
