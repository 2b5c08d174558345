"""Outcomes per sample, stored beside the results for comparisons between runs.

The difference of two runs on the same samples has less noise than either run; a paired bootstrap
over samples measures it. Imports no torch.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from neuclip.files import cannot_write, replacing
from neuclip.untrusted import DAMAGED_ARRAYS, read_file

_LARGEST = 2**27  # bytes, packed or not; 30 million samples

if TYPE_CHECKING:
    from torch import Tensor

Statistic = Literal["mean", "mean_of_groups", "worst_group", "macro_f1"]


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of a task's samples, and the statistic that the main metric is.

    Attributes:
        statistic: `mean` of the values; the mean or the worst of the groups' means; or the mean F1
            over the groups that occur, where values are the chosen groups.
        values: [samples] 1 if right and 0 if wrong, a score, or the chosen class.
        groups: [samples] class or group of each sample; 0 if the statistic has no groups.
    """

    statistic: Statistic
    values: NDArray[np.float32]
    groups: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.values)

    def evaluate(self) -> float:
        """The statistic over all samples."""
        weights = np.ones((1, len(self)))
        return float(weighted(self.statistic, self.values, self.groups, weights)[0])


def outcomes_of(statistic: Statistic, values: "Tensor", groups: "Tensor | None" = None) -> Outcomes:
    """Outcomes from tensors."""
    numbers = values.cpu().numpy().astype(np.float32)
    zeros = np.zeros(len(numbers), dtype=np.int32)
    return Outcomes(
        statistic, numbers, zeros if groups is None else groups.cpu().numpy().astype(np.int32)
    )


def weighted(
    statistic: Statistic,
    values: NDArray[np.float32],
    groups: NDArray[np.int32],
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The statistic under several weightings of the samples.

    Args:
        statistic: the statistic.
        values: [samples] values.
        groups: [samples] groups.
        weights: [draws, samples] multiplicity of each sample.

    Returns:
        [draws] the statistic under each weighting.
    """
    if statistic == "mean":
        return (weights @ values.astype(np.float64)) / weights.sum(axis=1)
    present, group = np.unique(groups, return_inverse=True)
    size = _sums(weights, group, len(present))
    occurs = size > 0
    if statistic == "macro_f1":
        chosen_place = np.searchsorted(present, values.astype(np.int32))
        known = np.isin(values.astype(np.int32), present)
        hits = _sums(weights * (values == groups), group, len(present))
        chosen = _sums(weights[:, known], chosen_place[known], len(present))
        score = 2 * hits / np.maximum(chosen + size, 1e-300)
    else:
        score = _sums(weights * values, group, len(present)) / np.maximum(size, 1e-300)
    if statistic == "worst_group":
        return np.where(occurs, score, np.inf).min(axis=1)
    return np.where(occurs, score, 0).sum(axis=1) / occurs.sum(axis=1)


def _sums(
    weights: NDArray[np.float64], group: NDArray[np.int64], number: int
) -> NDArray[np.float64]:
    """Sums of the weights of each group, [draws, groups]."""
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(number))
    full = np.zeros((len(weights), number))
    filled = np.bincount(group, minlength=number) > 0
    if filled.any():
        full[:, filled] = np.add.reduceat(weights[:, order], starts[filled], axis=1)
    return full


def write_outcomes(path: Path, outcomes: Outcomes) -> None:
    """Writes outcomes atomically; right and wrong take one bit per sample before compression.

    Raises:
        UserError: the file cannot be written.
    """
    values, groups = outcomes.values, outcomes.groups
    bits = bool(np.isin(values, (0, 1)).all()) and outcomes.statistic != "macro_f1"
    small = np.uint16 if len(groups) == 0 or groups.max() < 2**16 else np.int32
    try:
        with replacing(path) as file:
            np.savez_compressed(
                file,
                statistic=np.array(outcomes.statistic),
                samples=np.array(len(outcomes)),
                values=np.packbits(values.astype(np.uint8)) if bits else values,
                groups=groups.astype(small) if groups.any() else np.zeros(0, dtype=small),
            )
    except OSError as error:
        raise cannot_write(path, error) from None


def read_outcomes(path: Path) -> Outcomes | None:
    """Reads outcomes; none if the file is missing or corrupt."""
    try:
        content = io.BytesIO(read_file(path, _LARGEST))
        with zipfile.ZipFile(content) as archive:
            if sum(member.file_size for member in archive.infolist()) > _LARGEST:
                return None
        with np.load(content, allow_pickle=False) as stored:
            number, values, groups = int(stored["samples"]), stored["values"], stored["groups"]
            statistic = str(stored["statistic"])
    except DAMAGED_ARRAYS:
        return None
    if statistic not in get_args(Statistic):
        return None
    if not 0 <= number <= 8 * values.size or values.ndim != 1 or groups.ndim != 1:
        return None
    if values.dtype.kind not in "fiu" or groups.dtype.kind not in "iu":
        return None
    if values.dtype == np.uint8:
        values = np.unpackbits(values, count=number)
    if not len(groups):
        groups = np.zeros(number, dtype=np.int32)
    if len(values) != number or len(groups) != number:
        return None
    return Outcomes(statistic, values.astype(np.float32), groups.astype(np.int32))  # type: ignore[arg-type]
