"""Variants of methods that suspects need, for runs of one process, as the study's are."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from neuclip.catalogue.building import robust_objective
from neuclip.catalogue.fastclip import RGCLBatchSettings
from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.registry import method_info, register
from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss, Objective
from neuclip.method.losses.infonce import InfoNCELoss
from neuclip.method.losses.pair_loss import anchors_of
from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.minibatch import MinibatchNormalizer
from neuclip.method.normalizers.pool import PoolNormalizer
from neuclip.method.normalizers.prototype_network import NetworkOutput
from neuclip.method.notation import Anchors, Normalizer, Pairs
from neuclip.method.objective import log_plus
from neuclip.parallel.collectives import layout_of
from studies.quality.cell import BATCH
from studies.shared.pool_variants import MakeLoss, register_pool_variant

GROUP = 16
"""Pairs in a group, a quarter of the batch of 64."""


class ConstantTemperature(GlobalContrastiveLoss):
    """The temperature stays where it starts; rho has no effect."""

    def __init__(self, embed_dim: int, normalizer: PoolNormalizer, objective: Objective) -> None:
        super().__init__(embed_dim, normalizer, replace(objective, rho=0.0))
        self.learns_temperature = False


class InfoNCETemperature(GlobalContrastiveLoss):
    """The temperature learns by InfoNCE over the batch, the towers by the pool's objective.

    The towers see the learned temperature as a constant, and InfoNCE sees the embeddings as
    constants. Rho has no effect. The value is that of the pool's objective.
    """

    def __init__(self, embed_dim: int, normalizer: PoolNormalizer, objective: Objective) -> None:
        super().__init__(embed_dim, normalizer, replace(objective, rho=0.0))
        self._infonce = InfoNCELoss(embed_dim)

    def pair_loss(self, pairs: Pairs, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
        loss = super().pair_loss(pairs, logit_scale.detach(), logit_bias)
        constant = replace(pairs, features=pairs.features.detach(), candidates=None)
        infonce = self._infonce.pair_loss(constant, logit_scale, None)
        return loss + infonce - infonce.detach()


class MomentumPool(PoolNormalizer):
    """The pool holds embeddings by momentum towers; the batch's own are the towers', as ever."""

    def estimate(self, anchors: Anchors) -> Tensor:
        keys = anchors.pairs.keys
        assert keys is not None
        self._keys = keys
        return super().estimate(anchors)

    def _push(self, batch: GlobalBatch) -> None:
        self.ring.enter(self._keys.flip(0), batch.sample_ids, batch.groups)


class MomentumLoss(GlobalContrastiveLoss):
    """Asks the trainer for keys, with the momentum of `moco`."""

    key_momentum = 0.995


class PoolWithTerm(PoolNormalizer):
    """A pool whose predictions have the gradient of a further term, and the same values."""

    def estimate(self, anchors: Anchors) -> Tensor:
        self._term = self.term(anchors) if self.ring.filled else None
        return super().estimate(anchors)

    def term(self, anchors: Anchors) -> Tensor:
        """The term of each anchor, [2, batch], before the batch enters the pool."""
        raise NotImplementedError

    def _mix(self, predicted: Tensor, batch: Tensor, gamma: float) -> Tensor:
        if self._term is not None:
            predicted = predicted + (self._term - self._term.detach())
        return super()._mix(predicted, batch, gamma)


class BalancedPool(PoolWithTerm):
    """The gradient through the pool moves an anchor only, not the other embedding of its pair.

    An embedding in the pool is a constant: it is pushed by no anchor. But the positive of an anchor
    is not, and the gradient of s_ii pulls both embeddings of the pair, for either of them as the
    anchor. So each embedding is pulled twice and pushed once. Here s_ii of a prediction is

        e1_i . constant(e2_i)  for image anchors,  constant(e1_i) . e2_i  for text anchors,

    as in MoCo, whose positives are constants like its negatives.
    """

    def term(self, anchors: Anchors) -> Tensor:
        features = anchors.pairs.features
        own = (features * features.flip(0).detach()).sum(-1)
        return anchors.logit_scale.detach() * (anchors.positive - own)


class TwoSidedPool(PoolWithTerm):
    """The pool's embeddings are anchors, too: they push the embeddings of the batch away.

    The whole objective moves e1_i as an anchor, and as a negative of every other text anchor k:

        d L / d e1_i  ~  sum_k p1_ik e2_k + sum_k p2_ki e2_k - 2 e2_i
        p1_ik = exp(s_ik / tau - b1_i),  p2_ki = exp(s_ik / tau - b2_k),  b_k = s_kk / tau + alpha_k

    The recipe has the first sum and the last term from the pool, and the second sum from the batch
    alone. Here each embedding in the pool keeps its own b_k, of the time when it entered, and p2_ki
    is normalised over the newest k, since it gets stale.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.register_buffer("log_partition", self.ring.slots.new_zeros(self.ring.slots.shape[:2]))

    def estimate(self, anchors: Anchors) -> Tensor:
        found = super().estimate(anchors)
        own = anchors.logit_scale * anchors.positive + found
        own = own.detach().flip(0)  # texts first, as in the pool
        batch = own.shape[1]
        for first, rows in self.ring.shard.window(self.ring.written - batch, batch):
            self.log_partition[:, rows] = own[:, first : first + rows.stop - rows.start]
        return found

    def candidates(self, anchors: Anchors) -> Tensor:
        """The embeddings that push, [2, slots, dim], texts first."""
        return self.ring.slots

    def term(self, anchors: Anchors) -> Tensor:
        """e1_i . sum_k p2_ki e2_k / tau beside the text anchor i, and the same for the images."""
        pairs, scale = anchors.pairs, anchors.logit_scale.detach()
        newest = min(self.settings.gradient_size or self.ring.shard.size, self.ring.filled)
        rows = torch.cat([torch.arange(r.start, r.stop) for r in self.ring.newest(newest)])
        others = self.candidates(anchors)[:, rows]
        with torch.no_grad():
            logits = scale * pairs.features @ others.mT - self.log_partition[:, None, rows]
            if pairs.sample_ids is not None:
                assert self.ring.sample_ids is not None
                again = pairs.sample_ids[:, None] == self.ring.sample_ids[0, rows]
                logits.masked_fill_(again, -1e30)
            centre = logits.softmax(-1) @ others
        return scale * (pairs.features * centre).sum(-1).flip(0)


