"""Metrics of classification, as functions of the choice for each sample.

All values are fractions in 0..1, computed in float64.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class Choices:
    """A classifier's choice for each sample.

    Attributes:
        ahead: number of wrong classes that precede a right one.
        chosen: the best class.
        target: the sample's own class.
        num_right: number of classes that count as right.
        num_classes: number of classes.
    """

    ahead: Int64[Tensor, " samples"]
    chosen: Int64[Tensor, " samples"]
    target: Int64[Tensor, " samples"]
    num_right: Int64[Tensor, " samples"]
    num_classes: int

    def right_at(self, k: int) -> Bool[Tensor, " samples"]:
        """Whether a right class is among the best k."""
        return self.ahead < k

    @property
    def chance(self) -> float:
        """Expected top-1 accuracy of a random choice."""
        return float(self.num_right.double().mean()) / self.num_classes


def accuracies(choices: Choices) -> dict[str, float]:
    """Top-1 and top-5 accuracy (the latter from five classes on), and mean per-class recall."""
    found = {"acc1": accuracy(choices.right_at(1))}
    if choices.num_classes >= 5:
        found["acc5"] = accuracy(choices.right_at(5))
    found["mean_per_class_recall"] = mean_per_class_recall(choices.right_at(1), choices.target)
    return found


def accuracy(right: Bool[Tensor, " samples"]) -> float:
    """Share of right samples."""
    return float(right.double().mean())


def mean_per_class_recall(
    right: Bool[Tensor, " samples"], target: Int64[Tensor, " samples"]
) -> float:
    """Mean recall over the classes that occur: balanced accuracy."""
    return float(_means(right.double(), target)[0].mean())


def macro_recall_and_f1(choices: Choices) -> tuple[float, float]:
    """Mean recall and mean F1 over the classes that occur (WILDS's `labels=unique(target)`).

    A class that is never chosen has an F1 of 0. A class that does not occur is not counted, but
    choosing it lowers the recall of the right class.
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
    """Accuracy of each group that occurs."""
    means, present = _means(right.double(), groups)
    return dict(zip(present.tolist(), means.tolist(), strict=True))


def worst_group(by_group: dict[int, float], left_out: Collection[int] = ()) -> float:
    """The accuracy of the worst group.

    Args:
        by_group: accuracy by group.
        left_out: groups to ignore.

    Raises:
        ValueError: all groups are ignored.
    """
    counting = [value for group, value in by_group.items() if group not in left_out]
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
    """Mean value of each group that occurs, and the groups."""
    present, number, count = groups.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), dtype=torch.double).index_add_(0, number, values)
    return sums / count, present
