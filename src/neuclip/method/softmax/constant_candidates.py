"""Log-sums of anchors over candidates that are constants: keys of a batch, and of a queue.

    log_sum_i = log sum_{k in N_i} exp(e_i . c_k / tau)

The gradient is that of the anchors and of 1 / tau alone, so nothing is communicated. Both passes go
over row blocks: no matrix of anchors by candidates is kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from neuclip.method.arithmetic import Arithmetic
from neuclip.method.softmax import blocks
from neuclip.method.softmax.blocks import SoftmaxStats
from neuclip.method.softmax.exclusion import Exclusion


@dataclass(frozen=True)
class ConstantCandidates:
    """The candidates of this rank's anchors.

    Attributes:
        columns: those of the images (embeddings of texts) and those of the texts.
        offset: the column of the first anchor's positive, which leaves its sum; the others' follow.
        excluded: columns without a part in an anchor's sum; none: all have one.
    """

    columns: Float[Tensor, "2 columns dim"]
    offset: int
    excluded: Exclusion | None


def constant_log_sum(
    features: Float[Tensor, "2 local dim"],
    logit_scale: Float[Tensor, ""],
    candidates: ConstantCandidates,
    arithmetic: Arithmetic,
) -> Float[Tensor, "2 local"]:
    """The log-sums; of an anchor that leaves out all candidates, one far below any other.

    Args:
        features: unit-norm embeddings of this rank's images and texts.
        logit_scale: 1 / temperature.
        candidates: what the sums are over.
        arithmetic: from which number type, and whether compiled. There are no fused kernels.
    """
    found = _LogSum.apply(features, logit_scale, candidates, arithmetic)
    assert isinstance(found, Tensor)
    return found


class _LogSum(torch.autograd.Function):
    """The log-sums with the gradient by anchors and scale."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  autograd's context takes any attribute
        features: Tensor,
        scale: Tensor,
        candidates: ConstantCandidates,
        arithmetic: Arithmetic,
    ) -> Tensor:
        over = blocks.passes(arithmetic.compiled)
        rows, columns = arithmetic.factor(features), arithmetic.factor(candidates.columns)
        start, excluded = candidates.offset, candidates.excluded
        sides = [
            blocks.row_sums(rows[side], columns[side], scale, start, excluded, over=over)[0]
            for side in (0, 1)
        ]
        log_sum = torch.stack(sides)
        ctx.save_for_backward(features, scale, log_sum)
        ctx.candidates, ctx.arithmetic = candidates, arithmetic  # constants
        return log_sum

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  the decorator's doing
        ctx: Any,  # noqa: ANN401
        grad: Tensor,
    ) -> tuple[Tensor | None, ...]:
        features, scale, log_sum = ctx.saved_tensors
        candidates: ConstantCandidates = ctx.candidates
        arithmetic: Arithmetic = ctx.arithmetic
        over = blocks.passes(arithmetic.compiled)
        rows, columns = arithmetic.factor(features), arithmetic.factor(candidates.columns)
        start, excluded = candidates.offset, candidates.excluded
        sides = [
            blocks.row_gradients(
                rows[side],
                columns[side],
                SoftmaxStats(scale, log_sum[side], grad[side]),
                None,
                start,
                excluded,
                over,
            )
            for side in (0, 1)
        ]
        grads = torch.stack(sides)
        # Logits are scale * e_i . c_k, so the radial part of the anchors' gradient is the scale's.
        return grads * scale, (grads * features).sum(), None, None
