"""The scale of the loss under float16: as torch's GradScaler, without waiting for the device."""

import math

import pytest
import torch

from neuclip.training import loss_scale
from neuclip.training.loss_scale import INITIAL, LossScale

CPU = torch.device("cpu")
GOOD, BAD, REJECTED = (1.0, 0.0), (math.inf, 0.0), (math.nan, 1.0)


def after(scale, *steps):
    for norm, rejected in steps:
        scale.update(torch.tensor(norm), torch.tensor(rejected))
    return float(scale.scale)


def test_the_scale_follows_torchs(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 3)
    ours, theirs = LossScale(CPU), torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for norm in (1, 1, 1, 1, math.nan, 1, math.inf, 1, 1, 1, 1, 1, 1):
        theirs.scale(parameter).backward()
        parameter.grad.fill_(norm)
        theirs.step(optimizer)
        theirs.update()
        assert after(ours, (float(norm), 0.0)) == theirs.get_scale()


def test_a_rejected_loss_says_nothing_about_the_scale(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 2)
    scale = LossScale(CPU)
    assert after(scale, GOOD, REJECTED, REJECTED) == INITIAL
    assert after(scale, GOOD) == 2 * INITIAL


def test_the_scale_has_bounds(monkeypatch):
    assert after(LossScale(CPU), *[BAD] * 30) == 1
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 1)
    assert after(LossScale(CPU), *[GOOD] * 30) == loss_scale.LARGEST


def test_the_state_continues(monkeypatch):
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 4)
    first, second = LossScale(CPU), LossScale(CPU)
    after(first, BAD, GOOD, GOOD, GOOD)
    second.load_state_dict(first.state_dict())
    assert after(first, GOOD) == after(second, GOOD) == INITIAL
    assert first.state_dict() == second.state_dict() == {"scale": INITIAL, "good_steps": 0}


def test_gradients_are_divided_in_place():
    gradients = [torch.full((2, 3), INITIAL * 3), torch.tensor(INITIAL)]
    LossScale(CPU).unscale(gradients)
    assert torch.equal(gradients[0], torch.full((2, 3), 3.0))
    assert gradients[1] == pytest.approx(1)
    LossScale(CPU).unscale([])
