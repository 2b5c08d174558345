"""log g^ of a batch without its B x B matrix: row blocks, computed again in the backward pass.

    log g^_i = log sum_{j != i} exp(l_ij) - l_ii - log(B - 1),      l_ij = s_ij / tau

For one process and one temperature the same blocks serve both sides (rows: image anchors, columns:
text anchors): one product forward and three backward, where open_clip's ClipLoss takes two and
four. The temperature is multiplied into the rows beforehand, so its gradient costs nothing here.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_BLOCK = 2**20
CUDA_BLOCK = 2**26
"""Numbers in a block: on a CPU few enough to stay in its caches."""


def _blocks(rows: Tensor, columns: Tensor, offset: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows with their logits, the positives at minus infinity."""
    limit = CUDA_BLOCK if rows.is_cuda else CPU_BLOCK
    size = max(1, min(len(rows), limit // len(columns)))
    for start in range(0, len(rows), size):
        block = slice(start, min(start + size, len(rows)))
        logits = rows[block] @ columns.T
        logits.diagonal(offset + start)[: len(logits)].fill_(-math.inf)
        yield block, logits


class _LogInner(torch.autograd.Function):
    """Log g^ of scaled rows against columns, and of columns against rows if `both`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  autograd's context takes any attribute
        rows: Tensor,
        columns: Tensor,
        offset: int,
        both: bool,
    ) -> Tensor:
        positive = (rows * columns[offset : offset + len(rows)]).sum(1)
        by_row = torch.empty_like(positive)
        by_column = torch.full_like(columns[:, 0], -math.inf)
        for block, logits in _blocks(rows, columns, offset):
            by_row[block] = torch.logsumexp(logits, 1)
            if both:
                by_column = torch.logaddexp(by_column, torch.logsumexp(logits, 0))
        ctx.save_for_backward(rows, columns, by_row, by_column)
        ctx.offset, ctx.both = offset, both
        sums = torch.stack([by_row, by_column]) if both else by_row
        return sums - positive - math.log(len(columns) - 1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator's doing
        ctx: Any,  # noqa: ANN401
        *grads: Tensor,
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        rows, columns, by_row, by_column = ctx.saved_tensors
        row_weights = grad[0] if ctx.both else grad
        row_grad, column_grad = torch.empty_like(rows), torch.zeros_like(columns)
        for block, logits in _blocks(rows, columns, ctx.offset):
            other = (logits - by_column).exp_().mul_(grad[1]) if ctx.both else None
            weights = logits.sub_(by_row[block, None]).exp_().mul_(row_weights[block, None])
            if other is not None:
                weights += other
            row_grad[block] = weights @ columns
            column_grad.addmm_(weights.T, rows[block])
        own = slice(ctx.offset, ctx.offset + len(rows))
        pull = (grad.sum(0) if ctx.both else grad)[:, None]
        row_grad -= pull * columns[own]
        column_grad[own] -= pull * rows
        return row_grad, column_grad, None, None


def log_inner_of_rows(
    anchors: Float[Tensor, "anchors dim"],
    candidates: Float[Tensor, "candidates dim"],
    logit_scale: Float[Tensor, "*scales"],
    offset: int = 0,
) -> Float[Tensor, " anchors"]:
    """Log g^ of some anchors against all candidates.

    Args:
        anchors: unit-norm embeddings; the positive of anchor i is candidate offset + i.
        candidates: those of the other side.
        logit_scale: 1 / temperature, one for all or one per anchor.
        offset: the first anchor's positive.
    """
    scaled = anchors * logit_scale[..., None]
    return _LogInner.apply(scaled, candidates, offset, False)  # pyright: ignore[reportReturnType]


def log_inner_of_pairs(
    features: Float[Tensor, "2 batch dim"], logit_scale: Float[Tensor, "*scales"]
) -> Float[Tensor, "2 batch"]:
    """Log g^ of the images against the texts and the other way, for a whole batch at once.

    Args:
        features: images, texts; unit norm.
        logit_scale: 1 / temperature, one for all or [2, batch].
    """
    image, text = features.unbind(0)
    if logit_scale.ndim == 0:
        return _LogInner.apply(image * logit_scale, text, 0, True)  # pyright: ignore[reportReturnType]
    sides = [
        log_inner_of_rows(image, text, logit_scale[0]),
        log_inner_of_rows(text, image, logit_scale[1]),
    ]
    return torch.stack(sides)
