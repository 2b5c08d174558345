"""What checkpoints of both forms, a file and a sharded folder, have in common."""

import errno
import hashlib
import os
import shutil
from pathlib import Path

from neuclip.errors import UserError

SUMS = "SHA256SUMS"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or used here."""


def not_written(path: Path, error: Exception) -> CheckpointError:
    """What to say of a checkpoint that could not be written."""
    return CheckpointError(
        f"cannot write checkpoint {path}: {reason(error)}; free some space or choose another "
        "--logs folder; the checkpoints written before are complete"
    )


def not_plain(path: Path, why: str) -> CheckpointError:
    """What to say of a checkpoint that holds more than tensors and values."""
    return CheckpointError(
        f"checkpoint {path} is not a file of plain tensors and values, and is not loaded (it could "
        f"run code): {why}"
    )


def neighbours(path: Path) -> str:
    """The checkpoints beside a path, as the end of a sentence."""
    found = sorted(other.name for other in checkpoints_in(path.parent) if other != path)
    return f"; there are: {', '.join(found)}" if found else ""


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder: files, and folders that were written to the end."""
    files = folder.glob("*.pt")
    folders = (path.parent for path in folder.glob(f"[!.]*/{SUMS}"))
    return [*files, *(path for path in folders if not path.is_symlink())]


def write_text(path: Path, text: str) -> None:
    """Replaces a text file in one piece."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def sha256(path: Path) -> str:
    """The sum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synchronize(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Deletes a checkpoint, if it is there; a folder loses its name first."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
        shutil.rmtree(old)
    else:
        path.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """The cause in one line."""
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return "no space left on the device"
        return error.strerror or str(error)
    return next(iter(str(error).splitlines()), type(error).__name__)
