"""The batch of a step and each rank's share of it. Imports no torch."""

from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError, quantity


def share_batch(config: RunConfig, processes: int, before: RunConfig | None = None) -> RunConfig:
    """Fills in the global batch, and each rank's micro-batches.

    A run that continues with another number of processes keeps its global batch, and with it its
    samples, order and schedules. A rank still holds at most `batch_size` pairs at a time, so the
    memory that was enough stays enough.

    Args:
        config: the settings as asked for.
        processes: number of ranks now.
        before: the settings of the run that is continued.

    Raises:
        UserError: the ranks cannot take equal shares; lists numbers that can.
    """
    data = config.data
    total = data.global_batch_size
    if total is None and before is not None and _sizes(before) == _sizes(config):
        total = before.data.global_batch_size
    if total is None:
        total = data.batch_size * data.accum_freq * processes
    if total % processes:
        raise UserError(
            f"a step of {total} pairs (--global-batch-size, or the continued run's) "
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
    """The largest divisor of a share up to `most`; the whole share if only 1 divides it."""
    return max((size for size in range(2, most + 1) if share % size == 0), default=share)


def _sharers(total: int, near: int) -> str:
    """Up to five numbers of processes nearest to `near` that divide a batch."""
    divisors = [number for number in range(1, 2 * near + 1) if total % number == 0]
    nearest = sorted(sorted(divisors, key=lambda number: abs(number - near))[:5])
    return ", ".join(map(str, nearest))


def describe_step(config: RunConfig, processes: int) -> str:
    """A step's batch and its factors, in words; `config` is resolved."""
    data = config.data
    return f"{data.global_batch_size} = {factors(data.batch_size, data.accum_freq, processes)}"


def check_epoch(samples: int, global_batch: int, factors: str) -> None:
    """Checks that an epoch has a step.

    Args:
        samples: in an epoch.
        global_batch: pairs in a step over all ranks.
        factors: of the global batch, in words.

    Raises:
        UserError: an epoch has fewer samples than one global batch.
    """
    if samples < global_batch:
        raise UserError(
            f"an epoch of {quantity(samples, 'sample')} is less than one global batch of "
            f"{global_batch} ({factors}): lower --batch-size, or add data"
        )


def factors(batch_size: int, accum_freq: int, processes: int) -> str:
    """The factors of a step's batch, in words."""
    parts = f" x {accum_freq} micro-batches" if accum_freq > 1 else ""
    return f"{batch_size}{parts} x {quantity(processes, 'process')}"
