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

RUN_FILES = ("args.json", "log.csv", "train_state.pt", "config.json", "generation_config.json",
             "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")

# Flags that may differ between a run and its resumption: what is learned does not depend on them.
CHANGES_NOTHING = ("recipe", "out", "resume", "overwrite", "device", "data_folder", "workers", "compile",
                   "control", "eval_interval", "eval_tokens", "save_interval")


class RunFolder:
    """args.out and what lies there. Only rank 0 writes."""

    def __init__(self, args, ranks):
        self.args = args
        self.ranks = ranks
        self.path = Path(args.out)
        self.lock = None
        self.begun = False

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
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            message = f"--out {self.path} is in use by another process; choose another --out"
            raise InputError(message) from error
        except OSError as error:
            raise InputError(f"--out {self.path} cannot be written ({error.strerror}); "
                             "choose another --out") from error
        self.lock = lock

    def refuse_others_files(self):
        args = self.args
        here = [name for name in RUN_FILES if (self.path / name).exists()]
        before = read_settings(self.path)

        if args.resume and before is None:
            raise InputError(f"--resume: there is no run in {self.path}")
        if args.resume and before == {}:
            raise InputError(f"--resume: {self.path}/args.json is damaged; --overwrite starts the run again")
        if here and before is None:
            raise InputError(f"--out {self.path} holds files that are no run's, such as {here[0]}: "
                             "choose another --out")

        finished_demo = before and args.recipe == before.get("recipe") == "demo" and "README.md" in here
        if here and not (args.resume or args.overwrite or finished_demo):
            raise InputError(f"--out {self.path} holds another run: --resume goes on with it, "
                             "--overwrite replaces it")

        control = self.path / "control"
        foreign = [name for name in RUN_FILES if (control / name).exists()]
        if args.control and foreign and not read_settings(control):
            raise InputError(f"{control} holds files that are no run's, such as {foreign[0]}: "
                             "choose another --out, or --no-control")

    def release(self):
        """Give the folder back; if nothing was written to it, it goes."""
        if self.lock:
            self.lock.release()
            self.lock = None
        with contextlib.suppress(OSError):
            if [entry.name for entry in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                self.path.rmdir()

    def begin(self):
        """Once, before the first thing is written: the old run goes, args.json says whose folder it is now.

        The first step has been made by then, so a setting that breaks a run at its start costs nobody's files.
        """
        if self.begun or not self.ranks.is_first:
            return
        self.begun = True
        if not self.args.resume:
            if read_settings(self.path / "control"):  # the old run's own; somebody else's folder stays
                remove_run(self.path / "control")
            remove_run(self.path, keep="args.json")
        self.path.mkdir(parents=True, exist_ok=True)
        with replaced(self.path / "args.json") as file:
            file.write_text(json.dumps(vars(self.args), indent=2) + "\n", encoding="utf-8")

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
        if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
            raise damaged(path, "it is no state of a run")

        then, now = state["settings"], identity(self.args, corpus)
        if changed := [f"{name} was {then.get(name)!r}, now {now.get(name)!r}"
                       for name in {**then, **now} if then.get(name) != now.get(name)]:
            raise InputError(f"--resume of {self.path} with other settings: {'; '.join(changed)}")

        check_step(path, state.get("step"), self.args.steps)
        check_tensors(path, "student", state.get("student"), student.state_dict())
        check_optimizer(path, state.get("optimizer"), optimizer, state["step"])
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]


def read_settings(folder):
    """The args.json of the run in a folder: None if there is none, {} if it is damaged or not a run's."""
    path = Path(folder, "args.json")
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    ours = isinstance(settings, dict) and {"recipe", "teacher", "kd_weight"} <= settings.keys()
    return settings if ours else {}


def remove_run(folder, keep=""):
    """Delete the files of a run, but for the one called `keep`."""
    for name in RUN_FILES:
        if name != keep:
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "train_state.pt.tmp", ignore_errors=True)


def identity(args, corpus):
    """What makes a run the one that it is: its settings, and how much it has to read."""
    kept = {name: value for name, value in vars(args).items() if name not in CHANGES_NOTHING}
    return {**kept, "training tokens": len(corpus.train)}


# ------------------------------------------------------------------------------------ what may be put back
def damaged(path, why):
    return InputError(f"{path} is damaged ({why}): put a copy of it back, or start again with --overwrite")


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
        if not isinstance(other, torch.Tensor) or other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise damaged(path, f"{what} {name} has another shape or type")
        if other.numel() and not math.isfinite(sum(x.item() for x in torch.aminmax(other))):
            raise damaged(path, f"{what} {name} holds NaN or infinity")


def check_optimizer(path, found, optimizer, step):
    """InputError unless AdamW can go on from `found`. Its fused step would not notice a wrong shape: it would
    read and write beyond the tensor."""
    if not isinstance(found, dict) or {*found} != {"state", "param_groups"}:
        raise damaged(path, "it has no optimizer")
    ours = optimizer.state_dict()["param_groups"]
    theirs = found["param_groups"]
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        raise damaged(path, "its optimizer has other groups")
    for mine, other in zip(ours, theirs, strict=True):
        same = isinstance(other, dict) and mine.keys() == other.keys() and mine["params"] == other["params"]
        if not same or any(type(other[name]) is not type(mine[name]) for name in mine):
            raise damaged(path, "its optimizer has other groups")

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = found["state"]
    wanted = {*range(len(parameters))} if step else set()
    if not isinstance(states, dict) or {*states} != wanted:
        raise damaged(path, "its optimizer has averages of other parameters")
    for i, state in states.items():
        averages = {"step": torch.zeros(()), "exp_avg": parameters[i], "exp_avg_sq": parameters[i]}
        check_tensors(path, f"optimizer's {i}", state, averages)
