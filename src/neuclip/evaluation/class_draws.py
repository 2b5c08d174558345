"""Draws of samples class by class: a few images of each class, and a share to hold out.

A draw is a function of the classes and the seed.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

_PURPOSE = 0x9806E  # a stream of its own: other draws take the same seeds


class Halves(NamedTuple):
    """Rows to fit to, and rows that are held out; both ascending."""

    fitted: Int64[Tensor, " fitted"]
    held_out: Int64[Tensor, " held"]


def draw_shots(
    classes: Int64[Tensor, " samples"], shots: int, seed: int
) -> Int64[Tensor, " drawn"]:
    """Rows of at most `shots` samples of each class, ascending; fewer where a class has fewer.

    Args:
        classes: class of each sample.
        shots: samples per class.
        seed: of the draw.
    """
    place, _ = _random_places(classes, seed)
    return torch.from_numpy(np.flatnonzero(place < shots))


def hold_out_by_class(classes: Int64[Tensor, " samples"], share: float, seed: int) -> Halves:
    """Holds out a share of each class: at least one sample of two, and none of a single one.

    Args:
        classes: class of each sample.
        share: the share, above 0 and below 1.
        seed: of the draw.
    """
    place, size = _random_places(classes, seed)
    wanted = np.clip(np.round(share * size), 1, np.maximum(size - 1, 0))
    held = place < wanted
    return Halves(torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held)))


def _random_places(
    classes: Int64[Tensor, " samples"], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place of each sample in a random order of its class, and the size of its class."""
    numbers = classes.cpu().numpy()
    # Raw bits instead of Generator.permutation: numpy guarantees them across versions.
    bits = np.random.PCG64(np.random.SeedSequence([seed, _PURPOSE])).random_raw(len(numbers))
    order = np.lexsort((bits, numbers))
    _, starts, sizes = np.unique(numbers[order], return_index=True, return_counts=True)
    place = np.empty(len(numbers), np.int64)
    place[order] = np.arange(len(numbers)) - np.repeat(starts, sizes)
    size = np.empty(len(numbers), np.int64)
    size[order] = np.repeat(sizes, sizes)
    return place, size
