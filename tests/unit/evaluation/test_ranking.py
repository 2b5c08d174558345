import pytest
import torch

from neuclip.evaluation import ranking
from neuclip.evaluation.ranking import rank


def naive(queries, candidates, right):
    counts = []
    for query in range(len(queries)):
        mine = {candidate for asked, candidate in right.tolist() if asked == query}
        scores = [sum(a * b for a, b in zip(queries[query].tolist(), c.tolist(), strict=True))
                  for c in candidates]  # fmt: skip
        best = max((scores[c] for c in mine), default=float("-inf"))
        counts.append(sum(s >= best for c, s in enumerate(scores) if c not in mine))
    return counts


@pytest.mark.parametrize("at_once", [1, 23, 2**22])
def test_counts_equal_a_double_loop(monkeypatch, at_once):
    monkeypatch.setattr(ranking, "SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    # Small integers: exact in any order of summation, and full of ties.
    queries = torch.randint(-2, 3, (17, 4), generator=generator).float()
    candidates = torch.randint(-2, 3, (11, 4), generator=generator).float()
    right = torch.stack(
        [
            torch.randint(0, 16, (40,), generator=generator),  # query 16 has no right candidate
            torch.randint(0, 11, (40,), generator=generator),
        ],
        dim=1,
    )
    counts = rank(queries, candidates, right).ahead
    assert counts.tolist() == naive(queries, candidates, right)
    assert counts[16] == 11


def test_ties_count_against_the_model_in_any_order():
    queries = torch.ones(4, 2)
    candidates = torch.ones(4, 2)
    right = torch.stack([torch.arange(4), torch.arange(4)], dim=1)
    assert rank(queries, candidates, right).ahead.tolist() == [3, 3, 3, 3]
