"""Tables and figures of the study of quality."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from neuclip.errors import UserError
from studies.default.plan import (
    BATCH,
    BATCHES,
    CONTENDERS,
    DEFAULT,
    FULL,
    HISTORY,
    INGREDIENTS,
    LEARNING_RATES,
    LONG,
    OURS,
    PUBLISHED,
    READINGS,
    final_score,
    plan,
)
from studies.shared.tables import markdown, number, percent, save_figure, write_between

Row = Mapping[str, Any]
WRITER = "studies/default/run.py"
FACE, CHARACTER = "unseen_face", "unseen_character"
FINALISTS = (DEFAULT, *CONTENDERS)
SUMMARY = (DEFAULT, "fastclip_v3", "rgcl_batch", PUBLISHED, "openclip")
"""The methods of the summary."""
NAMES = {DEFAULT: OURS, OURS: f"{OURS}, 32 batches"}
"""Names in the tables, where they differ from the label."""
COLOURS = {NAMES.get(label, label): f"C{place}" for place, label in enumerate(FINALISTS[:10])}
COLOURS |= {label: colormaps["Set2"](place) for place, label in enumerate(FINALISTS[10:])}
"""Colours of the methods, the same in every figure."""
BY_DATA = ", data sizes"
"""Suffix of lines of the data sizes, whose runs are shorter than the runs of the batch sizes."""


def write_report(
    rows: Mapping[str, Row],
    document: Path | None = None,
    figures: Path | None = None,
    page: Path | None = None,
) -> None:
    """Writes the tables and the figures; without a document or a page, prints the tables.

    Args:
        rows: the results by cell.
        document: file whose markers enclose the tables.
        figures: folder of the figures.
        page: file whose markers enclose the summary.

    Raises:
        UserError: a file has no markers, or the rows mix full and small encoders.
    """
    kinds = {str(row.get("towers", "full")) for row in rows.values()} or {"full"}
    if len(kinds) > 1:
        raise UserError(f"results of {' and '.join(sorted(kinds))} encoders are not mixed")
    if document is None and page is None:
        print(tables(rows))
    if document is not None:
        write_between(document, tables(rows), WRITER, *kinds)
    if page is not None:
        write_between(page, summary_table(list(rows.values())) + "\n", WRITER, "summary")
    if figures is not None:
        _draw(rows, figures)


def _draw(rows: Mapping[str, Row], folder: Path) -> None:
    for name, draw in FIGURES.items():
        save_figure(draw(list(rows.values())), folder / f"{name}.svg", f"runs of {_dates(rows)}")


def tables(rows: Mapping[str, Row]) -> str:
    """All tables as markdown, those without a row left out."""
    done = [row for row in rows.values() if not row.get("failed")]
    parts = [_facts(rows)]
    for title, table in (
        ("Final runs at batch 64", final_table(done)),
        ("Ingredients in long runs", long_ingredient_table(done)),
        ("Ingredients in short runs", ingredient_table(done)),
        ("Readings of NeuCLIP in short runs", reading_table(done)),
        ("Grids: mean of both splits' top-1", tuning_table(rows)),
        ("Batch sizes", batch_table(done)),
        ("Data sizes", size_table(done)),
    ):
        if table:
            parts.append(f"### {title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def _facts(rows: Mapping[str, Row]) -> str:
    """Number, dates, machines and code of the runs, and the number of open cells."""
    if not rows:
        return "Nothing has been run."
    everything = plan(rows)
    open_cells = Counter(cell.stage for cell in everything if cell.name not in rows)
    failed = [f"{name}: {row['failed']}" for name, row in rows.items() if row.get("failed")]
    hours = sum(row["cpu_seconds"] for row in rows.values()) / 3600
    lengths = {(row["stage"], row["epochs"] * row["samples"]) for row in rows.values()}
    shown = ", ".join(f"{stage} {seen:,}" for stage, seen in sorted(lengths))
    lines = [
        f"{len(rows)} runs, {_dates(rows)}, {hours:.1f} hours of one core; "
        f"{', '.join(sorted({str(row['machine']) for row in rows.values()}))}; code "
        f"{', '.join(sorted({str(row['code']) for row in rows.values()}))}.",
        f"Samples seen: {shown}.",
        "Not run yet: "
        + (", ".join(f"{count} of {stage}" for stage, count in open_cells.items()) or "nothing")
        + (
            "; stages after `tune` grow with the grids that are complete."
            if any(not _has(rows, label) for label in CONTENDERS)
            else "."
        ),
    ]
    return "\n".join(lines + [f"Failed: {line}" for line in failed])


def _dates(rows: Mapping[str, Row]) -> str:
    dates = sorted({str(row["date"]) for row in rows.values()})
    return f"{dates[0]} to {dates[-1]}"


def _has(rows: Mapping[str, Row], label: str) -> bool:
    return any(row["stage"] == "final" and row["label"] == label for row in rows.values())


# --- the tables ---------------------------------------------------------------------------------


def final_table(rows: Sequence[Row]) -> str:
    """Accuracy, retrieval and error at the end of the long runs, mean and deviation over seeds.

    One line per method and temperature; only the temperature that is best at seed 0 has more seeds.
    """
    header = (
        "method",
        "setting",
        "seeds",
        "typeface",
        "characters",
        "recall@1",
        "MSE",
        "MAE",
        "bias",
        "batch MSE",
        "MSE / batch MSE",
    )
    finals = _finals(rows)
    body = []
    for label in FINALISTS:
        of_label = [row for row in finals if row["label"] == label]
        for note in sorted({row["note"] for row in of_label}):
            mine = [row for row in of_label if row["note"] == note]
            ends = [row["errors"][-1] for row in mine]
            body.append((
                _name(label), _setting(label, mine[0]["method"]), str(len(mine)),
                percent(accuracy(row, FACE) for row in mine),
                percent(accuracy(row, CHARACTER) for row in mine),
                percent(accuracy(row, FACE, "mean_recall@1") for row in mine),
                *(number(end.get(key) for end in ends) for key in ("mse", "mae", "bias")),
                number(end.get("minibatch_mse") for end in ends),
                _ratio(ends),
            ))  # fmt: skip
    return markdown(header, body)


def summary_table(rows: Sequence[Row]) -> str:
    """The long runs of the main methods at their best temperature, at batch 64 and the largest."""
    swept = [row for row in _at_best(_batch_sweep(rows), rows) if row["epochs"] == LONG]
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in swept:
        if row["label"] in SUMMARY and row["batch"] in {BATCH, max(BATCHES)}:
            place = SUMMARY.index(row["label"])
            groups.setdefault((row["batch"], place), []).append(row)
    header = ("method", "batch", "seeds", "unseen typeface", "unseen characters", "error")
    body = [
        (
            f"`{_name(SUMMARY[place])}`", str(batch), str(len(mine)),
            percent(accuracy(row, FACE) for row in mine),
            percent(accuracy(row, CHARACTER) for row in mine),
            _ratio([row["errors"][-1] for row in mine]),
        )
        for (batch, place), mine in sorted(groups.items())
    ]  # fmt: skip
    return markdown(header, body)


def _ratio(ends: Sequence[Mapping[str, Any]]) -> str:
    """Ratio of the mean errors over seeds."""
    if any(end.get("mse") is None for end in ends):
        return "-"
    return f"{_mean_ratio(ends):.3f}"


def _mean_ratio(ends: Sequence[Mapping[str, Any]]) -> float:
    return sum(end["mse"] for end in ends) / sum(end["minibatch_mse"] for end in ends)


def _name(label: str) -> str:
    return NAMES.get(label, label)


def _finals(rows: Iterable[Row]) -> list[Row]:
    """Long runs of the contenders and of the ingredient that became the default."""
    return [row for row in rows if row["stage"] == "final" and not row.get("failed")] + [
        row for row in rows if row["stage"] == "long-ingredient" and row["label"] == DEFAULT
    ]


def _setting(label: str, method: Mapping[str, Any]) -> str:
    """A run's values of the settings that the contender's grid varies."""
    varied = CONTENDERS[label if label in CONTENDERS else OURS].temperatures[0]
    return ", ".join(f"{key.replace('_', ' ')} {method[key]:g}" for key in varied)


def best_finals(rows: Sequence[Row]) -> list[Row]:
    """The long runs of every method at the temperature with the best mean accuracy at seed 0."""
    finals = _finals(rows)
    best: dict[str, tuple[float, str]] = {}
    for row in finals:
        if row["seed"] == 0:
            found = (final_score(row), str(row["note"]))
            best[row["label"]] = max(best.get(row["label"], found), found)
    return [row for row in finals if row["note"] == best.get(row["label"], (0.0, None))[1]]


def ingredient_table(rows: Sequence[Row]) -> str:
    """Each change compared with the base at the same seeds."""
    mine = [row for row in rows if row["stage"] == "ingredient"]
    return _changes(mine, [row for row in mine if row["label"] == "base"])


def long_ingredient_table(rows: Sequence[Row]) -> str:
    """Each change compared with the final run of the pool of 32 batches at the same seed."""
    mine = [row for row in rows if row["stage"] == "long-ingredient"]
    return _changes(mine, [row for row in best_finals(rows) if row["label"] == OURS])


def reading_table(rows: Sequence[Row]) -> str:
    """Each other reading of NeuCLIP compared with this project's at the same seed."""
    mine = [row for row in rows if row["stage"] == "reading"]
    return _changes(mine, [row for row in mine if row["label"] == "as-here"])


