"""Files that are there whole or not at all.

  replaced   what every file of a run is written through: model, state, log, card, tokenizer, pictures

A kill or a full disk between `open(path, "w")` and the last byte leaves half a file where a good one was. So
everything is written to another name first, flushed to the disk, and renamed: os.replace is atomic.
"""
import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError

from support.cli import InputError


@contextlib.contextmanager
def replaced(path):
    """A name to write to. What is there at the end takes the place of `path`; after an error nothing changes.

        with replaced("out/args.json") as temporary:  # "out/args.json.tmp/args.json"
            temporary.write_text("{}")

    The name lies in a folder of its own because safetensors writes to yet another temporary file *beside* the
    name that it is given. A kill leaves both in that folder, and the next write to `path` empties it.

    A symbolic link at `path` becomes a file; what it points to, such as a blob of the Hub's cache, stays.
    """
    path = Path(path)
    folder = Path(f"{path}.tmp")
    temporary = folder / path.name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, path.name)
        folder.mkdir()
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # safetensors makes files that only their owner can read; a new folder's mode follows the umask.
            temporary.chmod(folder.stat().st_mode & 0o666)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # the error that led here matters more
                remove_leftovers(folder, path.name)
    except (OSError, SafetensorError, RuntimeError) as error:
        message = f"{str(path):.300} cannot be written ({reason(error)}); what was there is intact"
        raise InputError(message) from error


def remove_leftovers(folder, name):
    """Remove the temporary folder of a write that was killed, but no file in it that we did not name."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    if not folder.exists():
        return

    for entry in folder.iterdir():
        if entry.name == name or entry.name.startswith(".tmp"):  # safetensors' names: .tmpAbC123
            entry.unlink()
    folder.rmdir()  # fails, as it should, if something else is there


def reason(error):
    """What the system said about a failed write. Other RuntimeErrors than torch.save's are bugs: raised on.

    On a full disk torch.save raises "[enforce fail at inline_container.cc:672]" over the system's own error.
    """
    if isinstance(error, RuntimeError):
        if "inline_container" not in str(error):
            raise error
        error = error.__context__ or error

    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename!s:.300}" if error.filename else error.strerror
    return " ".join(str(error).split())
