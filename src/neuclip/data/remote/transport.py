"""Opens an address for reading from a given byte on: http by urllib, the rest by fsspec."""

import http.client
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from neuclip.errors import UserError

PIPE = "pipe:"
_TEMPORARY = {408, 425, 429}  # HTTP codes worth a retry, besides all from 500 on


class FetchError(Exception):
    """A download that failed for good; the message gives the reason without the address."""


class BrokenError(Exception):
    """A failed attempt that is worth a retry."""


# urllib's own errors are OSErrors too.
NETWORK = (OSError, http.client.HTTPException)


def reason_of(error: Exception) -> str:
    """The cause of a network error in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, urllib.error.URLError):
        inner = error.reason
        return reason_of(inner) if isinstance(inner, Exception) else str(inner)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@runtime_checkable
class Readable(Protocol):
    """The part of an open file that downloads need."""

    def read(self, size: int, /) -> bytes:
        """Reads up to `size` bytes; empty at the end."""
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


@dataclass(frozen=True)
class Stream:
    """The content of a file from byte `start` on.

    Attributes:
        file: the open file.
        start: offset of its first byte.
        total: size of the full file in bytes, if known.
        tag: identifies the version of the file (an ETag or a time), if known.
    """

    file: Readable
    start: int
    total: int | None
    tag: str | None

    def opened(self) -> AbstractContextManager[Readable]:
        """A context manager that closes the file."""
        return closing(self.file)


def check_scheme(url: str) -> None:
    """Refuses an address that no installed package can open.

    Raises:
        UserError: names the package to install.
    """
    if url.startswith(("http://", "https://", PIPE)):
        return
    try:
        _filesystem(url)
    except ImportError as error:
        raise UserError(f"{url} cannot be opened: {error}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def open_url(url: str, start: int, tag: str | None, timeout: float) -> Stream:
    """Opens an address.

    Args:
        url: an address, not a `pipe:` command.
        start: offset of the first byte; the stream starts at 0 if the file's tag has changed.
        tag: tag of the file when the bytes before `start` were read.
        timeout: seconds to wait for an HTTP server's next byte.

    Raises:
        FetchError: the file does not exist.
        BrokenError: a temporary failure.
    """
    if url.startswith(("http://", "https://")):
        return _open_http(url, start, tag, timeout)
    return _open_fsspec(url, start, tag)


def _open_http(url: str, start: int, tag: str | None, timeout: float) -> Stream:
    headers = {"User-Agent": "neuclip", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if tag is not None:
            headers["If-Range"] = tag
    try:
        # The caller has checked the scheme: this never opens file: or the like.
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), None, timeout)
    except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code} {error.reason}"
        error.close()
        if error.code == 416:  # the file has become shorter than the part already here
            return _open_http(url, 0, None, timeout)
        if error.code >= 500 or error.code in _TEMPORARY:
            raise BrokenError(problem) from None
        raise FetchError(problem) from None
    except NETWORK as error:
        raise BrokenError(reason_of(error)) from error
    etag = answer.headers.get("ETag", "")
    new_tag = etag if etag.startswith('"') else answer.headers.get("Last-Modified")
    length = answer.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    if answer.status == 206:
        first, _, whole = answer.headers.get("Content-Range", "").partition("/")
        if first.removeprefix("bytes ").split("-")[0] == str(start) and whole.isdigit():
            return Stream(_Answer(answer), start, int(whole), new_tag)
        answer.close()
        raise BrokenError(f"invalid answer to a range request: {first}/{whole}")
    return Stream(_Answer(answer), 0, total, new_tag)


class _Answer:
    """An HTTP answer that returns bytes as they arrive, so that a stall loses none of them."""

    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer

    def read(self, size: int, /) -> bytes:
        return self._answer.read1(size)

    def close(self) -> None:
        self._answer.close()


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec.core

    return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))


def _open_fsspec(url: str, start: int, tag: str | None) -> Stream:
    try:
        system, path = _filesystem(url)
        info = system.info(path)
        new_tag = str(info.get("ETag") or info.get("etag") or info.get("mtime") or "") or None
        if tag != new_tag:
            start = 0
        file = system.open(path, "rb")
        file.seek(start)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise FetchError(str(error) or type(error).__name__) from error
    except Exception as error:  # every file system defines its own errors
        raise BrokenError(f"{type(error).__name__}: {error}") from error
    size = info.get("size")
    return Stream(_FsspecFile(file), start, int(size) if size is not None else None, new_tag)


class _FsspecFile:
    """A file of fsspec that raises all errors as `OSError`, like the network's."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401
        self._file = file

    def read(self, size: int, /) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._file.close()
