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

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor

from neuclip.parallel.collectives import BatchLayout

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
    """

    features: Float[Tensor, "2 local dim"]
    layout: BatchLayout
    sample_ids: Int64[Tensor, " local"] | None = None


@dataclass(frozen=True)
class Anchors:
    """The batch as a normalizer sees it: this rank's anchors with gradient, all others without.

    Attributes:
        pairs: this rank's pairs.
        positive: s_ii.
        log_inner: log g^_i over the global batch.
        logit_scale: 1 / tau, one for all anchors or one per anchor of each side.
        global_features: embeddings of all ranks, as constants.
        dlog_inner_dscale: derivative of log_inner by logit_scale, as a constant; only with a scale
            per anchor.
    """

    pairs: Pairs
    positive: Float[Tensor, " local"]
    log_inner: Float[Tensor, "2 local"]
    logit_scale: Float[Tensor, "*scales"]
    global_features: Float[Tensor, "2 batch dim"]
    dlog_inner_dscale: Float[Tensor, "2 local"] | None = None


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
