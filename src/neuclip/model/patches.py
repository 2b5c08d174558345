"""The patches of an image tower: their grid, and the image sizes that they cover."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from neuclip.errors import UserError


def grid(vision: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of patches; None for towers that take images of any size.

    Args:
        vision: the section `vision_cfg` of an architecture.
    """
    patch, sides = _patch(vision), _sides(vision.get("image_size", 224))
    return None if patch is None else (sides[0] // patch[0], sides[1] // patch[1])


def check_patches(name: str, vision: Mapping[str, Any], size: int | tuple[int, int]) -> None:
    """Checks that whole patches cover an image; open_clip would leave out the rest of it.

    Args:
        name: of the architecture, for the message.
        vision: its section `vision_cfg`.
        size: side of the image in pixels, or height and width.

    Raises:
        UserError: they do not; names the nearest sizes.
    """
    patch, sides = _patch(vision), _sides(size)
    if patch is None or sides == _sides(vision.get("image_size", 224)):
        return
    pairs = list(zip(sides, patch, strict=True))
    if all(side % part == 0 for side, part in pairs):
        return
    below = [max(side // part, 1) * part for side, part in pairs]
    above = [-(-side // part) * part for side, part in pairs]
    shown = [each[:1] if isinstance(size, int) else each for each in (sides, below, above)]
    asked, *fitting = (" ".join(map(str, each)) for each in shown)
    nearest = list(dict.fromkeys(fitting))
    words = "the nearest size is" if len(nearest) == 1 else "the nearest sizes are"
    raise UserError(
        f"--force-image-size {asked}: {name} divides images into patches of {patch[0]} x "
        f"{patch[1]} pixels; {words} {' and '.join(nearest)}"
    )


def _patch(vision: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of a patch in pixels."""
    timm = vision.get("timm_model_name")
    if timm:
        found = re.search(r"patch(\d+)", timm)
        return None if found is None else _sides(int(found[1]))
    if isinstance(vision.get("layers"), list):  # a ResNet halves the image five times
        return 32, 32
    return _sides(vision.get("patch_size", 16))


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
