"""Comparisons of methods by paired seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from studies.shared.compare import Scores


def best_other(method: str, scores: Mapping[str, Scores]) -> str | None:
    """The other method with the highest mean, over its own seeds; None if there is none."""
    others: Sequence[str] = [name for name in scores if name != method and scores[name]]
    means = {name: statistics.mean(scores[name].values()) for name in others}
    return max(means, key=lambda name: means[name], default=None)


def accuracy(row: Mapping[str, Any], split: str) -> float:
    """The last top-1 on a split."""
    return [each["acc1"] for each in row["evaluations"] if each["split"] == split][-1]
