"""Files that are there whole or not at all."""
import contextlib
import os
from pathlib import Path

from safetensors import SafetensorError

from support.cli import InputError


@contextlib.contextmanager
def replaced(path):
    """The name of a temporary file that takes the place of `path` once it is complete and safely on disk."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({reason}); what was there is intact") from error
