"""Hard negative captions: further candidates of the image anchors (NegCLIP, arXiv 2210.01936).

    log g^1_i <- log( sum over negatives and over the H hard negatives of exp((s - s_ii) / tau) )
                 - log(|N_i| + H)

Every image anchor has the hard negatives of all pairs as candidates, whatever its groups: a hard
negative was written not to fit. Text anchors do not have them, because they have no images. With
eps = 1 / (|N_i| + H) it is NegCLIP's cross-entropy over the widened row of logits.

A batch has a row for the hard negative of each pair. Rows of pairs without one are zero and take no
part. Nothing of size B x H is kept: both passes go over row blocks, or use the fused kernels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuclip.method.arithmetic import Arithmetic
from neuclip.method.notation import NO_ESTIMATE, Anchors, Pairs
from neuclip.method.softmax import blocks
from neuclip.method.softmax.blocks import SoftmaxStats
from neuclip.method.softmax.exclusion import Exclusion, only
from neuclip.method.softmax.log_inner import fused_kernels
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout


@dataclass(frozen=True)
class HardNegatives:
    """The hard negatives of all pairs as candidates of this rank's images.

    Attributes:
        images: embeddings of the images of all ranks, as constants and factors of products.
        captions: embeddings of the hard negatives of all ranks, likewise.
        present: which pairs have one.
        layout: how the global batch is split over ranks.
        arithmetic: by which kernels, from which number type.
    """

    images: Float[Tensor, "batch dim"]
    captions: Float[Tensor, "batch dim"]
    present: Bool[Tensor, " batch"]
    layout: BatchLayout
    arithmetic: Arithmetic

    @classmethod
    def of(
        cls, local: Float[Tensor, "local dim"], images: Float[Tensor, "batch dim"], pairs: Pairs
    ) -> "HardNegatives":
        """Gathers the hard negatives of all ranks.

        Args:
            local: embeddings of this rank's.
            images: embeddings of the images of all ranks.
            pairs: this rank's.
        """
        layout, arithmetic = pairs.layout, pairs.arithmetic
        captions = collectives.gather_constant(local, layout)
        images = arithmetic.factor(images)
        present = captions.any(-1)
        return cls(images, arithmetic.factor(captions), present, layout, arithmetic)

    @property
    def count(self) -> Int64[Tensor, ""]:
        """H, the hard negatives of all ranks."""
        return self.present.sum()

    def of_images(self) -> Exclusion:
        """Leaves the absent ones out of the sums of this rank's images."""
        return only(self.present, self.layout.sizes[self.layout.rank])

    def of_captions(self) -> Exclusion:
        """The same, with this rank's hard negatives as rows and the images of all ranks."""
        present = self.present.narrow(0, self.layout.start, self.layout.sizes[self.layout.rank])
        images = present.new_ones(1, self.layout.total).long()
        return Exclusion((~present).long()[None], images, self.layout.total)


def with_hard_negatives(anchors: Anchors, captions: Float[Tensor, "local dim"]) -> Anchors:
    """The anchors with hard negatives among the candidates of the images.

    Args:
        anchors: this rank's.
        captions: embeddings of this rank's hard negatives; rows of zeros: the pair has none.
    """
    hard = HardNegatives.of(captions, anchors.global_features[0], anchors.pairs)
    scale = anchors.logit_scale if anchors.logit_scale.ndim == 0 else anchors.logit_scale[0]
    found = _LogSum.apply(anchors.pairs.features[0], captions, scale, hard)
    assert isinstance(found, tuple)
    log_sum, by_scale = found
    in_batch = anchors.negatives
    if isinstance(in_batch, int):
        in_batch = log_sum.detach().new_full(log_sum.shape, in_batch)
    in_batch = in_batch.expand(2, -1)
    counts = torch.stack([in_batch[0] + hard.count, in_batch[1]])
    among = anchors.log_inner[0] + in_batch[0].clamp_min(1).log()
    beside = log_sum - anchors.positive * scale
    total = torch.logaddexp(among, beside)
    image = (total - counts[0].clamp_min(1).log()).masked_fill(counts[0] == 0, NO_ESTIMATE)
    derivative = anchors.dlog_inner_dscale
    if derivative is not None and by_scale is not None:
        share = (beside - total).exp().detach()
        mixed = derivative[0].lerp(by_scale - anchors.positive.detach(), share)
        derivative = torch.stack([mixed, derivative[1]])
    return replace(
        anchors,
        log_inner=torch.stack([image, anchors.log_inner[1]]),
        negatives=counts,
        dlog_inner_dscale=derivative,
    )


