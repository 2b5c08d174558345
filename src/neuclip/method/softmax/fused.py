# pyright: basic
"""`softmax.blocks` in single Triton kernels, for CUDA: logits are never written to memory.

    row_sums        a program owns a tile of anchors, loops over the candidates, and keeps a running
                    maximum and sum (online log-sum-exp)
    row_gradients   the same loop: products, softmaxes of both sides, times the candidates

Products accumulate in float32. Those of float32 features follow torch's own setting
(`torch.set_float32_matmul_precision`): one TF32 product if it allows TF32, otherwise
three, which together are close to float32 and still run on tensor cores.
A program of `row_gradients` keeps at most `Tiles.part` columns of the result: for wider embeddings
the products are computed again for each part.
"""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from neuclip.method.softmax.blocks import SoftmaxStats
from neuclip.method.softmax.exclusion import Exclusion


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program's tiles: powers of two, at least 16."""

    anchors: int = 64
    candidates: int = 64
    inner: int = 32
    part: int = 256


TILES = Tiles()
_WARPS = 8


def row_sums(
    rows: Float[Tensor, "anchors dim"],
    columns: Float[Tensor, "candidates dim"],
    scale: Float[Tensor, "*scales"],
    offset: int,
    excluded: Exclusion | None = None,
) -> Float[Tensor, "kinds anchors"]:
    """Computes `blocks.row_sums`."""
    found = torch.empty(1 + scale.ndim, len(rows), device=rows.device)
    scales = scale.expand(len(rows))
    groups, kinds = _groups(excluded, rows)
    with torch.cuda.device_of(rows):
        _sums_kernel[(triton.cdiv(len(rows), TILES.anchors),)](
            rows,
            columns,
            scales,
            found[0],
            found[-1],
            *groups,
            *(len(rows), len(columns), rows.shape[1], offset),
            *(*rows.stride(), *columns.stride(), scales.stride(0)),
            WITH_MEANS=scale.ndim > 0,
            KINDS=kinds,
            PRECISION=_precision(),
            ANCHORS=TILES.anchors,
            CANDIDATES=TILES.candidates,
            INNER=TILES.inner,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]  launch option
        )
    return found


def row_gradients(
    rows: Float[Tensor, "anchors dim"],
    columns: Float[Tensor, "candidates dim"],
    own: SoftmaxStats,
    other: SoftmaxStats,
    offset: int,
    excluded: Exclusion | None = None,
) -> Float[Tensor, "anchors dim"]:
    """Computes `blocks.row_gradients`."""
    grads = torch.empty(rows.shape, device=rows.device)
    dim = rows.shape[1]
    part = min(TILES.part, max(16, triton.next_power_of_2(dim)))
    scales, other_scales = own.scale.expand(len(rows)), other.scale.expand(len(columns))
    groups, kinds = _groups(excluded, rows)
    with torch.cuda.device_of(rows):
        _gradients_kernel[(triton.cdiv(len(rows), TILES.anchors), triton.cdiv(dim, part))](
            rows,
            columns,
            *(scales, own.log_sum.contiguous(), own.weight.contiguous()),
            *(other_scales, other.log_sum.contiguous(), other.weight.contiguous()),
            grads,
            *groups,
            *(len(rows), len(columns), dim, offset),
            *(*rows.stride(), *columns.stride(), scales.stride(0), other_scales.stride(0)),
            KINDS=kinds,
            PRECISION=_precision(),
            ANCHORS=TILES.anchors,
            CANDIDATES=TILES.candidates,
            INNER=TILES.inner,
            PART=part,
            num_warps=_WARPS,  # pyright: ignore[reportCallIssue]  launch option
        )
    return grads


def _groups(excluded: Exclusion | None, rows: Tensor) -> tuple[tuple[Tensor, Tensor], int]:
    """The group ids of anchors and candidates, and the number of kinds; 0: nothing is read."""
    if excluded is None:
        return (rows, rows), 0
    kinds = len(excluded.anchors)
    return (excluded.anchors.contiguous(), excluded.candidates.contiguous()), kinds


def _precision() -> str:
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
@no_type_check
def _products(
    rows,
    columns,
    anchor,
    candidate,
    n_rows,
    n_columns,
    dim,
    row_stride,
    row_step,
    column_stride,
    column_step,
    PRECISION: tl.constexpr,
    ANCHORS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    INNER: tl.constexpr,
):
    """Anchors by candidates, in float32."""
    products = tl.zeros((ANCHORS, CANDIDATES), dtype=tl.float32)
    row_start = anchor.to(tl.int64) * row_stride
    column_start = candidate.to(tl.int64) * column_stride
    for start in range(0, dim, INNER):
        k = start + tl.arange(0, INNER)
        a = tl.load(
            rows + row_start[:, None] + k[None, :] * row_step,
            mask=(anchor < n_rows)[:, None] & (k < dim)[None, :],
            other=0.0,
        )
        b = tl.load(
            columns + column_start[None, :] + k[:, None] * column_step,
            mask=(candidate < n_columns)[None, :] & (k < dim)[:, None],
            other=0.0,
        )
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return products


