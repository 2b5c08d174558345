"""The tests of `test_step`, with CUDA's own check for synchronisation."""

import math

import pytest
import torch

from neuclip.catalogue.registry import METHODS
from neuclip.training.device_prefetch import DevicePrefetcher
from neuclip.training.optim import Optimizer
from neuclip.training.step import TrainingStep
from step_parts import Bench, batch, split

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def on_cuda(method: str) -> tuple[Bench, TrainingStep, DevicePrefetcher]:
    device = torch.device("cuda", 0)
    bench = Bench.of(method, noisy=False)
    towers, loss = bench.towers.to(device, torch.float32), bench.loss.to(device, torch.float32)
    optimizer = Optimizer(towers, bench.optimizer._settings, 10)
    optimizer.set_rates(0)
    step = TrainingStep(bench.clip, towers, loss, optimizer, device)
    return bench, step, DevicePrefetcher(1, device)


@pytest.fixture
def reset_sync_check():
    """Resets the check after each test."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
def test_the_host_never_waits_in_a_step(method, reset_sync_check):
    _, step, prefetcher = on_cuda(method)
    batches = iter([batch(number).pin_memory() for number in range(8)])
    for _ in range(4):
        step(prefetcher.next_step(batches))
    torch.cuda.set_sync_debug_mode("error")
    results = [step(prefetcher.next_step(batches)) for _ in range(3)]
    step(split(next(batches), 6))
    torch.cuda.set_sync_debug_mode("default")
    assert not any(result.readback.read().problem for result in results)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_with_a_non_finite_image_changes_no_weight_on_cuda(method):
    bench, step, _ = on_cuda(method)
    step([batch(0)])
    before = {name: value.clone() for name, value in bench.towers.state_dict().items()}
    spoiled = batch(1)
    spoiled.images[7, 0, 0, 0] = math.inf
    problem = step([spoiled]).readback.read().problem
    assert problem == "image_features: 1 of 12 rows are not finite, the first is row 7"
    assert all(torch.equal(v, before[name]) for name, v in bench.towers.state_dict().items())
    assert not step([batch(2)]).readback.read().problem