def hard_negative_log_sum(
    pairs: Pairs, captions: Float[Tensor, "local dim"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, " local"]:
    """Log of the sum of exp(s / tau) of this rank's images over the hard negatives of all ranks.

    It is `NO_ESTIMATE` if there are none.

    Args:
        pairs: this rank's.
        captions: as in `with_hard_negatives`.
        logit_scale: 1 / tau.
    """
    images = collectives.gather_constant(pairs.features[0], pairs.layout)
    hard = HardNegatives.of(captions, images, pairs)
    found = _LogSum.apply(pairs.features[0], captions, logit_scale, hard)
    assert isinstance(found, tuple)
    return found[0]


class _LogSum(torch.autograd.Function):
    """The log-sums with the gradient by images, captions and scale."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  autograd's context takes any attribute
        images: Tensor,
        captions: Tensor,
        scale: Tensor,
        hard: HardNegatives,
    ) -> tuple[Tensor, Tensor | None]:
        kernels = fused_kernels(images, hard.arithmetic) or blocks
        factor = hard.arithmetic.factor(images)
        found = kernels.row_sums(factor, hard.captions, scale, len(hard.captions), hard.of_images())
        none = hard.count == 0
        value = found[0].masked_fill(none, NO_ESTIMATE)
        by_scale = found[1].masked_fill(none, 0) if scale.ndim else None
        ctx.save_for_backward(images, captions, scale, found[0].masked_fill(none, 0), by_scale)
        ctx.hard = hard
        if by_scale is not None:
            ctx.mark_non_differentiable(by_scale)
        return value, by_scale

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator's doing
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        images, captions, scale, log_sum, by_scale = ctx.saved_tensors
        hard: HardNegatives = ctx.hard
        kernels, factor = fused_kernels(images, hard.arithmetic) or blocks, hard.arithmetic.factor
        weight = (grad * scale if scale.ndim else grad).masked_fill(hard.count == 0, 0)
        own = SoftmaxStats(scale, log_sum, weight)
        stats = torch.stack([log_sum, weight, *([scale] if scale.ndim else [])], 1)
        stats = collectives.gather_constant(stats, hard.layout).T
        everybody = SoftmaxStats(stats[2] if scale.ndim else scale, stats[0], stats[1])
        size = len(hard.captions)
        none, excluded = _no_weight(own, size), hard.of_images()
        by_image = kernels.row_gradients(factor(images), hard.captions, own, none, size, excluded)
        none, excluded = _no_weight(own, len(captions)), hard.of_captions()
        by_caption = kernels.row_gradients(
            factor(captions), hard.images, none, everybody, size, excluded
        )
        if by_scale is not None:
            return by_image, by_caption, grad * by_scale, None
        # Logits are scale * e_i . n_h, so the radial part of the images' gradient is the scale's.
        return by_image * scale, by_caption * scale, (by_image * images).sum(), None


def _no_weight(like: SoftmaxStats, count: int) -> SoftmaxStats:
    """Softmaxes of anchors that have no part in the loss."""
    zeros = like.log_sum.new_zeros(count)
    never = torch.full_like(zeros, -NO_ESTIMATE)  # no exponential of a logit less this overflows
    return SoftmaxStats(zeros if like.scale.ndim else like.scale, never, zeros)
