"""An address opened for reading from a byte on: by urllib for http, by fsspec for the rest."""

import http.client
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

from neuclip.errors import UserError

PIPE = "pipe:"
_TEMPORARY = {408, 425, 429}  # beside all from 500 on


class FetchError(Exception):
    """A file that could not be fetched; the text says why, without its address."""


class BrokenError(Exception):
    """An attempt that failed and may go better another time."""


# urllib's own errors are OSErrors too.
NETWORK = (OSError, http.client.HTTPException)


def reason_of(error: Exception) -> str:
    """What went wrong with the network, in a few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, urllib.error.URLError):
        inner = error.reason
        return reason_of(inner) if isinstance(inner, Exception) else str(inner)
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@runtime_checkable
class Readable(Protocol):
    """What is needed of an open file."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


@dataclass(frozen=True)
class Stream:
    """An answer: what follows byte `start` of a file.

    Attributes:
        file: to read from.
        start: the first byte that comes.
        total: size of the whole file, if it is known.
        tag: what changes when the file changes, if there is such a thing.
    """

    file: Readable
    start: int
    total: int | None
    tag: str | None

    def opened(self) -> AbstractContextManager[Readable]:
        """The file, closed at the end of a `with` block."""
        return closing(self.file)


def check_scheme(url: str) -> None:
    """Refuses an address that nothing installed can open.

    Raises:
        UserError: says what to install.
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
        url: no `pipe:`.
        start: the first byte wanted; less is given where the file is another one than `tag` says.
        tag: of the file that was read before.
        timeout: seconds without a byte that an HTTP server is granted.

    Raises:
        FetchError: there is no such file.
        BrokenError: it did not work this time.
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
        # The schemes are checked before: no file: or other surprise.
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), None, timeout)
    except urllib.error.HTTPError as error:
        problem = f"HTTP {error.code} {error.reason}"
        error.close()
        if error.code == 416:  # it has become shorter than what is there
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
        raise BrokenError(f"the answer to a range request makes no sense: {first}/{whole}")
    return Stream(_Answer(answer), 0, total, new_tag)


class _Answer:
    """An HTTP answer, read as it comes: of a read that waits for more, a stall loses what came."""

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
    except Exception as error:  # every file system has errors of its own
        raise BrokenError(f"{type(error).__name__}: {error}") from error
    size = info.get("size")
    return Stream(_FsspecFile(file), start, int(size) if size is not None else None, new_tag)


class _FsspecFile:
    """A file of fsspec whose errors, of whatever kind, are those of a network."""

    def __init__(self, file: Any) -> None:  # noqa: ANN401
        self._file = file

    def read(self, size: int, /) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._file.close()
