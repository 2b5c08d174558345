"""Variants of the pool that the study tries; importing this module registers them as methods.

A variant that measures well moves into `neuclip.method`. The others stay here, so that their
numbers can be computed again. A variant that changes gets another name.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.pool import PoolNormalizer, PoolSettings
from neuclip.method.normalizers.prototype_network import (
    NetworkOutput,
    log_shares,
    network_output,
)
from neuclip.method.objective import mix
from neuclip.method.schedule import StepGamma
from studies.shared.pool_variants import register_pool_variant


class WholeGradient(PoolNormalizer):
    """The objective is differentiated through the full r_i, including the batch's part of the mix.

    With r = log((1 - gamma) e^alpha + gamma q), an anchor whose q dominates has the gradient of
    log q instead of 1 / gamma times that gradient.
    """

    def _mix(self, predicted: Tensor, batch: Tensor, gamma: float) -> Tensor:
        return mix(predicted, batch, gamma)


class AnchorGamma(PoolNormalizer):
    """SCENT's rate applied to alpha: 1 / (1 + exp(-alpha_i - c)), once gamma is below 1."""

    offset = 6.0

    def _mix(self, predicted: Tensor, batch: Tensor, gamma: float) -> Tensor:
        if gamma >= 1:
            return batch.detach()
        raised = predicted.detach() + self.offset
        return torch.logaddexp(predicted + logsigmoid(-raised), batch.detach() + logsigmoid(raised))


class AgeWeights(PoolNormalizer):
    """The weights of the pool decay with age: by e in 32 steps."""

    decay = 1 / 32
    log_weights: Tensor

    def __init__(
        self, embed_dim: int, settings: PoolSettings, gamma: StepGamma, epsilon: float
    ) -> None:
        super().__init__(embed_dim, settings, gamma, epsilon)
        self.register_buffer("log_weights", torch.zeros(2, self.ring.slots.shape[1]))

    def _push(self, batch: GlobalBatch) -> None:
        super()._push(batch)
        self.log_weights -= self.decay
        for rows in self.ring.newest(batch.features.shape[1]):
            self.log_weights[:, rows] = 0

    def _read(self, batch: GlobalBatch) -> NetworkOutput:
        shares = log_shares(self.log_weights, self.ring.shard)
        excluded = self.ring.excluded(batch.sample_ids, batch.groups)
        return network_output(
            self.ring.slots, batch, self.ring.shard, log_shares=shares, excluded=excluded
        )


class OwnCounted(PoolNormalizer):
    """An anchor's positive counts among its negatives if the pool holds it."""

    def _read(self, batch: GlobalBatch) -> NetworkOutput:
        return super()._read(replace(batch, sample_ids=None))


VARIANTS: dict[str, type[PoolNormalizer]] = {
    "pool_whole_gradient": WholeGradient,
    "pool_anchor_gamma": AnchorGamma,
    "pool_age_weights": AgeWeights,
    "pool_own_counted": OwnCounted,
}
"""Classes of the variants, by method name."""


for _name, _normalizer in VARIANTS.items():
    register_pool_variant(_name, _normalizer)
