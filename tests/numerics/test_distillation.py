"""Distillation over the batch, against a double loop and open_clip's DistillClipLoss."""

import math

import pytest
import torch
from open_clip.loss import DistillClipLoss

from neuclip.method.losses import distillation as module
from neuclip.method.losses.distillation import distillation


def embeddings(count, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, count, dim, dtype=torch.float64, generator=generator)
    return torch.nn.functional.normalize(drawn, dim=-1)


def naive(features, scale, teacher, teacher_scale):
    """The loss and the divergence, number by number."""
    cross = divergence = 0.0
    count = features.shape[1]
    for side in (0, 1):
        for i in range(count):
            p, q = (
                [math.exp(s * float(both[side, i] @ both[1 - side, j])) for j in range(count)]
                for s, both in ((teacher_scale, teacher), (scale, features))
            )
            p, q = ([each / sum(one) for each in one] for one in (p, q))
            for a, b in zip(p, q, strict=True):
                cross -= a * math.log(b) / (2 * count)
                divergence += a * math.log(a / b) / (2 * count)
    return cross, divergence


@pytest.mark.parametrize("block", [1, 2**20])
def test_it_is_the_double_loop(monkeypatch, block):
    monkeypatch.setattr(module, "CPU_BLOCK", block)  # a row at a time, and all rows at once
    features, teacher = embeddings(7, 5, 0), embeddings(7, 9, 1)
    loss, divergence = distillation(features, torch.tensor(6.0), teacher, torch.tensor(11.0))
    expected = naive(features, 6.0, teacher, 11.0)
    assert (float(loss), float(divergence)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block", [9, 2**20])
def test_value_and_gradients_are_those_of_open_clip(monkeypatch, block):
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    teacher, teacher_scale = embeddings(8, 4, 2), torch.tensor(20.0, dtype=torch.float64)
    given = []
    for _ in range(2):
        features = embeddings(8, 6, 3).requires_grad_()
        given.append((features, torch.tensor(9.0, dtype=torch.float64, requires_grad=True)))
    own = distillation(*given[0], teacher, teacher_scale)[0]
    features, scale = given[1]
    _, theirs = DistillClipLoss()(*features, scale, *teacher, teacher_scale)
    torch.testing.assert_close(own, theirs, rtol=1e-13, atol=0)
    own.backward()
    theirs.backward()
    for one, other in zip(*given, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-14)


def test_the_teacher_itself_has_no_divergence_and_no_gradient():
    features = embeddings(6, 5, 4).requires_grad_()
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    loss, divergence = distillation(features, scale, features.detach(), scale.detach())
    loss.backward()
    assert abs(divergence.item()) < 1e-14
    assert features.grad.abs().max() < 1e-14
    assert abs(float(scale.grad)) < 1e-14
