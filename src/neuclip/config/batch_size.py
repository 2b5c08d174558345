"""How many pairs a step has, and what each process takes of them. Imports no torch."""

from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError


def share_batch(config: RunConfig, processes: int, before: RunConfig | None = None) -> RunConfig:
    """The run as each of `processes` takes part in it: with `global_batch_size` and its share.

    A run that continues with another number of processes keeps its global batch: its samples, order
    and schedules stay the same, and each process takes more or less of them. It still takes at most
    `batch_size` at a time, so that the memory that was enough stays enough.

    Args:
        config: as it was asked for.
        processes: how many there are now.
        before: as the run that is continued was asked for.

    Raises:
        UserError: the processes cannot take equal shares; says how many could.
    """
    data = config.data
    total = data.global_batch_size
    if total is None and before is not None and _sizes(before) == _sizes(config):
        total = before.data.global_batch_size
    if total is None:
        total = data.batch_size * data.accum_freq * processes
    if total % processes:
        raise UserError(
            f"a step of {total} pairs (--global-batch-size, or that of the run which is continued) "
            f"cannot be shared equally by {processes} processes; {_sharers(total, processes)} can"
        )
    micro = _micro_batch(total // processes, data.batch_size)
    update = {
        "batch_size": micro,
        "accum_freq": total // processes // micro,
        "global_batch_size": total,
    }
    return config.model_copy(update={"data": data.model_copy(update=update)})


def _sizes(config: RunConfig) -> tuple[int, int]:
    return config.data.batch_size, config.data.accum_freq


def _micro_batch(share: int, most: int) -> int:
    """The largest part of a share that divides it; the share where only single pairs would."""
    return max((size for size in range(2, most + 1) if share % size == 0), default=share)


def _sharers(total: int, near: int) -> str:
    """The numbers of processes nearest to `near`, at most five, that divide a batch."""
    divisors = [number for number in range(1, 2 * near + 1) if total % number == 0]
    nearest = sorted(sorted(divisors, key=lambda number: abs(number - near))[:5])
    return ", ".join(map(str, nearest))


def describe_step(config: RunConfig, processes: int) -> str:
    """A step's batch and its factors, in words; `config` is shared out."""
    data = config.data
    return f"{data.global_batch_size} = {factors(data.batch_size, data.accum_freq, processes)}"


def factors(batch_size: int, accum_freq: int, processes: int) -> str:
    """What makes up a step's batch, in words."""
    parts = f" x {accum_freq} micro-batches" if accum_freq > 1 else ""
    return f"{batch_size}{parts} x {processes} processes"
