"""Position embeddings of loaded weights, resized as open_clip does for other images and texts."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
from open_clip.model import resize_text_pos_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from neuclip.model.architecture import Architecture
from neuclip.model.clip import Clip

_UNFIT = (
    RuntimeError, AssertionError, AttributeError, TypeError, ValueError, ArithmeticError,
    LookupError,
)  # fmt: skip
"""What torch and timm raise for embeddings of another kind, or of no grid at all."""
Grid = tuple[int, int]
"""Rows and columns of patches."""


def resize_positions(
    weights: dict[str, Tensor],
    live: Mapping[str, Tensor],
    clip: Clip,
    trained: Architecture | None = None,
) -> list[str]:
    """Resizes position embeddings in place.

    Grids of patches are resized by bicubic interpolation with antialiasing, texts linearly.

    Args:
        weights: by the names of the towers.
        live: the weights of the towers.
        clip: the towers.
        trained: the architecture of the weights; without it, their grid counts as a square.

    Returns:
        A phrase for each that changed. What cannot be resized stays as it is.
    """
    changed: list[str] = []
    for name, value in list(weights.items()):
        if name not in live or "pos" not in name.rpartition(".")[2]:
            continue
        try:
            found = _resized(name, value.float(), live[name], clip, trained)
        except _UNFIT:
            continue  # reported as a mismatch
        if found is not None:
            weights[name] = found
            changed.append(f"{name} resized from {_shape(value)} to {_shape(found)}")
    return changed


def _resized(
    name: str, value: Tensor, target: Tensor, clip: Clip, trained: Architecture | None
) -> Tensor | None:
    """The embeddings in the size of the towers; None if they have it, or cannot get it."""
    if name.removeprefix("text.") == "positional_embedding":
        if value.shape == target.shape:
            return None
        state = {"positional_embedding": value}
        resize_text_pos_embed(state, SimpleNamespace(positional_embedding=target))
        return state["positional_embedding"]
    place = _image_grid(name, target, clip)
    if place is None:
        return None
    new, prefix = place
    tokens = value.shape[-2] - prefix
    known = None if trained is None else trained.patches
    side = round(max(tokens, 0) ** 0.5)
    if known is not None and known[0] * known[1] == tokens:
        old = known
    elif value.shape == target.shape or side * side != tokens:
        return None
    else:
        old = side, side
    if new == old or value.shape[-1] != target.shape[-1]:
        return None
    rows = value if value.ndim == 3 else value[None]
    found = resample_abs_pos_embed(rows, list(new), list(old), num_prefix_tokens=prefix)
    return found.reshape(*value.shape[:-2], *found.shape[-2:])


def _image_grid(name: str, target: Tensor, clip: Clip) -> tuple[Grid, int] | None:
    """The grid of the towers, and the number of tokens before it; None for other weights."""
    visual = cast(Any, clip.towers.visual)
    if name == "visual.positional_embedding":
        return tuple(visual.grid_size), 1
    if name == "visual.attnpool.positional_embedding":
        side = round((len(target) - 1) ** 0.5)
        return (side, side), 1
    if name == "visual.trunk.pos_embed":
        trunk = visual.trunk
        tokens = 0 if getattr(trunk, "no_embed_class", False) else trunk.num_prefix_tokens
        return tuple(trunk.patch_embed.grid_size), tokens
    return None


def _shape(value: torch.Tensor) -> str:
    return " x ".join(str(side) for side in value.shape)
