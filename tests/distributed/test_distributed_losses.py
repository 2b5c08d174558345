"""K ranks with a share of the batch each equal one process with the full batch."""

import functools
from dataclasses import replace

import pytest
import torch
from loss_tasks import (
    Result,
    Task,
    different_numbers,
    every_collective,
    too_few_prototypes,
    train,
)

from neuclip.catalogue.registry import METHODS
from small_memory import small_memory

pytestmark = pytest.mark.distributed

GLOFND = {"glofnd_alpha": 0.3, "glofnd_start": 0.5}
MIXING = {"gamma": 0.3, "gamma_decay_epochs": 2.0}
NETWORK = {
    **MIXING,
    "num_prototypes": 13,  # divisible by none of 2, 3, 4, and more than a batch
    "inner_steps": 2,
    "restart_steps": 3,
    "prototype_lr": 0.3,
    "refresh": "restart",
    "gradient": "detached",
}


def task(name: str, **settings) -> Task:
    if name == "neuclip":
        return Task(name, {**NETWORK, **settings})
    settings = {**small_memory(name, NETWORK["num_prototypes"]), **settings}
    mixes = "gamma_schedule" in METHODS[name].settings.model_fields
    return Task(name, {**(MIXING if mixes else {}), **settings})


TASKS = {name: task(name) for name in METHODS} | {
    "full": task("neuclip", gradient="full"),
    "union": task("neuclip", gradient="union"),
    # Batches share most of their pairs: an anchor meets earlier positives in the pool.
    "pool-newest": task("neuclip_pool", gradient_size=7),
    "pool-union-small": task("neuclip_pool", pool_size=4, gradient="union"),
    "untrained": task("neuclip", gradient="union", inner_steps=0),
    "adagrad": task("neuclip", prototype_optimizer="adagrad"),
    "other-readings": task(
        "neuclip",
        restart_from="current",
        restart_fill="batch",
        restart_optimizer=False,
        restart_steps=2,
        mixing="none",
    ),
    "rolling-adam-weights": task(
        "neuclip", refresh="rolling", prototype_optimizer="adam", log_weights=True
    ),
    "union-sgd-weights-small": task(
        "neuclip", gradient="union", prototype_optimizer="sgd", log_weights=True, num_prototypes=4
    ),
    "fastclip-gradient": task("fastclip_v3", temperature_gradient="fastclip"),
    "scent-drrho": task("scent", objective_scale="drrho", first_rate_offset=1.0, rate_offset=3.0),
    "glofnd-table": task("isogclr", **GLOFND, glofnd_lr=0.6),
    "glofnd-pool": task("neuclip_pool", gradient_size=7, **GLOFND),
    "glofnd-queue": task("infonce_queue", queue_size=4, **GLOFND),
    "queue-moments": task("infonce_queue", queue_alignment="moments", queue_positives="anchor"),
    "glofnd-rgcl-queue": task("rgcl_queue", queue_size=5, **GLOFND),
    "amorlip-js": task("amorlip", amortization="js_div", fit_previous=False),
    "amorlip-kl": task("amorlip", amortization="kl_div_asym"),
}


def same_state(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(value, other[key], rtol=1e-9, atol=1e-10, msg=key)
        else:
            assert value == other[key], key


def same_run(ranks: list[Result], alone: Result, *, first: int = 0) -> None:
    """Asserts that the ranks' mean loss and mean gradients are those of one process."""
    size = len(ranks)
    for step, expected in enumerate(alone.losses[first:]):
        mean = torch.stack([rank.losses[step] for rank in ranks]).mean()
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-10)
        grads = torch.cat([rank.feature_grads[step] for rank in ranks], 1) / size
        torch.testing.assert_close(grads, alone.feature_grads[first + step], rtol=1e-8, atol=1e-10)
        for name in ("scale_grads", "bias_grads"):
            grad = torch.stack([getattr(rank, name)[step] for rank in ranks]).mean()
            torch.testing.assert_close(grad, getattr(alone, name)[first + step])
    if alone.predicted is not None:
        predicted = torch.cat([rank.predicted for rank in ranks], 1)
        torch.testing.assert_close(predicted, alone.predicted)
    for rank in ranks:
        same_state(rank.state, alone.state)


@functools.cache
def alone(case: str) -> Result:
    return train(TASKS[case])


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", TASKS)
def test_several_ranks_equal_one_process(pool, case, size):
    """Two batches are split evenly over the ranks, two are not."""
    same_run(pool.run(size, train, TASKS[case]), alone(case))


