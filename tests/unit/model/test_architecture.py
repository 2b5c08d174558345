import json
import socket
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.architecture import (
    changes_of_flags,
    find_architecture,
    model_names,
    recorded,
)
from neuclip.model.clip import build_clip
from neuclip.model.published import published_preprocessing
from tiny_models import CPU, RESNET, VIT

SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def write(path, tree):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


def test_a_configuration_of_ones_own(tmp_path):
    config = open_clip.get_model_config(VIT)
    for name, tree in (
        ("bare/own-vit.json", config),
        ("whole/own-vit.json", {"model_cfg": config, "preprocess_cfg": SQUASH}),
    ):
        found = find_architecture(str(write(tmp_path / name, tree)))
        assert (found.short_name, found.known) == ("own-vit", False)
        torch.manual_seed(0)
        built = build_clip(found, "fp32", CPU)
        torch.manual_seed(0)
        named = build_clip(VIT, "fp32", CPU)
        for key, value in named.towers.state_dict().items():
            assert torch.equal(value, built.towers.state_dict()[key])
        assert torch.equal(built.tokenize(["a cat"]), named.tokenize(["a cat"]))
        assert ("0.5, 0.5, 0.5" in str(built.eval_transform)) == name.startswith("whole")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        ("{not json", "is not JSON"),
        ("[1, 2]", "is not a model configuration of open_clip"),
        ('{"embed_dim": 8, "model_type": "clip"}', r"\(no vision_cfg, text_cfg\)"),
        ('{"embed_dim": 8, "vision_cfg": {"width": "x"}, "text_cfg": {}}', "cannot build"),
        ('{"embed_dim": 8, "vision_cfg": {"patch_size": 0}, "text_cfg": {}}', "cannot build"),
        ('{"embed_dim": 8, "vision_cfg": {"heads": 2}, "text_cfg": {}}', "cannot build.*heads"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, words):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=words):
        build_clip(str(tmp_path / "x.json"), "fp32", CPU)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "ViT-B32",
            r"unknown model 'ViT-B32'; did you mean 'ViT-B-32', '[^']+' or '[^']+'\? python",
        ),
        ("vit-l-14", "did you mean 'ViT-L-14'"),
        ("hf-hub:laion/CLIP-x", "hf-hub:laion/CLIP-x is not in the hub's cache on this machine"),
        ("laion/CLIP-x", "repository on the hub is --model hf-hub:laion/CLIP-x"),
        ("coca_ViT-B-32", r"CoCa model.*such as ViT-B-32$"),
        ("zzzz", r"unknown model 'zzzz'; python -c .* lists all \d+$"),
        ("local-dir:/nowhere", "cannot read /nowhere/open_clip_config.json"),
    ],
)
def test_what_no_model_is_called(name, words):
    with pytest.raises(UserError, match=words) as error:
        find_architecture(name)
    assert len(str(error.value)) < 250


def test_a_repository_given_as_a_folder(tmp_path):
    write(tmp_path / "open_clip_config.json", {"model_cfg": open_clip.get_model_config(VIT)})
    with pytest.raises(UserError, match="on disk is --model local-dir:"):
        find_architecture(str(tmp_path))
    assert find_architecture(f"local-dir:{tmp_path}").config["embed_dim"] > 0


def test_names_of_models():
    assert find_architecture("ViT-B/32").name == "ViT-B-32"  # as OpenAI spells it
    assert "coca_ViT-B-32" not in model_names()
    for name in open_clip.list_models():
        if "coca" in name:
            with pytest.raises(UserError, match="CoCa"):
                find_architecture(name)


@pytest.mark.parametrize("size", [64, (32, 64)])
@pytest.mark.parametrize("name", [VIT, RESNET])
def test_another_image_size(name, size):
    settings = ModelConfig(force_image_size=size)
    found = find_architecture(name).changed(settings)
    if (name, size) == (RESNET, (32, 64)):  # open_clip's ResNets are square
        with pytest.raises(UserError, match=r"cannot build it with --force-image-size \(32, 64\)"):
            build_clip(found, "fp32", CPU)
        return
    clip = build_clip(found, "fp32", CPU)
    height, width = size if isinstance(size, tuple) else (size, size)
    assert clip.image_size == 64
    image = clip.eval_transform(Image.new("RGB", (90, 70)))
    assert image.shape == (3, height, width)
    assert clip.train_transform(Image.new("RGB", (90, 70))).shape == (3, height, width)
    clip.towers.eval()
    assert clip.towers.encode_image(image[None]).shape == (1, clip.embed_dim)
    assert not found.known


def test_the_record_builds_the_same_towers():
    changes = ModelConfig(
        force_image_size=(32, 64),
        force_context_length=30,
        force_quick_gelu=True,
        image_mean=(0.1, 0.2, 0.3),
    )
    found = find_architecture(VIT).changed(changes)
    again = recorded(json.loads(json.dumps(found.record())), Path("x.pt"))
    assert (again.resized, again.quick_gelu) == ((32, 64), True)
    one, other = (build_clip(each, "fp32", CPU) for each in (found, again))
    assert str(one.eval_transform) == str(other.eval_transform)
    assert "0.1, 0.2, 0.3" in str(one.eval_transform)
    assert other.tokenize(["a cat"]).shape == (1, 30)
    shapes = [{k: v.shape for k, v in c.towers.state_dict().items()} for c in (one, other)]
    assert shapes[0] == shapes[1]


