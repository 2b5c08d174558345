"""Files that are complete or absent, checksums, and the cache folder. Imports no torch."""

import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from neuclip.errors import UserError

_STALE_SECONDS = 600
"""A staging folder without a change for this long belongs to a process that was killed."""


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Generator[BinaryIO]:
    """Opens a file that takes the name `path` when the block ends, and disappears if it fails.

    Readers see the old file or the new one, never a part. A killed process leaves the part behind
    under `partial_name(path)`.

    Args:
        path: the file; its folder is made if missing.
        durable: flush the content to the disk before the file gets its name. Without it, a power
            failure can leave an empty file; enough for caches.
    """
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def partial_name(path: Path) -> Path:
    """The hidden name of a file while this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file (text as UTF-8) in one piece.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    try:
        with replacing(path) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    """The error for a file that could not be written."""
    return UserError(f"cannot write {path}: {describe(error)}")


def describe(error: Exception) -> str:
    """The cause of an error in one line, in the operating system's words where it has any."""
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return "no space left on the device"
        return error.strerror or str(error)
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def folder_when_complete(out: Path) -> Generator[Path]:
    """A folder to fill; it takes the name `out` when the block ends, and disappears if it fails.

    Leftovers of killed processes are removed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{out.name}.partial-*"):
        if time.time() - _last_change(old) > _STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "new").mkdir(parents=True)
    try:
        yield staging / "new"
        if out.exists():
            out.rename(staging / "old")
        (staging / "new").rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _last_change(folder: Path) -> float:
    """Time of the latest change in a folder, as another process may see it while it vanishes."""
    latest = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            latest = max(latest, path.stat().st_mtime)
    return latest


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synchronize(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_home() -> Path:
    """The folder for files that can be made again: `neuclip` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuclip"
