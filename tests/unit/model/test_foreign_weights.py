import json
import logging

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from neuclip.checkpoint.common import CheckpointError
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.absent import absent
from neuclip.model.architecture import find_architecture
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import build_clip
from neuclip.model.foreign_weights import Given, fit, unwrap
from neuclip.model.load import load_pretrained
from neuclip.model.mismatch import advice, models_of
from tiny_models import CPU, RESNET, VIT, pairs, tiny


@pytest.fixture(scope="module")
def weights():
    return tiny(seed=1).towers.state_dict()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "neuclip")
    return caplog


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def compiled_tower(weights):
    return {name.replace("visual.", "visual._orig_mod."): v for name, v in weights.items()}


WRAPPED = {
    "bare": lambda w: w,
    "open_clip": lambda w: {"epoch": 1, "state_dict": prefixed(w, "module."), "optimizer": {}},
    "compiled": lambda w: {"state_dict": prefixed(w, "_orig_mod.")},
    "compiled under DDP": lambda w: {"state_dict": prefixed(w, "module._orig_mod.")},
    "a compiled tower": lambda w: {"model": compiled_tower(w)},
    "Lightning": lambda w: {"state_dict": {**prefixed(w, "model."), "loss.w": torch.ones(1)}},
    "two wrappers": lambda w: {"model": {"state_dict": prefixed(w, "net.module.")}},
    "model_state_dict": lambda w: {"model_state_dict": w, "args": None},
    "TorchScript": lambda w: {"torchscript": w},
    "FSDP": lambda w: {"module": prefixed(w, "_fsdp_wrapped_module.model.")},
    "text tower apart": lambda w: {
        name if name.startswith(("visual", "logit")) else f"text.{name}": v for name, v in w.items()
    },
    "half precision": lambda w: {name: v.half() for name, v in w.items()},
    "temperature of one entry": lambda w: w | {"logit_scale": w["logit_scale"].reshape(1)},
    "temperature as a number": lambda w: w | {"logit_scale": np.float64(w["logit_scale"])},
    "buffers": lambda w: w | {"attn_mask": torch.ones(2, 2), "context_length": torch.tensor(24)},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_same_towers_however_wrapped(weights, name, tmp_path):
    path = tmp_path / "x.pt"
    clip = tiny(seed=2)
    found = fit(Given(unwrap(WRAPPED[name](dict(weights)), path), path), clip)
    clip.towers.load_state_dict(found)
    tolerance = 1e-3 if name == "half precision" else 0
    for key, value in weights.items():
        torch.testing.assert_close(clip.towers.state_dict()[key], value, rtol=tolerance, atol=1e-4)


def test_what_is_left_out_is_counted(weights, tmp_path, said):
    more = {"loss.weight": torch.ones(2), "teacher.visual.proj": torch.ones(2)}
    fit(Given({**weights, **more, "logit_bias": torch.ones(())}, tmp_path), tiny())
    assert "3 weights beside the towers left out (loss.weight, teacher.visual.proj" in said.text


@pytest.mark.parametrize("content", [{"optimizer": {}, "epoch": 3}, [1, 2], {"state_dict": {}}])
def test_no_weights(content, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no weights by name; it holds: \w"):
        unwrap(content, tmp_path / "x.pt")


@pytest.mark.parametrize(("name", "size"), [(VIT, 64), (VIT, (64, 32)), (RESNET, 64)])
def test_position_embeddings_are_resized_as_open_clip_does(name, size, tmp_path, said):
    """The same features as with open_clip's own loading at the same forced size."""
    torch.manual_seed(0)
    old = build_clip(name, "fp32", CPU).towers.state_dict()
    clip = build_clip(
        find_architecture(name).changed(ModelConfig(force_image_size=size)), "fp32", CPU
    )
    clip.towers.load_state_dict(fit(Given(old, tmp_path), clip))
    if name == RESNET:  # open_clip refuses these; its own function resizes them
        assert "visual.attnpool.positional_embedding resized from 2 x" in said.text
        return
    torch.save(old, tmp_path / "x.pt")
    theirs = open_clip.create_model(name, pretrained=str(tmp_path / "x.pt"), force_image_size=size)
    assert "visual.positional_embedding resized from" in said.text
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, clip.towers.state_dict()[key]), key


def test_another_text_length(tmp_path, said):
    config = open_clip.get_model_config(VIT)
    config["text_cfg"]["context_length"] = 48
    (tmp_path / "long.json").write_text(json.dumps(config))
    old = build_clip(str(tmp_path / "long.json"), "fp32", CPU).towers.state_dict()
    found = fit(Given(old, tmp_path), tiny())
    assert found["positional_embedding"].shape[0] == 24
    assert "positional_embedding resized from 48 x" in said.text


def test_another_architecture_is_named(tmp_path):
    small = tiny(RESNET).towers.state_dict()
    with pytest.raises(CheckpointError) as error:
        fit(Given(small, tmp_path / "x.pt"), tiny())
    message = str(error.value)
    assert "x.pt does not fit tiny-vit, " in message
    assert "tiny-vit has visual.class_embedding, the file does not" in message
    assert "These are the shapes of tiny-resnet: give --model" in message
    assert len(message) < 1000


def test_more_layers_than_the_model_has_are_not_left_out(weights, tmp_path):
    deeper = {**weights, "visual.transformer.resblocks.3.ln_1.weight": torch.ones(32)}
    with pytest.raises(CheckpointError, match=r"the file has visual\.transformer\.resblocks\.3"):
        fit(Given(deeper, tmp_path), tiny())


def test_the_models_that_fit():
    with torch.device("meta"):
        vit = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).state_dict()
    assert models_of(vit) == ["ViT-B-32", "ViT-B-32-quickgelu"]
    assert "names with quickgelu are for the weights of OpenAI" in advice(vit)
    larger = vit | {"visual.positional_embedding": torch.empty(99, 768, device="meta")}
    assert "ViT-B-32" in models_of(larger)
    assert "give their configuration as a file" in advice({"visual.proj": torch.ones(3, 5)})