def test_flags_that_open_clip_recorded():
    flags = {
        "model": "ViT-B-16", "force_image_size": "[112]", "image_mean": "[0.5, 0.5, 0.5]",
        "image_resize_mode": "squash",
    }  # fmt: skip
    found = changes_of_flags(flags)
    assert (found.force_image_size, found.image_mean) == (112, (0.5, 0.5, 0.5))
    assert (found.image_std, found.image_resize_mode) == (None, "squash")
    assert changes_of_flags({"force_image_size": "[112, 96]"}).force_image_size == (112, 96)
    more = changes_of_flags({"force_context_length": "64", "force_quick_gelu": "True"})
    assert (more.force_context_length, more.force_quick_gelu) == (64, True)
    none = changes_of_flags({"force_context_length": "None", "force_quick_gelu": "False"})
    assert (none.force_context_length, none.force_quick_gelu) == (None, False)


@pytest.mark.parametrize(
    ("name", "resize_mode"),
    [
        ("ViT-B-16-SigLIP", "squash"), ("ViT-B-32", "shortest"), ("MobileCLIP-S1", "shortest"),
        ("glyph-tiny", None), ("ViT-L-14", None),
    ],
)  # fmt: skip
def test_preprocessing_of_published_weights(name, resize_mode):
    found = published_preprocessing(name)
    assert (found and found["resize_mode"]) == resize_mode


@pytest.mark.parametrize(
    "settings", [{"force_image_size": 0}, {"force_image_size": (224, -1)}, {"image_std": (1, 0, 1)}]
)
def test_sizes_and_deviations_are_positive(settings):
    with pytest.raises(UserError, match=r"is not a size in pixels|are above 0"):
        ModelConfig(**settings).check()


SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def from_disk(tmp_path, part, change, **whole):
    config = {**SMALL, part: {**SMALL[part], **change} if isinstance(change, dict) else change}
    tree = {"model_cfg": config, "preprocess_cfg": {}, **whole}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(tree))
    return build_clip(f"local-dir:{tmp_path}", "fp32", CPU)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_cfg", {"hf_model_name": "evil/x"}),
        ("text_cfg", {"hf_model_name": "evil/x", "hf_model_pretrained": True}),
        ("text_cfg", {"hf_tokenizer_name": "evil/x"}),
        ("vision_cfg", {"timm_model_name": "hf-hub:evil/x"}),
        ("vision_cfg", {"timm_model_name": "hf_hub:evil/x", "timm_model_pretrained": True}),
    ],
)
def test_a_repository_on_disk_never_asks_the_hub(tmp_path, monkeypatch, part, change):
    def refuse(*where, **_):
        asked.append(where)
        raise OSError("no network")

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(UserError, match="comes from a hub, and nothing is downloaded"):
        from_disk(tmp_path, part, change)
    assert asked == [] and before == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("embed_dim", 0),
        ("embed_dim", "x"),
        ("text_cfg", 7),
        ("vision_cfg", {"layers": "x"}),
        ("vision_cfg", {"head_width": 0}),
        ("vision_cfg", {"patch_size": 0}),
        ("vision_cfg", {"image_size": []}),
        ("vision_cfg", {"unknown": 1}),
        ("text_cfg", {"heads": None}),
        ("text_cfg", {"width": 1.5}),
        ("text_cfg", {"context_length": "x"}),
        ("text_cfg", {"tokenizer_kwargs": [1]}),
    ],
)
def test_wrong_types_are_one_line(tmp_path, part, change):
    with pytest.raises(UserError) as caught:
        from_disk(tmp_path, part, change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "preprocessing",
    [7, {"mean": "x"}, {"std": []}, {"mean": [1, 2]}, {"mean": ["a"] * 3}, {"interpolation": 7}],
)
def test_wrong_preprocessing_is_one_line(tmp_path, preprocessing):
    with pytest.raises(UserError) as caught:
        from_disk(tmp_path, "text_cfg", {}, preprocess_cfg=preprocessing)
    assert "\n" not in str(caught.value)


WRONG_TYPES = [
    ("vision_config", {"hidden_size": "16"}),
    ("vision_config", {"num_attention_heads": 0}),
    ("vision_config", {"hidden_size": None}),
    ("vision_config", {"hidden_act": []}),
    ("vision_config", [1, 2]),
    ("vision_config", "clip"),
    ("text_config", {"hidden_size": [[]], "intermediate_size": "x" * 10**5}),
    ("text_config", {"hidden_size": 0}),
    ("text_config", {"layer_norm_eps": {}}),
]


@pytest.mark.parametrize(("part", "value"), WRONG_TYPES)
def test_wrong_types_of_a_transformers_configuration_are_one_line(tmp_path, part, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", part: value}))
    with pytest.raises(UserError) as caught:
        find_architecture(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("change", [{"resample": []}, {"image_mean": ["a"]}, {"image_std": 5}])
def test_wrong_types_of_a_transformers_processor(tmp_path, change):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(change))
    if "resample" in change:
        assert "interpolation" not in find_architecture(f"local-dir:{tmp_path}").preprocessing
        return
    with pytest.raises(UserError, match="three numbers are expected"):
        find_architecture(f"local-dir:{tmp_path}")
