"""The index of one tar shard: a scan of its headers, done once and kept in a file.

Samples are grouped as in webdataset: neighbouring members whose paths agree up to the first dot of
the file name. Only headers are read and nothing is extracted. Links, devices and paths that lead
out of the folder are skipped and reported. The index is saved as `.neuclip/<shard>.index.npz`
beside the shard, or under `$XDG_CACHE_HOME/neuclip/index` if that folder is read-only.
"""

import contextlib
import hashlib
import json
import os
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from neuclip.data.samples import Damage, DamageKind
from neuclip.data.sources.tar_headers import REGULAR, Member, members
from neuclip.files import cache_home, replacing

IMAGE, TEXT, JSON, CLASS, METADATA = range(5)
"""Columns of `TarIndex.blocks` and `TarIndex.sizes`."""

_COLUMNS = {
    **dict.fromkeys(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff"), IMAGE),
    "txt": TEXT,
    "json": JSON,
    "cls": CLASS,
    "npy": METADATA,
}
_FORMAT = 3
_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}
_NO_INTEGER = -1

Finding = tuple[DamageKind, str, str]
"""Kind, key or path, and explanation of a member or sample that was skipped."""


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard, as arrays over samples (`select` drops columns).

    Attributes:
        blocks: [samples, 5] offset of each member's content in blocks of 512 bytes; 0 if absent.
        sizes: [samples, 5] size of the content in bytes.
        integer_keys: [samples] the key as an integer; -1 if it is not an integer.
        long_keys: keys that do not fit into the plain header in front of the member, by sample.
        damage: why the shard ends early, or None; samples before that point are kept.
        findings: members and samples that were skipped.
    """

    blocks: NDArray[np.uint32]
    sizes: NDArray[np.uint32]
    integer_keys: NDArray[np.int64]
    long_keys: dict[int, str]
    damage: str | None
    findings: tuple[Finding, ...] = ()

    def found(self, shard: Path) -> list[Damage]:
        """Everything the scan found wrong, with the name of the shard."""
        ended = [] if self.damage is None else [Damage(str(shard), "", "shard", self.damage)]
        return ended + [Damage(str(shard), key, kind, text) for kind, key, text in self.findings]

    def select(self, rows: NDArray[np.bool_], columns: list[int]) -> "TarIndex":
        """The index of some of the samples, with some of the columns."""
        new_row = np.cumsum(rows) - 1
        return TarIndex(
            blocks=self.blocks[rows][:, columns],
            sizes=self.sizes[rows][:, columns],
            integer_keys=self.integer_keys[rows],
            long_keys={int(new_row[row]): key for row, key in self.long_keys.items() if rows[row]},
            damage=self.damage,
            findings=self.findings,
        )


def index_shard(shard: Path) -> TarIndex:
    """The index of a shard: read from its file if it is up to date, otherwise scanned and saved.

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
        # If neither place can be written, the next run scans again.
        with contextlib.suppress(OSError):
            _save(place, stamp, index)
            break
    return index


def scan(file: BinaryIO, file_size: int) -> TarIndex:
    """Reads all headers of a tar file, and groups its members into samples."""
    rows = _Rows()
    damage = None
    try:
        for member in members(file, file_size):
            rows.add(member)
    except tarfile.ReadError as error:
        damage = str(error)
        rows.drop_incomplete_end()
    return rows.index(damage)


