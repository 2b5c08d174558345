"""Mini-batch InfoNCE (Radford et al., 2021): open_clip's ClipLoss, with exact gradients over ranks.

    L = 1/2 mean_i [ log sum_j exp(s_ij / tau) - s_ii / tau ] + the same for text anchors

It is the global contrastive objective with the batch as normalizer and eps = 1/(B-1):
log sum_j exp((s_ij - s_ii)/tau) = log(B-1) + log(1/(B-1) + g^_i).
With groups or hard negatives, the anchor's number of negatives takes the place of B-1.
"""

import math

import torch
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
        anchors = anchors_of(pairs, logit_scale)
        inner, negatives = anchors.log_inner, anchors.negatives
        if isinstance(negatives, Tensor):
            # Without a negative the loss of an anchor is log(1), the cross-entropy of one class.
            log_count = negatives.clamp_min(1).log()
            losses = torch.logaddexp(inner, -log_count) + log_count
        else:
            losses = log_plus(inner, 1 / negatives) + math.log(negatives)
        losses = pairs.mean(losses)
        self.record_metrics({"image_loss": losses[0], "text_loss": losses[1]})
        return losses.mean()

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """The batch estimate of log(eps + g), without the positive, as in the other methods."""
        return log_plus(anchors_of(pairs, logit_scale).log_inner, self.epsilon)
