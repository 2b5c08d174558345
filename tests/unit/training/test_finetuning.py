"""The facts that settings of fine-tuning are derived from."""

import math

import open_clip
import pytest
import torch

from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.training.finetuning import bytes_per_pair, complete


@pytest.fixture
def weights(tmp_path):
    """Bare weights of a model whose shapes are its own, at a temperature of 0.02."""
    model = open_clip.create_model("ViT-S-32-alt", pretrained=None)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(50))
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    return path


def config(weights, **model):
    return validate(
        {
            "derive": "finetune", "data": {"train_data": "synthetic:640"}, "device": "cpu",
            "model": {"pretrained": None if weights is None else str(weights), **model},
        },
        "here",
    )  # fmt: skip


def test_bare_weights_tell_their_model_and_temperature(weights):
    full, derived = complete(config(weights))
    values = {one.key: one.value for one in derived}
    assert values["name"] == full.model.name == "ViT-S-32-alt"
    assert values["temperature"] == pytest.approx(0.02)
    assert values["batch_size"] == 32
    assert values["epochs"] == 20


def test_settings_that_derive_nothing_pass_through():
    plain = validate({"optim": {"epochs": 3}}, "here")
    assert complete(plain) == (plain, ())


def test_without_weights_or_data_there_is_an_error():
    with pytest.raises(UserError, match="--pretrained takes a run folder"):
        complete(config(None))
    with pytest.raises(UserError, match=r"--train-data pairs\.csv"):
        complete(validate({"derive": "finetune"}, "here"))


def test_activations_are_estimated_for_transformers_only():
    vit = {"vision_cfg": {"layers": 12, "width": 768, "patch_size": 32}, "text_cfg": {}}
    assert bytes_per_pair(vit, 2) == 34 * 12 * (50 * 768 + 77 * 512)
    assert bytes_per_pair(vit, 4) == 2 * bytes_per_pair(vit, 2)
    resnet = {"vision_cfg": {"layers": [3, 4, 6, 3]}, "text_cfg": {}}
    assert bytes_per_pair(resnet, 2) is None
    assert bytes_per_pair({**vit, "text_cfg": {"hf_model_name": "x"}}, 2) is None
