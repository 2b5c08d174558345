"""Candidates that have no part in an anchor's sum, made block by block: no B x B mask is kept.

Anchors and candidates carry ids of groups, one row a kind (caption, image, label). A candidate is
excluded from an anchor's sum if both have the same id of some kind, other than 0. The relation is
symmetric: the gradient of a candidate leaves out the anchors that leave it out.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

AT_ONCE = 2**20
"""Comparisons in a block."""


@dataclass(frozen=True)
class Exclusion:
    """The groups of anchors and candidates.

    Attributes:
        anchors: group ids of the anchors; 0: none.
        candidates: group ids of the candidates; 0: none.
        offset: the first anchor's positive; the number of candidates: no anchor has one.
    """

    anchors: Int64[Tensor, "kinds anchors"]
    candidates: Int64[Tensor, "kinds candidates"]
    offset: int

    @cached_property
    def remaining(self) -> Int64[Tensor, " anchors"]:
        """The number of each anchor's candidates that are not excluded, nor its positive."""
        count, total = self.anchors.shape[1], self.candidates.shape[1]
        remaining = self.anchors.new_empty(count)
        size = max(1, AT_ONCE // total)
        for start in range(0, count, size):
            excluded = self.of(slice(start, start + size))
            excluded.diagonal(self.offset + start)[: len(excluded)].fill_(True)
            remaining[start : start + size] = total - excluded.sum(1)
        return remaining

    def of(self, block: slice) -> Bool[Tensor, "block candidates"]:
        """The excluded candidates of a block of anchors."""
        return same_group(self.anchors[:, block], self.candidates)


def only(present: Bool[Tensor, " candidates"], anchors: int) -> Exclusion:
    """Leaves the same candidates out of the sums of all anchors, none of which has a positive.

    Args:
        present: the candidates that are not left out.
        anchors: the number of anchors.
    """
    absent = (~present).long()[None]
    return Exclusion(absent.new_ones(1, anchors), absent, len(present))


def same_group(
    anchors: Int64[Tensor, "kinds anchors"], candidates: Int64[Tensor, "kinds candidates"]
) -> Bool[Tensor, "anchors candidates"]:
    """Whether an anchor and a candidate have the same id of some kind, other than 0."""
    found = torch.zeros(
        anchors.shape[1], candidates.shape[1], dtype=torch.bool, device=anchors.device
    )
    for ids, others in zip(anchors, candidates, strict=True):
        found |= (ids[:, None] == others).logical_and_((ids != 0)[:, None])
    return found
