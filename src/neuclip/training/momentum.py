"""The momentum towers of momentum contrast: a moving average of the weights that encodes keys.

As in ALBEF's code, the average moves before the keys of a step are encoded, and momentum towers are
in training mode as the towers are: they see the same augmented images and texts, with their own
random numbers where the towers drop patches or activations.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neuclip.data.batch import Batch
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.clip import Clip
from neuclip.model.ema import WeightAverage
from neuclip.training.nonfinite import FEATURES, Outputs


class MomentumTowers:
    """Encodes the keys of a batch.

    The weights are exchanged in the towers themselves for as long as the keys are encoded, so that
    sharded towers need no second copy of their structure. BatchNorm normalises by the batch; its
    running statistics are given back with the weights.

    Args:
        clip: the model, on its device and already sharded if it will be.
        momentum: decay of the average.

    Attributes:
        average: of the weights.
    """

    def __init__(self, clip: Clip, momentum: float) -> None:
        self.average = WeightAverage(clip.towers, momentum, constant=True)

    @classmethod
    def of(cls, loss: PairLoss, clip: Clip) -> "MomentumTowers | None":
        """Those that a loss asks for; none if it contrasts with no keys."""
        return None if loss.key_momentum is None else cls(clip, loss.key_momentum)

    @torch.no_grad()
    def keys(self, encode: Callable[[Batch], Outputs], batches: Sequence[Batch]) -> Tensor:
        """Moves the average, and encodes the images and the texts of a batch: [2, pairs, dim].

        Args:
            encode: returns the towers' outputs for a micro-batch.
            batches: the micro-batches of this rank.
        """
        self.average.update(0)  # a constant decay depends on no step
        with self.average.applied():
            found = [encode(batch) for batch in batches]
        return torch.cat([torch.stack([each[name] for name in FEATURES]) for each in found], 1)
