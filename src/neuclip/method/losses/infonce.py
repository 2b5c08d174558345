"""Mini-batch InfoNCE (Radford et al., 2021): open_clip's ClipLoss, with exact gradients over ranks.

    L = 1/2 mean_i [ log sum_j exp(s_ij / tau) - s_ii / tau ] + the same for text anchors

It is the family's member whose normalizer is the batch with eps = 1/(B-1):
log sum_j exp((s_ij - s_ii)/tau) = log(B-1) + log(1/(B-1) + g^_i).
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from neuclip.method.losses.base import PairLoss, similarities
from neuclip.method.objective import log_inner, log_plus


class InfoNCELoss(PairLoss):
    """Cross-entropy of each anchor over the global batch.

    Args:
        embed_dim: width of the embeddings.
    """

    epsilon = 1e-14

    def pair_loss(
        self,
        features: Float[Tensor, "2 local dim"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
        sample_ids: Int64[Tensor, " local"] | None,
    ) -> Float[Tensor, ""]:
        """See the module."""
        image, text, offset = similarities(features)
        labels = torch.arange(offset, offset + image.shape[0], device=image.device)
        losses = [functional.cross_entropy(side * logit_scale, labels) for side in (image, text)]
        self.note({"image_loss": losses[0], "text_loss": losses[1]})
        return (losses[0] + losses[1]) / 2

    def predict(
        self,
        features: Float[Tensor, "2 local dim"],
        logit_scale: Float[Tensor, ""],
        sample_ids: Int64[Tensor, " local"] | None,
    ) -> Float[Tensor, "2 local"]:
        """The batch's estimate of log(eps + g), positive excluded, as other methods give it."""
        image, text, offset = similarities(features)
        inner = [log_inner(side, logit_scale, offset) for side in (image, text)]
        return log_plus(torch.stack(inner), self.epsilon)
