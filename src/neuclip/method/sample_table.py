"""State per sample, by stable id: what methods with a memory keep of every pair of the data.

Every rank keeps the whole table, and all ranks write the same values: ids and values of a global
batch are gathered first. An id that occurs twice in a global batch is read as it was before the
batch by both, and its last occurrence (in rank order, then batch order) is what is kept.
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
        fills: for each row, what samples hold before they were first written.
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
        """Bounds of the ids: at every call for ids on the CPU, at the first for others.

        Raises:
            UserError: names the first id out of range.
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
        """The samples' numbers, a copy."""
        return self.values[:, sample_ids.to(self.values.device, non_blocking=True)]

    @torch.no_grad()
    def write(
        self,
        sample_ids: Int64[Tensor, " local"],
        values: Float[Tensor, "rows local"],
        layout: BatchLayout,
    ) -> None:
        """Keeps the numbers of the global batch's samples, on all ranks.

        Args:
            sample_ids: this rank's.
            values: theirs.
            layout: the number of samples of each rank.
        """
        local_ids = sample_ids.to(self.values.device, non_blocking=True)
        ids = collectives.gather_constant(local_ids, layout)
        whole = collectives.gather_constant(values.T.to(self.values.dtype), layout).T
        ordered, order = torch.sort(ids, stable=True)
        # Every occurrence of an id writes what its last one says: the order of writing is free.
        last = order[torch.searchsorted(ordered, ids, right=True) - 1]
        self.values[:, ids] = whole[:, last]


def _check_size(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before `load_state_dict`.

    Raises:
        UserError: the saved table is of another size.
    """
    assert isinstance(module, SampleTable)
    saved = state.get(prefix + "values")
    if saved is not None and saved.shape != module.values.shape:
        raise UserError(
            f"the saved state has a table {list(saved.shape)} (rows, samples), this loss has "
            f"{list(module.values.shape)}: it belongs to other data or another method"
        )
