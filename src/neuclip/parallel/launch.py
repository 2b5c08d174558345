"""What the launcher (torchrun, or Slurm's srun) told this process. Imports no torch."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from neuclip.errors import UserError

log = logging.getLogger("neuclip")

_SHELL_STEPS = 4_294_967_280
"""Slurm numbers its own steps (batch script, interactive shell) from here: no srun's."""


@dataclass(frozen=True)
class Launch:
    """One process among those that were started together.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
        local_rank: its number on its machine.
    """

    rank: int
    world_size: int
    local_rank: int


ALONE = Launch(0, 1, 0)


def launch_environment() -> Launch:
    """Reads the launcher's variables; a process started by hand is rank 0 of 1.

    Raises:
        UserError: a variable is missing, is no number, or contradicts another.
    """
    environ = os.environ
    if "WORLD_SIZE" in environ:
        return _read(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    # A step may have fewer processes than its job: srun says both.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if environ.get(size, "1") == "1":
        return ALONE
    if _is_job_shell(environ):
        log.warning(
            "the Slurm job has %s tasks, but this process was not started by srun: it runs alone. "
            "Write `srun` before the command to run it on all of them",
            environ[size],
        )
        return ALONE
    return _read(environ, "SLURM_PROCID", size, "SLURM_LOCALID")


def _is_job_shell(environ: Mapping[str, str]) -> bool:
    """Whether this is the job script's or an salloc's shell, which see the job's variables too."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if step is None:
        return environ.get("ENVIRONMENT") == "BATCH" or "SLURM_PROCID" not in environ
    return step.isdigit() and int(step) >= _SHELL_STEPS


def _read(environ: Mapping[str, str], rank: str, size: str, local: str) -> Launch:
    names = (rank, size, local)
    try:
        launch = Launch(*(int(environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete: {', '.join(names)} must all be numbers "
            f"({error})"
        ) from None
    if launch.world_size < 1 or not 0 <= launch.rank < launch.world_size:
        raise UserError(
            f"{rank} is {launch.rank} and {size} is {launch.world_size}: processes are numbered "
            f"from 0 to {size} - 1. Start them with torchrun or srun, which set both, or unset both"
        )
    if launch.local_rank < 0:
        raise UserError(f"{local} is {launch.local_rank}: it counts a machine's processes from 0")
    return launch


def meeting_point(launch: Launch) -> tuple[str, int]:
    """Host and port at which the processes meet: MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: one is missing, or the port is no port.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"{launch.world_size} processes were started, but {' and '.join(missing)} is not set. "
            "torchrun sets them; under srun the job script does:\n"
            '  export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
            "  export MASTER_PORT=12805"
        )
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"MASTER_PORT {port!r} is no port: a number from 1024 to 65535 is right")
    return host, int(port)


def under_torchrun() -> bool:
    """Whether torchrun looks after the processes of this machine."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def here() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()
