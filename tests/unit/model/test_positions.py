import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

from neuclip.config.sections import ModelConfig
from neuclip.model.architecture import find_architecture
from neuclip.model.clip import build_clip
from neuclip.model.positions import resize_positions
from tiny_models import CPU, VIT

NAME = "visual.positional_embedding"


def towers(size):
    architecture = find_architecture(VIT).changed(ModelConfig(force_image_size=size))
    torch.manual_seed(0)
    return build_clip(architecture, "fp32", CPU)


@pytest.mark.parametrize(
    ("old", "new"),
    [((64, 32), 32), (32, (64, 32)), ((64, 32), (32, 64)), ((72, 32), (32, 48)), ((64, 32), 64)],
)
def test_rectangular_grids(old, new):
    """Rows stay rows: also if old and new have the same number of patches, or a square has."""
    before, after = towers(old), towers(new)
    weights = before.towers.state_dict()
    value = weights[NAME]
    said = resize_positions(weights, after.towers.state_dict(), after, before.architecture)
    rows, columns = before.architecture.patches
    grid = value[None]
    expected = resample_abs_pos_embed(grid, list(after.architecture.patches), [rows, columns])[0]
    assert torch.equal(weights[NAME], expected)
    assert weights[NAME].shape == after.towers.state_dict()[NAME].shape
    assert len(said) == 1 and said[0].startswith(f"{NAME} resized from {len(value)} x 32 to ")


def test_equal_grids_stay_bit_by_bit():
    clip = towers((64, 32))
    weights = clip.towers.state_dict()
    value = weights[NAME].clone()
    for trained in (clip.architecture, None):
        assert resize_positions(weights, clip.towers.state_dict(), clip, trained) == []
        assert torch.equal(weights[NAME], value)


def test_what_cannot_be_resized_stays():
    clip = towers(32)
    for shape in ((6, 32), (10, 31), (0, 32), (32,), ()):
        weights = {NAME: torch.zeros(shape)}
        assert resize_positions(weights, clip.towers.state_dict(), clip) == []
        assert weights[NAME].shape == shape
