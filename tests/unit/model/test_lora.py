"""Low-rank updates: where they are, what they compute, and what else stays as it is."""

import copy

import pytest
import torch
from torch import nn

from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.errors import UserError
from neuclip.model import lora
from neuclip.model.prepare import checkpoint_activations
from neuclip.model.tower_layers import image_layers, text_layers
from tiny_models import RESNET, VIT, pairs, tiny

KINDS = {
    "visual.transformer.resblocks.0.attn.in_proj_weight": ("q", "k", "v"),
    "visual.transformer.resblocks.0.attn.out_proj.weight": ("out",),
    "visual.transformer.resblocks.0.mlp.c_fc.weight": ("mlp",),
    "transformer.resblocks.3.mlp.c_proj.weight": ("mlp",),
    "visual.attn_pool.attn.k_proj_weight": ("k",),
    "visual.attnpool.q_proj.weight": ("q",),
    "visual.attnpool.c_proj.weight": ("out",),
    "visual.trunk.blocks.7.attn.qkv.weight": ("q", "k", "v"),
    "visual.trunk.blocks.7.attn.proj.weight": ("out",),
    "visual.trunk.blocks.7.mlp.fc2.weight": ("mlp",),
    "visual.trunk.attn_pool.kv.weight": ("k", "v"),
    "visual.trunk.attn_pool.mlp.fc1.weight": ("mlp",),
    "text.transformer.encoder.layer.2.attention.self.query.weight": ("q",),
    "text.transformer.encoder.layer.2.attention.output.dense.weight": ("out",),
    "text.transformer.encoder.layer.2.intermediate.dense.weight": ("mlp",),
    "text.transformer.encoder.layer.2.output.dense.weight": ("mlp",),
    "text.transformer.layers.2.self_attn.v_proj.weight": ("v",),
    "text.transformer.encoder.block.1.layer.0.SelfAttention.o.weight": ("out",),
    "text.transformer.encoder.block.1.layer.1.DenseReluDense.wi_0.weight": ("mlp",),
    "text.transformer.transformer.layer.0.attention.q_lin.weight": ("q",),
    "visual.proj": (),
    "text_projection": (),
    "token_embedding.weight": (),
    "visual.positional_embedding": (),
    "text.transformer.encoder.layer.2.attention.output.LayerNorm.weight": (),
    "text.proj.0.weight": (),
}


def settings(rank=3, **more):
    return AdaptationConfig(lora_rank=rank, **more)


def adapted(name=VIT, seed=0, **more):
    """A tiny model, and its copy with updates."""
    clip = tiny(name)
    towers = copy.deepcopy(clip.towers)
    lora.add_updates(towers, settings(**more), seed)
    return clip.towers, towers


