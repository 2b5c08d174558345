"""A warm start: everything settles on the starting weights but the weights themselves."""

import math
from dataclasses import replace

import pytest
import torch

from neuclip import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.method.losses import pair_loss
from neuclip.training.accumulation import running_statistics_frozen
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from step_parts import CPU, DIM, Bench, batch, split

INDIVIDUAL = {"fastclip_v2", "isogclr"}
WITHOUT_STATE = {"openclip", "siglip", "rgcl_batch"}


def bench_of(method, **towers):
    bench = Bench.of(method, **towers)
    return replace(bench, optimizer=Optimizer(bench.towers, bench.optimizer._settings, 10))


def copy_of(module):
    return {k: v.clone() for k, v in module.state_dict().items() if torch.is_tensor(v)}


def step_of(bench):
    return TrainingStep(bench.clip, bench.towers, bench.loss, bench.optimizer, CPU)


@pytest.mark.parametrize("size", [12, 4])
@pytest.mark.parametrize("method", METHODS)
def test_the_towers_stay_bit_by_bit_and_the_rest_learns(method, size):
    bench = bench_of(method)
    step = step_of(bench)
    towers, loss = copy_of(bench.towers), copy_of(bench.loss)
    with step.settling():
        for number in range(3):
            assert step(split(batch(number), size)).readback.read().problem is None
    for name, value in bench.towers.state_dict().items():  # statistics of BatchNorm among them
        assert torch.equal(value, towers[name]), name
    moved = {k for k, v in bench.loss.state_dict().items() if torch.is_tensor(v)} - {
        name for name, value in copy_of(bench.loss).items() if torch.equal(value, loss[name])
    }
    assert bool(moved) == (method not in WITHOUT_STATE)
    if method in INDIVIDUAL:
        assert moved == {"normalizer.table.values"}
    bench.optimizer.set_rates(3)
    step(split(batch(3), size))
    assert not torch.equal(bench.towers.head.weight, towers["head.weight"])


def test_the_moments_are_those_of_adam_on_the_starting_weights():
    bench = bench_of("openclip", noisy=False)
    step, settings = step_of(bench), bench.optimizer._settings
    first = second = torch.zeros(())
    with step.settling():
        for number in range(4):
            loss = bench.loss(**bench.towers(batch(number).images, batch(number).tokens))
            (gradient,) = torch.autograd.grad(loss, bench.towers.head.weight)
            first = settings.beta1 * first + (1 - settings.beta1) * gradient
            second = settings.beta2 * second + (1 - settings.beta2) * gradient**2
            step([batch(number)])
    state = bench.optimizer.inner.state[bench.towers.head.weight]
    assert int(state["step"]) == 4
    torch.testing.assert_close(state["exp_avg"], first)
    torch.testing.assert_close(state["exp_avg_sq"], second)


def test_a_temperature_beyond_its_bound_stays_too():
    bench = bench_of("openclip", noisy=False)
    bench.towers.logit_scale.data.fill_(math.log(150))
    step = step_of(bench)
    with step.settling():
        step([batch(0)])
    assert float(bench.towers.logit_scale.detach().exp()) == pytest.approx(150)
    bench.optimizer.set_rates(0)
    step([batch(1)])
    assert float(bench.towers.logit_scale.detach().exp()) == pytest.approx(100)


def test_nested_freezing_of_statistics_ends_with_the_outer_one():
    norm = torch.nn.BatchNorm1d(2)
    with running_statistics_frozen(norm):
        with running_statistics_frozen(norm):
            norm(torch.randn(4, 2))
        norm(torch.randn(4, 2))
        assert int(norm.num_batches_tracked) == 0
    norm(torch.randn(4, 2))
    assert int(norm.num_batches_tracked) == 1


def test_a_measured_rho_needs_no_reading_and_makes_the_temperature_rest(monkeypatch):
    """The gradient that the optimiser gets is that at the mean: 0 at the first batch."""
    monkeypatch.setattr(pair_loss, "check_values", lambda *_: None)
    bench = Bench.of("rgcl_batch", noisy=False)
    loss = create_loss("rgcl_batch", embed_dim=DIM, rho="auto").double()
    step = TrainingStep(bench.clip, bench.towers, loss, bench.optimizer, CPU)
    with step.settling():
        step([batch(0)])
    assert float(bench.optimizer.kept[0]["logit_scale"]) == pytest.approx(0, abs=1e-9)
    assert loss.measured_rho.steps == 1
