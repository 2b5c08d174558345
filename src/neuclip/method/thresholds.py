"""False negatives found by similarity: a threshold per anchor (GloFND, arXiv 2502.20612).

    lambda_i = argmin over v of  alpha v + mean over j of max(s_ij - v, 0)

is the (1 - alpha)-quantile of the similarities of anchor i to its negatives in the whole data. It
takes a negative above lambda_i for false and leaves it out, in the batch and in a queue of past
embeddings; g_i is the mean over those that remain. Each side has thresholds of its own.

`LearnedThresholds` takes one step on lambda_i at every visit of sample i, by the subgradient
alpha - (share of the batch's negatives above lambda_i), and then applies it. As in the official
code the step is Adam's, its moments are corrected by the epoch, and lambda_i starts at 1.
`QueueThresholds` needs no state: it takes the quantile of the similarities to the queue.

Pairs of an anchor's groups are not among its negatives. Hard negatives are never left out.
"""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip.method.normalizers.embedding_queue import EmbeddingQueue
from neuclip.method.notation import Pairs
from neuclip.method.sample_table import SampleTable
from neuclip.method.softmax.blocks import MASKED, row_blocks
from neuclip.method.softmax.candidates import Candidates, Thresholds
from neuclip.parallel import collectives

NO_BOUND = 2.0
"""A threshold that no similarity exceeds."""


