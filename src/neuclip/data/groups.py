"""Which samples share a caption, an image or a label, and so are false negatives of each other.

A batch carries the ids of its samples (`Batch.groups`). For a whole source, `read_groups` reads
them once and keeps them in the cache folder, and `components` joins samples that share anything,
directly or through others. A split of the data by component leaks nothing:

    groups = read_groups(source, reading)
    component = components(groups, kinds=("caption", "image"))  # [samples], equal: keep together

The ids of captions and labels are digests of the text in lower case with single spaces, which is
all that CLIP's tokenizer sees. The id of an image is a digest of its file.
"""

import contextlib
import hashlib
import logging
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.progress import Progress
from neuclip.data.remote.remote_shards import RemoteShards
from neuclip.data.samples import Sample, SampleError
from neuclip.data.sources.source import Source, content_digest
from neuclip.errors import UserError, printable, quantity
from neuclip.files import cache_home, replacing
from neuclip.untrusted import open_regular

GroupKind = Literal["caption", "image", "label"]
KINDS: tuple[GroupKind, ...] = ("caption", "image", "label")
"""The columns of `Batch.groups`, in order."""

NO_GROUP = 0
_FORMAT = 1
_AHEAD = 2  # blocks announced ahead of reading
_LABELS = 1000  # samples whose labels are looked at
_MOST_IDS = 64  # memberships per sample that a file in the cache may claim
_log = logging.getLogger("neuclip")

Ids = NDArray[np.int64]


def text_id(text: str) -> int:
    """The id of a caption or label: a signed 64-bit number; 0 for an empty one."""
    text = " ".join(text.casefold().split())
    if not text:
        return NO_GROUP
    return _id(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest())


def image_id(content: bytes) -> int:
    """The id of an image file: a signed 64-bit number other than 0."""
    return _id(hashlib.sha256(content).digest())


def _id(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True) or 1  # 0: no group


class Memberships(NamedTuple):
    """Which samples belong to which groups of one kind; a sample may belong to several or none.

    Attributes:
        samples: [memberships] positions of the samples in the source, ascending.
        ids: [memberships] ids of the groups, not 0.
    """

    samples: Ids
    ids: Ids


@dataclass(frozen=True)
class Groups:
    """The groups of all samples of a source.

    Attributes:
        samples: number of samples.
        by_kind: memberships of each kind that was read; a sample has an id for each caption.
        unreadable: number of corrupt samples, which belong to no group; of a part, that of all.
    """

    samples: int
    by_kind: Mapping[GroupKind, Memberships]
    unreadable: int = 0

    def part(self, positions: Ids) -> "Groups":
        """The groups of some samples, under new positions.

        Args:
            positions: [samples] the samples, ascending.
        """
        new = np.full(self.samples, -1, dtype=np.int64)
        new[positions] = np.arange(len(positions))
        found: dict[GroupKind, Memberships] = {}
        for kind, members in self.by_kind.items():
            places = new[members.samples]
            found[kind] = Memberships(places[places >= 0], members.ids[places >= 0])
        return Groups(len(positions), found, self.unreadable)


def read_groups(
    source: Source,
    reading: ReadingConfig,
    kinds: Collection[GroupKind] = KINDS,
    progress: Progress | None = None,
) -> Groups:
    """The groups of a source, from the cache folder or by reading every sample once.

    Without images only texts are read, which is fast for tables and shards.

    Args:
        source: the source, opened with `reading`.
        reading: how it was opened; names the label key. Labels are read if there is one.
        kinds: what to read.
        progress: called every hundred samples.
    """
    wanted: list[GroupKind] = [
        kind for kind in KINDS if kind in kinds and (kind != "label" or reading.label_key)
    ]
    place = cache_home() / "groups" / f"{_identity(source, reading, wanted)}.npz"
    found = _load(place, len(source), wanted)
    if found is None:
        found = _read(source, wanted, progress)
        try:
            _save(place, found)
        except OSError as error:
            _log.info("%s cannot be written: the groups will be read again (%s)", place, error)
    if found.unreadable:
        _log.warning(
            "%s: no duplicates are looked for among them",
            quantity(found.unreadable, "corrupt sample"),
        )
    return found


def _read(source: Source, kinds: Sequence[GroupKind], progress: Progress | None) -> Groups:
    samples: dict[GroupKind, list[int]] = {kind: [] for kind in kinds}
    ids: dict[GroupKind, list[int]] = {kind: [] for kind in kinds}
    unreadable, block = 0, -1
    for position in range(len(source)):
        if progress is not None and position % 100 == 0:
            progress("looking for duplicates", position, len(source))
        if (now := source.layout.block(position)) != block:
            block = now
            source.expect(range(block, min(block + _AHEAD, len(source.layout.ends))))
        try:
            sample = (
                source.read_with(position, image_id) if "image" in kinds else source.texts(position)
            )
        except SampleError:
            unreadable += 1
            continue
        for kind in kinds:
            own = _ids_of(sample, kind)
            samples[kind] += [position] * len(own)
            ids[kind] += own
    found: dict[GroupKind, Memberships] = {
        kind: Memberships(
            np.array(samples[kind], dtype=np.int64), np.array(ids[kind], dtype=np.int64)
        )
        for kind in kinds
    }
    return Groups(len(source), found, unreadable)