class MovingPool(PoolNormalizer):
    """The pool's embeddings are shifted so that their mean is the batch's, then normalised.

    Without this, all embeddings can rotate away from the pool together. That lowers the loss
    without telling any pair from another: positives rotate along.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.ring.alignment = "mean"


class AlignedPool(MovingPool, BalancedPool):
    """A pool that moves with the batch; positives are constants in the gradient through it."""


class AlignedTwoSidedPool(MovingPool, TwoSidedPool):
    """A pool that moves with the batch and pushes it.

    Positives are not constants. Each slot keeps its log-partition from when it entered, against
    the pool as shifted then.
    """

    def candidates(self, anchors: Anchors) -> Tensor:
        """The slots, moved."""
        moved = self.ring.aligned(anchors.pairs.features.detach().flip(0))
        return torch.nn.functional.normalize(moved, dim=-1)


class VarianceGamma(PoolNormalizer):
    """Gamma by the variance of each anchor's batch estimate, between gamma and 1.

    With p the softmax of anchor i over the pool of m, the mean over B - 1 random negatives has the
    relative variance

        v_i = (m sum_k p_ik^2 - 1) / (B - 1)

    and the anchor mixes with gamma_i = gamma + (1 - gamma) / (1 + v_i): an anchor whose batch
    estimate is good uses it, one with few hard negatives uses the pool, and no weight exceeds
    1 / gamma. The 1 stands for the variance of a prediction by stale embeddings: a factor of e.
    """

    def _read(self, batch: GlobalBatch) -> NetworkOutput:
        output = super()._read(batch)
        weights = output.weights * output.norm
        relative = self.ring.filled * weights.square().sum(-1) - 1
        self._trust = 1 / (1 + relative.clamp_min(0) / (batch.features.shape[1] - 1))
        return output

    def _mix(self, predicted: Tensor, batch: Tensor, gamma: float) -> Tensor:
        if gamma >= 1:
            self._gamma = predicted.new_ones(())
            return batch.detach()
        own = (gamma + (1 - gamma) * self._trust).to(predicted.dtype)
        self._gamma = own.mean()
        return torch.logaddexp(predicted + torch.log1p(-own), batch.detach() + own.log())

    def metrics(self) -> dict[str, Tensor | float]:
        """As the pool's, with the mean of the anchors' own gamma."""
        found = super().metrics()
        return {**found, "gamma": self._gamma} if found else found


class GroupedBatch(GlobalContrastiveLoss):
    """The mean objective of groups of the batch's pairs, in their order.

    Of the batch, an anchor has the other pairs of its group as negatives. The steps, their pairs
    and the form of the loss are those of the whole batch. A pool takes one group after the other.
    """

    def __init__(
        self, embed_dim: int, normalizer: Normalizer, objective: Objective, size: int = GROUP
    ) -> None:
        super().__init__(embed_dim, normalizer, objective)
        self.size = size

    def pair_loss(self, pairs: Pairs, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
        losses = [
            super(GroupedBatch, self).pair_loss(group, logit_scale, logit_bias)
            for group in self._groups(pairs)
        ]
        return torch.stack(losses).mean()

    def predict(self, pairs: Pairs, logit_scale: Tensor) -> Tensor:
        found = [
            super(GroupedBatch, self).predict(group, logit_scale) for group in self._groups(pairs)
        ]
        return torch.cat(found, dim=1)

    def _groups(self, pairs: Pairs) -> Iterator[Pairs]:
        for start in range(0, pairs.features.shape[1], self.size):
            mine = slice(start, start + self.size)
            features = pairs.features[:, mine]
            ids = None if pairs.sample_ids is None else pairs.sample_ids[mine]
            layout = layout_of(features.shape[1])
            yield Pairs(features, layout, ids, arithmetic=pairs.arithmetic)


class WholeBatchNormalizer(MinibatchNormalizer):
    """Normalizers of a whole batch, handed out to its groups in order."""

    def __init__(self, epsilon: float) -> None:
        super().__init__(epsilon)
        self._parts: Iterator[Tensor] = iter(())

    def know(self, log_inner: Tensor, size: int) -> None:
        """Takes the estimates of the whole batch, for its groups of `size` pairs."""
        self._parts = iter(log_plus(log_inner.detach(), self.epsilon).split(size, dim=-1))

    def estimate(self, anchors: Anchors) -> Tensor:
        """The estimates of the next group's anchors, as constants."""
        return next(self._parts)

    def predict(self, anchors: Anchors) -> Tensor:
        """The anchors' own estimates: a group knows no other negatives."""
        return super().estimate(anchors)


