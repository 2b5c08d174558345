"""The facts that settings of fine-tuning are derived from."""

import math

import open_clip
import pytest
import torch
from open_clip import pretrained as tags

from neuclip.config.derived import Facts
from neuclip.config.resolve import resolve
from neuclip.config.sections import EvaluationConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.model import starting_weights
from neuclip.model.starting_weights import StartingWeightsReader
from neuclip.training import finetuning, training_data
from neuclip.training.finetuning import bytes_per_pair, complete, trained_weights
from neuclip.training.training_data import TrainingData
from tiny_models import VIT, tiny


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
    assert values["batch_size"] == 16  # 5 % are held out: 608 pairs are left
    assert values["epochs"] == 20


def test_data_and_weights_are_read_once_for_the_settings_and_the_run(weights, monkeypatch):
    read, reading = [], starting_weights.open_checkpoint
    monkeypatch.setattr(
        starting_weights,
        "open_checkpoint",
        lambda *given, **named: read.append(given) or reading(*given, **named),
    )
    opened, actual = [], training_data.open_source
    monkeypatch.setattr(
        training_data, "open_source", lambda *given: opened.append(given) or actual(*given)
    )
    evaluation = EvaluationConfig(val_split=0.25)  # the data have 16 different images
    asked = config(weights).model_copy(update={"evaluation": evaluation})
    data = TrainingData(asked, "synthetic:640")
    reader = StartingWeightsReader()
    full, _ = complete(asked, data, reader)
    starting = reader.take(full.model)
    assert starting.settings == full.model
    assert len(read) == 1
    reader.take(full.model)  # it keeps nothing
    assert len(read) == 2
    trained, held_out = data.divided(resolve(full, 1))
    assert len(trained) + len(held_out.positions) == 640
    assert len(opened) == 1


def test_a_tag_chooses_the_model(weights, monkeypatch):
    monkeypatch.setitem(tags._PRETRAINED, "ViT-S-32-alt", {"only": {"hf_hub": "a/b"}})
    plain = validate({"model": {"pretrained": "only"}}, "here")
    assert complete(plain)[0].model.name == "ViT-S-32-alt"
    monkeypatch.setattr(finetuning, "_facts", lambda *_: Facts(640, None, 0.02, None, 1))
    full, derived = complete(config("only"))
    assert full.model.name == "ViT-S-32-alt"
    assert (derived[0].key, derived[0].reason) == ("name", "the model of the weights")


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


@pytest.mark.parametrize(
    ("tree", "part"),
    [
        ({}, 1.0),
        ({"model": {"lock_image": True}}, 0.95),
        ({"adaptation": {"lora_rank": 1, "lora_towers": "text", "lora_targets": "q"}}, 1e-3),
    ],
)
def test_what_is_trained_is_counted_without_the_weights(tree, part):
    tree = {**tree, "model": {"name": VIT, **tree.get("model", {})}}
    found = trained_weights(validate(tree, "here"))
    assert found.total == sum(p.numel() for p in tiny().towers.parameters())
    assert 0 < found.parameters / found.total <= part
    if "adaptation" in tree:
        assert found.parameters == 2 * (16 + 16) + 1  # of two layers, and the temperature
