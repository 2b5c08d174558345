"""Local tar shards: patterns that name them, their index, and reading one sample.

A shard is a tar file in the webdataset layout (img2dataset, DataComp): members `<key>.jpg`,
`<key>.txt`, `<key>.json`, `<key>.cls`. The index holds only offsets and sizes: 13.7
million samples take about 220 MB, shared by forked worker processes.
"""

import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tarfile import ReadError

import numpy as np
from numpy.typing import NDArray

from neuclip.data.annotations import CLASS_FILE, AnnotationKeys
from neuclip.data.captions import NO_CAPTIONS, CaptionRule, read_record
from neuclip.data.endings import CLASS, IMAGE, JSON, METADATA, TEXT, known_endings
from neuclip.data.order import Layout
from neuclip.data.patterns import expand_braces
from neuclip.data.progress import Progress
from neuclip.data.samples import Damage, Sample, SampleError, Tally, Unusable
from neuclip.data.sources.source import ImageT, Source
from neuclip.data.sources.tar_headers import BLOCK, parse_header
from neuclip.data.sources.tar_index import TarIndex, index_shard
from neuclip.data.sources.tar_samples import key_of
from neuclip.errors import UserError, quantity
from neuclip.untrusted import whole_number

_CLASS_DIGITS = 9
_OPEN_SHARDS = 128  # file handles kept open by each process
_log = logging.getLogger(__name__)


