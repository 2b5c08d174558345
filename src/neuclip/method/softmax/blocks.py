"""Softmaxes over a batch without its B x B matrix, and their feature gradients: row blocks.

    log_sum_i = log sum_{j != i} exp(scale_i s_ij)         in the forward pass
    mean_i    = sum_{j != i} p_ij s_ij                     p_ij the softmax: d log_sum_i / d scale_i
    grad_i    = sum_{j != i} (weight_i p_ij + weight'_j p'_ji) e_j         in the backward pass

`grad_i` holds both gradients of a feature: as anchor i over the candidates j and, with p' and
weight' of the other side's softmaxes, as a candidate of the anchors j. Both use the same
similarities. With one temperature for all, one product of a block serves both sides, where
open_clip's ClipLoss takes two (backward four, against three here). `neuclip.method.softmax.fused`
does the same on CUDA.

Features may be bfloat16: products then use tensor cores, and everything else, sums included, is
float32 (`neuclip.method.softmax.products`). Softmaxes are rounded to bfloat16 for their
products with the candidates.

Excluded candidates leave the sums and get no gradient from them, as the positive does. So do
candidates above an anchor's threshold, which leave the sum of that anchor alone. The log_sum of an
anchor without a negative is far below any other: callers replace it by 0, with weight 0.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neuclip.method.arithmetic import compiled_form
from neuclip.method.choices import CompiledLoss
from neuclip.method.softmax.exclusion import Exclusion
from neuclip.method.softmax.products import add_product, multiply, sum_type

CPU_BLOCK = 2**20
CUDA_BLOCK = 2**26
"""Numbers in a block at most; on a CPU it must fit the caches."""

_SHARE, _BYTES_OF_A_NUMBER = 64, 16
"""A block takes at most one in so many bytes of a card, with all that is made of it."""

MASKED = -1e30
"""In place of a positive's similarity: its softmax is 0. Minus infinity times 0 would be NaN."""


@dataclass(frozen=True)
class SoftmaxStats:
    """Softmaxes of anchors over candidates, as their normalizers.

    Attributes:
        scale: 1 / temperature, one for all or one per anchor.
        log_sum: log of the sum of exponentials, without the positive.
        weight: derivative of the loss by log_sum, times scale if there is one per anchor.
        threshold: largest similarity of a candidate that counts; none: all count.
    """

    scale: Float[Tensor, "*scales"]
    log_sum: Float[Tensor, " anchors"]
    weight: Float[Tensor, " anchors"]
    threshold: Float[Tensor, " anchors"] | None = None


def _log_sum(logits: Tensor, dim: int) -> Tensor:
    """log_sum along one axis of a block."""
    return torch.logsumexp(logits, dim)


def _sums(similarity: Tensor, scale: Tensor, dim: int) -> Tensor:
    """log_sum and mean along one axis of a block: [2, anchors]."""
    logits = similarity * scale
    top = logits.amax(dim, keepdim=True)
    weights = logits.sub_(top).exp_()
    total = weights.sum(dim)
    mean = weights.mul_(similarity).sum(dim) / total
    return torch.stack([total.log() + top.squeeze(dim), mean])


def _shares(product: Tensor, own: SoftmaxStats, other: SoftmaxStats | None) -> Tensor:
    """weight_i p_ij + weight'_j p'_ji of a block, in its place.

    Args:
        product: similarities if there is a scale or a threshold per anchor, else logits.
        own: softmaxes of the block's rows.
        other: softmaxes of all columns; none: they are constants, and the rows share one scale.
    """
    if other is None:
        return product.sub_(own.log_sum[:, None]).exp_().mul_(own.weight[:, None])
    if own.scale.ndim == 0 and own.threshold is None:
        as_candidate = product - other.log_sum
    else:
        as_candidate = product * other.scale
        if own.threshold is not None and other.threshold is not None:
            _leave_out_above(as_candidate, product, other.threshold)
            _leave_out_above(product, product, own.threshold[:, None])
        product *= own.scale[:, None] if own.scale.ndim else own.scale
        as_candidate -= other.log_sum
    product.sub_(own.log_sum[:, None]).exp_().mul_(own.weight[:, None])
    product += as_candidate.exp_().mul_(other.weight)
    return product


