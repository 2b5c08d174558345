"""The fused kernels on CUDA against the blocks in float64."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("triton")

from neuclip.method.arithmetic import FUSED_BY_DEFAULT, Arithmetic
from neuclip.method.softmax import blocks, log_inner
from neuclip.method.softmax.blocks import SoftmaxStats
from neuclip.method.softmax.candidates import Candidates
from neuclip.parallel.collectives import BatchLayout


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def unit(*shape):
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    values = torch.randn(*shape, device="cuda", generator=generator)
    return functional.normalize(values, dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("individual", [False, True])
@pytest.mark.parametrize(("anchors", "candidates", "dim"), [(77, 1000, 512), (256, 4099, 640)])
def test_kernels(anchors, candidates, dim, individual, dtype):
    from neuclip.method.softmax import fused

    rows, columns = unit(anchors, dim).to(dtype), unit(candidates, dim).to(dtype)
    if individual:
        scales = torch.linspace(5, 100, anchors), torch.linspace(100, 5, candidates)
    else:
        scales = torch.tensor(100.0), torch.tensor(100.0)
    scales = [scale.cuda() for scale in scales]
    offset = 31
    sums = blocks.row_sums(rows.double(), columns.double(), scales[0].double(), offset)
    found = fused.row_sums(rows, columns, scales[0], offset)
    others = (columns.double() @ rows.double().T).amax(1) * scales[1] + 1
    weights = torch.linspace(-1, 2, anchors).cuda(), torch.linspace(1, -2, candidates).cuda()
    own = SoftmaxStats(scales[0], sums[0].float(), weights[0])
    other = SoftmaxStats(scales[1], others.float(), weights[1])
    exact = (
        SoftmaxStats(each.scale.double(), each.log_sum.double(), each.weight.double())
        for each in (own, other)
    )
    pulls = blocks.row_gradients(rows.double(), columns.double(), *exact, offset)
    pulled = fused.row_gradients(rows, columns, own, other, offset)
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    assert relative(found, sums) < 1e-4
    assert relative(pulled, pulls) < limit


def test_losses_take_the_fused_kernels_when_asked(monkeypatch):
    from neuclip.method.softmax import fused

    called = []
    original = fused.row_sums
    monkeypatch.setattr(fused, "row_sums", lambda *a: called.append(1) or original(*a))
    features = unit(2, 130, 64)
    scale = torch.tensor(30.0, device="cuda")
    candidates = Candidates(features, BatchLayout((130,), 0))
    log_inner.log_inner(features, scale, candidates)
    assert bool(called) == FUSED_BY_DEFAULT
    called.clear()
    value, _ = log_inner.log_inner(features, scale, candidates, Arithmetic(fused="on"))
    assert len(called) == 2
    wide = features.double()
    exact, _ = log_inner.log_inner(
        wide, torch.tensor(30.0, device="cuda").double(), Candidates(wide, BatchLayout((130,), 0))
    )
    assert relative(value, exact) < 1e-4
