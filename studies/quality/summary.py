"""The table that other pages quote: the main methods on the test splits, a line per split."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from studies.quality.cell import BATCH, Cell
from studies.quality.compare import accuracy
from studies.quality.datasets import DATA_SETS, DataSet
from studies.quality.development_report import change_of
from studies.quality.plan import MAIN, Rows, part
from studies.shared.tables import markdown, number, percent

Row = Mapping[str, Any]
BLOCK = "the main methods"
SHOWN = ("rgcl_queue", *MAIN)
SECTIONS = ("untuned", "longer", "bounded")
"""Those with the recipes at batch 64: the second with more passes, the third with a bound."""


def summary(rows: Rows, tested: Rows) -> str:
    """Top-1 in percent on the test splits, batch 64; mean and standard deviation over seeds.

    Args:
        rows: the development rows by cell.
        tested: the test rows by cell.
    """
    header = ("data", "split", "seeds", *(f"`{method}`" for method in SHOWN), "outlines")
    body = []
    for data in DATA_SETS.values():
        parts = [part(section, data.name, rows).evaluated for section in SECTIONS]
        groups = [mine for cells in parts for mine in _by_length(cells, tested)]
        for mine in sorted(groups, key=lambda each: each[0]["passes"]):
            body += _lines(data, mine)
    return markdown(header, body)


def _by_length(cells: list[Cell], tested: Rows) -> list[list[Row]]:
    """The runs that did not fail, of the main methods at batch 64, by their passes."""
    known = [cell for cell in cells if cell.batch == BATCH and cell.label in SHOWN]
    mine = [tested[cell.name] for cell in known if cell.name in tested]
    mine = [row for row in mine if "failed" not in row]
    lengths = sorted({row["passes"] for row in mine})
    return [[row for row in mine if row["passes"] == passes] for passes in lengths]


def _lines(data: DataSet, mine: list[Row]) -> list[tuple[str, ...]]:
    """A line per split."""
    title = f"{data.name}, {mine[0]['passes']} passes{change_of(mine[0])}"
    counts = Counter(row["label"] for row in mine).values()
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return [
        (
            title,
            split.replace("_", " "),
            seeds,
            *(_score(mine, method, on_test) for method in SHOWN),
            number([_floor(mine, on_test)], "{:.1f}"),
        )
        for split, on_test in zip(data.splits, data.split_names("test"), strict=True)
    ]


def _score(mine: list[Row], method: str, split: str) -> str:
    """A method's accuracy on a split; "-" without a run."""
    return percent(accuracy(row, split) for row in mine if row["label"] == method)


def _floor(mine: list[Row], split: str) -> float | None:
    """The accuracy without learning, in percent; None if unknown."""
    evaluations = [each for row in mine for each in row["evaluations"]]
    floors = {each["split"]: each["floor_top1"] for each in evaluations}
    return None if floors.get(split) is None else 100 * floors[split]