def _leave_out_above(values: Tensor, similarity: Tensor, threshold: Tensor) -> None:
    """Masks the values whose similarity is above its anchor's threshold, in place."""
    values.masked_fill_(similarity > threshold, MASKED)


@dataclass(frozen=True)
class Passes:
    """The passes over a block that read all its numbers; compiled, each is one kernel."""

    log_sum: Callable[[Tensor, int], Tensor] = _log_sum
    sums: Callable[[Tensor, Tensor, int], Tensor] = _sums
    shares: Callable[[Tensor, SoftmaxStats, SoftmaxStats | None], Tensor] = _shares


EAGER = Passes()


@functools.cache
def passes(compiled: CompiledLoss) -> Passes:
    """The passes as the arithmetic of a loss has them."""
    if compiled == "off":
        return EAGER
    return Passes(compiled_form(_log_sum), compiled_form(_sums), compiled_form(_shares))


def row_sums(  # noqa: PLR0913  what a block's sums depend on
    rows: Float[Tensor, "anchors dim"],
    columns: Float[Tensor, "candidates dim"],
    scale: Float[Tensor, "*scales"],
    offset: int,
    excluded: Exclusion | None = None,
    threshold: Float[Tensor, " anchors"] | None = None,
    over: Passes = EAGER,
) -> Float[Tensor, "kinds anchors"]:
    """Computes log_sums of anchors over candidates, and means if there is a scale per anchor.

    Args:
        rows: anchors; the positive of row i is column offset + i.
        columns: candidates.
        scale: 1 / temperature, one for all or one per anchor.
        offset: the first anchor's positive; the number of columns: no anchor has one.
        excluded: candidates without a part in an anchor's sum; none: all have one.
        threshold: of each anchor, see `SoftmaxStats`.
        over: the passes over a block.
    """
    found = rows.new_empty(1 + scale.ndim, len(rows), dtype=sum_type(rows.dtype))
    if scale.ndim == 0 and threshold is None:
        for block, logits in row_blocks(rows, columns, offset, excluded, scale):
            found[0, block] = over.log_sum(logits, 1)
        return found
    for block, similarity in row_blocks(rows, columns, offset, excluded):
        if threshold is not None:
            _leave_out_above(similarity, similarity, threshold[block, None])
        if scale.ndim == 0:
            found[0, block] = over.log_sum(similarity * scale, 1)
        else:
            found[:, block] = over.sums(similarity, scale[block, None], 1)
    return found


def pair_sums(
    features: Float[Tensor, "2 batch dim"],
    scale: Float[Tensor, "*scales"],
    excluded: Exclusion | None = None,
    over: Passes = EAGER,
) -> Float[Tensor, "kinds 2 batch"]:
    """Computes `row_sums` of images over texts and of texts over images, for a full batch.

    Args:
        features: images, texts; pair i in row i of both.
        scale: 1 / temperature, one for all or [2, batch].
        excluded: candidates without a part in an anchor's sum; none: all have one.
        over: the passes over a block.
    """
    image, text = features.unbind(0)
    shape = (1 if scale.ndim == 0 else 2, *features.shape[:2])
    found = features.new_full(shape, -math.inf, dtype=sum_type(features.dtype))
    if scale.ndim == 0:
        for block, logits in row_blocks(image, text, 0, excluded, scale):
            found[0, 0, block] = over.log_sum(logits, 1)
            torch.logaddexp(found[0, 1], over.log_sum(logits, 0), out=found[0, 1])
        return found
    found[1] = 0
    for block, similarity in row_blocks(image, text, 0, excluded):
        found[:, 0, block] = over.sums(similarity, scale[0, block, None], 1)
        found[:, 1] = _merged(found[:, 1], over.sums(similarity, scale[1], 0))
    return found


