"""k nearest neighbours by cosine similarity, with weighted votes (InstDisc, arXiv 1805.01978).

Each of the k training samples nearest to an image votes for its class with the weight
exp(similarity / temperature), as in DINO (arXiv 2104.14294).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

_ROWS_AT_ONCE = 256
_SAMPLES_AT_ONCE = 2**16


@dataclass(frozen=True)
class NeighbourVotes:
    """A classifier by votes; calling it gives scores.

    Attributes:
        features: unit-norm features of the training samples.
        classes: class of each sample.
        num_classes: number of classes, those without a sample included.
        k: number of neighbours; more than there are samples: all.
        temperature: of the weights.
    """

    features: Float[Tensor, "samples dim"]
    classes: Int64[Tensor, " samples"]
    num_classes: int
    k: int = 20
    temperature: float = 0.07

    def __call__(self, queries: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows classes"]:
        """The votes for each class, relative to the nearest neighbour's; -inf without a vote."""
        return torch.cat([self._votes(rows) for rows in queries.split(_ROWS_AT_ONCE)])

    def _votes(self, queries: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows classes"]:
        similarity, neighbours = self._nearest(queries)
        weights = ((similarity - similarity[:, :1]) / self.temperature).exp()
        chosen = self.classes.to(queries.device)[neighbours]
        votes = queries.new_zeros(len(queries), self.num_classes)
        rows = torch.arange(len(queries), device=queries.device)
        for place in range(weights.shape[1]):  # on a GPU, scatter_add_ sums in any order
            votes[rows, chosen[:, place]] += weights[:, place]
        voted = torch.zeros_like(votes, dtype=torch.bool)
        voted[rows[:, None], chosen] = True
        return votes.masked_fill(~voted, -torch.inf)

    def _nearest(
        self, queries: Float[Tensor, "rows dim"]
    ) -> tuple[Float[Tensor, "rows k"], Int64[Tensor, "rows k"]]:
        """Similarities of the neighbours, largest first, and their rows; in blocks of samples."""
        best = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        for start in range(0, len(self.features), _SAMPLES_AT_ONCE):
            block = self.features[start : start + _SAMPLES_AT_ONCE].to(queries.device)
            found = torch.cat([best, queries @ block.T], dim=1)
            numbers = torch.arange(start, start + len(block), device=queries.device)
            all_rows = torch.cat([rows, numbers.expand(len(queries), -1)], dim=1)
            best, places = found.topk(min(self.k, found.shape[1]), dim=1)
            rows = all_rows.gather(1, places)
        return best, rows
