"""AmorLIP's loss (arXiv 2505.18983) over amortised partition functions.

    Z_i = c exp(s_ii / tau) + sum over j != i of exp(s_ij / tau)
    L   = tau~ mean_i [ -2 s_ii / tau + Z1_i / z1_i + Z2_i / z2_i ] + rho tau

tau~ and z are held constant. Where z = Z, the gradient by the features is the gradient of
-2 s_ii / tau + log Z1_i + log Z2_i, twice CLIP's. All values are kept as logarithms.

The networks answer for batches of B, so the sum over j is B - 1 times the mean over the negatives
that an anchor has. The mean over i is over the anchors that have one, weighted by the pairs'
weights.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from neuclip.method.losses.pair_loss import PairLoss, anchors_of
from neuclip.method.normalizers.amortized import AmortizedNormalizer
from neuclip.method.notation import Pairs
from neuclip.method.objective import bounded_exp


class AmorLIPLoss(PairLoss):
    """The conditional exponential loss with predicted partition functions.

    Args:
        embed_dim: width of the embeddings.
        normalizer: the networks.
        rho: regulariser of the temperature before and from epoch `late_from`.
        late_from: first epoch with the second `rho`.
    """

    epsilon = 1e-14

    def __init__(
        self,
        embed_dim: int,
        normalizer: AmortizedNormalizer,
        *,
        rho: tuple[float, float],
        late_from: int,
    ) -> None:
        super().__init__(embed_dim)
        self.normalizer = normalizer
        self.rho = rho
        self.late_from = late_from
        self.candidates = 0

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss above."""
        anchors = anchors_of(pairs, logit_scale)
        positive = anchors.positive * logit_scale
        others = anchors.log_inner + positive + math.log(pairs.layout.total - 1)
        weighted = positive + math.log(self.normalizer.settings.positive_weight)
        log_partition = torch.logaddexp(others, weighted)
        epoch = self.normalizer.step_count // self.normalizer.steps_per_epoch
        rho = self.rho[epoch >= self.late_from]
        self.candidates = pairs.layout.total
        with self.section("normalizer"):
            log_target = self.normalizer.estimate(anchors, log_partition.detach())
        weights = bounded_exp(log_partition - log_target)
        loss = anchors.mean(weights - positive).sum() / logit_scale.detach()
        self.record_metrics({"rho": rho, "weight_max": weights.max(), **self.normalizer.metrics()})
        return loss + rho / logit_scale

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """Predicts log g by the EMA networks: log lambda_i - s_ii / tau - log(B - 1).

        B is the training batch. The positive stays in lambda with its weight c.
        """
        features = pairs.features
        positive = (features[0] * features[1]).sum(-1) * logit_scale
        candidates = self.candidates or features.shape[1]
        return self.normalizer.log_lambda(features) - positive - math.log(candidates - 1)

    def get_extra_state(self) -> dict[str, int]:
        """The size of the training batch, for `state_dict`."""
        return {"candidates": self.candidates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the size of the training batch."""
        self.candidates = int(state["candidates"])
