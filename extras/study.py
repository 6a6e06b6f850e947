"""The runner of all studies: a plan of runs, a row of figures for each of them, and a page made of the rows.

    python -m extras.atlas                  makes the missing runs; can be stopped
    python -m extras.atlas --only control   only runs whose name contains "control"
    python -m extras.atlas --list           prints the plan and the results so far
    python -m extras.atlas --page           makes the tables and pictures anew

Read in this order:
  Study     a study, as data; `main` is its command
  trained   trains what `python distill.py` with the same flags would train, and measures it
  arms      groups rows that differ only in their seed; `average` and `spread` of such a group

A study is a module `extras/NAME.py` that ends in

    STUDY = Study("atlas", __doc__, PLAN, one_run, tables={"arms": arms_table})

    if __name__ == "__main__":
        run_cli(STUDY.main)

Its results are docs/PAGE.jsonl: one JSON object a line, with the flags, seed, commit and date of its run.
Every table of docs/PAGE.md is written between the two marks `<!-- table: NAME -->` and `<!-- end -->`.
"""
import json
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import mean
from unittest import mock

import torch

import distill
from support.cli import InputError, format_table, new_parser, reading
from support.files import replaced
from support.ranks import Ranks, keep_memory, pick_device

ROOT = Path(__file__).parent.parent


def show_loss(row):
    """The result of a run, in a few characters: its held-out loss."""
    return f"{row['loss']:.4f}"


