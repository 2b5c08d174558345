"""The lock of a folder: one process at a time fills it.

A file in the folder names the process that holds it: host, process id, and a count that grows with
time, its heartbeat. On one machine the operating system's record lock decides, which ends with its
process. Between machines the heartbeat decides: a lock whose count stands still is taken over. No
clock is read, since those of two machines differ. Imports no torch.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip.errors import UserError
from neuclip.files import describe
from neuclip.parallel.launch import hostname
from neuclip.untrusted import parse_json

log = logging.getLogger("neuclip")

BEAT = 10.0
"""Seconds between two heartbeats."""
SILENCE = 60.0
"""Seconds without a heartbeat after which a process on another machine counts as dead."""
_LENGTH = 400
"""Bytes of the file."""
GRACE = 10.0
"""Seconds to wait for a process on this machine that is about to end."""


@dataclass(frozen=True)
class LockedKind:
    """A kind of folder that is locked.

    Attributes:
        name: what messages call the folder.
        file: name of the lock file in it.
        place: flag that names where the folder is.
        other: flag that names another folder.
    """

    name: str
    file: str
    place: str
    other: str


RUN = LockedKind("run folder", "run.lock", "--logs", "--name")


class FolderLock:
    """The lock of a folder, held from `acquire` to the end of a `with` block.

    Args:
        kind: of the folder.
    """

    def __init__(self, kind: LockedKind = RUN) -> None:
        self._kind = kind
        self._handle: int | None = None
        self._path = Path()
        self._token = secrets.token_hex(8)
        self._beats = 0
        self._leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self, folder: Path) -> None:
        """Takes the lock of an existing folder; waits for a process that is ending or has died.

        Raises:
            UserError: another process uses the folder, or it cannot be written to.
        """
        self._path = folder / self._kind.file
        handle = self._opened()
        try:
            self._handle = handle
            holder = self._read()
            if holder and holder.get("machine") != _machine():
                self._await_silence(holder)
            os.ftruncate(handle, _LENGTH)
            self._beat()
        except OSError as error:
            self._close()
            raise self._cannot_write(error) from None
        except UserError:
            self._close()
            raise
        self._thread = threading.Thread(target=self._keep, name="neuclip-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Checks that the lock is still this process's, before it writes.

        Raises:
            UserError: another machine took it over while this process was paused.
        """
        holder = self._read()
        if self._handle is not None and holder and holder.get("token") != self._token:
            raise UserError(
                f"{_who(holder)} has taken over the {self._kind.name} {self._path.parent}, because "
                f"this process gave no sign of life for {SILENCE:g} s; this process stops"
            )

    def release(self) -> None:
        """Gives the lock back."""
        if self._handle is None:
            return
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError, UserError):
            self.check()
            self._path.unlink()
        self._close()

    def _opened(self) -> int:
        """An open lock file on which no other process of this machine has a record lock."""
        end = time.monotonic() + GRACE
        while True:
            try:
                handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                raise self._cannot_write(error) from None
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                os.close(handle)
                raise UserError(f"{self._path} is not a regular file: remove it")
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _parse(os.pread(handle, 4096, 0))
                os.close(handle)
                if error.errno not in {errno.EACCES, errno.EAGAIN}:
                    raise UserError(
                        f"cannot lock {self._path}: {describe(error)}; choose a {self._kind.place} "
                        "folder on a file system with locks"
                    ) from None
                if time.monotonic() > end:
                    raise self._in_use(holder) from None
                time.sleep(0.2)
                continue
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == os.fstat(handle).st_ino:
                    return handle
            os.close(handle)  # its holder has removed it meanwhile

    def _await_silence(self, holder: dict[str, Any]) -> None:
        """Waits until a holder on another machine counts as dead.

        Raises:
            UserError: it is alive.
        """
        log.info(
            "%s held the %s %s: waiting up to %g s for a sign of life",
            _who(holder), self._kind.name, self._path.parent, SILENCE,
        )  # fmt: skip
        end = time.monotonic() + SILENCE
        while time.monotonic() < end:
            time.sleep(min(1.0, SILENCE / 10))
            now = self._read()
            if not now:
                return
            if now != holder:
                raise self._in_use(now)
        log.info("taking over the %s from %s", self._kind.name, _who(holder))

    def _in_use(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"{_who(holder)} is using the {self._kind.name} {self._path.parent}. If it hangs, end "
            f"it (kill {holder.get('pid', 'PID')}) and start again; or choose another "
            f"{self._kind.other}"
        )

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write the {self._kind.name} {self._path.parent}: {describe(error)}; choose "
            f"another {self._kind.place}"
        )

    def _keep(self) -> None:
        while not self._leaving.wait(BEAT):
            with contextlib.suppress(OSError, UserError):
                self.check()
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        content = {
            "host": hostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "token": self._token,
            "beat": self._beats,
        }
        assert self._handle is not None
        # One write of a constant length: readers never see a part of a longer one.
        os.pwrite(self._handle, json.dumps(content).ljust(_LENGTH).encode(), 0)

    def _read(self) -> dict[str, Any]:
        return {} if self._handle is None else _parse(os.pread(self._handle, 4096, 0))

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)  # the record lock goes with it
            self._handle = None


def holder_of(folder: Path) -> str | None:
    """The process that holds the lock of a run folder, in words; None if no process does.

    Whether a process of another machine lives is not known: its lock file counts.
    """
    try:
        handle = os.open(folder / RUN.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    holder: dict[str, Any] = {}
    try:
        holder = _parse(os.pread(handle, 4096, 0))
        if holder.get("machine") != _machine():
            return f"{_who(holder)}, or it was" if holder else None
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # refused while it is held
    except OSError as error:
        return _who(holder) if error.errno in {errno.EACCES, errno.EAGAIN} else None
    finally:
        os.close(handle)
    return None


def _parse(content: bytes) -> dict[str, Any]:
    """The content of a lock file; nothing if it is empty or damaged."""
    try:
        holder = parse_json(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    pid, host = holder.get("pid"), holder.get("host")
    if isinstance(pid, int) and isinstance(host, str):
        return f"process {pid} on {host[:100]!r}"
    return "another process"


def _machine() -> str:
    """What tells this machine from others, even of the same name: the id of its last start."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return hostname()
