"""Schedules of the methods, as pure functions of the loss's own step count."""

import math
from dataclasses import dataclass

from neuclip.method.choices import GammaSchedule


@dataclass(frozen=True)
class Gamma:
    """Weight of the fresh batch estimate (FastCLIP, arXiv 2407.01445, section 4).

    1 in the first epoch; then `final` (constant), or from 1 to `final` along half a cosine
    (cosine). The value changes once an epoch, as published.
    """

    final: float
    schedule: GammaSchedule
    decay_epochs: float
    steps_per_epoch: int

    def at(self, step: int) -> float:
        """The weight at a training step."""
        epoch = step // self.steps_per_epoch
        if epoch == 0:
            return 1.0
        if self.schedule == "constant" or epoch >= self.decay_epochs:
            return self.final
        share = 0.5 * (1 + math.cos(math.pi * epoch / self.decay_epochs))
        return share * (1 - self.final) + self.final
