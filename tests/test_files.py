"""support/files.py: writes that happen whole or not at all, locks, and other people's files left alone."""
import errno
import fcntl
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import REPO
from safetensors import SafetensorError

from support import files
from support.cli import InputError
from support.files import locked, replaced


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def failing(error):
    def fail(*_):
        raise error
    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    pass


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """A link becomes a file; modes follow the umask; nothing temporary is left."""
    path = tmp_path / "new" / "x.json"
    (tmp_path / "blob").write_text("zero")
    (tmp_path / "new").mkdir()
    path.symlink_to("../blob")
    with replaced(path) as temporary:
        temporary.write_text("one")
        temporary.chmod(0o600)  # as safetensors does
    assert path.stat().st_mode & 0o666 == (tmp_path / "new").stat().st_mode & 0o666
    for error in (Killed, KeyError):
        with pytest.raises(error), replaced(path) as temporary:
            temporary.write_text("two")
            raise error
    assert path.read_text() == "one" and (tmp_path / "blob").read_text() == "zero"
    assert listing(tmp_path) == ["blob", "new", "new/x.json"]


def test_a_full_disk_is_one_line_and_a_bug_is_not(tmp_path):
    """torch.save raises a RuntimeError over the system's error, safetensors one of its own."""
    class Full:
        write = flush = failing(FULL)

    path = tmp_path / "x"
    path.write_text("one")
    for write in (failing(FULL), lambda: torch.save(torch.ones(9), Full()),
                  failing(SafetensorError("No space left on device"))):
        with pytest.raises(InputError, match=r"x cannot be written \(No space.*unchanged"), replaced(path):
            write()
    with pytest.raises(RuntimeError, match="a bug"), replaced(path):
        raise RuntimeError("a bug")
    assert path.read_text() == "one" and listing(tmp_path) == ["x"]


def test_without_chmod_fsync_and_locks_work_goes_on_and_is_noted_once(tmp_path, monkeypatch, capsys):
    files.note_once.cache_clear()
    for code in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
        for place, name in ((files.Path, "chmod"), (os, "fsync"), (fcntl, "flock")):
            monkeypatch.setattr(place, name, failing(OSError(code, os.strerror(code))))
        with locked(tmp_path / "out", "--out out"), replaced(tmp_path / "x") as temporary:
            temporary.write_text(str(code))
        assert (tmp_path / "x").read_text() == str(code)
    notes = capsys.readouterr().err
    assert notes.count("no file locks") == notes.count("no fsync") == 1

    monkeypatch.setattr(os, "fsync", failing(FULL))  # this is not a missing feature
    with pytest.raises(InputError, match="No space left"), replaced(tmp_path / "x") as temporary:
        temporary.write_text("lost")
    assert listing(tmp_path) == ["x"]


# ------------------------------------------------------------------------------------ locks
HOLDER = """
import sys, time
from support.files import locked
with locked(sys.argv[1], "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path]
    with subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="--out x is in use .*-lock"), locked(tmp_path, "--out x"):
            pass
        process.kill()
    with locked(tmp_path, "--out x"), locked(tmp_path, "a file in it", name="x"):
        pass
    assert listing(tmp_path) == []


def test_of_many_that_wait_one_at_a_time_gets_in(tmp_path):
    """Each lock removes its file when it is done, and those that wait must not go on with a removed file."""
    inside = []
    seen = []

    def work():
        with locked(tmp_path / "c", "it", wait=True):
            inside.append(1)
            time.sleep(0.02)
            seen.append((len(inside), (tmp_path / "c" / ".distil-lock").exists()))
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [(1, True)] * 5 and not list(tmp_path.glob("*/*"))


def test_folders_that_were_made_for_a_lock_go_if_they_stay_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / ".x.lock").symlink_to("theirs")  # not a name of ours
    for folder in ("a/b", "mine", "c/d"):
        with locked(tmp_path / folder, "it"):
            if folder == "c/d":
                (tmp_path / folder / "x").write_text("")
    with pytest.raises(InputError, match="--out x cannot be written .*x"):
        with locked(tmp_path / "c" / "d" / "x" / "below a file", "--out x"):
            pass
    assert listing(tmp_path) == [".x.lock", "c", "c/d", "c/d/x", "mine", "theirs"]
    assert (tmp_path / "theirs").read_text() == "precious"
