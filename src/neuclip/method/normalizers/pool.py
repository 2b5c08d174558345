"""The newest embeddings as prototypes, none of them trained: the normalizer of `neuclip_pool`.

A pool of the embeddings of earlier batches (as in cross-batch memory, arXiv 1912.06798) serves as
NeuCLIP's prototypes, and the prediction is mixed with the batch estimate as in NeuCLIP:

    normalizer_i = (1 - gamma_t) exp(alpha_i) + gamma_t (eps + g^_i)

The pool is an `EmbeddingQueue`, read before the batch enters it, so the first batch has no
prediction but its own estimate. While the pool fills, the sum is over the embeddings that it holds.
An anchor's own pair is left out of the sum where sample ids are given. (The mean stays one over m:
about one prototype in n is such a positive.)

Where groups are given, the mean is over the embeddings in no group with the anchor. If none
remains, the anchor's prediction is its batch estimate; if only older ones remain than those that
carry the gradient, the prediction is a constant.

Sizes that follow from the batch are settled by the first batch of training, or by a loaded state.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.choices import PredictionGradient
from neuclip.method.normalizers.embedding_queue import EmbeddingQueue, follow_saved_size
from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.prototype_network import (
    NetworkOutput,
    PredictionRecord,
    attach_gradient,
)
from neuclip.method.normalizers.sharded_rows import gathered_rows
from neuclip.method.notation import Anchors, has_estimate
from neuclip.method.objective import log_plus, mix
from neuclip.method.schedule import StepGamma


@dataclass(frozen=True)
class PoolSettings:
    """The size of the pool, and the gradient of its prediction.

    Attributes:
        size: embeddings of each side, over all ranks; none: not known yet.
        gradient: how the prediction carries the gradient.
        gradient_size: the newest embeddings that carry it, while all give the value; none: all,
            or not known yet.
    """

    size: int | None
    gradient: PredictionGradient
    gradient_size: int | None = None


class PoolNormalizer(nn.Module):
    """Log-normalizers from the newest embeddings of both sides.

    Args:
        embed_dim: width of the embeddings.
        settings: see `PoolSettings`.
        gamma: weight of the batch estimate over time.
        epsilon: stabiliser of the objective.
        for_batch: the settings for a global batch size, called with the first batch of training;
            none: `settings`.
        sharded: whether each rank keeps only its share of the embeddings.

    Attributes:
        settings: as given, and complete from the first batch on.
        fill_steps: training steps until the pool is full; 0: no batch was seen.
    """

    needs_sample_ids = False

    def __init__(
        self,
        embed_dim: int,
        settings: PoolSettings,
        gamma: StepGamma,
        epsilon: float,
        *,
        for_batch: Callable[[int], PoolSettings] | None = None,
        sharded: bool = True,
    ) -> None:
        super().__init__()
        self.given = settings
        self.settings = settings
        self.gamma = gamma
        self.epsilon = epsilon
        self.step_count = 0
        self.fill_steps = 0
        self._for_batch = for_batch
        self.ring = EmbeddingQueue(settings.size, embed_dim, setting="pool_size", sharded=sharded)
        follow_saved_size(self, "ring")
        self._last: PredictionRecord | None = None

    @property
    def direct(self) -> bool:
        """Whether the estimate is itself the objective, not the alpha of the conjugate."""
        return self.settings.gradient == "union"

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Mixes the pool's prediction with the batch estimate; then the batch enters the pool."""
        batch = self._global_batch(anchors)
        if self.fill_steps == 0:
            self._settle(anchors.pairs.layout.total)
        if self.ring.filled == 0:
            predicted, log_mean = anchors.log_inner.detach(), batch.log_inner
        else:
            output = self._read(batch)
            gradient, newest = self.settings.gradient, self._newest()
            predicted = attach_gradient(output, anchors, gradient, self.ring.shard, newest)
            log_mean = output.log_mean
            if batch.leaves_out:
                fresh = anchors.log_inner.detach()
                predicted = torch.where(has_estimate(predicted), predicted, fresh)
        self._push(batch)
        gamma = self.gamma.at(self.step_count, self.fill_steps)
        self.step_count += 1
        self._last = PredictionRecord(log_mean, batch.log_inner, batch.known, self.epsilon, gamma)
        return log_plus(self._mix(predicted, anchors.log_inner, gamma), self.epsilon)

    @torch.no_grad()
    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Alpha of the anchors by the pool alone; the batch estimate while the pool is empty."""
        if self.ring.filled == 0:
            return log_plus(anchors.log_inner, self.epsilon)
        batch = self._global_batch(anchors)
        local = anchors.pairs.layout.own(self._read(batch).log_mean)
        return log_plus(local, self.epsilon).to(anchors.pairs.features.dtype)

    @contextmanager
    def gathered(self) -> Generator[None]:
        """Inside, every rank has the full pool to predict from; all ranks enter together."""
        with gathered_rows(self.ring, *self.ring.row_names):
            yield

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last estimate."""
        return {} if self._last is None else self._last.diagnostics()

    def _global_batch(self, anchors: Anchors) -> GlobalBatch:
        return GlobalBatch.of(anchors, self.ring.slots.dtype, self.epsilon, with_sample_ids=True)

    def _read(self, batch: GlobalBatch) -> NetworkOutput:
        return self.ring.read(batch)

    def _newest(self) -> list[slice] | None:
        """This rank's rows that carry the gradient; none: all do."""
        count = self.settings.gradient_size
        return None if count is None or count >= self.ring.shard.size else self.ring.newest(count)

    def _push(self, batch: GlobalBatch) -> None:
        self.ring.push_batch(batch)

    def _mix(self, predicted: Tensor, batch: Tensor, gamma: float) -> Float[Tensor, "2 local"]:
        """The prediction with the batch estimate, which is a constant unless it is minimised."""
        return mix(predicted, batch if self.direct else batch.detach(), gamma)

    # --- what the first batch settles ---------------------------------------------------------

    def _settle(self, batch_size: int) -> None:
        """Settles what follows from the size of the first batch."""
        if self._for_batch is not None:
            known = self._for_batch(batch_size)
            assert known.size is not None
            self.ring.settle(known.size)
            self.settings = replace(known, size=self.ring.shard.size)
        self.fill_steps = -(-self.ring.shard.size // batch_size)

    # --- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int | None]:
        """The counters and what the first batch settled, for `state_dict`."""
        return {
            "step_count": self.step_count,
            "written": self.ring.written,
            "fill_steps": self.fill_steps,
            "gradient_size": self.settings.gradient_size,
        }

    def set_extra_state(self, state: dict[str, int | None]) -> None:
        """Restores the counters and what the first batch settled.

        States of before 2026-11-28 lack the latter; the next batch settles it again.
        """
        self.step_count = int(state["step_count"] or 0)
        self.ring.written = int(state["written"] or 0)
        self.fill_steps = int(state.get("fill_steps") or 0)
        newest = self.given.gradient_size or state.get("gradient_size")
        self.settings = replace(self.given, size=self.ring.shard.size or None, gradient_size=newest)
