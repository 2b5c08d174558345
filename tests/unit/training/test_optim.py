import math

import pytest
import torch
from torch import nn

from neuclip.config.optimizer_section import OptimConfig
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.training.loss_scale import LossScale
from neuclip.training.optim import Optimizer
from tiny_models import tiny


def resolved(**values):
    return resolve(RunConfig(optim=OptimConfig(**values)), 1).optim


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_final = nn.LayerNorm(3)
        self.proj = nn.Linear(3, 3)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def test_groups_are_open_clips_with_the_temperature_apart():
    towers = Towers()
    adamw = Optimizer(towers, resolved(wd=0.3, lr_tau=1e-4, lr_tau_scheduler="const"), 10).inner
    sizes = [[tuple(p.shape) for p in group["params"]] for group in adamw.param_groups]
    assert sizes == [[(3,), (3,), (3,)], [(3, 3)], [()]]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0, 0.3, 0.0]


def test_rates_reach_the_groups():
    settings = resolved(lr=0.1, warmup=10, lr_tau=0.3, lr_tau_scheduler="step_thresh")
    towers = Towers()
    optimizer = Optimizer(towers, settings, 100)
    for temperature, rate in ((0.04, 0.3), (0.02, 0.1)):
        towers.logit_scale.data.fill_(-math.log(temperature))
        assert optimizer.set_rates(4) == pytest.approx(0.05)
        rates = [float(group["lr"]) for group in optimizer.inner.param_groups]
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
        moments = [v for state in optimizer.inner.state.values() for v in state.values()]
        return [value.clone() for value in (*towers.parameters(), *moments)]

    first, skipped, second = step(1.0, 0.0), step(math.nan, 1.0), step(1.0, 0.0)
    assert all(torch.equal(*pair) for pair in zip(first, skipped, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_a_frozen_temperature_is_left_out():
    towers = Towers()
    towers.logit_scale.requires_grad_(False)
    assert len(Optimizer(towers, resolved(), 10).inner.param_groups) == 2


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
    (group,) = [g for g in optimizer.inner.param_groups if g.get("is_temperature")]
    rates = []
    for step in range(13):
        assert optimizer.set_rates(step) == (5e-3 if step == 0 else 1e-2)
        rates.append(group["lr"])
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates[7] == pytest.approx(5.5e-4)
    assert rates[12] == pytest.approx(1e-4)


def test_gradients_of_a_scaled_loss_are_divided_and_then_clipped():
    """A power of two does not round, so the step is the same bit by bit."""
    steps = []
    for loss_scale in (None, LossScale(torch.device("cpu"))):
        torch.manual_seed(0)
        towers = Towers()
        optimizer = Optimizer(towers, resolved(grad_clip_norm=1e-2, warmup=0), 10, loss_scale)
        optimizer.set_rates(0)
        optimizer.scaled(towers.proj(torch.ones(1, 3)).square().sum()).backward()
        norm = optimizer.gradient_norm()
        optimizer.step(torch.zeros(()))
        steps.append((norm, towers.proj.weight.detach()))
    assert all(torch.equal(*pair) for pair in zip(*steps, strict=True))


def test_layer_wise_decay_scales_the_rates_but_not_the_temperatures():
    towers = tiny().towers
    optimizer = Optimizer(towers, resolved(lr=1.0, warmup=0, image_layer_decay=0.5), 10)
    optimizer.set_rates(0)
    rates = {
        p: inner["lr"]
        for group, inner in zip(optimizer.groups, optimizer.inner.param_groups, strict=True)
        for p in group.parameters
    }
    layers = len(towers.visual.transformer.resblocks)
    assert (
        rates[towers.visual.proj] == rates[towers.logit_scale] == rates[towers.ln_final.bias] == 1
    )
    assert rates[towers.visual.conv1.weight] == 0.5 ** (layers + 1)


def test_what_had_no_gradient_in_a_warm_start_begins_anew():
    """Its first step is then that of a new optimiser; other moments stay."""
    towers, plain = Towers(), Towers()
    plain.load_state_dict(towers.state_dict())
    settings = resolved(lr=0.1, warmup=0, beta2=0.999)
    optimizer, new = Optimizer(towers, settings, 100), Optimizer(plain, settings, 100)

    def step(chosen, model, zero):
        for name, parameter in model.named_parameters():
            still = zero and name.startswith("proj.")
            parameter.grad = torch.full_like(parameter, 0.0 if still else 0.5)
        chosen.step(torch.tensor(0.0))

    optimizer.hold()
    for _ in range(4):
        step(optimizer, towers, zero=True)
    optimizer.release()
    states = optimizer.inner.state
    assert not states[towers.proj.weight]
    assert int(states[towers.ln_final.weight]["step"]) == 4
    for each, model in ((optimizer, towers), (new, plain)):
        each.set_rates(0)
        step(each, model, zero=False)
    assert torch.equal(towers.proj.weight, plain.proj.weight)
