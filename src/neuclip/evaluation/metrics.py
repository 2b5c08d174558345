"""The benchmark's metrics, as functions of what was chosen for each sample.

All answers are fractions in 0..1, computed in float64.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class Choices:
    """What a classifier made of each sample.

    Attributes:
        ahead: Number of wrong classes that come before the right one.
        chosen: The best class.
        target: The right class.
        num_classes: Number of classes there are.
    """

    ahead: Int64[Tensor, " samples"]
    chosen: Int64[Tensor, " samples"]
    target: Int64[Tensor, " samples"]
    num_classes: int

    def right_at(self, k: int) -> Bool[Tensor, " samples"]:
        """Whether the right class is among the best k."""
        return self.ahead < k


def accuracy(right: Bool[Tensor, " samples"]) -> float:
    """Share of samples that are right."""
    return float(right.double().mean())


def mean_per_class_recall(
    right: Bool[Tensor, " samples"], target: Int64[Tensor, " samples"]
) -> float:
    """Mean of the recall of every class that occurs: balanced accuracy."""
    return float(_means(right.double(), target)[0].mean())


def macro_recall_and_f1(choices: Choices) -> tuple[float, float]:
    """Mean recall and mean F1 over the classes that occur (WILDS's `labels=unique(target)`).

    A class that was never chosen has the F1 0; one that does not occur is not counted, but choosing
    it costs the recall of the class that was right.
    """
    hits = torch.bincount(
        choices.target[choices.chosen == choices.target], minlength=choices.num_classes
    ).double()
    chosen = torch.bincount(choices.chosen, minlength=choices.num_classes).double()
    occurring = torch.bincount(choices.target, minlength=choices.num_classes).double()
    occurs = occurring > 0
    f1 = 2 * hits[occurs] / (chosen + occurring)[occurs]
    return float((hits[occurs] / occurring[occurs]).mean()), float(f1.mean())


def group_accuracies(
    right: Bool[Tensor, " samples"], groups: Int64[Tensor, " samples"]
) -> dict[int, float]:
    """Accuracy of every group that occurs."""
    means, present = _means(right.double(), groups)
    return dict(zip(present.tolist(), means.tolist(), strict=True))


def worst_group(accuracies: dict[int, float], left_out: Collection[int] = ()) -> float:
    """The accuracy of the worst group.

    Args:
        accuracies: By group.
        left_out: Groups that do not count.

    Raises:
        ValueError: no group counts.
    """
    counting = [value for group, value in accuracies.items() if group not in left_out]
    if not counting:
        raise ValueError("no sample belongs to a group that counts")
    return min(counting)


def jaccard(chosen: Collection[int], right: Collection[int]) -> float:
    """Size of the intersection over size of the union."""
    both = set(chosen) & set(right)
    return len(both) / len(set(chosen) | set(right))


def _means(
    values: Tensor, groups: Int64[Tensor, " samples"]
) -> tuple[Tensor, Int64[Tensor, " groups"]]:
    """Mean of the values of every group that occurs, and those groups."""
    present, number, count = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), dtype=torch.double).index_add_(0, number, values)
    return sums / count, present
