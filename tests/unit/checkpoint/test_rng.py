import torch

from neuclip.checkpoint.rng import random_state, restore_random_state
from neuclip.parallel import collectives

CPU = torch.device("cpu")


def drawn(saved, seed=0):
    torch.manual_seed(123)
    restore_random_state(saved, CPU, seed)
    return torch.rand(3)


def test_the_numbers_go_on():
    saved = random_state(CPU)
    wanted = torch.rand(3)
    assert saved["rngs"].shape[0] == 1
    assert torch.equal(drawn(saved), wanted)
    older = {key: saved[key] for key in ("rng", "cuda_rng")}  # before all processes were saved
    assert torch.equal(drawn(older), wanted)


def test_of_several_processes_each_has_its_own(monkeypatch):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    saved = {"rng": states[0], "cuda_rng": None, "rngs": torch.stack(states), "cuda_rngs": None}
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    assert torch.equal(drawn(saved), torch.rand(3, generator=torch.Generator().manual_seed(2)))
    monkeypatch.setattr(collectives, "world_size", lambda: 3)  # another number: begins anew
    expected = torch.rand(3, generator=torch.Generator().manual_seed(8))
    assert torch.equal(drawn(saved, seed=7), expected)
    monkeypatch.setattr(collectives, "rank", lambda: 0)
    assert torch.equal(drawn(saved), torch.rand(3, generator=torch.Generator().manual_seed(1)))