def _changes(mine: Sequence[Row], bases: Sequence[Row]) -> str:
    base = {row["seed"]: final_score(row) for row in bases}
    measured = any(row.get("errors") for row in mine)
    header = ("change", "seeds", "typeface", "characters", "mean, against base", "temperature")
    body = []
    for label in (*INGREDIENTS, *HISTORY, *READINGS):
        of_label = [row for row in mine if row["label"] == label]
        if of_label:
            both = [final_score(row) - base[row["seed"]] for row in of_label if row["seed"] in base]
            body.append((
                f"{label} (history)" if label in HISTORY else label,
                str(len(of_label)), percent(accuracy(row, FACE) for row in of_label),
                percent(accuracy(row, CHARACTER) for row in of_label),
                f"{100 * statistics.mean(both):+.1f}" if both else "",
                number((row["training"][-1]["temperature"] for row in of_label), "{:.3f}"),
                *(_errors(of_label) if measured else ()),
            ))  # fmt: skip
    return markdown((*header, "MSE", "batch MSE") if measured else header, body)


def _errors(rows: Sequence[Row]) -> tuple[str, str]:
    ends = [row["errors"][-1] for row in rows if row.get("errors")]
    return number(end.get("mse") for end in ends), number(end.get("minibatch_mse") for end in ends)


