"""Compares drawings by their outlines: without colours, place and size.

The sums are of whole numbers, so they are exact in any order. Which drawing is the nearest, and
which are too similar, is then the same on every processor.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 16
"""Width and height of an outline in pixels."""

Outlines = NDArray[np.uint8]
"""[drawings, SIDE * SIDE] grey levels; all zeros for a drawing that is empty."""

_LEAST_CONTRAST, _LEAST_PIXELS = 24, 12
_ROWS, _COLUMNS = 8192, 2048  # of a block of correlations


def outline(rgb: NDArray[np.uint8], background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The outline of a drawing, [SIDE * SIDE].

    Args:
        rgb: the drawing, [height, width, 3].
        background: its colour, which counts as empty.
    """
    ink = np.abs(rgb.astype(np.int16) - np.array(background, np.int16)).mean(2)
    darkest = ink.max()
    if darkest < _LEAST_CONTRAST or (ink > 0.3 * darkest).sum() < _LEAST_PIXELS:
        return np.zeros(SIDE * SIDE, np.uint8)
    ink = ink * (255 / darkest)
    rows, columns = np.flatnonzero(ink.max(1) > 40), np.flatnonzero(ink.max(0) > 40)
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(cut.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    small = Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)


def nearest(queries: Outlines, others: Outlines) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The most similar of other drawings for each query, the first of equals.

    Returns:
        Pearson correlation with it, and its position; -1 and 0 if there are no others.
    """
    a, a_norm = _centred(queries)
    best = np.full(len(a), -1.0)
    place = np.zeros(len(a), np.int64)
    for start in range(0, len(others), _ROWS):
        b, b_norm = _centred(others[start : start + _ROWS])
        for at in range(0, len(a), _COLUMNS):
            rows = slice(at, at + _COLUMNS)
            found = a[rows] @ b.T
            found /= b_norm
            top = found.argmax(1)
            value = found[np.arange(len(top)), top] / a_norm[rows]
            better = value > best[rows]
            best[rows][better] = value[better]
            place[rows][better] = start + top[better]
    return best, place


def distinct(groups: Iterable[Sequence[int]], outlines: Outlines, limit: float) -> list[int]:
    """The drawings that are left when none is too similar to an earlier one of its group.

    Args:
        groups: positions of drawings, those to be kept first.
        outlines: of all drawings.
        limit: correlation from which two drawings count as one.

    Returns:
        Positions in ascending order.
    """
    kept: list[int] = []
    for members in groups:
        vectors, norms = _centred(outlines[list(members)])
        chosen: list[int] = []
        for number, vector in enumerate(vectors):
            similar = vectors[chosen] @ vector / (norms[chosen] * norms[number])
            if not (similar >= limit).any():
                chosen.append(number)
        kept += [members[number] for number in chosen]
    return sorted(kept)


def floor_top1(
    members: Sequence[int],
    train: Sequence[int],
    outlines: Outlines,
    concept: Callable[[int], str],
) -> float | None:
    """Top-1 accuracy without learning: the concept of the most similar training picture.

    Args:
        members: positions of the pictures to classify, over their own concepts.
        train: positions of the training pictures.
        outlines: of all pictures.
        concept: of a picture.

    Returns:
        None if no training picture shows one of the concepts.
    """
    classes = {concept(member) for member in members}
    known = [at for at in train if concept(at) in classes]
    if not known:
        return None
    _, place = nearest(outlines[list(members)], outlines[known])
    right = [
        concept(member) == concept(known[found])
        for member, found in zip(members, place.tolist(), strict=True)
    ]
    return round(sum(right) / len(right), 4)


def _centred(outlines: Outlines) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Outlines without their mean, times their size, and their norms.

    The entries are whole numbers of at most 2^16. A sum of products of two rows is one of at most
    2^40, which float64 holds exactly. An even outline has norm 1, and so correlation 0.
    """
    grey = outlines.astype(np.float64)
    centred = SIDE * SIDE * grey - grey.sum(1, keepdims=True)
    return centred, np.sqrt(np.maximum((centred * centred).sum(1), 1))
