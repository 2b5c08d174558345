"""What fine-tuning gained and what it forgot: every set against the starting weights.

A run that starts from trained weights evaluates them before its first step. The difference of a
later evaluation to this one is the gain on the run's own data, and the loss on its canaries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from neuclip.evaluation.metric_names import MAIN_METRICS, Metric
from neuclip.report.runs import LoadedRun
from neuclip.run_folder import is_canary


@dataclass(frozen=True)
class Change:
    """A split of a run against the starting weights.

    Attributes:
        run: the run.
        split: the split.
        canary: whether it shows what is forgotten.
        metric: its main metric.
        start: value of the starting weights, 0..1.
        last: value at the latest evaluation.
        best: best value after the first step.
        best_epoch: epoch of the best value.
        points: (samples seen, difference to the start in percentage points).
    """

    run: LoadedRun
    split: str
    canary: bool
    metric: Metric
    start: float
    last: float
    best: float
    best_epoch: float
    points: list[tuple[float, float]]

    @property
    def difference(self) -> str:
        """Latest value against the start, in percentage points."""
        return f"{100 * (self.last - self.start):+.1f}"


def changes(runs: Sequence[LoadedRun]) -> list[Change]:
    """All splits that were evaluated with the starting weights and later; own data first."""
    found = [
        change
        for run in runs
        for split in dict.fromkeys(e.split for e in run.evaluations)
        if (change := _change(run, split)) is not None
    ]
    return sorted(found, key=lambda change: change.canary)


def _change(run: LoadedRun, split: str) -> Change | None:
    points = [e for e in run.evaluations if e.split == split]
    metric = next((m for m in MAIN_METRICS if m.key in points[0].metrics), None)
    if metric is None or points[0].epoch != 0 or len(points) < 2:
        return None
    start = points[0].metrics[metric.key]
    later = [e for e in points[1:] if metric.key in e.metrics]
    if not later:
        return None
    best = max(later, key=lambda e: e.metrics[metric.key])
    return Change(
        run=run,
        split=split,
        canary=is_canary(split),
        metric=metric,
        start=start,
        last=later[-1].metrics[metric.key],
        best=best.metrics[metric.key],
        best_epoch=best.epoch,
        points=[(x, 100 * (y - start)) for x, y in run.eval_series(split, metric.key)],
    )
