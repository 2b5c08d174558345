"""Distillation from a frozen model over the batch, as open_clip's DistillClipLoss.

    P_ij = softmax_j (scale' s'_ij)        the teacher's similarities of anchor i, of all ranks
    Q_ij = softmax_j (scale s_ij)          the model's
    loss = mean_i -sum_j P_ij log Q_ij     the mean of images over texts and of texts over images

The gradient is that of the divergence KL(P || Q), which is 0 at the teacher's weights. Q's gradient
flows through the candidates too, and to the temperature.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from neuclip.method.softmax.blocks import CPU_BLOCK, CUDA_BLOCK
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout


def distillation(
    features: Float[Tensor, "2 local dim"],
    scale: Float[Tensor, ""],
    teacher: Float[Tensor, "2 local other"],
    teacher_scale: Float[Tensor, ""],
) -> Float[Tensor, "2"]:
    """This rank's part of the loss, and of the divergence; means over ranks are those of the batch.

    All ranks call this together, with equal numbers of pairs. No B x B matrix is kept: rows are
    computed in blocks, and again in the backward pass.

    Args:
        features: unit-norm embeddings of this rank's images and texts.
        scale: 1 / temperature.
        teacher: the teacher's embeddings of the same pairs, of any width; without gradient.
        teacher_scale: 1 / the teacher's temperature.

    Returns:
        The loss, and the divergence, which has no gradient.
    """
    layout = collectives.layout_of(features.shape[1], equal=True)
    features = features if features.dtype == torch.float64 else features.float()
    teacher = teacher.to(features.dtype)
    candidates = _gathered(features, layout)
    taught = collectives.gather_constant(teacher.transpose(0, 1), layout).transpose(0, 1)
    size = CUDA_BLOCK if features.device.type == "cuda" else CPU_BLOCK
    rows = max(1, size // layout.total)
    found = features.new_zeros(2)
    for side in (0, 1):
        for start in range(0, features.shape[1], rows):
            block = slice(start, start + rows)
            sums = checkpoint(
                _block_sums,
                features[side, block] * scale.to(features.dtype),
                candidates[1 - side],
                teacher[side, block] * teacher_scale.to(features.dtype),
                taught[1 - side],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            assert isinstance(sums, Tensor)
            found = found + sums
    return found / (2 * features.shape[1])


def _gathered(features: Tensor, layout: BatchLayout) -> Tensor:
    """The features of all ranks, [2, total, dim]; the gradient flows back to every rank."""
    return collectives.gather(features.transpose(0, 1), layout).transpose(0, 1)


def _block_sums(anchors: Tensor, candidates: Tensor, taught: Tensor, others: Tensor) -> Tensor:
    """The sums over anchors of cross-entropy and divergence; anchors are scaled."""
    model = torch.log_softmax(anchors @ candidates.T, 1)
    target = torch.log_softmax(taught @ others.T, 1)
    weights = target.exp()
    entropy = -(weights * target).sum()
    cross = -(weights * model).sum()
    return torch.stack([cross, (cross - entropy).detach()])
