"""Tables of development splits, and what became of the normalizer: recipes, and suspects."""

import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from studies.quality.cell import BATCH, Cell
from studies.quality.compare import accuracy
from studies.quality.datasets import DATA_SETS, DataSet
from studies.quality.plan import MAIN, ORDER, SUSPECTED, part
from studies.quality.recipes import (
    BOUNDED,
    CHANGES,
    METHODS,
    NAMED,
    RECIPES,
    cell,
    lengthened,
)
from studies.quality.suspects import SUSPECTS
from studies.quality.variants import GROUP, GROUPED
from studies.shared.compare import Scores, difference, in_points
from studies.shared.tables import markdown, number, percent

Row = Mapping[str, Any]
SUSPECTS_TITLE = "Suspects: recipes with one change each, on the development splits, batch 64"
NEGATIVES_TITLE = (
    "Negatives of an anchor at the same steps, `rgcl_batch`, on the development splits"
)
RECIPES_TITLE = "The recipes on the development splits, batch 64"
CURVES_TITLE = "The main methods during the run, on the development splits, batch 64"
RECIPE_SECTIONS = ("untuned", "longer", *CHANGES)
"""Sections whose runs are the recipes, perhaps longer or changed."""
_STATE = ("temperature", "n_eff", "error")
_HEADER = (
    "data", "method", "seeds", "unseen style, vendor or face",
    "unseen concept, emoji or character", *_STATE, "loss",
)  # fmt: skip
_CURVES_HEADER = (
    "data", "method", "seeds", "after passes", "unseen style, vendor or face",
    "unseen concept, emoji or character",
)  # fmt: skip
_NEGATIVES_HEADER = (
    "data", "pairs in a step", "negatives", "seeds", "unseen style, vendor or face",
    "to the whole batch", "unseen concept, emoji or character", "to the whole batch", *_STATE[:2],
)  # fmt: skip
_SUSPECTS_HEADER = (
    "data", "method", "change", "seeds", "unseen style, vendor or face", "to the recipe",
    "unseen concept, emoji or character", "to the recipe", *_STATE,
)  # fmt: skip


def recipes_table(rows: Mapping[str, Row]) -> str:
    """The recipes at batch 64 that have run; empty if none has. See `suspects_table`.

    Args:
        rows: the development rows by cell.
    """
    body: list[Sequence[str]] = []
    for data, method, mine in _recipe_runs(METHODS, rows):
        scores = [
            percent(_scores(mine, split).values()) for split in data.split_names("development")
        ]
        state = (*_state(mine), number(map(_last_loss, mine)))
        title = _title(data, mine[0]["passes"]) + change_of(mine[0])
        body.append((title, f"`{method}`", _seeds(mine), *scores, *state))
    return markdown(_HEADER, body)


def curves_table(rows: Mapping[str, Row]) -> str:
    """The accuracy of the main methods at each evaluation of the run; empty if none has run.

    Args:
        rows: the development rows by cell.
    """
    body: list[Sequence[str]] = []
    for data, method, mine in _recipe_runs(MAIN, rows):
        curves = [curve(row) for row in mine if not row.get("failed")]
        if curves:
            columns = [
                ", ".join(
                    f"{100 * statistics.mean(each[passes][split] for each in curves):.1f}"
                    for passes in curves[0]
                )
                for split in data.split_names("development")
            ]
            passes = ", ".join(f"{each:g}" for each in curves[0])
            title = _title(data, mine[0]["passes"]) + change_of(mine[0])
            body.append((title, f"`{method}`", str(len(curves)), passes, *columns))
    return markdown(_CURVES_HEADER, body)


def _recipe_runs(
    methods: Sequence[str], rows: Mapping[str, Row]
) -> Iterator[tuple[DataSet, str, list[Row]]]:
    """The runs of each recipe at batch 64, by data set and length, where there are any."""
    for data, section in product(DATA_SETS.values(), RECIPE_SECTIONS):
        cells = [each for each in part(section, data.name, rows).cells if each.batch == BATCH]
        for method in methods:
            mine = _known([each for each in cells if each.label == method], rows)
            if mine:
                yield data, method, mine


def curve(row: Row) -> dict[float, dict[str, float]]:
    """Top-1 by passes and split."""
    found: dict[float, dict[str, float]] = {}
    for each in row["evaluations"]:
        found.setdefault(each["epoch"], {})[each["split"]] = each["acc1"]
    return found


def suspects_table(rows: Mapping[str, Row]) -> str:
    """Suspects that have run, below the recipes that they change; empty if none has.

    The differences are at common seeds. Temperature, n_eff and error are those at the end. The
    error is the MSE of the log-normalizers over all training pairs, over that of the batch's.

    Args:
        rows: the development rows by cell.
    """
    body: list[Sequence[str]] = []
    for data in DATA_SETS.values():
        lines = [line for line in ORDER if (line.section, line.data) == ("suspects", data.name)]
        for longer in sorted({line.longer for line in lines}):
            for method in SUSPECTED:
                mine = [line for line in lines if line.longer == longer and method in line.methods]
                seeds = sorted({seed for line in mine for seed in line.seeds})
                body += _of_method(data, longer, method, seeds, rows)
    return markdown(_SUSPECTS_HEADER, body)


