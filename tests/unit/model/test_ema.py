import pytest
import torch

from neuclip.model.ema import WeightAverage
from tiny_models import RESNET, tiny


def test_the_average_follows_its_formula():
    clip = tiny(RESNET)
    towers = clip.towers.double()
    average = WeightAverage(towers, 0.7)
    expected = towers.logit_scale.item()
    assert average.decay_at(0) == pytest.approx(0.1)
    assert average.decay_at(100) == 0.7
    for step in range(1, 31):
        with torch.no_grad():
            towers.logit_scale += 0.1
            towers.visual.bn1.running_mean += 1.0
            towers.visual.bn1.num_batches_tracked += 1
        average.update(step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * towers.logit_scale.item()
    state = average.state_dict()
    assert state["logit_scale"].item() == pytest.approx(expected, rel=1e-12)
    assert state["visual.bn1.num_batches_tracked"].item() == 30
    assert state["visual.bn1.running_mean"][0].item() == pytest.approx(
        (expected - towers.logit_scale.item()) * 10 + 30, rel=1e-9
    )


def test_a_constant_decay_holds_from_the_first_step_on():
    towers = tiny().towers
    average = WeightAverage(towers, 0.9, constant=True)
    first = towers.logit_scale.item()
    average.update(1)
    assert average.state_dict()["logit_scale"].item() == first  # equal weights: bit by bit
    with torch.no_grad():
        towers.logit_scale += 1
    average.update(2)
    assert average.state_dict()["logit_scale"].item() == pytest.approx(first + 0.1)


def test_the_average_takes_the_weights_place_and_gives_it_back():
    towers = tiny().towers
    average = WeightAverage(towers, 0.5)
    first = {name: value.clone() for name, value in towers.state_dict().items()}
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter += 1.0
    now = {name: value.clone() for name, value in towers.state_dict().items()}
    with average.applied():
        for name, value in towers.state_dict().items():
            assert torch.equal(value, first[name])
    for name, value in towers.state_dict().items():
        assert torch.equal(value, now[name])


def test_low_precision_weights_are_averaged_in_float32():
    towers = tiny(precision="bf16").towers
    average = WeightAverage(towers, 0.999)
    weight = towers.visual.transformer.resblocks[0].mlp.c_fc.weight
    assert weight.dtype == torch.bfloat16
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert average.state_dict()[name].dtype == torch.float32
    with torch.no_grad():
        weight.fill_(1.0)
    for _ in range(20):
        average.update(10_000)
    kept = WeightAverage(towers, 0.999)
    kept.load_state_dict(average.state_dict())
    assert torch.equal(kept.state_dict()[name], average.state_dict()[name])
    with average.applied():
        assert weight.dtype == torch.bfloat16
