"""Fetching one remote file whole, whatever happens on the way.

`http://` and `https://` need the standard library only, `pipe:` runs a command of the user's shell,
and everything else is opened by fsspec (`s3://`, `gs://`, `hf://`). What breaks off is tried again,
with growing pauses, from where it broke off.
"""

import hashlib
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neuclip.data.remote.transport import (
    NETWORK,
    PIPE,
    BrokenError,
    FetchError,
    Readable,
    open_url,
    reason_of,
)

_CHUNK = 2**20
_chance = random.Random()  # its own: pauses must not draw from the training's numbers


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        attempts: failures in a row, without a byte between them, before giving up.
        timeout: seconds without a byte before an attempt has failed.
        pause: seconds before the second attempt; each further pause is twice as long.
        longest_pause: seconds that no pause exceeds.
    """

    attempts: int = 6
    timeout: float = 30.0
    pause: float = 0.5
    longest_pause: float = 30.0

    def after(self, failures: int) -> float:
        """Seconds to wait; by chance up to a half less, so that not all come back at once."""
        longest = min(self.pause * 2 ** (failures - 1), self.longest_pause)
        return longest * (1 - 0.5 * _chance.random())


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it is fetched.

    Attributes:
        size: in bytes.
        sha256: of its bytes, in hexadecimal.
    """

    size: int | None = None
    sha256: str | None = None


OnSize = Callable[[int], None]
"""Told the size of a file before it is written, if the other side knows it."""


def fetch(
    url: str,
    partial: Path,
    expected: Expected,
    patience: Patience,
    on_size: OnSize = lambda size: None,
) -> str:
    """Fetches a file into `partial`, going on with what is there already.

    Args:
        url: an address, or `pipe:` and a command.
        partial: where to write; a file beside it, `.tag`, keeps what a later process needs to go
            on.
        expected: what is known of the file.
        patience: how long to try.
        on_size: told the size first.

    Returns:
        The SHA-256 of the file.

    Raises:
        FetchError: it cannot be had.
    """
    failures = 0
    while True:
        before = _size(partial)
        try:
            if not before or before != expected.size:  # else only the check is missing
                _attempt(url, partial, expected, patience.timeout, on_size)
            return _checked(partial, expected)
        except BrokenError as error:
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= patience.attempts:
                tried = f" ({failures} attempts)" if failures > 1 else ""
                raise FetchError(f"{error}{tried}") from error
            time.sleep(patience.after(failures))


def fetch_text(url: str, patience: Patience) -> bytes | None:
    """A small file, or nothing where there is none.

    Raises:
        FetchError: there is no answer.
    """
    failures = 0
    while True:
        try:
            with open_url(url, 0, None, patience.timeout).opened() as file:
                return _read_all(file)
        except FetchError:
            return None
        except BrokenError as error:
            failures += 1
            if failures >= patience.attempts:
                raise FetchError(f"{error} ({failures} attempts)") from error
            time.sleep(patience.after(failures))


def _read_all(file: Readable) -> bytes:
    parts: list[bytes] = []
    try:
        while part := file.read(_CHUNK):
            parts.append(part)
    except NETWORK as error:
        raise BrokenError(reason_of(error)) from error
    return b"".join(parts)


def _attempt(url: str, partial: Path, expected: Expected, timeout: float, on_size: OnSize) -> None:
    """Appends what is missing; raises `BrokenError` or `FetchError`."""
    if url.startswith(PIPE):
        _run(url.removeprefix(PIPE), partial)
        return
    note = partial.with_name(partial.name + ".tag")
    tag = note.read_text(encoding="utf-8") if note.exists() else None
    had = _size(partial)
    if had and tag is None and expected.sha256 is None:
        had = 0  # it may have become another file: what is there could not be told from it
    with_stream = open_url(url, had, tag, timeout)
    with with_stream.opened() as file:
        total = with_stream.total
        if total is not None:
            if expected.size is not None and total != expected.size:
                _forget(partial)
                raise BrokenError(f"it has {total:,} bytes instead of {expected.size:,}")
            on_size(total)
        if with_stream.tag:
            note.write_text(with_stream.tag, encoding="utf-8")
        else:
            note.unlink(missing_ok=True)
        _copy(file, partial, with_stream.start)
    got = _size(partial)
    if total is not None and got != total:
        raise BrokenError(f"it ended after {got:,} of {total:,} bytes")


def _copy(file: Readable, partial: Path, start: int) -> None:
    with partial.open("r+b" if start else "wb") as out:
        out.seek(start)
        out.truncate()
        while True:
            try:
                data = file.read(_CHUNK)
            except NETWORK as error:
                raise BrokenError(reason_of(error)) from error
            if not data:
                return
            out.write(data)


def _checked(partial: Path, expected: Expected) -> str:
    """The checksum of a complete file; raises `BrokenError` if it is not what was expected."""
    size = _size(partial)
    if expected.size is not None and size != expected.size:
        _forget(partial)
        raise BrokenError(f"it has {size:,} bytes instead of {expected.size:,}")
    with partial.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if expected.sha256 is not None and sha256 != expected.sha256:
        _forget(partial)
        raise BrokenError(f"its SHA-256 is {sha256[:16]}... instead of {expected.sha256[:16]}...")
    partial.with_name(partial.name + ".tag").unlink(missing_ok=True)
    return sha256


def _forget(partial: Path) -> None:
    """Begin again: what was fetched is not the file that was asked for."""
    partial.unlink(missing_ok=True)
    partial.with_name(partial.name + ".tag").unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _run(command: str, partial: Path) -> None:
    """Writes what a command of the shell prints."""
    with partial.open("wb") as out:
        done = subprocess.run(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE
        )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        partial.unlink(missing_ok=True)
        raise BrokenError(f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}")
