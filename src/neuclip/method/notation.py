"""The vocabulary of the mathematics.

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

Section = Callable[[str], AbstractContextManager[None]]


def no_section(name: str) -> AbstractContextManager[None]:
    """The default of a loss's `section`: takes no times."""
    return nullcontext()


@dataclass(frozen=True)
class Pairs:
    """This rank's pairs of a global batch."""

    features: Float[Tensor, "2 local dim"]
    """Images, texts."""
    layout: BatchLayout
    """Which of the global batch they are."""
    sample_ids: Int64[Tensor, " local"] | None = None


@dataclass(frozen=True)
class Anchors:
    """A batch as a normalizer sees it: this rank's anchors with gradient, all others without."""

    pairs: Pairs
    """This rank's."""
    positive: Float[Tensor, " local"]
    """s_ii."""
    log_inner: Float[Tensor, "2 local"]
    """log g^_i over the global batch."""
    logit_scale: Float[Tensor, "*scales"]
    """One for all, or one per side and anchor."""
    global_features: Float[Tensor, "2 batch dim"]
    """Anchors of all ranks, without gradient."""
    dlog_inner_dscale: Float[Tensor, "2 local"] | None = None
    """Derivative of log_inner by logit_scale, as a constant, if there is a scale per anchor."""


@runtime_checkable
class Normalizer(Protocol):
    """Where the log-normalizers come from."""

    @property
    def direct(self) -> bool:
        """Whether the estimate is a differentiable objective itself, not the conjugate's alpha."""
        ...

    @property
    def needs_sample_ids(self) -> bool:
        """Whether `Anchors.sample_ids` must be there for an `estimate`."""
        ...

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """The log-normalizers to use for a training batch; updates the normalizer's own state."""
        ...

    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """What the normalizer alone says of some anchors, changing nothing."""
        ...

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last `estimate`."""
        ...


@runtime_checkable
class SharedOut(Protocol):
    """Part of a loss whose state is shared out over ranks."""

    def gathered(self) -> AbstractContextManager[None]:
        """All of its state on every rank meanwhile, to predict from; all ranks enter together."""
        ...
