"""Compares entries: all scores, and their differences to the baseline."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.metric_names import MAIN_METRICS
from neuclip.report.bootstrap import Difference, Draws, difference, over_samples, over_tasks
from neuclip.report.entries import (
    CheckpointScores,
    Entry,
    TaskScore,
    benchmark_results,
    split_score,
)
from neuclip.report.quoted import MEASURES, Quoted
from neuclip.report.runs import LoadedRun
from neuclip.run_folder import RunFolder

PANELS = ("datacomp", "imagenet-variants", "retrieval")
_MOST_SPLITS = 3


@dataclass(frozen=True)
class PanelBar:
    """An entry in a panel.

    Attributes:
        label: name of the entry.
        color: index of the entry; -1: a published number.
        values: one value per seed; empty if there is none.
        why: reason why values are missing; empty if none is.
    """

    label: str
    color: int
    values: list[float]
    why: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over seeds; none without values."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; none for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Panel:
    """A measure with the bars of all entries; `chance` is the score of guessing, if known."""

    title: str
    bars: list[PanelBar]
    chance: float | None = None


@dataclass(frozen=True)
class ScoreCell:
    """A mean over seeds and its difference to the baseline; the baseline has no difference."""

    value: float | None
    difference: Difference | None = None


@dataclass(frozen=True)
class ScoreRow:
    """A task or an average."""

    name: str
    metric: str
    cells: list[ScoreCell]
    why: str = ""


@dataclass(frozen=True)
class Scoreboard:
    """The comparison of all entries.

    Attributes:
        entries: the entries.
        baseline: the entry to compare with.
        of_benchmark: whether the panels show DataComp's averages; if not, the runs' own splits.
        panels: the panels of the figure.
        rows: the table, one row per task; the runs' own splits if no run has benchmark results.
        averages: the benchmark's averages; empty if no run has benchmark results.
        benchmark: the benchmark's results of each run, by its folder.
    """

    entries: list[Entry]
    baseline: Entry
    of_benchmark: bool
    panels: list[Panel]
    rows: list[ScoreRow]
    averages: list[ScoreRow]
    benchmark: dict[RunFolder, list[CheckpointScores]]

    @property
    def seeds(self) -> int:
        """The largest number of runs of an entry."""
        return max(len(entry.runs) for entry in self.entries)


@dataclass(frozen=True)
class _TaskScores:
    """Scores of all entries on a task: one per run; none if the run was not evaluated on it."""

    key: str
    name: str
    metric: str
    scores: list[list[TaskScore | None]]

    def values(self) -> list[list[float] | None]:
        """The scores of each entry, one per seed; none if a run was not evaluated."""
        return [
            [score.value for score in found if score is not None] if all(found) else None
            for found in self.scores
        ]


def scoreboard(entries: list[Entry], baseline: Entry, quoted: Sequence[Quoted] = ()) -> Scoreboard:
    """Compares entries.

    Args:
        entries: at least one entry.
        baseline: one of the entries.
        quoted: published results to show beside them.
    """
    benchmark = {
        run.folder: benchmark_results(run)
        for entry in entries
        for run in (*entry.runs, *entry.repeats)
    }
    any_benchmark = any(benchmark.values())
    of_benchmark = any_benchmark or bool(quoted)
    tasks = _benchmark_tasks(entries, benchmark) if any_benchmark else _split_tasks(entries)
    place = entries.index(baseline)
    rows, draws = _rows(tasks, place)
    if of_benchmark:
        panels = [_average_panel(group, entries, benchmark, quoted) for group in PANELS]
    else:
        panels = [_split_panel(task, entries) for task in tasks[:_MOST_SPLITS]]
    groups = load_suite().members if any_benchmark else ()
    averages = [_average_row(group, tasks, draws, place) for group in groups]
    return Scoreboard(entries, baseline, of_benchmark, panels, rows, averages, benchmark)


def average_series(board: Scoreboard, run: LoadedRun, group: str) -> list[tuple[float, float]]:
    """(samples seen, average of the benchmark) of the checkpoints with all tasks of a group."""
    points: list[tuple[float, float]] = []
    last = next((r for r in reversed(run.train) if r.get("epoch") and "samples_seen" in r), None)
    for scores in board.benchmark[run.folder]:
        value = load_suite().averages(_values(scores))[group].value
        if value is not None and last is not None:
            points.append((scores.epoch * last["samples_seen"] / last["epoch"], value))
    return points


def _values(checkpoint: CheckpointScores) -> dict[str, float]:
    return {key: score.value for key, score in checkpoint.scores.items()}


def _benchmark_tasks(
    entries: list[Entry], benchmark: dict[RunFolder, list[CheckpointScores]]
) -> list[_TaskScores]:
    tasks: list[_TaskScores] = []
    for task in load_suite().tasks.values():
        scores = [
            [_latest(benchmark[run.folder], task.key) for run in entry.runs] for entry in entries
        ]
        if any(score is not None for found in scores for score in found):
            tasks.append(_TaskScores(task.key, task.name, task.metric, scores))
    return tasks


def _latest(checkpoints: list[CheckpointScores], key: str) -> TaskScore | None:
    """The score of a task at the latest evaluated checkpoint."""
    return checkpoints[-1].scores.get(key) if checkpoints else None


def _split_tasks(entries: list[Entry]) -> list[_TaskScores]:
    names = dict.fromkeys(
        evaluation.split
        for entry in entries
        for run in entry.runs
        for evaluation in run.evaluations
        if evaluation.split not in load_suite().tasks
    )
    tasks: list[_TaskScores] = []
    for name in names:
        found = [[split_score(run, name) for run in entry.runs] for entry in entries]
        measures = {one[0] for row in found for one in row if one is not None}
        if len(measures) == 1:
            scores = [[None if one is None else one[1] for one in row] for row in found]
            tasks.append(_TaskScores(name, name, measures.pop(), scores))
    return tasks


def _rows(
    tasks: list[_TaskScores], place: int
) -> tuple[list[ScoreRow], dict[str, list[Draws | None]]]:
    """The rows, and by task the draws of each entry's difference to the baseline."""
    rows: list[ScoreRow] = []
    draws: dict[str, list[Draws | None]] = {}
    for task in tasks:
        values, base = task.values(), task.values()[place]
        drawn = [
            None if number == place else _draws(found, task.scores[place], task.key)
            for number, found in enumerate(task.scores)
        ]
        cells = [
            ScoreCell(_mean(own), _difference(own, base, each) if number != place else None)
            for number, (own, each) in enumerate(zip(values, drawn, strict=True))
        ]
        rows.append(ScoreRow(task.name, task.metric, cells))
        draws[task.key] = drawn
    return rows, draws


