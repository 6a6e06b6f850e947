"""Results of a plan of runs: a JSON object a line, which runs add to and a killed run leaves whole.

  read_rows   {name: row} of what is done
  add_row     one more
  origin      when, and by what: for each row
  commit      which code that was
"""
import json
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def read_rows(path):
    """{name: row} of what a file has; where a name stands there twice, the later one."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["name"]: row for row in rows}


def add_row(path, row):
    """Add a line, and nothing but a line: another process may be adding its own."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def origin():
    """{"threads", "torch", "commit", "date"} of a row that is made now."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit(),
            "date": date.today().isoformat()}


def commit():
    """The commit whose code this is, with a + if it has been changed since."""
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    return (git("rev-parse", "--short", "HEAD") or "?") + ("+" if changed else "")
