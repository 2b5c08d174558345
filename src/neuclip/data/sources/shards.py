"""Local tar shards as a map of samples: patterns, the index over all shards, reading one sample.

A shard is a tar in the webdataset layout (img2dataset, DataComp): neighbouring members
`<key>.jpg`, `<key>.txt`, `<key>.json`, `<key>.cls`. The index holds positions and sizes only, so
13.7 million samples take about 220 MB, shared by forked worker processes.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tarfile import ReadError

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from neuclip.data.order import Layout
from neuclip.data.samples import (
    Damage,
    DamageKind,
    RawSample,
    SampleError,
    Unusable,
    bounded_caption,
    caption_of_json,
)
from neuclip.data.sources.source import Content, Source, damaged
from neuclip.data.sources.tar_headers import BLOCK, parse_header
from neuclip.data.sources.tar_index import (
    CLASS,
    IMAGE,
    JSON,
    METADATA,
    TEXT,
    TarIndex,
    index_shard,
    key_of,
)
from neuclip.errors import UserError

__all__ = [
    "Damage",
    "DamageKind",
    "RawSample",
    "SampleError",
    "ShardIndex",
    "build_index",
    "expand_patterns",
]

_OPEN_SHARDS = 128  # file handles kept open by each process
_log = logging.getLogger(__name__)


def expand_patterns(pattern: str) -> list[Path]:
    """Shards named by a pattern: braces (`{0000..1926}`), parts joined by `::`, folders.

    A folder stands for all `*.tar` in it, sorted.

    Raises:
        UserError: some of the shards, or all, do not exist.
    """
    shards: list[Path] = []
    for part in pattern.split("::"):
        if "://" in part or part.startswith("pipe:"):
            raise UserError(f"{part!r}: only local shards can be read: copy them to a local disk")
        try:
            paths = [Path(path).expanduser() for path in braceexpand(part)] if part else []
        except ValueError:  # braceexpand's UnbalancedBracesError
            raise UserError(f"the braces of the pattern {part!r} do not match") from None
        for path in paths:
            shards += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if len(missing) == len(shards):
        looked = f" (no such file: {missing[0]})" if missing else ""
        raise UserError(
            f"no shard matches the pattern {pattern!r}{looked}: expected tar files, a folder of "
            "them, or braces as in 'shards/{0000..1926}.tar'; several joined by '::'"
        )
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{len(missing)} of {len(shards)} shards of the pattern {pattern!r} do not exist: "
            f"{shown}"
        )
    return shards


def build_index(
    shards: Sequence[Path],
    *,
    caption_key: str | None = None,
    captions_required: bool = True,
    data_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "ShardIndex":
    """Index the samples of `shards`, in the order of the shards and of the samples in them.

    Args:
        shards: tar files.
        caption_key: take captions from this entry of the `.json` instead of from the `.txt`.
        captions_required: without it, a sample that has no caption has an empty one (splits for
            zero-shot classification).
        data_size: take the keys, which must be integers below this bound, as sample ids.
        progress: called with the number of shards indexed and of all.

    Raises:
        UserError: no sample at all, or a key that is no integer below `data_size`.
    """
    text = TEXT if caption_key is None else JSON
    parts: list[TarIndex] = []
    damage: list[Damage] = []
    for done, shard in enumerate(shards):
        if progress is not None:
            progress(done, len(shards))
        part = _index_or_damage(shard)
        found = part.found(shard)
        damage += found
        if found:
            more = f" (and {len(found) - 1} more in this shard)" if len(found) > 1 else ""
            _log.warning("%s%s", found[0], more)
        # A group with neither image nor caption is no sample but some other file in the tar.
        is_sample = (part.blocks[:, IMAGE] > 0) | (part.blocks[:, text] > 0)
        parts.append(part.select(is_sample, [IMAGE, text, CLASS, METADATA]))
    if not any(len(part.blocks) for part in parts):
        reasons = "".join(f"\n  {found}" for found in damage[:5])
        raise UserError(
            f"no samples in {len(shards)} shard(s), {shards[0]} first: expected tar files with "
            f"members like 000000000.jpg and 000000000.txt{reasons}"
        )
    reading = _Reading(caption_key, captions_required)
    index = ShardIndex(shards, parts, reading, tuple(damage))
    if data_size is not None:
        index.use_keys_as_ids(np.concatenate([part.integer_keys for part in parts]), data_size)
    return index


def _index_or_damage(shard: Path) -> TarIndex:
    try:
        return index_shard(shard)
    except OSError as error:
        nothing = np.zeros((0, METADATA + 1), dtype=np.uint32)
        problem = f"cannot be read: {error.strerror or error}"
        return TarIndex(nothing, nothing, np.zeros(0, dtype=np.int64), {}, problem)


def _name(shards: Sequence[Path]) -> str:
    """The shards in a word."""
    return str(shards[0]) if len(shards) == 1 else str(shards[0].parent)


@dataclass(frozen=True)
class _Reading:
    caption_key: str | None
    captions_required: bool


class ShardIndex(Source):
    """All samples of some shards, by position: make one with `build_index`.

    Attributes:
        shards: the tar files.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        parts: Sequence[TarIndex],
        reading: _Reading,
        damage: tuple[Damage, ...],
    ) -> None:
        self.shards = tuple(shards)
        self.damage = damage
        self._reading = reading
        # The last columns belong to evaluation splits: no memory for them in training.
        used = [c for c in (_CLASS, _METADATA) if any(part.blocks[:, c].any() for part in parts)]
        columns = slice(max(used, default=_CAPTION) + 1)
        self._blocks = np.concatenate([part.blocks[:, columns] for part in parts])
        self._sizes = np.concatenate([part.sizes[:, columns] for part in parts])
        self.layout = Layout.of(_name(shards), [len(part.blocks) for part in parts])
        self._long_keys = {
            int(end) - len(part.blocks) + row: key
            for end, part in zip(self.layout.ends, parts, strict=True)
            for row, key in part.long_keys.items()
        }
        self._ids: NDArray[np.int64] | None = None
        self._files = _OpenFiles(self.shards)

    @property
    def sample_ids(self) -> NDArray[np.int64]:
        """Stable id of every sample: its position, or its integer key."""
        return np.arange(len(self), dtype=np.int64) if self._ids is None else self._ids

    def sample_id(self, position: int) -> int:
        """Stable id of one sample."""
        return position if self._ids is None else int(self._ids[position])

    def use_keys_as_ids(self, keys: NDArray[np.int64], data_size: int) -> None:
        """Take integer keys as sample ids; see `build_index`."""
        wrong = np.flatnonzero((keys < 0) | (keys >= data_size))
        if len(wrong):
            shard, key = self.locate(int(wrong[0]))
            raise UserError(
                f"{shard}: the key {key!r} is no sample id: with data_size {data_size} keys must "
                f"be integers from 0 to {data_size - 1} ({len(wrong)} of {len(keys)} are not). "
                "Correct data_size, or leave it out to number the samples by position"
            )
        self._ids = keys

    def locate(self, position: int) -> tuple[Path, str]:
        """Shard and key of a sample, for messages."""
        column = _IMAGE if self._blocks[position, _IMAGE] else _CAPTION
        return self.shards[self._shard(position)], self._key_and_content(position, column)[0]

    def files(self) -> tuple[Path, ...]:
        """The shards."""
        return self.shards

    def content(self, position: int) -> Content:
        """One sample as it is stored; see `Source.content`."""
        if not self._blocks[position, _IMAGE]:
            raise self._error(position, self.locate(position)[1], "image_missing", "no image")
        key, image = self._key_and_content(position, _IMAGE)
        try:
            caption, class_index = self._caption(position), self._class_index(position)
            return Content(key, image, caption, class_index, self._part(position, _METADATA))
        except Unusable as error:
            raise self._error(position, key, error.kind, error.detail) from error.__cause__

    def _caption(self, position: int) -> str:
        if not self._blocks[position, _CAPTION]:
            if self._reading.captions_required:
                raise Unusable("caption_missing", "no caption")
            return ""
        try:
            text = self._bytes(position, _CAPTION).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Unusable("caption_encoding", f"not UTF-8 ({error.reason})") from error
        if self._reading.caption_key is not None:
            text = caption_of_json(text, self._reading.caption_key)
        text = bounded_caption(text)
        if not text and self._reading.captions_required:
            raise Unusable("caption_empty", "the caption is empty")
        return text

    def _class_index(self, position: int) -> int | None:
        content = self._part(position, _CLASS)
        if content is None:
            return None
        content = content.strip()
        if not content.isdigit():
            raise Unusable("class", f"the .cls holds {content[:40]!r}, not a class index")
        return int(content)

    def _part(self, position: int, column: int) -> bytes | None:
        if self._blocks.shape[1] <= column or not self._blocks[position, column]:
            return None
        return self._bytes(position, column)

    def _key_and_content(self, position: int, column: int) -> tuple[str, bytes]:
        """A member with its key: the header lies right before the content."""
        data = self._bytes(position, column, BLOCK)
        try:
            path, _, _ = parse_header(data[:BLOCK])
        except ReadError as error:
            raise self._changed(position, str(error)) from error
        return self._long_keys.get(position) or key_of(path), data[BLOCK:]

    def _bytes(self, position: int, column: int, before: int = 0) -> bytes:
        """The content of a member, and so many bytes before it."""
        start = int(self._blocks[position, column]) * BLOCK - before
        size = int(self._sizes[position, column]) + before
        try:
            data = self._files.read(self._shard(position), start, size)
        except OSError as error:
            raise self._changed(position, error.strerror or str(error)) from error
        if len(data) < size:
            raise self._changed(position, "it is shorter than before")
        return data

    def _changed(self, position: int, detail: str) -> SampleError:
        detail = f"changed or vanished since it was indexed: {detail}"
        return self._error(position, "", "shard_changed", detail)

    def _shard(self, position: int) -> int:
        return self.layout.block(position)

    def _error(self, position: int, key: str, kind: DamageKind, detail: str) -> SampleError:
        return damaged(self.shards[self._shard(position)], key, kind, detail)


_IMAGE, _CAPTION, _CLASS, _METADATA = range(4)  # columns of a ShardIndex


class _OpenFiles:
    """The shards that this process read last, held open.

    Reading at an offset leaves no shared file position, so handles survive a fork.
    """

    def __init__(self, paths: tuple[Path, ...]) -> None:
        self._paths = paths
        self._handles: OrderedDict[int, int] = OrderedDict()

    def read(self, number: int, start: int, size: int) -> bytes:
        handle = self._handles.pop(number, None)
        if handle is None:
            handle = os.open(self._paths[number], os.O_RDONLY)
        self._handles[number] = handle
        if len(self._handles) > _OPEN_SHARDS:
            os.close(self._handles.popitem(last=False)[1])
        return os.pread(handle, size, start)

    def __reduce__(self) -> tuple[type["_OpenFiles"], tuple[tuple[Path, ...]]]:
        return _OpenFiles, (self._paths,)

    def __del__(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
