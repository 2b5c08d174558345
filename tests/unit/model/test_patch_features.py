"""The mean patch features of image towers, before they are projected."""

import open_clip
import pytest
import torch
from torch import nn

from neuclip.errors import UserError
from neuclip.model.patch_features import captured_patches, patch_width, vocabulary_size
from tiny_models import CPU, RESNET, VIT, pairs, tiny


def with_timm(name: str, pool: str) -> nn.Module:
    vision = {"timm_model_name": name, "image_size": 32, "timm_pool": pool, "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def of_vit(towers: nn.Module, images: torch.Tensor) -> torch.Tensor:
    found = towers.visual.forward_intermediates(images, indices=1)
    return found["image_intermediates"][-1].mean((2, 3))


def of_resnet(towers: nn.Module, images: torch.Tensor) -> torch.Tensor:
    visual = towers.visual
    x = visual.stem(images)
    for stage in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        x = stage(x)
    return x.mean((2, 3))


def of_timm(towers: nn.Module, images: torch.Tensor) -> torch.Tensor:
    trunk = towers.visual.trunk
    features = trunk.forward_features(images)
    return trunk.forward_head(features)


CASES = {
    "vit": (lambda: tiny(VIT).towers, of_vit),
    "resnet": (lambda: tiny(RESNET).towers, of_resnet),
    "timm": (lambda: with_timm("resnet10t", "avg"), of_timm),
}


@pytest.mark.parametrize("case", CASES)
def test_the_features_are_those_before_the_projection(case):
    build, expected = CASES[case]
    towers, (images, tokens) = build().eval(), pairs(3)
    with captured_patches(towers) as found:
        plain = towers.encode_image(images)
        towers.encode_text(tokens[:, :8]) if case == "timm" else towers.encode_text(tokens)
    (patches,) = found
    torch.testing.assert_close(patches, expected(towers, images))
    assert torch.equal(plain, towers.encode_image(images))  # nothing is captured any more
    assert len(found) == 1
    (grad,) = torch.autograd.grad(patches.sum(), next(towers.visual.parameters()))
    assert grad.any()


@pytest.mark.parametrize(("name", "width", "size"), [(VIT, 32, 49408), (RESNET, 256, 64)])
def test_sizes_are_found_without_a_change_of_the_model(name, width, size):
    clip = tiny(name)
    clip.towers.train()
    before = {key: value.clone() for key, value in clip.towers.state_dict().items()}
    random = torch.get_rng_state()
    assert patch_width(clip, CPU) == width
    assert vocabulary_size(clip.towers) == size
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in clip.towers.modules())
    assert all(torch.equal(value, before[k]) for k, value in clip.towers.state_dict().items())


def test_unknown_towers_are_named():
    towers = nn.Module()
    towers.visual = nn.Linear(2, 2)
    towers.text = nn.Linear(2, 2)
    with (
        pytest.raises(UserError, match=r"patches of this image tower \(Linear\) are not known"),
        captured_patches(towers),
    ):
        pass
    with pytest.raises(UserError, match=r"text tower \(Linear\) names no vocabulary"):
        vocabulary_size(towers)
