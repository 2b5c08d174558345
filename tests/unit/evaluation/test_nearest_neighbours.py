"""Votes of the nearest samples, against loops."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from neuclip.evaluation import nearest_neighbours
from neuclip.evaluation.nearest_neighbours import NeighbourVotes


@pytest.mark.parametrize(("rows", "block"), [(256, 2**16), (3, 7), (2, 50)])
@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_agrees_with_loops(monkeypatch, rows, block, k):
    monkeypatch.setattr(nearest_neighbours, "_ROWS_AT_ONCE", rows)
    monkeypatch.setattr(nearest_neighbours, "_SAMPLES_AT_ONCE", block)
    generator = torch.Generator().manual_seed(2)
    samples = normalize(torch.randn(50, 6, generator=generator), dim=-1)
    queries = normalize(torch.randn(8, 6, generator=generator), dim=-1)
    classes = torch.randint(0, 9, (50,), generator=generator)
    found = NeighbourVotes(samples, classes, 11, k, 0.3)(queries)
    for query, scores in zip(queries, found, strict=True):
        similar = [float(query.double() @ sample.double()) for sample in samples]
        nearest = sorted(range(50), key=lambda row: -similar[row])[:k]
        votes = {}
        for row in nearest:
            weight = math.exp((similar[row] - similar[nearest[0]]) / 0.3)
            votes[int(classes[row])] = votes.get(int(classes[row]), 0.0) + weight
        expected = [votes.get(number, -math.inf) for number in range(11)]
        assert scores.tolist() == pytest.approx(expected, rel=1e-4)


def test_a_small_temperature_does_not_overflow():
    samples = torch.eye(3)
    votes = NeighbourVotes(samples, torch.tensor([0, 1, 2]), 3, 3, 1e-4)(samples)
    assert votes.isfinite().all() and votes.argmax(dim=1).tolist() == [0, 1, 2]
