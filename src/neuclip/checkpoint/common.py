"""What checkpoints of both forms, a file and a sharded folder, have in common."""

import shutil
from pathlib import Path

from neuclip.errors import UserError
from neuclip.files import describe

SUMS = "SHA256SUMS"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or used here."""


def not_written(path: Path, error: Exception) -> CheckpointError:
    """What to say of a checkpoint that could not be written."""
    return CheckpointError(
        f"cannot write checkpoint {path}: {describe(error)}; free some space or choose another "
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


def remove(path: Path) -> None:
    """Deletes a checkpoint, if it is there; a folder loses its name first."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
        shutil.rmtree(old)
    else:
        path.unlink(missing_ok=True)