def key_of(path: str) -> str:
    """The key of the sample that a member belongs to."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


@dataclass
class _Rows:
    """Collects members into samples."""

    blocks: list[list[int]] = field(default_factory=list[list[int]])
    sizes: list[list[int]] = field(default_factory=list[list[int]])
    keys: list[str] = field(default_factory=list[str])
    long_keys: dict[int, str] = field(default_factory=dict[int, str])
    findings: list[Finding] = field(default_factory=list[Finding])
    _seen: set[str] = field(default_factory=set[str])
    _columns: set[int] = field(default_factory=set[int])  # of the last key, so far
    _last_key: str = ""
    _repeats: bool = False

    def add(self, member: Member) -> None:
        if member.kind not in REGULAR:
            what = _TYPES.get(member.kind, f"a member of type {member.kind!r}")
            self.findings.append(("member_type", member.path, f"{what}: ignored"))
            return
        if member.path.startswith("/") or ".." in member.path.split("/"):
            self.findings.append(("member_name", member.path, "the path leads out of the folder"))
            return
        folder, slash, name = member.path.rpartition("/")
        stem, _, extension = name.partition(".")
        column = _COLUMNS.get(extension.lower())
        if column is not None and stem:
            self._place(member, folder + slash + stem, column)

    def _place(self, member: Member, key: str, column: int) -> None:
        if key != self._last_key or column in self._columns:
            self._last_key, self._columns = key, set()
            self._repeats = key in self._seen
            if not self._repeats:
                self._seen.add(key)
                self.keys.append(key)
                self.blocks.append([0] * 5)
                self.sizes.append([0] * 5)
        if self._repeats:
            # Reported once, at the first member that makes it a sample.
            if column in (IMAGE, TEXT) and not self._columns & {IMAGE, TEXT}:
                detail = "an earlier sample has the same key: the first is kept"
                self.findings.append(("duplicate_key", key, detail))
        else:
            self.blocks[-1][column] = member.block
            self.sizes[-1][column] = member.size
            if member.long_path:
                self.long_keys[len(self.keys) - 1] = key
        self._columns.add(column)

    def drop_incomplete_end(self) -> None:
        """Drops the last sample if the shard ends before its image or its caption."""
        if self.keys:
            last = self.blocks[-1]
            if not last[IMAGE] or not (last[TEXT] or last[JSON] or last[CLASS]):
                self.long_keys.pop(len(self.keys) - 1, None)
                del self.keys[-1], self.blocks[-1], self.sizes[-1]

    def index(self, damage: str | None) -> TarIndex:
        return TarIndex(
            blocks=np.array(self.blocks, dtype=np.uint32).reshape(-1, 5),
            sizes=np.array(self.sizes, dtype=np.uint32).reshape(-1, 5),
            integer_keys=np.array([_integer(key) for key in self.keys], dtype=np.int64),
            long_keys=self.long_keys,
            damage=damage,
            findings=tuple(self.findings),
        )


def _integer(key: str) -> int:
    name = key.rpartition("/")[2]
    return int(name) if name.isascii() and name.isdigit() and len(name) <= 18 else _NO_INTEGER


def _beside(shard: Path) -> Path:
    return shard.parent / ".neuclip" / f"{shard.name}.index.npz"


def _in_cache(shard: Path) -> Path:
    identity = hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:32]
    return cache_home() / "index" / f"{identity}.npz"


def _load(place: Path, stamp: NDArray[np.int64]) -> TarIndex | None:
    try:
        with place.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            findings = json.loads(str(stored["findings"]))
            rows, keys = stored["long_key_rows"].tolist(), stored["long_keys"].tolist()
            return TarIndex(
                blocks=stored["blocks"],
                sizes=stored["sizes"],
                integer_keys=stored["integer_keys"],
                long_keys=dict(zip(rows, keys, strict=True)),
                damage=str(stored["damage"]) or None,
                findings=tuple((kind, key, text) for kind, key, text in findings),
            )
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # missing or truncated: scan again


def _save(place: Path, stamp: NDArray[np.int64], index: TarIndex) -> None:
    with replacing(place, durable=False) as file:
        np.savez(
            file,
            stamp=stamp,
            blocks=index.blocks,
            sizes=index.sizes,
            integer_keys=index.integer_keys,
            long_key_rows=np.array(list(index.long_keys), dtype=np.int64),
            long_keys=np.array(list(index.long_keys.values()), dtype=np.str_),
            damage=np.array(index.damage or ""),
            findings=np.array(json.dumps(index.findings)),
        )