def row_gradients(  # noqa: PLR0913
    rows: Float[Tensor, "anchors dim"],
    columns: Float[Tensor, "candidates dim"],
    own: SoftmaxStats,
    other: SoftmaxStats | None,
    offset: int,
    excluded: Exclusion | None = None,
    over: Passes = EAGER,
) -> Float[Tensor, "anchors dim"]:
    """Computes the feature gradients of the rows.

    Args:
        rows: anchors; the positive of row i is column offset + i.
        columns: candidates.
        own: softmaxes of the rows over the columns.
        other: softmaxes of the columns over the rows of all ranks; none: the columns are constants,
            and the rows share one scale.
        offset: the first anchor's positive; the number of columns: no anchor has one.
        excluded: columns without a part in a row's sum, and the row in theirs; none: all have one.
        over: the passes over a block.
    """
    grads = torch.empty_like(rows, dtype=sum_type(rows.dtype))
    for block, weights in _weights(rows, columns, own, other, offset, excluded, over):
        multiply(weights, columns, out=grads[block])
    return grads


def pair_gradients(
    features: Float[Tensor, "2 batch dim"],
    image: SoftmaxStats,
    text: SoftmaxStats,
    excluded: Exclusion | None = None,
    over: Passes = EAGER,
) -> Float[Tensor, "2 batch dim"]:
    """Computes `row_gradients` of images and of texts, for a full batch."""
    grads = torch.zeros_like(features, dtype=sum_type(features.dtype))
    for block, weights in _weights(features[0], features[1], image, text, 0, excluded, over):
        multiply(weights, features[1], out=grads[0, block])
        add_product(weights.T, features[0, block], out=grads[1])
    return grads


@functools.cache
def block_size(memory: int) -> int:
    """Numbers in a block on a card: a power of two that fits its memory, given in bytes.

    It follows from the whole memory, not from what is free: a resumed run has the same blocks, and
    so rounds as before.
    """
    fitting = max(1, memory // (_SHARE * _BYTES_OF_A_NUMBER))
    return min(CUDA_BLOCK, 2 ** (fitting.bit_length() - 1))


def _limit(device: torch.device) -> int:
    """Numbers in a block."""
    if device.type != "cuda":
        return CPU_BLOCK
    return block_size(torch.cuda.get_device_properties(device).total_memory)


def row_blocks(
    rows: Float[Tensor, "anchors dim"],
    columns: Float[Tensor, "candidates dim"],
    offset: int,
    excluded: Exclusion | None,
    scale: Float[Tensor, ""] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the rows with their products, positives and excluded candidates masked.

    Args:
        rows: anchors.
        columns: candidates.
        offset: the first anchor's positive.
        excluded: candidates without a part in an anchor's sum.
        scale: multiplies all products; none: 1.
    """
    rounded = sum_type(rows.dtype) != rows.dtype
    if scale is not None and not rounded:
        rows, scale = rows * scale, None
    size = max(1, min(len(rows), _limit(rows.device) // len(columns)))
    products = rows.new_empty(size, len(columns), dtype=sum_type(rows.dtype))
    for start in range(0, len(rows), size):
        block = slice(start, min(start + size, len(rows)))
        product = products[: block.stop - start]
        multiply(rows[block], columns.T, out=product)
        if scale is not None:
            product *= scale  # factors are rounded once: without the scale
        product.diagonal(offset + start)[: len(product)].fill_(MASKED)
        if excluded is not None:
            product.masked_fill_(excluded.of(block), MASKED)
        yield block, product


def _weights(  # noqa: PLR0913
    rows: Tensor,
    columns: Tensor,
    own: SoftmaxStats,
    other: SoftmaxStats | None,
    offset: int,
    excluded: Exclusion | None,
    over: Passes,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields slices of the rows with weight_i p_ij + weight'_j p'_ji, in the rows' type."""
    shared = own.scale.ndim == 0 and own.threshold is None
    scale = own.scale if shared else None
    for block, product in row_blocks(rows, columns, offset, excluded, scale):
        scales = own.scale[block] if own.scale.ndim else own.scale
        bound = None if own.threshold is None else own.threshold[block]
        of_block = SoftmaxStats(scales, own.log_sum[block], own.weight[block], bound)
        yield block, over.shares(product, of_block, other).to(rows.dtype)


def _merged(
    one: Float[Tensor, "2 anchors"], other: Float[Tensor, "2 anchors"]
) -> Float[Tensor, "2 anchors"]:
    """log_sum and mean over the union of two sets of candidates."""
    log_sum = torch.logaddexp(one[0], other[0])
    mean = one[1] * (one[0] - log_sum).exp() + other[1] * (other[0] - log_sum).exp()
    return torch.stack([log_sum, mean])
