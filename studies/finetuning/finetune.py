"""Fine-tunes a small model from icons on emoji, cell by cell of the plan.

    neuclip data icons packages --out icons                  # see docs/data.md
    neuclip data emoji packages --out emoji
    python -m studies.finetuning.finetune start --icons icons --out study
    python -m studies.finetuning.finetune run --icons icons --emoji emoji --out study
    python -m studies.finetuning.finetune blend --icons icons --emoji emoji --out study
    python -m studies.finetuning.finetune report

`start` trains both kinds of starting weights. `run` can be killed at any time and goes on where it
stopped; `--parallel 2` with `OMP_NUM_THREADS=1` trains two cells at a time. Each finished run adds
a line to `study/finetuning.jsonl`: accuracies on the development splits, on the icons, and on the
test splits, which the report shows in tables of their own. `blend` mixes finished models with the
starting weights, and adds a line per mix to `study/blends.jsonl`. The files of both, in `results/`,
are what `report` reads.
"""

import argparse
import csv
import fnmatch
import json
import random
import re
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from neuclip.model.base_weights import hash_weights
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained
from studies.finetuning.cells import EPOCHS, Cell, is_blended, plan

HERE = Path(__file__).parent
RESULTS = HERE / "results"
RUNS, BLENDS = "finetuning.jsonl", "blends.jsonl"
ALPHAS = "0,0.25,0.5,0.75,1"
SPLITS = ("unseen_vendor", "unseen_emoji")
KNOWN = "unseen_style_development"
"""The split of the icons that shows what a run forgets."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="train the starting weights on icons")
    run = commands.add_parser("run", help="train the open cells")
    blends = commands.add_parser("blend", help="mix finished cells with the starting weights")
    for command in (start, run, blends):
        command.add_argument("--icons", type=Path, required=True, help="of `neuclip data icons`")
        command.add_argument("--out", type=Path, required=True, help="folder for runs and results")
    run.add_argument("--limit", type=int, help="stop after this number of runs")
    run.add_argument("--parallel", type=int, default=1, help="runs at a time (default: 1)")
    for command in (run, blends):
        command.add_argument("--emoji", type=Path, required=True, help="of `neuclip data emoji`")
        command.add_argument(
            "--match", nargs="+", default=["*"], metavar="GLOB", help="only these cells"
        )
    report = commands.add_parser("report", help="print the tables")
    report.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.command == "start":
        start(args)
    elif args.command == "run":
        run(args)
    elif args.command == "blend":
        blend(args)
    else:
        from studies.finetuning.tables import blend_table, tables

        print(tables(read_rows(args.results / RUNS)))
        print(blend_table(read_lines(args.results / BLENDS)))


def read_lines(path: Path) -> list[dict]:
    """The rows of a file of results."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of a file of results, by the name of their cell."""
    return {row["cell"]: row for row in read_lines(path)}


