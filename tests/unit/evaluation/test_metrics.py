"""Metrics against loops written from their definitions."""

import pytest
import torch

from neuclip.evaluation.metrics import (
    Choices,
    accuracy,
    group_accuracies,
    jaccard,
    macro_recall_and_f1,
    mean_per_class_recall,
    worst_group,
)
from neuclip.evaluation.ranking import rank
from neuclip.evaluation.zero_shot import DATACOMP_RULES, classify


def draw(seed, samples=300, classes=12):
    """Choices with two absent classes, and one that is chosen but never right."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes - 3, (samples,), generator=generator)
    scores = torch.randn(samples, classes, generator=generator)
    scores[:, -2:] -= 100
    scores[torch.arange(samples), target] += 1.0
    order = scores.argsort(dim=1, descending=True)
    ahead = (order == target[:, None]).int().argmax(dim=1).long()
    return Choices(ahead, order[:, 0].contiguous(), target, torch.ones_like(target), classes)


@pytest.mark.parametrize("seed", range(3))
def test_accuracy_and_recall(seed):
    choices = draw(seed)
    pairs = list(zip(choices.chosen.tolist(), choices.target.tolist(), strict=True))
    assert accuracy(choices.right_at(1)) == pytest.approx(sum(c == t for c, t in pairs) / 300)
    recalls = []
    for name in range(12):
        of_class = [c for c, t in pairs if t == name]
        if of_class:  # balanced accuracy leaves absent classes out
            recalls.append(of_class.count(name) / len(of_class))
    assert len(recalls) < 12
    expected = sum(recalls) / len(recalls)
    found = mean_per_class_recall(choices.right_at(1), choices.target)
    assert found == pytest.approx(expected, abs=1e-12)
    assert macro_recall_and_f1(choices)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1(seed):
    choices = draw(seed)
    pairs = list(zip(choices.chosen.tolist(), choices.target.tolist(), strict=True))
    scores = []
    for name in sorted({t for _, t in pairs}):
        hits = sum(c == t == name for c, t in pairs)
        precision = hits / max(1, sum(c == name for c, _ in pairs))
        recall = hits / sum(t == name for _, t in pairs)
        scores.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert any(c == 9 for c, _ in pairs)  # chosen, never right: not a class of its own
    assert macro_recall_and_f1(choices)[1] == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_a_class_that_is_never_chosen_has_an_f1_of_zero():
    chosen, target = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    recall, f1 = macro_recall_and_f1(
        Choices((chosen != target).long(), chosen, target, torch.ones(3, dtype=torch.int64), 2)
    )
    assert (recall, f1) == (0.5, pytest.approx(0.4))


def test_the_worst_group():
    right = torch.tensor([True, False, True, True, False, False])
    groups = torch.tensor([3, 3, 3, 7, 7, 5])
    found = group_accuracies(right, groups)
    assert found == {3: pytest.approx(2 / 3), 5: 0.0, 7: 0.5}
    assert worst_group(found) == 0.0
    assert worst_group(found, left_out=[5]) == 0.5
    with pytest.raises(ValueError, match="no sample belongs to a group that counts"):
        worst_group(found, left_out=[3, 5, 7])


def test_jaccard():
    assert jaccard([1, 2], [2, 1]) == 1.0
    assert jaccard([1, 2], [2, 3]) == pytest.approx(1 / 3)
    assert jaccard([1], [2]) == 0.0


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
def test_of_equal_scores_the_first_candidate(monkeypatch, at_once):
    monkeypatch.setattr("neuclip.evaluation.ranking.SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    # Small integers: equal scores are exact, and there are many.
    queries = torch.randint(-2, 3, (40, 3), generator=generator).float()
    candidates = torch.randint(-2, 3, (15, 3), generator=generator).float()
    right = {(q, c) for q in range(40) for c in (q % 15, (q * 7) % 15)}
    pairs = torch.tensor(sorted(right))
    found = rank(queries, candidates, pairs, ties="first")
    against = rank(queries, candidates, pairs)
    scores = (queries @ candidates.T).tolist()
    ties = 0
    for query in range(40):
        order = sorted(range(15), key=lambda c: (-scores[query][c], c))
        place = next(i for i, c in enumerate(order) if (query, c) in right)
        assert found.ahead[query] == place
        assert found.best[query] == against.best[query] == order[0]
        ties += against.ahead[query] > place
    assert ties > 5  # where it matters, the other rule counts against the model


def test_two_classes_of_one_name(make_split):
    """The first is chosen, as by DataComp's argmax; the rules of own splits count both as wrong."""
    split = make_split([0, 1, 2], ["a", "b", "c"], [0, 1, 2])
    vectors = split.image_features[[0, 0, 2]]
    split.image_features[1] = split.image_features[0]
    choices = classify(split, vectors, ["crane", "crane", "dog"], DATACOMP_RULES)
    assert choices.chosen.tolist() == [0, 0, 2]
    assert choices.ahead.tolist() == [0, 1, 0]
