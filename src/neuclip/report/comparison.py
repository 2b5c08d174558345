"""The verdict and the table of methods side by side."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from neuclip.evaluation.datacomp.suite import load_suite
from neuclip.report.runs import Run

Better = Literal["high", "low", "neither"]


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


@dataclass(frozen=True)
class _Metric:
    key: str
    label: str
    better: Better
    percent: bool = True
    hint: str = ""
    main: bool = True


SPLIT_METRICS = (
    _Metric("acc1", "Zero-shot top-1", "high"),
    _Metric("acc5", "Zero-shot top-5", "high"),
    _Metric("mean_per_class_recall", "Mean per class recall", "high", main=False),
    _Metric("chance", "Chance, top-1", "neither"),
    _Metric("image_retrieval_recall@1", "Image retrieval R@1", "high", hint="caption to picture"),
    _Metric("image_retrieval_recall@5", "Image retrieval R@5", "high", main=False),
    _Metric("image_retrieval_recall@10", "Image retrieval R@10", "high", main=False),
    _Metric("text_retrieval_recall@1", "Text retrieval R@1", "high", hint="picture to caption"),
    _Metric("text_retrieval_recall@5", "Text retrieval R@5", "high", main=False),
    _Metric("text_retrieval_recall@10", "Text retrieval R@10", "high", main=False),
    _Metric("normalizer_mae", "Log-normalizer MAE", "low", percent=False),
    _Metric("normalizer_mse", "Log-normalizer MSE", "low", percent=False, main=False),
    _Metric("normalizer_bias", "Log-normalizer bias", "neither", percent=False, main=False),
    _Metric(
        "minibatch_normalizer_mae", "Mini-batch estimate, MAE", "neither", percent=False,
        hint="from the batch alone",
    ),
    _Metric(
        "minibatch_normalizer_mse", "Mini-batch estimate, MSE", "neither", percent=False,
        main=False,
    ),
)  # fmt: skip


COST_METRICS = (
    (_Metric("samples_seen", "Samples seen", "neither", percent=False), Run.last),
    (_Metric("temperature", "Temperature at the end", "neither", percent=False), Run.last),
    (_Metric("samples_per_second", "Samples per second", "high", percent=False), Run.median),
    (_Metric("share_normalizer", "Share of time in the normalizer", "neither"), Run.share),
    (_Metric("memory_mb", "Memory, MB", "low", percent=False), Run.last),
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
        for key, measure in (("acc1", "zero-shot top-1"), ("mean_recall@1", "mean recall@1")):
            scored = [run for run in runs if key in run.final(split)]
            if scored:
                best = max(scored, key=lambda run: run.final(split)[key])
                found.append(_verdict(split, measure, best, best.final(split)[key]))
                break
    return found


def _verdict(split: str, measure: str, run: Run, value: float) -> Verdict:
    final = run.final(split)
    chance = final.get("chance") if measure == "zero-shot top-1" else None
    scale = [
        f"{number(final[key])} {noun}"
        for key, noun in (("num_samples", "pictures"), ("num_classes", "classes"))
        if key in final
    ]
    return Verdict(
        split=split,
        measure=measure,
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
        for metric in SPLIT_METRICS
        if any(metric.key in final for final in finals)
    ]
    return Group(split, rows)


def _row(metric: _Metric, values: list[float | None]) -> Row:
    texts = ["" if v is None else (percent(v) if metric.percent else number(v)) for v in values]
    known = [value for value in values if value is not None and math.isfinite(value)]
    best = None
    if metric.better != "neither" and len(known) > 1 and len(set(known)) > 1:
        best = max(known) if metric.better == "high" else min(known)
    cells = [
        Cell(text, best is not None and value == best)
        for text, value in zip(texts, values, strict=True)
    ]
    return Row(metric.label, cells, metric.hint, metric.main)


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