def _ids_of(sample: Sample[int] | Sample[None], kind: GroupKind) -> list[int]:
    """The ids of one kind that a sample has."""
    if kind == "image":
        return [] if sample.image is None else [sample.image]
    texts = sample.captions if kind == "caption" else (sample.annotations.label,)
    return [found for found in dict.fromkeys(map(text_id, texts)) if found != NO_GROUP]


def components(groups: Groups, kinds: Collection[GroupKind] = KINDS) -> Ids:
    """[samples] The component of each sample, as the first sample in it.

    Samples of one group are in one component, and so are groups that share a sample.

    Args:
        groups: the groups of a source.
        kinds: the kinds that count, of those that were read.
    """
    roots = np.arange(groups.samples, dtype=np.int64)
    shared = [_of_several(groups.by_kind[kind]) for kind in kinds if kind in groups.by_kind]
    shared = [each for each in shared if len(each.ids)]
    while True:
        before = roots.copy()
        for members, starts in map(_sorted, shared):
            own = roots[members]
            least = np.repeat(
                np.minimum.reduceat(own, starts), np.diff(np.append(starts, len(own)))
            )
            # Hook each root below the least root that it shares a group with.
            np.minimum.at(roots, own, least)
            roots = compressed(roots)
        if np.array_equal(before, roots):
            return roots


def _of_several(members: Memberships) -> Memberships:
    """The memberships in groups of more than one sample."""
    _, inverse, counts = np.unique(members.ids, return_inverse=True, return_counts=True)
    several = counts[inverse] > 1
    return Memberships(members.samples[several], members.ids[several])


def _sorted(members: Memberships) -> tuple[Ids, Ids]:
    """The samples sorted by group, and where each group starts."""
    order = np.argsort(members.ids, kind="stable")
    ids = members.ids[order]
    starts = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
    return members.samples[order], starts


def compressed(roots: Ids) -> Ids:
    """Every sample points at the root of its tree, if it pointed at a sample above it."""
    while not np.array_equal(above := roots[roots], roots):
        roots = above
    return roots


def check_labels(source: Source, label_key: str) -> None:
    """Looks at the labels of many samples, spread over a source, before they are used.

    Remote shards are not looked at: they would all be downloaded.

    Args:
        source: the source, opened with the label key.
        label_key: for messages.

    Raises:
        UserError: all labels are equal, so that no pair would have a negative.
    """
    if isinstance(source, RemoteShards):
        return
    labels: list[str] = []
    for position in sorted(set(np.linspace(0, len(source) - 1, _LABELS).astype(int).tolist())):
        with contextlib.suppress(SampleError):
            labels.append(source.texts(position).annotations.label)
    if not labels:
        return
    given = [label for label in labels if label]
    kinds, tried = len(set(map(text_id, given))), quantity(len(labels), "sample")
    if len(given) == len(labels) > 1 and kinds == 1:
        raise UserError(
            f"--label-key {label_key}: {tried} tried all have the label "
            f"'{printable(given[0], 40)}', so every pair would be a false negative of every other: "
            "name a column whose values differ, or leave --label-key out"
        )
    if kinds == len(given):
        what = f"the labels of {tried} tried all differ" if given else f"{tried} tried have none"
        _log.warning("--label-key %s: %s: labels join few pairs or none", label_key, what)


# The file in the cache folder ---------------------------------------------------------------------


def _identity(source: Source, reading: ReadingConfig, kinds: Sequence[GroupKind]) -> str:
    """Digest of the files of a source and of the settings that decide what is read from them."""
    settings = reading.model_dump_json(include=set(_SETTINGS))
    content = f"{_FORMAT} {' '.join(kinds)} {settings} {content_digest(source)}"
    return hashlib.sha256(content.encode()).hexdigest()[:32]


_SETTINGS = (
    "caption_key", "caption_key_probs", "caption_keys", "csv_caption_key", "csv_img_key",
    "csv_separator", "data_format", "image_key", "label_key", "text_key",
)  # fmt: skip


def _save(place: Path, groups: Groups) -> None:
    arrays = {
        f"{kind}_{name}": array
        for kind, members in groups.by_kind.items()
        for name, array in members._asdict().items()
    }
    with replacing(place, durable=False) as file:
        np.savez(file, unreadable=np.array(groups.unreadable), **arrays)


def _load(place: Path, samples: int, kinds: Sequence[GroupKind]) -> Groups | None:
    """The groups in a file; none if it is missing or damaged."""
    try:
        with open_regular(place) as file, np.load(file, allow_pickle=False) as stored:
            if sum(each.file_size for each in stored.zip.infolist()) > _largest(samples):
                return None
            found: dict[GroupKind, Memberships] = {
                kind: _memberships(stored, kind, samples) for kind in kinds
            }
            return Groups(samples, found, int(stored["unreadable"]))
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError):
        return None  # changed: what numpy and zipfile raise depends on the byte


def _largest(samples: int) -> int:
    return 2**20 + samples * _MOST_IDS * len(KINDS) * 16


def _memberships(stored: Mapping[str, NDArray[np.int64]], kind: str, samples: int) -> Memberships:
    found = Memberships(stored[f"{kind}_samples"], stored[f"{kind}_ids"])
    for array in found:
        if array.dtype != np.int64 or array.shape != found.ids.shape or array.ndim != 1:
            raise ValueError(f"{array.dtype} {array.shape}")
    if len(found.samples) and not 0 <= found.samples.min() <= found.samples.max() < samples:
        raise ValueError("a sample that does not exist")
    return found
