"""The random numbers of a run's processes, saved and continued."""

from typing import Any

import torch
from torch import Tensor

from neuclip.parallel import collectives


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of all processes' generators; all call this together.

    Returns:
        `rng` and `cuda_rng` of the first process; `rngs` and `cuda_rngs` of all [processes, bytes].
    """
    states = {"rng": torch.get_rng_state(), "cuda_rng": None}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state()
    return states | {f"{name}s": _of_all(state, device) for name, state in states.items()}


def _of_all(state: Tensor | None, device: torch.device) -> Tensor | None:
    if state is None:
        return None
    states = collectives.gather_constant(state.to(device))
    return states.view(collectives.world_size(), -1).cpu()


def restore_random_state(saved: dict[str, Any], device: torch.device, seed: int) -> None:
    """Continues the generators.

    With another number of processes than saved, the first continues, and the others begin anew.

    Args:
        saved: what `random_state` returned; `rng` and `cuda_rng` alone, in older checkpoints.
        device: where the run computes.
        seed: of the generators that begin anew; another one for each step.
    """
    rank, anew = collectives.rank(), False
    for name in ("rng", "cuda_rng"):
        all_states: Tensor | None = saved.get(f"{name}s")
        if all_states is not None and len(all_states) == collectives.world_size():
            state = all_states[rank].clone()  # torch reads from the start of the memory
        elif rank == 0:
            state = saved[name]
        else:
            anew = anew or name == "rng"
            continue
        if name == "rng":
            torch.set_rng_state(state)
        elif state is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state)
    if anew:
        torch.manual_seed(seed + rank)
