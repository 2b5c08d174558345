"""The scale of the loss under float16, whose gradients would otherwise vanish or overflow.

The loss is multiplied by the scale before the backward pass, and the gradients are divided by it
before they are clipped. A scale that makes a gradient overflow is halved, and the step is skipped;
after many good steps the scale doubles (Micikevicius et al., 2018, arXiv 1710.03740, section 3.2;
the numbers are those of torch's GradScaler). The scale lives on the device, so the host never
waits for it, and it is a power of two, so scaling does not round.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

INITIAL = 2.0**16
GROWTH_INTERVAL = 2000
LARGEST = 2.0**24
"""Larger scales only waste the range of float16, whose largest number is 65,504."""


class LossScale:
    """The scale of a run; equal on all ranks, which see the same gradient norm.

    Args:
        device: of the towers.

    Attributes:
        scale: float32 scalar, at least 1.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divides gradients by the scale, in place.

        Args:
            gradients: plain tensors, of sharded parameters the local shards.
        """
        if gradients:
            multiply = torch._foreach_mul_  # pyright: ignore  torch.amp.GradScaler uses it too
            multiply(list(gradients), 1 / self.scale)

    def update(self, norm: Tensor, loss_rejected: Tensor) -> None:
        """Adapts the scale to a step.

        A step whose loss is not finite says nothing about the scale.

        Args:
            norm: the gradient norm, not finite if a gradient overflowed.
            loss_rejected: scalar; 1 if the loss is not finite on some rank.
        """
        usable = loss_rejected == 0
        overflow = usable & ~torch.isfinite(norm)
        good = usable & ~overflow
        grown = good & (self._good_steps + 1 >= GROWTH_INTERVAL)
        halved = torch.where(overflow, (self.scale / 2).clamp(min=1.0), self.scale)
        self.scale = torch.where(grown, (halved * 2).clamp(max=LARGEST), halved)
        counted = torch.where(good, self._good_steps + 1, self._good_steps)
        self._good_steps = counted.masked_fill(overflow | grown, 0)

    def state_dict(self) -> dict[str, float | int]:
        """The scale, and the steps since it last changed; waits for the device."""
        return {"scale": float(self.scale), "good_steps": int(self._good_steps)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state."""
        self.scale.fill_(float(state["scale"]))
        self._good_steps.fill_(int(state["good_steps"]))
