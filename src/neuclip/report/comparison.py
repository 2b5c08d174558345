"""The verdict and the table of methods side by side."""

import math
from dataclasses import dataclass, replace

from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.evaluation.metric_names import MAIN_METRICS, METRICS, Better, Metric
from neuclip.report.runs import Run


@dataclass(frozen=True)
class Cell:
    """A value as shown; `best` marks the best of its row."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A metric of all runs."""

    label: str
    cells: list[Cell]
    hint: str = ""
    main: bool = True


@dataclass(frozen=True)
class Group:
    """Rows under one heading."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Verdict:
    """The best result of a split."""

    split: str
    measure: str
    value: str
    run: str
    method: str
    chance: str
    times_chance: str
    scale: str


def _cost(key: str, label: str, better: Better, *, percent: bool = False) -> Metric:
    return Metric(key=key, label=label, better=better, percent=percent, summary=True)


COST_METRICS = (
    (_cost("samples_seen", "Samples seen", "neither"), Run.last),
    (_cost("temperature", "Temperature at the end", "neither"), Run.last),
    (_cost("samples_per_second", "Samples per second", "high"), Run.median),
    (
        _cost("share_normalizer", "Share of time in the normalizer", "neither", percent=True),
        Run.share,
    ),
    (_cost("memory_mb", "Memory, MB", "low"), Run.last),
)


def splits_of(runs: list[Run]) -> list[str]:
    """All splits that any run was judged on, in the order they were judged in."""
    return list(dict.fromkeys(e.split for run in runs for e in run.evaluations))


def main_splits(runs: list[Run]) -> list[str]:
    """The splits that are shown one by one: the benchmark's tasks have a table of their own."""
    splits, tasks = splits_of(runs), load_suite().tasks
    own = [split for split in splits if split not in tasks]
    return own or [split for split in splits if split == "imagenet1k"]


def verdicts(runs: list[Run]) -> list[Verdict]:
    """Per split the best top-1 against chance; recall@1 where there are no classes."""
    found: list[Verdict] = []
    for split in main_splits(runs):
        for metric in MAIN_METRICS:
            scored = [run for run in runs if metric.key in run.final(split)]
            if scored:
                best = max(scored, key=lambda run: run.final(split)[metric.key])
                found.append(_verdict(split, metric, best))
                break
    return found


def _verdict(split: str, metric: Metric, run: Run) -> Verdict:
    final = run.final(split)
    value, chance = final[metric.key], final.get("chance") if metric.key == "acc1" else None
    scale = [
        f"{number(final[key])} {noun}"
        for key, noun in (("num_samples", "pictures"), ("num_classes", "classes"))
        if key in final
    ]
    return Verdict(
        split=split,
        measure=metric.phrase,
        value=percent(value),
        run=run.label,
        method=run.method,
        chance="" if chance is None else percent(chance),
        times_chance="" if not chance else number(value / chance),
        scale=", ".join(scale),
    )


def comparison(runs: list[Run]) -> list[Group]:
    """The table: what matters most of every split, then what the training cost."""
    rows = [_row(metric, [read(run, metric.key) for run in runs]) for metric, read in COST_METRICS]
    cost = [row for row in rows if any(cell.text for cell in row.cells)]
    main = [
        replace(group, rows=[row for row in group.rows if row.main])
        for group in (_split_group(runs, split) for split in main_splits(runs))
    ]
    return [*main, Group("Training", cost)] if cost else main


def all_metrics(runs: list[Run]) -> list[Group]:
    """The table of all metrics of the splits."""
    return [_split_group(runs, split) for split in splits_of(runs)]


def _split_group(runs: list[Run], split: str) -> Group:
    finals = [run.final(split) for run in runs]
    rows = [
        _row(metric, [final.get(metric.key) for final in finals])
        for metric in METRICS
        if metric.table and any(metric.key in final for final in finals)
    ]
    return Group(split, rows)


def _row(metric: Metric, values: list[float | None]) -> Row:
    texts = ["" if v is None else (percent(v) if metric.percent else number(v)) for v in values]
    known = [value for value in values if value is not None and math.isfinite(value)]
    best = None
    if metric.better != "neither" and len(known) > 1 and len(set(known)) > 1:
        best = max(known) if metric.better == "high" else min(known)
    cells = [
        Cell(text, best is not None and value == best)
        for text, value in zip(texts, values, strict=True)
    ]
    return Row(metric.label, cells, metric.hint, metric.summary)


def percent(value: float) -> str:
    """A fraction as a percentage with enough digits to tell chance from nothing."""
    if not math.isfinite(value):
        return str(value)
    hundredfold = 100 * value
    return f"{hundredfold:.1f} %" if hundredfold >= 1 or value == 0 else f"{hundredfold:.2g} %"


def number(value: float) -> str:
    """Whole numbers and large ones with separators, small ones with three digits."""
    if math.isfinite(value) and (value == round(value) or abs(value) >= 100):
        return f"{round(value):,}"
    return f"{value:#.3g}"


def different_settings(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs (the name aside)."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "name")
    rows = [(key, [run.config.get(key, "") for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
