"""Reads the environment that torchrun or Slurm's srun sets for a process. Imports no torch."""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from neuclip.errors import UserError
from neuclip.untrusted import whole_number

log = logging.getLogger("neuclip")

_SHELL_STEPS = 4_294_967_280
"""Slurm reserves step ids from here on for its own steps (batch script, interactive shell)."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among the processes of its run.

    Attributes:
        rank: of this process, from 0.
        world_size: number of processes.
        local_rank: rank among the processes of this machine, from 0.
    """

    rank: int
    world_size: int
    local_rank: int


ALONE = Launch(0, 1, 0)


def launch_environment() -> Launch:
    """Reads the launcher's variables; without a launcher, the process is rank 0 of 1.

    Raises:
        UserError: a variable is missing, is not an integer, or contradicts another.
    """
    environ = os.environ
    if "WORLD_SIZE" in environ:
        return _read(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
    # A job step may have fewer processes than its job; srun sets both sizes.
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if environ.get(size, "1") == "1":
        return ALONE
    if _is_job_shell(environ):
        log.warning(
            "the Slurm job has %s tasks, but srun did not start this process: it runs alone. Put "
            "`srun` in front of the command to run it as all tasks",
            environ[size],
        )
        return ALONE
    return _read(environ, "SLURM_PROCID", size, "SLURM_LOCALID")


def _is_job_shell(environ: Mapping[str, str]) -> bool:
    """Whether this is the shell of a job script or of salloc, which have the variables too."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID"))
    if step is None:
        return environ.get("ENVIRONMENT") == "BATCH" or "SLURM_PROCID" not in environ
    return (whole_number(step) or 0) >= _SHELL_STEPS


def _read(environ: Mapping[str, str], rank: str, size: str, local: str) -> Launch:
    names = (rank, size, local)
    try:
        launch = Launch(*(int(environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete: {', '.join(names)} must all be integers "
            f"({error})"
        ) from None
    if launch.world_size < 1 or not 0 <= launch.rank < launch.world_size:
        raise UserError(
            f"{rank} is {launch.rank} and {size} is {launch.world_size}: ranks go from 0 to {size} "
            "- 1. Start the processes with torchrun or srun, which set both, or unset both"
        )
    if launch.local_rank < 0:
        raise UserError(f"{local} is {launch.local_rank}: local ranks start at 0")
    return launch


def rendezvous_address(launch: Launch) -> tuple[str, int]:
    """Reads MASTER_ADDR and MASTER_PORT, where the processes of a run find each other.

    Raises:
        UserError: one is missing, or the port is invalid.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"the run has {launch.world_size} processes, but {' and '.join(missing)} is not set. "
            "torchrun sets them; under srun the job script does:\n"
            '  export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
            "  export MASTER_PORT=12805"
        )
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    number = whole_number(port)
    if number is None or not 0 < number < 2**16:
        raise UserError(f"MASTER_PORT must be an integer between 1 and 65535, got {port!r}")
    return host, number


def under_torchrun() -> bool:
    """Whether torchrun supervises this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def hostname() -> str:
    """This machine's name, for messages."""
    return socket.gethostname()