def negatives_table(rows: Mapping[str, Row]) -> str:
    """Runs whose anchors have a group of the batch as negatives, below those with all of it.

    Args:
        rows: the development rows by cell.
    """
    body: list[Sequence[str]] = []
    for data in DATA_SETS.values():
        runs = [row for row in rows.values() if row["data_set"] == data.name and _group(row)]
        for passes, batch in sorted({(row["passes"], row["batch"]) for row in runs}):
            mine = [row for row in runs if (row["passes"], row["batch"]) == (passes, batch)]
            names = {_NOTE.sub("", row["cell"]) for row in mine}
            whole = [rows[name] for name in sorted(names & rows.keys())]
            groups: dict[tuple[int, bool], list[Row]] = {}
            for row in mine:
                own = row["method"].get("normalizers") != "batch"
                groups.setdefault((_group(row), own), []).append(row)
            kinds = [((batch, True), whole), *sorted(groups.items(), reverse=True)]
            for (size, own), found in kinds:
                negatives = str(size - 1) if own else f"{size - 1}, normalizers of {batch - 1}"
                columns = _compared(data, found, whole)
                title = _title(data, passes)
                state = _state(found)[:2]
                body.append((title, str(batch), negatives, _seeds(found), *columns, *state))
    return markdown(_NEGATIVES_HEADER, body)


_NOTE = re.compile("-groups[0-9]+(-whole)?")
"""What the names of runs in groups have, and those with the whole batch have not."""


def _group(row: Row) -> int:
    """Pairs in a group of the run of the recipe of `rgcl_batch` in groups; 0: another run."""
    method = row["method"]
    recipe = RECIPES["rgcl_batch"]
    if method["name"] != GROUPED or method["rho"] != recipe.value:
        return 0
    return int(method.get("group_size", GROUP))


def n_eff(row: Row) -> float | None:
    """The effective number of negatives among all training pairs, (n - 1) exp(-KL).

    KL is the mean divergence of the softmax over negatives from uniform. None if it was not
    measured.
    """
    divergence = row["errors"][-1].get("divergence") if row.get("errors") else None
    return None if divergence is None else (row["pairs"] - 1) * math.exp(-divergence)


def _of_method(
    data: DataSet, longer: int, method: str, seeds: Sequence[int], rows: Mapping[str, Row]
) -> Iterator[Sequence[str]]:
    """The lines of a method on a data set at one length: the recipe, then its suspects."""
    suspects = [
        (suspect.change, [suspect.cell(data.name, seed, longer) for seed in seeds])
        for suspect in SUSPECTS
        if suspect.method == method
    ]
    found = [(change, mine) for change, cells in suspects if (mine := _known(cells, rows))]
    if not found:
        return
    recipes = [cell(RECIPES[method], data.name, batch=BATCH, seed=seed) for seed in seeds]
    recipe = _known([lengthened(each, longer) for each in recipes], rows)
    for change, mine in [("none: the recipe", recipe), *found]:
        columns = _compared(data, mine, recipe)
        title = _title(data, longer * data.passes)
        yield (title, f"`{method}`", change, _seeds(mine), *columns, *_state(mine))


def _compared(data: DataSet, mine: Sequence[Row], base: Sequence[Row]) -> list[str]:
    """Top-1 on each split, and the difference to other runs; to themselves there is none."""
    columns: list[str] = []
    for split in data.split_names("development"):
        scores = _scores(mine, split)
        against = None if mine is base else difference(scores, _scores(base, split))
        columns += [percent(scores.values()), "-" if against is None else in_points(against)]
    return columns


def change_of(row: Row) -> str:
    """What a section of `CHANGES` changed in the run of a recipe, for titles; empty: nothing."""
    augmented = ", augmented" if is_augmented(row) else ""
    bounded = ", tau >= 0.03" if BOUNDED in row["note"] else ""
    named = ", bare names" if NAMED in row["note"].split("-") else ""
    return augmented + bounded + named


def is_augmented(row: Row) -> bool:
    """Whether the training images of a run were changed at random."""
    return "aug_cfg" in row["sections"].get("data", {})


def _title(data: DataSet, passes: int) -> str:
    """The data set, with the passes if they are not the usual ones."""
    return data.name if passes == data.passes else f"{data.name}, {passes} passes"


def _last_loss(row: Row) -> float | None:
    """The mean training loss over the last twentieth of a run's records; None if it failed."""
    if row.get("failed"):
        return None
    records = [each["loss"] for each in row["training"] if "loss" in each]
    return statistics.mean(records[-max(1, len(records) // 20) :]) if records else None


def _seeds(rows: Sequence[Row]) -> str:
    failed = sum(bool(row.get("failed")) for row in rows)
    return str(len(rows) - failed) + (f" ({failed} failed)" if failed else "")


def _state(rows: Sequence[Row]) -> tuple[str, str, str]:
    """Temperature, n_eff and error at the end of the runs that did not fail."""
    trained = [row for row in rows if not row.get("failed")]
    return (
        number((row["errors"][-1]["temperature"] for row in trained), "{:.4f}"),
        number((n_eff(row) for row in trained), "{:.0f}"),
        number((_error(row) for row in trained), "{:.3f}"),
    )


def _known(cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[Row]:
    return [rows[each.name] for each in cells if each.name in rows]


def _scores(rows: Sequence[Row], split: str) -> Scores:
    return {row["seed"]: accuracy(row, split) for row in rows if not row.get("failed")}


def _error(row: Row) -> float | None:
    end = row["errors"][-1]
    return end["mse"] / end["minibatch_mse"] if "mse" in end else None
