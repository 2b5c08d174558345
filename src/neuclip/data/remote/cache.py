"""A folder of downloaded shards, bounded in size and shared by all processes that read them.

A process that reads a shard holds a shared lock on its file. Only unlocked files are removed, the
least recently used first. A process that downloads a shard holds a lock for that shard, so it is
downloaded once. The kernel releases the locks of a process when it ends, however it ends.

    <folder>/<hash>-<name>          a shard; its access time is the time it was last opened
    <folder>/<hash>-<name>.partial  a download in progress (`.tag`: see `remote.fetch`; `.size`: its
                                    final size in bytes, which is reserved)
    <folder>/<hash>-<name>.failed   why the download failed, so that not every sample tries again
    <folder>/.locks/                locks of downloads
    <folder>/.neuclip/              indexes of the shards (see `sources.tar_index`)
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from neuclip.data.remote.fetch import Expected, RetryPolicy, fetch
from neuclip.data.remote.transport import PIPE, FetchError
from neuclip.errors import UserError
from neuclip.files import no_link

GIB = 2**30

_FORGET_FAILURE = 300.0  # seconds until an unreachable shard is tried again
_log = logging.getLogger(__name__)


class NoRoomError(Exception):
    """The cache is full of shards that are in use or will be used."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard and what is known about it.

    Attributes:
        url: address, or `pipe:` and a command.
        expected: size and checksum, if known.
        samples: number of samples, if known.
    """

    url: str
    expected: Expected = field(default_factory=Expected)
    samples: int | None = None

    @property
    def name(self) -> str:
        """File name, as in a manifest."""
        if self.url.startswith(PIPE):
            # The command's last word that looks like a file: it only makes the cache readable.
            words = [word for word in self.url.split() if ".tar" in word] or ["pipe"]
            return os.path.basename(words[-1])  # noqa: PTH119  an address, not a path
        return self.url.partition("?")[0].rstrip("/").rpartition("/")[2]


class Lease:
    """A downloaded shard that stays in the cache until `release`."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle

    def release(self) -> None:
        """Allows the cache to remove the shard."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.release()


@dataclass(frozen=True)
class ShardCache:
    """The cache folder.

    Attributes:
        folder: created on first use.
        limit: maximum size in bytes.
        retry: retries and timeouts of downloads.
    """

    folder: Path
    limit: int
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def path(self, shard: RemoteShard) -> Path:
        """The path of a shard once it is downloaded."""
        digest = hashlib.sha256(shard.url.encode()).hexdigest()[:16]
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in shard.name)[-80:]
        return self.folder / f"{digest}-{name}"

    def lease(self, shard: RemoteShard) -> Lease:
        """Locks a shard for reading, and downloads it first if it is missing.

        Raises:
            FetchError: the download failed.
            UserError: the disk is full, or the folder is not writable.
        """
        path = self.path(shard)
        with _writing_to(self.folder):
            while (lease := _lock_to_read(path)) is None:
                self.fetch(shard)
        return lease

    def fetch(self, shard: RemoteShard, ahead_of: Collection[Path] | None = None) -> bool:
        """Downloads a shard that is missing.

        Args:
            shard: the shard.
            ahead_of: for a prefetch: files that must not be removed to make room.

        Returns:
            False if this is a prefetch and another process is downloading the shard already.

        Raises:
            FetchError: the download failed.
            NoRoomError: a prefetch finds no room.
            UserError: the disk is full, or the folder is not writable.
        """
        path = self.path(shard)
        with _writing_to(self.folder), self._lock(path.name, wait=ahead_of is None) as mine:
            if not mine:
                return False
            if not path.exists():
                self._fetch(shard, path, ahead_of)
        return True

    def forget_failures(self, older_than: float) -> None:
        """Allows new attempts at downloads that failed more than `older_than` seconds ago."""
        for failed in self.folder.glob("*.failed"):
            with contextlib.suppress(OSError):
                if _age(failed) > older_than:
                    failed.unlink()

    def _fetch(self, shard: RemoteShard, path: Path, ahead_of: Collection[Path] | None) -> None:
        failed = path.with_name(path.name + ".failed")
        with contextlib.suppress(OSError):
            if _age(failed) < _FORGET_FAILURE:
                raise FetchError(failed.read_text(encoding="utf-8"))
        partial = path.with_name(path.name + ".partial")
        if shard.expected.size is not None:
            self._make_room(shard.expected.size, partial, ahead_of)
        try:
            sha256 = fetch(
                shard.url,
                partial,
                shard.expected,
                self.retry,
                lambda size: self._make_room(size, partial, ahead_of),
                self.limit,
            )
        except FetchError as error:
            _note(failed, str(error))
            raise
        failed.unlink(missing_ok=True)
        # An index is stamped with size and time of its shard. The time is derived from the content,
        # so the index is valid again if the same shard is downloaded again, and only then.
        os.utime(partial, ns=(time.time_ns(), 10**18 + int(sha256[:10], 16)))
        partial.replace(path)
        _size_note(partial).unlink(missing_ok=True)
        if shard.expected.size is None:  # a command's output has no known size
            with contextlib.suppress(NoRoomError):
                self._make_room(0, path, (path, *(ahead_of or ())))

    def _make_room(self, size: int, own: Path, ahead_of: Collection[Path] | None) -> None:
        """Removes the least recently used files until `own` fits with `size` bytes."""
        with self._lock(".room"):
            kept = {own, *(ahead_of or ())}
            files = [file for file in self._files() if file[2] != own]
            over = sum(taken for _, taken, _ in files) + size - self.limit
            for _, freed, path in sorted(files):
                if over > 0 and path not in kept and self._remove(path):
                    over -= freed
            if own.suffix == ".partial" and (over <= 0 or ahead_of is None):
                _note(_size_note(own), str(size))
        if over > 0 and ahead_of is not None:
            raise NoRoomError
        if over > 0:
            _log.debug("%s: %d bytes above the limit, all in use", self.folder, over)

    def _files(self) -> Generator[tuple[int, int, Path]]:
        """Last use, size (reserved bytes included) and path of every shard or download."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file() and not entry.name.endswith((".failed", ".tag", ".size")):
                        path, status = Path(entry.path), entry.stat()
                        size = max(status.st_size, _reserved(path))
                        yield status.st_atime_ns, size, path

    def _remove(self, path: Path) -> bool:
        """Removes a shard or a partial download unless it is locked; returns whether it did."""
        if path.suffix == ".partial":
            with self._lock(path.stem, wait=False) as mine:
                if mine:
                    path.unlink(missing_ok=True)
                    path.with_name(path.name + ".tag").unlink(missing_ok=True)
                    _size_note(path).unlink(missing_ok=True)
                return mine
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Generator[bool]:
        """A lock between processes; yields whether it was acquired."""
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = no_link(str(folder / name), os.O_RDWR | os.O_CREAT)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)


def _lock_to_read(path: Path) -> Lease | None:
    """A lease on a file, or None if the file is missing."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    lease = Lease(path, handle)
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink == 0:  # removed between the two calls
        lease.release()
        return None
    with contextlib.suppress(PermissionError):  # another user's file counts as used long ago
        os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
    return lease


def _age(path: Path) -> float:
    """Seconds since a file was written, or until then: a clock that was ahead leaves such files."""
    return abs(time.time() - path.stat().st_mtime)


def _note(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", opener=no_link) as file:
        file.write(text)


def _size_note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".size")


def _reserved(path: Path) -> int:
    """The final size of a download in progress; 0 if unknown."""
    if path.suffix != ".partial":
        return 0
    with contextlib.suppress(OSError, ValueError):
        return int(_size_note(path).read_text(encoding="utf-8"))
    return 0


@contextmanager
def _writing_to(folder: Path) -> Generator[None]:
    """Turns errors that only the user can fix into `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of --cache-dir {folder} is full: lower --cache-size-gb or choose "
                "another folder"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"--cache-dir {folder} is not writable ({error.strerror}): choose another folder"
            ) from error
        raise
