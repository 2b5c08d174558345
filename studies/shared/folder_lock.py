"""One process at a time in a folder."""

import fcntl
from pathlib import Path
from typing import TextIO

from neuclip.errors import UserError


def lock(folder: Path, *, wait: bool = False) -> TextIO:
    """Locks the folder against other processes until the returned file is closed.

    Raises:
        UserError: another process holds the lock, and `wait` is false.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise UserError(f"--out {folder}: in use by another run of this script") from None
    return file
