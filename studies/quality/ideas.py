"""Variants of the prototype normalizer that the study tries: not part of the product.

What measures well moves into `neuclip.method`; what does not stays here, so that its number can be
computed again. An idea that changes gets another name.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from neuclip.catalogue.building import gamma_schedule, robust_objective
from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.neuclip import NeuCLIPPoolSettings
from neuclip.catalogue.registry import method_info, register
from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.normalizers.pool import PoolNormalizer, PoolSettings
from neuclip.method.normalizers.prototype_network import (
    GlobalBatch,
    NetworkOutput,
    log_shares,
    network_output,
)
from neuclip.method.objective import mix
from neuclip.method.schedule import Gamma


class WholeGradient(PoolNormalizer):
    """The objective is differentiated through all of r_i, the batch's part of the mix too.

    With r = log((1 - gamma) e^alpha + gamma q), an anchor whose q dominates then has the gradient
    of log q, instead of 1 / gamma times that.
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
    """Weights of the pool decay with age: by e in 32 steps."""

    decay = 1 / 32
    log_weights: Tensor

    def __init__(
        self, embed_dim: int, settings: PoolSettings, gamma: Gamma, epsilon: float
    ) -> None:
        super().__init__(embed_dim, settings, gamma, epsilon)
        self.register_buffer("log_weights", torch.zeros(2, settings.size))

    def _push(self, batch: GlobalBatch) -> None:
        super()._push(batch)
        self.log_weights -= self.decay
        for rows in self.ring.newest(batch.features.shape[1]):
            self.log_weights[:, rows] = 0

    def _read(self, batch: GlobalBatch) -> NetworkOutput:
        shard = self.ring.shard
        return network_output(
            self.ring.slots,
            batch,
            shard,
            log_shares=log_shares(self.log_weights, shard),
            excluded=self._positives(batch),
        )


class OwnCounted(PoolNormalizer):
    """An anchor's positives in the pool count among its negatives, as they did at first."""

    def _positives(self, batch: GlobalBatch) -> None:
        return None


IDEAS: dict[str, type[PoolNormalizer]] = {
    "whole-gradient": WholeGradient,
    "anchor-gamma": AnchorGamma,
    "age-weights": AgeWeights,
    "fresh-gradient": OwnCounted,
    "fresh-gradient-rho5": OwnCounted,
}


@contextmanager
def using(idea: str) -> Generator[None]:
    """Inside, `neuclip_pool` has the idea's normalizer; without an idea, the product's."""
    usual = method_info("neuclip_pool")

    def build(settings: NeuCLIPPoolSettings, run: RunFacts) -> PairLoss:
        assert settings.pool_size is not None
        sizes = PoolSettings(settings.pool_size, settings.gradient, settings.gradient_size)
        gamma = gamma_schedule(settings, run)
        normalizer = IDEAS[idea](run.embed_dim, sizes, gamma, settings.epsilon)
        return GlobalContrastiveLoss(run.embed_dim, normalizer, robust_objective(settings))

    if idea:
        register(replace(usual, build=build))
    try:
        yield
    finally:
        register(usual)
