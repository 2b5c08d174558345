"""The pairs of a cell: a csv of whole concepts, a part of them with shared captions."""

import csv
import json
import random
import tarfile
from collections import defaultdict
from pathlib import Path

from studies.finetuning.cells import Cell


def write_pairs(emoji: Path, folder: Path, cell: Cell) -> Path:
    """A csv of whole concepts, a part of whose captions is the bare name.

    Args:
        emoji: of `neuclip data emoji`.
        folder: keeps the csv and the images; cells with the same pairs share them.
        cell: says how many pairs, how many with a shared caption, and which.
    """
    table = folder / f"n{cell.pairs}_d{cell.duplicates}_seed{cell.seed}.csv"
    if table.exists():
        return table
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    by_concept: dict[str, list[tuple[Path, str]]] = defaultdict(list)
    for shard in sorted((emoji / "train").glob("*.tar")):
        _unpack(shard, images, by_concept)
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


def _unpack(shard: Path, images: Path, by_concept: dict[str, list[tuple[Path, str]]]) -> None:
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
