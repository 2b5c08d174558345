"""The moving-average family against literal linear-space versions of the published updates."""

import math

import pytest
import torch
from naive_reference import inners, pairs, published_fastclip, published_gamma, surrogate
from torch import Tensor
from torch.nn import functional


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def step(loss, features: Tensor, scale: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, feature gradient, scale gradient (zeros where constant)."""
    leaf, s = features.clone().requires_grad_(), scale.clone().requires_grad_()
    value = loss(leaf[0], leaf[1], s, sample_ids=ids)
    by_leaf, by_scale = torch.autograd.grad(value, (leaf, s), allow_unused=True)
    return value.detach(), by_leaf, torch.zeros(()).double() if by_scale is None else by_scale


@pytest.mark.parametrize("name", ["fastclip_v0", "fastclip_v3"])
@pytest.mark.parametrize("mode", ["exact", "fastclip"])
def test_gradients_against_the_published_two_terms(build, name, mode):
    epsilon = 1e-14
    settings = {"rho": 6.5} if name == "fastclip_v3" else {}
    rho = settings.get("rho")
    loss = build(
        name, temperature_gradient=mode, gamma_schedule="constant", steps_per_epoch=1, **settings
    )
    ids, scale = torch.arange(6), scalar(15.0)
    first, second = pairs(6, seed=1), pairs(6, seed=2)
    step(loss, first, scale, ids)
    value, by_features, by_scale = step(loss, second, scale, ids)
    u = 0.7 * inners(first, 15.0) + 0.3 * inners(second, 15.0)
    leaf, s = second.clone().requires_grad_(), scale.clone().requires_grad_()
    published = published_fastclip(leaf, s, u, epsilon=epsilon, rho=rho)
    want_features, want_scale = torch.autograd.grad(published, (leaf, s))
    torch.testing.assert_close(by_features, want_features)
    # The part of the scale's gradient through g, which the two terms count twice.
    plain = (inners(second, s) / (u + epsilon)).mean() / (1.0 if rho is None else 15.0)
    (through_g,) = torch.autograd.grad(plain, s)
    if mode == "fastclip":
        torch.testing.assert_close(by_scale, want_scale)
    elif rho is None:
        torch.testing.assert_close(by_scale, want_scale - through_g)
    else:
        # Exact: the gradient of the surrogate itself, with its value in place of mean alpha.
        alpha = (u + epsilon).log()
        (want,) = torch.autograd.grad(surrogate(second, s, alpha, epsilon).mean() / s + rho / s, s)
        torch.testing.assert_close(by_scale, want)
        difference = (surrogate(second, 15.0, alpha, epsilon) - alpha).mean() / 15.0**2
        torch.testing.assert_close(by_scale, want_scale - through_g - difference)
    # Values differ by what carries no gradient: alpha - 1, and the published constants.
    assert torch.isfinite(value)


def test_fastclip_v3_tracks_the_published_update_but_for_its_temperature_gradient(build):
    """Features frozen for 36 steps, then moving; temperature moving all the time."""
    samples, batch, per_epoch, rho, epsilon = 24, 6, 4, 4.0, 1e-14
    loss = build(
        "fastclip_v3",
        steps_per_epoch=per_epoch,
        gamma=0.2,
        gamma_decay_epochs=18.0,
        rho=rho,
        temperature_gradient="exact",
    )
    raw = [pairs(samples, noise=0.8), pairs(samples, noise=0.8)]
    log_scale = [scalar(math.log(1 / 0.07)), scalar(math.log(1 / 0.07))]
    u = torch.zeros(2, samples, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    start = raw[0].clone()
    for number in range(72):
        if number % per_epoch == 0:
            order = torch.randperm(samples, generator=generator)
        ids = order[(number % per_epoch) * batch :][:batch]
        gamma = published_gamma(number // per_epoch, 0.2, 18.0, "cosine")
        for which in range(2):
            table = raw[which].clone().requires_grad_()
            logarithm = log_scale[which].clone().requires_grad_()
            features, s = functional.normalize(table[:, ids], dim=-1), logarithm.exp()
            if which == 0:
                value = loss(features[0], features[1], s, sample_ids=ids)
            else:
                g = inners(features.detach(), s.detach())
                u[:, ids] = (1 - gamma) * u[:, ids] + gamma * g
                value = published_fastclip(features, s, u[:, ids], epsilon=epsilon, rho=rho)
            by_table, by_log = torch.autograd.grad(value, (table, logarithm))
            if which == 1:
                # Without the second count of g, and with the surrogate in place of mean log u.
                now = s.detach()
                free = now.clone().requires_grad_()
                ratio = (inners(features.detach(), free) / u[:, ids]).mean()
                (slope,) = torch.autograd.grad(ratio, free)
                by_log = by_log - slope - (ratio.detach() - 1) / now
            if number >= 36:
                raw[which] = raw[which] - 0.3 * by_table
            log_scale[which] = log_scale[which] - 0.02 * by_log
        torch.testing.assert_close(log_scale[0], log_scale[1], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(raw[0], raw[1], rtol=1e-7, atol=1e-8)
    assert (raw[0] - start).abs().max() > 0.02
    stored = loss.normalizer.table.values[:, :samples]
    torch.testing.assert_close(stored.exp(), u, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["fastclip_v3", "sogclr"])
def test_gamma_one_is_rgcl_batch(build, name):
    more = {"rho": 3.0} if name == "fastclip_v3" else {}
    average = build(name, gamma=1.0, epsilon=1e-6, **more)
    plain = build("rgcl_batch", rho=more.get("rho", 0.0), epsilon=1e-6)
    for number in range(5):
        features, ids = pairs(6, seed=number), torch.arange(6)
        got, want = (step(each, features, scalar(12.0), ids) for each in (average, plain))
        torch.testing.assert_close(got[:2], want[:2])
        if name == "fastclip_v3":
            torch.testing.assert_close(got[2], want[2])


def test_v1_and_sogclr_hold_the_temperature_constant(build):
    for name in ("fastclip_v1", "sogclr", "isogclr", "fastclip_v2"):
        loss = build(name)
        assert not loss.learns_temperature
        assert step(loss, pairs(5), scalar(10.0), torch.arange(5))[2] == 0


def test_sogclr_is_libauc_divided_by_its_number_of_negatives(build):
    """LibAUC: mean_i sum_j sg(n_ij / u_i) logits_ij, averaged over the sides."""
    tau, gamma = 0.05, 0.9
    loss = build("sogclr", temperature=tau, gamma=gamma, epsilon=0.0)
    u = None
    for number in range(3):
        features, ids = pairs(6, seed=number, noise=0.5), torch.arange(6)
        _, by_features, _ = step(loss, features, scalar(1 / tau), ids)
        leaf = features.clone().requires_grad_()
        g = inners(features, 1 / tau)
        u = g if u is None else (1 - gamma) * u + gamma * g
        total = torch.zeros(()).double()
        for side in range(2):
            anchors, candidates = leaf[side], leaf[1 - side]
            for i in range(6):
                for j in range(6):
                    if i != j:
                        logit = anchors[i] @ candidates[j] - anchors[i] @ candidates[i]
                        weight = torch.exp(logit / tau).detach() / u[side, i]
                        total = total + weight * logit
        (want,) = torch.autograd.grad(total / 6 / 2, leaf)
        torch.testing.assert_close(by_features * 5, want)


def test_scent_equals_the_formula(build):
    c, epsilon, rho = 2.0, 1e-6, 5.0
    loss = build("scent", rate_offset=c, epsilon=epsilon, rho=rho)
    ids, kept = torch.arange(6), None
    for number in range(4):
        features = pairs(6, seed=number)
        value, by_features, _ = step(loss, features, scalar(9.0), ids)
        fresh = (epsilon + inners(features, 9.0)).log()
        if kept is None:
            kept = fresh
        else:
            rate = 1 / (1 + torch.exp(-kept - c))
            kept = ((1 - rate) * kept.exp() + rate * fresh.exp()).log()
        leaf = features.clone().requires_grad_()
        expected = surrogate(leaf, 9.0, kept, epsilon).mean() / 9.0 + rho / 9.0
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(by_features, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("mode", ["exact", "fastclip"])
def test_fastclip_v2_equals_the_formula(build, mode):
    """Objective without tau at the old temperatures; then Adam on each temperature visited."""
    lr, rho, epsilon, gamma, samples = 0.0133, 1.2, 1e-14, 0.3, 8
    loss = build(
        "fastclip_v2",
        temperature_gradient=mode,
        gamma_schedule="constant",
        gamma=gamma,
        steps_per_epoch=4,
        rho=rho,
        temperature=0.06,
    )
    tau = torch.full((2, samples), 0.06, dtype=torch.float32).double()
    u, m, v = (torch.zeros(2, samples).double() for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for number in range(16):
        epoch = number // 4
        ids = torch.randperm(samples, generator=generator)[:5]
        features = pairs(5, seed=number, noise=0.6)
        value, by_features, _ = step(loss, features, scalar(10.0), ids)
        t = tau[:, ids]
        g = inners(features, 1 / t)
        rate = torch.where((u[:, ids] == 0) | (epoch == 0), 1.0, gamma)
        u[:, ids] = (1 - rate) * u[:, ids] + rate * g
        alpha = (u[:, ids] + epsilon).log()
        leaf = features.clone().requires_grad_()
        expected = surrogate(leaf, 1 / t, alpha, epsilon).mean()
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(by_features, torch.autograd.grad(expected, leaf)[0])
        grad = torch.zeros(2, 5).double()
        for side in range(2):
            anchors, candidates = features[side], features[1 - side]
            for i in range(5):
                for j in range(5):
                    if i != j:
                        h = (anchors[i] @ candidates[j] - anchors[i] @ candidates[i]) / t[side, i]
                        grad[side, i] -= torch.exp(h - alpha[side, i]) * h / 4
        grad = (grad + alpha + rho).clamp(-5, 5)
        if mode == "fastclip":
            b1, b2 = (0.9, 0.999) if epoch > 0 else (0.0, 0.0)
            m[:, ids] = b1 * m[:, ids] + (1 - b1) * grad
            v[:, ids] = b2 * v[:, ids] + (1 - b2) * grad**2
            root = (v[:, ids] / (1 - b2 ** (epoch + 1))).sqrt()
            move = (m[:, ids] / (1 - b1 ** (epoch + 1))) / (root + 1e-8)
        else:
            new = v[:, ids] == 0
            m[:, ids] = torch.where(new, grad, 0.9 * m[:, ids] + 0.1 * grad)
            v[:, ids] = torch.where(new, grad**2, 0.999 * v[:, ids] + 0.001 * grad**2)
            move = m[:, ids] / (v[:, ids].sqrt() + 1e-8)
        tau[:, ids] = (t - lr * move).clamp(0.01, 1.0)
    torch.testing.assert_close(loss.temperature.table.values[:2, :samples], tau)
    assert tau.max() - tau.min() > 0.01


def test_isogclr_equals_the_formula(build):
    rho, gamma, beta, eta, epsilon = 2.0, 0.8, 0.9, 0.01, 1e-14
    loss = build("isogclr", rho=rho, gamma=gamma, temperature=0.04, temperature_beta=beta)
    tau = torch.full((2, 6), 0.04, dtype=torch.float32).double()
    u, m = torch.zeros(2, 6).double(), torch.zeros(2, 6).double()
    for number in range(8):
        features = pairs(6, seed=number, noise=0.4)
        value, by_features, _ = step(loss, features, scalar(10.0), torch.arange(6))
        leaf, free = features.clone().requires_grad_(), tau.clone().requires_grad_()
        g = inners(features, 1 / tau)
        u = g if number == 0 else (1 - gamma) * u + gamma * g
        alpha = (u + epsilon).log()
        expected = (tau * surrogate(leaf, 1 / tau, alpha, epsilon)).mean()
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(by_features, torch.autograd.grad(expected, leaf)[0])
        through_g = torch.exp(-alpha) * inners(features, 1 / free)
        (slope,) = torch.autograd.grad(through_g.sum(), free)
        grad = alpha + rho + tau * slope
        m = (1 - beta) * m + beta * grad
        tau = (tau - eta * m).clamp(0.005, 0.05)
    torch.testing.assert_close(loss.temperature.table.values[:2, :6], tau)


def test_an_id_twice_in_a_batch_reads_the_old_value_and_keeps_the_last(build):
    loss = build("sogclr", gamma=0.25)
    first, second = pairs(4, seed=0), pairs(4, seed=1)
    step(loss, first, scalar(8.0), torch.tensor([3, 1, 2, 0]))
    step(loss, second, scalar(8.0), torch.tensor([3, 3, 2, 3]))
    old, fresh = inners(first, 8.0), inners(second, 8.0)
    table = loss.normalizer.table.values
    torch.testing.assert_close(table[:, 3].exp(), 0.75 * old[:, 0] + 0.25 * fresh[:, 3])
    torch.testing.assert_close(table[:, 2].exp(), 0.75 * old[:, 2] + 0.25 * fresh[:, 2])
    torch.testing.assert_close(table[:, 1].exp(), old[:, 1])


def test_prediction_remembers_samples_and_falls_back_on_the_batch(build):
    loss = build("fastclip_v3", epsilon=1e-6)
    seen, batch = pairs(4, seed=0), pairs(4, seed=1)
    step(loss, seen, scalar(8.0), torch.arange(4))
    ids = torch.tensor([2, 9, 3, 8])
    got = loss.predict_log_normalizers(batch[0], batch[1], scalar(8.0), ids)
    fresh, kept = (inners(each, 8.0).add(1e-6).log() for each in (batch, seen))
    want = torch.stack([kept[0, 2], fresh[0, 1], kept[0, 3], fresh[0, 3]])
    torch.testing.assert_close(got[0], want)
    without = loss.predict_log_normalizers(batch[0], batch[1], scalar(8.0))
    torch.testing.assert_close(without, fresh)
