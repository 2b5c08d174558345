"""Ranks candidates: how many wrong ones precede a right one, and which one comes first.

Ties count `against` the model by default: a wrong candidate with the score of the best right one
precedes it. A model that gives every candidate the same score is then never right, in whatever
order they come; without ties the result is that of `topk`. The published benchmarks take the
`first` of equal candidates instead. The two differ where two classes have one name (as in ImageNet)
or two captions are equal.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

SCORES_AT_ONCE = 2**22
Ties = Literal["against", "first"]
Scores = Callable[[Tensor], Tensor]
"""The scores of all candidates for some queries: [rows, dim] to [rows, candidates]."""


class Ranking(NamedTuple):
    """The candidates' order for each query, in short. Tensors are on the CPU.

    Attributes:
        ahead: number of wrong candidates that precede the best right one; the query is right at k
            if this is below k.
        best: the candidate with the highest score, the first of equal ones.
    """

    ahead: Int64[Tensor, " queries"]
    best: Int64[Tensor, " queries"]


def rank(
    queries: Float[Tensor, "queries dim"],
    candidates: Float[Tensor, "candidates dim"],
    right: Int64[Tensor, "pairs 2"],
    ties: Ties = "against",
) -> Ranking:
    """Ranks the candidates for every query by inner product.

    Args:
        queries: features of the queries.
        candidates: features of the candidates.
        right: as in `rank_by`.
        ties: the rule for equal scores.
    """
    return rank_by(queries, lambda rows: rows @ candidates.T, len(candidates), right, ties)


def rank_by(
    queries: Float[Tensor, "queries dim"],
    score: Scores,
    candidates: int,
    right: Int64[Tensor, "pairs 2"],
    ties: Ties = "against",
) -> Ranking:
    """Ranks the candidates for every query by given scores.

    Memory is bounded: a few arrays of `SCORES_AT_ONCE` scores, or of one row if that is more.

    Args:
        queries: features of the queries.
        score: the scores of all candidates for some queries, [rows, candidates]. A candidate with a
            score of -inf is never found: the others precede it.
        candidates: number of candidates.
        right: pairs (query, candidate) that belong together, any number per query. All candidates
            precede the right one of a query without any.
        ties: the rule for equal scores.
    """
    right = right.to("cpu").unique(dim=0)
    rows = max(1, SCORES_AT_ONCE // candidates)
    counts: list[Tensor] = []
    chosen: list[Tensor] = []
    for start in range(0, len(queries), rows):
        scores = score(queries[start : start + rows])
        device = scores.device
        window = torch.tensor([start, start + len(scores)])
        low, high = torch.searchsorted(right[:, 0].contiguous(), window).tolist()
        pairs = right[low:high].to(device)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[pairs[:, 0] - start, pairs[:, 1]] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ahead = scores >= best
        if ties == "first":
            # The first of the best right candidates: argmax returns the first of equal values.
            place = (is_right & ahead).byte().argmax(dim=1, keepdim=True)
            behind = torch.arange(candidates, device=device) > place
            ahead &= ~((scores == best) & behind & (best > -torch.inf))
        counts.append((ahead & ~is_right).sum(dim=1).to("cpu"))
        chosen.append(scores.argmax(dim=1).to("cpu"))
    return Ranking(torch.cat(counts), torch.cat(chosen))
