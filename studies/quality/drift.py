"""How far embeddings move within some steps of training, each alone and all together.

A queue holds embeddings of earlier steps. If all embeddings rotate together, pairs of today look as
they did, and the queue does not. So the move of an embedding since an earlier step is measured as
it is, and after the rotation (or reflection) that brings all of them nearest to their old places.
Where all embeddings are in one point, such a rotation always exists.

The command trains a cell for its first passes, keeps a checkpoint of every few steps, and encodes
the pairs of the development splits with the newest and with earlier ones.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from neuclip.data.opening import open_source
from neuclip.errors import UserError, quantity
from neuclip.evaluation.embed import encode_split, start_reading
from neuclip.evaluation.interfaces import EvaluationSettings
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained
from neuclip.run_folder import RunFolder
from studies.quality.cell import Cell
from studies.quality.concepts import reading_of
from studies.quality.datasets import DataFolder
from studies.quality.plan import Rows, plan
from studies.quality.rows import DRIFT, present_code, results_file
from studies.quality.variants import register_variants
from studies.shared.cell_process import facts, train_run
from studies.shared.runner import matches, say
from studies.shared.tables import markdown

EVERY = 4
"""Steps between checkpoints."""
AGES = (4, 16, 64)
"""Steps before the newest checkpoint, multiples of `EVERY`."""


@dataclass(frozen=True)
class Move:
    """The move of embeddings since an earlier step, and what it does to a queue.

    Attributes:
        age: steps.
        own: cosine of an embedding with itself at the earlier step, mean over both modalities.
        rotated: the same after the best rotation of all of them, images and texts together.
        positive: cosine of the pairs, both of today.
        others: cosine of an embedding with those of the other modality in other pairs, of today.
        others_then: the same with those of the earlier step, as in a queue.
    """

    age: int
    own: float
    rotated: float
    positive: float
    others: float
    others_then: float


def move(then: Tensor, now: Tensor, age: int) -> Move:
    """The move of embeddings of the same pairs.

    Args:
        then: images and texts at the earlier step, of norm 1: [2, n, d].
        now: the same today.
        age: steps between them.
    """
    then, now = then.double(), now.double()
    before, after = then.flatten(0, 1), now.flatten(0, 1)
    left, _, right = torch.linalg.svd(before.T @ after)
    rotated = before @ (left @ right)
    return Move(
        age,
        own=float((before * after).sum(1).mean()),
        rotated=float((rotated * after).sum(1).mean()),
        positive=float((now[0] * now[1]).sum(1).mean()),
        others=_others(now, now),
        others_then=_others(now, then),
    )


def _others(anchors: Tensor, candidates: Tensor) -> float:
    """The mean cosine of images with other pairs' texts and of texts with other pairs' images."""
    n = anchors.shape[1]
    similar = anchors @ candidates.flip(0).mT
    total = similar.sum() - similar.diagonal(dim1=1, dim2=2).sum()
    return float(total / (2 * n * (n - 1)))


def moves(cell: Cell, folder: DataFolder, passes: int) -> tuple[int, list[Move]]:
    """Trains a cell for some passes; the step of its newest checkpoint, and the moves up to it.

    Args:
        cell: the run.
        folder: its data.
        passes: how many of its passes it trains.

    Raises:
        UserError: the passes have too few steps, or training failed.
    """
    splits = folder.splits("development")
    sections = {name: dict(section) for name, section in cell.sections.items()}
    sections["optim"] = {**sections.get("optim", {}), "stop_epochs": passes}
    kept = {"save_every_steps": EVERY, "keep_step_checkpoints": max(AGES) // EVERY + 1}
    sections["output"] = {**sections.get("output", {}), **kept}
    short = replace(cell, sections=sections, evaluated_every=cell.passes)
    with tempfile.TemporaryDirectory() as logs:
        config = short.config(folder.path / "train", splits, Path(logs), folder.pairs)
        run = RunFolder(Path(logs) / short.name)
        if failed := train_run(config, run.path):
            raise UserError(f"{cell.name}: {failed}")
        saved = [int(path.stem.removeprefix("iter_")) for path in run.checkpoints.glob("iter_*.pt")]
        newest = max(saved, default=0)
        if newest <= max(AGES):
            trained = quantity(passes, "pass")
            raise UserError(
                f"{trained} of {cell.name}: {newest} steps, and the drift needs more than "
                f"{max(AGES)}: give a larger --passes"
            )
        now = encode(cell, run.step_checkpoint(newest), splits)
        found = [
            move(encode(cell, run.step_checkpoint(newest - age), splits), now, age) for age in AGES
        ]
    return newest, found


def encode(cell: Cell, weights: Path, splits: Sequence[Path]) -> Tensor:
    """Embeddings of all pairs of the splits, images and texts: [2, n, d]."""
    encoder = load_pretrained(CheckpointChoice(weights, arch=cell.model), "cpu").encoder
    parts: list[Tensor] = []
    for split in splits:
        source = open_source(str(split), reading_of(cell))
        reading = start_reading(encoder, source, EvaluationSettings(workers=0))
        found = encode_split(encoder, reading)
        parts.append(torch.stack([found.image_features, found.text_features]))
    return torch.cat(parts, dim=1)


def drift(args: argparse.Namespace, folders: Mapping[str, DataFolder]) -> None:
    """The command `drift`: appends a row for each cell that has none.

    Args:
        args: of the command.
        folders: the data given, by data set.

    Raises:
        UserError: no cell has such a name, rows are of other code or data, or a run failed.
    """
    torch.set_num_threads(1)
    register_variants()
    code = present_code()
    measured = results_file(args.out / DRIFT, code, folders, args.same_code)
    cells = [
        cell
        for cell in plan({})
        if cell.data_set in folders and matches(cell.name, args.match)
    ]  # fmt: skip
    if not cells:
        raise UserError("no cell of these data has a name that --match asks for")
    for cell in cells:
        if (row := measured.read().get(cell.name)) is not None:
            say(f"{cell.name} was measured at step {row['step']} before: for others, another --out")
            continue
        folder = folders[cell.data_set]
        step, found = moves(cell, folder, args.passes)
        row = {**asdict(cell), "cell": cell.name, "data": folder.digest, **facts()}
        measured.append({**row, "step": step, "moves": [asdict(each) for each in found]})
        say(f"measured {cell.name}")


def drift_table(rows: Rows) -> str:
    """The moves by run; empty if none was measured.

    Args:
        rows: of the command, by cell.
    """
    shown = ("own", "rotated", "positive", "others", "others_then")
    body = [
        (
            f"`{row['cell']}`", str(row["step"]), str(each["age"]),
            *(f"{each[key]:.3f}" for key in shown),
        )
        for row in rows.values()
        for each in row["moves"]
    ]  # fmt: skip
    header = (
        "run", "step", "steps before", "cosine with itself then", "after the best rotation",
        "positives", "others", "others then",
    )  # fmt: skip
    return markdown(header, body)
