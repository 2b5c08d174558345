"""Downloads one remote file, with retries that resume where the last attempt broke off.

`http://` and `https://` need only the standard library, `pipe:` runs a shell command, and
everything else is opened by fsspec (`s3://`, `gs://`, `hf://`).
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
from neuclip.files import no_link

_CHUNK = 2**20
_LARGEST_TEXT = 2**26
_chance = random.Random()  # separate: pauses must not draw from the training's generator


@dataclass(frozen=True)
class RetryPolicy:
    """Retries and timeouts of downloads.

    Attributes:
        attempts: consecutive failures, without a byte between them, before giving up.
        timeout: seconds without a byte after which an attempt fails.
        slowest: mean bytes per second, retries and pauses included, below which a download ends.
        patience: seconds before the mean counts.
        pause: seconds before the second attempt; doubled before each further one.
        longest_pause: upper bound of the pauses, in seconds.
    """

    attempts: int = 6
    timeout: float = 30.0
    slowest: float = 1000.0
    patience: float = 120.0
    pause: float = 0.5
    longest_pause: float = 30.0

    def pause_after(self, failures: int) -> float:
        """Seconds to wait, randomly shortened by up to a half to spread the requests."""
        longest = min(self.pause * 2 ** (failures - 1), self.longest_pause)
        return longest * (1 - 0.5 * _chance.random())


@dataclass(frozen=True)
class Expected:
    """The size and checksum that a download must have, if they are known.

    Attributes:
        size: size in bytes.
        sha256: checksum in hexadecimal.
    """

    size: int | None = None
    sha256: str | None = None


OnSize = Callable[[int], None]
"""Called with the size of a file before it is written, if the server reports it."""


def fetch(
    url: str,
    partial: Path,
    expected: Expected,
    retry: RetryPolicy,
    on_size: OnSize = lambda size: None,
    most: int | None = None,
) -> str:
    """Downloads a file into `partial`, continuing after the bytes that it already contains.

    Args:
        url: an address, or `pipe:` and a command.
        partial: where to write; a file `.tag` beside it lets a later process resume.
        expected: size and checksum, if known.
        retry: retries and timeouts.
        on_size: called with the size first.
        most: largest size in bytes; none: any.

    Returns:
        The SHA-256 of the file.

    Raises:
        FetchError: the download failed.
    """
    failures, bounds = 0, _Bounds(retry, most, on_size)
    while True:
        before = _size(partial)
        try:
            if not before or before != expected.size:  # otherwise only the check is missing
                _attempt(url, partial, expected, bounds)
            return _checked(partial, expected)
        except BrokenError as error:
            failures = 1 if _size(partial) > before else failures + 1
            if failures >= retry.attempts:
                tried = f" ({failures} attempts)" if failures > 1 else ""
                raise FetchError(f"{error}{tried}") from error
            time.sleep(retry.pause_after(failures))


class _Bounds:
    """What a server may send: a number of bytes, at a mean speed."""

    def __init__(self, retry: RetryPolicy, most: int | None, on_size: OnSize) -> None:
        self.timeout, self._retry, self._most, self._on_size = retry.timeout, retry, most, on_size
        self._begun, self._got = time.monotonic(), 0

    def announce(self, size: int) -> None:
        """Checks a size that the server announces, and reserves it."""
        self.check(size)
        self._on_size(size)

    def check(self, size: int) -> None:
        """Checks the size of a file so far."""
        if self._most is not None and size > self._most:
            raise FetchError(
                f"the file has at least {size:,} bytes, more than --cache-size-gb ({self._most:,})"
            )

    def count(self, received: int) -> None:
        """Counts bytes, and ends a download that is too slow."""
        self._got += received
        seconds = time.monotonic() - self._begun
        if seconds > self._retry.patience and self._got < self._retry.slowest * seconds:
            raise FetchError(f"{self._got:,} bytes in {seconds:.0f} s are too slow")


def fetch_text(url: str, retry: RetryPolicy) -> bytes | None:
    """The content of a small file, or None if it does not exist or is larger than 64 MiB.

    Raises:
        FetchError: the server does not answer.
    """
    failures = 0
    while True:
        try:
            with open_url(url, 0, None, retry.timeout).opened() as file:
                return _read_all(file, _Bounds(retry, _LARGEST_TEXT, lambda size: None))
        except FetchError:
            return None
        except BrokenError as error:
            failures += 1
            if failures >= retry.attempts:
                raise FetchError(f"{error} ({failures} attempts)") from error
            time.sleep(retry.pause_after(failures))


def _read_all(file: Readable, bounds: _Bounds) -> bytes:
    content = bytearray()
    try:
        while part := file.read(_CHUNK):
            content += part
            bounds.check(len(content))
            bounds.count(len(part))
    except NETWORK as error:
        raise BrokenError(reason_of(error)) from error
    return bytes(content)


def _attempt(url: str, partial: Path, expected: Expected, bounds: _Bounds) -> None:
    """Appends the missing bytes; raises `BrokenError` or `FetchError`."""
    if url.startswith(PIPE):
        _run(url.removeprefix(PIPE), partial)
        return
    note = partial.with_name(partial.name + ".tag")
    tag = note.read_text(encoding="utf-8") if note.exists() else None
    start = _size(partial)
    if start and tag is None and expected.sha256 is None:
        start = 0  # the file may have changed since, and nothing would show it
    stream = open_url(url, start, tag, bounds.timeout)
    with stream.opened() as file:
        total = stream.total
        if total is not None:
            if expected.size is not None and total != expected.size:
                _forget(partial)
                raise BrokenError(f"the file has {total:,} bytes instead of {expected.size:,}")
            bounds.announce(total)
        if stream.tag:
            with open(note, "w", encoding="utf-8", opener=no_link) as tag_file:
                tag_file.write(stream.tag)
        else:
            note.unlink(missing_ok=True)
        _copy(file, partial, stream.start, bounds)
    got = _size(partial)
    if total is not None and got != total:
        raise BrokenError(f"the download ended after {got:,} of {total:,} bytes")


def _copy(file: Readable, partial: Path, start: int, bounds: _Bounds) -> None:
    with open(partial, "r+b" if start else "wb", opener=no_link) as out:
        out.seek(start)
        out.truncate()
        while True:
            try:
                data = file.read(_CHUNK)
            except NETWORK as error:
                raise BrokenError(reason_of(error)) from error
            if not data:
                return
            bounds.count(len(data))
            bounds.check(out.tell() + len(data))
            out.write(data)


def _checked(partial: Path, expected: Expected) -> str:
    """The checksum of a complete file; raises `BrokenError` if size or checksum is wrong."""
    size = _size(partial)
    if expected.size is not None and size != expected.size:
        _forget(partial)
        raise BrokenError(f"the file has {size:,} bytes instead of {expected.size:,}")
    with partial.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if expected.sha256 is not None and sha256 != expected.sha256:
        _forget(partial)
        raise BrokenError(f"the SHA-256 is {sha256[:16]}... instead of {expected.sha256[:16]}...")
    partial.with_name(partial.name + ".tag").unlink(missing_ok=True)
    return sha256


def _forget(partial: Path) -> None:
    """Removes a partial download of the wrong content."""
    partial.unlink(missing_ok=True)
    partial.with_name(partial.name + ".tag").unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _run(command: str, partial: Path) -> None:
    """Writes the output of a shell command."""
    with open(partial, "wb", opener=no_link) as out:
        done = subprocess.run(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE
        )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        partial.unlink(missing_ok=True)
        raise BrokenError(f"exit code {done.returncode}: {lines[-1] if lines else 'no message'}")
