"""The global contrastive loss with one temperature per image and per text (iSogCLR, FastCLIP-v2).

    L = 1/2 mean_i [ w1_i (exp(-alpha1_i)(eps + g^1_i) + alpha1_i - 1)  +  same for texts ]

with w_i = tau_i for iSogCLR and w_i = 1 for FastCLIP-v2, as published. The temperatures are the
loss's own state; they step inside it, after the loss of the batch is computed with the old ones.
The mean is over the anchors that have a negative, weighted by the pairs' weights.
"""

from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.losses.pair_loss import PairLoss, anchors_of
from neuclip.method.notation import Normalizer, Pairs
from neuclip.method.objective import LOG_RATIO_LIMIT, conjugate, log_plus
from neuclip.method.temperature import IndividualTemperature


class IndividualContrastiveLoss(PairLoss):
    """The global contrastive objective with individual temperatures.

    `logit_scale` has no effect on the loss: freeze it.

    Args:
        embed_dim: width of the embeddings.
        normalizer: the source of the log-normalizers, an `nn.Module` whose state is the loss's.
        temperature: the temperatures.
        epsilon: stabiliser inside log(epsilon + g).
        times_temperature: whether the term of each anchor is multiplied by its temperature.
    """

    needs_sample_ids = True
    learns_temperature = False

    def __init__(
        self,
        embed_dim: int,
        normalizer: Normalizer,
        temperature: IndividualTemperature,
        *,
        epsilon: float,
        times_temperature: bool,
    ) -> None:
        super().__init__(embed_dim)
        assert isinstance(normalizer, nn.Module)
        self.normalizer = normalizer
        self.temperature = temperature
        self.epsilon = epsilon
        self.times_temperature = times_temperature

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss above."""
        assert pairs.sample_ids is not None
        self.temperature.admit(pairs.sample_ids)
        temperature = self.temperature.read(pairs.sample_ids).to(pairs.features.dtype)
        anchors = anchors_of(pairs, 1 / temperature)
        with self.section("normalizer"):
            log_normalizer = self.normalizer.estimate(anchors)
            if not self.settling:
                self.temperature.step(anchors, log_normalizer)
        surrogate = conjugate(log_plus(anchors.log_inner, self.epsilon), log_normalizer)
        ratio = log_plus(anchors.log_inner.detach(), self.epsilon) - log_normalizer
        self.record_metrics(
            {
                "log_normalizer": anchors.average(log_normalizer),
                "batch_log_inner": anchors.average(anchors.log_inner),
                "weight_max": ratio.max().clamp_max(LOG_RATIO_LIMIT).exp(),
                "individual_temperature": temperature.mean(),
                **self.normalizer.metrics(),
            }
        )
        weighted = temperature * surrogate if self.times_temperature else surrogate
        return anchors.mean(weighted).mean()

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """The normalizer's prediction, at `logit_scale` if no sample ids are given."""
        scale = logit_scale
        if pairs.sample_ids is not None:
            scale = 1 / self.temperature.read(pairs.sample_ids).to(pairs.features.dtype)
        return self.normalizer.predict(anchors_of(pairs, scale))
