"""What is measured of a cell: its run, with accuracies on all splits.

Everything here, and all that it imports, is in the digest of the code.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from neuclip.cli.train import parse_train
from neuclip.errors import UserError
from neuclip.run_folder import read_records
from studies.finetuning.cells import EPOCHS, Cell
from studies.finetuning.splits import KNOWN, SPLITS, emoji_splits
from studies.shared.cell_process import Stopwatch, train_run


def tune_cell(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Fine-tunes and evaluates a cell.

    Args:
        told: what the runner wrote: the cell, its pairs, the data and the starting weights.
        folder: of the cell.

    Returns:
        The measured part of its row.

    Raises:
        SystemExit: a signal stopped the run; a checkpoint is written.
        UserError: the run could not start, or its loss became non-finite.
    """
    cell = Cell(**told["cell"])
    run = Path(told["runs"]) / cell.name
    with Stopwatch(folder / "seconds.json") as watch:
        failed = train_run(parse_train(train_flags(cell, told)).config, run)
    if failed is not None:
        raise UserError(failed)
    records = read_records(run / "metrics.jsonl")
    found = accuracies(records)
    temperatures = [row["temperature"] for row in records if "temperature" in row]
    return {
        "start": told["start"],
        "development": {split: found[f"{split}_development"] for split in SPLITS},
        "test": {split: found[f"{split}_test"] for split in SPLITS},
        "known": {KNOWN: found[KNOWN]},
        "temperature": temperatures[-1],
        **watch.rounded,
    }


def train_flags(cell: Cell, told: Mapping[str, Any]) -> list[str]:
    """The flags of `neuclip train` for a cell.

    Args:
        cell: the run.
        told: its pairs, starting weights and data, and the folder of the runs.
    """
    emoji, icons = Path(told["emoji"]), Path(told["icons"])
    splits = [split for part in ("development", "test") for split in emoji_splits(emoji, part)]
    splits.append(icons / KNOWN)
    epochs = EPOCHS[cell.pairs]
    steps = cell.pairs // cell.batch * epochs
    words = (
        *("--train-data", told["pairs"], "--model", "icon-small", "--precision", "fp32"),
        *("--pretrained", told["weights"], "--method", cell.method, "--seed", cell.seed),
        *("--epochs", epochs, "--batch-size", cell.batch, "--lr", cell.lr, "--wd", 0.1),
        *("--warmup", max(1, steps // 20), "--workers", 0, "--logs", told["runs"]),
        *("--name", cell.name, "--resume", "auto", "--save-frequency", 0),
        *("--val-data", "::".join(map(str, splits))),
        *("--val-frequency", epochs, "--warm-start-steps", cell.warm),
        *(("--rho", cell.rho) if cell.rho else ()),
        *(("--false-negatives", "mask") if cell.mask else ()),
        *(("--no-duplicates",) if cell.apart else ()),
        *cell.more.split(),
    )
    return [str(word) for word in words]


def accuracies(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Top-1 accuracy of the last evaluation, by split."""
    evaluated = [row for row in records if row["kind"] == "eval"]
    return {row["split"]: row["metrics"]["acc1"] for row in evaluated}