def tuning_table(rows: Mapping[str, Row]) -> str:
    """The runs of every grid."""
    body = []
    for label, contender in CONTENDERS.items():
        mine = {row["note"]: row for row in rows.values() if _is_tuning(row, label)}
        for place, temperature in enumerate(contender.temperatures):
            notes = [f"lr{lr:g}-t{place}" for lr in LEARNING_RATES]
            if any(note in mine for note in notes):
                setting = _setting(label, temperature)
                body.append((_name(label), setting, *(_outcome(mine.get(note)) for note in notes)))
    return markdown(("method", "setting", *(f"rate {lr:g}" for lr in LEARNING_RATES)), body)


def _is_tuning(row: Row, label: str) -> bool:
    return row["stage"] == "tune" and row["label"] == label


def _outcome(row: Row | None) -> str:
    if row is None:
        return "not run"
    return "failed" if row.get("failed") else percent([final_score(row)])


def batch_table(rows: Sequence[Row]) -> str:
    """Accuracy and error over the batch size; at 64 the final runs and the full data size."""
    return _sweep(_batch_sweep(rows), "batch")


def _batch_sweep(rows: Sequence[Row]) -> list[Row]:
    swept = [
        row
        for row in rows
        if not row.get("failed")
        and (row["stage"] == "batch" or (row["stage"] == "size" and row["samples"] == FULL))
    ]
    return swept + best_finals(rows)


def size_table(rows: Sequence[Row]) -> str:
    """Accuracy and error over the number of pairs."""
    return _sweep([row for row in rows if row["stage"] == "size"], "samples")


def _sweep(rows: Sequence[Row], key: str) -> str:
    """One line per method and value of the key, mean and deviation over seeds."""
    header = (
        "method", "setting", "epochs", "n" if key == "samples" else key, "seeds", "typeface",
        "characters", "MSE", "batch MSE", "MSE / batch MSE",
    )  # fmt: skip
    groups: dict[tuple[int, int, str, str], list[Row]] = {}
    for row in rows:
        group = (row["epochs"], row[key], row["label"], _setting(row["label"], row["method"]))
        groups.setdefault(group, []).append(row)
    body = []
    for (epochs, value, label, setting), mine in sorted(
        groups.items(), key=lambda each: each[0][:2]
    ):
        ends = [row["errors"][-1] for row in mine]
        body.append((
            _name(label), setting, str(epochs), str(value), str(len(mine)),
            percent(accuracy(row, FACE) for row in mine),
            percent(accuracy(row, CHARACTER) for row in mine),
            number(end.get("mse") for end in ends),
            number(end.get("minibatch_mse") for end in ends),
            _ratio(ends),
        ))  # fmt: skip
    return markdown(header, body)


