"""Exact search: the similarity of a query with every image, and the best of them."""

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from neuclip.embedding.stored_images import StoredImages

_CONVERTED = 2**14  # rows of float16 that are converted to float32 at a time
_FEW = 8  # below one image in so many, the rows of those asked for are read alone


class Nearest(NamedTuple):
    """Images near a query, best first; equal scores in the order of the images.

    Attributes:
        rows: [hits] numbers of the images.
        scores: [hits] dot products with the query.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


@runtime_checkable
class NearestSearch(Protocol):
    """Finds the images of the highest dot products with a query."""

    def nearest(self, query: Float[Tensor, " dim"], number: int) -> Nearest:
        """The best images, best first.

        Args:
            query: float32, on the CPU.
            number: number of images; fewer if there are fewer.

        Raises:
            UserError: a file of the features was cut.
        """
        ...


class ExactSearch:
    """Compares a query with all images, in float32.

    Args:
        images: the images.
    """

    def __init__(self, images: StoredImages) -> None:
        self._images = images

    def nearest(
        self,
        query: Float[Tensor, " dim"],
        number: int,
        among: Int64[np.ndarray, " rows"] | None = None,
    ) -> Nearest:
        """As `NearestSearch`, of all images or of some.

        Args:
            query: float32, on the CPU.
            number: number of images; fewer if there are fewer.
            among: rows that may be found, ascending; if none, all may.

        Raises:
            UserError: a file of the features was cut.
        """
        if among is None:
            return _best(self._scores(query), None, number)
        if _FEW * len(among) < len(self._images):
            return rescored(self._images, query, among, number)
        return _best(self._scores(query)[torch.from_numpy(among)], among, number)

    def _scores(self, query: Float[Tensor, " dim"]) -> Float[Tensor, " images"]:
        scores = torch.empty(len(self._images))
        for start, rows in self._images.blocks():
            _products(torch.from_numpy(rows), query, scores[start : start + len(rows)])
        return scores


def rescored(
    images: StoredImages,
    query: Float[Tensor, " dim"],
    rows: Int64[np.ndarray, " rows"],
    number: int,
) -> Nearest:
    """The best of a few images, which alone are read.

    Args:
        images: the images.
        query: float32, on the CPU.
        rows: numbers of the few, ascending.
        number: number of images.
    """
    return _best(torch.from_numpy(images.features(rows)) @ query, rows, number)


def _best(
    scores: Float[Tensor, " some"], rows: Int64[np.ndarray, " some"] | None, number: int
) -> Nearest:
    best = scores.topk(min(number, len(scores)), sorted=False)
    values, found = best.values.numpy(), best.indices.numpy()
    found = found if rows is None else rows[found]
    order = np.lexsort((found, -values))
    return Nearest(found[order], values[order])


def _products(
    rows: Float[Tensor, "rows dim"], query: Float[Tensor, " dim"], out: Float[Tensor, " rows"]
) -> None:
    if rows.dtype == torch.float32:
        torch.mv(rows, query, out=out)
        return
    buffer = torch.empty(min(_CONVERTED, len(rows)), rows.shape[1])
    for piece, place in zip(rows.split(_CONVERTED), out.split(_CONVERTED), strict=True):
        converted = buffer[: len(piece)]
        converted.copy_(piece)
        torch.mv(converted, query, out=place)
