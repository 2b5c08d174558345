"""Momentum contrast of images and texts (MoCo, arXiv 1911.05722, as in ALBEF, arXiv 2107.07651).

    L = 1/2 mean_i [ log( exp(e1_i . k2_i / tau) + sum over N_i of exp(e1_i . k2_j / tau)
                          + sum over Q_i of exp(e1_i . q_k / tau) ) - e1_i . k2_i / tau ]
        + the same for text anchors and the keys of images

Keys k1, k2 are the embeddings of the same images and texts by momentum towers, a moving average of
the towers. N_i are the negatives of anchor i in the global batch, and Q_i the keys of the other
side in the queue, without those of the anchor's own pair and of its groups. Keys are constants: the
gradient flows through the anchors alone. The batch's keys enter the queue after the loss is
computed. Hard negatives are further candidates of the images, embedded by the towers themselves.

It is ALBEF's contrastive loss without the distillation of soft targets, and with two differences
from its code. N_i are the pairs of all processes, so that K processes give the loss of one; there,
a process sees the keys of its own batch. The sum over the queue is over the keys that it holds;
there, the queue starts full of random vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.normalizers.embedding_queue import EmbeddingQueue, follow_saved_size
from neuclip.method.notation import Pairs
from neuclip.method.softmax.constant_candidates import ConstantCandidates, constant_log_sum
from neuclip.method.softmax.exclusion import Exclusion
from neuclip.method.softmax.hard_negatives import hard_negative_log_sum
from neuclip.parallel import collectives


class MomentumContrastLoss(PairLoss):
    """Cross-entropy of each anchor over the keys of the global batch and of those before it.

    Every process keeps the whole queue: the sums of its anchors then need no other process.

    Args:
        embed_dim: width of the embeddings.
        size: keys of each side in the queue; none: that of the first batch.
        size_for_batch: the size for a global batch size, where none is given.
        momentum: decay of the moving average of the towers that encodes the keys.
    """

    has_fused_kernels = False

    def __init__(
        self,
        embed_dim: int,
        size: int | None,
        size_for_batch: Callable[[int], int],
        *,
        momentum: float,
    ) -> None:
        super().__init__(embed_dim)
        self.key_momentum = momentum
        self.queue = EmbeddingQueue(size, embed_dim, setting="queue_size", sharded=False)
        follow_saved_size(self, "queue")
        self._size_for_batch = size_for_batch

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss above."""
        assert pairs.keys is not None
        self.queue.settle(self._size_for_batch(pairs.layout.total))
        batch = _KeyBatch.gather(pairs)
        candidates = self._candidates(pairs, batch)
        log_sum = constant_log_sum(pairs.features, logit_scale, candidates, pairs.arithmetic)
        positive = (pairs.features * pairs.keys.flip(0)).sum(-1) * logit_scale
        if pairs.negatives is not None:
            hard = hard_negative_log_sum(pairs, pairs.negatives, logit_scale)
            log_sum = torch.stack([torch.logaddexp(log_sum[0], hard), log_sum[1]])
        losses = pairs.mean(functional.softplus(log_sum - positive))
        self.record_metrics(
            {"image_loss": losses[0], "text_loss": losses[1], "queue_filled": self.queue.filled}
        )
        self.queue.enter(batch.candidates, batch.sample_ids, batch.groups)
        return losses.mean()

    def _candidates(self, pairs: Pairs, batch: "_KeyBatch") -> ConstantCandidates:
        """The keys of the batch and of the queue, in this order."""
        held = slice(0, self.queue.filled)
        dtype = pairs.features.dtype
        columns = torch.cat([batch.candidates, self.queue.slots[:, held].to(dtype)], 1)
        start = pairs.layout.start
        return ConstantCandidates(columns, start, self._excluded(pairs, batch, held))

    def _excluded(self, pairs: Pairs, batch: "_KeyBatch", held: slice) -> Exclusion | None:
        """The columns that an anchor leaves out: its own pair in the queue, and its groups.

        A sample id is one more kind of group, which the keys of the batch do not have.
        """
        layout = pairs.layout
        own = slice(layout.start, layout.start + layout.sizes[layout.rank])
        anchors, columns = list[Tensor](), list[Tensor]()
        if batch.sample_ids is not None and self.queue.sample_ids is not None:
            ids = batch.sample_ids[None] + 1  # 0: in no group; the queue has -1 without an id
            anchors.append(ids[:, own])
            columns.append(
                torch.cat([torch.zeros_like(ids), self.queue.sample_ids[:, held] + 1], 1)
            )
        if batch.groups is not None:
            groups = batch.groups.T
            anchors.append(groups[:, own])
            kept = self.queue.groups_of(len(groups))[:, held]
            columns.append(torch.cat([groups, kept], 1))
        if not anchors:
            return None
        return Exclusion(torch.cat(anchors), torch.cat(columns), layout.start)

    # --- state --------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """The counter, for `state_dict`."""
        return {"written": self.queue.written}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the counter."""
        self.queue.written = int(state["written"])


@dataclass(frozen=True)
class _KeyBatch:
    """The keys of all ranks.

    Attributes:
        candidates: keys of the texts (candidates of image anchors), and of the images.
        sample_ids: the ids of their pairs, if given.
        groups: the groups of their pairs, if given.
    """

    candidates: Float[Tensor, "2 batch dim"]
    sample_ids: Int64[Tensor, " batch"] | None
    groups: Int64[Tensor, "batch kinds"] | None

    @classmethod
    def gather(cls, pairs: Pairs) -> "_KeyBatch":
        """Gathers those of this rank's pairs from all ranks."""
        assert pairs.keys is not None
        layout, ids, groups = pairs.layout, pairs.sample_ids, pairs.groups
        by_pair = collectives.gather_constant(pairs.keys.flip(0).transpose(0, 1), layout)
        if ids is not None:
            ids = ids.to(by_pair.device, non_blocking=True)
            ids = collectives.gather_constant(ids, layout)
        if groups is not None:
            groups = collectives.gather_constant(groups, layout)
        return cls(by_pair.transpose(0, 1), ids, groups)
