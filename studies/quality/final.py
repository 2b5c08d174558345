"""The final command: evaluates the kept weights of a part of the plan on its test splits.

Nothing else reads the test splits. It refuses while a development row of the part is missing, so
that no test result can decide what is trained or chosen.
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from neuclip.errors import UserError
from studies.quality.cell import Cell
from studies.quality.datasets import DATA_SETS, DataFolder
from studies.quality.measure import evaluate_weights, weights_digest
from studies.quality.plan import CHOOSING_ONLY, ORDER, part
from studies.quality.rows import DEVELOPMENT, TEST, present_code, results_file, weights_of
from studies.shared.cell_process import facts
from studies.shared.folder_lock import lock
from studies.shared.runner import say


@dataclass(frozen=True)
class FinalPart:
    """A part of the plan that is evaluated on the test splits.

    Attributes:
        section: name of the section.
        folder: the data.
        out: folder of the results.
        lines: how many lines of the order count.
    """

    section: str
    folder: DataFolder
    out: Path
    lines: int

    @property
    def title(self) -> str:
        """The part in words."""
        return f"section {self.section} on {self.folder.data.name}"

    def evaluated(self, rows: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """The cells to evaluate.

        Args:
            rows: the development rows by cell.

        Raises:
            UserError: the plan has no such part, its development rows are incomplete, or the
                section is for choosing.
        """
        if self.section in CHOOSING_ONLY:
            raise UserError(
                f"section {self.section} is for choosing, which its development rows are enough "
                "for (the command `report`): the test splits are for what is chosen, as a recipe "
                "or a grid of another section"
            )
        data = self.folder.data.name
        found = part(self.section, data, rows, ORDER[: self.lines])
        if not found.cells:
            known = sorted({line.data for line in ORDER if line.section == self.section})
            raise UserError(
                f"the first {self.lines} lines of the plan have no {self.title}: choose more "
                f"--lines, or another part (section {self.section} has {', '.join(known)})"
            )
        missing = [each.name for each in found.cells if each.name not in rows]
        if missing or not found.decided:
            raise UserError(
                f"{self.title}: {len(missing)} of {len(found.cells)} development rows are missing "
                f"in {self.out / DEVELOPMENT} (the first: {missing[0]}), so its test splits stay "
                f"unread: train them with `run --section {self.section} --{data} DIR`, or evaluate "
                "the first lines of the plan only, with --lines"
            )
        return found.evaluated


def final(args: argparse.Namespace, folders: Mapping[str, DataFolder]) -> None:
    """Evaluates a part on its test splits and appends test rows; rows that exist stay.

    Args:
        args: of the command.
        folders: the data given, by data set.

    Raises:
        UserError: development rows are missing, or rows or weights do not belong together.
    """
    torch.set_num_threads(1)  # as in training
    if args.data_set not in folders:
        build = DATA_SETS[args.data_set].build
        raise UserError(f"--data-set {args.data_set} needs --{args.data_set} DIR, of `{build}`")
    code, folder = present_code(), folders[args.data_set]
    lines = len(ORDER) if args.lines is None else args.lines
    which = FinalPart(args.section, folder, args.out, lines)
    rows = results_file(args.out / DEVELOPMENT, code, folders, args.same_code).read()
    tested = results_file(args.out / TEST, code, folders, args.same_code)
    cells = which.evaluated(rows)
    with lock(args.out / "weights"):
        done = tested.read()
        check_weights(args.out, cells, rows, done)
        for cell in (cell for cell in cells if cell.name not in done):
            row = {**asdict(cell), "cell": cell.name, "data": folder.digest, **facts()}
            tested.append({**row, **metrics_on_test(args.out, cell, rows[cell.name], folder)})
            say(f"evaluated {cell.name}")
    say(f"{which.title}: {len(cells)} runs are evaluated in {args.out / TEST}")


def metrics_on_test(
    out: Path, cell: Cell, row: Mapping[str, Any], folder: DataFolder
) -> dict[str, object]:
    """The part of a test row that is measured; a run that failed has no accuracy."""
    if row.get("failed"):
        return {"failed": row["failed"]}
    found = evaluate_weights(cell, weights_of(out, cell), folder.splits("test"))
    for each in found:
        each["floor_top1"] = folder.floor(each["split"])
    return {"weights": row["weights"], "evaluations": found}


def check_weights(
    out: Path,
    cells: list[Cell],
    rows: Mapping[str, Mapping[str, Any]],
    done: Mapping[str, Mapping[str, Any]],
) -> None:
    """Checks that the weights on disk, and those of test rows, are those of the development rows.

    Raises:
        UserError: names all that are not.
    """
    problems = list(_problems(out, cells, rows, done))
    if problems:
        shown = "\n".join(problems[:10])
        raise UserError(
            f"{len(problems)} of {len(cells)} runs have other weights than their development "
            f"rows:\n{shown}\nput the weights back; or take the rows of these cells out of "
            f"{DEVELOPMENT} and {TEST} and train them again"
        )


def _problems(
    out: Path,
    cells: list[Cell],
    rows: Mapping[str, Mapping[str, Any]],
    done: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    for cell in cells:
        expected, path = rows[cell.name].get("weights"), weights_of(out, cell)
        if rows[cell.name].get("failed"):
            continue
        if cell.name in done:
            if done[cell.name].get("weights") != expected:
                yield f"{cell.name}: its test row is of other weights"
        elif not path.is_file():
            yield f"{cell.name}: {path} is missing"
        elif weights_digest(path) != expected:
            yield f"{cell.name}: {path} holds others"
