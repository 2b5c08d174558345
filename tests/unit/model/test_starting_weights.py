import pytest
import torch

from neuclip.checkpoint import storage
from neuclip.config.sections import ModelConfig
from neuclip.errors import UserError
from neuclip.model.starting_weights import load_starting_weights
from tiny_models import RESNET, VIT, tiny


@pytest.fixture(scope="module")
def other():
    """A model with other weights, and a temperature of its own."""
    clip = tiny(seed=1)
    with torch.no_grad():
        clip.towers.logit_scale.fill_(3.0)
    return clip.towers.state_dict()


def begin(path, *, learns_temperature=True, init=None, **settings):
    clip = tiny(init=init)
    before = {name: value.clone() for name, value in clip.towers.state_dict().items()}
    config = ModelConfig(**{name: str(path) for name in settings})
    load_starting_weights(clip.towers, config, learns_temperature=learns_temperature)
    return before, clip.towers.state_dict()


def test_the_whole_model(other, tmp_path):
    storage.save(tmp_path / "a.pt", {"state_dict": {f"module.{k}": v for k, v in other.items()}})
    before, after = begin(tmp_path / "a.pt", pretrained=True)
    assert all(torch.equal(value, other[name]) for name, value in after.items())
    before, after = begin(tmp_path / "a.pt", pretrained=True, learns_temperature=False)
    assert torch.equal(after["logit_scale"], before["logit_scale"])
    assert torch.equal(after["visual.proj"], other["visual.proj"])


def test_a_bias_that_the_file_lacks_is_the_methods(other, tmp_path):
    storage.save(tmp_path / "a.pt", {"state_dict": other})
    _, after = begin(tmp_path / "a.pt", pretrained=True, init={"logit_bias": -10.0})
    assert after["logit_bias"].item() == -10.0
    storage.save(tmp_path / "b.pt", {"state_dict": {**other, "logit_bias": torch.zeros(())}})
    _, after = begin(tmp_path / "b.pt", pretrained=True)
    assert "logit_bias" not in after


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
    with pytest.raises(UserError, match="of another architecture"):
        begin(tmp_path / "a.pt", pretrained=True)
    with pytest.raises(UserError, match="no checkpoint at"):
        begin(tmp_path / "missing.pt", pretrained=True)
    assert VIT == "tiny-vit"