class FalseNegativeThresholds(nn.Module):
    """A source of thresholds; a subclass defines `local`.

    Args:
        alpha: share of an anchor's negatives that are left out.
        start: training steps before the thresholds are learned and used.
    """

    needs_sample_ids = False

    def __init__(self, alpha: float, start: int) -> None:
        super().__init__()
        self.alpha = alpha
        self.start = start
        self.step_count = 0
        self._last: dict[str, Tensor | float] = {}

    def local(
        self, pairs: Pairs, candidates: Candidates, *, learn: bool
    ) -> Float[Tensor, "2 local"] | None:
        """The thresholds of this rank's anchors; none: there is none yet."""
        raise NotImplementedError

    @torch.no_grad()
    def applied(self, pairs: Pairs, *, learn: bool) -> Pairs:
        """The pairs with the candidates of their anchors, and the thresholds in use.

        Args:
            pairs: this rank's.
            learn: whether it is a step of training, which counts and updates what is learned.
        """
        step = self.step_count
        self.step_count += learn
        if step < self.start:
            return pairs
        candidates = Candidates.gather(pairs.features.detach(), pairs.groups, pairs.layout)
        local = self.local(pairs, candidates, learn=learn)
        if local is None:
            return replace(pairs, candidates=candidates)
        above = count_above(pairs.features, candidates, local)
        counts = candidates.counts
        everybody = collectives.gather_constant(local.T.contiguous(), pairs.layout).T
        remaining = (counts - above).to(local.dtype)
        thresholds = Thresholds(local, everybody.contiguous(), remaining)
        if isinstance(counts, Tensor):
            share = above.sum() / counts.expand(2, -1).sum().clamp_min(1)
        else:
            share = above.to(local.dtype).mean() / counts
        self._last = {"threshold": local.mean(), "left_out": share}
        return replace(pairs, candidates=replace(candidates, thresholds=thresholds))

    def metrics(self) -> dict[str, Tensor | float]:
        """The mean threshold, and the share of the batch's negatives that was left out."""
        return self._last

    def get_extra_state(self) -> dict[str, int]:
        """The step counter, for `state_dict`."""
        return {"step_count": self.step_count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the step counter."""
        self.step_count = int(state["step_count"])


@dataclass(frozen=True)
class ThresholdRule:
    """The optimiser of learned thresholds: Adam, with the constants of the official code.

    Attributes:
        lr: learning rate.
        steps_per_epoch: training steps in an epoch.
        beta1: share of the first moment that a step keeps.
        beta2: share of the second moment that a step keeps.
        eps: added to the root of the second moment.
    """

    lr: float
    steps_per_epoch: int
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8


class LearnedThresholds(FalseNegativeThresholds):
    """Thresholds in a table: lambda and two moments for every image and every text.

    Args:
        num_samples: ids run from 0 to num_samples - 1; none: the table grows with the ids seen.
        alpha: share of an anchor's negatives that are left out.
        start: training steps before the thresholds are learned and used.
        rule: how they are learned.
    """

    needs_sample_ids = True

    def __init__(
        self, num_samples: int | None, alpha: float, start: int, rule: ThresholdRule
    ) -> None:
        super().__init__(alpha, start)
        self.rule = rule
        self.table = SampleTable(num_samples, (1.0, 1.0, 0.0, 0.0, 0.0, 0.0))

    def local(
        self, pairs: Pairs, candidates: Candidates, *, learn: bool
    ) -> Float[Tensor, "2 local"] | None:
        """Those of the table, in training after their step."""
        ids = pairs.sample_ids
        if ids is None:
            return None  # a prediction
        if learn:
            self.table.admit(ids)
        before = self.table.read(ids).to(pairs.features.dtype)
        if not learn:
            return before[:2]
        counts = candidates.counts
        negatives = counts.clamp_min(1) if isinstance(counts, Tensor) else counts
        share = count_above(pairs.features, candidates, before[:2]) / negatives
        after = self._stepped(before, self.alpha - share)
        if isinstance(counts, Tensor):
            after = torch.where(counts > 0, after, before)
        self.table.write(ids, after, pairs.layout)
        return after[:2]

    def _stepped(
        self, before: Float[Tensor, "6 local"], grad: Float[Tensor, "2 local"]
    ) -> Float[Tensor, "6 local"]:
        """Thresholds and moments after a step."""
        rule = self.rule
        epoch = (self.step_count - 1) // rule.steps_per_epoch
        threshold, first, second = before.split(2)
        first = rule.beta1 * first + (1 - rule.beta1) * grad
        second = rule.beta2 * second + (1 - rule.beta2) * grad**2
        mean = first / (1 - rule.beta1 ** (epoch + 1))
        square = second / (1 - rule.beta2 ** (epoch + 1))
        move = rule.lr * mean / (square.sqrt() + rule.eps)
        return torch.cat([(threshold - move).clamp(-1, 1), first, second])


class QueueThresholds(FalseNegativeThresholds):
    """Thresholds as quantiles of the similarities to a queue of past embeddings.

    Of n embeddings in the queue that are negatives of an anchor, floor(alpha n) are above.

    Args:
        queue: of the loss, which keeps its state.
        alpha: share of an anchor's negatives that are left out.
        start: training steps before the thresholds are used.
    """

    def __init__(self, queue: EmbeddingQueue, alpha: float, start: int) -> None:
        super().__init__(alpha, start)
        self._queue = (queue,)  # in a tuple: not a submodule, whose state would be kept twice

    def local(
        self, pairs: Pairs, candidates: Candidates, *, learn: bool
    ) -> Float[Tensor, "2 local"] | None:
        """The quantiles; none while the queue is empty."""
        (queue,) = self._queue
        if queue.filled == 0:
            return None
        ids = pairs.sample_ids
        if ids is not None:
            ids = ids.to(queue.slots.device, non_blocking=True)
            ids = collectives.gather_constant(ids, pairs.layout)
        features = candidates.features.to(queue.slots.dtype)
        slots = nn.functional.normalize(queue.aligned(features.flip(0)), dim=-1)
        similarity = torch.bmm(features, slots.transpose(1, 2))
        exact = torch.promote_types(features.dtype, torch.float32)
        kept = torch.full_like(features[0, :, 0], queue.filled, dtype=exact)
        if (excluded := queue.excluded(ids, candidates.groups)) is not None:
            similarity.masked_fill_(excluded, MASKED)
            kept = (~excluded).sum(-1).to(exact).expand(len(kept)).contiguous()
            kept = queue.shard.sum(kept)
        above = (self.alpha * kept).floor_().long()
        threshold = self._largest(queue, similarity).gather(-1, above.expand(2, -1)[..., None])
        # Wherever the similarity at the quantile is computed again, rounding leaves it below.
        threshold = threshold.squeeze(-1) + 8 * torch.finfo(threshold.dtype).eps
        threshold = threshold.masked_fill(kept == 0, NO_BOUND)
        return pairs.layout.own(threshold).to(pairs.features.dtype)

    def _largest(
        self, queue: EmbeddingQueue, similarity: Float[Tensor, "2 batch owned"]
    ) -> Float[Tensor, "2 batch most"]:
        """The largest similarities over the slots of all ranks: one more than can be above."""
        most = math.floor(self.alpha * queue.filled) + 1
        own = min(most, similarity.shape[-1])
        largest = similarity.topk(own).values
        if queue.shard.is_full:
            return largest
        padded = nn.functional.pad(largest, (0, most - own), value=MASKED)
        everybody = collectives.gather_constant(padded.permute(2, 0, 1).contiguous())
        return everybody.permute(1, 2, 0).topk(most).values


@torch.no_grad()
def count_above(
    features: Float[Tensor, "2 local dim"],
    candidates: Candidates,
    thresholds: Float[Tensor, "2 local"],
) -> Int64[Tensor, "2 local"]:
    """Counts the negatives of each anchor whose similarity exceeds its threshold."""
    found = torch.zeros_like(thresholds, dtype=torch.int64)
    for side in (0, 1):
        rows, columns = features[side], candidates.features[1 - side]
        start, excluded = candidates.layout.start, candidates.excluded
        for block, similarity in row_blocks(rows, columns, start, excluded):
            found[side, block] = (similarity > thresholds[side, block, None]).sum(1)
    return found
