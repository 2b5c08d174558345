"""Logistic regression against Newton's method in float64, and the search for the strength."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from neuclip.errors import UserError
from neuclip.evaluation import linear_probe
from neuclip.evaluation.class_draws import Halves, hold_out_by_class
from neuclip.evaluation.linear_probe import LAST_STEP, fit, strength_at, sweep


def problem(samples=45, dim=4, seed=0):
    """Overlapping classes 0, 2 and 3 of four; features of unit norm, far from centred."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor([0, 2, 3])[torch.arange(samples) % 3]
    centers = torch.randn(4, dim, generator=generator)
    noise = torch.randn(samples, dim, generator=generator)
    return normalize(centers[classes] * 0.6 + noise + 3, dim=-1), classes


def newton(features, classes, present, strength):
    """Weights and biases at the minimum, by loops over samples and classes."""
    x = np.hstack([features.double().numpy(), np.ones((len(features), 1))])
    y = [present.index(number) for number in classes.tolist()]
    dim, number = x.shape[1], len(present)
    theta = np.zeros(number * dim)
    penalised = np.tile([1.0] * (dim - 1) + [1e-9], number)  # biases, but for their common shift
    for _ in range(60):
        gradient, hessian = strength * penalised * theta, np.diag(strength * penalised)
        for row, own in zip(x, y, strict=True):
            scores = [math.exp(sum(theta[c * dim : (c + 1) * dim] * row)) for c in range(number)]
            p = [score / sum(scores) for score in scores]
            for a in range(number):
                gradient[a * dim : (a + 1) * dim] += (p[a] - (a == own)) * row
                for b in range(number):
                    block = p[a] * ((a == b) - p[b]) * np.outer(row, row)
                    hessian[a * dim : (a + 1) * dim, b * dim : (b + 1) * dim] += block
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        theta = theta - step * min(1.0, 5 / max(1e-12, float(np.abs(step).max())))
        if np.abs(step).max() < 1e-9:
            break
    table = theta.reshape(number, dim)
    return table[:, :-1], table[:, -1] - table[:, -1].mean()


@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("at_once", [20, 2**22])
def test_agrees_with_newton(monkeypatch, strength, at_once):
    monkeypatch.setattr(linear_probe, "_NUMBERS_AT_ONCE", at_once)
    features, classes = problem()
    found = fit(features, classes, 4, strength)
    weights, bias = newton(features, classes, [0, 2, 3], strength)
    assert found.converged and found.present.tolist() == [0, 2, 3]
    scale = np.abs(weights).max()
    np.testing.assert_allclose(found.weights.numpy(), weights, atol=5e-3 * scale)
    shift = found.bias.numpy() - found.bias.numpy().mean()
    np.testing.assert_allclose(shift, bias, atol=1e-2 * max(scale, np.abs(bias).max()))
    scores = found(features)
    assert scores[:, 1].isinf().all() and (scores[:, 1] < 0).all()
    expected = features.double().numpy() @ weights.T + bias
    got = scores[:, [0, 2, 3]].double().softmax(dim=1).numpy()
    exact = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, exact, atol=2e-3)


def test_a_start_and_a_repetition_change_nothing():
    features, classes = problem()
    once = fit(features, classes, 4, 0.1)
    assert torch.equal(once.weights, fit(features, classes, 4, 0.1).weights)
    again = fit(features, classes, 4, 0.1, start=fit(features, classes, 4, 100.0))
    torch.testing.assert_close(again.weights, once.weights, rtol=0.02, atol=0.05)
    assert fit(features, classes, 4, 0.1, start=once).iterations < once.iterations


def test_too_few_iterations_are_told(monkeypatch):
    monkeypatch.setattr(linear_probe, "MAX_ITERATIONS", 3)
    found = fit(*problem(), 4, 1e-4)
    assert (found.converged, found.iterations) == (False, 3)


def test_what_cannot_be_fitted():
    features, classes = problem()
    with pytest.raises(UserError, match="at least two classes"):
        fit(features, torch.zeros_like(classes), 4, 1.0)
    features[7, 1] = torch.nan
    with pytest.raises(UserError, match="needs finite features"):
        fit(features, classes, 4, 1.0)


def test_the_grid_is_that_of_the_paper():
    assert (strength_at(0), strength_at(LAST_STEP)) == (1e-6, 1e6)
    assert strength_at(8) == pytest.approx(1e-5) and LAST_STEP == 96


@pytest.mark.parametrize(
    ("peak", "visited"),
    [
        (37, {0, 16, 24, 32, 34, 35, 36, 37, 38, 40, 44, 48, 64, 80, 96}),
        (0, {0, 1, 2, 4, 8, 16, 32, 48, 64, 80, 96}),
        (96, {0, 16, 32, 48, 64, 80, 88, 92, 94, 95, 96}),
    ],
)
def test_the_search_halves_the_interval_around_the_best(monkeypatch, peak, visited):
    def quality(classifier, features, classes):
        step = 8 * (math.log10(classifier.strength) + 6)
        return 1 - abs(step - peak) / 100, 0.0

    monkeypatch.setattr(linear_probe, "_accuracy_and_loss", quality)
    features, classes = problem(12)
    told = []
    found = sweep(
        features, classes, 4, hold_out_by_class(classes, 0.25, 0), lambda *n: told.append(n)
    )
    assert set(found.tried) == visited
    assert found.best.strength == pytest.approx(strength_at(peak))
    assert found.at_an_end == (peak in {0, 96})
    assert told[-1][0] == len(visited) <= told[-1][1] == linear_probe.MOST_FITS


def test_the_best_on_held_out_samples_is_chosen():
    """Of equal accuracies, the lowest cross-entropy; the accuracy is that of a loop."""
    features, classes = problem(60, seed=3)
    halves: Halves = hold_out_by_class(classes, 0.3, 1)
    found = sweep(features, classes, 4, halves)
    for step in (0, 48, 96):
        alone = fit(features[halves.fitted], classes[halves.fitted], 4, strength_at(step))
        right = [
            int(alone(features[row][None])[0].argmax()) == int(classes[row])
            for row in halves.held_out.tolist()
        ]
        assert found.tried[step] == pytest.approx(sum(right) / len(right), abs=0.06)
    assert found.accuracy == max(found.tried.values())
    at = next(step for step in found.tried if strength_at(step) == found.best.strength)
    assert found.tried[at] == found.accuracy
