"""SigLIP's pairwise sigmoid loss (arXiv 2303.15343), in chunks of rows.

    L = mean_i sum_j log(1 + exp(-z_ij (s_ij / tau + bias))),   z_ii = 1, z_ij = -1 otherwise

The gradients are computed with the loss, chunk by chunk, so memory is linear in the batch size.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from neuclip.errors import UserError
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.notation import Pairs
from neuclip.parallel import collectives

LOGITS_AT_ONCE = 2**22
"""16 MiB of logits in float32, and 16 MiB for their gradients."""


class SigmoidLoss(PairLoss):
    """Every pair of the global batch as a binary classification.

    Args:
        embed_dim: width of the embeddings.
        initial_logit_bias: where the learnable bias starts.
    """

    def __init__(self, embed_dim: int, initial_logit_bias: float) -> None:
        super().__init__(embed_dim)
        self.initial_logit_bias: float | None = initial_logit_bias

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss above.

        Raises:
            UserError: there is no `logit_bias`.
        """
        if logit_bias is None:
            raise UserError(
                "the sigmoid loss needs a learnable logit_bias: pass logit_bias=..., starting at "
                f"{self.initial_logit_bias:g} (open_clip: init_logit_bias)"
            )
        image = pairs.features[0]
        text = collectives.gather(pairs.features[1], pairs.layout)
        bias = logit_bias.to(image.dtype)
        loss = _PairwiseSigmoid.apply(image, text, logit_scale, bias, pairs.layout.start)
        assert isinstance(loss, Tensor)
        self.record_metrics({"logit_bias": bias})
        return pairs.layout.mean(loss[None])


class _PairwiseSigmoid(torch.autograd.Function):
    """The loss of these images against all texts; the forward pass computes its gradients too."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "batch dim"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""],
        offset: int,
    ) -> Float[Tensor, ""]:
        rows = max(1, LOGITS_AT_ONCE // text.shape[0])
        loss, by_scale, by_bias = (image.new_zeros(()) for _ in range(3))
        by_image, by_text = torch.empty_like(image), torch.zeros_like(text)
        for start in range(0, image.shape[0], rows):
            chunk = image[start : start + rows]
            similarity = chunk @ text.T
            logits = similarity * logit_scale + logit_bias
            # -z_ij times the logit: the loss is its softplus, the derivative its sigmoid.
            logits.diagonal(offset + start)[: len(chunk)].neg_()
            loss += functional.softplus(logits).sum()
            by_logit = logits.sigmoid_()
            by_logit.diagonal(offset + start)[: len(chunk)].neg_()
            by_bias += by_logit.sum()
            by_scale += (by_logit * similarity).sum()
            by_image[start : start + rows] = by_logit @ text * logit_scale
            by_text.addmm_(by_logit.T, chunk * logit_scale)
        scaled = [grad / image.shape[0] for grad in (by_image, by_text, by_scale, by_bias)]
        ctx.save_for_backward(*scaled)
        return loss / image.shape[0]

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor, ...] = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        return *(grads[0] * grad for grad in saved), None
