"""Confidence intervals of the difference of two methods: paired bootstrap (percentiles, 95 %).

If all runs keep the outcome of every sample, samples are resampled: a draw takes the same samples
for all runs. Samples with equal outcomes in all runs form a cell, and a draw is a multinomial draw
of the cells' counts: the same distribution at a fraction of the cost. Otherwise, tasks are
resampled.
"""

import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neuclip.evaluation.outcomes import Outcomes, weighted

DRAWS = 2000
_LEVELS = (2.5, 97.5)
_AT_ONCE = 2**22  # weights in memory at a time

Draws = NDArray[np.float64]
Over = Literal["samples", "tasks"]


@dataclass(frozen=True)
class Difference:
    """A difference to the baseline, with its interval.

    Attributes:
        value: this method's score minus the baseline's.
        low: lower end of the interval; none without an interval.
        high: upper end.
        over: what the bootstrap resampled.
        seeds_agree: whether every seed of one method is above every seed of the other, with at
            least two seeds each.
    """

    value: float
    low: float | None = None
    high: float | None = None
    over: Over | None = None
    seeds_agree: bool = False

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0 and the seeds agree on the sign."""
        excludes = self.low is not None and self.high is not None and self.low * self.high > 0
        return excludes and self.seeds_agree


def over_samples(
    ours: Sequence[Outcomes | None], theirs: Sequence[Outcomes | None], key: str
) -> Draws | None:
    """Draws of the difference of the means over runs; none if a run has no outcomes.

    Args:
        ours: outcomes of each run (seed) of a method.
        theirs: outcomes of each run of the baseline.
        key: seeds the random numbers.
    """
    known = [outcomes for outcomes in (*ours, *theirs) if outcomes is not None]
    if len(known) < len(ours) + len(theirs) or not known or not len(known[0]):
        return None
    first = known[0]
    if any(
        o.statistic != first.statistic or not np.array_equal(o.groups, first.groups) for o in known
    ):
        return None  # different samples: not paired
    columns = np.stack([first.groups.astype(np.float64), *(o.values for o in known)])
    cells, counts = np.unique(columns, axis=1, return_counts=True)
    groups = cells[0].astype(np.int32)
    values = [row.astype(np.float32) for row in cells[1:]]
    random = np.random.default_rng(zlib.crc32(key.encode()))
    share = counts / counts.sum()
    part = max(1, _AT_ONCE // len(counts))
    found: list[Draws] = []
    for start in range(0, DRAWS, part):
        size = min(part, DRAWS - start)
        weights = random.multinomial(len(first), share, size=size).astype(np.float64)
        each = [weighted(first.statistic, value, groups, weights) for value in values]
        found.append(np.mean(each[: len(ours)], axis=0) - np.mean(each[len(ours) :], axis=0))
    return np.concatenate(found)


def over_tasks(differences: Sequence[float], key: str) -> Draws | None:
    """Draws of the mean of the tasks' differences; none for a single task."""
    if len(differences) < 2:
        return None
    random = np.random.default_rng(zlib.crc32(key.encode()))
    chosen = random.integers(len(differences), size=(DRAWS, len(differences)))
    return np.asarray(differences)[chosen].mean(axis=1)


def difference(
    ours: Sequence[float], theirs: Sequence[float], draws: Draws | None, over: Over
) -> Difference:
    """The difference of two means over seeds, with the interval from its draws.

    Args:
        ours: scores of a method, one per seed.
        theirs: scores of the baseline, one per seed.
        draws: draws of the difference; none: no interval.
        over: what the bootstrap resampled.
    """
    value = statistics.fmean(ours) - statistics.fmean(theirs)
    apart = min(ours) > max(theirs) or max(ours) < min(theirs)
    agree = apart and min(len(ours), len(theirs)) > 1
    if draws is None:
        return Difference(value, seeds_agree=agree)
    low, high = np.percentile(draws, _LEVELS)
    return Difference(value, float(low), float(high), over, agree)
