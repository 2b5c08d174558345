import math

import pytest
import torch
from torch import nn

from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.config.sections import OptimConfig
from neuclip.training.optim import Optimizer, Schedule, is_gain_or_bias, temperature_rate


def resolved(**values):
    return resolve(RunConfig(optim=OptimConfig(**values)), 1).optim


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_final = nn.LayerNorm(3)
        self.proj = nn.Linear(3, 3)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def test_warmup_is_linear_and_the_cosine_ends_at_the_floor():
    schedule = Schedule(peak=1.0, floor=0.1, warmup=10, total=110, kind="cosine")
    assert [schedule.at(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    for step in range(10, 110):
        expected = 0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert schedule.at(step) == pytest.approx(expected)
    assert schedule.at(110) == pytest.approx(0.1)
    assert schedule.at(1000) == pytest.approx(0.1)


def test_constant_schedule_stays_at_the_peak():
    schedule = Schedule(peak=0.5, floor=0.0, warmup=2, total=10, kind="const")
    assert [schedule.at(s) for s in (0, 1, 2, 9)] == [0.25, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("values", "temperature", "expected"),
    [
        ({}, 0.05, 2e-4),
        ({"lr_tau": 1e-3, "lr_tau_scheduler": "const"}, 0.01, 1e-3),
        ({"lr_tau": 1e-3, "lr_tau_scheduler": "same"}, 0.01, 1e-3 * 2e-4 / 5e-4),
        ({"lr_tau": 3e-3, "lr_tau_scheduler": "step_thresh"}, 0.031, 3e-3),
        ({"lr_tau": 3e-3, "lr_tau_scheduler": "step_thresh"}, 0.0299, 1e-3),
    ],
)
def test_temperature_rate(values, temperature, expected):
    scale = torch.tensor(-math.log(temperature), dtype=torch.float64)
    rate = temperature_rate(resolved(**values), 2e-4, scale)
    assert float(rate) == pytest.approx(expected)


def test_groups_are_open_clips_with_the_temperature_apart():
    towers = Towers()
    adamw = Optimizer(towers, resolved(wd=0.3, lr_tau=1e-4, lr_tau_scheduler="const"), 10).adamw
    sizes = [[tuple(p.shape) for p in group["params"]] for group in adamw.param_groups]
    assert sizes == [[(3,), (3,), (3,)], [(3, 3)], [()]]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0, 0.3, 0.0]


def test_the_rule_for_decay():
    matrix, vector = torch.zeros(2, 2), torch.zeros(2)
    assert not is_gain_or_bias("visual.proj", matrix)
    assert is_gain_or_bias("visual.proj", vector)
    assert is_gain_or_bias("ln_pre.weight", matrix)
    assert is_gain_or_bias("attn.in_proj_bias", matrix)


def test_rates_reach_the_groups():
    settings = resolved(lr=0.1, warmup=10, lr_tau=0.3, lr_tau_scheduler="step_thresh")
    towers = Towers()
    optimizer = Optimizer(towers, settings, 100)
    for temperature, rate in ((0.04, 0.3), (0.02, 0.1)):
        towers.logit_scale.data.fill_(-math.log(temperature))
        assert optimizer.set_rates(4) == pytest.approx(0.05)
        rates = [float(group["lr"]) for group in optimizer.adamw.param_groups]
        assert rates == pytest.approx([0.05, 0.05, rate])
    towers.logit_scale.grad = torch.ones(())
    optimizer.step(torch.zeros(()))  # AdamW's first step is as long as its rate
    assert float(towers.logit_scale.detach()) == pytest.approx(-math.log(0.02) - 0.1, rel=1e-6)
    groups = optimizer.state_dict()["param_groups"]
    assert [type(group["lr"]) for group in groups] == [float] * 3


def test_a_skipped_step_changes_nothing():
    towers = Towers()
    optimizer = Optimizer(towers, resolved(lr=0.1), 100)

    def step(gradient, skip):
        for parameter in towers.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step(torch.tensor(skip))
        assert all(parameter.grad is None for parameter in towers.parameters())
        moments = [v for state in optimizer.adamw.state.values() for v in state.values()]
        return [value.clone() for value in (*towers.parameters(), *moments)]

    first, skipped, second = step(1.0, 0.0), step(math.nan, 1.0), step(1.0, 0.0)
    assert all(torch.equal(*pair) for pair in zip(first, skipped, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_frozen_temperature_is_left_out():
    towers = Towers()
    towers.logit_scale.requires_grad_(False)
    assert len(Optimizer(towers, resolved(), 10).adamw.param_groups) == 2


def test_clipping_bounds_the_step_and_returns_the_norm_before():
    towers = Towers()
    optimizer = Optimizer(towers, resolved(grad_clip_norm=1e-3), 10)
    (towers.proj(torch.ones(1, 3)).sum() * 100).backward()
    raw = torch.linalg.vector_norm(
        torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])
    )
    assert float(optimizer.gradient_norm()) == pytest.approx(float(raw))
    clipped = [p.grad for p in towers.parameters() if p.grad is not None]
    assert float(nn.utils.get_total_norm(clipped)) == pytest.approx(1e-3, rel=1e-4)
    optimizer.step(torch.zeros(()))
    assert all(p.grad is None for p in towers.parameters())


def test_a_cosine_of_the_temperatures_own_ends_at_the_least_rate():
    """As in FastCLIP's code: warm-up and cosine from lr_tau to lr_min, whatever the towers do."""
    towers = Towers()
    settings = resolved(
        lr=1e-2, lr_min=1e-4, lr_tau=1e-3, lr_tau_scheduler="cosine", warmup=2, lr_scheduler="const"
    )
    optimizer = Optimizer(towers, settings, 12)
    (group,) = [g for g in optimizer.adamw.param_groups if g.get("is_temperature")]
    rates = []
    for step in range(13):
        assert optimizer.set_rates(step) == (5e-3 if step == 0 else 1e-2)
        rates.append(group["lr"])
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates[7] == pytest.approx(5.5e-4)
    assert rates[12] == pytest.approx(1e-4)
