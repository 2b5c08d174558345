"""The mean over the batch and a queue of past embeddings: the normalizer of `rgcl_queue`.

    g_i = ( sum over N_i of exp((s_ij - s_ii) / tau)
            + sum over Q_i of exp((e_i . q_k - s_ii) / tau) ) / ( |N_i| + |Q_i| )

N_i are the anchor's negatives in the global batch, and Q_i the embeddings of the other side in the
queue, without those of its own pair and of its groups. (Without groups, |Q_i| is the number of all
embeddings in the queue: about one in n is of the anchor's own pair.) It is the objective itself, as
the batch estimate of a larger batch is: log(eps + g_i) has the gradient of `rgcl_batch` in the
batch's part, and one through the anchor in the queue's. The batch enters the queue after that.

The queue follows the batch, see `EmbeddingQueue`, and the s_ii beside it moves the anchor alone,
see `attach_gradient`. Without the first, the loss falls by turning all embeddings away from the
queue; without the second, a positive pulls more than the queue pushes.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.normalizers.embedding_queue import QueueForm, follow_saved_size
from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.sharded_rows import gathered_rows
from neuclip.method.notation import Anchors, known_mean
from neuclip.method.objective import log_plus


class BatchAndQueueNormalizer(nn.Module):
    """Log-normalizers from the batch and the newest embeddings before it, as one objective.

    Args:
        embed_dim: width of the embeddings.
        form: the queue.
        epsilon: stabiliser of the objective.
        sharded: whether each rank keeps only its share of the queue.
    """

    direct = True
    needs_sample_ids = False

    def __init__(
        self, embed_dim: int, form: QueueForm, epsilon: float, *, sharded: bool = True
    ) -> None:
        super().__init__()
        self.form = form
        self.epsilon = epsilon
        self.queue = form.queue(embed_dim, sharded=sharded)
        follow_saved_size(self, "queue")
        self._last: tuple[Tensor, Tensor] | None = None

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Log(eps + g_i) with its gradient; then the batch enters the queue."""
        self.queue.settle(self.form.size_for_batch(anchors.pairs.layout.total))
        batch = self._global_batch(anchors)
        log_mean, self._last = self._log_means(anchors, batch)
        self.queue.push_batch(batch)
        return log_plus(log_mean, self.epsilon)

    @torch.no_grad()
    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """The same, without a gradient; the queue stays as it is."""
        log_mean, _ = self._log_means(anchors, self._global_batch(anchors))
        return log_plus(log_mean, self.epsilon)

    @contextmanager
    def gathered(self) -> Generator[None]:
        """Inside, every rank has the full queue to predict from; all ranks enter together."""
        with gathered_rows(self.queue, *self.queue.row_names):
            yield

    def metrics(self) -> dict[str, Tensor | float]:
        """The embeddings in the queue, and the log-normalizers by those alone."""
        found: dict[str, Tensor | float] = {"queue_filled": self.queue.filled}
        if self._last is not None:
            log_mean, known = self._last
            found["predicted_log_normalizer"] = known_mean(log_plus(log_mean, self.epsilon), known)
        return found

    def _global_batch(self, anchors: Anchors) -> GlobalBatch:
        return GlobalBatch.of(anchors, self.queue.slots.dtype, self.epsilon, with_sample_ids=True)

    def _log_means(
        self, anchors: Anchors, batch: GlobalBatch
    ) -> tuple[Float[Tensor, "2 local"], tuple[Tensor, Tensor] | None]:
        """Log g_i, and beside it that of the queue alone with which anchors have one."""
        if self.queue.filled == 0:
            return anchors.log_inner, None
        log_sum, count = anchors.log_sums()
        beside, held = self.queue.log_sums(anchors, batch, self.form.positives)
        log_mean = torch.logaddexp(log_sum, beside) - (count + held).clamp_min(1).log()
        return log_mean, ((beside - held.clamp_min(1).log()).detach(), held > 0)

    # --- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """The counter, for `state_dict`."""
        return {"written": self.queue.written}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the counter."""
        self.queue.written = int(state["written"])
