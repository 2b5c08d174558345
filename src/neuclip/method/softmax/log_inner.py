"""log g^ of a batch over all ranks, without its B x B matrix.

    log g^_i = log sum_{j in N_i} exp(s_ij / tau) - s_ii / tau - log |N_i|

N_i are the negatives of anchor i: all j != i, or those of them that are not in a group with i and
not above the threshold of i.

Every rank gathers all features once, as constants (FastCLIP, arXiv 2407.01445, section 5). The loss
depends on a rank's features as anchors and as candidates of the anchors of all ranks. The gradient
as candidates needs two numbers per anchor and side: log-sums, and the derivatives of the loss by
them. They are gathered in the backward pass, so no gradient of size B d is communicated, and one
product gives both gradients.
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuclip.method.notation import NO_ESTIMATE
from neuclip.method.softmax import blocks
from neuclip.method.softmax.blocks import SoftmaxStats
from neuclip.method.softmax.candidates import Candidates
from neuclip.parallel import collectives

HAS_TRITON = find_spec("triton") is not None


def log_inner(
    features: Float[Tensor, "2 local dim"],
    logit_scale: Float[Tensor, "*scales"],
    candidates: Candidates,
) -> tuple[Float[Tensor, "2 local"], Float[Tensor, "2 local"] | None]:
    """Computes log g^ of this rank's anchors over the global batch.

    Args:
        features: unit-norm embeddings of this rank's images and texts.
        logit_scale: 1 / temperature, one for all or [2, local].
        candidates: the pairs of all ranks.

    Returns:
        log g^_i, and its derivative by the scale as a constant if there is a scale per anchor. An
        anchor without a negative has `NO_ESTIMATE` and 0.
    """
    found = _LogInner.apply(features, logit_scale, candidates)
    assert isinstance(found, tuple)
    return found


class _LogInner(torch.autograd.Function):
    """log g^ with the gradient by features and scale."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  autograd's context takes any attribute
        features: Tensor,
        scale: Tensor,
        candidates: Candidates,
    ) -> tuple[Tensor, Tensor | None]:
        found = _sums(features, scale, candidates)
        positive = (features[0] * features[1]).sum(-1)
        by_scale = found[1] - positive if scale.ndim else None
        count = candidates.counts
        if not isinstance(count, Tensor):
            value = found[0] - positive * scale - math.log(count)
        else:
            value = found[0] - positive * scale - count.clamp_min(1).to(positive.dtype).log()
            found[0].masked_fill_(count == 0, 0)
            value.masked_fill_(count == 0, NO_ESTIMATE)
            by_scale = by_scale if by_scale is None else by_scale.masked_fill_(count == 0, 0)
        ctx.save_for_backward(features, scale, found[0], by_scale)
        ctx.candidates = candidates  # constants
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
        features, scale, log_sum, by_scale = ctx.saved_tensors
        weight = grad * scale if scale.ndim else grad
        grads = _feature_gradients(features, scale, ctx.candidates, log_sum, weight)
        grads -= weight.sum(0)[:, None] * features.flip(0)
        if by_scale is not None:
            return grads, grad * by_scale, None
        # Logits are scale * e_i . e_j, so the radial part of the images' gradient is the scale's.
        # The ranks' parts sum to the derivative of the global loss.
        return grads * scale, (grads[0] * features[0]).sum(), None


def _sums(features: Tensor, scale: Tensor, others: Candidates) -> Tensor:
    """log_sum, and mean if there is a scale per anchor: [1 or 2, 2, local]."""
    scales = [scale, scale] if scale.ndim == 0 else scale.unbind(0)
    start, excluded = others.layout.start, others.excluded
    given = [(features[side], others.features[1 - side], scales[side]) for side in (0, 1)]
    if (thresholds := others.thresholds) is not None:
        bounds = thresholds.local
        sides = [blocks.row_sums(*given[s], start, excluded, bounds[s]) for s in (0, 1)]
        return torch.stack(sides, 1)
    fused = fused_kernels(features)
    if len(others.layout.sizes) == 1 and fused is None:
        return blocks.pair_sums(features, scale, others.excluded)
    row_sums = blocks.row_sums if fused is None else fused.row_sums
    return torch.stack([row_sums(*given[side], start, excluded) for side in (0, 1)], 1)


def _feature_gradients(
    features: Tensor, scale: Tensor, others: Candidates, log_sum: Tensor, weight: Tensor
) -> Tensor:
    """Gradients of this rank's features, as anchors and as candidates of all anchors."""
    scales = scale.expand(2) if scale.ndim == 0 else scale
    thresholds = others.thresholds
    local, everybody = ([None, None],) * 2
    if thresholds is not None:
        local, everybody = thresholds.local, thresholds.everybody
    own = [SoftmaxStats(scales[s], log_sum[s], weight[s], local[s]) for s in (0, 1)]
    fused = None if thresholds is not None else fused_kernels(features)
    if len(others.layout.sizes) == 1 and fused is None and thresholds is None:
        return blocks.pair_gradients(features, own[0], own[1], others.excluded)
    stats = torch.stack([log_sum, weight, *([scale] if scale.ndim else [])])
    stats = collectives.gather_constant(stats.permute(2, 0, 1), others.layout).permute(1, 2, 0)
    global_scales = stats[2] if scale.ndim else scales
    row_gradients = blocks.row_gradients if fused is None else fused.row_gradients
    start, excluded = others.layout.start, others.excluded
    sides: list[Tensor] = []
    for side, other in ((0, 1), (1, 0)):
        theirs = SoftmaxStats(
            global_scales[other], stats[0, other], stats[1, other], everybody[other]
        )
        rows, columns = features[side], others.features[other]
        sides.append(row_gradients(rows, columns, own[side], theirs, start, excluded))
    return torch.stack(sides)


def fused_kernels(features: Tensor) -> Any:  # noqa: ANN401  a module, or none
    """The module of fused kernels if they run here: tiles need the shared memory of an A100."""
    if not (HAS_TRITON and features.is_cuda and features.dtype == torch.float32):
        return None
    if torch.cuda.get_device_capability(features.device) < (8, 0):
        return None
    from neuclip.method.softmax import fused  # imports Triton, which only CUDA needs

    return fused