def neuclip(*words: object, log: Path) -> None:
    """Runs a command of the program; its output goes to a file.

    Raises:
        SystemExit: it failed; the message names the log.
    """
    command = [sys.executable, "-m", "neuclip", *map(str, words)]
    with log.open("ab") as file:
        done = subprocess.run(command, stdout=file, stderr=file, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: see {log}")


def start(args: argparse.Namespace) -> None:
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


def matching(globs: Sequence[str]) -> list[Cell]:
    """The cells of the plan that one of the patterns names."""
    return [cell for cell in plan() if any(fnmatch.fnmatchcase(cell.name, glob) for glob in globs)]


def start_digest(run: Path) -> str:
    """The SHA-256 of the starting weights of a run."""
    return hash_weights(load_pretrained(CheckpointChoice(run), "cpu").checkpoint.weights)


def run(args: argparse.Namespace) -> None:
    (args.out / "cells").mkdir(exist_ok=True)
    done = read_rows(args.out / RUNS)
    cells = [cell for cell in matching(args.match) if cell.name not in done][: args.limit]
    with ThreadPoolExecutor(args.parallel) as pool:
        for row in as_each_ends(pool, args, cells):
            with (args.out / RUNS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{time.strftime('%H:%M:%S')} {row['cell']}: {row['development']}", flush=True)


def as_each_ends(
    pool: ThreadPoolExecutor, args: argparse.Namespace, cells: Sequence[Cell]
) -> Iterator[dict]:
    """The rows of the cells as their runs end; a failed run lets none begin after it."""
    starts = {name: start_digest(args.out / name) for name in {cell.weights for cell in cells}}
    runs = []
    for cell in cells:
        table = write_pairs(args.emoji, args.out / "pairs", cell)
        runs.append(pool.submit(run_cell, args, cell, table, starts[cell.weights]))
    try:
        for ended in as_completed(runs):
            yield ended.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_cell(args: argparse.Namespace, cell: Cell, table: Path, start: str) -> dict:
    """Trains and evaluates one cell.

    Args:
        args: of the command.
        cell: the run.
        table: csv of its pairs.
        start: digest of the starting weights.
    """
    log = args.out / "cells" / f"{cell.name}.log"
    splits = [
        args.emoji / f"{split}_{part}" for part in ("development", "test") for split in SPLITS
    ]
    splits.append(args.icons / KNOWN)
    epochs = EPOCHS[cell.pairs]
    steps = cell.pairs // cell.batch * epochs
    before = time.perf_counter()
    neuclip(
        *("train", "--train-data", table, "--model", "icon-small", "--precision", "fp32"),
        *("--pretrained", args.out / cell.weights, "--method", cell.method, "--seed", cell.seed),
        *("--epochs", epochs, "--batch-size", cell.batch, "--lr", cell.lr, "--wd", 0.1),
        *("--warmup", max(1, steps // 20), "--workers", 0, "--logs", args.out / "cells"),
        *("--name", cell.name, "--resume", "auto", "--save-frequency", 0),
        *("--val-data", "::".join(map(str, splits))),
        *("--val-frequency", epochs, "--warm-start-steps", cell.warm),
        *(("--rho", cell.rho) if cell.rho else ()),
        *(("--false-negatives", "mask") if cell.mask else ()),
        *(("--no-duplicates",) if cell.apart else ()),
        *cell.more.split(),
        log=log,
    )
    folder = args.out / "cells" / cell.name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    found = accuracies(records)
    temperatures = [row["temperature"] for row in records if "temperature" in row]
    return {
        "cell": cell.name,
        **asdict(cell),
        "start": start,
        "development": {split: found[f"{split}_development"] for split in SPLITS},
        "test": {split: found[f"{split}_test"] for split in SPLITS},
        "known": {KNOWN: found[KNOWN]},
        "temperature": temperatures[-1],
        "seconds": round(time.perf_counter() - before, 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def blend(args: argparse.Namespace) -> None:
    """Evaluates mixes of the starting weights and the tuned ones: development splits, then test."""
    results = args.out / BLENDS
    done = {row["cell"] for row in read_lines(results)}
    for cell in matching(args.match):
        if not is_blended(cell) or cell.name in done:
            continue
        if cell.name not in read_rows(args.out / RUNS):
            continue
        rows = [
            {"cell": cell.name, **asdict(cell), "part": part, **mix}
            for part in ("development", "test")
            for mix in blend_cell(args, cell, part)
        ]
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def blend_cell(args: argparse.Namespace, cell: Cell, part: str) -> list[dict[str, float]]:
    """The mixes of one cell: share of the tuned weights, mean top-1 on the emoji, and on icons."""
    log = args.out / "cells" / f"{cell.name}.blend_{part}.log"
    log.unlink(missing_ok=True)
    neuclip(
        *("blend", args.out / cell.weights, args.out / "cells" / cell.name, "--alphas", ALPHAS),
        *("--val-data", "::".join(str(args.emoji / f"{split}_{part}") for split in SPLITS)),
        *("--canary", args.icons / KNOWN, "--workers", 0),
        *("--figure", args.out / "cells" / f"{cell.name}.png"),
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


def accuracies(records: list[dict]) -> dict[str, float]:
    """Top-1 accuracy of the last evaluation, by split."""
    evaluated = [row for row in records if row["kind"] == "eval"]
    return {row["split"]: row["metrics"]["acc1"] for row in evaluated}


def write_pairs(emoji: Path, folder: Path, cell: Cell) -> Path:
    """A csv of whole concepts, a part of whose captions is the bare name."""
    table = folder / f"n{cell.pairs}_d{cell.duplicates}_seed{cell.seed}.csv"
    if table.exists():
        return table
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    by_concept: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for shard in sorted((emoji / "train").glob("*.tar")):
        unpack(shard, images, by_concept)
    chance = random.Random(f"{cell.seed} {cell.pairs}")
    concepts = sorted(by_concept)
    chance.shuffle(concepts)
    rows = [(image, name, own) for name in concepts for image, own in by_concept[name]]
    rows = rows[: cell.pairs]
    chance.shuffle(rows)
    shared = len(rows) * cell.duplicates // 100
    partial = table.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for number, (image, name, own) in enumerate(rows):
            writer.writerow([image.resolve(), name if number < shared else own])
    partial.rename(table)
    return table


def unpack(shard: Path, images: Path, by_concept: dict[str, list[tuple[Path, str]]]) -> None:
    """Unpacks a shard; adds each image with a caption that no other image has."""
    with tarfile.open(shard) as tar:
        for member in tar:
            path = images / member.name
            if path.suffix == ".png" and not path.exists():
                path.write_bytes(tar.extractfile(member).read())
            if path.suffix == ".json":
                record = json.loads(tar.extractfile(member).read())
                own = f"{record['concept']}, {record['style']} emoji by {record['set']}"
                by_concept[record["concept"]].append((path.with_suffix(".png"), own))


if __name__ == "__main__":
    main()
