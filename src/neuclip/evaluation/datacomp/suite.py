"""DataComp's suite, read from `suite.yaml`: tasks, averages, and the version of both.

Imports no torch, so that help and reports start at once.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from neuclip.config.bounded_yaml import read_yaml_text
from neuclip.errors import UserError, nearest

TaskKind = Literal["classification", "retrieval", "association"]
T = TypeVar("T")


@dataclass(frozen=True)
class SampleGroups:
    """Groups of samples; the main metric is the accuracy of the worst.

    Attributes:
        column: column of the metadata (`.npy`) with the number of the group.
        field: name of that column.
        measure: top-1 (`acc`) or top-5 (`acc_top5`) accuracy of each group.
        ignored: groups that the metric's definition ignores. DataComp's code counts them, and so
            does the main metric; `<metric>_as_defined` does not.
    """

    column: int
    field: str
    measure: Literal["acc", "acc_top5"]
    ignored: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task of the suite.

    Attributes:
        key: DataComp's key, used in results.
        name: name to display.
        size: samples of the published set.
        metric: name of the main metric.
        kind: how it is evaluated.
        groups: groups of samples, if the main metric needs them.
        folder: folder of its set in the data folder.
        source: dataset repository on the hub.
    """

    key: str
    name: str
    size: int
    folder: str
    source: str
    metric: str = "acc1"
    kind: TaskKind = "classification"
    groups: SampleGroups | None = None


@dataclass(frozen=True)
class Average:
    """A mean of main metrics.

    Attributes:
        name: name to display.
        value: the mean, 0..1; none if tasks are missing.
        missing: keys of the tasks without a score.
        total: number of tasks in the average.
    """

    name: str
    value: float | None
    missing: tuple[str, ...]
    total: int

    @property
    def done(self) -> int:
        """Number of tasks with a score."""
        return self.total - len(self.missing)


@dataclass(frozen=True)
class _Members:
    name: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """All tasks and averages.

    Attributes:
        version: recorded in each result; changes with anything that can change a number.
        tasks: tasks by key.
        members: averages by key.
    """

    version: str
    tasks: Mapping[str, Task]
    members: Mapping[str, _Members] = field(repr=False)

    def select(self, tasks: Sequence[str] = (), groups: Sequence[str] = ()) -> list[Task]:
        """Tasks by key (or by its last part) and by average, in the suite's order.

        Args:
            tasks: keys, such as `vtab/cifar100` or `cifar100`.
            groups: averages, such as `imagenet-variants`; with neither, all tasks.

        Raises:
            UserError: a task or average is unknown; names the nearest.
        """
        if not tasks and not groups:
            return list(self.tasks.values())
        short = {key.rpartition("/")[2]: key for key in self.tasks}
        chosen = {word if word in self.tasks else _known(word, short, "task") for word in tasks}
        for word in groups:
            chosen.update(_known(word, self.members, "group").tasks)
        return [task for key, task in self.tasks.items() if key in chosen]

    def average(self, group: str, scores: Mapping[str, float], *, partial: bool = False) -> Average:
        """The mean of a group's main metrics.

        Args:
            group: key of the average.
            scores: main metric by key of the task.
            partial: average the tasks that have a score.

        Raises:
            UserError: tasks are missing, and `partial` is not set.
        """
        found = self._average(group, scores, partial=partial)
        if found.value is None:
            raise UserError(
                f"{found.name}: {found.done} of {found.total} tasks have results; missing: "
                f"{', '.join(found.missing[:5])}{', ...' if len(found.missing) > 5 else ''}. "
                "Evaluate them, or add --partial for a partial average"
            )
        return found

    def averages(self, scores: Mapping[str, float], *, partial: bool = False) -> dict[str, Average]:
        """All averages by key; without `partial`, the value of an incomplete one is none."""
        return {group: self._average(group, scores, partial=partial) for group in self.members}

    def _average(self, group: str, scores: Mapping[str, float], *, partial: bool) -> Average:
        members = _known(group, self.members, "group")
        present = [scores[key] for key in members.tasks if key in scores]
        missing = tuple(key for key in members.tasks if key not in scores)
        refused = not present or (missing and not partial)
        value = None if refused else sum(present) / len(present)
        return Average(members.name, value, missing, len(members.tasks))


@functools.cache
def load_suite() -> Suite:
    """Reads the suite of this package."""
    text = (
        resources.files("neuclip.evaluation.datacomp")
        .joinpath("suite.yaml")
        .read_text(encoding="utf-8")
    )
    content: dict[str, Any] = read_yaml_text(text, "suite.yaml")
    one = TypeAdapter(Task)
    tasks: dict[str, Task] = {}
    for key, row in content["tasks"].items():
        folder = row.get("folder", f"wds_{key.replace('/', '-')}_test")
        defaults = {"key": key, "folder": folder, "source": f"djghosh/{folder}"}
        tasks[key] = one.validate_python({**defaults, **row})
    averages = {
        group: _Members(row["name"], tuple(tasks if row["tasks"] == "all" else row["tasks"]))
        for group, row in content["averages"].items()
    }
    return Suite(content["version"], tasks, averages)


def _known(word: str, table: Mapping[str, T], what: str) -> T:
    if word not in table:
        raise UserError(f"unknown {what} {word!r}; {nearest(word, list(table))}")
    return table[word]
