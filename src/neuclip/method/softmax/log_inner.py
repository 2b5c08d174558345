"""log g^ of a batch, over all ranks and without its B x B matrix.

    log g^_i = log sum_{j != i} exp(s_ij / tau) - s_ii / tau - log(B - 1)

Every rank gathers all features once, as constants (FastCLIP, arXiv 2407.01445, section 5). The
loss reaches the features of a rank in two ways: as anchors, and as candidates of everybody's
anchors. For the second way a rank needs of other ranks' anchors only their log-sums and what the
loss makes of them, 2 numbers a side, which are gathered in the backward pass: no gradient of size
B d travels, and one product serves both ways.
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuclip.method.softmax import blocks
from neuclip.method.softmax.blocks import Softmaxes
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout

HAS_TRITON = find_spec("triton") is not None


def log_inner(
    features: Float[Tensor, "2 local dim"],
    logit_scale: Float[Tensor, "*scales"],
    whole: Float[Tensor, "2 batch dim"],
    layout: BatchLayout,
) -> tuple[Float[Tensor, "2 local"], Float[Tensor, "2 local"] | None]:
    """Log g^ of this rank's anchors over the global batch.

    Args:
        features: images, texts of this rank; unit norm.
        logit_scale: 1 / temperature, one for all or [2, local].
        whole: those of all ranks, as constants.
        layout: which of them are this rank's.

    Returns:
        log g^_i, and, if the scale is one per anchor, its derivative by the scale as a constant.
    """
    found = _LogInner.apply(features, logit_scale, whole.detach(), layout)
    assert isinstance(found, tuple)
    return found


class _LogInner(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  autograd's context takes any attribute
        features: Tensor,
        scale: Tensor,
        whole: Tensor,
        layout: BatchLayout,
    ) -> tuple[Tensor, Tensor | None]:
        found = _sums(features, scale, whole, layout)
        positive = (features[0] * features[1]).sum(-1)
        value = found[0] - positive * scale - math.log(layout.total - 1)
        slope = found[1] - positive if scale.ndim else None
        ctx.save_for_backward(features, scale, whole, found[0], slope)
        ctx.layout = layout
        if slope is not None:
            ctx.mark_non_differentiable(slope)
        return value, slope

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator's doing
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
        _: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        features, scale, whole, log_sum, slope = ctx.saved_tensors
        weight = grad * scale if scale.ndim else grad
        pulls = _pulls(features, scale, whole, log_sum, weight, ctx.layout)
        pulls -= weight.sum(0)[:, None] * features.flip(0)
        if slope is not None:
            return pulls, grad * slope, None, None
        # Logits are scale * e_i . e_j: what pulls the images along themselves pulls the scale.
        # Summed over ranks this is the derivative of the global loss, each rank giving a part.
        return pulls * scale, (pulls[0] * features[0]).sum(), None, None


def _sums(features: Tensor, scale: Tensor, whole: Tensor, layout: BatchLayout) -> Tensor:
    """log_sum, and mean if the scale is one per anchor: [kinds, 2, local]."""
    fused = _fused(features)
    if len(layout.sizes) == 1 and fused is None:
        return blocks.pair_sums(features, scale)
    row_sums = blocks.row_sums if fused is None else fused.row_sums
    scales = [scale, scale] if scale.ndim == 0 else scale.unbind(0)
    sides = [
        row_sums(features[side], whole[1 - side], scales[side], layout.start) for side in (0, 1)
    ]
    return torch.stack(sides, 1)


def _pulls(
    features: Tensor,
    scale: Tensor,
    whole: Tensor,
    log_sum: Tensor,
    weight: Tensor,
    layout: BatchLayout,
) -> Tensor:
    """The pulls on this rank's features, as anchors and as candidates of all anchors."""
    scales = scale.expand(2) if scale.ndim == 0 else scale
    own = [Softmaxes(scales[side], log_sum[side], weight[side]) for side in (0, 1)]
    fused = _fused(features)
    if len(layout.sizes) == 1 and fused is None:
        return blocks.pair_pulls(features, own[0], own[1])
    told = torch.stack([log_sum, weight, *([scale] if scale.ndim else [])])
    everybody = collectives.gather_constant(told.permute(2, 0, 1), layout).permute(1, 2, 0)
    their_scales = everybody[2] if scale.ndim else scales
    row_pulls = blocks.row_pulls if fused is None else fused.row_pulls
    sides: list[Tensor] = []
    for side, other in ((0, 1), (1, 0)):
        theirs = Softmaxes(their_scales[other], everybody[0, other], everybody[1, other])
        sides.append(row_pulls(features[side], whole[other], own[side], theirs, layout.start))
    return torch.stack(sides)


def _fused(features: Tensor) -> Any:  # noqa: ANN401  a module, or none
    """The fused kernels, where they run: their tiles need the shared memory of an A100."""
    if not (HAS_TRITON and features.is_cuda and features.dtype == torch.float32):
        return None
    if torch.cuda.get_device_capability(features.device) < (8, 0):
        return None
    from neuclip.method.softmax import (
        fused,
    )  # Triton compiles nothing, and is not imported, without CUDA

    return fused
