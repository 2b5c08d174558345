"""Groups of images that are nearly the same, by their features.

Two images are near duplicates if the cosine similarity of their features reaches a threshold.
Groups are the connected components of that relation. All pairs are compared, block by block: time
grows with the square of the number of images, and memory is bounded by two shards and one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from neuclip.data.groups import compressed
from neuclip.data.progress import Progress
from neuclip.embedding.embedding_store import EmbeddingStore

EXACT = 0.9995
"""Similarity from which on features are the same up to rounding, in float16 too."""
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class NearDuplicates:
    """The groups of the images of a folder of embeddings.

    Attributes:
        groups: row of the first image of each image's group; its own row if it is alone.
        similarity: of each image with its nearest duplicate; 0 if it has none.
        positions: position of each image in the source.
        keys: keys of the images.
        captions: their first captions.
    """

    groups: Int64[np.ndarray, " images"]
    similarity: Float32[np.ndarray, " images"]
    positions: NDArray[np.int64]
    keys: list[str]
    captions: list[str]

    def first_of_groups(self) -> NDArray[np.bool_]:
        """Whether an image is the first of its group: a set without duplicates."""
        return self.groups == np.arange(len(self.groups))

    @property
    def several(self) -> NDArray[np.bool_]:
        """Whether an image has a duplicate."""
        return np.bincount(self.groups, minlength=len(self.groups))[self.groups] > 1


def near_duplicates(
    store: EmbeddingStore,
    threshold: float,
    device: torch.device,
    progress: Progress | None = None,
) -> NearDuplicates:
    """Compares all pairs of images.

    Args:
        store: the embeddings.
        threshold: similarity of duplicates, above 0.
        device: where to compare.
        progress: called with the pairs of shards compared.

    Raises:
        UserError: the embeddings are not complete.
    """
    store.require_complete()
    sizes = store.rows()
    starts = np.cumsum([0, *sizes])
    positions: list[NDArray[np.int64]] = []
    keys: list[str] = []
    captions: list[str] = []

    def features(shard: int) -> Float[Tensor, "images dim"]:
        content = store.read(shard)
        if shard == len(positions):  # the pairs of the first shard go over all shards in order
            positions.append(content.positions)
            keys.extend(content.keys)
            captions.extend(content.captions)
        return torch.from_numpy(content.images.astype(np.float32)).to(device)

    groups = np.arange(starts[-1])
    similarity = np.zeros(starts[-1], np.float32)
    pairs = [(one, two) for one in range(len(sizes)) for two in range(one, len(sizes))]
    loaded: tuple[int, Tensor] | None = None
    for done, (one, two) in enumerate(pairs):
        if progress is not None:
            progress("comparing", done, len(pairs))
        if loaded is None or loaded[0] != one:
            loaded = one, features(one)
        first = loaded[1]
        second = first if two == one else features(two)
        for row, column, values in _hits(first, second, threshold, same=one == two):
            rows, columns = row + starts[one], column + starts[two]
            groups = _joined(groups, rows, columns)
            np.maximum.at(similarity, rows, values)
            np.maximum.at(similarity, columns, values)
    return NearDuplicates(groups, similarity, np.concatenate(positions), keys, captions)


def _hits(
    first: Float[Tensor, "first dim"], second: Float[Tensor, "second dim"], threshold: float,
    *, same: bool,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]:  # fmt: skip
    """Rows, columns and similarities of duplicates; of one block with itself, each pair once."""
    for start in range(0, len(first), _ROWS_AT_ONCE):
        found = first[start : start + _ROWS_AT_ONCE] @ second.T
        if same:
            found = found.triu(diagonal=1 + start)  # zeros below never reach the threshold
        rows, columns = (found >= threshold).nonzero(as_tuple=True)
        if len(rows):
            values = found[rows, columns].cpu().numpy()
            yield rows.cpu().numpy() + start, columns.cpu().numpy(), values


def _joined(
    groups: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The groups after each row was joined with its column; a group's number is its least row."""
    while True:
        one, two = groups[rows], groups[columns]
        if np.array_equal(one, two):
            return groups
        least = np.minimum(one, two)
        np.minimum.at(groups, one, least)
        np.minimum.at(groups, two, least)
        groups = compressed(groups)
