"""Compares methods on three data sets: development splits during the runs, test splits at the end.

    python -m studies.quality.run plan --out study
    python -m studies.quality.run run --out study --emoji EMOJI --icons ICONS --glyphs GLYPHS
    python -m studies.quality.run final --out study --emoji EMOJI --section untuned --data-set emoji

`run` trains the open cells of the plan (`plan.py`) on the data that are given, each in a process
with one thread. It can be killed at any time; the same command goes on, also within a run. A
finished run adds a line to `study/development.jsonl` and leaves its weights in `study/weights`.
`final` reads the test splits, once a part of the plan is complete, and writes `study/test.jsonl`.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from neuclip.errors import UserError
from studies.quality.cell import Cell
from studies.quality.datasets import DATA_SETS, DataFolder
from studies.quality.plan import ORDER, SECTIONS, Line, cells_of, plan
from studies.quality.rows import DEVELOPMENT, present_code, results_file, weights_of
from studies.shared.cell_process import run_cell
from studies.shared.results_file import ResultsFile
from studies.shared.runner import Runner, Study, add_runner_flags, add_same_code, exit_code

HERE = Path(__file__).parent
MODULE = "studies.quality.run"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train the open cells")
    add_data_flags(run)
    add_runner_flags(run)
    run.add_argument("--section", choices=SECTIONS, help="only cells of this section")
    listing = commands.add_parser("plan", help="list the plan, with done and open cells")
    listing.add_argument("--out", type=Path, help="folder of the results; none: all cells are open")
    final = commands.add_parser("final", help="evaluate a part of the plan on its test splits")
    add_data_flags(final)
    final.add_argument("--out", type=Path, required=True, help="folder of the results")
    final.add_argument("--section", choices=SECTIONS, required=True)
    final.add_argument("--data-set", choices=DATA_SETS, required=True)
    final.add_argument("--lines", type=int, help="only the first lines of the plan; none: all")
    add_same_code(final)
    report = commands.add_parser("report", help="print or write the tables, draw the figures")
    report.add_argument(
        "--results", type=Path, default=HERE / "results", help="folder of the rows; none: committed"
    )
    report.add_argument("--document", type=Path, help="write the tables between its markers")
    report.add_argument(
        "--summaries", type=Path, nargs="+", default=[], metavar="PAGE",
        help="write the table of the main methods between the markers of these pages",
    )  # fmt: skip
    report.add_argument("--figures", type=Path, help="folder for the figures")
    concepts = commands.add_parser(
        "concepts", help="how much of the softmax falls on pairs of the anchor's own concept"
    )
    add_data_flags(concepts)
    concepts.add_argument("--out", type=Path, required=True, help="folder of the results")
    concepts.add_argument("--match", nargs="+", metavar="GLOB", help="only cells with such a name")
    add_same_code(concepts)
    drift = commands.add_parser("drift", help="how far embeddings move within some steps")
    add_data_flags(drift)
    drift.add_argument("--out", type=Path, required=True, help="folder of the results")
    drift.add_argument("--match", nargs="+", metavar="GLOB", required=True, help="these cells")
    drift.add_argument("--passes", type=int, default=2, help="passes until then (default: 2)")
    add_same_code(drift)
    cell = commands.add_parser("cell", help="train one cell (used by `run`)")
    cell.add_argument("spec", type=Path)
    return parser.parse_args(words)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per data set."""
    for name, data in DATA_SETS.items():
        text = f"folder of the {name}, of `{data.build}`"
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=text)


def opened(args: argparse.Namespace) -> dict[str, DataFolder]:
    """The data sets that are given, checked.

    Raises:
        UserError: none is given, or a folder is not that data set.
    """
    given = {name: getattr(args, name) for name in DATA_SETS}
    found = {name: DataFolder.open(DATA_SETS[name], path) for name, path in given.items() if path}
    if not found:
        flags = ", ".join(f"--{name} DIR" for name in DATA_SETS)
        raise UserError(f"no data: give at least one of {flags}")
    return found


