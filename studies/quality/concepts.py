"""How much of the softmax over negatives falls on pairs of the anchor's own concept or caption.

Those pairs are false negatives, unless their captions differ in what the picture shows: those of
the glyphs name the style. The share is measured with the weights that a run left in
`study/weights`, over all training pairs.

The command also says how well the training pairs are fitted: for how many anchors the most similar
item of the other modality is their own, or one of their own kind.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.groups import GroupKind, Groups, read_groups
from neuclip.data.opening import open_source
from neuclip.errors import UserError
from neuclip.evaluation.embed import encode_split, start_reading
from neuclip.evaluation.interfaces import EvaluationSettings
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.load import load_pretrained
from studies.quality.cell import Cell
from studies.quality.datasets import DATA_SETS, DataFolder
from studies.quality.measure import weights_digest
from studies.quality.plan import Rows, plan
from studies.quality.rows import CONCEPTS, DEVELOPMENT, present_code, results_file, weights_of
from studies.shared.cell_process import facts
from studies.shared.runner import matches, say
from studies.shared.tables import markdown

KINDS: Mapping[str, GroupKind] = {"concept": "label", "caption": "caption"}
ANCHORS, ROWS = 4096, 64


@dataclass(frozen=True)
class Share:
    """The pairs of an anchor's own kind.

    Attributes:
        others: pairs that share it with an anchor, mean over anchors.
        weight: their part of the softmax, mean over anchors: of image anchors, of text anchors.
        first: anchors whose most similar item is of their kind or their own: as weights.
    """

    others: float
    weight: tuple[float, float]
    first: tuple[float, float]


def share_of(features: Tensor, ids: Tensor, scale: float, anchors: int = ANCHORS) -> Share:
    """The weight of the pairs that share an anchor's id, in the softmax over all but its own pair.

    Args:
        features: images, texts: [2, n, d].
        ids: of the pairs, [n]; 0: shares nothing.
        scale: 1 / temperature.
        anchors: number of anchors, a random part of the pairs.
    """
    counts, weights, firsts = [], [], []
    order = torch.randperm(features.shape[1], generator=torch.Generator().manual_seed(0))
    for side in (0, 1):
        for rows in order[:anchors].split(ROWS):
            logits = (features[side, rows] @ features[1 - side].T).double() * scale
            nearest = logits.argmax(1)
            logits[torch.arange(len(rows)), rows] = -torch.inf
            same = (ids[rows, None] == ids) & (ids != 0)
            same[torch.arange(len(rows)), rows] = False
            weights.append((logits.softmax(1) * same).sum(1))
            counts.append(same.sum(1).double())
            mine = (nearest == rows) | same[torch.arange(len(rows)), nearest]
            firsts.append(mine.double())
    return Share(float(torch.cat(counts).mean()), _by_side(weights), _by_side(firsts))


def _by_side(parts: Sequence[Tensor]) -> tuple[float, float]:
    """The means over anchors, of image and of text anchors."""
    image, text = torch.cat(list(parts)).view(2, -1).mean(1)
    return float(image), float(text)


def ids_of(groups: Groups, kind: GroupKind) -> Tensor:
    """The id of every sample, 0 for none: [n]. The samples have one caption and one concept."""
    found = torch.zeros(groups.samples, dtype=torch.int64)
    members = groups.by_kind[kind]
    found[torch.from_numpy(members.samples)] = torch.from_numpy(members.ids)
    return found


def reading_of(cell: Cell) -> ReadingConfig:
    """What a run reads of a sample, with what the picture shows as its label."""
    caption_key = cell.sections.get("data", {}).get("caption_key")
    return ReadingConfig(label_key=DATA_SETS[cell.data_set].concept_key, caption_key=caption_key)


def shares(cell: Cell, weights: Path, train: Path) -> dict[str, Share]:
    """The pairs of the anchors' own concept, and of their own caption.

    Args:
        cell: the run.
        weights: its final weights.
        train: folder of the training data.
    """
    loaded = load_pretrained(CheckpointChoice(weights, arch=cell.model), "cpu")
    reading = reading_of(cell)
    source = open_source(str(train), reading)
    groups = read_groups(source, reading, tuple(KINDS.values()))
    encoded = encode_split(
        loaded.encoder, start_reading(loaded.encoder, source, EvaluationSettings(workers=0))
    )
    features = torch.stack([encoded.image_features, encoded.text_features])
    scale = loaded.clip.logit_scale
    ids = {name: ids_of(groups, kind)[encoded.sample_ids] for name, kind in KINDS.items()}
    return {name: share_of(features, mine, scale) for name, mine in ids.items()}


def concepts(args: argparse.Namespace, folders: Mapping[str, DataFolder]) -> None:
    """The command `concepts`: appends a row for each run whose weights are there; rows stay.

    Args:
        args: of the command.
        folders: the data given, by data set.

    Raises:
        UserError: no weights are there, they are not those of the development row, or rows are of
            other code or data.
    """
    torch.set_num_threads(1)
    code = present_code()
    rows = results_file(args.out / DEVELOPMENT, code, folders, args.same_code).read()
    measured = results_file(args.out / CONCEPTS, code, folders, args.same_code)
    cells = [
        cell
        for cell in plan(rows)
        if cell.data_set in folders
        and cell.name in rows
        and matches(cell.name, args.match)
        and weights_of(args.out, cell).is_file()
    ]
    if not cells:
        raise UserError(f"{args.out / 'weights'} has no weights of these data and this --match")
    for cell in (cell for cell in cells if cell.name not in measured.read()):
        path, folder = weights_of(args.out, cell), folders[cell.data_set]
        if weights_digest(path) != rows[cell.name]["weights"]:
            raise UserError(f"{path} holds other weights than those of its row in {DEVELOPMENT}")
        found = shares(cell, path, folder.path / "train")
        row = {**asdict(cell), "cell": cell.name, "data": folder.digest, **facts()}
        row |= {"weights": rows[cell.name]["weights"]}
        measured.append({**row, "shares": {name: asdict(each) for name, each in found.items()}})
        say(f"measured {cell.name}")


def concepts_table(rows: Rows) -> str:
    """The shares by run; empty if none was measured.

    Args:
        rows: of the command, by cell.
    """
    body: list[Sequence[str]] = []
    for row in rows.values():
        for kind, share in row["shares"].items():
            parts = [f"{100 * part:.0f} %" for part in share["weight"]]
            parts += [f"{100 * part:.1f} %" for part in share.get("first", ())] or ["-", "-"]
            body.append((f"`{row['cell']}`", kind, f"{share['others']:.1f}", *parts))
    header = (
        "run", "shared", "other pairs", "weight, image anchors", "weight, text anchors",
        "nearest text", "nearest image",
    )  # fmt: skip
    return markdown(header, body)
