"""The members of a tar file, from its headers alone.

A scanner of our own instead of `tarfile`: it tells where a damaged tar stops being one, names what
it skips, and takes a few microseconds a member.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
REGULAR = (b"0", b"\0", b"7")
"""Types of members that are plain files."""

_LONG_NAME, _PAX = b"L", b"x"
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
_QUIET = (b"5", b"g", b"K", b"V")  # folders, global headers, long link names, volume labels
_PADDING = 2**20  # zeros behind the end mark that are still a tar's own


@dataclass(frozen=True)
class Member:
    """A member of a tar.

    Attributes:
        path: its name as stored.
        block: where its content starts, in blocks of 512 bytes.
        size: of its content in bytes.
        long_path: the path does not stand in the header in front of the content.
        kind: the type in the header.
    """

    path: str
    block: int
    size: int
    long_path: bool
    kind: bytes


def members(file: BinaryIO, file_size: int) -> Iterator[Member]:
    """The members of a tar but folders; raises `tarfile.ReadError` where it stops being one."""
    position, long_path = 0, ""
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if header and not header.strip(b"\0"):
            _check_end(file, position)
            return
        try:
            path, size, kind = parse_header(header)
        except tarfile.ReadError:
            raise tarfile.ReadError(_not_a_header(header, position)) from None
        if kind in _WITHOUT_DATA:
            size = 0
        start = position + BLOCK
        position = start + -(-size // BLOCK) * BLOCK
        if start + size > file_size:
            raise tarfile.ReadError(f"is cut at byte {file_size}, inside {path!r}")
        if kind == _LONG_NAME:
            long_path = _text(file.read(size))
        elif kind == _PAX:
            long_path = _pax_path(file.read(size)) or long_path
        else:
            if kind not in _QUIET:
                yield Member(long_path or path, start // BLOCK, size, bool(long_path), kind)
            if kind != b"K":  # of the same member as the long path
                long_path = ""


def _check_end(file: BinaryIO, position: int) -> None:
    """Refuse an end mark with more behind it than the padding of a tar."""
    behind = BLOCK
    while chunk := file.read(2**20):
        text = chunk.lstrip(b"\0")
        if text:
            found = position + behind + len(chunk) - len(text)
            raise tarfile.ReadError(
                f"goes on at byte {found}, behind the end mark at byte {position}: a gap, or "
                "several tar files in one"
            )
        behind += len(chunk)
    if behind > _PADDING:
        raise tarfile.ReadError(f"is zeros from byte {position} on: its copy may be incomplete")


def _not_a_header(header: bytes, position: int) -> str:
    if not header:
        return "ends without an end mark: it may be cut" if position else "is empty"
    if position:
        return f"holds garbage from byte {position} on"
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if header.startswith(magic):
            return f"is compressed with {name}: decompress it"
    return "is no tar file"


def _pax_path(records: bytes) -> str:
    """The `path` record of an extended header: lines of `<length> <keyword>=<value>`."""
    while records:
        length = records.split(b" ", 1)[0]
        if not length.isdigit() or int(length) <= len(length):
            break
        keyword, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if keyword == b"path":
            return _text(value)
        records = records[int(length) :]
    return ""


def _number(digits: bytes) -> int:
    if digits[0] & 0x80:  # GNU: base 256 for what octal digits cannot hold
        return int.from_bytes(digits[1:], "big")
    text = digits.split(b"\0", 1)[0].strip()
    if text and not text.isdigit():
        raise tarfile.ReadError("a number is no number")
    try:
        return int(text or b"0", 8)
    except ValueError:
        raise tarfile.ReadError("a number is not octal") from None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def parse_header(block: bytes) -> tuple[str, int, bytes]:
    """Path, size in bytes and type of the member that a tar header describes.

    Raises:
        tarfile.ReadError: the block is no tar header.
    """
    if len(block) < BLOCK:
        raise tarfile.ReadError("the header is cut")
    stored = _number(block[148:156])
    # The checksum counts its own eight bytes as spaces.
    if sum(block) - sum(block[148:156]) + 256 != stored:
        raise tarfile.ReadError("no tar header")
    path = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345] != 0:
        path = f"{_text(block[345:500])}/{path}"
    return path, _number(block[124:136]), block[156:157]
