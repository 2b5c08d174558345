"""The compiled loss against the eager one, in a process of its own: started by test_compiled.py.

Run-time checks of array types, which the suite adds, cannot be compiled. Prints, as JSON, the
largest relative difference of losses, gradients and state for each method, and the names of tensors
that compiled inner steps kept in their batch: a CUDA graph would overwrite them.
"""

import json
import sys

import torch
from torch.nn import functional

from neuclip import create_loss
from neuclip.method import arithmetic
from neuclip.method.arithmetic import Arithmetic, compiled_form
from neuclip.method.normalizers import prototypes

arithmetic.BACKEND = sys.argv[1]
BATCH, DIM, STEPS = 24, 12, 3
SETTINGS = {
    "openclip": {},
    "fastclip_v2": {"gamma": 0.5, "num_samples": BATCH},
    "neuclip_pool": {"pool_size": 40},
    "neuclip": {"num_prototypes": 20, "inner_steps": 2, "gamma": 0.5, "restart_steps": 2},
}


kept = set()


def watched(function, *, graphs=False):
    """A compiled inner step that notes what it adds to its batch."""
    step = compiled_form(function, graphs=graphs)

    def watching(batch):
        before = {*vars(batch), *batch.offsets}
        step(batch)
        kept.update({*vars(batch), *batch.offsets} - before)

    return watching


prototypes.compiled_form = watched


def run(name, compiled):
    loss = create_loss(name, embed_dim=DIM, steps_per_epoch=1, **SETTINGS[name])
    loss.attach(arithmetic=Arithmetic(compiled=compiled))
    found = []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        leaf = functional.normalize(torch.randn(2, BATCH, DIM, generator=generator), dim=-1)
        leaf.requires_grad_()
        scale = torch.tensor(12.0, requires_grad=True)
        value = loss(*leaf, scale, sample_ids=torch.arange(BATCH))
        value.backward()
        found += [value.detach(), leaf.grad]
    state = loss.state_dict()
    return found + [value for value in state.values() if torch.is_tensor(value)]


def difference(name):
    pairs = zip(run(name, "compile"), run(name, "off"), strict=True)
    return max(
        float((a - b).norm() / b.norm().clamp_min(1e-6))
        for a, b in pairs
        if b.is_floating_point() and torch.isfinite(b).all()
    )


if __name__ == "__main__":
    graphs = torch._dynamo.utils.counters["stats"]
    found = {name: difference(name) for name in SETTINGS}
    print(
        json.dumps(
            {"differences": found, "graphs": graphs["unique_graphs"], "kept": [*map(str, kept)]}
        )
    )
