"""State per sample: the numbers that a method keeps for every pair of the data, by stable id.

Every rank keeps the whole table, and all ranks write the same values: ids and values of a global
batch are gathered first. If an id occurs twice in a global batch, both occurrences read the values
of before the batch, and the last occurrence (in rank order, then batch order) is kept.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout


class SampleTable(nn.Module):
    """Numbers per sample, in float32: `len(fills)` rows of `num_samples`.

    Args:
        num_samples: ids run from 0 to num_samples - 1.
        fills: for each row, the value of samples that have not been written.
    """

    values: Tensor

    def __init__(self, num_samples: int, fills: tuple[float, ...]) -> None:
        super().__init__()
        self.num_samples = num_samples
        self._checked = False
        values = torch.empty(len(fills), num_samples, dtype=torch.float32)
        for row, fill in zip(values, fills, strict=True):
            row.fill_(fill)
        self.register_buffer("values", values)
        self.register_load_state_dict_pre_hook(_check_size)

    def check(self, sample_ids: Int64[Tensor, " local"]) -> None:
        """Checks the bounds of ids: on the CPU at every call, on other devices at the first.

        Raises:
            UserError: an id is out of range; the message has the first such id.
        """
        if sample_ids.device.type != "cpu" and self._checked:
            return
        self._checked = True
        bad = (sample_ids < 0) | (sample_ids >= self.num_samples)
        if bool(bad.any()):
            position = int(bad.nonzero()[0])
            raise UserError(
                f"sample_ids: {int(bad.sum())} of {len(bad)} are out of range, the first is "
                f"{int(sample_ids[position])} at position {position}; with num_samples="
                f"{self.num_samples} (--data-size) ids run from 0 to {self.num_samples - 1}"
            )

    def read(self, sample_ids: Int64[Tensor, " local"]) -> Float[Tensor, "rows local"]:
        """Returns a copy of the samples' numbers."""
        return self.values[:, sample_ids.to(self.values.device, non_blocking=True)]

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
    """Before `load_state_dict`: checks the size.

    Raises:
        UserError: the saved table has another size.
    """
    assert isinstance(module, SampleTable)
    saved = state.get(prefix + "values")
    if saved is not None and saved.shape != module.values.shape:
        raise UserError(
            f"the saved state has a table {list(saved.shape)} (rows, samples), this loss has "
            f"{list(module.values.shape)}: it belongs to other data or another method"
        )
