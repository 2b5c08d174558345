import numpy as np
import pytest

from neuclip.evaluation.outcomes import Outcomes
from neuclip.report.bootstrap import DRAWS, difference, over_samples, over_tasks


def outcomes(values, groups=None, statistic="mean"):
    groups = np.zeros(len(values), np.int32) if groups is None else np.array(groups, np.int32)
    return Outcomes(statistic, np.array(values, np.float32), groups)


def drawn(samples, seed, shift):
    """Right or wrong for every sample, alike for all seeds but for a few samples."""
    hard = np.random.default_rng(0).random(samples)
    return (hard + 0.1 * np.random.default_rng(seed).random(samples) < 0.5 + shift).astype(float)


def naive(ours, theirs, draws, seed=1):
    """The same bootstrap, drawing samples one by one."""
    random, samples = np.random.default_rng(seed), len(ours[0])
    found = []
    for _ in range(draws):
        chosen = random.integers(samples, size=samples)
        each = [
            Outcomes(o.statistic, o.values[chosen], o.groups[chosen]).evaluate()
            for o in (*ours, *theirs)
        ]
        found.append(np.mean(each[: len(ours)]) - np.mean(each[len(ours) :]))
    return np.array(found)


@pytest.mark.parametrize("statistic", ["mean", "mean_of_groups", "worst_group", "macro_f1"])
def test_cells_give_the_distribution_of_samples(statistic):
    groups = np.random.default_rng(3).integers(0, 4, 400)
    runs = [drawn(400, seed, shift) for seed, shift in ((1, 0.05), (2, 0.05), (3, 0.0))]
    if statistic == "macro_f1":
        runs = [np.where(right > 0, groups, (groups + 1) % 4) for right in runs]
    made = [outcomes(values, groups, statistic) for values in runs]
    found, expected = over_samples(made[:2], made[2:], "k"), naive(made[:2], made[2:], 500)
    assert found.shape == (DRAWS,)
    error = expected.std() / np.sqrt(500)
    assert abs(found.mean() - expected.mean()) < 6 * error
    assert found.std() == pytest.approx(expected.std(), rel=0.12)


def test_pairing_takes_the_common_noise_away():
    ours, theirs = outcomes(drawn(2000, 1, 0.02)), outcomes(drawn(2000, 2, 0.0))
    paired = over_samples([ours], [theirs], "k").std()
    apart = np.hypot(ours.values.std(), theirs.values.std()) / np.sqrt(2000)
    assert paired < 0.7 * apart


def test_equal_outcomes_differ_by_nothing():
    same = outcomes([1, 0, 1, 1])
    found = difference([0.75, 0.75], [0.75, 0.75], over_samples([same], [same], "k"), "samples")
    assert (found.low, found.high, found.clear) == (0.0, 0.0, False)


@pytest.mark.parametrize(
    "other",
    [
        None,
        outcomes([1, 0]),
        outcomes([1, 0, 1], [0, 0, 1]),
        outcomes([1, 0, 1], statistic="worst_group"),
    ],
)
def test_what_is_not_of_the_same_samples_is_not_paired(other):
    assert over_samples([outcomes([1, 0, 1])], [other], "k") is None


def test_over_tasks():
    differences = [0.1, 0.2, 0.3, 0.0]
    draws = over_tasks(differences, "k")
    assert draws.mean() == pytest.approx(0.15, abs=0.01)
    assert draws.std() == pytest.approx(np.std(differences) / 2, rel=0.1)
    assert over_tasks([0.1], "k") is None
    found = difference([0.35, 0.37], [0.21, 0.21], draws, "tasks")
    assert found.value == pytest.approx(0.15)
    assert found.low < 0.15 < found.high and found.over == "tasks" and found.clear
    assert difference([0.1], [0.0], None, "tasks").low is None


@pytest.mark.parametrize(
    ("ours", "theirs", "clear"),
    [
        ([0.5, 0.6], [0.2, 0.3], True),
        ([0.2, 0.3], [0.5, 0.6], True),
        ([0.5, 0.6], [0.2, 0.55], False),  # a seed of theirs is above one of ours
        ([0.5], [0.2], False),  # one seed does not show the spread
        ([0.5, 0.6], [0.2], False),
        ([0.5, 0.6], [0.5, 0.1], False),
    ],
)
def test_a_difference_is_clear_only_if_seeds_agree(ours, theirs, clear):
    draws = np.linspace(0.1, 0.2, 100)
    assert difference(ours, theirs, draws, "samples").clear == clear
    assert not difference(ours, theirs, draws - 0.15, "samples").clear  # the interval includes 0


def test_equal_keys_give_equal_draws():
    ours, theirs = outcomes(drawn(50, 1, 0.1)), outcomes(drawn(50, 2, 0.0))
    one, again, other = (over_samples([ours], [theirs], key) for key in ("a", "a", "b"))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