@dataclass
class Study:
    name: str  # the module: extras/NAME.py
    doc: str  # its docstring, for --help
    plan: dict = field(default_factory=dict)  # {name of a run: its flags}, in the order of the runs
    one_run: Callable = None  # (name, flags) -> the figures of that run, a dict
    tables: dict = field(default_factory=dict)  # {name in the page: rows -> lines of the table, as dicts}
    pictures: dict = field(default_factory=dict)  # {file in assets/: rows -> a Figure of matplotlib}
    page: str = ""  # docs/PAGE.md and docs/PAGE.jsonl; the name of the study if empty
    show: Callable = show_loss  # row -> its result, in a few characters
    made_by: str = ""  # of a finished study without a plan: the commit that has the code of its runs

    def file(self, suffix):
        return ROOT / "docs" / f"{self.page or self.name}{suffix}"

    def rows(self):
        """{name: row} of all runs that are done. If a name is there twice, the later row counts."""
        path = self.file(".jsonl")
        if not path.exists():
            return {}
        with reading(path, "a list of runs"):
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return {row["name"]: row for row in rows}

    def add(self, row):
        """Append one line and rewrite nothing: another process may be adding its own line."""
        with open(self.file(".jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def main(self, argv=None):
        """The command of the study."""
        args = self.parse_args(argv)
        if args.page:
            self.make_page()
            return
        if self.made_by:
            raise InputError("the runs of this study are finished: --page makes its page anew, and commit "
                             f"{self.made_by} has the code of the runs")

        runs = {name: command for name, command in self.plan.items() if args.only in name}
        if not runs:
            raise InputError(f"--only {args.only}: no run of the plan has this in its name; see --list")

        if not args.list:
            keep_memory()
        for name, command in runs.items():
            done = self.rows()  # read again each time: another process may be at work
            if args.list:
                print(self.show(done[name]) if name in done else "(to do)", name, "|", command)
            elif name not in done:
                row = {"name": name, "flags": command, **self.one_run(name, command), **origin()}
                self.add(row)
                print(self.show(row), name, flush=True)

    def parse_args(self, argv):
        parser = new_parser(self.doc, f"python -m extras.{self.name} [options]")
        parser.add_argument("--only", default="", metavar="TEXT", help="only runs with TEXT in their name")
        parser.add_argument("--list", action="store_true",
                            help="print the plan and the results so far; train nothing")
        parser.add_argument("--page", action="store_true",
                            help=f"write the tables of docs/{self.file('.md').name}, and its pictures, anew")
        return parser.parse_args(argv)

    def make_page(self):
        rows = self.rows()
        if not rows:
            raise InputError(f"--page: {self.file('.jsonl')} has no runs yet; without --page they are made")
        text = self.filled(self.file(".md").read_text(encoding="utf-8"), rows)
        with replaced(self.file(".md")) as file:
            file.write_text(text, encoding="utf-8")

        for name, draw in self.pictures.items():
            path = ROOT / "assets" / name
            with replaced(path) as file:
                draw(rows).savefig(file, format=path.suffix[1:])

    def filled(self, text, rows):
        """The text of the page, with each table between its two marks made anew."""
        def new_table(found):
            mark, name = found.groups()
            if name not in self.tables:
                raise InputError(f"{self.file('.md')} has a place for a table {name!r}, but the study only "
                                 f"makes {', '.join(self.tables)}")
            return f"{mark}\n{format_table(self.tables[name](rows))}\n<!-- end -->"

        missing = [name for name in self.tables if f"<!-- table: {name} -->" not in text]
        if missing:
            raise InputError(f"{self.file('.md')} has no place for the table {missing[0]!r}: add the lines "
                             f"<!-- table: {missing[0]} --> and <!-- end -->")
        return re.sub(r"(<!-- table: (\w+) -->).*?<!-- end -->", new_table, text, flags=re.DOTALL)


def origin():
    """When a row was made, and by which code. A + after the commit: files were changed since, ?: unknown."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "?"
    if git("status", "--porcelain", "--untracked-files=no", "--", "*.py"):
        commit += "+"
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
    }


# ------------------------------------------------------------------------------------ a run
def trained(command, score, losses_of=None, change=None, around=None):
    """Train the student that `python distill.py COMMAND` would train. Returns the figures of the run: its
    seed, steps and seconds, and what `score(args, teacher, student, corpus, tokenizer)` returns, a dict.

    losses_of: takes the place of distill.losses_of. change: (teacher, student, corpus) -> the three that are
    used instead. around: has the arguments of `score`, and returns a context in which the student is trained.
    """
    with tempfile.TemporaryDirectory() as folder:
        # No validations on the way, unless asked for: the seconds are those of training alone.
        flags = shlex.split(f"--eval-interval 0 {command} --out {folder}/out")
        args = distill.parse_args(flags)
        args.device = pick_device(args.device)
        ranks = Ranks(args.device)

        tokenizer, teacher, student = distill.load_models(args, ranks.device)
        corpus = distill.load_corpus(args, tokenizer)
        if change:
            teacher, student, corpus = change(teacher, student, corpus)
        parts = args, teacher, student, corpus, tokenizer

        # Who teaches: the teacher itself, its answers on disk, or for a control nobody.
        if args.teacher_cache:
            distill.cache_teacher(args, teacher, corpus, tokenizer.vocab_size, ranks)
        is_live = (args.kd_weight or args.cos_weight) and not args.teacher_cache
        with (
            mock.patch.object(distill, "losses_of", losses_of or distill.losses_of),
            around(*parts) if around else nullcontext(),
        ):
            started = time.perf_counter()
            distill.train(args, student, teacher if is_live else None, corpus, tokenizer.vocab_size, ranks)
            seconds = time.perf_counter() - started
        figures = score(*parts)
    return {"seed": args.seed, "steps": args.steps, "seconds": round(seconds, 1), **figures}


def write_text(folder, documents):
    """documents(held_out) -> FOLDER/train.jsonl and FOLDER/val.jsonl, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        path = folder / f"{split}.jsonl"
        if not path.exists():
            with replaced(path) as file:
                lines = (json.dumps({"text": text}) + "\n" for text in documents(split == "val") if text)
                file.write_text("".join(lines), encoding="utf-8")


# ------------------------------------------------------------------------------------ tables
def arms(rows):
    """{"reverse, seed 0": row, ...} -> {"reverse": [its rows, by seed]}; a name without a seed is an arm."""
    found = {}
    for name, row in rows.items():
        arm, _, _ = name.partition(", seed ")
        found.setdefault(arm, []).append(row)
    return {arm: sorted(seeds, key=lambda row: row["seed"]) for arm, seeds in found.items()}


def average(seeds, column="loss"):
    """The mean of a column over the rows of an arm."""
    return mean(row[column] for row in seeds)


def spread(seeds, column="loss"):
    """`3.2475 (3.2465 to 3.2505)`: the mean of a column and its range over the seeds, or the one value."""
    values = [row[column] for row in seeds]
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
