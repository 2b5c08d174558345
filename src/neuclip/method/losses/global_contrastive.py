"""The robust global contrastive loss over any normalizer (FastCLIP's RGCL-g, NeuCLIP's objective).

    L = tau/2 mean_i [ exp(-alpha1_i)(eps + g^1_i) + alpha1_i - 1  +  same for texts ] + rho tau

It is linear in the batch estimates g^, so the batch gives an unbiased gradient whatever alpha is.
A *direct* normalizer instead returns a differentiable log(eps + g), which is minimised itself.

The temperature's gradient is `exact`, or `fastclip`: the published FastCLIP code multiplies by a
detached tau, adds tau (rho + mean alpha) and lets the scale enter both of its two terms, so that
the part through g^ counts twice. Published values of rho and lr_tau were tuned with the latter.
(The published code takes log u where we take alpha = log(eps + u): the same while u >> eps.)
FastCLIP-v0 and v1 leave out the factor tau and rho; v1 and SogCLR hold tau constant.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.choices import TemperatureGradient
from neuclip.method.losses.pair_loss import PairLoss, anchors_of
from neuclip.method.notation import Anchors, Normalizer, Pairs
from neuclip.method.objective import LOG_RATIO_LIMIT, conjugate, count_gradient, log_plus


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Which objective is minimised.

    Attributes:
        epsilon: stabiliser inside log(epsilon + g).
        rho: regulariser of the temperature.
        temperature_gradient: see the module.
        times_temperature: whether the objective has the factor tau.
        learns_temperature: whether the temperature gets a gradient.
    """

    epsilon: float
    rho: float = 0.0
    temperature_gradient: TemperatureGradient = "exact"
    times_temperature: bool = True
    learns_temperature: bool = True


class GlobalContrastiveLoss(PairLoss):
    """The global contrastive objective with a normalizer and one temperature.

    Args:
        embed_dim: width of the embeddings.
        normalizer: where the log-normalizers come from; an `nn.Module`, whose state is the loss's.
        objective: which objective is minimised.
    """

    def __init__(self, embed_dim: int, normalizer: Normalizer, objective: Objective) -> None:
        super().__init__(embed_dim)
        assert isinstance(normalizer, nn.Module)
        self.normalizer = normalizer
        self.objective = objective
        self.epsilon = objective.epsilon
        self.learns_temperature = objective.learns_temperature
        self.needs_sample_ids = normalizer.needs_sample_ids

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """See the module."""
        if not self.learns_temperature:
            logit_scale = logit_scale.detach()
        doubled = self.objective.temperature_gradient == "fastclip"
        counted = count_gradient(logit_scale, 2.0 if doubled else 1.0)
        anchors = anchors_of(pairs, counted)
        with self.section("normalizer"):
            log_normalizer = self.normalizer.estimate(anchors)
        if self.normalizer.direct:
            surrogate = log_normalizer
        else:
            surrogate = conjugate(log_plus(anchors.log_inner, self.epsilon), log_normalizer)
        self._note(anchors, log_normalizer)
        means = pairs.layout.mean(torch.stack([surrogate, log_normalizer.detach()])).mean(-1)
        return self._weigh(means[0], means[1], logit_scale)

    def _weigh(self, surrogate: Tensor, log_normalizer: Tensor, logit_scale: Tensor) -> Tensor:
        """The factor tau and the regulariser."""
        if not self.objective.times_temperature:
            return surrogate
        temperature = 1 / logit_scale
        regulariser = self.objective.rho * temperature
        if self.objective.temperature_gradient == "exact":
            return temperature * surrogate + regulariser
        constant = temperature.detach()
        return constant * surrogate + (temperature - constant) * log_normalizer + regulariser

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """The normalizer's own answer."""
        return self.normalizer.predict(anchors_of(pairs, logit_scale))

    @torch.no_grad()
    def _note(self, anchors: Anchors, log_normalizer: Tensor) -> None:
        ratio = log_plus(anchors.log_inner, self.epsilon) - log_normalizer
        self.note(
            {
                "log_normalizer": log_normalizer.mean(),
                "batch_log_inner": anchors.log_inner.mean(),
                "weight_max": ratio.max().clamp_max(LOG_RATIO_LIMIT).exp(),
                **self.normalizer.metrics(),
            }
        )
