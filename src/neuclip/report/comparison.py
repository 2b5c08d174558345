"""Runs side by side: the best result of each split, and the table of metrics."""

import math
import statistics
from dataclasses import dataclass, replace

from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.metric_names import MAIN_METRICS, Better, Metric, shown_metrics
from neuclip.report.entries import Entry
from neuclip.report.runs import LoadedRun
from neuclip.report.scoreboard import Scoreboard
from neuclip.run_folder import CANARY


@dataclass(frozen=True)
class MetricCell:
    """A formatted value; `best` marks the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class MetricRow:
    """One metric of all runs."""

    label: str
    cells: list[MetricCell]
    hint: str = ""
    main: bool = True


@dataclass(frozen=True)
class RowGroup:
    """Rows under one heading."""

    title: str
    rows: list[MetricRow]


@dataclass(frozen=True)
class BestResult:
    """The best result of a split, or of one of the benchmark's averages.

    Attributes:
        split: name of the split or average.
        measure: the metric in words.
        value: the mean over seeds, formatted.
        best: the run, or the entry of several seeds; ties are counted.
        seeds: number of runs that `value` is the mean of.
        rivals: number of entries compared.
        chance: score of guessing, formatted; empty if unknown.
        times_chance: value / chance, formatted; empty if unknown.
        scale: numbers of images and classes.
    """

    split: str
    measure: str
    value: str
    best: str
    seeds: int
    rivals: int
    chance: str = ""
    times_chance: str = ""
    scale: str = ""


def _cost(key: str, label: str, better: Better, *, percent: bool = False) -> Metric:
    return Metric(key=key, label=label, better=better, percent=percent, summary=True)


COST_METRICS = (
    (_cost("samples_seen", "Samples seen", "neither"), LoadedRun.last),
    (_cost("temperature", "Temperature at the end", "neither"), LoadedRun.last),
    (_cost("samples_per_second", "Samples per second", "high"), LoadedRun.median),
    (
        _cost("share_normalizer", "Share of time in the normalizer", "neither", percent=True),
        LoadedRun.share,
    ),
    (_cost("memory_mb", "Memory, MB", "low"), LoadedRun.last),
)


def splits_of(runs: list[LoadedRun]) -> list[str]:
    """All splits that any run was evaluated on, in order of evaluation."""
    return list(dict.fromkeys(e.split for run in runs for e in run.evaluations))


def main_splits(runs: list[LoadedRun]) -> list[str]:
    """The splits shown one by one; the benchmark's tasks have a table of their own."""
    splits, tasks = splits_of(runs), load_suite().tasks
    own = [split for split in splits if split not in tasks and not split.startswith(CANARY)]
    return own or [split for split in splits if split == "imagenet1k"]


def best_averages(board: Scoreboard) -> list[BestResult]:
    """The best of the benchmark's averages; empty without benchmark results."""
    found: list[BestResult] = []
    for panel in board.panels if board.of_benchmark else ():
        scored = [bar for bar in panel.bars if bar.color >= 0 and bar.mean is not None]
        if scored:
            means = [bar.mean or 0.0 for bar in scored]
            best = scored[means.index(max(means))]
            found.append(
                BestResult(
                    split=panel.title,
                    measure="mean of the tasks' main metrics",
                    value=percent(max(means)),
                    best=_named(best.label, means),
                    seeds=len(best.values),
                    rivals=len(scored),
                )
            )
    return found


def best_results(runs: list[LoadedRun], found: list[Entry]) -> list[BestResult]:
    """The best top-1 accuracy of each split; recall@1 for a split without classes.

    Entries with several seeds are compared by their means.
    """
    results: list[BestResult] = []
    for split in main_splits(runs):
        for metric in MAIN_METRICS:
            scored = [
                entry
                for entry in found
                if all(metric.key in run.final(split) for run in entry.runs)
            ]
            if scored:
                results.append(_best_result(split, metric, scored))
                break
    return results


def _best_result(split: str, metric: Metric, scored: list[Entry]) -> BestResult:
    means = [
        statistics.fmean(run.final(split)[metric.key] for run in entry.runs) for entry in scored
    ]
    value = max(means)
    entry = scored[means.index(value)]
    final, seeds = entry.runs[0].final(split), len(entry.runs)
    chance = final.get("chance") if metric.key == "acc1" else None
    scale = [
        f"{number(final[key])} {noun}"
        for key, noun in (("num_samples", "images"), ("num_classes", "classes"))
        if key in final
    ]
    return BestResult(
        split=split,
        measure=metric.phrase,
        value=percent(value),
        best=_named(entry.label if seeds > 1 else entry.runs[0].label, means),
        seeds=seeds,
        rivals=len(scored),
        chance="" if chance is None else percent(chance),
        times_chance="" if not chance else number(value / chance),
        scale=", ".join(scale),
    )


def _named(label: str, means: list[float]) -> str:
    """The best entry, with the number of entries that share its value."""
    others = means.count(max(means)) - 1
    return f"{label} and {others} other{'s' if others > 1 else ''}" if others else label


def comparison(runs: list[LoadedRun]) -> list[RowGroup]:
    """The table: the main metrics of each split, then the cost of training."""
    rows = [_row(metric, [read(run, metric.key) for run in runs]) for metric, read in COST_METRICS]
    cost = [row for row in rows if any(cell.text for cell in row.cells)]
    main = [
        replace(group, rows=[row for row in group.rows if row.main])
        for group in (_split_group(runs, split) for split in main_splits(runs))
    ]
    return [*main, RowGroup("Training", cost)] if cost else main


def all_metrics(runs: list[LoadedRun]) -> list[RowGroup]:
    """The table of all metrics of all splits."""
    return [_split_group(runs, split) for split in splits_of(runs)]


def _split_group(runs: list[LoadedRun], split: str) -> RowGroup:
    finals = [run.final(split) for run in runs]
    rows = [
        _row(metric, [final.get(metric.key) for final in finals])
        for metric in shown_metrics({key for final in finals for key in final})
        if metric.table and any(metric.key in final for final in finals)
    ]
    return RowGroup(split, rows)


def _row(metric: Metric, values: list[float | None]) -> MetricRow:
    texts = ["" if v is None else (percent(v) if metric.percent else number(v)) for v in values]
    known = [value for value in values if value is not None and math.isfinite(value)]
    best = None
    if metric.better != "neither" and len(known) > 1:
        best = max(known) if metric.better == "high" else min(known)
        if known.count(best) > len(known) / 2:  # a mark on most values marks nothing
            best = None
    cells = [
        MetricCell(text, best is not None and value == best)
        for text, value in zip(texts, values, strict=True)
    ]
    return MetricRow(metric.label, cells, metric.hint, metric.summary)


def percent(value: float) -> str:
    """Formats a fraction as a percentage; values below 1 % keep two digits."""
    if not math.isfinite(value):
        return str(value)
    hundredfold = 100 * value
    return f"{hundredfold:.1f} %" if hundredfold >= 1 or value == 0 else f"{hundredfold:.2g} %"


def number(value: float) -> str:
    """Formats integers and values from 100 as integers with separators, others with 3 digits."""
    if math.isfinite(value) and (value == round(value) or abs(value) >= 100):
        return f"{round(value):,}"
    return f"{value:#.3g}"


def different_settings(runs: list[LoadedRun]) -> list[tuple[str, list[str]]]:
    """Settings that differ between runs, except the name."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "name")
    rows = [(key, [run.config.get(key, "") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