def _draws(ours: list[TaskScore | None], theirs: list[TaskScore | None], key: str) -> Draws | None:
    scores = [score for score in (*ours, *theirs) if score is not None]
    if len(scores) < len(ours) + len(theirs) or len({score.data for score in scores}) > 1:
        return None
    return over_samples(
        [score.outcomes for score in scores[: len(ours)]],
        [score.outcomes for score in scores[len(ours) :]],
        key,
    )


def _difference(
    ours: list[float] | None, base: list[float] | None, draws: Draws | None
) -> Difference | None:
    if ours is None or base is None:
        return None
    return difference(ours, base, draws, "samples")


def _mean(values: list[float] | None) -> float | None:
    return None if values is None else statistics.fmean(values)


def _average_row(
    group: str, tasks: list[_TaskScores], draws: dict[str, list[Draws | None]], place: int
) -> ScoreRow:
    """An average of each entry; the interval is over samples if all tasks keep outcomes."""
    members = load_suite().members[group]
    own = [task for task in tasks if task.key in members.tasks]
    complete = len(own) == len(members.tasks)
    entries = range(len(tasks[0].scores)) if tasks else range(0)
    by_entry = [_known([task.values()[number] for task in own]) for number in entries]
    base = by_entry[place] if complete else None
    cells: list[ScoreCell] = []
    for number, known in enumerate(by_entry if complete else [None] * len(entries)):
        value = None if known is None else statistics.fmean(map(statistics.fmean, known))
        if number == place or known is None or base is None:
            cells.append(ScoreCell(value))
            continue
        differences = [
            statistics.fmean(ours) - statistics.fmean(theirs)
            for ours, theirs in zip(known, base, strict=True)
        ]
        drawn = [draws[task.key][number] for task in own]
        sampled = [one for one in drawn if one is not None]
        over = "samples" if len(sampled) == len(drawn) else "tasks"
        resampled = (
            np.mean(sampled, axis=0) if over == "samples" else over_tasks(differences, group)
        )
        found = difference(_over_tasks(known), _over_tasks(base), resampled, over)
        cells.append(ScoreCell(value, found))
    why = "" if complete else f"{len(own)} of {len(members.tasks)} tasks"
    return ScoreRow(members.name, f"mean of {len(members.tasks)}", cells, why)


def _over_tasks(values: list[list[float]]) -> list[float]:
    """Mean over tasks for each seed, from the scores of each task."""
    return [statistics.fmean(seed) for seed in zip(*values, strict=True)]


def _known(values: list[list[float] | None]) -> list[list[float]] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _average_panel(
    group: str,
    entries: list[Entry],
    benchmark: dict[RunFolder, list[CheckpointScores]],
    quoted: Sequence[Quoted],
) -> Panel:
    suite = load_suite()
    total = len(suite.members[group].tasks)
    bars: list[PanelBar] = []
    for color, entry in enumerate(entries):
        found = [
            suite.averages(_values(results[-1]) if results else {})[group]
            for results in (benchmark[run.folder] for run in entry.runs)
        ]
        values = [average.value for average in found if average.value is not None]
        part = min(average.done for average in found)
        why = "" if len(values) == len(found) else f"{part} of {total} tasks"
        if values and why:
            why = f"{len(found) - len(values)} of {len(found)} seeds have {why}"
        bars.append(PanelBar(entry.label, color, values, why))
    bars += [PanelBar(row.label, -1, [row.values[group]]) for row in quoted if group in row.values]
    return Panel(MEASURES[group], bars)


def _split_panel(task: _TaskScores, entries: list[Entry]) -> Panel:
    named = {metric.key: metric.phrase for metric in MAIN_METRICS}
    chances = [
        run.final(task.key).get("chance", math.nan) for entry in entries for run in entry.runs
    ]
    bars = [
        PanelBar(
            entry.label,
            color,
            [score.value for score in found if score is not None],
            "" if all(found) else f"{sum(s is None for s in found)} of {len(found)} not evaluated",
        )
        for color, (entry, found) in enumerate(zip(entries, task.scores, strict=True))
    ]
    same = task.metric == "acc1" and len(set(chances)) == 1
    return Panel(f"{task.name}: {named[task.metric]}", bars, chances[0] if same else None)
