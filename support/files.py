"""Files that are there whole or not at all, and locks. Nothing here touches a file that it did not make.

  replaced      every file of a run is written through it: models, states, logs, cards, tokenizers, pictures
  locked        one process at a time works on a folder, or on a name in it
  sync          flush an open file to the disk
  read_object   a small JSON file; {} if it is missing or broken

All temporary names start with ".distil-" and end in random digits or "lock": no other program uses them.
"""
import contextlib
import errno
import functools
import json
import os
import secrets
import shutil
from pathlib import Path

from safetensors import SafetensorError

from support.cli import InputError, note


# ------------------------------------------------------------------------------------ atomic writes
@contextlib.contextmanager
def replaced(path):
    """A name to write to. At the end that file takes the place of `path`; after an error nothing changes.

        with replaced("out/args.json") as temporary:  # "out/.distil-5f0c.../args.json"
            temporary.write_text("{}")

    The file is written beside `path`, flushed to the disk, and renamed, so a kill cannot leave half of it. A
    link at `path` becomes a file; the file that it points to (a blob of the Hub's cache) stays as it is.
    """
    path = Path(path)
    folder = path.with_name(f".distil-{secrets.token_hex(8)}")  # safetensors writes a second file in it
    try:
        folder.mkdir(parents=True)  # fails if anything has this name, even a link
        temporary = folder / path.name
        yield temporary

        with open(temporary, "rb+") as file:
            sync(file)
        # safetensors makes files that only their owner can read; the mode of a new folder follows the umask.
        with contextlib.suppress(OSError):  # some network file systems have no modes
            temporary.chmod(folder.stat().st_mode & 0o666)
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        # On a full disk torch.save raises a RuntimeError over the system's error, and after Ctrl-C over the
        # SystemExit. Other ones are bugs.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, SystemExit):
            raise cause from None
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise InputError(f"{path} cannot be written ({reason}); what was there is unchanged") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync(file):
    """Flush an open file to the disk, so that a power cut cannot undo a rename that follows."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            raise
        note_once("this file system has no fsync: a power cut can lose files that were just written")


@functools.cache
def note_once(text):
    note(text)


# ------------------------------------------------------------------------------------ locks
@contextlib.contextmanager
def locked(folder, what, name="", wait=False):
    """Hold `folder`, or only what is called `name` in it, for this process.

        with locked("out", "--out out"):                                  # else: "--out out is in use ..."
        with locked("corpora", "the corpus x-12", name="x-12", wait=True):  # wait until it is free

    The lock is an empty file in the folder, and the system frees it when its process dies. At the end the
    file goes, and so does each folder that was made for it if nothing has been put into it.
    """
    path = Path(folder, f".distil-{name}-lock" if name else ".distil-lock")
    with contextlib.ExitStack() as at_end:
        try:
            new_folders = [parent for parent in path.parents if not parent.exists()]
            for new in reversed(new_folders):  # the innermost one goes first
                at_end.callback(if_possible, new.rmdir)
            at_end.enter_context(take_lock(path, what, wait))
            at_end.callback(if_possible, path.unlink)  # while it is locked: take_lock notices it
        except OSError as error:
            raise InputError(f"{what} cannot be written ({error.filename}: {error.strerror})") from error
        yield


def if_possible(remove):
    """Remove a folder, unless it is not empty, or a file, unless it is open and this is Windows."""
    with contextlib.suppress(OSError):
        remove()


def take_lock(path, what, wait):
    """The file `path`, open and locked. Nothing is written to it."""
    from filelock import lock_descriptor
    while True:
        # Another process may remove the file when it is done, and the folder that it had made for it.
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab")
            try:
                if not lock_descriptor(file.fileno(), blocking=False):
                    in_use = f"{what} is in use by another process (if it has ended, delete {path})"
                    if not wait:
                        raise InputError(f"{in_use}; wait for it, or choose another one")
                    note(f"{in_use}; waiting for it")
                    lock_descriptor(file.fileno())
            except OSError:
                note_once("no file locks on this file system: nothing keeps two commands from writing to the "
                          "same folder at the same time")
            if os.fstat(file.fileno()).st_nlink:  # a lock on a removed file protects nothing
                return file


# ------------------------------------------------------------------------------------ small JSON files
def read_object(path):
    """The JSON object in a file; an empty one if there is none."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
