"""The anchors of all ranks as constants: what prototypes and queues of embeddings read."""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from neuclip.method.notation import Anchors, has_estimate
from neuclip.parallel import collectives


@dataclass(frozen=True)
class GlobalBatch:
    """The anchors of all ranks, as constants.

    Attributes:
        features: images, texts.
        positive: s_ii.
        logit_scale: 1 / tau.
        log_inner: log g^_i.
        epsilon: stabiliser of the objective.
        sample_ids: the anchors' ids, if given and asked for.
        groups: the anchors' groups, if given.
        thresholds: the anchors' thresholds, if they have any.
        offsets: what `offset` has computed.
    """

    features: Float[Tensor, "2 batch dim"]
    positive: Float[Tensor, " batch"]
    logit_scale: Float[Tensor, ""]
    log_inner: Float[Tensor, "2 batch"]
    epsilon: float
    sample_ids: Int64[Tensor, " batch"] | None
    groups: Int64[Tensor, "batch kinds"] | None
    thresholds: Float[Tensor, "2 batch"] | None
    offsets: dict[float, Tensor] = field(default_factory=dict[float, Tensor], repr=False)

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        anchors: Anchors,
        dtype: torch.dtype,
        epsilon: float = 0.0,
        *,
        with_sample_ids: bool = False,
    ) -> "GlobalBatch":
        """Gathers the batch estimates of all ranks, and the sample ids in the same message."""
        features = anchors.global_features.to(dtype)
        one_rank = len(anchors.pairs.layout.sizes) == 1
        positive = anchors.positive.detach() if one_rank else (features[0] * features[1]).sum(-1)
        numbers, ids = anchors.log_inner.detach().T, anchors.pairs.sample_ids
        if not with_sample_ids or ids is None:
            log_inner, ids = collectives.gather_constant(numbers, anchors.pairs.layout), None
        else:
            bits = ids.to(numbers.device, non_blocking=True)[:, None].view(numbers.dtype)
            message = torch.cat([numbers, bits], 1)
            message = collectives.gather_constant(message, anchors.pairs.layout)
            log_inner, bits = message[:, :2], message[:, 2:]
            ids = bits.contiguous().view(torch.int64).squeeze(1)
        thresholds = anchors.pairs.thresholds
        return cls(
            features=features,
            positive=positive.to(dtype),
            logit_scale=anchors.logit_scale.detach().to(dtype),
            log_inner=log_inner.T.to(dtype),
            epsilon=epsilon,
            sample_ids=ids,
            groups=anchors.global_groups,
            thresholds=None if thresholds is None else thresholds.everybody.to(dtype),
        )

    def precompute(self, prototypes: int) -> None:
        """Computes what the inner steps of this batch have in common.

        Compiled steps must find it: the memory of a CUDA graph is overwritten by its next call.

        Args:
            prototypes: number of prototypes that their means are over.
        """
        _ = self.offset(math.log(prototypes)), self.scaled, self.weighted, self.log_target

    @property
    def leaves_out(self) -> bool:
        """Whether an anchor may have no negative, in the batch or among the prototypes."""
        return self.groups is not None or self.thresholds is not None

    @property
    def known(self) -> Bool[Tensor, "2 batch"] | None:
        """Which anchors have a negative in the batch; none: all, because none leaves out any."""
        return has_estimate(self.log_inner) if self.leaves_out else None

    @cached_property
    def scaled(self) -> Float[Tensor, "2 batch dim"]:
        """The features over tau."""
        return self.features * self.logit_scale

    @cached_property
    def shift(self) -> Float[Tensor, " batch"]:
        """s_ii over tau."""
        return self.positive * self.logit_scale

    def offset(self, log_count: float) -> Float[Tensor, " batch"]:
        """s_ii over tau, plus the logarithm of the number of prototypes in the mean."""
        if log_count not in self.offsets:
            self.offsets[log_count] = self.shift + log_count
        return self.offsets[log_count]

    @cached_property
    def share(self) -> float | Float[Tensor, "2 batch"]:
        """The weight of each anchor in the mean over those that have a negative."""
        known = self.known
        if known is None:
            return 1 / self.features.shape[1]
        return known / known.sum(-1, keepdim=True).clamp_min(1)

    @cached_property
    def weighted(self) -> Float[Tensor, "2 batch dim"]:
        """The features times `share`."""
        share = self.share
        return self.features * (share[..., None] if isinstance(share, Tensor) else share)

    @cached_property
    def log_epsilon(self) -> Float[Tensor, ""] | None:
        """The logarithm of epsilon; none if it is 0."""
        return self.log_inner.new_full((), math.log(self.epsilon)) if self.epsilon else None

    @cached_property
    def log_target(self) -> Float[Tensor, "2 batch"]:
        """Log q_i, the batch's own log-normalizers."""
        return self.plus_epsilon(self.log_inner)

    def plus_epsilon(self, log_value: Float[Tensor, "2 batch"]) -> Float[Tensor, "2 batch"]:
        """`log_plus` with this batch's epsilon."""
        if self.log_epsilon is None:
            return log_value
        return torch.logaddexp(log_value, self.log_epsilon)

    @property
    def candidates(self) -> Float[Tensor, "2 batch dim"]:
        """Texts (candidates of image anchors), images."""
        return self.features.flip(0)
