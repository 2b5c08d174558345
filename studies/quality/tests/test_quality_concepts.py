"""The weight of the softmax on pairs of the anchor's own concept."""

import math

import pytest
import torch
from studies.quality.concepts import reading_of, share_of
from studies.quality.recipes import RECIPES, cell
from studies.quality.suspects import SUSPECTS


def test_the_share_against_a_double_loop():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    features = torch.nn.functional.normalize(features, dim=2)
    ids, scale = [3, 3, 0, 0, -8, 3, 5], 4.0
    expected, others, first = [], [], []
    for side in (0, 1):
        total = found_first = 0.0
        for anchor in range(7):
            weights = [
                math.exp(scale * float(features[side, anchor] @ features[1 - side, other]))
                if other != anchor else 0.0
                for other in range(7)
            ]  # fmt: skip
            mine = [o for o in range(7) if o != anchor and ids[o] == ids[anchor] != 0]
            total += sum(weights[o] for o in mine) / sum(weights)
            others.append(len(mine))
            similarities = [float(features[side, anchor] @ features[1 - side, o]) for o in range(7)]
            nearest = similarities.index(max(similarities))
            found_first += nearest == anchor or nearest in mine
        expected.append(total / 7)
        first.append(found_first / 7)
    found = share_of(features, torch.tensor(ids), scale)
    assert found.weight == pytest.approx(expected)
    assert found.first == pytest.approx(first)
    assert found.others == pytest.approx(sum(others) / len(others))


def test_the_captions_are_those_that_the_run_trained_on():
    named = next(s for s in SUSPECTS if s.label == "names").cell("glyphs")
    recipe = cell(RECIPES["neuclip_pool"], "glyphs")
    assert [reading_of(each).caption_key for each in (recipe, named)] == [None, "name"]
    assert [reading_of(each).label_key for each in (recipe, named)] == ["name", "name"]
