"""Every method on CUDA, from float32 and bfloat16 features, against float64 on the CPU."""

import pytest
import torch
from torch.nn import functional

from momentum_keys import keys_for
from neuclip import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.method.arithmetic import Arithmetic
from neuclip.method.softmax.candidates import Candidates
from neuclip.method.softmax.log_inner import log_inner
from neuclip.parallel.collectives import BatchLayout
from small_memory import small_memory

BATCH, DIM, STEPS = 200, 96, 4
NETWORK = {
    "num_prototypes": 300,
    "inner_steps": 3,
    "restart_steps": 2,
    "refresh": "restart",
    "gradient": "detached",
}
VARIANTS = [(name, {}) for name in METHODS] + [
    ("neuclip", {"gradient": "full"}),
    ("neuclip", {"gradient": "union", "log_weights": True}),
    ("amorlip", {"amortization": "js_div"}),
]


def run(name, settings, device, dtype, batches):
    """Losses and gradients of some steps."""
    fields = METHODS[name].settings.model_fields
    if "gamma_schedule" in fields:
        settings = {"gamma": 0.4, "gamma_schedule": "constant", **settings}
    if name == "neuclip":
        settings = {**NETWORK, **settings}
    settings = {**small_memory(name, 300), **settings}
    loss = create_loss(name, embed_dim=DIM, steps_per_epoch=1, num_samples=BATCH, **settings).to(
        device
    )
    if dtype == torch.float64:
        loss = loss.double()
    scalar = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for features in batches:
        leaf = features.to(device, dtype).requires_grad_()
        scale = torch.tensor(20.0, dtype=scalar, device=device, requires_grad=True)
        bias = torch.tensor(-10.0, dtype=scalar, device=device)
        value = loss(
            leaf[0], leaf[1], scale, bias, sample_ids=torch.arange(BATCH), **keys_for(loss, leaf)
        )
        value.backward()
        by_scale = torch.zeros(()) if scale.grad is None else scale.grad
        results.append([each.detach().double().cpu() for each in (value, leaf.grad, by_scale)])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_method_on_cuda_equals_float64_on_the_cpu(name, settings, dtype):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(STEPS):
        features = torch.randn(2, BATCH, DIM, generator=generator)
        features[1] += features[0]
        # Rounded beforehand, so that both sides read the same numbers.
        batches.append(functional.normalize(features, dim=-1).to(dtype).float())
    exact = run(name, settings, "cpu", torch.float64, batches)
    found = run(name, settings, "cuda", dtype, batches)
    # Losses are computed in float32 whatever the features are; a bfloat16 gradient is rounded.
    tolerance = 2e-3 if dtype == torch.float32 else 2e-2
    for ours, wanted in zip(found, exact, strict=True):
        for one, other in zip(ours, wanted, strict=True):
            error = (one - other).norm() / other.norm().clamp_min(1e-6)
            assert float(error) < tolerance


@pytest.mark.parametrize("individual", [False, True])
def test_bfloat16_products_on_tensor_cores_equal_those_of_the_cpu(individual):
    """Both multiply the same rounded factors and sum in float32."""
    generator = torch.Generator().manual_seed(1)
    features = functional.normalize(torch.randn(2, BATCH, DIM, generator=generator), dim=-1)
    scale = torch.full((2, BATCH), 20.0) if individual else torch.tensor(20.0)
    low, layout = Arithmetic(low_precision=torch.bfloat16), BatchLayout((BATCH,), 0)
    found = []
    for device in ("cpu", "cuda"):
        leaf = features.to(device).requires_grad_()
        candidates = Candidates(leaf.detach(), layout)
        value, _ = log_inner(leaf, scale.to(device), candidates, low)
        value.square().sum().backward()
        found.append((value.detach().cpu(), leaf.grad.cpu()))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-3


def test_a_loss_under_autocast_comes_close_to_float64():
    features = functional.normalize(torch.randn(2, BATCH, DIM), dim=-1)
    loss = create_loss("openclip", embed_dim=DIM)
    exact = loss(*features.double(), 20.0)
    with torch.autocast("cuda", torch.bfloat16):
        found = loss(*features.cuda(), 20.0)
    assert float(found) == pytest.approx(float(exact), abs=5e-3)
