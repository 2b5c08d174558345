"""CLIP scores: the cosine similarity of each image with its first caption."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32
from numpy.typing import NDArray

from neuclip.embedding.embedding_store import EmbeddingStore
from neuclip.errors import UserError


@dataclass(frozen=True)
class PairScores:
    """The scores of the pairs of a source.

    Attributes:
        positions: position of each pair in the source.
        keys: the keys.
        captions: the first captions.
        scores: cosine similarities.
    """

    positions: NDArray[np.int64]
    keys: list[str]
    captions: list[str]
    scores: Float32[np.ndarray, " pairs"]

    def __len__(self) -> int:
        return len(self.keys)

    def kept_by(
        self, threshold: float | None, fraction: float | None
    ) -> tuple[Bool[np.ndarray, " pairs"], float]:
        """Which pairs a filter keeps, and the lowest score that it keeps.

        Args:
            threshold: keep scores of at least this.
            fraction: keep this share of the pairs, the best ones; equal scores stay together.
        """
        if fraction is not None:
            number = max(1, int(fraction * len(self)))
            threshold = float(np.partition(self.scores, len(self) - number)[len(self) - number])
        assert threshold is not None
        return self.scores >= np.float32(threshold), threshold

    def worst(self, number: int) -> list[int]:
        """Rows of the lowest scores, lowest first."""
        return np.argsort(self.scores, kind="stable")[:number].tolist()

    def histogram(self, bins: int = 20) -> Iterator[tuple[float, float, int]]:
        """Start, end and number of pairs of equal intervals between the extremes."""
        counts, edges = np.histogram(self.scores, bins)
        yield from zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)


def pair_scores(store: EmbeddingStore) -> PairScores:
    """Computes the scores from embeddings, in float32 and one shard at a time.

    Raises:
        UserError: the embeddings have no captions, or are not complete.
    """
    if not store.manifest.texts:
        raise UserError(
            f"{store.folder} has no features of captions: embed again with --enable-text"
        )
    positions: list[NDArray[np.int64]] = []
    scores: list[NDArray[np.float32]] = []
    keys: list[str] = []
    captions: list[str] = []
    for shard in store.shards():
        assert shard.texts is not None
        products = shard.images.astype(np.float32) * shard.texts.astype(np.float32)
        scores.append(products.sum(axis=1))
        positions.append(shard.positions)
        keys += shard.keys
        captions += shard.captions
    return PairScores(np.concatenate(positions), keys, captions, np.concatenate(scores))
