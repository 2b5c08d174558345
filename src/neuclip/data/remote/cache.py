"""A bounded folder of fetched shards, shared by all processes that read them.

Who reads a shard holds a shared lock on its file, and only files that nobody locks are removed, the
longest unused first. Who fetches a shard holds a lock of the shard's own, so that it is fetched
once. The locks are the kernel's: they go with the process that held them, however it ends.

    <folder>/<hash>-<name>          the shard; its access time tells when it was last opened
    <folder>/<hash>-<name>.partial  on its way (`.tag`: see `neuclip.data.remote.fetch`; `.size`: in
                                    bytes once it is whole, for which room was made)
    <folder>/<hash>-<name>.failed   why it could not be had, so that not every sample tries again
    <folder>/.locks/                who fetches
    <folder>/.neuclip/              indexes, as beside any shard (see `sources.tar_index`)
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

from neuclip.data.remote.fetch import Expected, Patience, fetch
from neuclip.data.remote.transport import PIPE, FetchError
from neuclip.errors import UserError

GIB = 2**30

_FORGET_FAILURE = 300.0  # seconds until an unreachable shard is tried again
_log = logging.getLogger(__name__)


class NoRoomError(Exception):
    """The cache is full of shards that are in use or will be."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard and what is known of it.

    Attributes:
        url: its address, or `pipe:` and a command.
        expected: its size and checksum, if they are known.
        samples: how many samples it holds, if that is known.
    """

    url: str
    expected: Expected = field(default_factory=Expected)
    samples: int | None = None

    @property
    def name(self) -> str:
        """Name of its file, as in a manifest."""
        if self.url.startswith(PIPE):
            # The command's last word that looks like a file: only for people who look in the cache.
            words = [word for word in self.url.split() if ".tar" in word] or ["pipe"]
            return os.path.basename(words[-1])  # noqa: PTH119  of an address, not of a path
        return self.url.partition("?")[0].rstrip("/").rpartition("/")[2]


class Lease:
    """A fetched shard that stays where it is until `release`."""

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path
        self._handle = handle

    def release(self) -> None:
        """Let the cache remove the shard if it must."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.release()


@dataclass(frozen=True)
class ShardCache:
    """The folder.

    Attributes:
        folder: made when it is first needed.
        limit: bytes of shards to keep at most.
        patience: how long to try to fetch one.
    """

    folder: Path
    limit: int
    patience: Patience = field(default_factory=Patience)

    def path(self, shard: RemoteShard) -> Path:
        """Where a shard lies once it is fetched."""
        digest = hashlib.sha256(shard.url.encode()).hexdigest()[:16]
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in shard.name)[-80:]
        return self.folder / f"{digest}-{name}"

    def lease(self, shard: RemoteShard) -> Lease:
        """A shard to read from, fetched if it must be.

        Raises:
            FetchError: it cannot be had.
            UserError: the disk is full, or the folder cannot be written.
        """
        path = self.path(shard)
        with _writing_to(self.folder):
            while (lease := _lock_to_read(path)) is None:
                self.fetch(shard)
        return lease

    def fetch(self, shard: RemoteShard, ahead_of: Collection[Path] | None = None) -> bool:
        """Fetches a shard that is not there.

        Args:
            shard: which.
            ahead_of: given when it is not needed yet: files that must not make room for it.

        Returns:
            False if another process is fetching it and it is not needed yet.

        Raises:
            FetchError: it cannot be had.
            NoRoomError: it is not needed yet, and only files that must stay could make room.
            UserError: the disk is full, or the folder cannot be written.
        """
        path = self.path(shard)
        with _writing_to(self.folder), self._lock(path.name, wait=ahead_of is None) as mine:
            if not mine:
                return False
            if not path.exists():
                self._fetch(shard, path, ahead_of)
        return True

    def forget_failures(self, older_than: float) -> None:
        """Try again what could not be had so many seconds ago, or longer."""
        for failed in self.folder.glob("*.failed"):
            with contextlib.suppress(OSError):
                if time.time() - failed.stat().st_mtime > older_than:
                    failed.unlink()

    def _fetch(self, shard: RemoteShard, path: Path, ahead_of: Collection[Path] | None) -> None:
        failed = path.with_name(path.name + ".failed")
        with contextlib.suppress(OSError):
            if time.time() - failed.stat().st_mtime < _FORGET_FAILURE:
                raise FetchError(failed.read_text(encoding="utf-8"))
        partial = path.with_name(path.name + ".partial")
        if shard.expected.size is not None:
            self._make_room(shard.expected.size, partial, ahead_of)
        try:
            sha256 = fetch(
                shard.url,
                partial,
                shard.expected,
                self.patience,
                lambda size: self._make_room(size, partial, ahead_of),
            )
        except FetchError as error:
            failed.write_text(str(error), encoding="utf-8")
            raise
        failed.unlink(missing_ok=True)
        # An index is stamped with size and time of its shard. With a time that follows from the
        # content, it is good again when the same shard is fetched again, and only then.
        os.utime(partial, ns=(time.time_ns(), 10**18 + int(sha256[:10], 16)))
        partial.replace(path)
        _size_note(partial).unlink(missing_ok=True)
        if shard.expected.size is None:  # a command's output: its size was not known before
            with contextlib.suppress(NoRoomError):
                self._make_room(0, path, (path, *(ahead_of or ())))

    def _make_room(self, size: int, own: Path, ahead_of: Collection[Path] | None) -> None:
        """Removes what is longest unused until `size` bytes in `own` fit."""
        with self._lock(".room"):
            kept = {own, *(ahead_of or ())}
            files = [file for file in self._files() if file[2] != own]
            over = sum(taken for _, taken, _ in files) + size - self.limit
            for _, freed, path in sorted(files):
                if over > 0 and path not in kept and self._remove(path):
                    over -= freed
            if own.suffix == ".partial" and (over <= 0 or ahead_of is None):
                _size_note(own).write_text(str(size), encoding="utf-8")
        if over > 0 and ahead_of is not None:
            raise NoRoomError
        if over > 0:
            _log.debug("%s: %d bytes above its limit, all in use", self.folder, over)

    def _files(self) -> Generator[tuple[int, int, Path]]:
        """Last use, bytes (those to come included) and path of all that takes room."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.is_file() and not entry.name.endswith((".failed", ".tag", ".size")):
                        path, status = Path(entry.path), entry.stat()
                        size = max(status.st_size, _promised(path))
                        yield status.st_atime_ns, size, path

    def _remove(self, path: Path) -> bool:
        """Removes a shard that nobody reads, or a part of one that nobody fetches."""
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
        """A lock between processes; yields whether it was got."""
        folder = self.folder / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
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
    """A lease on a file, unless it is not there."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    lease = Lease(path, handle)
    fcntl.flock(handle, fcntl.LOCK_SH)
    if os.fstat(handle).st_nlink == 0:  # removed between the two calls
        lease.release()
        return None
    with contextlib.suppress(PermissionError):  # of another user: it counts as used long ago
        os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
    return lease


def _size_note(partial: Path) -> Path:
    return partial.with_name(partial.name + ".size")


def _promised(path: Path) -> int:
    """The size that a file on its way will have; 0 where it is not known."""
    if path.suffix != ".partial":
        return 0
    with contextlib.suppress(OSError, ValueError):
        return int(_size_note(path).read_text(encoding="utf-8"))
    return 0


@contextmanager
def _writing_to(folder: Path) -> Generator[None]:
    """Puts what only the user can mend in words."""
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
                f"--cache-dir {folder} cannot be written ({error.strerror}): choose another folder"
            ) from error
        raise
