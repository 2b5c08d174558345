"""Fine-tunes a small model from icons on emoji, cell by cell of the plan.

    neuclip data icons packages --out icons                  # see docs/data.md
    neuclip data emoji packages --out emoji
    python -m studies.finetuning.finetune start --icons icons --out study
    python -m studies.finetuning.finetune run --icons icons --emoji emoji --out study --parallel 2
    python -m studies.finetuning.finetune blend --icons icons --emoji emoji --out study
    python -m studies.finetuning.finetune report

`start` trains both kinds of starting weights. `run` trains the open cells, each in a process with
one thread; it can be killed at any time, and the same command goes on. Each finished run adds a
line to `study/finetuning.jsonl`: accuracies on the development splits, on the icons, and on the
test splits, which the report shows in tables of their own. `blend` mixes finished models with the
starting weights, and adds a line per mix to `study/blends.jsonl`. The files of both, in `results/`,
are what `report` reads.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from neuclip.errors import UserError
from studies.finetuning.cells import Cell, is_blended, plan
from studies.finetuning.pairs import write_pairs
from studies.finetuning.splits import KNOWN, emoji_splits
from studies.shared.cell_process import run_cell
from studies.shared.code_digest import MODELS, TRAINING, code_digest
from studies.shared.results_file import ResultsFile
from studies.shared.runner import Runner, Study, add_runner_flags, exit_code, matches

HERE = Path(__file__).parent
MODULE = "studies.finetuning.finetune"
RESULTS = HERE / "results"
RUNS, BLENDS = "finetuning.jsonl", "blends.jsonl"
FORMAT = 2
ADVICE = {None: "it is of the study before 2026-12, which kept no digest; choose another --out"}
ENTRIES = (*TRAINING, "studies.finetuning.measure", "studies.finetuning.pairs")
ALPHAS = "0,0.25,0.5,0.75,1"


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="train the starting weights on icons")
    run = commands.add_parser("run", help="train the open cells")
    blends = commands.add_parser("blend", help="mix finished cells with the starting weights")
    for command in (start, run, blends):
        command.add_argument("--icons", type=Path, required=True, help="of `neuclip data icons`")
    for command in (run, blends):
        command.add_argument("--emoji", type=Path, required=True, help="of `neuclip data emoji`")
    add_runner_flags(run)
    for command in (start, blends):
        command.add_argument("--out", type=Path, required=True, help="folder of the study")
    blends.add_argument("--match", nargs="+", metavar="GLOB", help="only cells with such a name")
    report = commands.add_parser("report", help="print the tables")
    report.add_argument("--results", type=Path, default=RESULTS)
    cell = commands.add_parser("cell", help="train one cell (used by `run`)")
    cell.add_argument("spec", type=Path)
    return parser.parse_args(words)


def read_lines(path: Path) -> list[dict]:
    """The rows of a file of results, of any format."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of a file of results, by the name of their cell."""
    return {row["cell"]: row for row in read_lines(path)}


