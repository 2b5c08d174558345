"""Rho auto: the divergence of the negatives at the starting temperature, and what it is for."""

import math
from dataclasses import replace

import pytest
import torch
from naive_reference import inners, pairs

from neuclip import create_loss
from neuclip.errors import UserError

SCALE = 20.0
ROBUST = ("rgcl_batch", "fastclip_v3", "scent", "neuclip", "neuclip_pool")
BOUND = math.log(100)


def divergence(features, scale):
    """mean_i KL(softmax over the negatives || uniform), by double loops."""
    total, count = 0.0, features.shape[1]
    for anchors, candidates in (features, features.flip(0)):
        for i in range(count):
            logits = [float(anchors[i] @ candidates[j]) * scale for j in range(count) if j != i]
            weights = [math.exp(logit - max(logits)) for logit in logits]
            shares = [weight / sum(weights) for weight in weights]
            total += sum(p * math.log(p * len(shares)) for p in shares)
    return total / 2 / count


def loss_of(method, rho="auto", **settings):
    settings = {"epsilon": 0.0, **settings}
    if method == "neuclip":
        settings |= {"num_prototypes": 6}
    if method == "neuclip_pool":
        settings |= {"pool_size": 48}
    if method in {"fastclip_v3", "neuclip", "neuclip_pool"}:
        settings |= {"gamma": 0.4, "gamma_schedule": "final"}
    return create_loss(method, embed_dim=8, num_samples=400, rho=rho, **settings).double()


def settle(loss, features, ids, scale=SCALE):
    """Batches of a warm start; returns the gradient by 1 / tau of each."""
    gradients = []
    loss.settling = True
    for sides, numbers in zip(features, ids, strict=True):
        leaf = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        loss(*sides, leaf, sample_ids=numbers).backward()
        gradients.append(float(leaf.grad))
    loss.settling = False
    return gradients


def batches(count, size=12):
    ids = [torch.arange(n * size, (n + 1) * size) for n in range(count)]
    return [pairs(size, seed=n, noise=0.5) for n in range(count)], ids


def test_it_is_the_divergence_of_the_negatives():
    features, ids = batches(5)
    loss = loss_of("rgcl_batch", temperature_gradient="exact")
    gradients = settle(loss, features, ids)
    found = [divergence(sides, SCALE) for sides in features]
    weights = [1, 2, 3, 4, 5]
    expected = sum(w * kl for w, kl in zip(weights, found, strict=True)) / sum(weights)
    assert float(loss.measured_rho.value) == pytest.approx(expected, rel=1e-9)
    # The optimiser's moments see the distance to the mean, not that to 0.
    mean, total = 0.0, 0.0
    for weight, kl, gradient in zip(weights, found, gradients, strict=True):
        total += weight
        mean += weight / total * (kl - mean)
        assert gradient == pytest.approx((kl - mean) / SCALE**2, abs=1e-12)


def test_the_scale_of_a_float16_loss_does_not_count():
    features, ids = batches(2)
    plain, scaled = loss_of("rgcl_batch"), loss_of("rgcl_batch")
    expected = settle(plain, features, ids)
    scaled.settling = True
    for sides, numbers, gradient in zip(features, ids, expected, strict=True):
        leaf = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        (1024 * scaled(*sides, leaf, sample_ids=numbers)).backward()
        assert float(leaf.grad) == pytest.approx(1024 * gradient)
    torch.testing.assert_close(scaled.measured_rho.value, plain.measured_rho.value)


def test_it_balances_the_published_gradient_too():
    """Which counts the divergence's first part twice: 2 E_p[l] - log g."""
    features, ids = batches(1)
    loss = loss_of("rgcl_batch", temperature_gradient="fastclip")
    settle(loss, features, ids)
    log_g = float(inners(features[0], SCALE).log().mean())
    expected = 2 * (divergence(features[0], SCALE) + log_g) - log_g
    assert float(loss.measured_rho.value) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ROBUST)
def test_the_mean_gradient_at_it_is_zero(method):
    """Under every normalizer: at the measured rho, not at a number half a unit away."""
    features, ids = batches(12)
    loss = loss_of(method)
    settle(loss, features, ids)
    measured = float(loss.measured_rho.value)
    slopes = {}
    for rho in (measured, measured + 0.5, "auto"):
        other = loss_of(method, "auto" if rho == "auto" else 0.0)
        if rho == "auto":
            other.measured_rho.load_state_dict(loss.measured_rho.state_dict())
        else:  # of few and bad prototypes it may be negative
            other.objective = replace(other.objective, rho=rho)
        total = 0.0
        for number, (sides, numbers) in enumerate(zip(features, ids, strict=True), start=1):
            leaf = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
            other(*sides, leaf, sample_ids=numbers).backward()
            total += number * float(leaf.grad)
        slopes[rho] = -total / sum(range(1, 13)) * SCALE**2  # dL/dtau
    assert slopes[measured] == pytest.approx(0, abs=1e-9)
    assert slopes["auto"] == pytest.approx(0, abs=1e-9)
    assert slopes[measured + 0.5] == pytest.approx(0.5, abs=1e-9)


def temperatures(rho, steps=160, start=0.05, rate=0.02):
    """Fixed embeddings of weights trained at a temperature; only the temperature learns."""
    features = pairs(48, dim=8, seed=1, noise=0.3)
    loss = loss_of("rgcl_batch", "auto" if rho == "auto" else rho)
    if rho == "auto":
        settle(loss, [features] * 3, [torch.arange(48)] * 3, 1 / start)
    log_scale = torch.tensor(-math.log(start), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log_scale], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        loss(*features, log_scale.exp(), sample_ids=torch.arange(48)).backward()
        adam.step()
        log_scale.data.clamp_(0, BOUND)
    return float((-log_scale).exp().detach())


def test_the_temperature_stays_with_it_and_runs_to_its_bound_with_another():
    """The divergence from 47 negatives is at most log 47 = 3.9: no temperature reaches 6.5."""
    assert temperatures("auto") == pytest.approx(0.05, rel=1e-3)
    assert temperatures(6.5) == pytest.approx(0.01, rel=1e-6)
    assert temperatures(0.5) > 0.15


def test_it_is_refused_where_nothing_was_measured():
    loss = loss_of("rgcl_batch")
    with pytest.raises(UserError, match="measured in a warm start"):
        loss(*pairs(4), 10.0)


def test_it_is_part_of_the_state():
    loss, other = loss_of("rgcl_batch"), loss_of("rgcl_batch")
    settle(loss, *batches(2))
    other.load_state_dict(loss.state_dict())
    assert other.measured_rho.steps == 2
    assert torch.equal(other.measured_rho.value, loss.measured_rho.value)


def test_steps_without_a_finite_gradient_do_not_count():
    loss = loss_of("rgcl_batch")
    settle(loss, *batches(2))
    before = float(loss.measured_rho.value)
    scale = torch.tensor(SCALE, dtype=torch.float64)
    loss.measured_rho._take(torch.tensor(math.inf, dtype=torch.float64), scale, 0.5)
    assert float(loss.measured_rho.value) == before
