"""Bounds for what files and servers of others contain: numbers, JSON, and the files themselves.

Whatever is wrong is a `ValueError` or an `OSError`, never an endless read, a full memory or a
`RecursionError`.
"""

import errno
import json
import os
import re
import stat
import tokenize
import zipfile
import zlib
from io import BufferedReader
from pathlib import Path
from typing import Any

MAX_IMAGE_FILE = 2**28
"""Largest image file that is read, in bytes (256 MiB)."""
MAX_TEXT_FILE = 2**22
"""Largest file with the captions, the class or the JSON of a sample, in bytes (4 MiB)."""
MAX_ARRAY_FILE = 2**26
"""Largest `.npy` file of a sample, in bytes (64 MiB)."""
MAX_JSON = 2**24
"""Largest JSON text that is parsed by default, in bytes (16 MiB): it takes up to 30 times that."""
MAX_DEPTH = 100
"""Deepest nesting of JSON."""

DAMAGED_ARRAYS = (
    OSError, EOFError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError,
    MemoryError, AttributeError, SyntaxError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What numpy and zipfile raise for `.npy` and `.npz` files, depending on the byte that is wrong."""

_INT64_DIGITS = 18  # every number of so many digits fits into an int64
_LONG_NUMBER = re.compile(r"[0-9]{19}")
_LONG_NUMBER_BYTES = re.compile(rb"[0-9]{19}")


def whole_number(text: str | bytes, digits: int = _INT64_DIGITS) -> int | None:
    """A number that consists of the ASCII digits 0 to 9 alone; None for any other text.

    Args:
        text: the text, without spaces.
        digits: maximum number of digits, at most 18: every result fits into an int64.
    """
    return int(text) if len(text) <= digits and text.isascii() and text.isdigit() else None


def parse_json(text: str | bytes, max_size: int | None = MAX_JSON) -> Any:  # noqa: ANN401
    """The value that a JSON text stands for.

    `NaN` and `Infinity` are accepted, as Python writes them. Integers beyond 64 bits become floats,
    as in most other languages.

    Args:
        text: JSON; bytes are UTF-8, UTF-16 or UTF-32.
        max_size: maximum length; None: any.

    Raises:
        ValueError: the text is not JSON, is too long, or is nested more than a hundred deep.
    """
    if max_size is not None and len(text) > max_size:
        raise ValueError(f"{len(text):,} bytes of JSON are more than {max_size:,}")
    if isinstance(text, str):
        brackets, long = text.count("[") + text.count("{"), _LONG_NUMBER.search(text)
    else:
        brackets, long = text.count(b"[") + text.count(b"{"), _LONG_NUMBER_BYTES.search(text)
    try:
        value = json.loads(text, parse_int=_bounded) if long else json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if brackets > MAX_DEPTH:
        _check_depth(value)
    return value


_TOO_DEEP = f"JSON nested more than {MAX_DEPTH} deep"


def _bounded(digits: str) -> int | float:
    """An integer, as a float if it does not fit into an int64."""
    if len(digits) <= _INT64_DIGITS + 2:  # one more digit and a sign
        value = int(digits)
        if -(2**63) <= value < 2**63:
            return value
    return float(digits)


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for each in level for child in _children(each)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _children(value: object) -> list[object]:
    """The lists and objects directly inside of a JSON value."""
    if isinstance(value, dict):
        return [each for each in value.values() if isinstance(each, (dict, list))]
    if isinstance(value, list):
        return [each for each in value if isinstance(each, (dict, list))]
    return []


def read_json(path: Path, max_size: int | None = MAX_JSON) -> Any:  # noqa: ANN401
    """The value in a JSON file, read by `parse_json`.

    Args:
        path: the file.
        max_size: maximum size in bytes; None: any.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is too large.
        ValueError: it is not JSON, or is nested too deep.
    """
    return parse_json(read_file(path, max_size), max_size)


def read_file(path: Path, max_size: int | None = None) -> bytes:
    """The content of a regular file; devices, named pipes and sockets are refused, not waited for.

    Args:
        path: the file, or a link to it.
        max_size: maximum size in bytes; None: any.

    Raises:
        OSError: the file cannot be read, is not a regular file, or is larger (`errno.EFBIG`).
    """
    handle = os.open(path, _FLAGS)
    try:
        size = _regular_size(handle, path)
        if max_size is not None and size > max_size:
            raise OSError(errno.EFBIG, f"{size:,} bytes are more than {max_size:,}", str(path))
        return _read(handle, size)
    finally:
        os.close(handle)


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file to read.

    Args:
        path: the file, or a link to it.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    return open(path, "rb", opener=_open_regular)  # which keeps the name, unlike a descriptor


def _open_regular(path: str, _: int) -> int:
    handle = os.open(path, _FLAGS)
    try:
        _regular_size(handle, Path(path))
    except OSError:
        os.close(handle)
        raise
    return handle


_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
"""A named pipe without a writer opens at once."""


def _regular_size(handle: int, path: Path) -> int:
    """The size of an open regular file in bytes."""
    status = os.fstat(handle)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return status.st_size


def _read(handle: int, size: int) -> bytes:
    """The first bytes of an open file; fewer if it became shorter."""
    content = os.read(handle, size)
    if len(content) == size:
        return content
    pieces = [content]
    while content and size > len(content):
        size -= len(content)
        content = os.read(handle, size)
        pieces.append(content)
    return b"".join(pieces)
