"""The index of one tar shard: a scan of its headers, done once and kept in a file.

Members are grouped into samples by key: see `neuclip.data.sources.tar_samples`. Only headers are
read and nothing is extracted. Links, devices and paths that lead out of the folder are skipped and
reported; other members that belong to no sample are counted. The index is saved as
`.neuclip/<shard>.index.npz` beside the shard, or under `$XDG_CACHE_HOME/neuclip/index` if that
folder is read-only.
"""

import contextlib
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from neuclip.data.endings import known_endings
from neuclip.data.samples import Damage, Tally
from neuclip.data.sources.tar_headers import members
from neuclip.data.sources.tar_samples import Finding, TarSamples
from neuclip.files import cache_home, replacing
from neuclip.untrusted import DAMAGED_ARRAYS, open_regular, parse_json, whole_number

_FORMAT = 6
_SMALL = 2**20  # bytes of an index that need no explanation
_NO_INTEGER = -1
T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard, as arrays over samples (`select` drops columns).

    Attributes:
        blocks: [samples, 5] offset of each member's content in blocks of 512 bytes; 0 if absent.
        sizes: [samples, 5] size of the content in bytes.
        integer_keys: [samples] the key as an integer; -1 if it is not an integer.
        long_keys: keys that do not fit into the plain header in front of the member, by sample.
        damage: why the shard ends early, or None; samples before that point are kept.
        findings: members and samples that were skipped because something is wrong with them.
        tally: all members, and those that belong to no sample.
        joined: number of samples whose members are not adjacent.
        long_endings: endings with a dot inside, such as `input.jpg`, that split off a key.
    """

    blocks: NDArray[np.uint32]
    sizes: NDArray[np.uint32]
    integer_keys: NDArray[np.int64]
    long_keys: dict[int, str]
    damage: str | None
    findings: tuple[Finding, ...] = ()
    tally: Tally = field(default_factory=lambda: Tally("members"))
    joined: int = 0
    long_endings: frozenset[str] = frozenset()

    def found(self, shard: Path) -> list[Damage]:
        """Everything the scan found wrong, with the name of the shard."""
        ended = [] if self.damage is None else [Damage(str(shard), "", "shard", self.damage)]
        return ended + [Damage(str(shard), key, kind, text) for kind, key, text in self.findings]

    def select(self, rows: NDArray[np.bool_], columns: list[int]) -> "TarIndex":
        """The index of some of the samples, with some of the columns."""
        new_row = np.cumsum(rows) - 1
        return replace(
            self,
            blocks=self.blocks[rows][:, columns],
            sizes=self.sizes[rows][:, columns],
            integer_keys=self.integer_keys[rows],
            long_keys={int(new_row[row]): key for row, key in self.long_keys.items() if rows[row]},
        )


def index_shard(shard: Path, known: Mapping[str, int] | None = None) -> TarIndex:
    """The index of a shard: read from its file if it is up to date, otherwise scanned and saved.

    Args:
        shard: a tar file.
        known: the endings to read, with the part of a sample that they stand for; None: all known.

    Raises:
        OSError: the shard cannot be read.
    """
    status = shard.stat()
    known = known or known_endings()
    # They depend on the installed Pillow, and on --image-key and --text-key.
    endings = zlib.crc32(" ".join(f"{ending}:{part}" for ending, part in known.items()).encode())
    stamp = np.array([_FORMAT, endings, status.st_size, status.st_mtime_ns], dtype=np.int64)
    places = (_beside(shard), _in_cache(shard))
    for place in places:
        index = _load(place, stamp)
        if index is not None:
            return index
    with open_regular(shard) as file:
        index = scan(file, status.st_size, known)
    for place in places:
        # If neither place can be written, the next run scans again.
        with contextlib.suppress(OSError):
            _save(place, stamp, index)
            break
    return index


def scan(file: BinaryIO, file_size: int, known: Mapping[str, int] | None = None) -> TarIndex:
    """Reads all headers of a tar file, and groups its members into samples."""
    found = TarSamples(known or known_endings())
    damage, total = None, 0
    try:
        for total, member in enumerate(members(file, file_size), 1):  # noqa: B007
            found.add(member)
    except tarfile.ReadError as error:
        damage = str(error)
        found.drop_incomplete_end()
    found.finish(total)
    blocks = np.array(found.blocks, dtype=np.uint32).reshape(-1, 5)
    sizes = np.array(found.sizes, dtype=np.uint32).reshape(-1, 5)
    keys, long_keys = found.keys, found.long_keys
    if found.out_of_order:
        # In the order of their first members, as if each had been placed when it was met.
        order = np.argsort(
            np.where(blocks > 0, blocks, np.iinfo(np.uint32).max).min(axis=1), kind="stable"
        )
        blocks, sizes = blocks[order], sizes[order]
        keys = [keys[row] for row in order.tolist()]
        new = {row: number for number, row in enumerate(order.tolist())}
        long_keys = {new[row]: key for row, key in long_keys.items()}
    return TarIndex(
        blocks=blocks,
        sizes=sizes,
        integer_keys=np.array([_integer(key) for key in keys], dtype=np.int64),
        long_keys=long_keys,
        damage=damage,
        findings=tuple(found.findings),
        tally=found.tally,
        joined=len(found.joined),
        long_endings=frozenset(found.long_endings),
    )


def _integer(key: str) -> int:
    number = whole_number(key.rpartition("/")[2])
    return _NO_INTEGER if number is None else number


def _beside(shard: Path) -> Path:
    return shard.parent / ".neuclip" / f"{shard.name}.index.npz"


def _in_cache(shard: Path) -> Path:
    identity = hashlib.sha256(os.fsencode(shard.resolve())).hexdigest()[:32]
    return cache_home() / "index" / f"{identity}.npz"


def _load(place: Path, stamp: NDArray[np.int64]) -> TarIndex | None:
    try:
        with open_regular(place) as file, np.load(file, allow_pickle=False) as stored:
            # Someone else may have written it: it must not unpack to more than the shard explains.
            if sum(each.file_size for each in stored.zip.infolist()) > stamp[2] + _SMALL:
                return None
            if not np.array_equal(stored["stamp"], stamp):
                return None
            samples = len(stored["integer_keys"])
            rest = parse_json(stored["rest"].tobytes(), None)
            return TarIndex(
                blocks=_shaped(stored["blocks"], np.uint32, samples, 5),
                sizes=_shaped(stored["sizes"], np.uint32, samples, 5),
                integer_keys=_shaped(stored["integer_keys"], np.int64, samples),
                long_keys={int(row): str(key) for row, key in rest["long_keys"]},
                damage=None if rest["damage"] is None else str(rest["damage"]),
                findings=tuple((kind, key, text) for kind, key, text in rest["findings"]),
                tally=Tally(**rest["tally"]),
                joined=int(rest["joined"]),
                long_endings=frozenset(map(str, rest["long_endings"])),
            )
    except DAMAGED_ARRAYS:
        return None  # missing, truncated or changed: scan again


def _shaped(array: NDArray[T], kind: type[T], *shape: int) -> NDArray[T]:
    """The array.

    Raises:
        ValueError: it is of another type or shape.
    """
    if array.dtype != kind or array.shape != shape:
        raise ValueError(f"{array.dtype} {array.shape} instead of {kind} {shape}")
    return array


def _save(place: Path, stamp: NDArray[np.int64], index: TarIndex) -> None:
    # One array, since each costs 0.2 ms to read. Not an array of texts: each takes the space of
    # the longest.
    rest = {
        "long_keys": list(index.long_keys.items()),
        "damage": index.damage,
        "findings": index.findings,
        "tally": asdict(index.tally),
        "joined": index.joined,
        "long_endings": sorted(index.long_endings),
    }
    with replacing(place, durable=False) as file:
        np.savez(
            file,
            stamp=stamp,
            blocks=index.blocks,
            sizes=index.sizes,
            integer_keys=index.integer_keys,
            rest=np.frombuffer(json.dumps(rest).encode(), dtype=np.uint8),
        )