class WholeNormalizers(GroupedBatch):
    """Anchors have the negatives of their group, with the normalizers of the whole batch.

        tau / 2 mean_i exp(-alpha_i) g^_i + ...,  g^_i over the group, alpha_i over the batch

    So it has the gradient of few negatives with the normalizers of many, which are not stale: what
    the normalizers of the larger batch alone gain.
    """

    def __init__(
        self, embed_dim: int, normalizer: WholeBatchNormalizer, objective: Objective, size: int
    ) -> None:
        super().__init__(embed_dim, normalizer, objective, size)
        self._whole = normalizer

    def pair_loss(self, pairs: Pairs, logit_scale: Tensor, logit_bias: Tensor | None) -> Tensor:
        self._whole.know(anchors_of(pairs, logit_scale.detach()).log_inner, self.size)
        return super().pair_loss(pairs, logit_scale, logit_bias)


class GroupedPool(GroupedBatch):
    """The same with a pool, whose gamma takes as long as with the whole batch of 64."""

    def __init__(self, embed_dim: int, normalizer: PoolNormalizer, objective: Objective) -> None:
        super().__init__(embed_dim, normalizer, objective)
        gamma = normalizer.gamma
        normalizer.gamma = replace(gamma, end=BATCH // GROUP * gamma.end)


class GroupedSettings(RGCLBatchSettings):
    """Those of `rgcl_batch`, the size of the groups, and what their normalizers are over."""

    name: Literal["rgcl_groups"] = "rgcl_groups"
    group_size: int = GROUP
    normalizers: Literal["group", "batch"] = "group"


def _grouped(settings: GroupedSettings, run: RunFacts) -> GroupedBatch:
    objective, size = robust_objective(settings), settings.group_size
    if settings.normalizers == "batch":
        whole = WholeBatchNormalizer(settings.epsilon)
        return WholeNormalizers(run.embed_dim, whole, objective, size)
    normalizer = MinibatchNormalizer(settings.epsilon)
    return GroupedBatch(run.embed_dim, normalizer, objective, size)


GROUPED = "rgcl_groups"
POOL_VARIANTS: Mapping[str, tuple[type[PoolNormalizer], MakeLoss]] = {
    "pool_aligned": (AlignedPool, GlobalContrastiveLoss),
    "pool_aligned_two_sided": (AlignedTwoSidedPool, GlobalContrastiveLoss),
    "pool_balanced": (BalancedPool, GlobalContrastiveLoss),
    "pool_constant_temperature": (PoolNormalizer, ConstantTemperature),
    "pool_groups": (PoolNormalizer, GroupedPool),
    "pool_infonce_temperature": (PoolNormalizer, InfoNCETemperature),
    "pool_momentum": (MomentumPool, MomentumLoss),
    "pool_two_sided": (TwoSidedPool, GlobalContrastiveLoss),
    "pool_two_sided_groups": (TwoSidedPool, GroupedPool),
    "pool_variance_gamma": (VarianceGamma, GlobalContrastiveLoss),
}
"""Normalizer and loss of each variant of `neuclip_pool`, by method name."""


VARIANTS = (*POOL_VARIANTS, GROUPED)
"""Names of all variants."""


def register_variants() -> None:
    """Adds the variants to the catalogue of this process."""
    for name, parts in POOL_VARIANTS.items():
        register_pool_variant(name, *parts)
    batch = method_info("rgcl_batch")
    register(replace(batch, settings=GroupedSettings, build=_grouped, takes=frozenset()))
