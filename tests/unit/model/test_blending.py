"""Mixes of weights, against float64, at the ends bit by bit, and what cannot be mixed."""

import logging

import pytest
import torch

from neuclip.errors import UserError
from neuclip.model.blending import mix_weights, open_ends
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained
from tiny_models import RESNET, VIT, tiny


def same_bits(one, other):
    one, other = one.reshape(-1), other.reshape(-1)
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def write(path, name=VIT, seed=0, change=None, half=False):
    """A bare state dict of a tiny model."""
    weights = tiny(name, seed).towers.state_dict()
    if half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    if change is not None:
        change(weights)
    torch.save(weights, path)
    return weights


def opened(old, new, arch=VIT):
    found = load_pretrained(CheckpointChoice(new, arch=arch), "cpu")
    return open_ends(CheckpointChoice(old, arch=arch), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_ends_are_kept_bit_by_bit(dtype):
    special = torch.tensor([-0.0, 0.0, 1e-7, 3.5, -65504.0], dtype=dtype)
    old, new = {"w": special}, {"w": torch.randn(5).to(dtype)}
    for alpha, end in ((0.0, old), (1.0, new)):
        assert same_bits(mix_weights(old, new, alpha)["w"], end["w"].float())


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.7])
def test_a_mix_is_the_sum_of_shares(alpha):
    old, new = torch.randn(1000), torch.randn(1000)
    expected = (1 - alpha) * old.double() + alpha * new.double()
    found = mix_weights({"w": old}, {"w": new}, alpha)["w"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.9])
def test_frozen_weights_stay_bit_by_bit(alpha):
    frozen = torch.randn(10_000)
    assert same_bits(mix_weights({"w": frozen}, {"w": frozen.clone()}, alpha)["w"], frozen)


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 7), (0.4, 7), (0.5, 9), (1.0, 9)])
def test_integers_come_from_the_nearer_end(alpha, expected):
    found = mix_weights({"n": torch.tensor(7)}, {"n": torch.tensor(9)}, alpha)["n"]
    assert found.dtype == torch.int64 and int(found) == expected


@pytest.mark.parametrize("half", [False, True])
def test_towers_at_the_ends_are_those_of_the_files(tmp_path, half):
    old = write(tmp_path / "old.pt", seed=1, half=half)
    new = write(tmp_path / "new.pt", seed=2, half=half)
    ends = opened(tmp_path / "old.pt", tmp_path / "new.pt")
    for alpha, weights in ((0.0, old), (1.0, new), (0.0, old)):
        ends.take(alpha)
        for name, value in ends.clip.towers.state_dict().items():
            assert same_bits(value, weights[name].to(value.dtype)), name


def test_temperatures_are_mixed_by_their_geometric_mean(tmp_path):
    for name, scale in (("old", 10.0), ("new", 40.0)):
        write(tmp_path / f"{name}.pt", change=lambda w, s=scale: w["logit_scale"].fill_(s).log_())
    ends = opened(tmp_path / "old.pt", tmp_path / "new.pt")
    ends.take(0.5)
    assert ends.clip.logit_scale == pytest.approx(20.0, rel=1e-6)


def test_statistics_of_batchnorm_are_mixed_with_a_warning(tmp_path, caplog):
    def trained(weights):
        weights["visual.bn1.running_var"].fill_(3.0)
        weights["visual.bn1.num_batches_tracked"].fill_(5)

    write(tmp_path / "old.pt", RESNET)
    write(tmp_path / "new.pt", RESNET, change=trained)
    with caplog.at_level(logging.WARNING, "neuclip"):
        ends = opened(tmp_path / "old.pt", tmp_path / "new.pt", RESNET)
    assert "BatchNorm" in caplog.text
    ends.take(0.25)
    found = ends.clip.towers.state_dict()
    assert float(found["visual.bn1.running_var"][0]) == pytest.approx(1.5)
    assert int(found["visual.bn1.num_batches_tracked"]) == 0


def test_what_cannot_be_mixed(tmp_path):
    write(tmp_path / "new.pt")
    write(tmp_path / "resnet.pt", RESNET)
    write(tmp_path / "nan.pt", seed=1, change=lambda w: w["visual.proj"].fill_(torch.nan))
    (tmp_path / "text.pt").write_text("no weights")
    cases = {
        "resnet.pt": "different architectures cannot be mixed: .*does not fit tiny-vit",
        "nan.pt": r"nan\.pt: visual\.proj has values that are not finite",
        "new.pt": "hold the same weights: there is nothing to mix",
        "text.pt": r"text\.pt",
        "missing.pt": r"missing\.pt",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            opened(tmp_path / name, tmp_path / "new.pt")


def test_equal_shapes_with_another_activation_are_refused(tmp_path):
    def recording(path, seed, quick_gelu):
        clip = tiny(seed=seed)
        record = clip.architecture.record()
        record["model_cfg"]["quick_gelu"] = quick_gelu
        own = {"config": "{}", "architecture": record}
        torch.save({"state_dict": clip.towers.state_dict(), "neuclip": own}, path)

    recording(tmp_path / "old.pt", 1, quick_gelu=True)
    recording(tmp_path / "new.pt", 2, quick_gelu=False)
    with pytest.raises(UserError, match=r"quick_gelu is True in .*old\.pt, and False in .*new\.pt"):
        opened(tmp_path / "old.pt", tmp_path / "new.pt", arch=None)
