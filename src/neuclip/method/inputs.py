"""Checks of a loss's inputs, so that a mistake raises an error before it becomes a NaN."""

import torch
from torch import Tensor

from neuclip.errors import UserError
from neuclip.parallel.collectives import BatchLayout

UNIT_NORM_TOLERANCE = 0.02
"""bfloat16 towers end within 0.01 of unit norm."""


class NotFiniteError(UserError):
    """Embeddings are infinite or NaN: the towers have diverged."""


def check_shapes(image_features: Tensor, text_features: Tensor, embed_dim: int) -> None:
    """Checks shapes. Reads no values, so it does not synchronise with the device.

    Raises:
        UserError: the shapes are wrong; the message has both the found and the expected ones.
    """
    shapes = (
        f"image_features {list(image_features.shape)}, text_features {list(text_features.shape)}"
    )
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise UserError(f"{shapes}: both must have the same shape [batch, {embed_dim}]")
    if image_features.shape[1] != embed_dim:
        raise UserError(f"{shapes}: this loss was made for embed_dim={embed_dim}")


def check_layout(layout: BatchLayout) -> None:
    """Checks that the global batch has negatives.

    Raises:
        UserError: on all ranks, if it is a single pair.
    """
    if layout.total < 2:
        raise UserError("a batch of one pair has no negatives; use at least two pairs")


@torch.no_grad()
def check_values(image_features: Tensor, text_features: Tensor) -> None:
    """Checks for finite, unit-norm embeddings. Synchronises with the device.

    Raises:
        UserError: a row is wrong; the message has the first such row and its norm.
    """
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        norms = torch.linalg.vector_norm(features.float(), dim=1)
        bad = ~torch.isfinite(norms)
        if bool(bad.any()):
            raise NotFiniteError(
                f"{name}: {int(bad.sum())} of {len(norms)} rows are not finite, the first is row "
                f"{int(bad.nonzero()[0])}"
            )
        off = (norms - 1).abs()
        if float(off.max()) > UNIT_NORM_TOLERANCE:
            row = int(off.argmax())
            raise UserError(
                f"{name}: row {row} has norm {float(norms[row]):.4g}; embeddings must have unit "
                f"norm (within {UNIT_NORM_TOLERANCE:g}): use torch.nn.functional.normalize"
            )
