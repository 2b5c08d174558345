"""The newest embeddings as candidates of the anchors (cross-batch memory, arXiv 1912.06798).

An anchor reads the queue before its own batch enters it. It leaves out the embeddings of its own
pair from earlier steps, where sample ids are given, and those of its groups, where groups are
given: neither are negatives.

The queue may follow the batch, as in cross-batch normalization (XBN, arXiv 2303.17127), each side
by itself, before it is normalised and read; what it keeps does not change:

    mean     q_k + mean of the batch - mean of the queue
    moments  the same, with (q_k - mean of the queue) times the quotient of the batch's standard
             deviation and the queue's in each coordinate

Otherwise a loss with a gradient through the queue falls where all embeddings turn away from it
together, positives along with them, which tells no pair from another.

The size may follow from the batch: then the first batch of training settles it, or a loaded state.
"""

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from neuclip.method.choices import QueueAlignment, QueuePositives
from neuclip.method.normalizers.embedding_ring import EmbeddingRing
from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.prototype_network import (
    NetworkOutput,
    attach_gradient,
    network_output,
)
from neuclip.method.normalizers.sharded_rows import RowShard
from neuclip.method.notation import Anchors
from neuclip.method.softmax.exclusion import same_group
from neuclip.parallel import collectives
from neuclip.parallel.collectives import Slice

log = logging.getLogger("neuclip")


class EmbeddingQueue(EmbeddingRing):
    """A ring of embeddings with sample ids and groups, which anchors read.

    Args:
        size: embeddings of each side, over all ranks; none: not known yet.
        dim: width of the embeddings.
        setting: the user's name of `size`, for messages.
        sharded: whether each rank keeps only its share of the embeddings.
        alignment: how the queue follows the batch, see the module.
    """

    def __init__(
        self,
        size: int | None,
        dim: int,
        *,
        setting: str,
        sharded: bool = True,
        alignment: QueueAlignment = "none",
    ) -> None:
        super().__init__(_shard(size or 0, setting, sharded=sharded), dim, with_sample_ids=True)
        self.given = size
        self.setting = setting
        self.sharded = sharded
        self.alignment: QueueAlignment = alignment
        self._warned = False

    def settle(self, size: int) -> None:
        """Gives the queue its size, unless it has one."""
        if self.shard.size == 0:
            self.resize(_shard(size, self.setting, sharded=self.sharded))

    def take_size(self, size: int) -> None:
        """Takes the size of a state to be loaded, unless one was given."""
        if self.given is None and size != self.shard.size:
            self.resize(_shard(size, self.setting, sharded=self.sharded))

    def read(self, batch: GlobalBatch) -> NetworkOutput:
        """The embeddings as prototypes of the anchors of all ranks.

        Means are over all embeddings (an anchor's own pair counts, but adds nothing), or with
        groups over those that remain to the anchor; embeddings above its threshold do not count.
        """
        excluded = self.excluded(batch.sample_ids, batch.groups)
        count: int | Tensor = self.filled
        if batch.groups is not None and excluded is not None:
            remaining = (~excluded).sum(1).to(batch.features.dtype)
            count = self.shard.sum(remaining)
        slots = self.aligned(batch.candidates)
        return network_output(slots, batch, self.shard, excluded=excluded, count=count)

    def log_sums(
        self, anchors: Anchors, batch: GlobalBatch, positives: QueuePositives = "pair"
    ) -> tuple[Float[Tensor, "2 local"], Float[Tensor, "2 local"]]:
        """Log of the sum over the queue of exp((e_i . q_k - s_ii) / tau), and the number of terms.

        The sum has a gradient by this rank's anchors, and by s_ii as `attach_gradient` says.
        """
        output = self.read(batch)
        log_mean = attach_gradient(output, anchors, "full", self.shard, positives=positives)
        if isinstance(output.count, int):
            count = log_mean.new_full(log_mean.shape, output.count)
            return log_mean + math.log(output.count), count
        count = output.count.expand(2, -1).to(log_mean.dtype)
        count = anchors.pairs.layout.own(count)
        return log_mean + count.clamp_min(1).log(), count

    @torch.no_grad()
    def aligned(self, candidates: Float[Tensor, "2 batch dim"]) -> Float[Tensor, "2 owned dim"]:
        """This rank's slots as the anchors of a batch see them, not normalised if they moved.

        Args:
            candidates: embeddings of the batch of all ranks, texts first.
        """
        if self.alignment == "none":
            return self.slots
        there = candidates.mean(1, keepdim=True)
        # Slots that have not been written are 0.
        here = self.shard.sum(self.slots.sum(1, keepdim=True)) / self.filled
        centred = self.slots - here
        if self.alignment == "moments":
            if (unwritten := self.unwritten()) is not None:
                centred.masked_fill_(unwritten[:, None], 0)
            variance = self.shard.sum(centred.square().sum(1, keepdim=True)) / self.filled
            wanted = (candidates - there).square().mean(1, keepdim=True)
            tiny = torch.finfo(variance.dtype).tiny
            centred *= (wanted / variance.clamp_min(tiny)).sqrt()
        return centred + there

    def excluded(
        self,
        sample_ids: Int64[Tensor, " batch"] | None,
        groups: Int64[Tensor, "batch kinds"] | None,
    ) -> Bool[Tensor, "*batch owned"] | None:
        """Which of this rank's slots have no part in an anchor's sum; none: all have one.

        Args:
            sample_ids: of the anchors of all ranks, if known.
            groups: of the anchors of all ranks, if given.
        """
        parts = [self._positives(sample_ids), self._false_negatives(groups), self.unwritten()]
        given = [part for part in parts if part is not None]
        return functools.reduce(torch.logical_or, given) if given else None

    def _false_negatives(self, groups: Tensor | None) -> Bool[Tensor, "batch owned"] | None:
        """Which embeddings are in a group with an anchor; none: no groups were given."""
        if groups is None:
            return None
        return same_group(groups.T.contiguous(), self.groups_of(groups.shape[1]))

    def _positives(self, sample_ids: Tensor | None) -> Bool[Tensor, "batch owned"] | None:
        """Which embeddings belong to an anchor's own pair; none: unknown."""
        if sample_ids is None or self.sample_ids is None:
            return None
        return sample_ids[:, None] == self.sample_ids

    def push_batch(self, batch: GlobalBatch) -> None:
        """Writes the embeddings of the batch over the oldest."""
        self.enter(batch.candidates, batch.sample_ids, batch.groups)

    def enter(
        self,
        candidates: Float[Tensor, "2 batch dim"],
        sample_ids: Int64[Tensor, " batch"] | None,
        groups: Int64[Tensor, "batch kinds"] | None,
    ) -> None:
        """As `push`; warns once if positives cannot be told from negatives."""
        if sample_ids is None:
            self._warn_of_positives()
        self.push(candidates, sample_ids, groups)

    def _warn_of_positives(self) -> None:
        """Logs once that the queue cannot tell positives from negatives."""
        if not self._warned and collectives.is_main():
            log.warning(
                "without sample_ids, an anchor's own pair from earlier steps counts as a negative "
                "while it is among the newest %d pairs; pass sample_ids=..., or ignore this if the "
                "data are many times larger",
                self.shard.size,
            )
        self._warned = True


