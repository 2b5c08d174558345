"""The symbols of the mathematics, and the types that losses and normalizers exchange.

Symbols (NeuCLIP, arXiv 2511.08417; FastCLIP, arXiv 2407.01445) and their names in the code:

    e1_i, e2_i    image_features, text_features   unit-norm embeddings of pair i
    s_ij          similarity                      e1_i . e2_j
    1 / tau       logit_scale                     tau is the temperature
    g_i           exp(log_inner)                  mean over j != i of exp((s_ij - s_ii) / tau)
    alpha_i       log_normalizer                  estimate of log(epsilon + g_i)

Image and text anchors are treated alike, so most tensors carry a leading axis `side` of length 2:
index 0 for image anchors (against texts), index 1 for text anchors (against images).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from neuclip.method.arithmetic import PLAIN, Arithmetic
from neuclip.method.softmax.candidates import Candidates, Thresholds
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout

NO_ESTIMATE = -1e30
"""log g^ of an anchor without a negative. Minus infinity times 0 would be NaN."""

LOGIT_SCALE_BOUNDS = (1.0, 100.0)
"""Within which 1 / temperature is kept after each step, as by open_clip."""

SectionTimer = Callable[[str], AbstractContextManager[None]]
"""Called with the name of a part of the step; times what runs inside."""


def no_timer(name: str) -> AbstractContextManager[None]:
    """The section timer that takes no times."""
    return nullcontext()


@dataclass(frozen=True)
class Pairs:
    """This rank's pairs of a global batch.

    Attributes:
        features: embeddings of the images and of the texts.
        layout: how the global batch is split over ranks.
        sample_ids: the pairs' ids in the data, if given.
        groups: ids of the pairs' groups, one column a kind; 0: none. Two pairs with the same id of
            some kind are not negatives of each other. None: all pairs are.
        weights: weights of the pairs in the loss; none: all weigh the same.
        negatives: embeddings of the texts' hard negatives; rows of pairs without one are 0.
        keys: embeddings of the same images and texts by momentum towers, as constants, for losses
            that contrast with them.
        candidates: the pairs of all ranks, if they were gathered already.
        arithmetic: how the loss computes.
    """

    features: Float[Tensor, "2 local dim"]
    layout: BatchLayout
    sample_ids: Int64[Tensor, " local"] | None = None
    groups: Int64[Tensor, "local kinds"] | None = None
    weights: Float[Tensor, " local"] | None = None
    negatives: Float[Tensor, "local dim"] | None = None
    keys: Float[Tensor, "2 local dim"] | None = None
    candidates: Candidates | None = None
    arithmetic: Arithmetic = PLAIN

    @property
    def leaves_out(self) -> bool:
        """Whether an anchor may have no negative."""
        return self.groups is not None or self.thresholds is not None

    @property
    def thresholds(self) -> Thresholds | None:
        """Of the anchors; none: they leave out no candidate for its similarity."""
        return None if self.candidates is None else self.candidates.thresholds

    def mean(self, values: Float[Tensor, "*rows local"]) -> Float[Tensor, "*rows"]:
        """The weighted mean over the pairs (last axis); its mean over ranks is the global one."""
        if self.weights is None:
            return self.layout.mean(values)
        return (values * shares(self.weights, self.layout)).sum(-1)


def shares(
    weights: Float[Tensor, "*rows local"], layout: BatchLayout
) -> Float[Tensor, "*rows local"]:
    """Weights over their mean over ranks of the sum: then a sum's mean over ranks is a mean.

    They are 0 if all weights are.
    """
    total = collectives.mean_over_ranks(weights.sum(-1, keepdim=True))
    return weights / total.clamp_min(torch.finfo(weights.dtype).tiny)


@dataclass(frozen=True)
class Anchors:
    """The batch as a normalizer sees it: this rank's anchors with gradient, all others without.

    Attributes:
        pairs: this rank's pairs.
        positive: s_ii.
        log_inner: log g^_i over the global batch; `NO_ESTIMATE` for an anchor without a negative.
        logit_scale: 1 / tau, one for all anchors or one per anchor of each side.
        global_features: embeddings of all ranks, as constants.
        negatives: the number of candidates that g^_i is the mean over, one for all without groups
            or hard negatives.
        global_groups: groups of the pairs of all ranks; none: they were not given.
        dlog_inner_dscale: derivative of log_inner by logit_scale, as a constant; only with a scale
            per anchor.
    """

    pairs: Pairs
    positive: Float[Tensor, " local"]
    log_inner: Float[Tensor, "2 local"]
    logit_scale: Float[Tensor, "*scales"]
    global_features: Float[Tensor, "2 batch dim"]
    negatives: int | Float[Tensor, "*sides local"]
    global_groups: Int64[Tensor, "batch kinds"] | None = None
    dlog_inner_dscale: Float[Tensor, "2 local"] | None = None

    @property
    def known(self) -> Bool[Tensor, "2 local"] | None:
        """Which anchors have a negative; none: all, because none of them leaves out any."""
        return has_estimate(self.log_inner) if self.pairs.leaves_out else None

    def log_sums(self) -> tuple[Float[Tensor, "2 local"], Float[Tensor, "*sides local"]]:
        """Log of the sum over the anchor's negatives in the batch, and how many they are."""
        negatives, inner = self.negatives, self.log_inner
        if not isinstance(negatives, Tensor):
            return inner + math.log(negatives), inner.new_full(inner.shape, negatives)
        return inner + negatives.clamp_min(1).log(), negatives

    def mean(self, values: Float[Tensor, "*rows 2 local"]) -> Float[Tensor, "*rows 2"]:
        """As `Pairs.mean`, over the anchors that have a negative."""
        known = self.known
        if known is None:
            return self.pairs.mean(values)
        weights = known.to(values.dtype)
        if self.pairs.weights is not None:
            weights = weights * self.pairs.weights
        return (values * shares(weights, self.pairs.layout)).sum(-1)

    def average(self, values: Float[Tensor, "2 local"]) -> Float[Tensor, ""]:
        """For metrics: the plain mean over this rank's anchors that have a negative."""
        return known_mean(values, self.known)


def has_estimate(log_inner: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Whether a batch estimate is one, and not `NO_ESTIMATE`."""
    return log_inner.detach() > NO_ESTIMATE / 2


def known_mean(
    values: Float[Tensor, "*shape"], known: Bool[Tensor, "*shape"] | None
) -> Float[Tensor, ""]:
    """Mean of the values that are known; 0 if none is."""
    if known is None:
        return values.mean()
    return values.masked_fill(~known, 0).sum() / known.sum().clamp_min(1)


@runtime_checkable
class Normalizer(Protocol):
    """A source of log-normalizers."""

    @property
    def direct(self) -> bool:
        """Whether the estimate is a differentiable objective itself, not the conjugate's alpha."""
        ...

    @property
    def needs_sample_ids(self) -> bool:
        """Whether `estimate` needs `Pairs.sample_ids`."""
        ...

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Returns the log-normalizers for a training batch, and updates the normalizer's state."""
        ...

    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Predicts log-normalizers without the batch estimate, as far as the method can."""
        ...

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last `estimate`."""
        ...


@runtime_checkable
class ShardedState(Protocol):
    """A part of a loss whose state is sharded over ranks."""

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every rank has the full state to predict from; all ranks enter together."""
        ...
