"""All scores of all entries, with what they differ from the baseline: the table and the panels."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.metric_names import MAIN_METRICS
from neuclip.report.bootstrap import Difference, Draws, difference, over_samples, over_tasks
from neuclip.report.entries import Entry, Judged, Score, benchmark_results, split_score
from neuclip.report.quoted import MEASURES, Quoted
from neuclip.report.runs import Run

PANELS = ("datacomp", "imagenet-variants", "retrieval")
_MOST_SPLITS = 3


@dataclass(frozen=True)
class Bar:
    """An entry in a panel.

    Attributes:
        label: Its name.
        color: Which entry it is; -1: a quoted number.
        values: One of every seed; empty where there is none.
        why: Why there is none, or what is left out; empty if nothing is.
    """

    label: str
    color: int
    values: list[float]
    why: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; none of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Panel:
    """A measure with the bars of all entries; `chance` is what guessing gives, if it is known."""

    title: str
    bars: list[Bar]
    chance: float | None = None


@dataclass(frozen=True)
class TableCell:
    """A mean over seeds, and how it differs from the baseline (none: it is the baseline's)."""

    value: float | None
    difference: Difference | None = None


@dataclass(frozen=True)
class TableRow:
    """A task or an average."""

    name: str
    metric: str
    cells: list[TableCell]
    why: str = ""


@dataclass(frozen=True)
class Scoreboard:
    """What is drawn and listed.

    Attributes:
        entries: What is compared.
        baseline: What the others are compared with.
        of_benchmark: The panels are DataComp's averages; else the runs' own splits.
        panels: The figure.
        rows: The table, one row a task; of the runs' own splits where no run has the benchmark's.
        averages: The benchmark's averages; empty where no run has its results.
        judged: The benchmark's results of every run, by its folder.
    """

    entries: list[Entry]
    baseline: Entry
    of_benchmark: bool
    panels: list[Panel]
    rows: list[TableRow]
    averages: list[TableRow]
    judged: dict[Path, list[Judged]]

    @property
    def seeds(self) -> int:
        """The largest number of runs of an entry."""
        return max(len(entry.runs) for entry in self.entries)


@dataclass(frozen=True)
class _Task:
    """Scores of all entries on a task: one a run, none where it was not judged."""

    key: str
    name: str
    metric: str
    scores: list[list[Score | None]]

    def means(self) -> list[float | None]:
        """Means over the runs that were judged; none if any was not."""
        return [
            statistics.fmean([score.value for score in found if score is not None])
            if all(found)
            else None
            for found in self.scores
        ]


def scoreboard(entries: list[Entry], baseline: Entry, quoted: Sequence[Quoted] = ()) -> Scoreboard:
    """The comparison.

    Args:
        entries: What is compared; at least one.
        baseline: One of them.
        quoted: Published numbers to draw beside.
    """
    judged = {run.folder: benchmark_results(run) for entry in entries for run in entry.runs}
    judged_any = any(judged.values())
    of_benchmark = judged_any or bool(quoted)
    tasks = _benchmark_tasks(entries, judged) if judged_any else _split_tasks(entries)
    place = entries.index(baseline)
    rows, draws = _rows(tasks, place)
    if of_benchmark:
        panels = [_average_panel(group, entries, judged, quoted) for group in PANELS]
    else:
        panels = [_split_panel(task, entries) for task in tasks[:_MOST_SPLITS]]
    groups = load_suite().members if judged_any else ()
    averages = [_average_row(group, tasks, draws, place) for group in groups]
    return Scoreboard(entries, baseline, of_benchmark, panels, rows, averages, judged)


def average_series(board: Scoreboard, run: Run, group: str) -> list[tuple[float, float]]:
    """(samples seen, average of the benchmark) of the checkpoints that were judged wholly."""
    points: list[tuple[float, float]] = []
    last = next((r for r in reversed(run.train) if r.get("epoch") and "samples_seen" in r), None)
    for judged in board.judged[run.folder]:
        value = load_suite().averages(_values(judged))[group].value
        if value is not None and last is not None:
            points.append((judged.epoch * last["samples_seen"] / last["epoch"], value))
    return points


def _values(judged: Judged) -> dict[str, float]:
    return {key: score.value for key, score in judged.scores.items()}


def _benchmark_tasks(entries: list[Entry], judged: dict[Path, list[Judged]]) -> list[_Task]:
    tasks: list[_Task] = []
    for task in load_suite().tasks.values():
        scores = [
            [_latest(judged[run.folder], task.key) for run in entry.runs] for entry in entries
        ]
        if any(score is not None for found in scores for score in found):
            tasks.append(_Task(task.key, task.name, task.metric, scores))
    return tasks


def _latest(judged: list[Judged], key: str) -> Score | None:
    """Of the latest checkpoint that was judged, which all of a run's scores are of."""
    return judged[-1].scores.get(key) if judged else None


def _split_tasks(entries: list[Entry]) -> list[_Task]:
    names = dict.fromkeys(
        evaluation.split
        for entry in entries
        for run in entry.runs
        for evaluation in run.evaluations
        if evaluation.split not in load_suite().tasks
    )
    tasks: list[_Task] = []
    for name in names:
        found = [[split_score(run, name) for run in entry.runs] for entry in entries]
        measures = {one[0] for row in found for one in row if one is not None}
        if len(measures) == 1:
            scores = [[None if one is None else one[1] for one in row] for row in found]
            tasks.append(_Task(name, name, measures.pop(), scores))
    return tasks


def _rows(tasks: list[_Task], place: int) -> tuple[list[TableRow], dict[str, list[Draws | None]]]:
    """The rows, and of every task the draws of every entry's difference to the baseline."""
    rows: list[TableRow] = []
    draws: dict[str, list[Draws | None]] = {}
    for task in tasks:
        means, base = task.means(), task.means()[place]
        drawn = [
            None if number == place else _draws(found, task.scores[place], task.key)
            for number, found in enumerate(task.scores)
        ]
        cells = [
            TableCell(mean, _difference(mean, base, each) if number != place else None)
            for number, (mean, each) in enumerate(zip(means, drawn, strict=True))
        ]
        rows.append(TableRow(task.name, task.metric, cells))
        draws[task.key] = drawn
    return rows, draws


def _draws(ours: list[Score | None], theirs: list[Score | None], key: str) -> Draws | None:
    scores = [score for score in (*ours, *theirs) if score is not None]
    if len(scores) < len(ours) + len(theirs) or len({score.data for score in scores}) > 1:
        return None
    return over_samples(
        [score.outcomes for score in scores[: len(ours)]],
        [score.outcomes for score in scores[len(ours) :]],
        key,
    )


def _difference(mean: float | None, base: float | None, draws: Draws | None) -> Difference | None:
    if mean is None or base is None:
        return None
    return difference(mean - base, draws, "samples")


def _average_row(
    group: str, tasks: list[_Task], draws: dict[str, list[Draws | None]], place: int
) -> TableRow:
    """An average of every entry; drawn over samples where all its tasks keep outcomes."""
    members = load_suite().members[group]
    own = [task for task in tasks if task.key in members.tasks]
    whole = len(own) == len(members.tasks)
    means = [[task.means()[number] for task in own] for number in range(len(_first(tasks).scores))]
    base = _known(means[place]) if whole else None
    cells: list[TableCell] = []
    for number, found in enumerate(means):
        known = _known(found) if whole else None
        value = None if known is None else statistics.fmean(known)
        if number == place or known is None or base is None:
            cells.append(TableCell(value))
            continue
        differences = [ours - theirs for ours, theirs in zip(known, base, strict=True)]
        drawn = [draws[task.key][number] for task in own]
        sampled = [one for one in drawn if one is not None]
        told = statistics.fmean(differences)
        if len(sampled) == len(drawn):
            cells.append(TableCell(value, difference(told, np.mean(sampled, axis=0), "samples")))
        else:
            cells.append(
                TableCell(value, difference(told, over_tasks(differences, group), "tasks"))
            )
    why = "" if whole else f"{len(own)} of {len(members.tasks)} tasks"
    return TableRow(members.name, f"mean of {len(members.tasks)}", cells, why)


def _first(tasks: list[_Task]) -> _Task:
    return tasks[0] if tasks else _Task("", "", "", [])


def _known(values: list[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _average_panel(
    group: str, entries: list[Entry], judged: dict[Path, list[Judged]], quoted: Sequence[Quoted]
) -> Panel:
    suite = load_suite()
    total = len(suite.members[group].tasks)
    bars: list[Bar] = []
    for color, entry in enumerate(entries):
        found = [
            suite.averages(_values(results[-1]) if results else {})[group]
            for results in (judged[run.folder] for run in entry.runs)
        ]
        values = [average.value for average in found if average.value is not None]
        part = min(average.done for average in found)
        why = "" if len(values) == len(found) else f"{part} of {total} tasks"
        if values and why:
            why = f"{len(found) - len(values)} of {len(found)} seeds have {why}"
        bars.append(Bar(entry.label, color, values, why))
    bars += [Bar(row.label, -1, [row.values[group]]) for row in quoted if group in row.values]
    return Panel(MEASURES[group], bars)


def _split_panel(task: _Task, entries: list[Entry]) -> Panel:
    named = {metric.key: metric.phrase for metric in MAIN_METRICS}
    chances = [
        run.final(task.key).get("chance", math.nan) for entry in entries for run in entry.runs
    ]
    bars = [
        Bar(
            entry.label,
            color,
            [score.value for score in found if score is not None],
            "" if all(found) else f"{sum(s is None for s in found)} of {len(found)} not judged",
        )
        for color, (entry, found) in enumerate(zip(entries, task.scores, strict=True))
    ]
    same = task.metric == "acc1" and len(set(chances)) == 1
    return Panel(f"{task.name}: {named[task.metric]}", bars, chances[0] if same else None)