def moved(towers, seed=1):
    """The towers with random updates, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in towers.named_parameters():
        if ".up." in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 30)
    return towers


def test_names_of_open_clip_timm_and_transformers_are_known():
    assert {name: lora.kinds_of(name) for name in KINDS} == KINDS


@pytest.mark.parametrize("name", [VIT, RESNET])
@pytest.mark.parametrize("training", [True, False])
def test_the_first_embedding_is_that_of_the_starting_weights_bit_by_bit(name, training):
    plain, towers = adapted(name)
    plain.eval()
    if name == VIT:  # BatchNorm of frozen weights keeps their statistics
        plain.train(training)
    towers.train(training)
    with torch.set_grad_enabled(training):
        one, other = plain(*pairs(4)), towers(*pairs(4))
    for key in ("image_features", "text_features", "logit_scale"):
        assert torch.equal(one[key], other[key]), key


@torch.no_grad()
def test_an_update_adds_its_product_to_its_own_rows():
    plain, towers = adapted(lora_targets="q,v,out", lora_alpha=6.0)
    moved(towers)
    name = "visual.transformer.resblocks.1.attn"
    before, after = (each.get_submodule(name).in_proj_weight for each in (plain, towers))
    update = towers.get_submodule(f"{name}.parametrizations.in_proj_weight.0")
    width = before.shape[1]
    for block, kind in enumerate("qkv"):
        rows = slice(block * width, (block + 1) * width)
        difference = (after - before)[rows]
        if kind == "k":
            assert torch.equal(after[rows], before[rows])
            continue
        up, down = update.up[str(block)], update.down[str(block)]
        naive = [
            [2.0 * sum(float(up[i, r] * down[r, j]) for r in range(3)) for j in range(width)]
            for i in range(width)
        ]
        torch.testing.assert_close(difference, torch.tensor(naive), rtol=1e-4, atol=1e-7)
    block = towers.visual.transformer.resblocks[1]
    assert torch.equal(block.mlp.c_fc.weight, plain.visual.transformer.resblocks[1].mlp.c_fc.weight)


def test_only_updates_temperature_and_named_weights_are_trained():
    _, towers = adapted(lora_towers="text", lora_modules_to_save="ln_final,visual.proj")
    trained = {name for name, p in towers.named_parameters() if p.requires_grad}
    updates = {name for name in trained if ".parametrizations." in name}
    assert trained - updates == {"ln_final.weight", "ln_final.bias", "visual.proj", "logit_scale"}
    assert updates
    assert all(name.startswith("transformer.") for name in updates)
    assert lora.stored_weights(towers).keys() == trained
    found = lora.count_trained(towers)
    assert found.parameters == sum(p.numel() for p in towers.parameters() if p.requires_grad)
    assert found.total == sum(p.numel() for p in tiny().towers.parameters())
    assert found.text.endswith(
        "text tower 2 x attn.out_proj, 2 x attn.in_proj_weight, 2 x mlp.c_fc, 2 x mlp.c_proj"
    )


def test_every_update_gets_a_gradient():
    _, towers = adapted()
    moved(towers)
    outputs = towers(*pairs(6))
    (outputs["image_features"] * outputs["text_features"].flip(0)).sum().backward()
    for name, parameter in towers.named_parameters():
        grad = parameter.grad
        if parameter.requires_grad and name != "logit_scale":
            assert grad is not None and grad.abs().sum() > 0, name
        elif not parameter.requires_grad:
            assert grad is None


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_merged_weights_embed_as_the_updates_do(name):
    plain, towers = adapted(name)
    moved(towers).eval()
    stored = {k: v.clone() for k, v in lora.stored_weights(towers).items()}
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    merged = lora.merge(plain.state_dict(), stored, 32.0 / 3)
    assert all(torch.equal(value, before[k]) for k, value in plain.state_dict().items())
    half = {k: v.half() if v.is_floating_point() else v for k, v in before.items()}
    exact = lora.merge({k: v.float() for k, v in half.items()}, stored, 32.0 / 3)
    for key, value in lora.merge(half, stored, 32.0 / 3).items():  # not rounded a second time
        assert torch.equal(value.float(), exact[key]), key
    plain.load_state_dict(merged)
    with torch.no_grad():
        one, other = plain.eval()(*pairs(4)), towers(*pairs(4))
    for key in ("image_features", "text_features"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)
    assert not torch.equal(merged["transformer.resblocks.0.mlp.c_fc.weight"],
                           before["transformer.resblocks.0.mlp.c_fc.weight"])  # fmt: skip


@torch.no_grad()
def test_a_matrix_that_is_trained_in_full_gets_no_update_and_is_merged_as_it_is():
    plain, towers = adapted(lora_modules_to_save="mlp.c_fc, attn")
    stored = lora.stored_weights(towers)
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert {key.split(".parametrizations.")[0].rpartition(".")[2] for key in stored if ".up." in key
            } == {"c_proj"}  # fmt: skip
    stored[name].mul_(2)
    merged = lora.merge(plain.state_dict(), stored, 32.0 / 3)
    assert merged.keys() == plain.state_dict().keys()
    assert torch.equal(merged[name], 2 * plain.state_dict()[name])


def test_updates_follow_their_seed_alone():
    one, again, other = (tiny().towers for _ in range(3))
    for towers, seed in ((one, 1), (again, 1), (other, 2)):
        state = torch.get_rng_state()
        lora.add_updates(towers, settings(), seed)
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
    weights = lora.stored_weights(one)
    for name, value in lora.stored_weights(again).items():
        assert torch.equal(value, weights[name])
    drawn = [name for name in weights if ".down." in name]
    assert drawn
    assert not any(torch.equal(lora.stored_weights(other)[n], weights[n]) for n in drawn)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo hides it, pytest shows it
@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_other_ways_to_compute_give_the_same_gradients(way):
    _, towers = adapted()
    moved(towers)
    other = copy.deepcopy(towers)
    if way == "checkpointed":
        checkpoint_activations(other)
    else:
        other.visual.transformer.resblocks[1].compile(backend="aot_eager")
    found = []
    for each in (towers, other):
        outputs = each(*pairs(6))
        (outputs["image_features"] * outputs["text_features"].flip(0)).sum().backward()
        found.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-7, msg=name)


def test_updates_belong_to_the_layer_of_their_matrix():
    _, towers = adapted()
    for tower, layers in (("image", image_layers(towers)), ("text", text_layers(towers))):
        numbers = {id(p): number for number, layer in enumerate(layers) for p in layer}
        for name, parameter in towers.named_parameters():
            if ".resblocks." in name and lora.tower_of(name) == tower:
                block = int(name.partition(".resblocks.")[2].partition(".")[0])
                assert numbers[id(parameter)] == block + 1, name


def test_updates_of_bfloat16_weights_are_in_float32():
    towers = tiny(precision="bf16").towers
    lora.add_updates(towers, settings(), 0)
    kinds = {p.dtype for name, p in towers.named_parameters() if ".up." in name}
    assert kinds == {torch.float32}
    assert towers.visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == torch.bfloat16


class Convolutions(nn.Module):
    """Towers whose image tower has no matrix in its blocks."""

    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4))
        self.transformer = nn.Module()
        self.transformer.mlp = nn.ModuleDict({"c_fc": nn.Linear(8, 8)})
        self.logit_scale = nn.Parameter(torch.tensor(1.0))


WRONG = {
    "a rank above a matrix's": (VIT, {"rank": 17}, r"above the rank of .*\(16 x 16\): at most 16"),
    "convolutions": (None, {}, r"image tower \(Sequential\) has no matrices .* --lora-towers text"),
    "one tower of convolutions": (None, {"lora_towers": "image"}, "another tower"),
    "no such target": (None, {"lora_towers": "text", "lora_targets": "q"}, "--lora-targets q"),
    "no such weight": (VIT, {"lora_modules_to_save": "ln_final,lnfinal"}, "lnfinal: no weight"),
    "all trained in full": (VIT, {"lora_modules_to_save": "visual"}, "besides those of --lora-mod"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_updated_is_refused(case):
    name, given, words = WRONG[case]
    towers = Convolutions() if name is None else tiny(name).towers
    with pytest.raises(UserError, match=words):
        lora.add_updates(towers, settings(**given), 0)
