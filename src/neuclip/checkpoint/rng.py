"""Saves and restores the random number generators of all ranks."""

from typing import Any

import torch
from torch import Tensor

from neuclip.parallel import collectives


def random_state(device: torch.device) -> dict[str, Any]:
    """Gathers the generator states of all ranks; a collective call.

    Returns:
        `rng` and `cuda_rng` of the first rank; `rngs` and `cuda_rngs` of all ranks [ranks, bytes].
    """
    states = {"rng": torch.get_rng_state(), "cuda_rng": None}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state()
    return states | {f"{name}s": _gather(state, device) for name, state in states.items()}


def _gather(state: Tensor | None, device: torch.device) -> Tensor | None:
    if state is None:
        return None
    states = collectives.gather_constant(state.to(device))
    return states.view(collectives.world_size(), -1).cpu()


def restore_random_state(saved: dict[str, Any], device: torch.device, seed: int) -> None:
    """Restores the generators.

    If the number of ranks has changed, only the first rank continues its generator; the others are
    seeded with `seed` plus their rank.

    Args:
        saved: result of `random_state`; only `rng` and `cuda_rng` in older checkpoints.
        device: where the run computes.
        seed: for generators that cannot continue; should differ from step to step.
    """
    rank, reseed = collectives.rank(), False
    for name in ("rng", "cuda_rng"):
        all_states: Tensor | None = saved.get(f"{name}s")
        if all_states is not None and len(all_states) == collectives.world_size():
            state = all_states[rank].clone()  # torch reads from the start of the memory
        elif rank == 0:
            state = saved[name]
        else:
            reseed = reseed or name == "rng"
            continue
        if name == "rng":
            torch.set_rng_state(state)
        elif state is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state)
    if reseed:
        torch.manual_seed(seed + rank)
