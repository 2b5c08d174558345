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
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuclip.errors import UserError
from neuclip.method.arithmetic import FUSED_BY_DEFAULT, PLAIN, Arithmetic
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
    arithmetic: Arithmetic = PLAIN,
) -> tuple[Float[Tensor, "2 local"], Float[Tensor, "2 local"] | None]:
    """Computes log g^ of this rank's anchors over the global batch.

    Args:
        features: unit-norm embeddings of this rank's images and texts.
        logit_scale: 1 / temperature, one for all or [2, local].
        candidates: the pairs of all ranks.
        arithmetic: by which kernels, from which number type. Thresholds are similarities in the
            features' own type, so with thresholds nothing is rounded, and row blocks are used.

    Returns:
        log g^_i, and its derivative by the scale as a constant if there is a scale per anchor. An
        anchor without a negative has `NO_ESTIMATE` and 0.
    """
    if candidates.thresholds is not None:
        arithmetic = Arithmetic(fused="off", compiled=arithmetic.compiled)
    found = _LogInner.apply(features, logit_scale, candidates, arithmetic)
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
        arithmetic: Arithmetic,
    ) -> tuple[Tensor, Tensor | None]:
        found = _sums(features, scale, candidates, arithmetic)
        positive = (features[0] * features[1]).sum(-1)
        by_scale = found[1] - positive if scale.ndim else None
        count = candidates.counts
        if not isinstance(count, Tensor):
            value = torch.addcmul(found[0], positive, scale, value=-1)
            value -= math.log(count)
        else:
            value = found[0] - positive * scale - count.clamp_min(1).to(positive.dtype).log()
            found[0].masked_fill_(count == 0, 0)
            value.masked_fill_(count == 0, NO_ESTIMATE)
            by_scale = by_scale if by_scale is None else by_scale.masked_fill_(count == 0, 0)
        ctx.save_for_backward(features, scale, found[0], by_scale)
        ctx.candidates, ctx.arithmetic = candidates, arithmetic  # constants
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
        stats = [log_sum, weight, *([scale] if scale.ndim else [])]
        grads = _feature_gradients(features, scale, stats, ctx.candidates, ctx.arithmetic)
        grads.addcmul_(weight.sum(0)[:, None], features.flip(0), value=-1)
        if by_scale is not None:
            return grads, grad * by_scale, None, None
        # Logits are scale * e_i . e_j, so the radial part of the images' gradient is the scale's.
        # The ranks' parts sum to the derivative of the global loss.
        return grads * scale, (grads[0] * features[0]).sum(), None, None


def _sums(features: Tensor, scale: Tensor, others: Candidates, arithmetic: Arithmetic) -> Tensor:
    """log_sum, and mean if there is a scale per anchor: [1 or 2, 2, local]."""
    fused, over = fused_kernels(features, arithmetic), blocks.passes(arithmetic.compiled)
    features, everybody = arithmetic.factor(features), arithmetic.factor(others.features)
    scales = [scale, scale] if scale.ndim == 0 else scale.unbind(0)
    start, excluded = others.layout.start, others.excluded
    given = [(features[side], everybody[1 - side], scales[side]) for side in (0, 1)]
    if (thresholds := others.thresholds) is not None:
        bounds = thresholds.local
        sides = [blocks.row_sums(*given[s], start, excluded, bounds[s], over) for s in (0, 1)]
        return torch.stack(sides, 1)
    if len(others.layout.sizes) == 1 and fused is None:
        return blocks.pair_sums(features, scale, others.excluded, over)
    row_sums = partial(blocks.row_sums, over=over) if fused is None else fused.row_sums
    return torch.stack([row_sums(*given[side], start, excluded) for side in (0, 1)], 1)


def _feature_gradients(
    features: Tensor,
    scale: Tensor,
    stats: list[Tensor],
    others: Candidates,
    arithmetic: Arithmetic,
) -> Tensor:
    """Gradients of this rank's features, as anchors and as candidates of all anchors.

    Args:
        features: of this rank.
        scale: 1 / temperature, one for all or [2, local].
        stats: log-sums and weights of this rank's anchors, and scales if each has one: [2, local].
        others: the pairs of all ranks.
        arithmetic: by which kernels, from which number type.
    """
    fused, over = fused_kernels(features, arithmetic), blocks.passes(arithmetic.compiled)
    features, candidates = arithmetic.factor(features), arithmetic.factor(others.features)
    log_sum, weight = stats[:2]
    scales = scale.expand(2) if scale.ndim == 0 else scale
    thresholds = others.thresholds
    local = everybody = [None, None]
    if thresholds is not None:
        local, everybody = thresholds.local, thresholds.everybody
    own = [SoftmaxStats(scales[s], log_sum[s], weight[s], local[s]) for s in (0, 1)]
    if len(others.layout.sizes) == 1 and fused is None and thresholds is None:
        return blocks.pair_gradients(features, own[0], own[1], others.excluded, over)
    message = torch.stack(stats).permute(2, 0, 1)
    sent = collectives.gather_constant(message, others.layout).permute(1, 2, 0)
    global_scales = sent[2] if scale.ndim else scales
    row_gradients = (
        partial(blocks.row_gradients, over=over) if fused is None else fused.row_gradients
    )
    start, excluded = others.layout.start, others.excluded
    sides: list[Tensor] = []
    for side, other in ((0, 1), (1, 0)):
        theirs = SoftmaxStats(
            global_scales[other], sent[0, other], sent[1, other], everybody[other]
        )
        rows, columns = features[side], candidates[other]
        sides.append(row_gradients(rows, columns, own[side], theirs, start, excluded))
    return torch.stack(sides)


def fused_kernels(features: Tensor, arithmetic: Arithmetic) -> Any:  # noqa: ANN401  a module
    """The module of fused kernels if they are wanted and run here; none otherwise.

    Raises:
        UserError: they are asked for and cannot run here; the message says why.
    """
    if arithmetic.fused == "off" or (arithmetic.fused == "auto" and not FUSED_BY_DEFAULT):
        return None
    obstacle = obstacle_to_fused(features.device)
    if obstacle is None and features.dtype != torch.float32:
        obstacle = f"the features are {features.dtype}, and the kernels take float32"
    if obstacle is not None:
        if arithmetic.fused == "on":
            raise UserError(f"--fused-loss on: {obstacle}; use --fused-loss auto")
        return None
    from neuclip.method.softmax import fused  # imports Triton, which only CUDA needs

    return fused


def obstacle_to_fused(device: torch.device) -> str | None:
    """Why the fused kernels cannot run on a device; none: they can."""
    if device.type != "cuda":
        return f"the kernels are for CUDA, and this run computes on {device.type}"
    if not HAS_TRITON:
        return "the kernels need Triton, which is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; the kernels' tiles need the shared memory of 8.0 "
            "(A100) or newer"
        )
    return None
