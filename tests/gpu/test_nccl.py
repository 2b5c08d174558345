"""NCCL with one rank: the collectives really run, and change nothing."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from momentum_keys import keys_for
from neuclip import create_loss
from neuclip.catalogue.registry import METHODS
from neuclip.parallel import collectives
from small_memory import small_memory


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """A group of one, which `neuclip` takes for one of many."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(collectives, "is_active", dist.is_initialized)
    yield
    dist.destroy_process_group()


def step(name):
    """Two steps' losses and the last gradients."""
    settings = {}
    if "gamma_schedule" in METHODS[name].settings.model_fields:
        settings = {"gamma": 0.5, "gamma_decay_epochs": 2.0}
    if name == "neuclip":
        settings |= {"num_prototypes": 64, "inner_steps": 2}
    settings |= small_memory(name, 64)
    loss = create_loss(name, embed_dim=32, steps_per_epoch=1, num_samples=48, **settings).cuda()
    values = []
    for number in range(2):
        generator = torch.Generator("cuda").manual_seed(number)
        features = torch.randn(2, 48, 32, device="cuda", generator=generator)
        leaf = functional.normalize(features, dim=-1).requires_grad_()
        scale, bias = (torch.tensor(v, device="cuda") for v in (15.0, -10.0))
        value = loss(
            leaf[0], leaf[1], scale, bias, sample_ids=torch.arange(48), **keys_for(loss, leaf)
        )
        value.backward()
        values.append(value.detach())
    return torch.stack(values), leaf.grad


@pytest.mark.parametrize("name", METHODS)
def test_a_method_through_nccl_equals_it_without(name, tmp_path, request):
    alone = step(name)
    request.getfixturevalue("one_rank")
    for found, wanted in zip(step(name), alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_collectives(one_rank):
    local = torch.arange(6.0, device="cuda").view(3, 2).requires_grad_()
    layout = collectives.layout_of(3)
    assert layout.sizes == (3,)
    whole = collectives.gather(local, layout)
    (grad,) = torch.autograd.grad(whole.square().sum(), local)
    torch.testing.assert_close(grad, 2 * local.detach())
    value = torch.tensor([-60.0, 3.0], device="cuda")
    bound = torch.tensor(100.0, device="cuda")
    torch.testing.assert_close(collectives.logsumexp_over_ranks(value, bound), value)
    assert collectives.any_rank(True)
    assert collectives.gather_objects(2**40) == [2**40]
