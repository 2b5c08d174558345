"""A moving average per sample as the normalizer (SogCLR, FastCLIP, SCENT), in log space.

    u_i <- (1 - gamma) u_i + gamma g^_i          one per image anchor and one per text anchor
    alpha_i = log(eps + u_i)                     u_i = g^_i at a sample's first visit

An anchor without a negative in its batch keeps its u_i.

The rate gamma is constant (SogCLR, arXiv 2202.12387), follows a schedule (FastCLIP, arXiv
2407.01445), or depends on the anchor (SCENT, arXiv 2602.02877):

    gamma_i = 1 / (1 + exp(-alpha_i - c))        small for easy anchors, near 1 for hard ones
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from neuclip.method.notation import NO_ESTIMATE, Anchors
from neuclip.method.objective import log_plus, mix
from neuclip.method.sample_table import SampleTable
from neuclip.method.schedule import Gamma


@dataclass(frozen=True)
class AnchorRate:
    """SCENT's rate: the logistic function of the anchor's log-normalizer plus an offset.

    Attributes:
        offset: c.
        first: c in the first epoch.
        steps_per_epoch: training steps in an epoch.
    """

    offset: float
    first: float
    steps_per_epoch: int = 1

    def at(self, step: int) -> float:
        """The offset at a training step."""
        return self.first if step < self.steps_per_epoch else self.offset


Rate = float | Gamma | AnchorRate


class MovingAverageNormalizer(nn.Module):
    """Keeps the log of a moving average for every sample: two float32 numbers.

    Args:
        num_samples: ids run from 0 to num_samples - 1; none: the table grows with the ids seen.
        rate: weight of the fresh estimate.
        epsilon: stabiliser of the objective.
    """

    direct = False
    needs_sample_ids = True

    def __init__(self, num_samples: int | None, rate: Rate, epsilon: float) -> None:
        super().__init__()
        self.rate: Rate = rate
        self.epsilon = epsilon
        self.step_count = 0
        self.table = SampleTable(num_samples, (-math.inf, -math.inf))
        self._last: dict[str, Tensor | float] = {}

    @torch.no_grad()
    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Updates the averages of the batch's samples and returns the new log-normalizers."""
        ids = self._ids(anchors)
        self.table.admit(ids)
        fresh = anchors.log_inner.detach()
        remembered = self.table.read(ids).to(fresh.dtype)
        seen = ~torch.isneginf(remembered)
        average = torch.where(seen, self._mix(remembered, fresh), fresh)
        if (known := anchors.known) is not None:
            average = torch.where(known, average, remembered)
        self.table.write(ids, average, anchors.pairs.layout)
        self.step_count += 1
        self._last = {**self._last, "share_seen": seen.to(fresh.dtype).mean()}
        if known is not None:
            average = average.clamp_min(NO_ESTIMATE)
        return log_plus(average, self.epsilon)

    @torch.no_grad()
    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Returns the averages; for samples that have not been seen, the batch estimate."""
        fresh = anchors.log_inner
        if anchors.pairs.sample_ids is None:
            return log_plus(fresh, self.epsilon)
        self.table.check(anchors.pairs.sample_ids)
        remembered = self.table.read(anchors.pairs.sample_ids).to(fresh.dtype)
        return log_plus(torch.where(remembered.isneginf(), fresh, remembered), self.epsilon)

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last estimate."""
        return self._last

    @staticmethod
    def _ids(anchors: Anchors) -> Int64[Tensor, " local"]:
        assert anchors.pairs.sample_ids is not None
        return anchors.pairs.sample_ids

    def _mix(self, remembered: Tensor, fresh: Tensor) -> Tensor:
        """Computes log((1 - gamma) u + gamma g^)."""
        if isinstance(self.rate, AnchorRate):
            raised = log_plus(remembered, self.epsilon) + self.rate.at(self.step_count)
            self._last = {"gamma": torch.sigmoid(raised).mean()}
            old = remembered + functional.logsigmoid(-raised)
            return torch.logaddexp(old, fresh + functional.logsigmoid(raised))
        gamma = self.rate.at(self.step_count) if isinstance(self.rate, Gamma) else self.rate
        self._last = {"gamma": gamma}
        return mix(remembered, fresh, gamma)

    def get_extra_state(self) -> dict[str, int]:
        """The step counter, for `state_dict`."""
        return {"step_count": self.step_count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the step counter."""
        self.step_count = int(state["step_count"])
