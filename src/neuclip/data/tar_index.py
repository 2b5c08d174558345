"""Where the members of one tar shard lie: a scan of its headers, done once and kept in a file.

Samples are grouped as webdataset does: neighbouring members whose paths agree up to the first dot
of the file name. Only headers are read and nothing is ever extracted, so links, devices and odd
paths in a tar are harmless. What was found is saved as `.neuclip/<shard>.index.npz` beside the
shard, or under `$XDG_CACHE_HOME/neuclip/index` where that folder cannot be written.
"""

import contextlib
import hashlib
import os
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

BLOCK = tarfile.BLOCKSIZE
IMAGE, TEXT, JSON, CLASS = range(4)
"""Columns of `TarIndex.blocks` and `TarIndex.sizes`."""

_COLUMNS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"), IMAGE),
    "txt": TEXT,
    "json": JSON,
    "cls": CLASS,
}
_FORMAT = 1
_REGULAR, _LONG_NAME, _PAX = (b"0", b"\0", b"7"), b"L", b"x"
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
_NO_INTEGER = -1


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard, as arrays over samples (`select` makes one with fewer columns).

    Attributes:
        blocks: [samples, 4] position of each member's content in blocks of 512 bytes; 0 if absent.
        sizes: [samples, 4] its size in bytes.
        integer_keys: [samples] the key as an integer, -1 where it is none.
        long_keys: keys too long for the plain header in front of the member, by sample.
        damage: what is wrong with the shard as a whole; the samples before the damage are kept.
    """

    blocks: NDArray[np.uint32]
    sizes: NDArray[np.uint32]
    integer_keys: NDArray[np.int64]
    long_keys: dict[int, str]
    damage: str | None

    def select(self, rows: NDArray[np.bool_], columns: list[int]) -> "TarIndex":
        """The same index with some of its samples and some of its columns only."""
        new_row = np.cumsum(rows) - 1
        return TarIndex(
            blocks=self.blocks[rows][:, columns],
            sizes=self.sizes[rows][:, columns],
            integer_keys=self.integer_keys[rows],
            long_keys={int(new_row[row]): key for row, key in self.long_keys.items() if rows[row]},
            damage=self.damage,
        )


def index_shard(shard: Path) -> TarIndex:
    """The index of a shard: read from its file if that is up to date, else made and saved.

    Raises:
        OSError: the shard cannot be read.
    """
    status = shard.stat()
    stamp = np.array([_FORMAT, status.st_size, status.st_mtime_ns], dtype=np.int64)
    places = (_beside(shard), _in_cache(shard))
    for place in places:
        index = _load(place, stamp)
        if index is not None:
            return index
    with shard.open("rb") as file:
        index = scan(file, status.st_size)
    for place in places:
        # An index is a convenience: where neither place can be written, the next run scans again.
        with contextlib.suppress(OSError):
            _save(place, stamp, index)
            break
    return index


def scan(file: BinaryIO, file_size: int) -> TarIndex:
    """Read all headers of a tar file, and group its members into samples."""
    rows = _Rows()
    damage = None
    try:
        for member in _members(file, file_size):
            rows.add(member)
    except tarfile.ReadError as error:
        damage = str(error)
        rows.drop_incomplete_end()
    return rows.index(damage)


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


def key_of(path: str) -> str:
    """The sample that a member belongs to: its path up to the first dot of the file name."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


@dataclass(frozen=True)
class _Member:
    path: str
    block: int
    size: int
    long_path: bool


@dataclass
class _Rows:
    """Samples as they come together from members."""

    blocks: list[list[int]] = field(default_factory=list[list[int]])
    sizes: list[list[int]] = field(default_factory=list[list[int]])
    keys: list[str] = field(default_factory=list[str])
    long_keys: dict[int, str] = field(default_factory=dict[int, str])

    def add(self, member: _Member) -> None:
        folder, slash, name = member.path.rpartition("/")
        stem, _, extension = name.partition(".")
        column = _COLUMNS.get(extension.lower())
        if column is None or not stem:
            return
        key = folder + slash + stem
        # The same member twice is a second sample of that name, not a correction of the first.
        if not self.keys or self.keys[-1] != key or self.blocks[-1][column]:
            self.keys.append(key)
            self.blocks.append([0] * 4)
            self.sizes.append([0] * 4)
        self.blocks[-1][column] = member.block
        self.sizes[-1][column] = member.size
        if member.long_path:
            self.long_keys[len(self.keys) - 1] = key

    def drop_incomplete_end(self) -> None:
        """Forget the last sample if the damage behind it took its image or its caption."""
        if self.keys:
            last = self.blocks[-1]
            if not last[IMAGE] or not (last[TEXT] or last[JSON] or last[CLASS]):
                self.long_keys.pop(len(self.keys) - 1, None)
                del self.keys[-1], self.blocks[-1], self.sizes[-1]

    def index(self, damage: str | None) -> TarIndex:
        return TarIndex(
            blocks=np.array(self.blocks, dtype=np.uint32).reshape(-1, 4),
            sizes=np.array(self.sizes, dtype=np.uint32).reshape(-1, 4),
            integer_keys=np.array([_integer(key) for key in self.keys], dtype=np.int64),
            long_keys=self.long_keys,
            damage=damage,
        )


def _members(file: BinaryIO, file_size: int) -> Iterator[_Member]:
    """The regular files of a tar; raises `tarfile.ReadError` where it stops being one."""
    position, long_path = 0, ""
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if not header:
            problem = "is empty" if position == 0 else "ends without an end mark: it may be cut"
            raise tarfile.ReadError(problem)
        if not header.strip(b"\0"):
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
            if kind in _REGULAR:
                yield _Member(long_path or path, start // BLOCK, size, bool(long_path))
            long_path = ""


def _not_a_header(header: bytes, position: int) -> str:
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


def _integer(key: str) -> int:
    name = key.rpartition("/")[2]
    return int(name) if name.isascii() and name.isdigit() and len(name) <= 18 else _NO_INTEGER


def _beside(shard: Path) -> Path:
    return shard.parent / ".neuclip" / f"{shard.name}.index.npz"


def _in_cache(shard: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    identity = hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:32]
    return root / "neuclip" / "index" / f"{identity}.npz"


def _load(place: Path, stamp: NDArray[np.int64]) -> TarIndex | None:
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            rows, keys = stored["long_key_rows"].tolist(), stored["long_keys"].tolist()
            return TarIndex(
                blocks=stored["blocks"],
                sizes=stored["sizes"],
                integer_keys=stored["integer_keys"],
                long_keys=dict(zip(rows, keys, strict=True)),
                damage=str(stored["damage"]) or None,
            )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # absent, or cut by a killed run: scan again


def _save(place: Path, stamp: NDArray[np.int64], index: TarIndex) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.savez(
                file,
                stamp=stamp,
                blocks=index.blocks,
                sizes=index.sizes,
                integer_keys=index.integer_keys,
                long_key_rows=np.array(list(index.long_keys), dtype=np.int64),
                long_keys=np.array(list(index.long_keys.values()), dtype=np.str_),
                damage=np.array(index.damage or ""),
            )
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
