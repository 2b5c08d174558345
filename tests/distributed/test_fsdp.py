"""Sharded towers (FSDP2) train as with DDP, and as in one process."""

import pytest
import torch
from tower_tasks import Result, Task, shown, train_towers

from neuclip.model import prepare
from neuclip.model.ema import WeightAverage
from neuclip.parallel import fsdp
from tiny_models import RESNET, VIT, pairs, tiny

TASKS = {
    "clipped": Task(clip=0.05),
    "a bias": Task(method="siglip", optim={"opt": "nadamw"}),
    "momentum": Task(method="moco"),
    "resnet": Task(RESNET, clip=0.05, optim={"opt": "sgd", "momentum": 0.9}),
    "locked": Task(
        method="neuclip",
        settings={"lock_image": True, "lock_image_unlocked_groups": 2, "grad_checkpointing": True},
    ),
    "compiled": Task(settings={"torchcompile": True, "torchcompile_backend": "eager"}),
}


def close(one: Result, other: Result, tolerance: float) -> None:
    near = {"rtol": tolerance, "atol": tolerance}
    assert one.losses == pytest.approx(other.losses, rel=tolerance)
    assert one.norms == pytest.approx(other.norms, rel=10 * tolerance)
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        torch.testing.assert_close(value, other.weights[name], **near, msg=name)
        torch.testing.assert_close(one.average[name], other.average[name], **near, msg=name)
    torch.testing.assert_close(one.embeddings, other.embeddings, **near)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo hides it, pytest shows it
@pytest.mark.parametrize("case", TASKS)
def test_sharded_equals_ddp_and_one_process(pool, case):
    task = TASKS[case]
    plain = Task(**{**vars(task), "fsdp": False})
    sharded, replicated = pool.run(2, train_towers, task), pool.run(2, train_towers, plain)
    close(sharded[0], replicated[0], 1e-9)
    for name, value in sharded[0].weights.items():  # the second rank has its own statistics
        if "running" not in name:
            assert torch.equal(value, sharded[1].weights[name]), name
    assert torch.equal(sharded[0].embeddings, sharded[1].embeddings)
    if task.model == VIT:
        close(replicated[0], train_towers(plain), 1e-6)
    assert sharded[0].own_elements < 0.6 * sharded[0].all_elements
    assert sharded[0].own_elements + sharded[1].own_elements >= sharded[0].all_elements


def test_averages_also_replace_weights_that_are_gathered():
    with fsdp.ensure_process_group("cpu", wanted=True):
        model = tiny().towers
        fsdp.shard(model, prepare.blocks(model), torch.device("cpu"), low_precision=None)
        average, given = WeightAverage(model, 0.9), pairs(3)
        first = encoded(model, given)
        for parameter in model.parameters():
            with torch.no_grad():
                fsdp.to_local(parameter).mul_(1.1)
        moved = encoded(model, given)
        model.unshard()
        with average.applied():
            assert torch.equal(encoded(model, given), first)
            model.unshard()
        assert torch.equal(encoded(model, given), moved)
    assert not torch.equal(first, moved)


@torch.no_grad()
def encoded(model, given):
    return torch.stack([model(*given)[f"{side}_features"] for side in ("image", "text")])


@pytest.mark.parametrize("precision", ["amp_bf16", "amp_fp16"])
def test_low_precision_parameters_stay_near_amp(pool, precision):
    sharded = pool.run(2, train_towers, Task(precision=precision))[0]
    replicated = pool.run(2, train_towers, Task(precision=precision, fsdp=False))[0]
    assert sharded.losses == pytest.approx(replicated.losses, rel=2e-2)
    assert sharded.norms == pytest.approx(replicated.norms, rel=0.1)
    assert all(value.dtype == torch.float32 for value in sharded.weights.values())
    first = shown(tiny().towers.state_dict())
    moved, wanted = (
        torch.cat([(each.weights[name] - first[name]).flatten() for name in first])
        for each in (sharded, replicated)
    )
    # AdamW's first steps have the size of the learning rate for any gradient: noise flips signs.
    assert float(torch.nn.functional.cosine_similarity(moved, wanted, dim=0)) > 0.9
