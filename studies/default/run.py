"""Compares every method on the first version of the glyphs at equal samples seen.

    python -m studies.default.run plan                      # done and open cells of the study
    python -m studies.default.run report                    # its tables
    python -m studies.default.run run --data demo-data --out study --parallel 2
    python -m studies.default.run plan --results study/results.jsonl

The runs are cells of a plan (`plan.py`). `neuclip` trains each one in a separate process with one
thread. The command can be killed at any time; the same command resumes it, also within a run.
`study/results.jsonl` gets one line per finished run; lines of another format, other code or other
data are refused. To continue the study itself, copy `results/full.jsonl` there. The whole plan
takes days of one core; every prefix of it is useful.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.default.data import data_digest
from studies.default.plan import Cell, plan
from studies.default.rows import results_file
from studies.shared.cell_process import Stopwatch, records, run_cell, train_run
from studies.shared.runner import Runner, Study, add_runner_flags, exit_code

HERE = Path(__file__).parent
MODULE = "studies.default.run"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train the open cells")
    run.add_argument("--data", type=Path, required=True, help="the glyphs in their first version")
    add_runner_flags(run)
    listing = commands.add_parser("plan", help="list done and open cells")
    report = commands.add_parser("report", help="print or write tables, draw figures")
    for command in (listing, report):
        command.add_argument("--results", type=Path, default=HERE / "results" / "full.jsonl")
    report.add_argument("--document", type=Path, help="write the tables between its markers")
    report.add_argument("--figures", type=Path, help="folder for the figures")
    report.add_argument("--page", type=Path, help="write the summary between its markers")
    cell = commands.add_parser("cell", help="train one cell (used by `run`)")
    cell.add_argument("spec", type=Path)
    return parser.parse_args()


def runner(args: argparse.Namespace) -> Runner:
    """The runner of the study."""
    data, digest = args.data.resolve(), data_digest(args.data)
    facts = {"data": str(data), "digest": digest}
    results = results_file(args.out / "results.jsonl", digest, args.same_code)
    return Runner(Study(MODULE, plan, lambda _: facts), results, args)


def measure(described: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """Trains and measures a cell; a run whose loss becomes non-finite counts as failed."""
    from studies.default import ideas  # noqa: F401  registers the variants of the pool
    from studies.shared.error import training_error

    cell = Cell(**described["cell"])
    run = folder / "logs" / cell.name
    with Stopwatch(folder / "times.json") as watch:
        failed = train_run(cell.config(Path(described["data"]), folder / "logs"), run)
        found: dict[str, object] = {"data": described["digest"], **records(run)}
        if failed:
            found["failed"] = failed
        else:
            epochs = range(cell.evaluated_every, cell.epochs + 1, cell.evaluated_every)
            found["errors"] = [training_error(run, e) for e in epochs] if cell.measures else []
    return {**found, **watch.rounded}


def show_plan(args: argparse.Namespace) -> None:
    rows = results_file(args.results, any_code=True).read()
    for cell in plan(rows):
        state = "failed" if rows.get(cell.name, {}).get("failed") else "done"
        print(f"{state if cell.name in rows else 'open':6} {cell.name}")


def main() -> int:
    args = arguments()
    commands = {
        "run": lambda: runner(args).run(),
        "cell": lambda: run_cell(args.spec, measure),
        "plan": lambda: show_plan(args),
        "report": lambda: show_report(args),
    }
    return exit_code(commands[args.command], stoppable=args.command == "run")


def show_report(args: argparse.Namespace) -> None:
    """Prints or writes the tables, and draws the figures."""
    from studies.default.report import write_report

    rows = results_file(args.results, any_code=True).read()
    write_report(rows, args.document, args.figures, args.page)


if __name__ == "__main__":
    sys.exit(main())
