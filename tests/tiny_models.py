"""Models for tests, known to open_clip by name once this is imported."""

from pathlib import Path

import open_clip
import torch

from neuclip.model.clip import Clip, build_clip

VIT, RESNET = "tiny-vit", "tiny-resnet"
CPU = torch.device("cpu")

open_clip.add_model_config(Path(__file__).parent / "data" / "model_configs")


def tiny(name: str = VIT, seed: int = 0, **settings) -> Clip:
    """A model of few parameters, the same for the same seed."""
    torch.manual_seed(seed)
    return build_clip(name, settings.pop("precision", "fp32"), CPU, **settings)


def pairs(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures and texts of up to 64 different tokens."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 63, (batch, 24), generator=generator)
    tokens[:, 9] = 63  # the end of the text: the largest number
    return images, tokens
