"""The newest embeddings as prototypes, none of them trained: the normalizer of `neuclip_pool`.

A pool of the embeddings of earlier batches (as in cross-batch memory, arXiv 1912.06798) serves as
NeuCLIP's prototypes, and the prediction is mixed with the batch estimate as in NeuCLIP:

    normalizer_i = (1 - gamma_t) exp(alpha_i) + gamma_t (eps + g^_i)

An anchor is read before its batch enters the pool. An embedding of the anchor's own pair, from an
earlier step, is a positive: where sample ids are given, it is left out of the sum. (The mean stays
one over m: about one prototype in n is such a positive.)
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from neuclip.method.choices import PredictionGradient
from neuclip.method.normalizers.embedding_ring import EmbeddingRing
from neuclip.method.normalizers.prototype_network import (
    GlobalBatch,
    NetworkOutput,
    attach_gradient,
    diagnostics,
    network_output,
)
from neuclip.method.normalizers.sharded_rows import RowShard, gathered_rows
from neuclip.method.notation import Anchors
from neuclip.method.objective import log_plus, mix
from neuclip.method.schedule import Gamma
from neuclip.parallel.collectives import Slice


@dataclass(frozen=True)
class PoolSettings:
    """The size of the pool, and the gradient of its prediction.

    Attributes:
        size: embeddings of each side, over all ranks.
        gradient: how the prediction carries the gradient.
        gradient_size: the newest embeddings that carry it, while all give the value; none: all.
    """

    size: int
    gradient: PredictionGradient
    gradient_size: int | None = None


class PoolNormalizer(nn.Module):
    """Log-normalizers from the newest embeddings of both sides.

    Args:
        embed_dim: width of the embeddings.
        settings: see `PoolSettings`.
        gamma: weight of the batch estimate over time.
        epsilon: stabiliser of the objective.
        shard: the embeddings that this rank keeps; none: its share, `collectives.owned_slice`.
    """

    needs_sample_ids = False

    def __init__(
        self,
        embed_dim: int,
        settings: PoolSettings,
        gamma: Gamma,
        epsilon: float,
        *,
        shard: Slice | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.gamma = gamma
        self.epsilon = epsilon
        self.step_count = 0
        rows = RowShard.of(settings.size, shard, "pool_size")
        self.ring = EmbeddingRing(rows, embed_dim, with_sample_ids=True)
        self._last: dict[str, Tensor | float] = {}

    @property
    def direct(self) -> bool:
        """Whether the estimate is itself the objective, not the alpha of the conjugate."""
        return self.settings.gradient == "union"

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Mixes the pool's prediction with the batch estimate; then the batch enters the pool."""
        batch = GlobalBatch.of(anchors, self.ring.slots.dtype, with_sample_ids=True)
        is_first = self.ring.written == 0
        if is_first:  # the only batch that reads its own embeddings: there are no others
            self.ring.push(batch.candidates, batch.sample_ids)
            self.ring.fill_up()
        output = self._read(batch)
        gradient, newest = self.settings.gradient, self._newest()
        predicted = attach_gradient(output, anchors, gradient, self.ring.shard, newest)
        if not is_first:
            self._push(batch)
        gamma = self.gamma.at(self.step_count)
        self.step_count += 1
        self._last = diagnostics(output.log_mean, batch, self.epsilon, gamma)
        return log_plus(self._mix(predicted, anchors.log_inner, gamma), self.epsilon)

    @torch.no_grad()
    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Alpha of the anchors by the pool alone."""
        batch = GlobalBatch.of(anchors, self.ring.slots.dtype, with_sample_ids=True)
        local = anchors.pairs.layout.own(self._read(batch).log_mean)
        return log_plus(local, self.epsilon).to(anchors.pairs.features.dtype)

    @contextmanager
    def gathered(self) -> Generator[None]:
        """Inside, every rank has the full pool to predict from; all ranks enter together."""
        with gathered_rows(self.ring, "slots", "sample_ids"):
            yield

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last estimate."""
        return self._last

    def _read(self, batch: GlobalBatch) -> NetworkOutput:
        return network_output(
            self.ring.slots, batch, self.ring.shard, excluded=self._positives(batch)
        )

    def _positives(self, batch: GlobalBatch) -> Bool[Tensor, "batch owned"] | None:
        """Which embeddings belong to an anchor's own pair; none: unknown."""
        if batch.sample_ids is None or self.ring.sample_ids is None:
            return None
        return batch.sample_ids[:, None] == self.ring.sample_ids

    def _newest(self) -> list[slice] | None:
        """This rank's rows that carry the gradient; none: all do."""
        count = self.settings.gradient_size
        return None if count is None or count >= self.settings.size else self.ring.newest(count)

    def _push(self, batch: GlobalBatch) -> None:
        self.ring.push(batch.candidates, batch.sample_ids)

    def _mix(self, predicted: Tensor, batch: Tensor, gamma: float) -> Float[Tensor, "2 local"]:
        """The prediction with the batch estimate, which is a constant unless it is minimised."""
        return mix(predicted, batch if self.direct else batch.detach(), gamma)

    def get_extra_state(self) -> dict[str, int]:
        """The counters, for `state_dict`."""
        return {"step_count": self.step_count, "written": self.ring.written}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the counters."""
        self.step_count = int(state["step_count"])
        self.ring.written = int(state["written"])
