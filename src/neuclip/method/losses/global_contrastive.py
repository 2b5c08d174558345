"""The robust global contrastive loss over any normalizer (FastCLIP's RGCL-g, NeuCLIP's objective).

    L = tau/2 mean_i [ exp(-alpha1_i)(eps + g^1_i) + alpha1_i - 1  +  same for texts ] + rho tau

It is linear in the batch estimates g^, so the gradient is unbiased for any constant alpha. A
*direct* normalizer instead returns a differentiable log(eps + g), which is minimised itself.

The gradient by the temperature is `exact` or `fastclip`. The published FastCLIP code multiplies by
a detached tau, adds tau (rho + mean alpha), and lets the scale enter both of its two terms, so that
the gradient through g^ counts twice. Published values of rho and lr_tau were tuned with it. (That
code uses log u in place of alpha = log(eps + u), which is the same for u >> eps.)
FastCLIP-v0 and v1 leave out the factor tau and rho; v1 and SogCLR hold tau constant.

The mean is over the anchors that have a negative, weighted by the pairs' weights.

The scale is `fastclip`, L as above, or `drrho`, as the code of DRRho-CLIP has it, with which SCENT
was trained. There the normalizer takes the batch estimate as a mean over all B candidates (the
positive counts as 0), while g^ itself stays the mean over B - 1; and the gradient by the embeddings
is of the *sum* over the two sides. So embeddings get 2 B / (B - 1) times the gradient for
eps << g, and the temperature's part through g^ is B / (B - 1) times its own.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.choices import ObjectiveScale, TemperatureGradient
from neuclip.method.losses.pair_loss import Metrics, PairLoss, anchors_of
from neuclip.method.measured_rho import MeasuredRho
from neuclip.method.notation import Anchors, Normalizer, Pairs, known_mean
from neuclip.method.objective import LOG_RATIO_LIMIT, conjugate, count_gradient, log_plus


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The form of the objective.

    Attributes:
        epsilon: stabiliser inside log(epsilon + g).
        rho: regulariser of the temperature; none: measured in a warm start, see `MeasuredRho`.
        temperature_gradient: `exact`, or `fastclip` as the published code has it.
        scale: `fastclip`, or `drrho` as DRRho-CLIP's code has it.
        times_temperature: whether the objective has the factor tau.
        learns_temperature: whether the temperature gets a gradient.
    """

    epsilon: float
    rho: float | None = 0.0
    temperature_gradient: TemperatureGradient = "exact"
    scale: ObjectiveScale = "fastclip"
    times_temperature: bool = True
    learns_temperature: bool = True


class GlobalContrastiveLoss(PairLoss):
    """The global contrastive objective with a normalizer and one temperature.

    Args:
        embed_dim: width of the embeddings.
        normalizer: the source of the log-normalizers, an `nn.Module` whose state is the loss's.
        objective: the form of the objective.
    """

    def __init__(self, embed_dim: int, normalizer: Normalizer, objective: Objective) -> None:
        super().__init__(embed_dim)
        assert isinstance(normalizer, nn.Module)
        self.normalizer = normalizer
        self.objective = objective
        self.measured_rho = MeasuredRho() if objective.rho is None else None
        self.epsilon = objective.epsilon
        self.learns_temperature = objective.learns_temperature
        self.needs_sample_ids = normalizer.needs_sample_ids
        self._seen: tuple[list[Tensor], Tensor | None] | None = None

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss above."""
        if not self.learns_temperature:
            logit_scale = logit_scale.detach()
        measured = self.measured_rho if self.settling else None
        if measured is not None:
            logit_scale = measured.watch(logit_scale)
        through_inner = 2.0 if self.objective.temperature_gradient == "fastclip" else 1.0
        sides = 2.0 if self.objective.scale == "drrho" else 1.0
        anchors = anchors_of(pairs, count_gradient(logit_scale, through_inner / sides))
        with self.section("normalizer"):
            log_normalizer = self.normalizer.estimate(self._scaled(anchors))
        log_target = log_plus(anchors.log_inner, self.epsilon)
        if self.normalizer.direct:
            surrogate = log_normalizer
        else:
            surrogate = conjugate(log_target, log_normalizer)
        seen = (anchors.log_inner, log_target, log_normalizer)
        self._seen = [value.detach() for value in seen], anchors.known
        self.record_metrics(self._diagnostics)
        means = anchors.mean(torch.stack([surrogate, log_normalizer.detach()])).mean(-1)
        loss = self._weigh(count_gradient(means[0], sides), means[1], logit_scale)
        return loss if measured is None else measured.watch_loss(loss)

    def _scaled(self, anchors: Anchors) -> Anchors:
        """The anchors with the batch estimate that the normalizer takes."""
        if self.objective.scale == "fastclip":
            return anchors
        negatives = anchors.negatives
        if isinstance(negatives, Tensor):
            over_batch = (negatives.clamp_min(1) / (negatives + 1)).log()
        else:
            over_batch = math.log1p(-1 / (negatives + 1))
        return replace(anchors, log_inner=anchors.log_inner + over_batch)

    def _weigh(self, surrogate: Tensor, log_normalizer: Tensor, logit_scale: Tensor) -> Tensor:
        """Applies the factor tau and adds the regulariser."""
        if not self.objective.times_temperature:
            return surrogate
        temperature = 1 / logit_scale
        regulariser = self._rho() * temperature
        if self.objective.temperature_gradient == "exact":
            return temperature * surrogate + regulariser
        constant = temperature.detach()
        return constant * surrogate + (temperature - constant) * log_normalizer + regulariser

    def _rho(self) -> float | Tensor:
        """The regulariser: as given, or as measured so far."""
        if self.measured_rho is None:
            assert self.objective.rho is not None
            return self.objective.rho
        return self.measured_rho.known().clone()  # the backward pass changes it in place

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """The normalizer's prediction."""
        return self.normalizer.predict(anchors_of(pairs, logit_scale))

    def _diagnostics(self) -> Metrics:
        """Means over this rank's anchors of the last call."""
        assert self._seen is not None
        (log_inner, log_target, log_normalizer), known = self._seen
        ratio = log_target - log_normalizer
        return {
            "log_normalizer": known_mean(log_normalizer, known),
            "batch_log_inner": known_mean(log_inner, known),
            "weight_max": ratio.max().clamp_max(LOG_RATIO_LIMIT).exp(),
            **({} if self.measured_rho is None else {"rho": self.measured_rho.value}),
            **self.normalizer.metrics(),
        }
