"""InfoNCE over the batch and a queue of past embeddings (cross-batch memory, arXiv 1912.06798).

    L = 1/2 mean_i [ log( exp(s_ii / tau) + sum over N_i of exp(s_ij / tau)
                          + sum over Q_i of exp(e_i . q_k / tau) ) - s_ii / tau ]  + the same for
    text anchors

N_i are the anchor's negatives in the global batch, hard negatives included, and Q_i the embeddings
of the other side in the queue, without those of the anchor's own pair and of its groups. The queue
holds constants, so it has a gradient through the anchor alone; the batch has the gradient of
InfoNCE. The batch enters the queue after the loss is computed. The queue may follow the batch, see
`EmbeddingQueue`, and the s_ii beside it may move the anchor alone, see `attach_gradient`.

In the first `warm_up` steps the queue fills and has no part in the loss: embeddings that still move
fast describe the present towers badly (the paper warms up for 1,000 steps).
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from neuclip.method.losses.pair_loss import PairLoss, anchors_of
from neuclip.method.normalizers.embedding_queue import QueueForm, follow_saved_size
from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.sharded_rows import gathered_rows
from neuclip.method.notation import Anchors, Pairs
from neuclip.method.objective import log_plus


class QueueInfoNCELoss(PairLoss):
    """Cross-entropy of each anchor over the global batch and the newest embeddings before it.

    Args:
        embed_dim: width of the embeddings.
        form: the queue.
        warm_up: training steps before the queue takes part.
        sharded: whether each rank keeps only its share of the queue.
    """

    epsilon = 1e-14

    def __init__(
        self, embed_dim: int, form: QueueForm, *, warm_up: int, sharded: bool = True
    ) -> None:
        super().__init__(embed_dim)
        self.form = form
        self.queue = form.queue(embed_dim, sharded=sharded)
        follow_saved_size(self, "queue")
        self.warm_up = warm_up
        self.step_count = 0

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss above."""
        anchors = anchors_of(pairs, logit_scale)
        log_sum, _ = anchors.log_sums()
        with self.section("normalizer"):
            batch = self._global_batch(anchors)
            self.queue.settle(self.form.size_for_batch(pairs.layout.total))
            if self.step_count >= self.warm_up and self.queue.filled:
                beside, _ = self.queue.log_sums(anchors, batch, self.form.positives)
                log_sum = torch.logaddexp(log_sum, beside)
            self.queue.push_batch(batch)
            self.step_count += 1
        losses = pairs.mean(functional.softplus(log_sum))
        self.record_metrics(
            {"image_loss": losses[0], "text_loss": losses[1], "queue_filled": self.queue.filled}
        )
        return losses.mean()

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """The estimate of log(eps + g) by the negatives of the batch and of the queue together."""
        anchors = anchors_of(pairs, logit_scale)
        log_sum, count = anchors.log_sums()
        if self.step_count >= self.warm_up and self.queue.filled:
            beside, held = self.queue.log_sums(anchors, self._global_batch(anchors))
            log_sum, count = torch.logaddexp(log_sum, beside), count + held
        return log_plus(log_sum - count.clamp_min(1).log(), self.epsilon)

    def _global_batch(self, anchors: Anchors) -> GlobalBatch:
        return GlobalBatch.of(anchors, self.queue.slots.dtype, with_sample_ids=True)

    @contextmanager
    def gathered(self) -> Generator[None]:
        """Inside, every rank has the full queue to predict from; all ranks enter together."""
        with gathered_rows(self.queue, *self.queue.row_names):
            yield

    # --- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """The counters, for `state_dict`."""
        return {"step_count": self.step_count, "written": self.queue.written}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the counters."""
        self.step_count = int(state["step_count"])
        self.queue.written = int(state["written"])
