"""Exact search: the similarity of a query with every image, and the best of them."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from neuclip.embedding.stored_images import StoredImages

_CONVERTED = 2**14  # rows of float16 that are converted to float32 at a time


class Nearest(NamedTuple):
    """Images near a query, best first; equal scores in the order of the images.

    Attributes:
        rows: [hits] numbers of the images.
        scores: [hits] dot products with the query.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


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
        among: Bool[np.ndarray, " images"] | None = None,
    ) -> Nearest:
        """The images of the highest dot products with a query.

        Args:
            query: float32, on the CPU.
            number: number of images; fewer if there are fewer.
            among: whether an image may be found; if none, all may.

        Raises:
            UserError: a file of the features was cut.
        """
        scores = torch.empty(len(self._images))
        for start, rows in self._images.blocks():
            _products(torch.from_numpy(rows), query, scores[start : start + len(rows)])
        if among is not None:
            scores[torch.from_numpy(~among)] = -torch.inf
            number = min(number, int(among.sum()))
        best = scores.topk(min(number, len(scores)), sorted=False)
        return ranked(best.indices.numpy(), best.values.numpy())


def ranked(rows: NDArray[np.int64], scores: NDArray[np.float32]) -> Nearest:
    """Images by score, best first; equal scores in the order of the images."""
    order = np.lexsort((rows, -scores))
    return Nearest(rows[order], scores[order])


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
