"""What an image tower knows of its patches before it projects them into the embedding.

ViT of open_clip     the mean over the patch tokens after the last block, without the class token
ResNet of open_clip  the mean over the positions of the last stage
towers of timm       what the trunk returns, averaged over positions or tokens if it has some
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.model.clip import Clip


@contextmanager
def captured_patches(towers: nn.Module) -> Generator[list[Tensor]]:
    """Inside, every pass of the image tower adds its mean patch features, [batch, width].

    They carry a gradient as the embeddings do.

    Raises:
        UserError: the kind of image tower is not known.
    """
    source, skipped = _source(cast(nn.Module, towers.visual))
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        found.append(_mean(output, skipped))

    handle = source.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def patch_width(clip: Clip, device: torch.device) -> int:
    """The width of the patch features, found by encoding one blank image.

    Raises:
        UserError: the kind of image tower is not known.
    """
    visual = cast(nn.Module, clip.towers.visual)
    size = cast(int | tuple[int, int], visual.image_size)
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.zeros(1, 3, height, width, device=device, dtype=clip.input_dtype)
    training = {module: module.training for module in visual.modules()}
    visual.eval()
    try:
        with captured_patches(clip.towers) as found, clip.autocast(device):
            visual(image)
    finally:
        for module, was in training.items():
            module.training = was
    return found[0].shape[1]


def vocabulary_size(towers: nn.Module) -> int:
    """The number of token ids of the text tower.

    Raises:
        UserError: it does not say.
    """
    text = getattr(towers, "text", towers)
    for holder in (text, getattr(text, "config", None)):
        if isinstance(size := getattr(holder, "vocab_size", None), int):
            return size
    raise UserError(f"--token-weight: the text tower ({type(text).__name__}) names no vocabulary")


def _source(visual: nn.Module) -> tuple[nn.Module, int]:
    """The module whose output holds the patches, and its leading tokens that are none."""
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, nn.Module):
        return trunk, int(getattr(trunk, "num_prefix_tokens", 0))
    for name, skipped in (("transformer", 1), ("layer4", 0)):
        if isinstance(module := getattr(visual, name, None), nn.Module):
            return module, skipped
    raise UserError(
        f"--token-weight: the patches of this image tower ({type(visual).__name__}) are not known; "
        "take a ViT or ResNet of open_clip, or a tower of timm"
    )


def _mean(output: Tensor, skipped: int) -> Tensor:
    """The mean over the positions [batch, width, y, x] or the tokens [batch, tokens, width]."""
    if output.ndim == 4:
        return output.mean((2, 3))
    return output[:, skipped:].mean(1) if output.ndim == 3 else output
