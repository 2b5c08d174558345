"""The images of a complete folder of embeddings: mapped features, with keys and captions."""

import hashlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray

from neuclip.data.progress import Progress
from neuclip.data.sources.source import Texts
from neuclip.embedding.embedding_store import EmbeddingStore
from neuclip.embedding.mapped_array import MappedArray
from neuclip.embedding.shard_files import EmbeddedShard, Rows
from neuclip.errors import UserError, quantity

_NORM_ERROR = 0.01  # float16 moves a norm by up to 0.0005
_OTHER_FILES = 256  # that a process has open besides


@dataclass(frozen=True)
class StoredImages:
    """Unit-norm features of images on disk, with keys and captions in memory.

    Attributes:
        positions: [images] position of each image in the source, ascending.
        keys: the images' keys.
        captions: their first captions.
        dim: dimension of the features.
        digest: SHA-256 of positions and features.
        parts: the features shard by shard: mapped, or in memory where the shard is a table.
        starts: [shards + 1] first row of each shard, and the number of images.
    """

    positions: NDArray[np.int64]
    keys: Texts
    captions: Texts
    dim: int
    digest: str
    parts: list[MappedArray | Rows]
    starts: Int64[np.ndarray, " bounds"]

    @classmethod
    def open(cls, store: EmbeddingStore, progress: Progress | None = None) -> "StoredImages":
        """Reads a folder once, checks it, and maps its features.

        Args:
            store: the folder.
            progress: called with the shards read.

        Raises:
            UserError: a shard is missing or damaged, or holds rows that are not of unit norm.
        """
        store.require_complete()
        if store.manifest.form == "npy":
            _allow_open_files(store)
        digest = hashlib.sha256(f"{store.manifest.dtype} {store.manifest.dim}".encode())
        keys, captions = Texts(), Texts()
        positions: list[NDArray[np.int64]] = []
        parts: list[MappedArray | Rows] = []
        for number in range(store.num_shards):
            shard = store.read(number)
            _check(store, number, shard)
            digest.update(shard.positions.tobytes())
            digest.update(np.ascontiguousarray(shard.images).data)
            positions.append(shard.positions)
            for texts, new in ((keys, shard.keys), (captions, shard.captions)):
                for text in new:
                    texts.append(text)
            # Torch warns of arrays that cannot be written to, such as Arrow's.
            parts.append(store.mapped(number) or np.require(shard.images, requirements="W"))
            if progress is not None:
                progress("reading features", number + 1, store.num_shards)
        starts = np.cumsum([0, *map(len, positions)])
        joined = np.concatenate(positions)
        return cls(joined, keys, captions, store.manifest.dim, digest.hexdigest(), parts, starts)

    def __len__(self) -> int:
        return len(self.positions)

    def blocks(self) -> Iterator[tuple[int, Rows]]:
        """The features shard by shard, each with its first row.

        Raises:
            UserError: a file was cut since it was opened.
        """
        for start, part in zip(self.starts[:-1].tolist(), self.parts, strict=True):
            if isinstance(part, MappedArray):
                part.check()
                yield start, part.rows
            else:
                yield start, part

    def features(self, rows: NDArray[np.int64]) -> Float32[np.ndarray, "rows dim"]:
        """The features of some images, in float32.

        Args:
            rows: numbers of the images, ascending.

        Raises:
            UserError: a file was cut since it was opened.
        """
        found = np.empty((len(rows), self.dim), np.float32)
        ends = np.searchsorted(rows, self.starts[1:]).tolist()
        first = 0
        for (start, part), last in zip(self.blocks(), ends, strict=True):
            found[first:last] = part[rows[first:last] - start]
            first = last
        return found

    def row_of(self, position: int) -> int | None:
        """The row of an image by its position in the source; none if it has no features."""
        row = int(np.searchsorted(self.positions, position))
        return row if row < len(self) and self.positions[row] == position else None


def _allow_open_files(store: EmbeddingStore) -> None:
    """Raises the limit on open files if need be: a mapped file stays open.

    Raises:
        UserError: it cannot be raised so far.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = store.num_shards + _OTHER_FILES
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
    except (OSError, ValueError, OverflowError):
        raise UserError(
            f"{store.folder} has {quantity(store.num_shards, 'shard')}, more files than a process "
            "may open here: raise the limit (ulimit -Hn), or embed again with a larger "
            "--shard-samples"
        ) from None


def _check(store: EmbeddingStore, number: int, shard: EmbeddedShard) -> None:
    """Checks what a search relies on.

    Raises:
        UserError: positions are not those of the shard, or a feature is not of unit norm.
    """
    squares = np.einsum("ij,ij->i", shard.images, shard.images, dtype=np.float32)
    wrong = int((~(np.abs(np.sqrt(squares) - 1) <= _NORM_ERROR)).sum())  # NaN is wrong, too
    if wrong:
        raise store.damaged(number, f"{quantity(wrong, 'row')} not of unit norm")
    places, own = shard.positions, store.positions(number)
    if len(places) and (places[0] < own[0] or places[-1] > own[-1] or (np.diff(places) <= 0).any()):
        raise store.damaged(number, "positions of another shard")
