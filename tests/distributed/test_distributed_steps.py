"""K processes with micro-batches equal one process with the full batch."""

import pytest
import torch
from step_tasks import (
    distill_in_micro_batches,
    infinity_on_one_rank,
    settle,
    train_in_micro_batches,
    train_low_rank_updates,
)

from neuclip.catalogue.registry import METHODS
from supervised_steps import supervise

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_two_processes_equal_one_batch(pool, method):
    ranks = pool.run(2, train_in_micro_batches, method, 2)
    alone = train_in_micro_batches(method, 12)
    assert len(alone.gradients) == 3
    for step, gradients in enumerate(alone.gradients):
        mean = torch.stack([rank.losses[step] for rank in ranks]).mean()
        torch.testing.assert_close(mean, alone.losses[step], rtol=1e-9, atol=1e-11)
        for rank in ranks:
            assert rank.gradients[step].keys() == gradients.keys()
            for name, expected in gradients.items():
                torch.testing.assert_close(
                    rank.gradients[step][name], expected, rtol=1e-8, atol=1e-11, msg=name
                )
    for rank in ranks:
        torch.testing.assert_close(rank.weights, alone.weights, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["openclip", "fastclip_v3", "neuclip"])
def test_all_ranks_skip_a_step_that_is_not_finite_on_one(pool, method):
    ranks = pool.run(2, infinity_on_one_rank, method)
    problems = [rank[0] for rank in ranks]
    assert problems == [
        ["the loss is not finite on another process", None],
        ["image_features: 1 of 6 rows are not finite, the first is row 2", None],
    ]
    assert [rank[1:] for rank in ranks] == [(True, True)] * 2


@pytest.mark.parametrize("method", ["rgcl_batch", "neuclip_pool"])
def test_a_warm_start_of_two_processes_equals_one(pool, method):
    rho, moment = settle(method, 12)
    for found in pool.run(2, settle, method, 3):
        torch.testing.assert_close(found, (rho, moment), rtol=1e-8, atol=1e-12)


def test_a_token_head_of_two_processes_equals_that_of_one(pool):
    losses, towers, head = supervise(12)
    ranks = pool.run(2, supervise, 3)
    for step, value in enumerate(losses):
        mean = torch.stack([rank[0][step] for rank in ranks]).mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-9, atol=1e-11)
    for _, found, found_head in ranks:
        torch.testing.assert_close(found, towers, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found_head, head, rtol=1e-8, atol=1e-10)
    assert head["captions"] == 36


def test_distillation_of_two_processes_equals_one(pool):
    values, weights = distill_in_micro_batches(12)
    ranks = pool.run(2, distill_in_micro_batches, 3)
    for step, value in enumerate(values):
        mean = torch.stack([rank[0][step] for rank in ranks]).mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-9, atol=1e-11)
    assert values[0][1] > 1e-4  # the teacher is another model
    for _, found in ranks:
        torch.testing.assert_close(found, weights, rtol=1e-8, atol=1e-10)


def test_low_rank_updates_of_two_processes_equal_those_of_one(pool):
    alone = train_low_rank_updates(12)
    updates = [value for name, value in alone.items() if ".up." in name]
    assert all(update.abs().max() > 1e-3 for update in updates)
    assert updates
    for found in pool.run(2, train_low_rank_updates, 3):
        torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-9)