def neuclip(*words: object, log: Path) -> None:
    """Runs a command of the program; its output goes to a file.

    Raises:
        UserError: it failed; the message names the log.
    """
    command = [sys.executable, "-m", "neuclip", *map(str, words)]
    with log.open("ab") as file:
        done = subprocess.run(command, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with {done.returncode}: see {log}")


def start(args: argparse.Namespace) -> None:
    """The command `start`: trains both kinds of starting weights."""
    args.out.mkdir(parents=True, exist_ok=True)
    more = ("--temperature", 0.01, "--pretrained", args.out / "start")
    recipes = {
        "start": ("--epochs", 2, "--lr", "1e-3"),
        "sharp": ("--epochs", 1, "--lr", "3e-4", *more),
    }
    for name, recipe in recipes.items():
        neuclip(
            *("train", "--train-data", args.icons / "train", "--model", "icon-small"),
            *("--method", "openclip", "--batch-size", 128, "--warmup", 200, "--workers", 1),
            *("--precision", "fp32", "--logs", args.out, "--name", name, *recipe),
            *("--resume", "auto", "--save-every-steps", 100),
            *("--val-data", args.icons / KNOWN, "--val-frequency", 1),
            log=args.out / f"{name}.log",
        )


def runner(args: argparse.Namespace) -> Runner:
    """The runner of the study."""
    out = args.out.resolve()
    digest = functools.cache(start_digest)

    def facts(cell: Cell) -> dict[str, Any]:
        return {
            "pairs": str(write_pairs(args.emoji, out / "pairs", cell)),
            "emoji": str(args.emoji.resolve()),
            "icons": str(args.icons.resolve()),
            "weights": str(out / cell.weights),
            "start": digest(out / cell.weights),
            "runs": str(out / "runs"),
        }

    code = code_digest(ENTRIES, MODELS)
    results = ResultsFile(out / RUNS, (FORMAT, ADVICE), code, same_code=args.same_code)
    return Runner(Study(MODULE, lambda rows: list(plan()), facts), results, args)


def start_digest(run: Path) -> str:
    """The SHA-256 of the starting weights of a run."""
    from neuclip.model.base_weights import hash_weights
    from neuclip.model.checkpoint_choice import CheckpointChoice
    from neuclip.model.load import load_pretrained

    return hash_weights(load_pretrained(CheckpointChoice(run), "cpu").checkpoint.weights)


def measure(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fine-tunes and evaluates a cell, in its own process."""
    from studies.finetuning.measure import tune_cell

    return tune_cell(told, folder)


def blend(args: argparse.Namespace) -> None:
    """The command `blend`: mixes of the starting weights and the tuned ones, on both parts."""
    results = args.out / BLENDS
    mixed = {row["cell"] for row in read_lines(results)}
    tuned = read_rows(args.out / RUNS)
    for cell in plan():
        ready = is_blended(cell) and cell.name in tuned.keys() - mixed
        if ready and matches(cell.name, args.match):
            rows = [
                {"cell": cell.name, **asdict(cell), "part": part, **mix}
                for part in ("development", "test")
                for mix in blend_cell(args, cell, part)
            ]
            with results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def blend_cell(args: argparse.Namespace, cell: Cell, part: str) -> list[dict[str, float]]:
    """The mixes of one cell: share of the tuned weights, mean top-1 on the emoji, and on icons."""
    run = args.out / "runs" / cell.name
    log = run.parent / f"{cell.name}.blend_{part}.log"
    log.unlink(missing_ok=True)
    neuclip(
        *("blend", args.out / cell.weights, run, "--alphas", ALPHAS),
        *("--val-data", "::".join(map(str, emoji_splits(args.emoji, part)))),
        *("--canary", args.icons / KNOWN, "--workers", 0, "--figure", f"{run}.png"),
        log=log,
    )
    return mixes(log.read_text("utf-8"))


def mixes(printed: str) -> list[dict[str, float]]:
    """The table that `neuclip blend` prints, as fractions."""
    row = r"^ *([0-9.]+) +([0-9.]+) ?% +[-+0-9.]+ +([0-9.]+) ?% "
    rows = re.findall(row, printed, re.MULTILINE)
    return [
        {"alpha": float(alpha), "emoji": float(own) / 100, "icons": float(known) / 100}
        for alpha, own, known in rows
    ]


def report(args: argparse.Namespace) -> None:
    """The command `report`: prints the tables."""
    from studies.finetuning.tables import blend_table, tables

    print(tables(read_rows(args.results / RUNS)))
    print(blend_table(read_lines(args.results / BLENDS)))


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    commands = {
        "start": partial(start, args),
        "run": lambda: runner(args).run(),
        "cell": partial(run_cell, getattr(args, "spec", None), measure),
        "blend": partial(blend, args),
        "report": partial(report, args),
    }
    return exit_code(commands[args.command], stoppable=args.command == "run")


if __name__ == "__main__":
    sys.exit(main())
