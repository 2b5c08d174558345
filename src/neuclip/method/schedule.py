"""The schedules of gamma, the weight of the batch estimate, as pure functions of the step.

They are configured by the settings `gamma`, `gamma_schedule` and `gamma_decay_epochs` (flags of the
same names): `MixingSettings` in `neuclip.catalogue.method_settings` declares them, and
`gamma_schedule` and `step_gamma` in `neuclip.catalogue.building` make a schedule from them. The
published methods follow `Gamma`, `neuclip_pool` follows `StepGamma`. Each normalizer calls `at`
with its own step count.
"""

import math
from dataclasses import dataclass

from neuclip.method.choices import GammaSchedule


@dataclass(frozen=True)
class Gamma:
    """The weight of the batch estimate over time (FastCLIP, arXiv 2407.01445, section 4).

    It is 1 in the first epoch and changes once per epoch, as published.

    Attributes:
        final: the value at the end.
        schedule: `constant`: `final` from the second epoch on; `cosine`: from 1 to `final` along
            half a cosine; `final`: that value from the first step on.
        decay_epochs: epochs until a cosine reaches `final`.
        steps_per_epoch: training steps in an epoch.
    """

    final: float
    schedule: GammaSchedule
    decay_epochs: float
    steps_per_epoch: int

    def at(self, step: int) -> float:
        """The weight at a training step."""
        epoch = step // self.steps_per_epoch
        if self.schedule == "final":
            return self.final
        if epoch == 0:
            return 1.0
        if self.schedule == "constant" or epoch >= self.decay_epochs:
            return self.final
        return _half_cosine(epoch / self.decay_epochs, self.final)


@dataclass(frozen=True)
class StepGamma:
    """The weight of the batch estimate over time, by steps: a run of one epoch uses its memory.

    It is 1 while the pool fills, but for at most a quarter of `end`, and at the first step.

    Attributes:
        final: the value at the end.
        schedule: `constant`: `final` once the pool is filled; `cosine`: from 1 to `final` along
            half a cosine; `final`: that value from the first step on.
        end: the step at which a cosine reaches `final`.
    """

    final: float
    schedule: GammaSchedule
    end: int

    def start(self, fill_steps: int) -> int:
        """The first step with a weight below 1.

        Args:
            fill_steps: training steps until the pool is full.
        """
        return max(1, min(fill_steps, self.end // 4))

    def at(self, step: int, fill_steps: int) -> float:
        """The weight at a training step."""
        start = self.start(fill_steps)
        if self.schedule == "final":
            return self.final
        if step < start:
            return 1.0
        if self.schedule == "constant" or step >= self.end:
            return self.final
        return _half_cosine((step - start) / (self.end - start), self.final)


def _half_cosine(share: float, final: float) -> float:
    """From 1 (`share` 0) to `final` (`share` 1)."""
    return 0.5 * (1 + math.cos(math.pi * share)) * (1 - final) + final
