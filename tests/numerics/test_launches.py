"""How many operations a loss dispatches: small batches on CUDA wait for the host to launch them."""

from collections import Counter

import pytest
import torch
from naive_reference import pairs
from torch.utils._python_dispatch import TorchDispatchMode

from neuclip import create_loss
from neuclip.method.losses import pair_loss

BATCH, DIM = 48, 16
SETTINGS = {
    "neuclip_pool": {"pool_size": 2 * BATCH},
    "neuclip": {"num_prototypes": 2 * BATCH, "gamma": 0.4, "gamma_decay_epochs": 3.0},
}


class Launches(TorchDispatchMode):
    """Counts dispatched operations, but for views and allocations, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or "empty" in func.name()):
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def launches(name, **settings):
    """Of forward and backward pass, with a filled pool and without the checks of the CPU."""
    loss = create_loss(
        name, embed_dim=DIM, steps_per_epoch=2, num_samples=BATCH, **SETTINGS[name], **settings
    )
    leaf = pairs(BATCH, DIM).float().requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    ids = torch.arange(BATCH)
    for _ in range(4):
        loss(*leaf, scale, sample_ids=ids).backward()
    with Launches() as counted:
        loss(*leaf, scale, sample_ids=ids).backward()
    return counted.counts.total()


@pytest.fixture(autouse=True)
def no_checks(monkeypatch):
    """The values are checked at every call on the CPU, and on CUDA at the first one only."""
    monkeypatch.setattr(pair_loss, "check_values", lambda *_: None)


@pytest.mark.parametrize(("name", "limit"), [("neuclip_pool", 150), ("neuclip", 400)])
def test_a_step_of_the_loss_launches_few_operations(name, limit):
    assert 50 < launches(name) < limit


def test_an_inner_step_launches_less_than_thirty():
    ten, none = launches("neuclip", inner_steps=10), launches("neuclip", inner_steps=0)
    assert 10 < (ten - none) / 10 < 30


def test_metrics_that_nobody_reads_cost_nothing():
    loss = create_loss("neuclip_pool", embed_dim=DIM, **SETTINGS["neuclip_pool"])
    features = pairs(BATCH, DIM).float()
    for _ in range(3):
        loss(*features, 20.0)
    with Launches() as counted:
        metrics = loss.metrics()
    assert counted.counts.total() > 15
    assert metrics["predicted_log_normalizer"] != metrics["log_normalizer"]
