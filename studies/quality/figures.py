"""Figures of the study: accuracy over the batch and over time, and the normalizers' error."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from studies.quality.cell import BATCH
from studies.quality.datasets import DATA_SETS
from studies.quality.plan import ACCUMULATED, Rows, part
from studies.quality.recipes import METHODS, RECIPES

COSTS = Path(__file__).parents[2] / "benchmarks/results/accumulation_icon-tiny_b64.json"
"""What `benchmarks/accumulation.py` wrote."""
OF_THE_BATCH = ("rgcl_batch", "openclip")
"""Their normalizers are the batch's, so that the ratio of errors is 1 on all data."""
HIGHEST = 3.0
"""Of the axis of errors. What lies above, such as a run that collapsed, is an arrow there."""
COLOURS = {method: f"C{place}" for place, method in enumerate(METHODS)}


def figures(rows: Rows, tested: Rows) -> dict[str, Figure | None]:
    """The figures by name; None where nothing was run."""
    return {
        "accuracy_over_batch": accuracy_over_batch(rows, tested),
        "accuracy_over_time": accuracy_over_time(rows, tested),
        "error_over_ratio": error_over_ratio(rows),
    }


Point = tuple[float, float]
Lines = dict[str, dict[str, list[Point]]]
"""Points of each method on each data set."""


def accuracy_over_batch(rows: Rows, tested: Rows) -> Figure | None:
    """The recipes at every batch that the memory holds: mean of both splits and over seeds."""
    lines: Lines = {}
    for data in DATA_SETS:
        cells = [cell for cell in part("untuned", data, rows).evaluated if cell.name in tested]
        for method, mine in _by(cells, lambda cell: cell.label).items():
            groups = _by(mine, lambda cell: cell.batch)
            points = [(float(b), _mean_score(tested, cells)) for b, cells in groups.items()]
            if len(points) > 1:  # a line needs two batches
                lines.setdefault(data, {})[method] = sorted(points)
    return _panels(lines, "batch", "top-1 on the test splits, mean, %", log_x=True)


def accuracy_over_time(rows: Rows, tested: Rows) -> Figure | None:
    """A memory of 64 pairs: steps of 64, 256 and 1,024 pairs over the processor time of a run.

    At the rates of the recipes; the table also has the others. All runs see as many pairs, and rows
    come from machines of different speeds: so the time is that of a pair, measured side by side.
    """
    lines: Lines = {}
    cost = costs()
    for data in DATA_SETS:
        recipes = [cell for cell in part("untuned", data, rows).evaluated if cell.batch == BATCH]
        larger = part("memory", data, rows).evaluated
        if not any(cell.name in tested for cell in larger):
            continue
        known = [
            cell for cell in (*recipes, *larger)
            if cell.name in tested
            and cell.label in ACCUMULATED
            and cell.lr == RECIPES[cell.label].lr
        ]  # fmt: skip
        for method, mine in _by(known, lambda cell: cell.label).items():
            points = [
                (cost[method][pairs], _mean_score(tested, group))
                for pairs, group in _by(mine, lambda cell: cell.pairs_per_step).items()
            ]
            lines.setdefault(data, {})[method] = points
    label = "processor time over that of openclip, 64"
    return _panels(lines, label, "top-1 on the test splits, mean, %")


def costs() -> dict[str, dict[int, float]]:
    """The processor time of a pair by method and pairs in a step, over that of `openclip` at 64."""
    content = json.loads(COSTS.read_text(encoding="utf-8"))
    return {
        method: {int(pairs): each for pairs, each in found.items()}
        for method, found in content["cpu_time_of_a_pair"].items()
    }


def error_over_ratio(rows: Rows) -> Figure | None:
    """The error of the log-normalizers at the end of a run over n / B, relative to the batch's.

    Of the recipes on all data sets and batches, mean over seeds. The methods of the batch share a
    line at 1.
    """
    points: dict[str, list[Point]] = {}
    for data in DATA_SETS:
        cells = [
            cell for cell in part("untuned", data, rows).cells
            if cell.label not in OF_THE_BATCH and rows.get(cell.name, {}).get("errors")
            and rows[cell.name]["errors"][-1].get("mse") is not None
        ]  # fmt: skip
        for group in _by(cells, lambda cell: (cell.label, cell.batch)).values():
            ends = [rows[cell.name]["errors"][-1] for cell in group]
            ratio = sum(end["mse"] for end in ends) / sum(end["minibatch_mse"] for end in ends)
            at = rows[group[0].name]["pairs"] / group[0].pairs_per_step
            points.setdefault(group[0].label, []).append((at, ratio))
    ratios = {at for each in points.values() for at, _ in each}
    inside = {
        method: sorted(point for point in each if point[1] <= HIGHEST)
        for method, each in points.items()
    }
    lines = {"all data": {method: each for method, each in inside.items() if each}}
    label = "MSE of the log-normalizer over the batch's"
    figure = _panels(lines if len(ratios) > 1 else {}, "n / B", label, log_x=True, log_y=True)
    if figure is not None:
        (panel,) = figure.axes
        for method, each in points.items():
            for at, ratio in each:
                if ratio > HIGHEST:
                    panel.plot(at, HIGHEST, "^", color=COLOURS[method], clip_on=False)
                    where = {"textcoords": "offset points", "xytext": (6, -11), "fontsize": 8}
                    panel.annotate(f"{ratio:.0f}", (at, HIGHEST), **where)
        panel.set_ylim(top=HIGHEST)
        panel.axhline(1.0, color="grey", linestyle="--", linewidth=1)
        named = " and ".join(OF_THE_BATCH)
        panel.annotate(
            named,
            (0.5, 1.0),
            xycoords=("axes fraction", "data"),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    return figure


def _by(cells: Iterable[Any], key: Any) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def _mean_score(tested: Rows, cells: Sequence[Any]) -> float:
    """The mean of both splits and of the runs that did not fail, in percent."""
    rows = [tested[cell.name] for cell in cells if not tested[cell.name].get("failed")]
    values = [each["acc1"] for row in rows for each in row["evaluations"]]
    return 100 * statistics.mean(values) if values else float("nan")


def _panels(
    lines: Lines, x: str, y: str, *, log_x: bool = False, log_y: bool = False
) -> Figure | None:
    """A panel per data set, or None if there is nothing to draw."""
    if not lines:
        return None
    figure = Figure(figsize=(4.5 * len(lines), 4), layout="constrained")
    axes = figure.subplots(1, len(lines), squeeze=False)[0]
    for panel, (data, methods) in zip(axes, lines.items(), strict=True):
        for method in sorted(methods, key=METHODS.index):
            colour = COLOURS[method]
            panel.plot(*zip(*methods[method], strict=True), "o-", label=method, color=colour)
        panel.set_xlabel(f"{x} ({data})")
        if log_x:
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
        if log_y:
            panel.set_yscale("log")
    axes[0].set_ylabel(y)
    handles = {}
    for panel in axes:
        found, names = panel.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    return figure
