"""The newest embeddings of both sides, first in, first out."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.method.normalizers.sharded_rows import RowShard, keep_full_in_state

UNKNOWN_ID = -1
"""In place of a sample id that was not given."""


class EmbeddingRing(nn.Module):
    """A ring of embeddings, its slots sharded over ranks.

    Args:
        shard: the slots that this rank holds.
        dim: width of the embeddings.
        with_sample_ids: whether each slot also keeps the sample id of its pair.

    Attributes:
        slots: text embeddings (candidates of image anchors) and image embeddings.
        sample_ids: the ids of their pairs.
        groups: the groups of their pairs, one row a kind; 0: none. None before the first batch that
            has groups.
        written: embeddings of each side pushed so far, over all ranks.
    """

    slots: Float[Tensor, "2 owned dim"]
    sample_ids: Int64[Tensor, "1 owned"] | None
    groups: Int64[Tensor, "kinds owned"] | None

    def __init__(self, shard: RowShard, dim: int, *, with_sample_ids: bool = False) -> None:
        super().__init__()
        self.shard = shard
        self.written = 0
        self.register_buffer("slots", torch.zeros(2, len(shard), dim))
        ids = torch.full((1, len(shard)), UNKNOWN_ID) if with_sample_ids else None
        self.register_buffer("sample_ids", ids)
        self.register_buffer("groups", None)
        self.register_load_state_dict_pre_hook(_take_groups)
        keep_full_in_state(self, ("slots", "sample_ids", "groups"))

    @property
    def row_names(self) -> tuple[str, ...]:
        """The buffers that there are, with one row per slot."""
        names = ("slots", "sample_ids", "groups")
        return tuple(name for name in names if getattr(self, name) is not None)

    def resize(self, shard: RowShard) -> None:
        """Empties the ring and gives it other slots."""
        self.shard = shard
        self.written = 0
        self.slots = self.slots.new_zeros(2, len(shard), self.slots.shape[-1])
        if self.sample_ids is not None:
            self.sample_ids = self.sample_ids.new_full((1, len(shard)), UNKNOWN_ID)
        self.groups = None

    @property
    def filled(self) -> int:
        """Slots that have been written, over all ranks."""
        return min(self.written, self.shard.size)

    @property
    def is_full(self) -> bool:
        """Whether every slot has been written."""
        return self.filled == self.shard.size

    def unwritten(self) -> Bool[Tensor, " owned"] | None:
        """Which of this rank's slots have not been written; none: all have."""
        if self.is_full:
            return None
        owned = self.shard.owned
        return torch.arange(owned.start, owned.stop, device=self.slots.device) >= self.filled

    @torch.no_grad()
    def push(
        self,
        candidates: Float[Tensor, "2 batch dim"],
        sample_ids: Int64[Tensor, " batch"] | None = None,
        groups: Int64[Tensor, "batch kinds"] | None = None,
    ) -> None:
        """Writes the embeddings of all ranks over the oldest.

        Args:
            candidates: texts, images.
            sample_ids: the ids of their pairs; none: unknown.
            groups: the groups of their pairs; none: they have none.
        """
        kept = self.groups if groups is None else self.groups_of(groups.shape[1])
        batch = candidates.shape[1]
        count = min(batch, self.shard.size)
        for first, rows in self.shard.window(self.written + batch - count, count):
            start = batch - count + first
            taken = slice(start, start + (rows.stop - rows.start))
            self.slots[:, rows] = candidates[:, taken]
            if self.sample_ids is not None:
                self.sample_ids[:, rows] = UNKNOWN_ID if sample_ids is None else sample_ids[taken]
            if kept is not None:
                kept[:, rows] = 0 if groups is None else groups[taken].T
        self.written += batch

    def groups_of(self, kinds: int) -> Int64[Tensor, "kinds owned"]:
        """The groups of the slots; slots written without any have 0.

        Raises:
            UserError: earlier batches had another number of kinds.
        """
        if self.groups is None:
            self.groups = self.no_groups(kinds)
        if len(self.groups) != kinds:
            raise UserError(
                f"groups have {kinds} columns; the pool has {len(self.groups)} from earlier "
                "batches: give every batch the same columns"
            )
        return self.groups

    def no_groups(self, kinds: int) -> Int64[Tensor, "kinds owned"]:
        """Groups of slots that are in none."""
        return torch.zeros(kinds, len(self.shard), dtype=torch.int64, device=self.slots.device)

    @torch.no_grad()
    def fill_up(self) -> None:
        """Repeats the written slots in those that have not been written."""
        if self.is_full:
            return
        owned = self.shard.owned
        source = torch.arange(owned.start, owned.stop, device=self.slots.device) % self.filled
        for rows in (self.slots, self.sample_ids, self.groups):
            if rows is not None:
                rows.copy_(self.shard.gather(rows)[:, source])

    def newest(self, count: int) -> list[slice]:
        """This rank's rows of the newest `count` slots."""
        first = max(self.written - count, 0)
        return [rows for _, rows in self.shard.window(first, count)]


def _take_groups(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: the ring has groups if the state has; older states have none."""
    assert isinstance(module, EmbeddingRing)
    saved = state.get(prefix + "groups")
    module.groups = None if saved is None else module.no_groups(len(saved))
