"""Mini-batch InfoNCE (Radford et al., 2021): open_clip's ClipLoss, with exact gradients over ranks.

    L = 1/2 mean_i [ log sum_j exp(s_ij / tau) - s_ii / tau ] + the same for text anchors

It is the global contrastive objective with the batch as normalizer and eps = 1/(B-1):
log sum_j exp((s_ij - s_ii)/tau) = log(B-1) + log(1/(B-1) + g^_i).
"""

import math

from jaxtyping import Float
from torch import Tensor

from neuclip.method.losses.pair_loss import PairLoss, anchors_of
from neuclip.method.notation import Pairs
from neuclip.method.objective import log_plus


class InfoNCELoss(PairLoss):
    """Cross-entropy of each anchor over the global batch.

    Args:
        embed_dim: width of the embeddings.
    """

    epsilon = 1e-14

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss above."""
        negatives = pairs.layout.total - 1
        inner = anchors_of(pairs, logit_scale).log_inner
        losses = pairs.layout.mean(log_plus(inner, 1 / negatives) + math.log(negatives))
        self.record_metrics({"image_loss": losses[0], "text_loss": losses[1]})
        return losses.mean()

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """The batch estimate of log(eps + g), without the positive, as in the other methods."""
        return log_plus(anchors_of(pairs, logit_scale).log_inner, self.epsilon)
