"""The candidates of this rank's anchors: the pairs of all ranks, and which of them do not count.

An anchor leaves out the pairs of its groups, and, with a threshold, every candidate of a larger
similarity. Groups leave out pairs both ways. Thresholds belong to one anchor: image i may leave out
text j while text j keeps image i.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int64
from torch import Tensor

from neuclip.method.softmax.exclusion import Exclusion
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout


@dataclass(frozen=True)
class Thresholds:
    """Similarities above which a candidate is left out, as a false negative.

    Attributes:
        local: of this rank's anchors.
        everybody: of the anchors of all ranks.
        remaining: how many candidates of the batch each of this rank's anchors keeps.
    """

    local: Float[Tensor, "2 local"]
    everybody: Float[Tensor, "2 batch"]
    remaining: Float[Tensor, "2 local"]


@dataclass(frozen=True)
class Candidates:
    """The pairs of all ranks, as candidates of this rank's anchors.

    Attributes:
        features: their embeddings, as constants.
        layout: how the global batch is split over ranks.
        groups: their groups; none: they were not given.
        excluded: pairs in a group with an anchor; none: no groups were given.
        thresholds: of the anchors; none: they have none.
    """

    features: Float[Tensor, "2 batch dim"]
    layout: BatchLayout
    groups: Int64[Tensor, "batch kinds"] | None = None
    excluded: Exclusion | None = None
    thresholds: Thresholds | None = None

    @classmethod
    def gather(
        cls,
        features: Float[Tensor, "2 local dim"],
        groups: Int64[Tensor, "local kinds"] | None,
        layout: BatchLayout,
    ) -> "Candidates":
        """Gathers the pairs of all ranks.

        Args:
            features: embeddings of this rank's pairs.
            groups: groups of this rank's pairs.
            layout: how the global batch is split over ranks.
        """
        by_pair = collectives.gather_constant(features.transpose(0, 1), layout)
        everybody, excluded = None, None
        if groups is not None:
            everybody = collectives.gather_constant(groups, layout)
            excluded = Exclusion(groups.T.contiguous(), everybody.T.contiguous(), layout.start)
        return cls(by_pair.transpose(0, 1), layout, everybody, excluded)

    @property
    def counts(self) -> int | Float[Tensor, "*sides local"]:
        """How many candidates each of this rank's anchors keeps; one number: all keep as many."""
        if self.thresholds is not None:
            return self.thresholds.remaining
        if self.excluded is not None:
            return self.excluded.remaining.to(self.features.dtype)
        return self.layout.total - 1
