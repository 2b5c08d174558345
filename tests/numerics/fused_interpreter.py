"""The fused kernels by Triton's interpreter, in a process of their own: started by test_fused.py.

Prints, as JSON, the largest error of each result against the blocks in float64.
"""

import itertools
import json
import math

import torch
from torch.nn import functional

from neuclip.method.softmax import blocks, fused, log_inner
from neuclip.method.softmax.blocks import SoftmaxStats
from neuclip.method.softmax.candidates import Candidates
from neuclip.method.softmax.exclusion import Exclusion
from neuclip.parallel.collectives import BatchLayout

# Nothing here is a multiple of a tile: several tiles of each kind, and a last one in part.
ANCHORS, CANDIDATES, OFFSET = 21, 45, 13
fused.TILES = fused.Tiles(anchors=16, candidates=16, inner=16, part=16)


def error(found, wanted) -> float:
    """The largest difference over the largest value; NaN counts as infinite."""
    value = float((found.double() - wanted).abs().max() / wanted.abs().max())
    return value if math.isfinite(value) else math.inf


def unit(generator, *shape):
    return functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def some_groups(generator):
    """Two kinds of groups; the first row has no negative in the first two tiles."""
    columns = torch.randint(0, 5, (2, CANDIDATES), generator=generator)
    rows = columns[:, OFFSET : OFFSET + ANCHORS].clone()
    columns[0, :40], rows[0] = 9, 0
    rows[0, 0] = 9
    return Exclusion(rows, columns, OFFSET)


def kernels(dim, individual, dtype, masked):
    """A rank's rows against all columns, with gathered features as a view with strides."""
    generator = torch.Generator().manual_seed(dim)
    rows = unit(generator, ANCHORS, dim).to(dtype)
    columns = unit(generator, CANDIDATES, 2, dim).to(dtype)[:, 1]
    columns[OFFSET : OFFSET + ANCHORS] += rows
    columns = functional.normalize(columns.float(), dim=-1).to(dtype)
    if individual:
        scales = torch.linspace(3, 100, ANCHORS), torch.linspace(100, 5, CANDIDATES)
    else:
        scales = torch.tensor(50.0), torch.tensor(50.0)
    weights = torch.linspace(-1, 2, ANCHORS), torch.linspace(1, -2, CANDIDATES)
    wide = rows.double(), columns.double()
    excluded = some_groups(generator) if masked else None
    sums = blocks.row_sums(*wide, scales[0].double(), OFFSET, excluded)
    found = fused.row_sums(rows, columns, scales[0], OFFSET, excluded)
    # Any log-sums of the columns will do, if they are no smaller than their softmaxes ask for.
    others = (wide[1] @ wide[0].T).amax(1) * scales[1] + 1
    own, theirs = (
        SoftmaxStats(scales[0], sums[0], weights[0]),
        SoftmaxStats(scales[1], others, weights[1]),
    )
    pulls = blocks.row_gradients(*wide, _double(own), _double(theirs), OFFSET, excluded)
    pulled = fused.row_gradients(rows, columns, _single(own), _single(theirs), OFFSET, excluded)
    return max(error(found[k], sums[k]) for k in range(len(sums))), error(pulled, pulls)


def _double(softmaxes):
    return SoftmaxStats(
        softmaxes.scale.double(), softmaxes.log_sum.double(), softmaxes.weight.double()
    )


def _single(softmaxes):
    return SoftmaxStats(
        softmaxes.scale.float(), softmaxes.log_sum.float(), softmaxes.weight.float()
    )


def whole(individual, masked):
    """log_inner with its gradients, on the fused kernels, for one process.

    With groups, the first pair has no negative.
    """
    generator = torch.Generator().manual_seed(9)
    features = unit(generator, 2, 19, 24)
    scale = torch.linspace(5, 80, 38).view(2, 19) if individual else torch.tensor(30.0)
    # The first pair is in the first kind's group with nine others, in the second's with the rest.
    first = torch.arange(19) < 10
    groups = torch.stack([first * 8, ~first * 9])
    groups[:, 0] = torch.tensor([8, 9])
    excluded = Exclusion(groups, groups, 0) if masked else None
    known = torch.arange(19) > 0 if masked else torch.ones(19, dtype=torch.bool)
    results = []
    for double in (True, False):
        leaf = (features.double() if double else features).clone().requires_grad_()
        leaves = leaf, scale.to(leaf.dtype).clone().requires_grad_()
        log_inner.fused_kernels = (lambda *_: None) if double else (lambda *_: fused)
        candidates = Candidates(leaf.detach(), BatchLayout((19,), 0), excluded=excluded)
        value, _ = log_inner.log_inner(*leaves, candidates)
        value = value[:, known]
        results.append([value.detach(), *torch.autograd.grad(value.square().sum(), leaves)])
    return max(error(found, wanted) for wanted, found in zip(*results, strict=True))


def main() -> None:
    errors = {}
    for dim, individual in itertools.product((7, 40), (False, True)):
        for dtype in (torch.float32, torch.float16):  # its products of bfloat16 are those of bits
            for groups in (False, True) if dtype == torch.float32 else (False,):
                name = f"{dim} {'individual' if individual else 'global'} {dtype} groups {groups}"
                sums, pulls = kernels(dim, individual, dtype, groups)
                errors[f"sums {name}"], errors[f"pulls {name}"] = sums, pulls
    for individual, groups in itertools.product((False, True), (False, True)):
        errors[f"log_inner {individual} {groups}"] = whole(individual, groups)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
