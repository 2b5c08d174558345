import math
import random

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from neuclip.errors import UserError
from neuclip.model import clip as model
from neuclip.model.architecture import model_names
from neuclip.model.device import choose_device, choose_precision
from neuclip.model.encoder import Encoder


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return model.build_clip("glyph-tiny", "fp32", torch.device("cpu"), {"temperature": 0.05})


def test_the_pinned_open_clip():
    assert open_clip.__version__.startswith("3.3.")


def test_the_first_temperature_is_the_methods(tiny):
    assert tiny.towers.logit_scale.item() == pytest.approx(-math.log(0.05))


def test_the_towers_return_what_the_losses_take(tiny):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    images = torch.stack([tiny.eval_transform(picture) for picture in pictures])
    outputs = tiny.towers(images, tiny.tokenize(["red", "blue"]))
    assert set(outputs) == {"image_features", "text_features", "logit_scale"}
    assert outputs["image_features"].shape == (2, tiny.embed_dim)
    assert outputs["logit_scale"].item() == pytest.approx(20.0)


def test_a_logit_bias_is_made_when_asked_for():
    clip = model.build_clip(
        "glyph-tiny", "fp32", torch.device("cpu"), {"temperature": 0.1, "logit_bias": -10.0}
    )
    assert clip.towers.logit_bias.item() == -10.0


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "glyph-tiny", "icon-small", "icon-tiny"])
def test_models_exist_by_name(name):
    assert name in model_names()


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="unknown model 'ViT-B32'; did you mean 'ViT-B-32'"):
        model.build_clip("ViT-B32", "fp32", torch.device("cpu"))


def test_parts_that_are_not_here_are_named(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to the hub to load this tokenizer\nmore")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(UserError, match="'glyph-tiny' needs files that are not on this machine"):
        model.build_clip("glyph-tiny", "fp32", torch.device("cpu"))


def test_the_encoder_gives_unit_norms_and_leaves_the_mode(tiny):
    encoder = Encoder(tiny, torch.device("cpu"))
    tiny.towers.train()
    features = encoder.encode_text(encoder.tokenize(["a", "b"]))
    assert torch.allclose(features.norm(dim=1), torch.ones(2))
    assert not features.requires_grad
    assert tiny.towers.training


@pytest.mark.parametrize("precision", ["amp_bf16", "bf16"])
def test_low_precision_stays_close(precision):
    features = {}
    for name in ("fp32", precision):
        torch.manual_seed(0)
        clip = model.build_clip("glyph-tiny", name, torch.device("cpu"))
        encoder = Encoder(clip, torch.device("cpu"))
        torch.manual_seed(1)
        features[name] = encoder.encode_image(torch.randn(4, 3, 32, 32))
    cosine = (features["fp32"] * features[precision]).sum(-1)
    assert float(cosine.min()) > 0.99


def test_the_temperature_is_kept_in_bounds(tiny):
    with torch.no_grad():
        tiny.towers.logit_scale.fill_(10.0)
    model.clamp_logit_scale(tiny.towers)
    assert float(tiny.towers.logit_scale.detach().exp()) == pytest.approx(100.0)


def test_cuda_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"
    assert choose_precision("auto", torch.device("cpu")) == "fp32"


AUGMENTATION = {
    "scale": (0.4, 1.0),
    "color_jitter": (0.32, 0.32, 0.32, 0.08),
    "color_jitter_prob": 0.8,
    "gray_scale_prob": 0.2,
}


@pytest.mark.parametrize("settings", [AUGMENTATION, {"use_timm": True, "re_prob": 1.0}])
def test_augmentation_is_open_clips_and_follows_the_seed(tiny, settings):
    picture = Image.effect_noise((64, 48), 90).convert("RGB")
    ours = model.augmented(tiny, settings).train_transform

    def drawn(transform, seed):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        return transform(picture)

    assert drawn(ours, 1).shape == (3, 32, 32)
    assert torch.equal(drawn(ours, 1), drawn(ours, 1))
    assert len({drawn(ours, seed).sum().item() for seed in range(8)}) == 8
    assert not torch.equal(drawn(ours, 1), drawn(tiny.train_transform, 1))