@pytest.mark.parametrize(
    "case",
    [
        *METHODS,
        "pool-newest",
        "scent-drrho",
        "glofnd-table",
        "glofnd-pool",
        "glofnd-queue",
        "glofnd-rgcl-queue",
    ],
)
def test_several_ranks_with_groups_weights_and_hard_negatives_equal_one_process(pool, case):
    """One process equals the double loops of tests/numerics/test_batch_options.py."""
    whole = replace(TASKS[case], options=True)
    expected = train(whole)
    same_run(pool.run(2, train, whole), expected)
    if case != "pool-newest":
        return
    state = pool.run(2, train, replace(whole, steps=(0, 1)))[0].state
    assert state["normalizer.ring.groups"].shape == (2, 13)
    same_run(pool.run(3, train, replace(whole, steps=(2, 3)), state), expected, first=2)


@pytest.mark.parametrize("case", METHODS)
def test_the_other_form_of_the_gather_equals_one_process(pool, case):
    """Gradients through the gather for softmax losses, FastCLIP's two terms for the sigmoid's."""
    same_run(pool.run(3, train, replace(TASKS[case], other_form=True)), alone(case))


@pytest.mark.parametrize(
    "case", [*METHODS, "pool-newest", "rolling-adam-weights", "adagrad", "glofnd-table"]
)
def test_a_state_of_two_ranks_resumes_with_another_number(pool, case):
    whole = TASKS[case]
    before = replace(whole, steps=whole.steps[:2])
    after = replace(whole, steps=whole.steps[2:])
    state = pool.run(2, train, before)[0].state
    same_run([train(after, state)], alone(case), first=2)
    for size in (3, 4):
        same_run(pool.run(size, train, after, state), alone(case), first=2)


@pytest.mark.parametrize("case", ["full", "pool-newest", "rolling-adam-weights"])
def test_prototypes_that_are_not_sharded_equal_one_process(pool, case):
    same_run(pool.run(2, train, replace(TASKS[case], sharded=False)), alone(case))


@pytest.mark.parametrize("case", METHODS)
def test_losses_without_numbers_equal_one_process(pool, case):
    """What the first call settles, and the growth of tables, are equal on all ranks."""
    whole = Task(case, drop_in=True)
    expected = train(whole)
    same_run(pool.run(2, train, whole), expected)
    state = pool.run(2, train, replace(whole, steps=(0, 1)))[0].state
    same_run(pool.run(3, train, replace(whole, steps=(2, 3)), state), expected, first=2)


def test_more_ranks_than_prototypes(pool):
    messages = pool.run(3, too_few_prototypes)
    assert all("num_prototypes 1 is below the number of processes (3)" in m for m in messages)


def test_ranks_with_different_numbers_of_pairs(pool):
    assert pool.run(2, different_numbers, False, (3, 1)) == ["", ""]
    refused = pool.run(2, different_numbers, True, (3, 1))
    assert all("hold [3, 1] pairs, and equal_batches is set" in message for message in refused)
    empty = pool.run(3, different_numbers, False, (3, 0, 2))
    assert all("hold [3, 0, 2] pairs of this batch: each needs at least one" in m for m in empty)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives(pool, size):
    results = pool.run(size, every_collective)
    total = size * (size + 1) / 2
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["main"] == (rank == 0)
        assert result["gather"][:, 0].tolist() == [float(r) for r in range(size) for _ in range(2)]
        # Every rank weighed the whole with rank + 1: the gradients are summed over ranks.
        own = torch.arange(6.0 * size).view(-1, 3)[2 * rank : 2 * rank + 2].double() * total
        torch.testing.assert_close(result["grad"], own)
        rows = [r for r in range(size) for _ in range(r + 1)]
        start = rank * (rank + 1) // 2
        assert result["layout"] == (True, start, len(rows))
        assert result["uneven"][:, 1].tolist() == rows
        own = torch.arange(2.0 * len(rows)).view(-1, 2)[start : start + rank + 1].double() * total
        torch.testing.assert_close(result["uneven_grad"], own)
        assert result["weighed"].item() == pytest.approx(sum(rows) / len(rows))
        logs = [[-90.0 * r for r in range(size)], [90.0 + r for r in range(size)]]
        torch.testing.assert_close(result["logsumexp"], torch.tensor(logs).logsumexp(1))
        assert result["constant"].tolist() == [v for r in range(size) for v in (r, -r)]
        assert result["sum"].item() == total
        assert result["mean"].item() == total / size
        assert result["max"].item() == size
        assert result["slices"].tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
        assert result["any"] == (True, False)
    assert sum(result["slice"][2] for result in results) == 7
    assert results[-1]["slice"][1] == 7


def test_collectives_of_one_process_are_the_identity():
    result = every_collective()
    assert result["gather"].shape == (2, 3)
    assert result["slice"] == (0, 7, 7)
    assert result["any"] == (True, False)


def test_a_dead_rank_fails_instead_of_hanging(pool):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        pool.run(2, divmod, 1, 0)
    assert len(pool.run(2, every_collective)) == 2
