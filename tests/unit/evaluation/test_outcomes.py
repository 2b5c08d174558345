import numpy as np
import pytest
import torch

from neuclip.errors import UserError
from neuclip.evaluation.metrics import (
    Choices,
    accuracy,
    group_accuracies,
    macro_recall_and_f1,
    mean_per_class_recall,
    worst_group,
)
from neuclip.evaluation.outcomes import (
    Outcomes,
    outcomes_of,
    read_outcomes,
    weighted,
    write_outcomes,
)

SAMPLES, CLASSES = 60, 7


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    target[target == 3] = 4  # a class that does not occur, but is chosen
    chosen = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    chosen[::2] = target[::2]
    weights = torch.randint(0, 3, (4, SAMPLES), generator=generator)
    weights[0] = 1
    weights[1][target == 2] = 0  # a class that is not drawn
    return target, chosen, weights


def reference(statistic, target, chosen):
    """The metric itself, of samples that are written out."""
    right = chosen == target
    if statistic == "mean":
        return accuracy(right)
    if statistic == "mean_of_groups":
        return mean_per_class_recall(right, target)
    if statistic == "worst_group":
        return worst_group(group_accuracies(right, target))
    ones = torch.ones_like(target)
    return macro_recall_and_f1(Choices((~right).long(), chosen, target, ones, CLASSES))[1]


@pytest.mark.parametrize("statistic", ["mean", "mean_of_groups", "worst_group", "macro_f1"])
def test_a_weight_is_a_number_of_copies(drawn, statistic):
    target, chosen, weights = drawn
    values = chosen if statistic == "macro_f1" else chosen == target
    outcomes = outcomes_of(statistic, values, target)
    drawn_values = weighted(statistic, outcomes.values, outcomes.groups, weights.double().numpy())
    for value, weight in zip(drawn_values, weights, strict=True):
        copies = torch.arange(SAMPLES).repeat_interleave(weight)
        expected = reference(statistic, target[copies], chosen[copies])
        assert value == pytest.approx(expected, abs=1e-12)
    assert outcomes.evaluate() == pytest.approx(drawn_values[0])


@pytest.mark.parametrize(
    ("statistic", "values", "groups"),
    [
        ("mean", [1, 0, 1, 1, 0, 0, 0, 1, 1], None),
        ("mean", [0.25, 0.5, 1.0], None),
        ("mean_of_groups", [1, 0, 1], [0, 70_000, 2]),
        ("macro_f1", [3, 0, 1], [3, 1, 1]),
    ],
)
def test_written_and_read(tmp_path, statistic, values, groups):
    path = tmp_path / "new" / "x.npz"
    groups = None if groups is None else torch.tensor(groups)
    outcomes = outcomes_of(statistic, torch.tensor(values), groups)
    write_outcomes(path, outcomes)
    first = path.read_bytes()
    found = read_outcomes(path)
    assert (found.statistic, len(found)) == (statistic, len(values))
    np.testing.assert_array_equal(found.values, outcomes.values)
    np.testing.assert_array_equal(found.groups, outcomes.groups)
    write_outcomes(path, outcomes)
    assert path.read_bytes() == first
    assert [other.name for other in path.parent.iterdir()] == ["x.npz"]


def test_right_and_wrong_take_a_bit(tmp_path):
    right = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) < 0.5
    write_outcomes(tmp_path / "x.npz", outcomes_of("mean", right))
    assert (tmp_path / "x.npz").stat().st_size < 50_000 / 8 + 1000


def test_a_file_that_is_not_whole_counts_as_none(tmp_path):
    path = tmp_path / "x.npz"
    assert read_outcomes(path) is None
    write_outcomes(path, Outcomes("mean", np.ones(100, np.float32), np.zeros(100, np.int32)))
    path.write_bytes(path.read_bytes()[:-30])
    assert read_outcomes(path) is None


def test_no_room_to_write(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_outcomes(tmp_path / "file" / "x.npz", outcomes_of("mean", torch.ones(3)))


@pytest.mark.parametrize("seed", range(60))
def test_flipped_bytes_are_none_or_outcomes(tmp_path, seed):
    """Whatever numpy and zipfile raise for the byte."""
    path, random = tmp_path / "a.npz", np.random.default_rng(seed)
    write_outcomes(path, Outcomes("mean", np.ones(40, np.float32), np.zeros(40, np.int32)))
    content = bytearray(path.read_bytes())
    for place in random.integers(len(content), size=3):
        content[place] ^= 1 << random.integers(8)
    path.write_bytes(content)
    found = read_outcomes(path)
    assert found is None or len(found.values) == len(found.groups)


def test_outcomes_that_unpack_to_more_than_any_task_has(tmp_path):
    values = np.zeros(2**28, np.uint8)
    np.savez_compressed(
        tmp_path / "a.npz", statistic="mean", samples=2**28, values=values, groups=values[:0]
    )
    assert (tmp_path / "a.npz").stat().st_size < 2**20
    assert read_outcomes(tmp_path / "a.npz") is None
