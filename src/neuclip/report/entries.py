"""Groups runs into entries: runs that differ only in the seed are one entry.

Scores are DataComp's if a run was evaluated on the benchmark, else those of its own splits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neuclip.errors import UserError, nearest
from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.metric_names import MAIN_METRICS
from neuclip.evaluation.outcomes import Outcomes, read_outcomes
from neuclip.evaluation.results import EvalResult, read_eval_results
from neuclip.report.runs import LoadedRun
from neuclip.run_folder import outcomes_path

# Settings that do not change the experiment.
_SAME = frozenset(
    ("name", "seed", "resume", "device", "data.workers", "data.cache_dir", "data.train_data")
)
_SAME_SECTIONS = ("output.", "evaluation.")


@dataclass(frozen=True)
class Entry:
    """Runs that differ only in the seed.

    Attributes:
        label: the method, with the settings that distinguish it from entries of the same method.
        runs: the runs, one per seed.
        repeats: further runs with the seed of one of them; comparisons leave them out, because
            they say nothing about the spread over seeds.
    """

    label: str
    runs: list[LoadedRun]
    repeats: list[LoadedRun] = field(default_factory=list["LoadedRun"])


@dataclass(frozen=True)
class TaskScore:
    """The score of a run on a task.

    Attributes:
        value: main metric, 0..1.
        data: digest of the task's data; empty if unknown.
        outcomes: outcomes per sample; none if they were not kept.
    """

    value: float
    data: str = ""
    outcomes: Outcomes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class CheckpointScores:
    """The benchmark's results of a checkpoint.

    Attributes:
        epoch: epoch of the checkpoint.
        scores: score by the task's key.
    """

    epoch: int
    scores: dict[str, TaskScore]


def entries(runs: Sequence[LoadedRun]) -> list[Entry]:
    """Groups runs by method, settings and data, in the order given.

    Of several runs with one seed, the first counts; the others are added to their runs' gaps.
    """
    alike: dict[tuple[tuple[str, str], ...], list[LoadedRun]] = {}
    for run in runs:
        alike.setdefault(tuple(sorted(_experiment(run).items())), []).append(run)
    groups = list(alike.values())
    return [_entry(_label(group, groups), group) for group in groups]


def _entry(label: str, group: list[LoadedRun]) -> Entry:
    first: dict[str, LoadedRun] = {}
    repeats: list[LoadedRun] = []
    for run in group:
        seed = run.config.get("seed", "")
        if first.setdefault(seed, run) is not run:
            repeats.append(run)
            run.gaps.append(
                f"the comparison leaves this run out: it repeats {first[seed].label} "
                f"(same settings, same data, seed {seed})"
            )
    return Entry(label, list(first.values()), repeats)


def _experiment(run: LoadedRun) -> dict[str, str]:
    """The settings of an experiment, and the identity of its data.

    A copy of the data elsewhere is the same data. Without a recorded identity, as in runs of
    earlier versions, the path as given stands for it.
    """
    read = run.data
    data = run.config.get("data.train_data", "") if read is None else read.digest
    kept = {
        key: value
        for key, value in run.config.items()
        if key not in _SAME and not key.startswith(_SAME_SECTIONS)
    }
    return {**kept, "data": data}


def _label(group: list[LoadedRun], groups: list[list[LoadedRun]]) -> str:
    method = group[0].method
    rivals = [_experiment(g[0]) for g in groups if g[0].method == method and g is not group]
    if not rivals:
        return method
    own = _experiment(group[0])
    different = [key for key in own if any(rival.get(key) != own[key] for rival in rivals)]
    if not 0 < len(different) <= 2:
        return group[0].label
    others = [g[0] for g in groups if g is not group and g[0].method == method]
    shown = ", ".join(
        f"data {_data_name(group[0], others)}" if key == "data"
        else f"{key.rpartition('.')[2]} {own[key]}"
        for key in different
    )  # fmt: skip
    return f"{method} ({shown})"


def _data_name(run: LoadedRun, others: list[LoadedRun]) -> str:
    """The end of the data's path that no other run has; else with the identity of the data."""
    parts = _path(run).split("/")
    rivals = {
        _path(other) for other in others if _experiment(other)["data"] != _experiment(run)["data"]
    }
    for length in range(1, len(parts) + 1):
        name = "/".join(parts[-length:])
        if not any(rival == name or rival.endswith(f"/{name}") for rival in rivals):
            return name
    return f"{parts[-1]}, {_experiment(run)['data'][:6]}"