def accuracy(row: Row, split: str, key: str = "acc1") -> float:
    """The last value of a metric on a split."""
    return [each[key] for each in row["evaluations"] if each["split"] == split][-1]


# --- the figures --------------------------------------------------------------------------------


def accuracy_over_samples(rows: Sequence[Row]) -> Figure | None:
    """Long runs at batch 64 at each method's best temperature, mean over seeds."""
    lines = {}
    for label in FINALISTS:
        points: dict[float, list[float]] = {}
        for row in best_finals(rows):
            if row["label"] == label:
                for each in row["evaluations"]:
                    if each["split"] == FACE:
                        points.setdefault(each["samples_seen"], []).append(each["acc1"])
        lines[_name(label)] = sorted((x, 100 * statistics.mean(y)) for x, y in points.items())
    return _drawing(lines, "samples seen", "top-1 on the unseen typeface, %")


def accuracy_over_batch(rows: Sequence[Row]) -> Figure | None:
    """The sweep over batches at each method's best temperature, mean over seeds."""
    points = _points(
        _at_best(_longest(_batch_sweep(rows)), rows),
        lambda row: row["batch"],
        lambda mine: 100 * statistics.mean(accuracy(row, FACE) for row in mine),
    )
    return _drawing(points, "batch", "top-1 on the unseen typeface, %", log_x=True)


def error_over_ratio(rows: Sequence[Row]) -> Figure | None:
    """Final error of the log-normalizers over n / B.

    The error is divided by the error of the mini-batch estimate at the same embeddings: errors at
    different temperatures cannot be compared.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for suffix, sweep in (
        ("", _longest(_batch_sweep(rows))),
        (BY_DATA, [row for row in rows if row["stage"] == "size"]),  # of another length
    ):
        measured = [row for row in sweep if row["errors"][-1].get("mse") is not None]
        points = _points(
            _at_best(measured, rows),
            lambda row: row["samples"] / row["batch"],
            lambda mine: _mean_ratio([row["errors"][-1] for row in mine]),
        )
        lines |= {f"{name}{suffix}": own for name, own in points.items()}
    label = "MSE of the log-normalizer over the mini-batch's"
    return _drawing(lines, "n / B", label, log_x=True, log_y=True)


def _longest(sweep: Sequence[Row]) -> list[Row]:
    """The longest runs that exist at several batch sizes."""
    swept = {row["epochs"] for row in sweep if row["stage"] == "batch"}
    return [row for row in sweep if row["epochs"] == max(swept, default=LONG)]


def _at_best(some: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """The rows whose temperature setting is the method's best in the long runs of all rows."""
    best = {(row["label"], _setting(row["label"], row["method"])) for row in best_finals(rows)}
    return [row for row in some if (row["label"], _setting(row["label"], row["method"])) in best]


def _points(
    rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Sequence[Row]], float]
) -> dict[str, list[tuple[float, float]]]:
    """Points by method, one for all rows with the same x."""
    groups: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        groups.setdefault(_name(row["label"]), {}).setdefault(x(row), []).append(row)
    return {
        label: sorted((at, y(mine)) for at, mine in by_x.items()) for label, by_x in groups.items()
    }


def _drawing(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    *,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure | None:
    """A figure, or None if there is nothing to draw."""
    drawn = {label: points for label, points in lines.items() if points}
    if not drawn:
        return None
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    # The legend is ordered by the values at the right edge.
    for name, points in sorted(drawn.items(), key=lambda each: -each[1][-1][1]):
        style = "--" if name.endswith(BY_DATA) else "-"
        colour = COLOURS.get(name.removesuffix(BY_DATA))
        axes.plot(*zip(*points, strict=True), style, marker="o", label=name, color=colour)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if log_y:
        axes.set_yscale("log")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


FIGURES: dict[str, Callable[[Sequence[Row]], Figure | None]] = {
    "accuracy_over_samples": accuracy_over_samples,
    "accuracy_over_batch": accuracy_over_batch,
    "error_over_ratio": error_over_ratio,
}
