"""Tasks for the processes of `ranks.py`."""

import runpy
import sys
import time
from pathlib import Path

import torch

from neuclip.cli import terminal
from neuclip.cli.app import main
from neuclip.errors import OtherProcessFailed, UserError
from neuclip.parallel import collectives, process_group
from neuclip.parallel.process_group import WaitLimits
from neuclip.parallel.rank_consistency import check_same
from neuclip.parallel.work_sharing import from_main, in_turn, once_per_machine
from tiny_models import VIT

STEP = 0.02


def steps(limits: WaitLimits, count: int, at: dict[tuple[int, int], str] | None = None) -> int:
    """Runs steps with a collective each; `at` maps (rank, step) to an event there."""
    torch.set_num_threads(1)
    try:
        with process_group.open_process_group(torch.device("cpu"), limits) as launch:
            for step in range(count):
                print("step", step)
                _act((at or {}).get((launch.rank, step), ""))
                total = collectives.sum_over_ranks(torch.ones(4))
                assert total[0] == launch.world_size
                time.sleep(STEP)
    except UserError as error:
        terminal.say(str(error))
        return 2
    except OtherProcessFailed:
        return 1
    print("finished")
    return 0


def _act(what: str) -> None:
    kind, _, rest = what.partition(" ")
    if kind == "raise":
        raise ValueError(rest)
    if kind == "refuse":
        raise UserError(rest)
    if kind == "sleep":
        time.sleep(float(rest))
    if kind == "wait":
        collectives.barrier()


def slow_main(limits: WaitLimits, seconds: float) -> int:
    """Rank 0 works for long, as if indexing data; the others wait for it."""
    with process_group.open_process_group(torch.device("cpu"), limits):

        def make() -> str:
            time.sleep(seconds)
            return "made by the main process"

        print(from_main(make))
    return 0


def open_in_turn(limits: WaitLimits, folder: Path) -> int:
    """Prints the ranks that had their turn before this one; then one rank of two fails for all."""
    with process_group.open_process_group(torch.device("cpu"), limits) as launch:

        def work() -> list[str]:
            before = sorted(path.name for path in folder.iterdir())
            (folder / str(launch.rank)).touch()
            return before

        print("before:", *in_turn(work))

        def once() -> None:
            (folder / f"once {launch.rank}").touch()
            if launch.rank == 2:
                raise UserError("no room on the second machine")

        try:
            once_per_machine(once)
        except UserError as error:
            print(error)
    return 0


def disagree(limits: WaitLimits, mine: list[dict[str, str]]) -> int:
    """Compares one dict per process."""
    try:
        with process_group.open_process_group(torch.device("cpu"), limits) as launch:
            check_same(mine[launch.rank])
    except UserError as error:
        terminal.say(str(error))
        return 2
    except OtherProcessFailed:
        return 1
    return 0


def neuclip_train(flags: list[str], dtype: str = "float64") -> int:
    """`neuclip train`, in float64: another order of a sum changes it by 1e-16 only."""
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, dtype))
    return main(["train", "--model", VIT, *flags])


def datacomp(words: list[str]) -> None:
    """`python -m neuclip.evaluation.datacomp`."""
    torch.set_num_threads(1)
    sys.argv[1:] = words
    runpy.run_module("neuclip.evaluation.datacomp", run_name="__main__")
