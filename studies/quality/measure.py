"""What is measured of a cell: on development splits in training, on test splits at the end.

Everything here, and all that it imports, is in the digest of the code.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from neuclip.evaluation.evaluate import evaluate
from neuclip.evaluation.interfaces import EvaluatedModel, EvaluationSettings
from neuclip.evaluation.splits import open_split
from neuclip.files import replacing
from neuclip.model.base_weights import hash_weights
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained
from studies.quality.cell import Cell
from studies.quality.variants import register_variants
from studies.shared.cell_process import Stopwatch, kept_metrics, records, train_run
from studies.shared.error import training_error


def train_cell(told: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Trains a cell, evaluates it on the development splits, and keeps its final weights.

    Args:
        told: what the runner wrote: the cell, the data, and the file for the weights.
        folder: of the cell.

    Returns:
        The measured part of its row. `cpu_seconds` are those of training with its evaluations,
        `error_cpu_seconds` those of the error of the log-normalizers.
    """
    register_variants()
    cell = Cell(**told["cell"])
    run = folder / "logs" / cell.name
    config = cell.config(
        Path(told["train"]), [Path(split) for split in told["splits"]], folder / "logs",
        told["pairs"],
    )  # fmt: skip
    with Stopwatch(folder / "times.json") as watch:
        failed = train_run(config, run)
    found = {**records(run), **watch.rounded, "pairs": told["pairs"]}
    if failed:
        return {**found, "failed": failed}
    with Stopwatch(folder / "error_times.json") as watch:
        error = training_error(run)
    found |= {"errors": [error], "error_cpu_seconds": watch.rounded["cpu_seconds"]}
    return {**found, "weights": keep_weights(run, Path(told["weights"]))}


def keep_weights(run: Path, path: Path) -> str:
    """Writes the final weights of a run, in open_clip's layout, and returns their SHA-256."""
    weights = load_pretrained(CheckpointChoice(run), "cpu").checkpoint.weights
    with replacing(path) as file:
        torch.save({"state_dict": {key: value.clone() for key, value in weights.items()}}, file)
    return hash_weights(weights)


def evaluate_weights(cell: Cell, path: Path, splits: Iterable[Path]) -> list[dict[str, Any]]:
    """Evaluates the final weights of a cell on splits, as training does."""
    loaded = load_pretrained(CheckpointChoice(path, arch=cell.model), "cpu")
    model = EvaluatedModel(loaded.encoder, None, loaded.clip.logit_scale, cell.pairs_per_step)
    settings = EvaluationSettings(workers=0, seed=cell.seed)
    return [
        {"split": split.name, **kept_metrics(evaluate(model, open_split(split), settings).metrics)}
        for split in splits
    ]


def weights_digest(path: Path) -> str:
    """The SHA-256 of weights that `keep_weights` wrote."""
    return hash_weights(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