def test_openais_weights_need_quick_gelu(weights, tmp_path, said):
    sizes = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.ones(()))
    fit(Given({**weights, **sizes}, tmp_path), tiny())
    assert "trained with QuickGELU, and tiny-vit computes GELU" in said.text
    assert said.messages[-1].endswith("; add --force-quick-gelu")
    fit(Given(dict(weights), tmp_path, None, True), tiny())
    assert said.messages[-1].endswith("; add --force-quick-gelu")
    said.clear()
    fit(Given(dict(weights), tmp_path, None, False), tiny())
    fit(Given(dict(weights), tmp_path, None, None), tiny())
    assert not said.text


@pytest.mark.parametrize(
    ("given", "model", "words"),
    [
        (
            "opnai",
            "ViT-B-32",
            r"there is no opnai.*\. Published weights of ViT-B-32 have the tags open",
        ),
        (
            "laion2b_s34b",
            "x.json",
            r"there is no laion2b_s34b.*\. Tags of published weights are laion2b",
        ),
        ("ViT-B-32", None, "is a model, not weights"),
        ("laion/CLIP-x", None, "a repository on the hub is hf-hub:laion/CLIP-x"),
        ("local-dir:here", None, "give the folder alone: here"),
        ("full", None, r"neither a run folder .*give one of its files: a\.pt"),
        ("logs", None, r"neither a run folder .*give one of its runs: mine"),
        (
            "logs/mine/checkpoints",
            None,
            r"give the run folder, logs/mine, or one of them: epoch_1\.pt, epoch_2$",
        ),
        ("empty", None, "it holds no files of weights"),
        ("logz", None, "there is no logz; there are: logs"),
        ("nowhere/at/all", None, "there is no folder nowhere/at"),
    ],
)
def test_what_was_given_instead_of_weights(given, model, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("full", "empty", "logs/mine/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "full" / "a.pt").touch()
    checkpoints = tmp_path / "logs/mine/checkpoints"
    (checkpoints / "epoch_2").mkdir()
    for name in ("epoch_1.pt", "SHA256SUMS", "epoch_2/values.pt", "epoch_2/SHA256SUMS"):
        (checkpoints / name).touch()
    with pytest.raises(UserError, match=words):
        raise absent(type(tmp_path)(given), model)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_torchscript_archive_gives_the_same_logits(tmp_path):
    clip = tiny(seed=1)
    clip.towers.eval()
    images, tokens = pairs(2)
    clip.towers.output_dict = False
    traced = torch.jit.trace(clip.towers, (images, tokens), check_trace=False)
    torch.jit.save(traced, str(tmp_path / "ViT.pt"))
    expected = clip.towers(images, tokens)
    found = load_pretrained(CheckpointChoice(tmp_path / "ViT.pt", arch=VIT), "cpu")
    outputs = found.clip.towers.eval()(images, tokens)
    assert torch.equal(outputs["image_features"], expected[0])
    assert torch.equal(outputs["text_features"], expected[1])


def test_transformers_clip_is_read_by_its_own_configuration(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "intermediate_size": 96}
    vision = {"hidden_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 24}
    config = transformers.CLIPConfig(
        projection_dim=24, vision_config={**small, **vision}, text_config={**small, **text}
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path / "clip")
    processor = transformers.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3], do_center_crop=False)
    processor.save_pretrained(tmp_path / "clip")
    images, _ = pairs(3)
    for given in ("clip", "clip/model.safetensors"):
        found = load_pretrained(CheckpointChoice(tmp_path / given), "cpu")
        assert "0.1, 0.2, 0.3" in str(found.clip.eval_transform)
        assert found.clip.architecture.preprocessing["resize_mode"] == "squash"
        tokens = found.clip.tokenize(["a cat", "two dogs", "x"])
        outputs = found.clip.towers.eval()(images, tokens)
        with torch.no_grad():
            expected = theirs(pixel_values=images, input_ids=tokens)
        logits = outputs["logit_scale"] * outputs["image_features"] @ outputs["text_features"].T
        torch.testing.assert_close(logits, expected.logits_per_image, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "blip"}, "transformers' model 'blip'; of transformers' models CLIPModel"),
        (
            {"model_type": "siglip", "text_config": {"vocab_size": 100}},
            r"no SigLIP towers of these sizes \(image 768 wide.*100 tokens",
        ),
        ({"model_type": "clip", "text_config": {"vocab_size": 100}}, "tokenizer is not OpenAI's"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "computes no such towers"),
    ],
)
def test_other_repositories_of_transformers(config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        find_architecture(f"local-dir:{tmp_path}")


def test_other_models_of_transformers_are_named(tmp_path):
    names = ["vision_model.head.weight", "text_model.head.weight", "logit_scale"]
    with pytest.raises(CheckpointError, match=r"not a weight of CLIPModel; .*timm/ViT-B-16-SigLIP"):
        unwrap({name: torch.ones(()) for name in names}, tmp_path)
    names.append("vision_model.head.probe")
    with pytest.raises(CheckpointError, match=r"head\.weight is not a weight of SiglipModel"):
        unwrap({name: torch.ones(()) for name in names}, tmp_path)


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        (nn.Conv2d(3, 4, 1, stride=2), torch.contiguous_format),
        (nn.Conv2d(3, 4, 3, stride=2), torch.channels_last),
        (nn.Conv2d(8, 4, 1, stride=2), torch.channels_last),
        (nn.Conv2d(3, 4, 1), torch.channels_last),
    ],
)
def test_images_are_channels_last_where_torch_can_train_with_it(stem, expected):
    clip = tiny()
    clip.towers.visual.stem = stem
    assert clip.image_format(CPU) == expected
    assert clip.image_format(torch.device("cuda")) == torch.channels_last
