"""Files that are complete or absent, checksums, and the cache folder. Imports no torch."""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from neuclip.errors import UserError
from neuclip.untrusted import open_regular

_RUST_ERROR = re.compile(r"\(os error (\d{1,4})\)")
"""How libraries in Rust, such as safetensors, write the number of an error."""
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
_STALE_SECONDS = 600
"""A staging folder without a change for this long belongs to a process that was killed."""


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Generator[BinaryIO]:
    """Opens a file that takes the name `path` when the block ends, and disappears if it fails.

    Readers see the old file or the new one, never a part. A killed process leaves the part behind
    under a hidden name that ends in `.partial`. No link is followed: one at `path` is replaced.

    Args:
        path: the file; its folder is made if missing.
        durable: flush the content to the disk before the file gets its name. Without it, a power
            failure can leave an empty file; enough for caches.
    """
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:  # x: fails at a name that exists, links included
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
    """A hidden name for a file that is being written, unique over processes and machines."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.partial")


def no_link(path: str, flags: int) -> int:
    """An opener for `open` that follows no link: one may have been planted in a shared folder.

    Raises:
        OSError: the path cannot be opened, or is a link.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def open_to_append(path: Path) -> TextIO:
    """Opens a text file to append to; a link is not followed.

    Raises:
        OSError: it cannot be opened, or is a link or not a regular file.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    handle = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "a", encoding="utf-8", errors="backslashreplace")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replaces a file (text as UTF-8) in one piece.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")  # file names may be of any bytes
    with writing(path), replacing(path) as file:
        file.write(content)


def check_writable(path: Path, flag: str) -> None:
    """Checks that a file can be written, before the work for it; makes its folder.

    Args:
        path: the file.
        flag: that names it, for the message.

    Raises:
        UserError: it is a folder, or its folder cannot be written to.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder: name a file in it")
    partial = partial_name(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()


@contextmanager
def writing(path: Path) -> Generator[None]:
    """Reports a failed write in a `with` block in one line.

    Args:
        path: the file or folder that the block writes.

    Raises:
        UserError: the operating system refused a write, whatever error a library made of it.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or system_error(error) is None:
            raise
        raise cannot_write(path, error) from None


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Holds the lock of a file for a `with` block, so that processes change it one after another.

    The lock is on a hidden file beside it, since the file itself may be replaced. Where the file
    system has no locks, nothing is held.

    Args:
        path: the file; its folder is made if missing.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW
        lock = os.open(path.with_name(f".{path.name}.lock"), flags, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from None
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error for a file that could not be written."""
    return UserError(f"cannot write {path}: {describe(error)}")


def system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system behind an error; none if there is none."""
    while error is not None and not isinstance(error, OSError):
        if number := _RUST_ERROR.search(str(error)):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        error = error.__cause__ or error.__context__
    return error


def disk_error(error: BaseException) -> OSError | None:
    """The error of the operating system behind an error, if the disk is full, read-only or broken.

    Such an error may come up at any write.
    """
    cause = system_error(error)
    return cause if cause is not None and cause.errno in _DISK else None


def describe(error: Exception) -> str:
    """The cause of an error in one line, in the operating system's words where it has any."""
    cause = system_error(error)
    if cause is not None:
        if cause.errno == errno.ENOSPC:
            return "no space left on the device"
        return cause.strerror or str(cause)
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextmanager
def folder_when_complete(out: Path) -> Generator[Path]:
    """A folder to fill; it takes the name `out` when the block ends, and disappears if it fails.

    An older folder stays if the new one cannot take its name. Leftovers of killed processes are
    removed; a folder that one had just moved aside is moved back.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.partial-*"):
        if time.time() - _last_change(left) > _STALE_SECONDS:
            _remove_staging(left, out)
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    _remove_staging(staging, out)
    (staging / "new").mkdir(parents=True)
    try:
        yield staging / "new"
        if out.exists():
            out.rename(staging / "old")
        (staging / "new").rename(out)
    finally:
        _remove_staging(staging, out)


def _remove_staging(staging: Path, out: Path) -> None:
    """Removes a staging folder, but never the only copy of the folder that it was to replace."""
    if not out.exists() and (staging / "old").exists():
        try:
            (staging / "old").rename(out)
        except OSError:
            return
    shutil.rmtree(staging, ignore_errors=True)


def _last_change(folder: Path) -> float:
    """Time of the latest change in a folder, as another process may see it while it vanishes."""
    latest = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            latest = max(latest, path.stat().st_mtime)
    return latest


def sha256(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal."""
    with open_regular(path) as file:
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
