"""The one question behind accuracy and recall: how many wrong candidates are ahead of a right one?

By default ties count against the model: a wrong candidate that scores exactly as high as the best
right one is ahead of it. So a model that gives everything one score is never right, whatever the
order of the candidates, and without ties the answer is that of `topk`. The published benchmarks
take the first candidate of equal score instead; it matters where two classes have one name (as in
ImageNet) or two captions are the same text.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

SCORES_AT_ONCE = 2**22
Ties = Literal["against", "first"]


def wrong_ahead(
    queries: Float[Tensor, "queries dim"],
    candidates: Float[Tensor, "candidates dim"],
    right: Int64[Tensor, "pairs 2"],
    ties: Ties = "against",
) -> Int64[Tensor, " queries"]:
    """Number of wrong candidates that come before the best right one.

    Memory is bounded: a few arrays of `SCORES_AT_ONCE` scores, or of one row if that is more.

    Args:
        queries: Features to look for.
        candidates: Features to choose from; the score is the inner product.
        right: Pairs (query, candidate) that are right; several per query are fine. A query
            without any has all candidates ahead.
        ties: Equal scores count `against` the model, or the `first` candidate comes first.

    Returns:
        The counts, on the CPU; a query is right at k when its count is below k.
    """
    device = queries.device
    right = right.to("cpu").unique(dim=0)
    rows = max(1, SCORES_AT_ONCE // len(candidates))
    counts: list[Tensor] = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ candidates.T
        window = torch.tensor([start, start + len(scores)])
        low, high = torch.searchsorted(right[:, 0].contiguous(), window).tolist()
        chosen = right[low:high].to(device)
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        is_right[chosen[:, 0] - start, chosen[:, 1]] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)
        ahead = scores >= best
        if ties == "first":
            # The first of the best right ones: argmax gives the first of equal values.
            place = (is_right & ahead).byte().argmax(dim=1, keepdim=True)
            behind = torch.arange(len(candidates), device=device) > place
            ahead &= ~((scores == best) & behind)
        counts.append((ahead & ~is_right).sum(dim=1).to("cpu"))
    return torch.cat(counts)


def best_candidate(
    queries: Float[Tensor, "queries dim"], candidates: Float[Tensor, "candidates dim"]
) -> Int64[Tensor, " queries"]:
    """The candidate of the highest score, on the CPU; of equal ones the first."""
    rows = max(1, SCORES_AT_ONCE // len(candidates))
    chosen = [(part @ candidates.T).argmax(dim=1).to("cpu") for part in queries.split(rows)]
    return torch.cat(chosen)
