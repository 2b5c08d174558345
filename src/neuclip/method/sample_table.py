"""State per sample: the numbers that a method keeps for every pair of the data, by stable id.

Every rank keeps the whole table, and all ranks write the same values: ids and values of a global
batch are gathered first. If an id occurs twice in a global batch, both occurrences read the values
of before the batch, and the last occurrence (in rank order, then batch order) is kept.

A table without a given number of samples grows with the ids seen, to the next power of two above
the largest of all ranks. Its numbers are those of a table that was large enough from the start.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout

MAX_GROWN = 2**28
"""The largest number of samples without `num_samples`: ids beyond are hashes, not numbers."""


class SampleTable(nn.Module):
    """Numbers per sample, in float32: `len(fills)` rows of `num_samples`.

    Args:
        num_samples: ids run from 0 to num_samples - 1; none: the table grows with the ids seen.
        fills: for each row, the value of samples that have not been written.
    """

    values: Tensor

    def __init__(self, num_samples: int | None, fills: tuple[float, ...]) -> None:
        super().__init__()
        self.fills = fills
        self.grows = num_samples is None
        self._checked = False
        self.register_buffer("values", torch.empty(len(fills), 0, dtype=torch.float32))
        self._enlarge(num_samples or 0)
        self.register_load_state_dict_pre_hook(_check_size)

    @property
    def num_samples(self) -> int:
        """The samples that have a place in the table."""
        return self.values.shape[1]

    def admit(self, sample_ids: Int64[Tensor, " local"]) -> None:
        """Before a training batch: checks the ids, and makes room for new ones.

        All ranks call it together. A growing table reads the largest id, which waits for a device
        that holds the ids.

        Raises:
            UserError: an id is out of range.
        """
        self.check(sample_ids)
        if not self.grows:
            return
        largest = sample_ids.max().to(self.values.device)
        needed = int(collectives.max_over_ranks(largest)) + 1
        if needed > MAX_GROWN:
            raise UserError(
                f"sample_ids: the largest is {needed - 1:,}; a table of that many samples is not "
                f"made without num_samples={needed}: number the pairs 0, 1, 2, ..., such as by "
                "their position in the data"
            )
        if needed > self.num_samples:
            self._enlarge(1 << (needed - 1).bit_length())

    def _enlarge(self, num_samples: int) -> None:
        """Adds samples that have not been written."""
        old = self.values
        self.values = old.new_empty(len(self.fills), num_samples)
        self.values[:, : old.shape[1]] = old
        for row, fill in zip(self.values, self.fills, strict=True):
            row[old.shape[1] :].fill_(fill)

    def check(self, sample_ids: Int64[Tensor, " local"]) -> None:
        """Checks the bounds of ids: on the CPU at every call, on other devices at the first.

        Raises:
            UserError: an id is out of range; the message has the first such id.
        """
        if sample_ids.device.type != "cpu" and self._checked:
            return
        self._checked = True
        bad = sample_ids < 0
        if not self.grows:
            bad |= sample_ids >= self.num_samples
        if bool(bad.any()):
            position = int(bad.nonzero()[0])
            if self.grows:
                raise UserError(
                    f"sample_ids: {int(bad.sum())} of {len(bad)} are negative, the first is "
                    f"{int(sample_ids[position])} at position {position}; ids run from 0"
                )
            raise UserError(
                f"sample_ids: {int(bad.sum())} of {len(bad)} are out of range, the first is "
                f"{int(sample_ids[position])} at position {position}; with num_samples="
                f"{self.num_samples} (--data-size) ids run from 0 to {self.num_samples - 1}"
            )

    def read(self, sample_ids: Int64[Tensor, " local"]) -> Float[Tensor, "rows local"]:
        """Returns a copy of the samples' numbers; those of unwritten samples are the fills."""
        ids = sample_ids.to(self.values.device, non_blocking=True)
        if not self.grows:
            return self.values[:, ids]
        fills = self.values.new_tensor(self.fills)[:, None]
        if self.num_samples == 0:
            return fills.expand(-1, len(ids))
        known = self.values[:, ids.clamp_max(self.num_samples - 1)]
        return torch.where(ids < self.num_samples, known, fills)

    @torch.no_grad()
    def write(
        self,
        sample_ids: Int64[Tensor, " local"],
        values: Float[Tensor, "rows local"],
        layout: BatchLayout,
    ) -> None:
        """Writes the numbers of the global batch's samples, on all ranks.

        Args:
            sample_ids: ids of this rank's samples.
            values: numbers of this rank's samples.
            layout: how the global batch is split over ranks.
        """
        local_ids = sample_ids.to(self.values.device, non_blocking=True)
        ids = collectives.gather_constant(local_ids, layout)
        all_values = collectives.gather_constant(values.T.to(self.values.dtype), layout).T
        ordered, order = torch.sort(ids, stable=True)
        # Every occurrence of an id writes the values of the last one: any order of writes will do.
        last = order[torch.searchsorted(ordered, ids, right=True) - 1]
        self.values[:, ids] = all_values[:, last]


def _check_size(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: checks the size; a growing table takes the saved one.

    Raises:
        UserError: the saved table has another size.
    """
    assert isinstance(module, SampleTable)
    saved = state.get(prefix + "values")
    if saved is None:
        return
    if module.grows and len(saved) == len(module.fills):
        module.values = module.values.new_empty(saved.shape)
    if saved.shape != module.values.shape:
        raise UserError(
            f"the saved state has a table {list(saved.shape)} (rows, samples), this loss has "
            f"{list(module.values.shape)}: it belongs to other data or another method"
        )
