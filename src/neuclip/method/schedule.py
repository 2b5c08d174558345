"""The schedule of gamma, the weight of the batch estimate, as a pure function of the step.

It is configured by the settings `gamma`, `gamma_schedule` and `gamma_decay_epochs` (flags of the
same names): `MixingSettings` in `neuclip.catalogue.method_settings` declares them, and
`gamma_schedule` in `neuclip.catalogue.building` makes a `Gamma` from them. The normalizers
`prototypes`, `pool` and `moving_average` call `Gamma.at` with their own step count.
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
            half a cosine.
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
        if epoch == 0:
            return 1.0
        if self.schedule == "constant" or epoch >= self.decay_epochs:
            return self.final
        share = 0.5 * (1 + math.cos(math.pi * epoch / self.decay_epochs))
        return share * (1 - self.final) + self.final
