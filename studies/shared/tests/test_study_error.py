"""The error of the log-normalizers."""

import math

import pytest
import torch
from studies.shared.error import error_of, exact_of, softmax_of, training_error
from torch.nn.functional import normalize

from neuclip.catalogue.create import create_loss
from neuclip.cli.app import main


def test_exact_normalizers_equal_a_double_loop():
    features = normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=-1)
    found = exact_of(features, torch.tensor([4, 1]), 7.0, 1e-3)
    for side in (0, 1):
        for column, i in enumerate((4, 1)):
            similarity = features[side, i] @ features[1 - side].T
            own = math.exp(0) * similarity[i]
            others = [math.exp(7 * float(similarity[j] - own)) for j in range(6) if j != i]
            expected = math.log(1e-3 + sum(others) / 5)
            assert float(found[side, column]) == pytest.approx(expected)


def test_the_divergence_of_the_softmax_equals_a_double_loop():
    features = normalize(torch.randn(2, 6, 4, dtype=torch.float64), dim=-1)
    _, found = softmax_of(features, torch.tensor([4, 1]), 7.0)
    for side in (0, 1):
        for column, i in enumerate((4, 1)):
            similarity = features[side, i] @ features[1 - side].T
            weights = [math.exp(7 * float(similarity[j])) for j in range(6) if j != i]
            shares = [weight / sum(weights) for weight in weights]
            expected = sum(share * math.log(share * 5) for share in shares)
            assert float(found[side, column]) == pytest.approx(expected)
    assert float(softmax_of(features, torch.tensor([0]), 0.0)[1].abs().max()) < 1e-12


def test_the_divergence_is_rho_less_the_gradient_by_the_temperature():
    """Of tau (log g + rho), with exact normalizers: where it vanishes, rho fixes the divergence."""
    features = normalize(torch.randn(2, 40, 4, dtype=torch.float64), dim=-1)
    anchors, step = torch.arange(40), 1e-5

    def objective(tau: float) -> torch.Tensor:
        return tau * (softmax_of(features, anchors, 1 / tau)[0] + 3.0)

    slope = (objective(0.1 + step) - objective(0.1 - step)) / (2 * step)
    divergence = softmax_of(features, anchors, 10.0)[1]
    assert torch.allclose(3.0 - slope, divergence, atol=1e-6)


def test_the_batch_normalizer_has_the_error_of_the_batch():
    features = normalize(torch.randn(2, 40, 4), dim=-1)
    loss = create_loss("rgcl_batch", embed_dim=4)
    error = error_of(features, torch.arange(40), loss, 9.0, batch=8, anchors=24)
    assert error["anchors"] == 24
    for key in ("mse", "mae", "bias"):
        assert error[key] == pytest.approx(error[f"minibatch_{key}"], abs=1e-3)
    assert error["mse"] > 0


@pytest.mark.parametrize("method", ["isogclr", "fastclip_v2"])
def test_the_error_is_measured_at_individual_temperatures(method):
    """With an own temperature per anchor, and normalizers that are exact at it: no error."""
    features = normalize(torch.randn(2, 40, 4), dim=-1)
    ids = torch.arange(40) + 3
    settings = {"gamma": 0.5, "gamma_schedule": "constant"} if method == "fastclip_v2" else {}
    loss = create_loss(method, embed_dim=4, num_samples=43, steps_per_epoch=5, **settings)
    temperatures = torch.rand(2, 40) / 10 + 0.02
    loss.temperature.table.values[:2, ids] = temperatures
    exact = exact_of(features, torch.arange(40), 1 / temperatures, 0.0)
    one = exact_of(features, torch.tensor([7]), float(1 / temperatures[1, 7]), 0.0)
    assert float(exact[1, 7]) == pytest.approx(float(one[1]), abs=1e-5)  # products are float32
    loss.normalizer.table.values[:, ids] = exact.float()
    error = error_of(features, ids, loss, 9.0, batch=8, anchors=24)
    assert abs(error["mse"]) < 1e-3
    assert error["minibatch_mse"] > 0.05


def test_the_error_over_all_training_pairs_of_a_run(demo_dir, tmp_path):
    flags = ["--train-data", str(demo_dir / "train"), "--method", "fastclip_v3", "--smoke"]
    flags += ["--logs", str(tmp_path), "--name", "run", "--device", "cpu"]
    assert main(["train", *flags]) == 0
    error = training_error(tmp_path / "run", 2)
    assert error["anchors"] == 384  # of 385 pairs, in batches of 16
    assert 0 < error["mse"] < 10
    assert 0 < error["minibatch_mse"] < 10
    assert error["temperature"] == pytest.approx(0.07, abs=0.01)
