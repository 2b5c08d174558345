"""Draws of samples class by class."""

import pytest
import torch

from neuclip.evaluation.class_draws import draw_shots, hold_out_by_class

CLASSES = torch.tensor([0] * 10 + [2] * 3 + [5] + [7] * 2)[torch.randperm(16)]
SIZES = {0: 10, 2: 3, 5: 1, 7: 2}


def sizes(rows):
    numbers, counts = CLASSES[rows].unique(return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("shots", [1, 2, 4, 50])
def test_shots_of_each_class_or_all_it_has(shots):
    rows = draw_shots(CLASSES, shots, 3)
    assert sizes(rows) == {number: min(size, shots) for number, size in SIZES.items()}
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, draw_shots(CLASSES, shots, 3))


def test_seeds_draw_different_samples_alike_often():
    drawn = [draw_shots(CLASSES, 1, seed) for seed in range(400)]
    first = [int(rows[CLASSES[rows] == 0]) for rows in drawn]
    counts = [first.count(place) for place in (CLASSES == 0).nonzero().flatten().tolist()]
    assert sum(counts) == 400 and min(counts) > 15 and max(counts) < 80


@pytest.mark.parametrize(
    ("share", "held"),
    [(0.2, {0: 2, 2: 1, 7: 1}), (0.01, {0: 1, 2: 1, 7: 1}), (0.99, {0: 9, 2: 2, 7: 1})],
)
def test_a_share_of_each_class_is_held_out(share, held):
    """At least one of two samples, and never the last one."""
    halves = hold_out_by_class(CLASSES, share, 0)
    assert sizes(halves.held_out) == held
    both = torch.cat([halves.fitted, halves.held_out]).sort().values
    assert torch.equal(both, torch.arange(len(CLASSES)))
    assert set(CLASSES[halves.fitted].tolist()) == set(SIZES)
