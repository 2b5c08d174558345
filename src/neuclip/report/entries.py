"""What is compared: runs of one method and one setting are one entry, whatever their seeds.

The scores are DataComp's where a run was judged on the benchmark, else those of its own splits.
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
from neuclip.report.runs import Run, results_files
from neuclip.run_folder import RunFolder, outcomes_path

# Settings that make no other experiment.
_SAME = frozenset(
    ("name", "seed", "resume", "device", "data.workers", "data.cache_dir", "data.train_data")
)
_SAME_SECTIONS = ("output.", "evaluation.")


@dataclass(frozen=True)
class Entry:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: The method, with the settings that tell it from others of the same method.
        runs: The runs.
    """

    label: str
    runs: list[Run]


@dataclass(frozen=True)
class Score:
    """What a run reached on a task.

    Attributes:
        value: Main metric, 0..1.
        data: Digest of the task's data; empty where it is not known.
        outcomes: Of the samples, where they were kept.
    """

    value: float
    data: str = ""
    outcomes: Outcomes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Judged:
    """The benchmark's results of a checkpoint.

    Attributes:
        epoch: Epochs that it was trained.
        scores: By the task's key.
    """

    epoch: int
    scores: dict[str, Score]


def entries(runs: Sequence[Run]) -> list[Entry]:
    """Runs by method and settings, in the order in which they were given."""
    alike: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        alike.setdefault(tuple(sorted(_experiment(run).items())), []).append(run)
    groups = list(alike.values())
    return [Entry(_label(group, groups), group) for group in groups]


def _experiment(run: Run) -> dict[str, str]:
    # Where the data lie does not matter; that they are the same shows in the name of the folder.
    data = run.config.get("data.train_data", "").rstrip("/").rpartition("/")[2]
    kept = {
        key: value
        for key, value in run.config.items()
        if key not in _SAME and not key.startswith(_SAME_SECTIONS)
    }
    return {**kept, "data": data}


def _label(group: list[Run], groups: list[list[Run]]) -> str:
    method = group[0].method
    rivals = [_experiment(g[0]) for g in groups if g[0].method == method and g is not group]
    if not rivals:
        return method
    own = _experiment(group[0])
    different = [key for key in own if any(rival.get(key) != own[key] for rival in rivals)]
    if not 0 < len(different) <= 2:
        return group[0].label
    told = ", ".join(f"{key.rpartition('.')[2]} {own[key]}" for key in different)
    return f"{method} ({told})"


def choose_baseline(found: Sequence[Entry], wanted: str | None) -> Entry:
    """The entry that the others are compared with.

    Args:
        found: All entries.
        wanted: An entry, a method, or the name of a run; none: openclip, or else the first.

    Raises:
        UserError: there is no such entry.
    """
    if wanted is None:
        return next((entry for entry in found if entry.runs[0].method == "openclip"), found[0])
    for entry in found:
        names = {entry.label, *(run.label for run in entry.runs)}
        if wanted in names or wanted == entry.runs[0].method:
            return entry
    names = [entry.label for entry in found]
    raise UserError(f"--baseline {wanted!r} is none of what is compared; {nearest(wanted, names)}")


def benchmark_results(run: Run) -> list[Judged]:
    """The benchmark's results of a run, by epoch; those of other suites or mixed ones are gaps.

    Outcomes of samples are read of the latest checkpoint.
    """
    found: list[Judged] = []
    for epoch, path in reversed(results_files(run.folder)):
        try:
            lines = [line for line in read_eval_results(path) if line.provenance is not None]
        except UserError:
            continue  # named among the run's gaps already
        usable = [line for line in lines if _is_current(line)]
        problem = _problem(lines, usable)
        if problem:
            run.gaps.append(f"{path.name}: {problem}")
        elif usable:
            latest = not found
            scores = {line.key: _score(path, line, outcomes=latest) for line in usable}
            found.append(Judged(epoch, scores))
    return found[::-1]


def _is_current(line: EvalResult) -> bool:
    return line.provenance is not None and line.provenance.suite == load_suite().version


def _problem(lines: list[EvalResult], usable: list[EvalResult]) -> str:
    if len(usable) < len(lines):
        return (
            f"{len(lines) - len(usable)} results are of another suite than "
            f"{load_suite().version}: judge them again; none of the file is compared"
        )
    made = {(p.checkpoint, p.precision) for line in usable if (p := line.provenance) is not None}
    return "the results are of several checkpoints: none is compared" if len(made) > 1 else ""


def _score(path: Path, line: EvalResult, *, outcomes: bool) -> Score:
    value = line.metrics.get("main_metric", math.nan)
    data = line.provenance.data if line.provenance is not None else ""
    kept = read_outcomes(outcomes_path(path, line.key)) if outcomes else None
    return Score(value, data, _agreeing(kept, value))


def _agreeing(outcomes: Outcomes | None, value: float) -> Outcomes | None:
    """Outcomes, if they are those of the result: an older or newer judging leaves others."""
    if outcomes is None or not len(outcomes) or abs(outcomes.evaluate() - value) > 1e-6:
        return None
    return outcomes


def split_score(run: Run, split: str) -> tuple[str, Score] | None:
    """Main measure of a split at its latest judging, and its name; none if it was not judged."""
    final = run.final(split)
    for measure in (metric.key for metric in MAIN_METRICS):
        if measure in final:
            kept = None
            if measure == "acc1":
                path = RunFolder(run.folder).split_outcomes(split)
                kept = _agreeing(read_outcomes(path), final[measure])
            return measure, Score(final[measure], "", kept)
    return None
