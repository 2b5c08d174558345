import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from neuclip.evaluation import normalizer_error as module
from neuclip.evaluation.interfaces import LogNormalizerPredictor
from neuclip.evaluation.normalizer_error import exact_log_normalizers, normalizer_error


def features(count: int, dim: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(count, dim, generator=generator), dim=-1) for _ in range(2)]


def naive(images, texts, scale, epsilon):
    n = len(images)
    s = [[float(images[i].double() @ texts[j].double()) for j in range(n)] for i in range(n)]
    sides = [[], []]
    for i in range(n):
        image = [math.exp((s[i][j] - s[i][i]) * scale) for j in range(n) if j != i]
        text = [math.exp((s[j][i] - s[i][i]) * scale) for j in range(n) if j != i]
        for side, terms in zip(sides, (image, text), strict=True):
            side.append(math.log(epsilon + math.fsum(terms) / (n - 1)))
    return torch.tensor(sides, dtype=torch.double)


@pytest.mark.parametrize("at_once", [1, 100, 2**21])
@pytest.mark.parametrize("epsilon", [0.0, 1e-14, 0.1])
def test_exact_agrees_with_a_double_loop(monkeypatch, at_once, epsilon):
    monkeypatch.setattr(module, "SIMILARITIES_AT_ONCE", at_once)
    images, texts = features(37)
    exact = exact_log_normalizers(images, texts, 14.0, epsilon)
    torch.testing.assert_close(exact, naive(images, texts, 14.0, epsilon), atol=1e-10, rtol=1e-10)


def test_a_device_without_float64_leaves_it_to_the_cpu(monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        features = torch.empty(2, 3, device="cuda")
        assert module._in_float64(features).device.type == "cuda"
        monkeypatch.setattr(module, "_WITHOUT_FLOAT64", {"cuda"})
        made = module._in_float64(features)
        assert (made.dtype, made.device.type) == (torch.float64, "cpu")


def test_exact_survives_a_large_scale():
    images, texts = features(20)
    exact = exact_log_normalizers(images, texts, 1e4, 1e-14)
    assert exact.isfinite().all()
    margins = (images @ texts.T - (images * texts).sum(1, keepdim=True)).fill_diagonal_(-9)
    expected = torch.logaddexp(
        torch.tensor(1e-14).log().double(), margins.double().amax(1) * 1e4 - math.log(19)
    )
    torch.testing.assert_close(exact[0], expected, atol=0.5, rtol=1e-3)


class FromBatch:
    """Predicts what the batch says: a method without memory."""

    epsilon = 1e-6
    predicts_log_normalizers = True

    def full_state(self):
        return nullcontext()

    def predict_log_normalizers(self, image_features, text_features, logit_scale):
        scale = float(logit_scale)
        return exact_log_normalizers(image_features, text_features, scale, self.epsilon).float()


class Offset(FromBatch):
    """Knows the exact values up to a constant."""

    def __init__(self, images, texts, offset):
        self.images = images
        self.exact = exact_log_normalizers(images, texts, 10.0, self.epsilon) + offset

    def predict_log_normalizers(self, image_features, text_features, logit_scale):
        rows = [int((self.images == row).all(1).nonzero()) for row in image_features]
        return self.exact[:, rows].float()


@pytest.mark.parametrize("batch_size", [8, 7, 40, 1000])
def test_a_known_offset_is_the_error(batch_size):
    images, texts = features(40)
    error = normalizer_error(images, texts, Offset(images, texts, -0.5), 10.0, batch_size)
    assert error.predicted.bias == pytest.approx(-0.5, abs=1e-5)
    assert error.predicted.mae == pytest.approx(0.5, abs=1e-5)
    assert error.predicted.mse == pytest.approx(0.25, abs=1e-5)
    assert error.batch_size == min(batch_size, 20)


@pytest.mark.parametrize("batch_size", [10, 12])
def test_minibatch_error_agrees_with_loops(batch_size):
    images, texts = features(40)
    error = normalizer_error(images, texts, FromBatch(), 10.0, batch_size, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    exact = naive(images, texts, 10.0, 1e-6)
    differences = []
    for start in range(0, 40, batch_size):
        own = order[start : start + batch_size]
        batch = own + order[: batch_size - len(own)]
        estimate = naive(images[batch], texts[batch], 10.0, 1e-6)
        differences.append((estimate[:, : len(own)] - exact[:, own]).flatten())
    difference = torch.cat(differences)
    assert len(difference) == 80
    assert error.minibatch.mse == pytest.approx(float(difference.square().mean()), rel=1e-9)
    assert error.minibatch.mae == pytest.approx(float(difference.abs().mean()), rel=1e-9)
    assert error.minibatch.bias == pytest.approx(float(difference.mean()), rel=1e-9)
    # A method without memory is as wrong as the batch it sees.
    assert error.predicted.mse == pytest.approx(error.minibatch.mse, rel=1e-4)
    assert error.metrics()["minibatch_normalizer_mse"] == error.minibatch.mse
    assert error.metrics()["normalizer_bias"] == error.predicted.bias


def test_too_few_pairs_for_two_batches():
    images, texts = features(3)
    assert normalizer_error(images, texts, FromBatch(), 10.0, 64) is None


def test_other_modules_are_not_predictors():
    assert isinstance(FromBatch(), LogNormalizerPredictor)
    assert not isinstance(nn.Linear(1, 1), LogNormalizerPredictor)
