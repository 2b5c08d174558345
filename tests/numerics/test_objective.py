import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_reference import published_gamma

from neuclip.catalogue.method_settings import gamma_floor
from neuclip.method.objective import (
    LOG_RATIO_LIMIT,
    bounded_exp,
    conjugate,
    count_gradient,
    log_plus,
    mix,
)
from neuclip.method.schedule import Gamma, StepGamma


@given(log_value=st.floats(-25, 25), offset=st.floats(-25, 25))
def test_the_conjugate_is_an_upper_bound_of_the_log(log_value, offset):
    value = torch.tensor(log_value, dtype=torch.float64)
    bound = conjugate(value, value + offset)
    assert float(bound) >= log_value - 1e-9
    assert float(conjugate(value, value)) == pytest.approx(log_value, abs=1e-12)


def test_the_conjugate_has_the_gradient_of_the_log_at_its_optimum():
    g = torch.tensor([1e-6, 0.3, 1.0, 50.0], dtype=torch.float64, requires_grad=True)
    epsilon = 1e-3
    alpha = (g.detach() + epsilon).log().requires_grad_()
    by_g, by_alpha = torch.autograd.grad(
        conjugate(log_plus(g.log(), epsilon), alpha).sum(), (g, alpha)
    )
    torch.testing.assert_close(by_g, 1 / (epsilon + g.detach()))
    torch.testing.assert_close(by_alpha, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_minimising_over_alpha_by_gradient_finds_the_log():
    value = torch.tensor([0.02, 1.0, 9.0], dtype=torch.float64)
    alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(3000):
        (grad,) = torch.autograd.grad(conjugate(value.log(), alpha).sum(), alpha)
        with torch.no_grad():
            alpha -= 0.1 * grad
    torch.testing.assert_close(alpha.detach(), value.log(), atol=1e-6, rtol=0)


def test_bounded_exp_is_the_exponential_then_its_tangent():
    below = torch.linspace(-50, LOG_RATIO_LIMIT, 20, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(bounded_exp(below).sum(), below)
    torch.testing.assert_close(bounded_exp(below).detach(), below.detach().exp())
    torch.testing.assert_close(slope, below.detach().exp())
    above = torch.tensor([31.0, 300.0], dtype=torch.float32, requires_grad=True)
    (slope,) = torch.autograd.grad(bounded_exp(above).sum(), above)
    assert torch.isfinite(bounded_exp(above)).all()
    torch.testing.assert_close(slope, torch.full((2,), math.exp(LOG_RATIO_LIMIT)))


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.999, 1.0])
def test_mix_is_linear_mixing_in_log_space(gamma):
    old, new = torch.tensor([0.1, 3.0]).double(), torch.tensor([2.0, 0.5]).double()
    expected = ((1 - gamma) * old + gamma * new).log()
    torch.testing.assert_close(mix(old.log(), new.log(), gamma), expected)


def test_log_plus_without_epsilon_is_the_identity():
    value = torch.tensor([-400.0, 2.0], dtype=torch.float64)
    assert log_plus(value, 0.0) is value
    torch.testing.assert_close(
        log_plus(value, 1e-6), torch.tensor([math.log(1e-6), math.log(math.exp(2) + 1e-6)]).double()
    )


def test_count_gradient_changes_only_the_gradient():
    value = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    counted = count_gradient(value, 2.0)
    (grad,) = torch.autograd.grad(counted**2, value)
    assert float(counted.detach()) == 3.0
    assert float(grad) == 12.0


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("final", "decay"), [(0.2, 18.0), (0.8, 10.0), (0.42, 24.0)])
def test_gamma_follows_the_published_formula_once_an_epoch(schedule, final, decay):
    gamma = Gamma(final, schedule, decay, steps_per_epoch=3)
    for step in range(90):
        expected = published_gamma(step // 3, final, decay, schedule)
        assert gamma.at(step) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("fill", "end", "start"),
    [(128, 730, 128), (128, 400, 100), (128, 20, 5), (3, 20, 3), (9, 1, 1)],
)
def test_gamma_by_steps_waits_for_the_pool_and_ends_within_the_run(fill, end, start):
    cosine, constant = StepGamma(0.4, "cosine", end), StepGamma(0.4, "constant", end)
    values = [cosine.at(step, fill) for step in range(end + 3)]
    assert values[:start] == [1.0] * start
    assert all(before >= after for before, after in itertools.pairwise(values))
    assert values[end:] == [0.4] * 3
    if end > start:
        assert values[start] == 1.0  # where the cosine begins
        assert values[start + 1] < 1
        share = (start + end) // 2 - start
        expected = 0.4 + 0.3 * (1 + math.cos(math.pi * share / (end - start)))
        assert values[start + share] == pytest.approx(expected)
    steps = range(end + 3)
    assert [constant.at(step, fill) for step in steps] == [1.0 if s < start else 0.4 for s in steps]


def test_gamma_may_be_final_from_the_first_step():
    by_epoch, by_step = Gamma(0.4, "final", 9.0, steps_per_epoch=3), StepGamma(0.4, "final", 50)
    assert {by_epoch.at(step) for step in range(40)} == {0.4}
    assert {by_step.at(step, 20) for step in range(40)} == {0.4}


def test_gamma_rule():
    assert gamma_floor(24) == pytest.approx(0.42, abs=0.005)
    assert gamma_floor(1) == 1.0
