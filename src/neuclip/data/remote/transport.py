"""Opens an address for reading from a given byte on: http by urllib, the rest by fsspec."""

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

from neuclip.errors import UserError, printable
from neuclip.masking import mask
from neuclip.untrusted import whole_number

PIPE = "pipe:"
SCHEMES = (
    "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "hdfs",
    "webhdfs", "oss", "oci", "sftp", "ssh", "file", "memory",
)  # fmt: skip
"""Schemes of addresses. Others of fsspec open archives, chains or programs."""
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


def check_addresses(urls: Iterable[str], *, allow_pipe: bool) -> None:
    """Refuses commands that were not allowed, and addresses that no installed package can open.

    Args:
        urls: addresses with all patterns expanded: an expansion may make a command.
        allow_pipe: whether the user allows `pipe:` commands.

    Raises:
        UserError: names the flag, the scheme, or the package to install.
    """
    tried: set[str] = set()
    for url in urls:
        scheme = PIPE if url.lstrip().startswith(PIPE) else url.partition("://")[0]
        if scheme in tried:
            continue
        tried.add(scheme)
        if scheme == PIPE:
            if not allow_pipe:
                raise UserError(f"{mask(url)!r} runs a shell command: allow it with --allow-pipe")
        elif scheme.lower() not in SCHEMES:
            raise UserError(
                f"{printable(mask(url))} has an unknown scheme; known: {', '.join(SCHEMES)}"
            )
        elif scheme not in ("http", "https"):
            _check_installed(url)


def _check_installed(url: str) -> None:
    try:
        _filesystem(url)
    except ImportError as error:
        raise UserError(f"{mask(url)} cannot be opened: {error}") from None
    except Exception as error:  # every file system defines its own errors
        raise UserError(f"{mask(url)}: {printable(str(error)) or type(error).__name__}") from None


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
        answer = _opener().open(urllib.request.Request(url, headers=headers), None, timeout)
    except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code} {printable(str(error.reason))}"
        error.close()
        if error.code == 416 and start:  # the file has become shorter than the part already here
            return _open_http(url, 0, None, timeout)
        if error.code >= 500 or error.code in _TEMPORARY:
            raise BrokenError(problem) from None
        raise FetchError(problem) from None
    except NETWORK as error:
        raise BrokenError(reason_of(error)) from error
    except ValueError as error:  # an address, or one that a server redirects to, is none
        raise FetchError(f"not an address: {printable(str(error))}") from None
    etag = answer.headers.get("ETag", "")
    new_tag = etag if etag.startswith('"') else answer.headers.get("Last-Modified")
    length = answer.headers.get("Content-Length", "")
    total = _integer(length)
    if answer.status == 206:
        first, _, whole = answer.headers.get("Content-Range", "").partition("/")
        size = _integer(whole)
        if first.removeprefix("bytes ").split("-")[0] == str(start) and size is not None:
            return Stream(_Answer(answer), start, size, new_tag)
        answer.close()
        sent = printable(f"{first}/{whole}")
        raise BrokenError(f"invalid answer to a range request: {sent}")
    return Stream(_Answer(answer), 0, total, new_tag)


def _integer(text: str) -> int | None:
    """A number of bytes that a server sent; none if it is not a plausible number."""
    return whole_number(text)


@cache
def _opener() -> urllib.request.OpenerDirector:
    """Opens http and https, also after redirects, and nothing else."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


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
