"""The loss in bfloat16 products, and in blocks of any size: equal to float64 within bounds."""

import pytest
import torch
from naive_reference import pairs

from neuclip import create_loss
from neuclip.errors import UserError
from neuclip.method import arithmetic as forms
from neuclip.method.arithmetic import Arithmetic, autocast_precision
from neuclip.method.softmax import blocks, log_inner
from neuclip.method.softmax.blocks import CUDA_BLOCK, block_size
from neuclip.method.softmax.candidates import Candidates
from neuclip.parallel.collectives import BatchLayout

BATCH, DIM, SCALE = 48, 64, 30.0

# Each coordinate of a unit vector is off by up to 2^-9 of its size in bfloat16. The errors of a
# similarity's terms are independent, so it is off by some 2^-9 / sqrt(dim), and a logit by `SCALE`
# times that. Four times as much bounds the largest of some thousand logits.
VALUE_BOUND = 4 * SCALE * 2**-9 / DIM**0.5
GRADIENT_BOUND = 2**-6
"""Relative: the error of a softmax is that of its logit, and it is rounded once more."""


def correlated(batch=BATCH):
    features = pairs(batch, DIM)
    features[1] += 0.4 * features[0]
    return torch.nn.functional.normalize(features, dim=-1)


def passes(features, scale, arithmetic):
    """log g^ and the gradients by features and scale."""
    leaf = features.clone().requires_grad_()
    scale = scale.clone().requires_grad_()
    candidates = Candidates(features, BatchLayout((features.shape[1],), 0))
    value, _ = log_inner.log_inner(leaf, scale, candidates, arithmetic)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), (leaf, scale))


def scales(individual):
    one = torch.tensor(SCALE, dtype=torch.float64)
    return torch.linspace(5, SCALE, 2 * BATCH).double().view(2, BATCH) if individual else one


@pytest.fixture(params=[1, 5, 17, 1000])
def rows_in_a_block(request, monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", BATCH * request.param)
    return request.param


@pytest.mark.parametrize("individual", [False, True])
def test_bfloat16_products_come_close_to_float64(rows_in_a_block, individual):
    features, scale = correlated(), scales(individual)
    exact = passes(features, scale, Arithmetic())
    low = Arithmetic(low_precision=torch.bfloat16)
    found = passes(features.float(), scale.float(), low)
    assert all(each.dtype == torch.float32 for each in found)
    errors = [(a.double() - b) for a, b in zip(found, exact, strict=True)]
    assert 0 < errors[0].abs().max() < VALUE_BOUND
    for error, wanted in zip(errors[1:], exact[1:], strict=True):
        assert error.norm() / wanted.norm() < GRADIENT_BOUND


@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_the_size_of_a_block_changes_only_the_rounding(monkeypatch, low, individual):
    features, scale = correlated().float(), scales(individual).float()
    whole = passes(features, scale, Arithmetic(low_precision=low))
    monkeypatch.setattr(blocks, "CPU_BLOCK", BATCH * 7)
    # Softmaxes are rounded to bfloat16: a last bit of float32 can change one of them.
    limit = 1e-5 if low is None else 1e-4
    for one, other in zip(
        passes(features, scale, Arithmetic(low_precision=low)), whole, strict=True
    ):
        assert (one - other).norm() / other.norm() < limit


def test_float64_features_are_never_rounded():
    features, scale = correlated(), scales(False)
    low = Arithmetic(low_precision=torch.bfloat16)
    for one, other in zip(
        passes(features, scale, low), passes(features, scale, Arithmetic()), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["openclip", "fastclip_v2", "neuclip_pool"])
def test_autocast_of_the_caller_chooses_the_products(name, build):
    ids, generator = torch.arange(BATCH), torch.Generator().manual_seed(0)
    negatives = torch.nn.functional.normalize(torch.randn(BATCH, DIM, generator=generator), dim=-1)

    def run(dtype, autocast):
        settings = {"gamma": 0.5} if name != "openclip" else {}
        settings |= {"gamma_decay_epochs": 1.0} if name == "fastclip_v2" else {}
        loss = create_loss(
            name, embed_dim=DIM, num_samples=BATCH, steps_per_epoch=1, **settings
        ).to(dtype)
        leaf = correlated().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(
                *leaf, torch.tensor(SCALE, dtype=dtype), sample_ids=ids,
                negative_features=negatives.to(dtype),
            )  # fmt: skip
        value.backward()
        return value.item(), leaf.grad.double()

    exact, plain, low = (
        run(torch.float64, False),
        run(torch.float32, False),
        run(torch.float32, True),
    )
    assert plain[0] != low[0]
    assert plain[0] == pytest.approx(exact[0], abs=1e-5)
    assert low[0] == pytest.approx(exact[0], abs=VALUE_BOUND)
    assert (low[1] - exact[1]).norm() / exact[1].norm() < GRADIENT_BOUND


def test_float16_autocast_leaves_the_loss_in_float32():
    with torch.autocast("cpu", torch.float16):
        assert autocast_precision("cpu") is None
    assert autocast_precision("cpu") is None


def test_a_block_is_a_power_of_two_that_fits_the_card():
    sizes = [block_size(gigabytes * 2**30) for gigabytes in (1, 4, 8, 16, 24, 40, 80, 141)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 2**20
    assert sizes[-1] == CUDA_BLOCK
    assert all(size & (size - 1) == 0 for size in sizes)


def test_fused_on_says_why_it_cannot():
    loss = create_loss("openclip", embed_dim=DIM)
    loss.attach(arithmetic=Arithmetic(fused="on"))
    with pytest.raises(UserError, match="--fused-loss on: the kernels are for CUDA"):
        loss(*correlated().float(), 20.0)
    with pytest.raises(UserError, match="SigmoidLoss, which has none"):
        create_loss("siglip", embed_dim=DIM).attach(arithmetic=Arithmetic(fused="on"))


def test_auto_takes_the_fused_kernels_only_by_the_named_default(monkeypatch):
    monkeypatch.setattr(log_inner, "obstacle_to_fused", lambda device: None)
    wanted = {choice: log_inner.fused_kernels(torch.ones(2), Arithmetic(fused=choice))
              for choice in ("off", "auto")}  # fmt: skip
    assert wanted == {"off": None, "auto": None}
    assert not forms.FUSED_BY_DEFAULT