def _path(run: LoadedRun) -> str:
    return run.config.get("data.train_data", "").rstrip("/")


def choose_baseline(found: Sequence[Entry], wanted: str | None) -> Entry:
    """The entry to compare the others with.

    Args:
        found: all entries.
        wanted: an entry, a method, or the name of a run; none: openclip if there is one, else the
            first.

    Raises:
        UserError: no entry matches.
    """
    if wanted is None:
        return next((entry for entry in found if entry.runs[0].method == "openclip"), found[0])
    for entry in found:
        names = {entry.label, *(run.label for run in entry.runs)}
        if wanted in names or wanted == entry.runs[0].method:
            return entry
    names = [entry.label for entry in found]
    raise UserError(
        f"--baseline {wanted!r} is not among the compared runs; {nearest(wanted, names)}"
    )


def benchmark_results(run: LoadedRun) -> list[CheckpointScores]:
    """The benchmark's results of a run, by epoch; unusable ones are added to the run's gaps.

    Outcomes per sample are read for the latest checkpoint only.
    """
    found: list[CheckpointScores] = []
    for epoch, path in reversed(run.folder.results_by_epoch().items()):
        try:
            lines = [line for line in read_eval_results(path) if line.provenance is not None]
        except UserError:
            continue  # already among the run's gaps
        usable = [line for line in lines if _is_current(line)]
        problem = _problem(lines, usable)
        if problem:
            run.gaps.append(f"{path.name}: {problem}")
        elif usable:
            latest = not found
            scores = {line.key: _score(path, line, outcomes=latest) for line in usable}
            found.append(CheckpointScores(epoch, scores))
    return found[::-1]


def _is_current(line: EvalResult) -> bool:
    return line.provenance is not None and line.provenance.suite == load_suite().version


def _problem(lines: list[EvalResult], usable: list[EvalResult]) -> str:
    if len(usable) < len(lines):
        return (
            f"{len(lines) - len(usable)} results are not of suite {load_suite().version}: evaluate "
            "again; the file is left out of the comparison"
        )
    made = {(p.checkpoint, p.precision) for line in usable if (p := line.provenance) is not None}
    return (
        "the results are of several checkpoints: left out of the comparison"
        if len(made) > 1
        else ""
    )


def _score(path: Path, line: EvalResult, *, outcomes: bool) -> TaskScore:
    value = line.metrics.get("main_metric", math.nan)
    data = line.provenance.data if line.provenance is not None else ""
    kept = read_outcomes(outcomes_path(path, line.key)) if outcomes else None
    return TaskScore(value, data, _agreeing(kept, value))


def _agreeing(outcomes: Outcomes | None, value: float) -> Outcomes | None:
    """Outcomes, if they belong to the result and not to another evaluation."""
    if outcomes is None or not len(outcomes) or abs(outcomes.evaluate() - value) > 1e-6:
        return None
    return outcomes


def split_score(run: LoadedRun, split: str) -> tuple[str, TaskScore] | None:
    """Name and value of a split's main metric at its latest evaluation; none if not evaluated."""
    final = run.final(split)
    for measure in (metric.key for metric in MAIN_METRICS):
        if measure in final:
            kept = None
            if measure == "acc1":
                path = run.folder.split_outcomes(split)
                kept = _agreeing(read_outcomes(path), final[measure])
            return measure, TaskScore(final[measure], "", kept)
    return None
