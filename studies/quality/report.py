"""The report of the study: tables of the test splits, and what is missing."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.quality.cell import BATCH
from studies.quality.compare import accuracy, best_other
from studies.quality.concepts import concepts_table
from studies.quality.datasets import DATA_SETS, DataSet
from studies.quality.development_report import (
    CURVES_TITLE,
    NEGATIVES_TITLE,
    RECIPES_TITLE,
    SUSPECTS_TITLE,
    change_of,
    curves_table,
    is_augmented,
    negatives_table,
    recipes_table,
    suspects_table,
)
from studies.quality.drift import drift_table
from studies.quality.figures import figures
from studies.quality.plan import ACCUMULATED, CHOOSING_ONLY, ORDER, SECTIONS, Rows, part
from studies.quality.recipes import METHODS, RECIPES
from studies.quality.rows import CONCEPTS, DEVELOPMENT, DRIFT, TEST, results_file
from studies.quality.summary import BLOCK, summary
from studies.shared.compare import Scores, difference, in_points
from studies.shared.tables import markdown, number, percent, save_figure, write_between

Row = Mapping[str, Any]
WRITER = "studies/quality/run.py"
RESULTS = Path(__file__).parent / "results"
SETTINGS = {
    "untuned": "One recipe per method, batch 64",
    "batches": "One recipe per method, other batches beside 64",
    "longer": "Longer runs, batch 64",
    "augmented": "Augmented images, batch 64",
    "bounded": "Temperature of 0.03 or more, batch 64",
    "equal": "Data of equal size with bare names as captions, 24 passes, batch 64",
    "tuned": "The best point of each method's grid, batch 64",
    "memory": "A memory of 64 pairs: steps of 64, 256 and 1,024 pairs",
    "published": "The published form after its search",
}
DRIFT_TITLE = "How far embeddings move in training, pairs of the development splits"
CONCEPTS_TITLE = "The part of the softmax on pairs of the anchor's own concept or caption"
RIVAL = "fastclip_v3"
"""What the published form is compared with."""
NOTHING = "Nothing has been run."


def report(args: argparse.Namespace) -> None:
    """Prints the tables, or writes them into a document, and draws the figures.

    Raises:
        UserError: rows are of another format, or the document has no markers.
    """
    rows = results_file(args.results / DEVELOPMENT).read()
    tested = results_file(args.results / TEST).read()
    others = [results_file(args.results / name).read() for name in (CONCEPTS, DRIFT)]
    text = tables(rows, tested, *others)
    if args.document is None:
        print(text)
    else:
        write_between(args.document, text + "\n", WRITER, "the study")
    for page in args.summaries:
        write_between(page, summary(rows, tested) + "\n", WRITER, BLOCK)
    if args.figures is not None and rows:
        for name, figure in figures(rows, tested).items():
            save_figure(figure, args.figures / f"quality_{name}.svg", dates(rows))


def tables(
    rows: Rows, tested: Rows, measured: Rows | None = None, moved: Rows | None = None
) -> str:
    """All tables as markdown, with what is missing.

    Args:
        rows: the development rows by cell.
        tested: the test rows by cell.
        measured: the rows of the command `concepts` by cell.
        moved: the rows of the command `drift` by cell.
    """
    if not rows:
        return NOTHING
    parts = [_facts(rows, tested)]
    for section, title in SETTINGS.items():
        table = section_table(section, rows, tested)
        if table:
            parts.append(f"### {title}\n\n{table}")
    for title, table in (
        (RECIPES_TITLE, recipes_table(rows)),
        (CURVES_TITLE, curves_table(rows)),
        (NEGATIVES_TITLE, negatives_table(rows)),
        (SUSPECTS_TITLE, suspects_table(rows)),
        (CONCEPTS_TITLE, concepts_table(measured or {})),
        (DRIFT_TITLE, drift_table(moved or {})),
    ):
        if table:
            parts.append(f"### {title}\n\n{table}")
    return "\n\n".join([*parts, missing(rows, tested)])


def _facts(rows: Rows, tested: Rows) -> str:
    everything = (*rows.values(), *tested.values())
    hours = sum(row["cpu_seconds"] + row.get("error_cpu_seconds", 0) for row in rows.values())
    failed = [f"Failed: {name}: {row['failed']}" for name, row in rows.items() if "failed" in row]
    line = (
        f"{len(rows)} runs, {len(tested)} of them on the test splits; {dates(rows)}; "
        f"{hours / 3600:.1f} hours of one core; {_listed(everything, 'machine')}; torch "
        f"{_listed(everything, 'torch')}; code {_listed(everything, 'code')}; data "
        f"{_listed(everything, 'data')}."
    )
    return "\n".join([line, *failed])


def _listed(rows: Iterable[Row], key: str) -> str:
    return ", ".join(sorted({str(row[key]) for row in rows}))


def dates(rows: Rows) -> str:
    """The dates of the rows in words."""
    found = sorted({str(row["date"]) for row in rows.values()})
    return f"runs of {found[0]} to {found[-1]}"


# --- the tables ---------------------------------------------------------------------------------


def section_table(section: str, rows: Rows, tested: Rows) -> str:
    """Accuracy on the test splits: data sets by methods, with the difference to the best other.

    Cells of a section at several batches, rates or lengths are methods of their own: `openclip,
    256`.
    """
    body: list[Sequence[str]] = []
    for data in DATA_SETS.values():
        body += _of_data(data, evaluated(section, data, rows, tested))
    against = "against the best other"
    first, second = "unseen style, vendor or face", "unseen concept, emoji or character"
    return markdown(("data", "method", "seeds", first, against, second, against), body)


def evaluated(section: str, data: DataSet, rows: Rows, tested: Rows) -> dict[str, list[Row]]:
    """The test rows of a section on a data set by method, in the order of methods.

    `batches` are the cells of `untuned` whose method has run at other batches than 64, too.
    """
    cells = part(section, data.name, rows).evaluated
    beside = part("untuned", data.name, rows).evaluated
    if section == "untuned":
        cells = [cell for cell in cells if cell.batch == BATCH]
    if section == "batches":
        others = {cell.label for cell in beside if cell.batch != BATCH and cell.name in tested}
        cells = [cell for cell in beside if cell.label in others]
    known = any(cell.name in tested for cell in cells)
    if section == "memory" and known:  # beside larger steps the step that the memory holds
        cells += [cell for cell in beside if cell.batch == BATCH and cell.label in ACCUMULATED]
    if section == "longer" and known:  # beside longer runs those of the usual length
        methods = {cell.label for cell in cells}
        cells += [cell for cell in beside if cell.batch == BATCH and cell.label in methods]
    if section == "augmented" and known:  # beside the same runs without
        plain = part("longer", data.name, rows).evaluated + beside
        augmented = {(cell.label, cell.batch, cell.passes, cell.seed) for cell in cells}
        cells += [
            cell for cell in plain
            if (cell.label, cell.batch, cell.passes, cell.seed) in augmented
        ]  # fmt: skip
    if section == "bounded" and known:  # beside all methods without, at these lengths and seeds
        plain = part("longer", data.name, rows).evaluated + beside
        tried = [cell for cell in cells if cell.name in tested]
        bounded = {(cell.batch, cell.passes, cell.seed) for cell in tried}
        cells += [cell for cell in plain if (cell.batch, cell.passes, cell.seed) in bounded]
    if section == "published" and known:  # beside what it has to beat
        batches = {cell.batch for cell in cells}
        cells += [cell for cell in beside if cell.label == RIVAL and cell.batch in batches]
    found = [tested[cell.name] for cell in cells if cell.name in tested]
    by_method: dict[str, list[Row]] = {}
    for row in sorted(found, key=_place):
        by_method.setdefault(_title(section, row), []).append(row)
    return by_method


def _title(section: str, row: Row) -> str:
    title = f"`{row['label']}`"
    if section in {"memory", "published", "batches"}:
        title += f", {row['batch'] * row['accum']:,}"
    if section in {"longer", "augmented", "bounded"}:
        title += f", {row['passes']} passes"
    title += change_of(row)
    rate = row["lr"] / RECIPES[row["label"]].lr
    return f"{title}, {rate:g} of the rate" if section == "memory" and rate != 1 else title


def _place(row: Row) -> tuple[int, int, str, int, float, int]:
    step = row["batch"] * row["accum"]
    place = METHODS.index(row["label"])
    return place, row["passes"], change_of(row), step, -row["lr"], row["seed"]


def _of_data(data: DataSet, by_method: Mapping[str, Sequence[Row]]) -> Iterable[Sequence[str]]:
    """The lines of a data set: the methods, then what needs no learning.

    A method is compared with those of as many passes, augmented or not as it is.
    """
    if not by_method:
        return
    splits = data.split_names("test")
    failed = {method: sum("failed" in row for row in mine) for method, mine in by_method.items()}
    by_method = {
        method: [row for row in mine if "failed" not in row] for method, mine in by_method.items()
    }
    scores = {split: _scores(by_method, split) for split in splits}
    lengths = {
        method: (mine[0]["passes"], is_augmented(mine[0]))
        for method, mine in by_method.items() if mine
    }  # fmt: skip
    for method, mine in by_method.items():
        seeds = str(len(mine)) + (f" ({failed[method]} failed)" if failed[method] else "")
        columns: list[str] = []
        for split in splits:
            columns.append(percent(scores[split][method].values()))
            peers = [other for other, each in lengths.items() if each == lengths.get(method)]
            columns.append(_against(method, {other: scores[split][other] for other in peers}))
        yield (data.name, method, seeds, *columns)
    evaluations = [
        each for mine in by_method.values() for row in mine for each in row["evaluations"]
    ]
    floors = {each["split"]: each["floor_top1"] for each in evaluations}
    shown = [number([100 * f if (f := floors.get(split)) else None], "{:.1f}") for split in splits]
    yield (data.name, "nearest training picture", "", shown[0], "", shown[1], "")


def _scores(by_method: Mapping[str, Sequence[Row]], split: str) -> dict[str, Scores]:
    return {
        method: {row["seed"]: accuracy(row, split) for row in mine}
        for method, mine in by_method.items()
    }


def _against(method: str, scores: Mapping[str, Scores]) -> str:
    """The difference to the best other method in points, with its 95 % interval."""
    other = best_other(method, scores) if scores.get(method) else None
    found = None if other is None else difference(scores[method], scores[other])
    return "-" if found is None else f"{in_points(found)} ({other})"


def missing(rows: Rows, tested: Rows) -> str:
    """What the plan has and the rows have not, by section and data set."""
    lines = []
    for section in SECTIONS:
        for data in sorted({line.data for line in ORDER if line.section == section}):
            found = part(section, data, rows)
            trained = sum(cell.name in rows for cell in found.cells)
            on_test = sum(cell.name in tested for cell in found.evaluated)
            if trained < len(found.cells) or on_test < len(found.evaluated) or not found.decided:
                more = "" if found.decided else ", and what its search decides"
                evaluated = f"{on_test} of {len(found.evaluated)} evaluated on the test splits"
                evaluated = "for choosing alone" if section in CHOOSING_ONLY else evaluated
                lines.append(
                    f"- {section}, {data}: {trained} of {len(found.cells)} runs trained{more}; "
                    f"{evaluated}"
                )
    return "Not complete:\n\n" + "\n".join(lines) if lines else "The plan is complete."