@triton.jit
@no_type_check
def _negatives(
    row_groups, column_groups, anchor, candidate, n_rows, n_columns, offset, KINDS: tl.constexpr
):
    """Whether a candidate has a part in an anchor's sum: not the positive, nor excluded."""
    taken = (candidate < n_columns)[None, :] & (candidate[None, :] != anchor[:, None] + offset)
    for kind in tl.static_range(KINDS):
        ids = tl.load(row_groups + kind * n_rows + anchor, mask=anchor < n_rows, other=0)
        others = tl.load(
            column_groups + kind * n_columns + candidate, mask=candidate < n_columns, other=0
        )
        taken &= (ids[:, None] != others[None, :]) | (ids == 0)[:, None]
    return taken


@triton.jit
@no_type_check
def _sums_kernel(
    rows,
    columns,
    scales,
    log_sums,
    means,
    row_groups,
    column_groups,
    n_rows,
    n_columns,
    dim,
    offset,
    row_stride,
    row_step,
    column_stride,
    column_step,
    scale_stride,
    WITH_MEANS: tl.constexpr,
    KINDS: tl.constexpr,
    PRECISION: tl.constexpr,
    ANCHORS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    INNER: tl.constexpr,
):
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    scale = tl.load(scales + anchor * scale_stride, mask=anchor < n_rows, other=0.0)
    # Weights of masked logits count for nothing once the maximum is a real logit; without
    # exclusions it is one from the first tile on, which has at least two candidates.
    top = tl.full((ANCHORS,), -1e30, dtype=tl.float32)
    total = tl.zeros((ANCHORS,), dtype=tl.float32)
    weighted = tl.zeros((ANCHORS,), dtype=tl.float32)
    for start in range(0, n_columns, CANDIDATES):
        candidate = start + tl.arange(0, CANDIDATES)
        similarity = _products(
            rows,
            columns,
            anchor,
            candidate,
            n_rows,
            n_columns,
            dim,
            row_stride,
            row_step,
            column_stride,
            column_step,
            PRECISION,
            ANCHORS,
            CANDIDATES,
            INNER,
        )
        taken = _negatives(
            row_groups, column_groups, anchor, candidate, n_rows, n_columns, offset, KINDS
        )
        logits = tl.where(taken, similarity * scale[:, None], -1e30)
        new_top = tl.maximum(top, tl.max(logits, 1))
        shrink = tl.exp(top - new_top)
        weights = tl.exp(logits - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        if WITH_MEANS:
            weighted = weighted * shrink + tl.sum(weights * similarity, 1)
        top = new_top
    tl.store(log_sums + anchor, top + tl.log(total), mask=anchor < n_rows)
    if WITH_MEANS:
        tl.store(means + anchor, weighted / total, mask=anchor < n_rows)


@triton.jit
@no_type_check
def _gradients_kernel(
    rows,
    columns,
    scales,
    log_sums,
    weights,
    other_scales,
    other_log_sums,
    other_weights,
    grads,
    row_groups,
    column_groups,
    n_rows,
    n_columns,
    dim,
    offset,
    row_stride,
    row_step,
    column_stride,
    column_step,
    scale_stride,
    other_scale_stride,
    KINDS: tl.constexpr,
    PRECISION: tl.constexpr,
    ANCHORS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    INNER: tl.constexpr,
    PART: tl.constexpr,
):
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    feature = tl.program_id(1) * PART + tl.arange(0, PART)
    here = anchor < n_rows
    scale = tl.load(scales + anchor * scale_stride, mask=here, other=0.0)
    log_sum = tl.load(log_sums + anchor, mask=here, other=0.0)
    weight = tl.load(weights + anchor, mask=here, other=0.0)
    grad = tl.zeros((ANCHORS, PART), dtype=tl.float32)
    for start in range(0, n_columns, CANDIDATES):
        candidate = start + tl.arange(0, CANDIDATES)
        there = candidate < n_columns
        similarity = _products(
            rows,
            columns,
            anchor,
            candidate,
            n_rows,
            n_columns,
            dim,
            row_stride,
            row_step,
            column_stride,
            column_step,
            PRECISION,
            ANCHORS,
            CANDIDATES,
            INNER,
        )
        other_scale = tl.load(other_scales + candidate * other_scale_stride, mask=there, other=0.0)
        other_log_sum = tl.load(other_log_sums + candidate, mask=there, other=0.0)
        other_weight = tl.load(other_weights + candidate, mask=there, other=0.0)
        own = weight[:, None] * tl.exp(similarity * scale[:, None] - log_sum[:, None])
        as_candidate = other_weight[None, :] * tl.exp(
            similarity * other_scale[None, :] - other_log_sum[None, :]
        )
        taken = _negatives(
            row_groups, column_groups, anchor, candidate, n_rows, n_columns, offset, KINDS
        )
        shares = tl.where(taken, own + as_candidate, 0.0)
        values = tl.load(
            columns
            + candidate.to(tl.int64)[:, None] * column_stride
            + feature[None, :] * column_step,
            mask=there[:, None] & (feature < dim)[None, :],
            other=0.0,
        )
        grad = tl.dot(shares.to(values.dtype), values, grad, input_precision=PRECISION)
    tl.store(
        grads + anchor.to(tl.int64)[:, None] * dim + feature[None, :],
        grad,
        mask=here[:, None] & (feature < dim)[None, :],
    )
