"""Checks that each rank of the pool makes with values of its own."""

from collections.abc import Callable
from typing import Any

import torch

from neuclip.checkpoint.rng import random_state, restore_random_state
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.parallel import collectives
from neuclip.parallel.rank_consistency import check_same, check_same_data, check_same_program

CPU = torch.device("cpu")


def checks() -> dict[str, str | None]:
    """The error of each check on this rank, if it has one."""
    rank = collectives.rank()

    def program(tree: dict[str, Any]) -> None:
        check_same_program(validate(tree, "the test").model_dump(mode="json"))

    cases: dict[str, Callable[[], None]] = {
        "equal": lambda: program({"seed": 4}),
        "seed": lambda: program({"seed": 4 * rank}),
        "cache": lambda: program({"data": {"cache_dir": f"/scratch/{rank}"}}),
        "data": lambda: check_same_data(10 - rank, "abc", f"files {rank}"),
        "many": lambda: check_same({str(n): str(rank) for n in range(8)}),
    }
    return {name: _error(check) for name, check in cases.items()}


def _error(check: Callable[[], None]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None


def draws(saved: dict[str, Any] | None, seed: int) -> tuple[dict[str, Any], torch.Tensor]:
    """The random state of all ranks, and this rank's next numbers.

    Args:
        saved: restored first, with `seed`; none: each rank seeds with its own rank.
        seed: for ranks without a saved state.
    """
    torch.manual_seed(100 + collectives.rank())
    if saved is not None:
        torch.manual_seed(12345)
        restore_random_state(saved, CPU, seed)
    return random_state(CPU), torch.rand(3)
