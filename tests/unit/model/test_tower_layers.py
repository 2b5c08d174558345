"""The layers of towers in order, as open_clip's locks and timm's layer-wise decay have them."""

import open_clip
import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from neuclip.errors import UserError
from neuclip.model.tower_layers import image_layers, text_layers
from tiny_models import RESNET, VIT, tiny


def names(towers, layers):
    by_parameter = {p: name for name, p in towers.named_parameters()}
    return [{by_parameter[p] for p in layer} for layer in layers]


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_layers_are_those_of_open_clips_locks(tower):
    towers = tiny(VIT).towers
    lock = towers.lock_image_tower if tower == "image" else towers.lock_text_tower
    layers = (image_layers if tower == "image" else text_layers)(towers)
    for number in range(1, len(layers) + 1):
        lock(number)
        unlocked = {p for layer in layers[-number:] for p in layer}
        for parameter in {p for layer in layers for p in layer}:
            assert parameter.requires_grad == (parameter in unlocked), number


def test_a_resnet_has_its_stages():
    towers = tiny(RESNET).towers
    layers = names(towers, image_layers(towers))
    assert len(layers) == 6
    assert "visual.bn3.bias" in layers[0]
    assert all(name.startswith("visual.layer4.") for name in layers[4])
    assert all(name.startswith("visual.attnpool.") for name in layers[5])


def of_timm(name):
    """A model with a tower of timm, on no device."""
    vision = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 64,
    }
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 2}
    with torch.device("meta"):
        return open_clip.CustomTextCLIP(8, vision, text)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_a_tower_of_timm_has_the_layers_of_timms_decay(name):
    towers = of_timm(name)
    trunk = towers.visual.trunk
    layers = image_layers(towers)
    optimizer = create_optimizer_v2(trunk, "sgd", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    theirs = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    inside = [layer for layer in layers if layer[0] in theirs]
    for depth, layer in enumerate(reversed(inside)):
        assert {theirs[p] for p in layer} == {0.5**depth}
    assert layers[-1] == [towers.visual.head.proj.weight]
    text = names(towers, text_layers(towers))
    assert len(text) == 4
    assert text[-1] == {"text.text_projection"}
    assert "text.token_embedding.weight" in text[0]


def test_an_encoder_of_transformers_has_its_layers():
    encoder = nn.Module()
    encoder.embeddings, encoder.encoder = nn.Embedding(4, 2), nn.Module()
    encoder.encoder.layer = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    encoder.pooler = nn.Linear(2, 2)
    towers = nn.Module()
    towers.text = nn.Module()
    towers.text.transformer, towers.text.proj = encoder, nn.Linear(2, 2, bias=False)
    assert names(towers, text_layers(towers)) == [
        {"text.transformer.embeddings.weight"},
        {f"text.transformer.encoder.layer.0.{part}" for part in ("weight", "bias")},
        {f"text.transformer.encoder.layer.1.{part}" for part in ("weight", "bias")},
        {"text.proj.weight", "text.transformer.pooler.weight", "text.transformer.pooler.bias"},
    ]


def test_a_tower_of_unknown_order_is_refused():
    towers = nn.Module()
    towers.visual, towers.text = nn.Linear(2, 2), nn.Linear(2, 2)
    for find, flag in ((image_layers, "--image-layer-decay"), (text_layers, "--text-layer-decay")):
        with pytest.raises(UserError, match=f"{flag}.*Linear.* is not known"):
            find(towers)
