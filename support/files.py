"""Files that are there whole or not at all, and locks. Nothing here touches a file that it did not make.

  replaced      every file of a run is written through it: models, states, logs, cards, tokenizers, pictures
  locked        one process at a time works on a folder, or on a name in it
  sync          flush an open file to the disk
  read_object   a small JSON file; {} if it is missing or broken

All temporary names start with ".distil-" and end in random digits or ".lock", so they cannot be anybody's.
"""
import contextlib
import errno
import functools
import json
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

from safetensors import SafetensorError

from support.cli import InputError, note


# ------------------------------------------------------------------------------------ atomic writes
@contextlib.contextmanager
def replaced(path):
    """A name to write to. At the end that file takes the place of `path`; after an error nothing changes.

        with replaced("out/args.json") as temporary:  # "out/.distil-5f0c.../args.json"
            temporary.write_text("{}")

    A kill between `open(path, "w")` and the last byte would leave half a file where a good one was. So the
    file is written beside it, flushed to the disk, and renamed: os.replace is atomic.

    The temporary name lies in a new folder, because safetensors writes another temporary file beside it.
    A symbolic link at `path` becomes a file; the file that it points to (a blob of the Hub's cache) stays.
    """
    path = Path(path)
    folder = path.with_name(f".distil-{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()  # fails if anything has this name, even a link
        temporary = folder / path.name
        yield temporary

        with open(temporary, "rb+") as file:
            sync(file)
        # safetensors makes files that only their owner can read; the mode of a new folder follows the umask.
        with contextlib.suppress(OSError):  # some network file systems have no modes
            temporary.chmod(folder.stat().st_mode & 0o666)
        os.replace(temporary, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        # On a full disk torch.save raises a RuntimeError over the system's error. Other ones are bugs.
        from_torch = "inline_container" in str(error)
        if isinstance(error, RuntimeError) and not from_torch:
            raise
        cause = error.__context__ if from_torch and error.__context__ else error
        reason = " ".join(str(getattr(cause, "strerror", None) or cause).split())
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

        with locked("out", "--out out"):                                  # else: "--out out is in use by ..."
        with locked("corpora", "the corpus x-12", name="x-12", wait=True):  # wait until it is free

    The lock is a file in the folder, and the system frees it when its process dies. At the end the file
    goes, and so does each folder that was made for it if nothing has been put into it.
    """
    new_folders = []
    try:
        try:
            folder = Path(folder)
            new_folders += [new for new in (folder, *folder.parents) if not new.exists()]  # innermost first
            path = folder / f".distil-{name}{'-' if name else ''}lock"
            file = take_lock(path, what, wait)
        except OSError as error:
            where = error.filename or folder
            raise InputError(f"{what} cannot be written ({where}: {error.strerror or error})") from error
        with file:
            ours = sign(file)
            try:
                yield
            finally:
                if ours:
                    with contextlib.suppress(OSError):  # Windows does not remove open files
                        path.unlink()  # while it is locked: take_lock notices that it is gone
    finally:
        with contextlib.suppress(OSError):  # a folder that is not empty, so those around it are not either
            for new in new_folders:
                new.rmdir()


def take_lock(path, what, wait):
    """The file `path`, open and locked."""
    from filelock import lock_descriptor
    for attempt in range(1000):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Do not follow a link, and do not empty a file that is there.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            file = open(os.open(path, flags, 0o666), "r+b", buffering=0)
        except FileNotFoundError:  # another process has just removed the folder that it had made
            if attempt < 999:
                continue
            raise

        try:
            if not lock_descriptor(file.fileno(), blocking=False):
                refuse_or_wait(path, what, wait)
                lock_descriptor(file.fileno())
        except InputError:
            file.close()
            raise
        except OSError:
            note_once("this file system has no file locks: nothing keeps two commands from writing to the "
                      "same folder at the same time")

        # The process that had the lock may have removed the file: then a lock on it protects nothing.
        # (Some network file systems do not count links; hence the end of this loop.)
        if os.fstat(file.fileno()).st_nlink > 0 or attempt == 999:
            return file
        file.close()


SIGNATURE = re.compile(rb"process \d+ on (.+)\n")


def sign(file):
    """Write into a lock file who has it. False for a file with other content, which stays as it is."""
    with contextlib.suppress(OSError):
        content = file.read(1000)
        if content and not SIGNATURE.fullmatch(content):
            return False
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return True


def refuse_or_wait(path, what, wait):
    """Say who has the lock: in an InputError, or in a note before this process waits for it."""
    holder = "another process"
    with contextlib.suppress(OSError):  # Windows does not let others read a locked file
        if found := SIGNATURE.fullmatch(path.read_bytes()):
            holder = found[0].decode().strip()
            if found[1].decode() != socket.gethostname():
                holder += f" (if that is not running any more, delete {path})"
    if not wait:
        raise InputError(f"{what} is in use by {holder}; wait for it, or choose another one")
    note(f"{what} is in use by {holder}; waiting for it")


# ------------------------------------------------------------------------------------ small JSON files
def read_object(path):
    """The JSON object in a file; an empty one if there is none."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