def runner(args: argparse.Namespace) -> Runner:
    """The runner of the study, over the cells on the data that are given."""
    folders, code = opened(args), present_code()
    lines = [line for line in ORDER if args.section in (None, line.section)]

    def cells(rows: Mapping[str, Any]) -> list[Cell]:
        return [cell for cell in plan(rows, lines) if cell.data_set in folders]

    def facts(cell: Cell) -> dict[str, Any]:
        folder = folders[cell.data_set]
        return {
            "code": code,
            "data": folder.digest,
            "pairs": folder.pairs,
            "train": str(folder.path / "train"),
            "splits": [str(path) for path in folder.splits("development")],
            "weights": str(weights_of(args.out.resolve(), cell)),
        }

    results = results_file(args.out / DEVELOPMENT, code, folders, args.same_code)
    return Runner(Study(MODULE, cells, facts), results, args)


def measure(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Trains and measures a cell, if the code is still that of the runner.

    Raises:
        UserError: the code has changed since the runner started.
    """
    code = present_code()
    if code != told["code"]:
        raise UserError(
            f"the code has changed since this command started, from {told['code']} to {code}: "
            "run from a copy of the repository that nobody edits (git worktree add), or start "
            f"again, with --same-code {told['code']} if both compute the same numbers"
        )
    from studies.quality.measure import train_cell

    return {"data": told["data"], **train_cell(told, folder)}


def evaluate(args: argparse.Namespace) -> None:
    """The command `final`."""
    from studies.quality.final import final

    final(args, opened(args))


def show_concepts(args: argparse.Namespace) -> None:
    """The command `concepts`."""
    from studies.quality.concepts import concepts

    concepts(args, opened(args))


def show_drift(args: argparse.Namespace) -> None:
    """The command `drift`."""
    from studies.quality.drift import drift

    drift(args, opened(args))


def show_report(args: argparse.Namespace) -> None:
    """The command `report`."""
    from studies.quality.report import report

    report(args)


def show_plan(args: argparse.Namespace) -> None:
    """Prints the lines of the order with their cells."""
    rows = development(args.out).read() if args.out else {}
    seen: set[str] = set()
    for number, line in enumerate(ORDER, start=1):
        cells = {cell.name: cell for cell in cells_of(line, rows)}
        print(f"{number}. {title(line)}")
        for name in [name for name in cells if name not in seen]:
            print(f"    {state(rows.get(name))} {name}")
        seen.update(cells)


def title(line: Line) -> str:
    """A line of the order in words."""
    seeds = ", ".join(map(str, line.seeds))
    count = len(line.methods)
    methods = f"{count} methods" if count > 1 else line.methods[0]
    rate = "" if line.rate == 1 else f", {line.rate:g} of the rate"
    longer = "" if line.longer == 1 else f", {line.longer} times the passes"
    labels = "".join(f", {label}" for label in line.labels)
    changes = f"{rate}{longer}{labels}"
    return f"{line.section}, {line.data}, batch {line.batch}{changes}, {methods}, seeds {seeds}"


def state(row: Mapping[str, Any] | None) -> str:
    """Whether a cell is open, done or failed, in a column."""
    return "open  " if row is None else "failed" if row.get("failed") else "done  "


def development(out: Path) -> ResultsFile:
    """The development rows in a folder, of any code."""
    return results_file(out / DEVELOPMENT)


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    commands = {
        "run": lambda: runner(args).run(),
        "cell": partial(run_cell, getattr(args, "spec", None), measure),
        "plan": partial(show_plan, args),
        "final": partial(evaluate, args),
        "concepts": partial(show_concepts, args),
        "drift": partial(show_drift, args),
        "report": partial(show_report, args),
    }
    return exit_code(commands[args.command], stoppable=args.command == "run")


if __name__ == "__main__":
    sys.exit(main())
