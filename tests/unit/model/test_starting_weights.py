import json
import logging
from dataclasses import replace

import open_clip
import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.architecture import find_architecture
from neuclip.model.clip import build_clip
from neuclip.model.starting_weights import read_starting_weights
from tiny_models import RESNET, VIT, tiny

SQUASH = {
    "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear",
    "resize_mode": "squash",
}  # fmt: skip


@pytest.fixture(scope="module")
def other():
    """A model with other weights, and a temperature of its own."""
    clip = tiny(seed=1)
    with torch.no_grad():
        clip.towers.logit_scale.fill_(3.0)
    return clip.towers.state_dict()


def begin(path, *, kept=(), init=None, **settings):
    clip = tiny(init=init)
    before = {name: value.clone() for name, value in clip.towers.state_dict().items()}
    config = ModelConfig(**{name: str(path) for name in settings})
    read_starting_weights(config).load(clip, kept=kept)
    return before, clip.towers.state_dict()


def test_the_whole_model(other, tmp_path, caplog):
    caplog.set_level(logging.INFO, "neuclip")
    storage.save(tmp_path / "a.pt", {"state_dict": {f"module.{k}": v for k, v in other.items()}})
    before, after = begin(tmp_path / "a.pt", pretrained=True)
    assert all(torch.equal(value, other[name]) for name, value in after.items())
    assert "temperature" not in caplog.text
    before, after = begin(tmp_path / "a.pt", pretrained=True, kept={"logit_scale", "logit_bias"})
    assert torch.equal(after["logit_scale"], before["logit_scale"])
    assert torch.equal(after["visual.proj"], other["visual.proj"])
    assert "temperature starts at 0.07; that of the weights is 0.04979" in caplog.text


def test_a_resumed_run_says_nothing_of_the_temperature_that_its_checkpoint_decides(
    other, tmp_path, caplog
):
    caplog.set_level(logging.INFO, "neuclip")
    storage.save(tmp_path / "a.pt", {"state_dict": other})
    starting = read_starting_weights(ModelConfig(pretrained=str(tmp_path / "a.pt")))
    for resumed in (None, find_architecture("ViT-B-32")):
        caplog.clear()
        replace(starting, resumed=resumed).load(tiny(), kept={"logit_scale"})
        assert ("temperature starts" in caplog.text) == (resumed is None)


def test_a_bias_that_the_file_lacks_is_the_methods(other, tmp_path):
    storage.save(tmp_path / "a.pt", {"state_dict": other})
    _, after = begin(tmp_path / "a.pt", pretrained=True, init={"logit_bias": -10.0})
    assert after["logit_bias"].item() == -10.0
    storage.save(tmp_path / "b.pt", {"state_dict": {**other, "logit_bias": torch.zeros(())}})
    _, after = begin(tmp_path / "b.pt", pretrained=True)
    assert "logit_bias" not in after
    init = {"temperature": 0.1, "logit_bias": -10.0}
    _, after = begin(tmp_path / "b.pt", pretrained=True, init=init)
    assert (after["logit_bias"].item(), after["logit_scale"].item()) == (0.0, 3.0)
    _, after = begin(tmp_path / "b.pt", pretrained=True, init=init, kept={"logit_bias"})
    assert (after["logit_bias"].item(), after["logit_scale"].item()) == (-10.0, 3.0)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("bare", [False, True])
def test_one_tower(other, tmp_path, tower, bare):
    def of_tower(name):
        return name.startswith("visual.") == (tower == "image") and name != "logit_scale"

    weights = other
    if bare:
        weights = {k.removeprefix("visual."): v for k, v in other.items() if of_tower(k)}
    torch.save(weights, tmp_path / "weights.pt")
    before, after = begin(tmp_path / "weights.pt", **{f"pretrained_{tower}_path": True})
    for name, value in after.items():
        assert torch.equal(value, (other if of_tower(name) else before)[name]), name


def test_weights_of_another_architecture_or_none(tmp_path):
    storage.save(tmp_path / "a.pt", {"state_dict": tiny(RESNET).towers.state_dict()})
    with pytest.raises(UserError, match="does not fit tiny-vit"):
        begin(tmp_path / "a.pt", pretrained=True)
    with pytest.raises(UserError, match="no checkpoint at"):
        begin(tmp_path / "missing.pt", pretrained=True)
    assert VIT == "tiny-vit"


def write_repository(folder, weights, **more):
    folder.mkdir()
    tree = {"model_cfg": open_clip.get_model_config(VIT) | more, "preprocess_cfg": SQUASH}
    (folder / "open_clip_config.json").write_text(json.dumps(tree))
    if weights is not None:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    return folder


def test_a_repository_as_the_model_gives_its_weights(other, tmp_path, caplog):
    caplog.set_level(logging.INFO, "neuclip")
    repository = write_repository(tmp_path / "hub", other)
    starting = read_starting_weights(ModelConfig(name=f"local-dir:{repository}"))
    assert starting.begins_trained == (True, True)
    init = {"temperature": 0.1, "logit_bias": -10.0}  # a sigmoid loss: both belong together
    clip = build_clip(starting.architecture(), "fp32", torch.device("cpu"), init)
    starting.load(clip)
    after = clip.towers.state_dict()
    assert torch.equal(after["visual.proj"], other["visual.proj"])
    assert after["logit_bias"].item() == -10.0
    assert clip.logit_scale == pytest.approx(10.0)
    assert f"initial weights: {repository}" in caplog.text
    assert "temperature and bias start as the method's" in caplog.text


def test_a_repository_without_weights_starts_at_random(tmp_path, caplog):
    caplog.set_level(logging.INFO, "neuclip")
    repository = write_repository(tmp_path / "hub", None)
    starting = read_starting_weights(ModelConfig(name=f"local-dir:{repository}", lock_image=True))
    assert starting.begins_trained == (False, False)
    assert "holds no weights: the towers start at random" in caplog.text


def test_images_are_made_as_the_weights_want_them(other, tmp_path, caplog):
    repository = write_repository(tmp_path / "hub", other)
    for settings in (
        {"pretrained": str(repository)},
        {"pretrained": str(repository / "open_clip_pytorch_model.bin")},
        {"pretrained_image_path": str(repository)},
    ):
        found = read_starting_weights(ModelConfig(name=VIT, **settings)).architecture()
        assert found.preprocessing == SQUASH
        asked = read_starting_weights(ModelConfig(name=VIT, image_mean=(0, 0, 1), **settings))
        assert asked.architecture().preprocessing == {**SQUASH, "mean": (0, 0, 1)}
    text = read_starting_weights(ModelConfig(name=VIT, pretrained_text_path=str(repository)))
    assert text.architecture().preprocessing == {}
    assert not caplog.text


def test_weights_that_say_nothing_of_images_are_doubted(other, tmp_path, caplog):
    torch.save(other, tmp_path / "a.pt")
    for name, doubted in (("ViT-B-16-SigLIP", True), (VIT, False), ("ViT-B-32", False)):
        caplog.clear()
        settings = ModelConfig(name=name, pretrained=str(tmp_path / "a.pt"))
        read_starting_weights(settings).architecture()
        flags = "--image-mean 0.5 0.5 0.5 --image-std 0.5 0.5 0.5 --image-resize-mode squash"
        assert (flags in caplog.text) == doubted
