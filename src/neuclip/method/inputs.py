"""Checks of a loss's inputs, so that a mistake raises an error before it becomes a NaN."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from neuclip.errors import UserError
from neuclip.method.notation import Pairs
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
    check_rows("image_features", image_features)
    check_rows("text_features", text_features)


@torch.no_grad()
def check_rows(name: str, features: Tensor, *, may_be_zero: bool = False) -> None:
    """Checks that rows are finite and of unit norm. Synchronises with the device.

    Raises:
        UserError: a row is wrong; the message has the first such row.
    """
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    bad = ~torch.isfinite(norms)
    if bool(bad.any()):
        raise NotFiniteError(
            f"{name}: {int(bad.sum())} of {len(norms)} rows are not finite, the first is row "
            f"{int(bad.nonzero()[0])}"
        )
    off = (norms - 1).abs()
    if may_be_zero:
        off = off.masked_fill(norms == 0, 0)
    if float(off.max()) > UNIT_NORM_TOLERANCE:
        row = int(off.argmax())
        raise UserError(
            f"{name}: row {row} has norm {float(norms[row]):.4g}; embeddings must have unit "
            f"norm (within {UNIT_NORM_TOLERANCE:g}): use torch.nn.functional.normalize"
        )


def with_options(pairs: Pairs, given: Mapping[str, Tensor], *, check_values: bool) -> Pairs:
    """Checks what a batch brings beside its pairs, and adds it on the device of the features.

    Args:
        pairs: this rank's pairs.
        given: `groups`, `pair_weights` and `negative_features`, as far as they are given.
        check_values: whether to read values too, which synchronises with the device.

    Raises:
        UserError: a wrong shape or type, or a wrong value; the message has it.
    """
    device, dtype = pairs.features.device, pairs.features.dtype
    count, dim = pairs.features.shape[1:]
    if (groups := given.get("groups")) is not None:
        if groups.dtype != torch.int64 or groups.shape[:1] != (count,) or groups.ndim > 2:
            raise UserError(
                f"groups {list(groups.shape)} of {groups.dtype}: expected [{count}] or "
                f"[{count}, kinds] of torch.int64, one row per pair"
            )
        groups = groups.reshape(count, -1).to(device, non_blocking=True)
        pairs = replace(pairs, groups=groups)
    if (weights := given.get("pair_weights")) is not None:
        if weights.shape != (count,) or not weights.is_floating_point():
            raise UserError(
                f"pair_weights {list(weights.shape)} of {weights.dtype}: expected [{count}] of a "
                "floating-point type, one per pair"
            )
        if check_values:
            check_weights(weights)
        pairs = replace(pairs, weights=weights.detach().to(device, dtype, non_blocking=True))
    if (negatives := given.get("negative_features")) is not None:
        if negatives.shape != (count, dim):
            raise UserError(
                f"negative_features {list(negatives.shape)}: expected [{count}, {dim}], one row "
                "per pair, zeros for a pair without a hard negative"
            )
        if check_values:
            check_rows("negative_features", negatives, may_be_zero=True)
        pairs = replace(pairs, negatives=negatives.to(dtype))
    return pairs


def with_keys(pairs: Pairs, keys: Tensor, *, check_values: bool) -> Pairs:
    """Checks the keys of the pairs, and adds them in the type of the features.

    Args:
        pairs: this rank's pairs.
        keys: `key_features`.
        check_values: whether to read values too, which synchronises with the device.

    Raises:
        UserError: a wrong shape, or a row that is not finite or not of unit norm.
    """
    if keys.shape != pairs.features.shape:
        raise UserError(
            f"key_features {list(keys.shape)}: expected {list(pairs.features.shape)}, those of the "
            "images and those of the texts, one row per pair"
        )
    keys = keys.detach().to(pairs.features.dtype)
    if check_values:
        check_rows("key_features[0] (images)", keys[0])
        check_rows("key_features[1] (texts)", keys[1])
    return replace(pairs, keys=keys)


def check_weights(weights: Tensor) -> None:
    """Checks the values of weights. Synchronises with the device.

    Raises:
        UserError: a weight is wrong; the message has the first such weight.
    """
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise UserError(
            f"pair_weights: row {row} has {float(weights[row]):g}; weights must be 0 or more"
        )
