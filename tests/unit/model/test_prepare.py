"""Blocks, locks, checkpointed activations and compiled blocks of open_clip's towers."""

import logging

import open_clip
import pytest
import torch
from torch import nn

from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model import prepare
from neuclip.model.clip import build_clip
from tiny_models import CPU, RESNET, VIT, pairs, tiny


def learning(clip) -> set[str]:
    return {name for name, p in clip.towers.named_parameters() if p.requires_grad}


def outputs(clip):
    return clip.towers(*pairs(4))


def gradients(clip, seed=0):
    torch.manual_seed(seed)
    found = outputs(clip)
    (found["image_features"] * found["text_features"]).sum().backward()
    return {n: p.grad for n, p in clip.towers.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model", "image", "text"),
    [
        (VIT, [f"visual.transformer.resblocks.{n}" for n in range(3)], "transformer.resblocks"),
        (RESNET, [f"visual.layer{n}" for n in (1, 2, 3, 4)], "transformer.resblocks"),
    ],
)
def test_the_blocks_of_open_clips_own_towers(model, image, text):
    model = tiny(model).towers
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(block)] for block in prepare.blocks(model)}
    assert found == {*image, f"{text}.0", f"{text}.1", "token_embedding"}


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers")
def test_the_blocks_of_a_timm_tower_and_of_one_that_has_none():
    vision = {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32, "timm_pool": "token"}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CustomTextCLIP(8, {**vision, "timm_proj": "linear"}, text)
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(block)] for block in prepare.blocks(model)}
    assert {f"visual.trunk.blocks.{n}" for n in range(12)} < found
    assert "text.transformer.resblocks.0" in found
    prepare.lock_image(model, 2, freeze_statistics=False)
    learns = {n for n, p in model.visual.trunk.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in learns if name.startswith("blocks.")} == {"10", "11"}
    model.visual = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))
    assert model.visual in prepare.blocks(model)


@pytest.mark.parametrize(
    ("groups", "blocks"), [(0, set()), (1, set()), (2, {"2"}), (3, {"1", "2"})]
)
def test_a_locked_image_tower_leaves_the_last_groups(groups, blocks):
    clip = tiny()
    prepare.lock_image(clip.towers, groups, freeze_statistics=False)
    image = {name for name in learning(clip) if name.startswith("visual.")}
    assert {n.split(".")[3] for n in image if "resblocks" in n} == blocks
    assert ("visual.proj" in image) == (groups > 0)
    assert "visual.conv1.weight" not in image
    assert {n for n in learning(clip) if n.startswith("transformer.")}


@pytest.mark.parametrize("freeze", [False, True])
def test_a_locked_text_tower_keeps_its_layer_norms_learning_unless_frozen(freeze):
    clip = tiny()
    prepare.lock_text(clip.towers, 0, freeze)
    text = {name for name in learning(clip) if not name.startswith(("visual.", "logit"))}
    assert all("ln_" in name for name in text)
    assert ("ln_final.weight" in text) == (not freeze)
    assert "visual.proj" in learning(clip)


def test_locked_text_layers():
    clip = tiny()
    prepare.lock_text(clip.towers, 2, True)
    text = {name for name in learning(clip) if not name.startswith(("visual.", "logit"))}
    assert {n.split(".")[2] for n in text if "resblocks" in n} == {"1"}
    assert {"text_projection", "ln_final.weight"} <= text


def test_a_resnet_cannot_be_locked_in_part():
    with pytest.raises(UserError, match=r"ModifiedResNet.*cannot be locked in part"):
        prepare.prepare(
            tiny(RESNET).towers,
            ModelConfig(lock_image=True, lock_image_unlocked_groups=1),
        )


@pytest.mark.parametrize("freeze", [False, True])
def test_statistics_of_a_locked_tower_stay_when_asked(freeze):
    clip = tiny(RESNET)
    before = {k: v.clone() for k, v in clip.towers.state_dict().items()}
    prepare.lock_image(clip.towers, 0, freeze_statistics=freeze)
    clip.towers.eval()
    clip.towers.train()
    outputs(clip)
    after = clip.towers.state_dict()
    assert before.keys() == after.keys()  # the layout of the checkpoint stays
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert bool(changed) != freeze


def test_locking_what_was_never_trained_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "neuclip"):
        prepare.prepare(tiny().towers, ModelConfig(lock_image=True))
        assert "--lock-image without --pretrained" in caplog.text
        caplog.clear()
        prepare.prepare(tiny().towers, ModelConfig(lock_image=True), (True, False))
    assert not caplog.text


def test_something_must_be_left_to_learn():
    with pytest.raises(UserError, match="leave no weights to train"):
        prepare.prepare(
            tiny().towers,
            ModelConfig(lock_image=True, lock_text=True, lock_text_freeze_layer_norm=True),
        )


def test_checkpointed_activations_change_no_gradient(caplog):
    plain, checkpointed = (tiny(patch_dropout=0.5) for _ in range(2))
    prepare.checkpoint_activations(checkpointed.towers)
    assert plain.towers.visual.training
    assert not caplog.text
    one, two = gradients(plain), gradients(checkpointed)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_resnet_says_that_it_is_not_checkpointed(caplog):
    with caplog.at_level(logging.WARNING, "neuclip"):
        prepare.checkpoint_activations(tiny(RESNET).towers)
    assert "the image tower (ModifiedResNet) does not" in caplog.text


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo hides it, pytest shows it
def test_compiled_blocks_keep_names_and_gradients():
    plain, compiled = tiny(), tiny()
    prepare.compile_blocks(compiled.towers, "aot_eager")
    assert list(compiled.towers.state_dict()) == list(plain.towers.state_dict())
    one, two = gradients(plain), gradients(compiled)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5, msg=name)
    block = compiled.towers.visual.transformer.resblocks[0]
    assert block._compiled_call_impl is not None


def test_patches_are_dropped_in_training_only():
    clip = tiny(patch_dropout=0.5)
    images, _ = pairs(2)
    seen = []
    first = clip.towers.visual.transformer.resblocks[0]
    first.register_forward_hook(lambda block, inputs, output: seen.append(output.shape[1]))
    clip.towers.encode_image(images)
    clip.towers.eval().encode_image(images)
    assert seen == [9, 17]  # 16 patches and the class token


def test_a_tower_without_patches_to_drop_is_refused():
    with pytest.raises(UserError, match=r"ModifiedResNet.* has no patch dropout"):
        build_clip(RESNET, "fp32", CPU, patch_dropout=0.5)
