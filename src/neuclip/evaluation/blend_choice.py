"""Chooses a mix of two models by its results on own data and on a canary. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

_ROUNDING = 1e-9
_BARRIER = 0.02
"""Depth of a valley between two models that is reported; smaller ones may be noise."""


@dataclass(frozen=True)
class Mix:
    """The results of one mix.

    Attributes:
        alpha: 0 is the old model, 1 the new one.
        own: mean of the main metrics of the sets of one's own, 0..1.
        canary: mean of the main metrics of the canaries, 0..1; none without a canary.
    """

    alpha: float
    own: float
    canary: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean of both; none without a canary."""
        return None if self.canary is None else (self.own + self.canary) / 2

    @property
    def score(self) -> float:
        """What is compared without a limit: the mean, or the own metric without a canary."""
        return self.own if self.mean is None else self.mean


def choose(mixes: Sequence[Mix], max_canary_loss: float | None = None) -> Mix:
    """The best mix; of equal ones, the nearest to the old model.

    Without a limit, the best is the one with the highest mean of own metric and canary, or with the
    highest own metric if there is no canary.

    Args:
        mixes: the results, which include the old model (alpha 0) if there is a limit.
        max_canary_loss: percentage points that the canary may lose against the old model; the best
            own metric among these mixes wins.
    """
    candidates = sorted(mixes, key=lambda mix: mix.alpha)
    if max_canary_loss is None:
        return max(candidates, key=lambda mix: mix.score)
    start = next(mix.canary for mix in mixes if mix.alpha == 0)
    assert start is not None
    least = start - max_canary_loss / 100 - _ROUNDING
    kept = [mix for mix in candidates if mix.canary is not None and mix.canary >= least]
    return max(kept, key=lambda mix: mix.own)


def has_barrier(mixes: Sequence[Mix]) -> bool:
    """Whether mixes are clearly worse than both models, which then should not be mixed.

    Weights on the line between two models are good only if training left the second one in the
    basin of the first (linear mode connectivity, https://arxiv.org/abs/1912.05671).

    Args:
        mixes: the results; without both models (alpha 0 and 1) nothing can be said.
    """
    scores = {mix.alpha: mix.score for mix in mixes}
    if not scores.keys() >= {0.0, 1.0}:
        return False
    return min(scores.values()) < min(scores[0.0], scores[1.0]) - _BARRIER
