"""Buffers with one row per prototype or pool slot, of which each rank holds a contiguous shard.

Rows lie along axis 1. `state_dict` holds the full buffers whatever the number of ranks, so a state
loads with another number. With several ranks all of them must call it: the shards are gathered.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout, Slice


@dataclass(frozen=True)
class RowShard:
    """The rows that this rank holds.

    Attributes:
        size: rows over all ranks.
        owned: this rank's rows.
        setting: the user's name of `size`, for messages.
    """

    size: int
    owned: Slice
    setting: str = "num_prototypes"

    @classmethod
    def of(cls, size: int, owned: Slice | None, setting: str = "num_prototypes") -> "RowShard":
        """The given rows, or this rank's even share of all.

        Raises:
            UserError: there are fewer rows than ranks.
        """
        if owned is not None:
            return cls(size, owned, setting)
        if size < collectives.world_size():
            raise UserError(
                f"{setting} {size} is below the number of processes ({collectives.world_size()}), "
                "each of which keeps a share of them"
            )
        return cls(size, collectives.owned_slice(size), setting)

    def __len__(self) -> int:
        return len(self.owned)

    @property
    def is_full(self) -> bool:
        """Whether this rank holds all rows."""
        return len(self.owned) == self.size

    def gather(self, local: Tensor) -> Tensor:
        """All rows, from the ranks' shards."""
        return local if self.is_full else collectives.gather_slices(local, self.size, axis=1)

    def local(self, full: Tensor) -> Tensor:
        """This rank's rows of all."""
        return full[:, self.owned.start : self.owned.stop]

    def sum(self, value: Tensor) -> Tensor:
        """Sum of what the ranks computed from their shards, in place."""
        return value if self.is_full else collectives.sum_over_ranks(value)

    def max(self, value: Tensor) -> Tensor:
        """Elementwise maximum of what the ranks computed from their shards, in place."""
        return value if self.is_full else collectives.max_over_ranks(value)

    def logsumexp(self, value: Tensor, bound: Tensor) -> Tensor:
        """Log of the sum of the ranks' exp(value): see `collectives.logsumexp_over_ranks`."""
        return value if self.is_full else collectives.logsumexp_over_ranks(value, bound)

    def scatter_sum(self, value: Tensor, layout: BatchLayout) -> Tensor:
        """The rows of this rank's pairs (axis 0) of the sum over the ranks' shards."""
        if self.is_full:
            return value.narrow(0, layout.start, layout.sizes[layout.rank])
        return collectives.scatter_sum(value, layout)

    def window(self, first: int, count: int) -> list[tuple[int, slice]]:
        """This rank's part of `count` rows from row `first` on, with wrap-around.

        Returns:
            Pieces (position within the window, local rows). They are slices because an index
            tensor would be copied to the device at every step.
        """
        pieces: list[tuple[int, slice]] = []
        position = 0
        while position < count:
            row = (first + position) % self.size
            length = min(count - position, self.size - row)
            start = max(row, self.owned.start)
            stop = min(row + length, self.owned.stop)
            if start < stop:
                local = slice(start - self.owned.start, stop - self.owned.start)
                pieces.append((position + start - row, local))
            position += length
        return pieces


@runtime_checkable
class Sharded(Protocol):
    """A module with sharded buffers."""

    shard: RowShard


def keep_full_in_state(module: nn.Module, names: tuple[str, ...]) -> None:
    """Makes `state_dict` hold all rows of these buffers, and `load_state_dict` keep the shard.

    Buffers that are none are left out.
    The module is `Sharded`: its shard at the time of the call counts.
    """
    module.register_state_dict_post_hook(partial(_gather, names))
    module.register_load_state_dict_pre_hook(partial(_scatter, names))


@contextmanager
def gathered_rows(module: Sharded, *names: str) -> Generator[None]:
    """Inside, the named buffers hold all rows on every rank; all ranks enter together."""
    shard, local = module.shard, {name: getattr(module, name) for name in names}
    for name, value in local.items():
        setattr(module, name, shard.gather(value))
    module.shard = RowShard(shard.size, Slice(0, shard.size), shard.setting)
    try:
        yield
    finally:
        module.shard = shard
        for name, value in local.items():
            setattr(module, name, value)


def _gather(
    names: tuple[str, ...],
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    _metadata: object,
) -> None:
    """After `state_dict`: puts all rows in place of this rank's."""
    assert isinstance(module, Sharded)
    for key in (prefix + name for name in names):
        if key in state:
            state[key] = module.shard.gather(state[key])


def _scatter(
    names: tuple[str, ...],
    module: nn.Module,
    state: dict[str, Any],
    prefix: str,
    *_: object,
) -> None:
    """Before `load_state_dict`: keeps this rank's rows.

    Raises:
        UserError: the saved state has another number of rows.
    """
    assert isinstance(module, Sharded)
    shard = module.shard
    for key in (prefix + name for name in names):
        if key not in state:
            continue
        saved = state[key].shape[1]
        if saved != shard.size:
            raise UserError(
                f"the saved state has {saved} prototypes, this loss has {shard.size}: "
                f"create it with {shard.setting}={saved}"
            )
        state[key] = shard.local(state[key])
