"""Weight decay and layer-wise learning rates of the towers' parameters."""

import pytest
import torch

from neuclip.config.optimizer_section import OptimConfig
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.prepare import prepare
from neuclip.training.parameter_groups import is_gain_or_bias, parameter_groups
from tiny_models import RESNET, VIT, tiny


def test_the_rule_for_decay():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert not is_gain_or_bias("visual.proj", matrix)
    assert is_gain_or_bias("visual.proj", vector)
    assert is_gain_or_bias("ln_pre.weight", matrix)
    assert is_gain_or_bias("attn.in_proj_bias", matrix)


def by_name(towers, **settings):
    """The groups, with the names of their parameters."""
    names = {p: name for name, p in towers.named_parameters()}
    groups = parameter_groups(towers, OptimConfig(wd=0.3, **settings))
    return [(group, {names[p] for p in group.parameters}) for group in groups]


@pytest.mark.parametrize("settings", [{}, {"image_layer_decay": 0.7, "text_layer_decay": 0.8}])
@pytest.mark.parametrize("model", [VIT, RESNET])
def test_every_parameter_is_in_one_group_of_its_decay(model, settings):
    towers = tiny(model).towers
    groups = by_name(towers, **settings)
    assert sum(len(names) for _, names in groups) == len(list(towers.parameters()))
    for group, names in groups:
        for name in names:
            plain = is_gain_or_bias(name, towers.get_parameter(name))
            assert group.weight_decay == (0.0 if plain else 0.3), name
    assert [group.is_temperature for group, _ in groups].count(True) == 1
    assert groups[-1][1] == {"logit_scale"}
    if not settings:
        assert [group.rate_scale for group, _ in groups] == [1, 1, 1]


def test_the_rate_falls_with_each_layer_below_the_projection():
    towers = tiny(VIT).towers
    scales = {
        name: group.rate_scale
        for group, names in by_name(towers, image_layer_decay=0.5, text_layer_decay=0.1)
        for name in names
    }
    for prefix, decay, ends in (
        ("visual.", 0.5, ("visual.conv1.weight", "visual.ln_post.weight", "visual.proj")),
        ("", 0.1, ("token_embedding.weight", "ln_final.bias", "text_projection")),
    ):
        blocks = len(towers.get_submodule(f"{prefix}transformer.resblocks"))
        first, last, projection = ends
        assert scales[projection] == 1
        assert scales[last] == decay
        assert scales[first] == pytest.approx(decay ** (blocks + 1))
        for number in range(blocks):
            name = f"{prefix}transformer.resblocks.{number}.mlp.c_fc.weight"
            assert scales[name] == pytest.approx(decay ** (blocks - number))
    assert scales["logit_scale"] == 1


def test_one_tower_alone_can_have_the_decay():
    towers = tiny(VIT).towers
    scales = [(group.rate_scale, names) for group, names in by_name(towers, image_layer_decay=0.5)]
    assert all(name.startswith("visual.") for scale, names in scales if scale < 1 for name in names)


def test_decay_of_a_locked_tower_is_refused():
    towers = tiny(VIT).towers
    prepare(towers, ModelConfig(lock_image=True), (True, True))
    with pytest.raises(UserError, match="--image-layer-decay has no effect: --lock-image"):
        parameter_groups(towers, OptimConfig(image_layer_decay=0.5))
    prepare(towers, ModelConfig(lock_image=True, lock_image_unlocked_groups=2), (True, True))
    groups = parameter_groups(towers, OptimConfig(image_layer_decay=0.5))
    assert {group.rate_scale for group in groups} == {1.0, 0.5}


def test_embeddings_can_be_apart():
    towers = tiny(VIT).towers
    groups = parameter_groups(towers, OptimConfig(), embeddings_apart=True)
    apart = {id(p) for group in groups if group.fallback for p in group.parameters}
    names = {name for name, p in towers.named_parameters() if id(p) in apart}
    assert names == {
        "visual.class_embedding", "visual.positional_embedding", "positional_embedding",
        "token_embedding.weight",
    }  # fmt: skip
