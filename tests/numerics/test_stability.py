"""Extreme inputs in float32, and bfloat16 autocast."""

import pytest
import torch
from naive_reference import pairs

from momentum_keys import keys_for
from neuclip.catalogue.registry import METHODS

NAMES = list(METHODS)
VARIANTS = [(name, {}) for name in NAMES] + [
    ("neuclip", {"gradient": "full"}),
    ("neuclip", {"gradient": "union"}),
    ("neuclip", {"gamma": 0.0, "gamma_schedule": "constant"}),
    ("neuclip", {"gamma": 0.0, "gamma_schedule": "constant", "gradient": "full", "inner_steps": 0}),
    ("neuclip_pool", {"gamma": 0.0, "gamma_schedule": "constant"}),
    ("neuclip_pool", {"gamma": 0.0, "gamma_schedule": "constant", "gradient": "union"}),
    ("neuclip", {"log_weights": True, "prototype_optimizer": "adam", "refresh": "rolling"}),
    ("amorlip", {"amortization": "kl_div_asym"}),
    ("amorlip", {"amortization": "js_div"}),
]


def identical() -> torch.Tensor:
    return pairs(1).repeat(1, 8, 1)


def collapsed() -> torch.Tensor:
    """All images and texts have the same embedding."""
    return pairs(1)[:1].repeat(2, 8, 1)


def hard_negative() -> torch.Tensor:
    """Well-aligned pairs, and one pair whose text is the opposite of its image."""
    features = pairs(8, noise=0.01)
    features[1, 3] = -features[0, 3]
    return features


def easy() -> torch.Tensor:
    """Well-aligned pairs in half of the dimensions."""
    return torch.nn.functional.pad(pairs(8, dim=4, noise=0.01), (0, 4))


def surprise() -> torch.Tensor:
    """An image orthogonal to its text and equal to another text: unlike all seen so far."""
    features = easy()
    features[0, 3], features[1, 3], features[1, 5] = torch.eye(8, dtype=torch.float64)[[7, 6, 7]]
    return features


EXTREMES = {
    "identical": identical,
    "collapsed": collapsed,
    "hard_negative": hard_negative,
    "surprise": surprise,
}


@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_float32_stays_finite_at_the_smallest_temperature(build, name, settings, kind):
    """exp(200) is not a float32: linear space would overflow."""
    loss = build(name, double=False, steps_per_epoch=1, **settings)
    for step in range(8):
        # Easy batches first, so that memories know nothing of what comes.
        features = (easy() if step < 4 else EXTREMES[kind]()).float()
        leaf = features.requires_grad_()
        scale, bias = torch.tensor(100.0, requires_grad=True), torch.tensor(-10.0)
        given = {"sample_ids": torch.arange(8), **keys_for(loss, leaf)}
        value = loss(leaf[0], leaf[1], scale, bias, **given)
        value.backward()
        assert torch.isfinite(value), (step, value)
        assert torch.isfinite(leaf.grad).all(), step
        assert scale.grad is None or torch.isfinite(scale.grad), step
    for key, tensor in loss.state_dict().items():
        if torch.is_tensor(tensor) and not key.endswith("table.values"):
            assert torch.isfinite(tensor).all(), key
    assert all(value == value and abs(value) != float("inf") for value in loss.metrics().values())


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_float32_agrees_with_float64(build, name, settings):
    results = []
    for double in (False, True):
        loss = build(name, double=double, **settings)
        for step in range(4):
            dtype = torch.float64 if double else torch.float32
            leaf = pairs(8, seed=step).to(dtype).requires_grad_()
            scale, bias = torch.tensor(14.0, dtype=dtype), torch.tensor(-10.0, dtype=dtype)
            given = {"sample_ids": torch.arange(8), **keys_for(loss, leaf)}
            value = loss(leaf[0], leaf[1], scale, bias, **given)
            (grad,) = torch.autograd.grad(value, leaf)
        results.append((value.detach().double(), grad.double()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_bfloat16_autocast_computes_the_loss_in_float32(build, name, settings):
    """Under autocast only the features are rounded: by 2^-8 of a cosine."""
    features = pairs(8)
    rounded = features.bfloat16()
    results = []
    for inputs, enabled in ((rounded.float(), False), (rounded, True)):
        loss = build(name, double=False, **settings)
        keys = {k: v.bfloat16() for k, v in keys_for(loss, rounded.float()).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for _ in range(2):
                value = loss(
                    inputs[0],
                    inputs[1],
                    torch.tensor(14.0),
                    torch.tensor(-10.0),
                    sample_ids=torch.arange(8),
                    **keys,
                )
            if loss.predicts_log_normalizers:
                predicted = loss.predict_log_normalizers(
                    inputs[0], inputs[1], torch.tensor(14.0), torch.arange(8)
                )[0]
                value = torch.cat([value[None], predicted])
        assert value.dtype == torch.float32
        results.append(value)
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
