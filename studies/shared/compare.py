"""Differences of runs that share a seed, with an interval."""

import math
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantiles of Student's t, by degrees of freedom, from 1."""

Scores = Mapping[Hashable, float]
"""Scores of one method by seed, or by what else its runs share with those of another."""


@dataclass(frozen=True)
class Difference:
    """A difference of means over common seeds.

    Attributes:
        value: the mean of the differences.
        half: half the width of the 95 % interval; None with one common seed.
        seeds: number of common seeds.
    """

    value: float
    half: float | None
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half is not None and abs(self.value) > self.half


def difference(one: Scores, other: Scores) -> Difference | None:
    """The difference of two methods at their common seeds; None if they have none.

    The interval is Student's t on the differences of equal seeds.
    """
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return None
    each = [one[seed] - other[seed] for seed in seeds]
    half = None
    if len(each) > 1:
        quantile = QUANTILES[min(len(each) - 1, len(QUANTILES)) - 1]
        half = quantile * statistics.stdev(each) / math.sqrt(len(each))
    return Difference(statistics.mean(each), half, len(each))


def in_points(found: Difference) -> str:
    """A difference in points of percent: `+1.2 ± 0.8`, or without an interval at one seed."""
    text = f"{100 * found.value:+.1f}"
    if found.half is None:
        return text
    text = f"{text} ± {100 * found.half:.1f}"
    return f"**{text}**" if found.clear else text
