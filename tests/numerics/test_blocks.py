"""The block-wise log g^ against the plain formula and its autograd, in float64."""

import math

import pytest
import torch
from naive_reference import inners, pairs

from neuclip.method.softmax import blocks
from neuclip.method.softmax.blocks import SoftmaxStats
from neuclip.method.softmax.candidates import Candidates
from neuclip.method.softmax.log_inner import log_inner
from neuclip.parallel.collectives import BatchLayout


def whole_batch(features, scale):
    """log g^ of one process."""
    layout = BatchLayout((features.shape[1],), 0)
    return log_inner(features, scale, Candidates(features.detach(), layout))


def plain(features, scale):
    """The plain formula over the whole matrices, for autograd."""
    similarity = features[0] @ features[1].T
    batch = len(similarity)
    own = torch.eye(batch, dtype=torch.bool)
    sides = []
    for matrix, scales in zip((similarity, similarity.T), scale.expand(2, batch), strict=True):
        logits = matrix * scales[:, None]
        others = torch.logsumexp(logits.masked_fill(own, -math.inf), 1)
        sides.append(others - logits.diagonal() - math.log(batch - 1))
    return torch.stack(sides)


def gradients(value, inputs):
    weights = torch.linspace(-1.0, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    return torch.autograd.grad((value * weights).sum(), inputs)


def some_scale(individual):
    scale = torch.tensor(20.0, dtype=torch.float64)
    if individual:
        scale = torch.linspace(2, 90, 32, dtype=torch.float64).view(2, 16)
    return scale


@pytest.fixture(params=[1, 3, 7, 16, 1000])
def rows_in_a_block(request, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 16 * request.param)
    return request.param


@pytest.mark.parametrize("individual", [False, True])
def test_pairs_equal_the_plain_formula(rows_in_a_block, individual):
    features, scale = pairs(16, 5).requires_grad_(), some_scale(individual).requires_grad_()
    got, slope = whole_batch(features, scale)
    expected = plain(features, scale)
    torch.testing.assert_close(got, expected)
    inputs = (features, scale)
    for found, wanted in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted)
    assert (slope is not None) == individual
    if slope is not None:
        (by_scale,) = torch.autograd.grad(plain(features, scale).sum(), scale)
        torch.testing.assert_close(slope, by_scale)


@pytest.mark.parametrize("individual", [False, True])
def test_row_functions_equal_the_pair_functions_on_a_ranks_rows(rows_in_a_block, individual):
    features, scale = pairs(16, 5), some_scale(individual)
    sums = blocks.pair_sums(features, scale)
    weights = torch.linspace(-1, 2, 32, dtype=torch.float64).view(2, 16)
    scales = scale.expand(2) if scale.ndim == 0 else scale
    sides = [SoftmaxStats(scales[side], sums[0, side], weights[side]) for side in (0, 1)]
    pulls = blocks.pair_gradients(features, *sides)
    own = slice(5, 12)
    for side in (0, 1):
        mine = scales[side] if scale.ndim == 0 else scales[side, own]
        rows, columns = features[side, own], features[1 - side]
        found = blocks.row_sums(rows, columns, mine, 5)
        torch.testing.assert_close(found, sums[:, side, own])
        softmaxes = SoftmaxStats(mine, sums[0, side, own], weights[side, own])
        part = blocks.row_gradients(rows, columns, softmaxes, sides[1 - side], 5)
        torch.testing.assert_close(part, pulls[side, own])


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_log_inner_equals_the_double_loop(scale):
    features = pairs(6)
    got, _ = whole_batch(features, torch.tensor(scale, dtype=torch.float64))
    torch.testing.assert_close(got, inners(features, scale).log())


@pytest.mark.parametrize("individual", [False, True])
def test_gradcheck(monkeypatch, individual):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 15)
    features = pairs(5, 3).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64)
    if individual:
        scale = torch.linspace(2.0, 4.0, 10, dtype=torch.float64).view(2, 5)
    scale.requires_grad_()
    assert torch.autograd.gradcheck(lambda f, s: whole_batch(f, s)[0], (features, scale))


@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("kind", ["identical", "one hard negative", "opposite"])
def test_extremes_in_float32(kind, individual, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 8)
    image = pairs(8, 4)[0].float()
    text = image.clone()
    if kind == "identical":
        image = text = image[:1].expand(8, 4).contiguous()
    elif kind == "one hard negative":
        text[3] = image[5]
    else:
        text = -image
    features = torch.stack([image, text]).requires_grad_()
    scale = torch.full((2, 8), 100.0) if individual else torch.tensor(100.0)
    scale.requires_grad_()
    got, _ = whole_batch(features, scale)
    exact, _ = whole_batch(features.double(), scale.double())
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=2e-4)
    for grad in gradients(got, (features, scale)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("individual", [False, True])
def test_two_pairs(individual):
    features = pairs(2, 3)
    scale = torch.full((2, 2), 5.0) if individual else torch.tensor(5.0)
    got, _ = whole_batch(features, scale.double())
    similarity = features[0] @ features[1].T
    assert got[0, 0].item() == pytest.approx(5 * (similarity[0, 1] - similarity[0, 0]).item())
    assert not math.isnan(got.sum().item())


@pytest.mark.parametrize("name", ["openclip", "isogclr", "fastclip_v2", "amorlip", "neuclip"])
def test_no_loss_creates_the_similarity_matrix(build, name, monkeypatch):
    """No tensor has B x B numbers, forward or backward; blocks have 4 rows."""
    batch = 64
    monkeypatch.setattr(blocks, "CPU_BLOCK", 4 * batch)
    settings = {"positive_weight": 0.01, "amortization": "js_div"} if name == "amorlip" else {}
    loss = build(name, **settings)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tensor.numel())
            return out

    features = pairs(batch).requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(batch) % 48
    with Watch():
        loss(features[0], features[1], scale, sample_ids=ids).backward()
    assert max(sizes) < batch * batch
