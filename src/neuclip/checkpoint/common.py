"""Errors, names and lists that both forms of a checkpoint share: a file and a sharded folder."""

import difflib
import re
import shutil
from pathlib import Path

from neuclip.errors import UserError
from neuclip.files import describe
from neuclip.untrusted import read_file

SUMS = "SHA256SUMS"
VALUES = "values.pt"
"""In a sharded checkpoint, everything but the sharded tensors."""
_SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_SHOWN = 6
_LARGEST_SUMS = 2**22  # bytes; about 50,000 lines


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read, or used by this run."""


def not_written(path: Path, error: Exception) -> CheckpointError:
    """The error for a checkpoint that could not be written."""
    return CheckpointError(
        f"cannot write checkpoint {path}: {describe(error)}; free some space or choose another "
        "--logs folder; the checkpoints written before are complete"
    )


def not_plain(path: Path, why: str) -> CheckpointError:
    """The error for a checkpoint that holds more than tensors and plain values."""
    return CheckpointError(
        f"checkpoint {path} is not a file of plain tensors and values, and is not loaded (it could "
        f"run code): {why}"
    )


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file that is cut, changed, or of no known format."""
    size = f"{path.stat().st_size:,} bytes"
    return CheckpointError(
        f"checkpoint {path} is damaged or incomplete ({size}): {why}{neighbours(path)}"
    )


def read_sums(folder: Path) -> list[tuple[str, str]] | None:
    """Digests and names in `SHA256SUMS`; none if there is no such file, or it cannot be read.

    Other lines are left out, such as half of one that a killed process wrote.
    """
    try:
        content = read_file(folder / SUMS, _LARGEST_SUMS).decode("utf-8", "replace")
    except OSError:
        return None
    matches = map(_SUM_LINE.fullmatch, content.splitlines())
    return [(match[1], match[2]) for match in matches if match]


def is_sharded(path: Path) -> bool:
    """Whether a path is a complete sharded checkpoint.

    A folder of checkpoints has `SHA256SUMS`, too, but also other files or folders of checkpoints.
    """
    return (path / SUMS).is_file() and all(found.name == VALUES for found in checkpoints_in(path))


def neighbours(path: Path) -> str:
    """The checkpoints beside a path, those with the nearest names, as the end of a sentence."""
    found = sorted(other.name for other in checkpoints_in(path.parent) if other != path)
    if len(found) > _SHOWN:
        found = difflib.get_close_matches(path.name, found, n=_SHOWN, cutoff=0)
        found.append("...")
    return f"; there are: {', '.join(found)}" if found else ""


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder: files, and complete sharded folders."""
    files = (path for path in folder.glob("*.pt") if path.is_file())
    folders = (path.parent for path in folder.glob(f"[!.]*/{SUMS}"))
    return [*files, *(path for path in folders if not path.is_symlink() and is_sharded(path))]


def remove(path: Path) -> None:
    """Deletes a checkpoint if it exists. A folder is renamed first, so that no reader opens it."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(f".{path.name}.old.partial")
        shutil.rmtree(old, ignore_errors=True)
        path.replace(old)
        shutil.rmtree(old)
    else:
        path.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Deletes what killed processes left half written or half deleted in a folder."""
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
