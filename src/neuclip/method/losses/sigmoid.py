"""SigLIP's pairwise sigmoid loss (arXiv 2303.15343), in chunks of rows.

    L = mean_i sum_j log(1 + exp(-z_ij (s_ij / tau + bias))),   z_ii = 1, z_ij = -1 otherwise

Groups leave out their terms. With weights w_i of mean 1, a term counts (w_i + w_j) / 2 times, half
for each of its anchors. Hard negatives are further texts j, with z_ij = -1 and the weight w_i.
The gradients are computed with the loss, chunk by chunk, so memory is linear in the batch size.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from neuclip.errors import UserError
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.notation import Pairs, shares
from neuclip.method.softmax.exclusion import Exclusion, only
from neuclip.parallel import collectives

LOGITS_AT_ONCE = 2**22
"""16 MiB of logits in float32, and 16 MiB for their gradients."""


class SigmoidLoss(PairLoss):
    """Every pair of the global batch as a binary classification.

    Args:
        embed_dim: width of the embeddings.
        initial_logit_bias: where the learnable bias starts.
    """

    has_fused_kernels = False

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
        image, layout = pairs.features[0], pairs.layout
        bias = logit_bias.to(image.dtype)
        text = collectives.gather(pairs.features[1], layout)
        terms = _Terms.of_pairs(pairs)
        loss = _PairwiseSigmoid.apply(image, text, logit_scale, bias, layout.start, terms)
        assert isinstance(loss, Tensor)
        if pairs.negatives is not None:
            captions = collectives.gather(pairs.negatives, layout)
            terms = _Terms.of_hard_negatives(pairs, captions)
            further = _PairwiseSigmoid.apply(
                image, captions, logit_scale, bias, layout.total, terms
            )
            assert isinstance(further, Tensor)
            loss = loss + further
        self.record_metrics({"logit_bias": bias})
        return layout.mean(loss[None])


@dataclass(frozen=True)
class _Terms:
    """The parts that the terms of images i and texts j have in a rank's loss.

    Attributes:
        excluded: terms left out; none: none is, and `weights` are given.
        weights: of this rank's images and of all texts: a term's weight is their sum. None: 1.
    """

    excluded: Exclusion | None
    weights: tuple[Float[Tensor, " local"], Float[Tensor, " batch"]] | None

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> "_Terms | None":
        """Of images and texts: half of a term's weight is its image's, half its text's."""
        if pairs.groups is None and pairs.weights is None:
            return None
        excluded, weights = None, None
        if pairs.groups is not None:
            everybody = collectives.gather_constant(pairs.groups, pairs.layout)
            start = pairs.layout.start
            excluded = Exclusion(pairs.groups.T.contiguous(), everybody.T.contiguous(), start)
        if pairs.weights is not None:
            half = _weights(pairs) / 2
            weights = half, collectives.gather_constant(half, pairs.layout)
        return cls(excluded, weights)

    @classmethod
    def of_hard_negatives(cls, pairs: Pairs, captions: Float[Tensor, "batch dim"]) -> "_Terms":
        """Of images and the hard negatives of all ranks, which are never anchors."""
        weights = None
        if pairs.weights is not None:
            weights = _weights(pairs), captions.new_zeros(len(captions))
        return cls(only(captions.detach().any(-1), pairs.features.shape[1]), weights)

    def apply(self, values: Float[Tensor, "rows batch"], start: int, positive: int) -> None:
        """Weighs the terms of a chunk of images in place.

        Args:
            values: numbers of the terms.
            start: the chunk's first image.
            positive: the first image's positive.
        """
        rows = slice(start, start + len(values))
        if self.excluded is not None:
            excluded = self.excluded.of(rows)
            excluded.diagonal(positive + start)[: len(values)].fill_(False)
            values.masked_fill_(excluded, 0)
        if self.weights is not None:
            values *= self.weights[0][rows, None] + self.weights[1]


def _counted(values: Tensor, terms: _Terms | None, start: int, positive: int) -> Tensor:
    """The terms of a chunk of images as they count, in place; see `_Terms.apply`."""
    if terms is not None:
        terms.apply(values, start, positive)
    return values


def _weights(pairs: Pairs) -> Float[Tensor, " local"]:
    """The pairs' weights, of mean 1 over the global batch."""
    assert pairs.weights is not None
    layout = pairs.layout
    return shares(pairs.weights, layout) * (layout.total / len(layout.sizes))


class _PairwiseSigmoid(torch.autograd.Function):
    """The loss of these images against all texts; the forward pass computes its gradients too."""

    @staticmethod
    def forward(  # noqa: PLR0913  autograd's context beside the terms' arguments
        ctx: torch.autograd.function.FunctionCtx,
        image: Float[Tensor, "local dim"],
        text: Float[Tensor, "batch dim"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""],
        offset: int,
        terms: _Terms | None = None,
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
            loss += _counted(functional.softplus(logits), terms, start, offset).sum()
            by_logit = logits.sigmoid_()
            by_logit.diagonal(offset + start)[: len(chunk)].neg_()
            by_logit = _counted(by_logit, terms, start, offset)
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
        return *(grads[0] * grad for grad in saved), None, None
