"""Random state of one process; tests/distributed/test_consistency_of_ranks.py has several."""

import torch

from neuclip.checkpoint.rng import random_state, restore_random_state

CPU = torch.device("cpu")


def drawn(saved, seed=0):
    torch.manual_seed(123)
    restore_random_state(saved, CPU, seed)
    return torch.rand(3)


def test_the_numbers_continue():
    saved = random_state(CPU)
    wanted = torch.rand(3)
    assert saved["rngs"].shape[0] == 1
    assert torch.equal(drawn(saved), wanted)
    older = {key: saved[key] for key in ("rng", "cuda_rng")}  # before all processes were saved
    assert torch.equal(drawn(older), wanted)
