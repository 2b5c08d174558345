"""Ranks compare settings and data, and each continues its own random numbers."""

import socket

import pytest
import torch
from consistency_tasks import checks, draws

pytestmark = pytest.mark.distributed


def test_differences_are_named_on_every_rank(pool):
    first, second = pool.run(2, checks)
    assert first == second
    host = socket.gethostname()
    assert first["equal"] is None
    assert first["cache"] is None  # machines may have their own
    assert f"setting seed: 0 on process 0 ({host}); 4 on process 1 ({host})" in first["seed"]
    assert f"number of samples: 10 on process 0 ({host}); 9 on process 1" in first["data"]
    assert first["many"].endswith("and 3 more")


def test_each_rank_continues_its_own_random_numbers(pool):
    before = pool.run(2, draws, None, 0)
    saved = before[0][0]
    assert not torch.equal(before[0][1], before[1][1])
    for (_, expected), (_, numbers) in zip(before, pool.run(2, draws, saved, 7), strict=True):
        assert torch.equal(numbers, expected)
    # With another number of ranks the first continues, and the others start from the seed.
    three = [numbers for _, numbers in pool.run(3, draws, saved, 7)]
    assert torch.equal(three[0], before[0][1])
    for rank in (1, 2):
        fresh = torch.rand(3, generator=torch.Generator().manual_seed(7 + rank))
        assert torch.equal(three[rank], fresh)