def expand_patterns(pattern: str) -> list[Path]:
    """The shards that a pattern names.

    Args:
        pattern: paths with braces (`{0000..1926}`), joined by `::`; a folder stands for all `*.tar`
            in it, sorted.

    Raises:
        UserError: a shard does not exist, or the braces stand for too many.
    """
    shards: list[Path] = []
    for part in pattern.split("::"):
        if "://" in part or part.startswith("pipe:"):
            raise UserError(
                f"{part!r}: remote shards cannot be read here: copy them to a local disk"
            )
        for path in (Path(name).expanduser() for name in expand_braces(part)):
            shards += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if len(missing) == len(shards):
        looked = f" (no such file: {missing[0]})" if missing else ""
        raise UserError(
            f"no shard matches the pattern {pattern!r}{looked}: expected tar files, a folder of "
            "tar files, or braces as in 'shards/{0000..1926}.tar', joined by '::'"
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
    captions: CaptionRule | None = None,
    keys: AnnotationKeys | None = None,
    data_size: int | None = None,
    known: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> "ShardIndex":
    """Indexes the samples of shards, in the order of the shards and of the samples in them.

    Args:
        shards: tar files.
        captions: where captions come from; if none, from the `.txt` member.
        keys: the annotations to read.
        data_size: take the keys, integers below this bound, as sample ids.
        known: the endings to read, with the part of a sample that they stand for; None: all known.
        progress: called for each shard.

    Raises:
        UserError: there are no samples, or a key is not an integer below `data_size`.
    """
    captions, keys = captions or CaptionRule(), keys or AnnotationKeys()
    text = JSON if captions.json_keys else TEXT
    indexes: list[TarIndex] = []
    damage: list[Damage] = []
    tally = Tally("members")
    for done, shard in enumerate(shards):
        if progress is not None:
            progress("indexing", done, len(shards))
        index = _index_or_damage(shard, known)
        found = index.found(shard)
        damage += found
        if found:
            more = f" (and {len(found) - 1} more in this shard)" if len(found) > 1 else ""
            _log.warning("%s%s", found[0], more)
        # A group without image and caption is some other file in the tar, not a sample.
        is_sample = (index.blocks[:, IMAGE] > 0) | (index.blocks[:, text] > 0)
        tally.merge(index.tally)
        _count_alone(tally, index.blocks[~is_sample])
        parts = [IMAGE, text, CLASS, METADATA, *([JSON] if keys.names else [])]
        indexes.append(index.select(is_sample, parts))
    if not any(len(index.blocks) for index in indexes):
        unused = [f"not read: {line}" for line in tally.lines()]
        reasons = "".join(f"\n  {found}" for found in [*unused, *damage[:5]])
        raise UserError(
            f"no samples in {quantity(len(shards), 'shard')}, {shards[0]} first: expected tar "
            "files with members like 000000000.jpg and 000000000.txt; --image-key ENDING and "
            f"--text-key ENDING read others{reasons}"
        )
    joined = ShardIndex(shards, indexes, captions, keys, known or known_endings())
    joined.damage = tuple(damage)
    joined.opened, joined.tally = "; ".join(_notes(joined, indexes)), tally
    joined.unused = tally.lines()
    if data_size is not None:
        ids = np.concatenate([index.integer_keys for index in indexes])
        joined.use_keys_as_ids(ids, data_size)
    return joined


def _index_or_damage(shard: Path, known: Mapping[str, int] | None) -> TarIndex:
    try:
        return index_shard(shard, known)
    except OSError as error:
        nothing = np.zeros((0, METADATA + 1), dtype=np.uint32)
        problem = f"cannot be read: {error.strerror or error}"
        return TarIndex(nothing, nothing, np.zeros(0, dtype=np.int64), {}, problem)


def _count_alone(tally: Tally, blocks: NDArray[np.uint32]) -> None:
    """Counts the members of groups that are not samples."""
    for column, ending in ((TEXT, ".txt"), (JSON, ".json"), (CLASS, ".cls"), (METADATA, ".npy")):
        number = int(np.count_nonzero(blocks[:, column]))
        if number:
            tally.add("alone", ending, number)


def _notes(source: "ShardIndex", indexes: Sequence[TarIndex]) -> Iterator[str]:
    """What users may not expect: a lack of captions, and what webdataset would read otherwise."""
    if not source.has_captions:
        yield source.lacks_captions
    joined = sum(index.joined for index in indexes)
    if joined:
        yield (
            f"the members of {quantity(joined, 'sample')} are not adjacent in their tar file and "
            "were joined by key; webdataset and open_clip would read each part as a sample of its "
            "own"
        )
    endings = sorted({ending for index in indexes for ending in index.long_endings})
    if endings:
        yield f"keys of members end before {', '.join(f'.{ending}' for ending in endings)}"


def _name(shards: Sequence[Path]) -> str:
    """A short name of several shards."""
    return str(shards[0]) if len(shards) == 1 else str(shards[0].parent)


class ShardIndex(Source):
    """All samples of some shards, by position; created by `build_index`.

    Attributes:
        shards: the tar files.
        tally: all members, and those that belong to no sample.
    """

    tally: Tally

    def __init__(
        self,
        shards: Sequence[Path],
        indexes: Sequence[TarIndex],
        captions: CaptionRule,
        keys: AnnotationKeys,
        known: Mapping[str, int],
    ) -> None:
        self.shards = tuple(shards)
        self._known = known
        self._captions, self._keys = captions, keys
        # The last columns belong to evaluation splits and annotations: elsewhere they take no
        # memory.
        last = range(_CLASS, _RECORD + 1 if keys.names else _RECORD)
        used = [c for c in last if any(each.blocks[:, c].any() for each in indexes)]
        columns = slice(max(used, default=_CAPTION) + 1)
        self.has_captions = any(bool(each.blocks[:, _CAPTION].any()) for each in indexes)
        self._blocks = np.concatenate([index.blocks[:, columns] for index in indexes])
        self._sizes = np.concatenate([index.sizes[:, columns] for index in indexes])
        self.layout = Layout.of(_name(shards), [len(index.blocks) for index in indexes])
        self._long_keys = {
            int(end) - len(index.blocks) + row: key
            for end, index in zip(self.layout.ends, indexes, strict=True)
            for row, key in index.long_keys.items()
        }
        self._long_endings = [index.long_endings for index in indexes]
        self._ids: NDArray[np.int64] | None = None
        self._files = _OpenFiles(self.shards)

    @property
    def lacks_captions(self) -> str:
        """What the samples have in place of captions."""
        if self._blocks.shape[1] > _CLASS:
            return "no captions, but classes (.cls)"
        return "no captions"

    def sample_id(self, position: int) -> int:
        """Stable id of one sample: its position, or its integer key."""
        return position if self._ids is None else int(self._ids[position])

    def use_keys_as_ids(self, keys: NDArray[np.int64], data_size: int) -> None:
        """Takes integer keys as sample ids.

        Args:
            keys: [samples] the keys; -1 for a key that is not an integer.
            data_size: upper bound of the keys.

        Raises:
            UserError: a key is out of bounds.
        """
        wrong = np.flatnonzero((keys < 0) | (keys >= data_size))
        if len(wrong):
            shard, key = self.locate(int(wrong[0]))
            raise UserError(
                f"{shard}: the key {key!r} is not a sample id: with data_size {data_size} keys "
                f"must be integers from 0 to {data_size - 1} ({len(wrong)} of {len(keys)} are "
                "not). Correct data_size, or leave it out to number the samples by position"
            )
        self._ids = keys

    def locate(self, position: int) -> tuple[Path, str]:
        """Shard and key of a sample."""
        column = _IMAGE if self._blocks[position, _IMAGE] else _CAPTION
        return self.shards[self._shard(position)], self._key_and_content(position, column)[0]

    def files(self) -> tuple[Path, ...]:
        """The shards."""
        return self.shards

    def _content(self, position: int) -> Sample[bytes]:
        if not self._blocks[position, _IMAGE]:
            raise Unusable("image_missing", "no image")
        key, image = self._key_and_content(position, _IMAGE)
        return self._described(position, key, image)

    def _texts(self, position: int) -> Sample[None]:
        return self._described(position, self.locate(position)[1], None)

    def _described(self, position: int, key: str, image: ImageT) -> Sample[ImageT]:
        """A sample with everything that the shard says of its image."""
        content = self._member(position, _CAPTION)
        if content is None and self._captions.required:
            raise Unusable("caption_missing", "no caption")
        captions = self._captions.in_file(content) if content is not None else NO_CAPTIONS
        record = self.record(position) if self._keys.names else {}
        return Sample(
            key,
            image,
            captions.texts,
            self._class_index(position),
            self._member(position, _METADATA),
            self._keys.read(record, captions.weights),
        )

    def record(self, position: int) -> Mapping[str, object]:
        """The values in the `.json` member of a sample, and that of its `.cls`.

        Raises:
            Unusable: a member is corrupt.
        """
        content = self._member(position, _RECORD)
        record = read_record(content) if content is not None else {}
        class_index = self._class_index(position)
        return record if class_index is None else {CLASS_FILE: class_index, **record}

    def _class_index(self, position: int) -> int | None:
        content = self._member(position, _CLASS)
        if content is None:
            return None
        number = whole_number(content.strip(), _CLASS_DIGITS)
        if number is None:
            raise Unusable("class", f"the .cls holds {content.strip()[:40]!r}, not a class index")
        return number

    def _member(self, position: int, column: int) -> bytes | None:
        """The content of a member, or None if the sample lacks it."""
        if self._blocks.shape[1] <= column or not self._blocks[position, column]:
            return None
        return self._bytes(position, column)

    def _key_and_content(self, position: int, column: int) -> tuple[str, bytes]:
        """The key of a member and its content, which directly follows the header."""
        data, shard = self._bytes(position, column, BLOCK), self._shard(position)
        try:
            path, _, _ = parse_header(data[:BLOCK])
        except ReadError as error:
            raise self._changed(position, str(error)) from error
        key = self._long_keys.get(position) or key_of(path, self._long_endings[shard], self._known)
        return key, data[BLOCK:]

    def _bytes(self, position: int, column: int, before: int = 0) -> bytes:
        """The content of a member, with `before` bytes in front of it."""
        start = int(self._blocks[position, column]) * BLOCK - before
        size = int(self._sizes[position, column]) + before
        try:
            data = self._files.read(self._shard(position), start, size)
        except OSError as error:
            raise self._changed(position, error.strerror or str(error)) from error
        if len(data) < size:
            raise self._changed(position, "it became shorter")
        return data

    def _changed(self, position: int, detail: str) -> SampleError:
        detail = f"changed or disappeared since it was indexed: {detail}"
        shard = str(self.shards[self._shard(position)])
        return SampleError(Damage(shard, "", "shard_changed", detail))

    def _shard(self, position: int) -> int:
        return self.layout.block(position)


_IMAGE, _CAPTION, _CLASS, _METADATA, _RECORD = range(5)  # columns of a ShardIndex


class _OpenFiles:
    """The shards that this process read last, kept open.

    Reads at an offset share no file position, so the handles survive a fork.
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
