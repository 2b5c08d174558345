"""The robust global contrastive loss over any normalizer (FastCLIP's RGCL-g, NeuCLIP's objective).

    L = tau/2 mean_i [ exp(-alpha1_i)(eps + g^1_i) + alpha1_i - 1  +  same for texts ] + rho tau

It is linear in the batch estimates g^, so the batch gives an unbiased gradient whatever alpha is.
A *direct* normalizer instead returns a differentiable log(eps + g), which is minimised itself.

The temperature's gradient is `exact`, or `fastclip`: the published FastCLIP code multiplies by a
detached tau, adds tau (rho + mean alpha) and lets the scale enter both of its two terms, so that
the part through g^ counts twice. Published values of rho and lr_tau were tuned with the latter.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip.method.interfaces import Anchors, Normalizer
from neuclip.method.losses.base import PairLoss, gathered_constant, similarities
from neuclip.method.objective import conjugate, count_gradient, log_inner, log_plus

TemperatureGradient = Literal["exact", "fastclip"]


class GlobalContrastiveLoss(PairLoss):
    """RGCL-g with a normalizer.

    Args:
        embed_dim: width of the embeddings.
        normalizer: where the log-normalizers come from; an `nn.Module`, whose state is the loss's.
        epsilon: stabiliser inside log(epsilon + g).
        rho: regulariser of the temperature.
        temperature_gradient: see the module.
    """

    def __init__(
        self,
        embed_dim: int,
        normalizer: Normalizer,
        *,
        epsilon: float,
        rho: float,
        temperature_gradient: TemperatureGradient = "exact",
    ) -> None:
        super().__init__(embed_dim)
        assert isinstance(normalizer, nn.Module)
        self.normalizer = normalizer
        self.epsilon = epsilon
        self.rho = rho
        self.temperature_gradient: TemperatureGradient = temperature_gradient

    def pair_loss(
        self,
        features: Float[Tensor, "2 local dim"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
        sample_ids: Int64[Tensor, " local"] | None,
    ) -> Float[Tensor, ""]:
        """See the module."""
        doubled = self.temperature_gradient == "fastclip"
        counted = count_gradient(logit_scale, 2.0 if doubled else 1.0)
        anchors = self._anchors(features, counted, sample_ids)
        with self.section("normalizer"):
            log_normalizer = self.normalizer.estimate(anchors)
        if self.normalizer.direct:
            surrogate = log_normalizer
        else:
            surrogate = conjugate(log_plus(anchors.log_inner, self.epsilon), log_normalizer)
        temperature = 1 / logit_scale
        if doubled:
            loss = temperature.detach() * surrogate.mean()
            constant = log_normalizer.detach().mean()
            loss = loss + (temperature - temperature.detach()) * constant
        else:
            loss = temperature * surrogate.mean()
        self._note(anchors, log_normalizer)
        return loss + self.rho * temperature

    def predict(
        self,
        features: Float[Tensor, "2 local dim"],
        logit_scale: Float[Tensor, ""],
        sample_ids: Int64[Tensor, " local"] | None,
    ) -> Float[Tensor, "2 local"]:
        """The normalizer's own answer."""
        return self.normalizer.predict(self._anchors(features, logit_scale, sample_ids))

    def _anchors(self, features: Tensor, logit_scale: Tensor, sample_ids: Tensor | None) -> Anchors:
        image, text, offset = similarities(features)
        inner = [log_inner(side, logit_scale, offset) for side in (image, text)]
        return Anchors(
            features=features,
            positive=image.diagonal(offset)[: image.shape[0]],
            log_inner=torch.stack(inner),
            logit_scale=logit_scale,
            global_features=gathered_constant(features),
            sample_ids=sample_ids,
        )

    @torch.no_grad()
    def _note(self, anchors: Anchors, log_normalizer: Tensor) -> None:
        ratio = log_plus(anchors.log_inner, self.epsilon) - log_normalizer
        self.note(
            {
                "log_normalizer": log_normalizer.mean(),
                "batch_log_normalizer": anchors.log_inner.mean(),
                "weight_max": ratio.max().exp(),
                **self.normalizer.metrics(),
            }
        )
