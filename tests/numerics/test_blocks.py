"""The block-wise log g^ against the plain formula and its autograd, in float64."""

import math

import pytest
import torch

from neuclip.method import blocks
from neuclip.method.blocks import log_inner_of_pairs, log_inner_of_rows


def log_inner(similarity, logit_scale, offset=0):
    """The plain formula over the whole matrix, for autograd."""
    anchors, candidates = similarity.shape
    logits = similarity * (logit_scale if logit_scale.ndim == 0 else logit_scale[:, None])
    positive = logits.diagonal(offset)[:anchors]
    own = torch.zeros_like(similarity, dtype=torch.bool)
    own.diagonal(offset)[:anchors] = True
    others = logits.masked_fill(own, -math.inf)
    return torch.logsumexp(others, 1) - positive - math.log(candidates - 1)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(values, dim=-1)


def gradients(value, inputs):
    weights = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weights).sum(), inputs)


@pytest.fixture(params=[1, 3, 7, 16, 1000])
def rows_in_a_block(request, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 16 * request.param)
    return request.param


@pytest.mark.parametrize("individual", [False, True])
def test_pairs_equal_the_plain_formula(rows_in_a_block, individual):
    features = unit(2, 16, 5).requires_grad_()
    scale = torch.tensor(20.0, dtype=torch.float64)
    if individual:
        scale = torch.linspace(2, 90, 32, dtype=torch.float64).view(2, 16)
    scale.requires_grad_()
    got = log_inner_of_pairs(features, scale)
    similarity = features[0] @ features[1].T
    scales = scale.expand(2, 16)
    plain = torch.stack([log_inner(similarity, scales[0]), log_inner(similarity.T, scales[1])])
    torch.testing.assert_close(got, plain)
    for found, wanted in zip(
        gradients(got, (features, scale)), gradients(plain, (features, scale)), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_rows_equal_the_plain_formula(rows_in_a_block):
    anchors, candidates = unit(4, 5).requires_grad_(), unit(16, 5, seed=1).requires_grad_()
    scale = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    got = log_inner_of_rows(anchors, candidates, scale, offset=8)
    plain = log_inner(anchors @ candidates.T, scale, 8)
    torch.testing.assert_close(got, plain)
    inputs = (anchors, candidates, scale)
    for found, wanted in zip(gradients(got, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 15)
    features = unit(2, 5, 3).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_inner_of_pairs, (features, scale))


@pytest.mark.parametrize("kind", ["identical", "one hard negative", "opposite"])
def test_extremes_in_float32(kind, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 8)
    image = unit(8, 4).float()
    text = image.clone()
    if kind == "identical":
        image = text = image[:1].expand(8, 4).contiguous()
    elif kind == "one hard negative":
        text[3] = image[5]
    else:
        text = -image
    features = torch.stack([image, text]).requires_grad_()
    scale = torch.tensor(100.0, requires_grad=True)
    got = log_inner_of_pairs(features, scale)
    exact = log_inner_of_pairs(features.double(), scale.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-4)
    for grad in gradients(got, (features, scale)):
        assert torch.isfinite(grad).all()


def test_two_pairs():
    features = unit(2, 2, 3)
    got = log_inner_of_pairs(features, torch.tensor(5.0, dtype=torch.float64))
    similarity = features[0] @ features[1].T
    assert got[0, 0].item() == pytest.approx(5 * (similarity[0, 1] - similarity[0, 0]).item())
    assert not math.isnan(got.sum().item())