@dataclass(frozen=True)
class QueueForm:
    """A queue of `--queue-size`, and how it takes part in a loss.

    Attributes:
        size: embeddings of each side, over all ranks; none: that of the first batch.
        size_for_batch: the size for a global batch size, where none is given.
        alignment: how the queue follows the batch.
        positives: what the s_ii beside the queue moves.
    """

    size: int | None
    size_for_batch: Callable[[int], int]
    alignment: QueueAlignment = "none"
    positives: QueuePositives = "pair"

    def queue(self, dim: int, *, sharded: bool) -> EmbeddingQueue:
        """The queue, empty.

        Args:
            dim: width of the embeddings.
            sharded: whether each rank keeps only its share of the embeddings.
        """
        return EmbeddingQueue(
            self.size, dim, setting="queue_size", sharded=sharded, alignment=self.alignment
        )


def _shard(size: int, setting: str, *, sharded: bool) -> RowShard:
    return RowShard.of(size, None if sharded and size else Slice(0, size), setting)


def follow_saved_size(owner: nn.Module, name: str) -> None:
    """Lets a queue whose size follows from the batch take the size of a state before it is loaded.

    The owner does so before its parts load: the queue's own hooks share out a state by its size.

    Args:
        owner: a module.
        name: of its attribute, the queue.
    """
    owner.register_load_state_dict_pre_hook(functools.partial(_take_size, name))


def _take_size(name: str, owner: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    queue = getattr(owner, name)
    assert isinstance(queue, EmbeddingQueue)
    slots = state.get(f"{prefix}{name}.slots")
    if slots is not None:
        queue.take_size(slots.shape[1])
