"""Converts retrieval sets and WinoGAViL from their hub repositories to the layout of `sets`.

Each repository contains one table (`.csv`) and one archive of images (`.zip`). The bytes of the
images are copied unchanged; nothing is extracted.
"""

import ast
import csv
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from neuclip.data.shard_writer import write_shards
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.sets import DATASET_TYPE, INSTANCES, SHARD_COUNT
from neuclip.evaluation.datacomp.suite import TaskKind
from neuclip.untrusted import parse_json

IMAGES_PER_SHARD = 1000
_EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
_CAPTIONS = ("raw", "caption", "captions")


def convert(kind: TaskKind, table: Path, archive: Path, out: Path) -> None:
    """Writes a set.

    Args:
        kind: retrieval or association.
        table: for retrieval, a row per image with `filename` and the list of its captions; for
            association, a row per instance with `cue`, `candidates` and `associations`.
        archive: the images, by file name; for association, by candidate.
        out: an empty folder.

    Raises:
        UserError: the table or the archive has another form.
    """
    rows = _rows(table)
    try:
        with zipfile.ZipFile(archive) as images:
            source = _Images(images, archive)
            if kind == "retrieval":
                _write_images(out, _captioned(rows, source, table))
            else:
                _write_association(out, rows, source, table)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive} is not a zip archive: {error}") from None
    (out / DATASET_TYPE).write_text(f"{kind}\n", encoding="utf-8")


class _Images:
    """The images of an archive, by the last part of their path."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive, self._path = archive, path
        names = [PurePosixPath(name) for name in archive.namelist()]
        self._by_name = {name.name: str(name) for name in names}
        self._by_stem = {
            name.stem: str(name) for name in names if name.suffix.lower() in _EXTENSIONS
        }

    def read(self, name: str) -> tuple[str, bytes]:
        """Extension and content of an image, by file name with or without extension."""
        member = self._by_name.get(name) or self._by_stem.get(name)
        if member is None:
            raise UserError(f"{self._path} has no image {name!r}")
        extension = _EXTENSIONS.get(PurePosixPath(member).suffix.lower())
        if extension is None:
            raise UserError(f"{self._path}: {member!r} is not a jpg, png or webp file")
        return extension, self._archive.read(member)


def _captioned(
    rows: list[dict[str, str]], images: _Images, table: Path
) -> Iterator[tuple[str, dict[str, bytes]]]:
    column = next((name for name in _CAPTIONS if name in rows[0]), None)
    if column is None or "filename" not in rows[0]:
        raise UserError(
            f"{table}: expected columns filename and {' or '.join(_CAPTIONS)}, found "
            f"{', '.join(rows[0])}"
        )
    for number, row in enumerate(rows):
        captions = [" ".join(text.split()) for text in _list(row[column], table, number)]
        extension, content = images.read(row["filename"])
        yield f"s{number:07}", {extension: content, "txt": "\n".join(captions).encode()}


def _write_association(out: Path, rows: list[dict[str, str]], images: _Images, table: Path) -> None:
    missing = {"cue", "candidates", "associations"} - rows[0].keys()
    if missing:
        raise UserError(f"{table}: no column {', '.join(sorted(missing))}")
    keys: dict[str, str] = {}
    lines: list[str] = []
    for number, row in enumerate(rows):
        names = {side: _list(row[side], table, number) for side in ("candidates", "associations")}
        for name in names["candidates"]:
            keys.setdefault(name, f"s{len(keys):07}")
        unknown = [name for name in names["associations"] if name not in names["candidates"]]
        if unknown:
            raise UserError(f"{table}, row {number + 1}: {unknown[0]!r} is not a candidate")
        chosen = {side: [keys[name] for name in of_side] for side, of_side in names.items()}
        lines.append(json.dumps({"cue": row["cue"], **chosen}))

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for name, key in keys.items():
            extension, content = images.read(name)
            yield key, {extension: content}

    _write_images(out, samples())
    (out / INSTANCES).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_images(out: Path, samples: Iterator[tuple[str, dict[str, bytes]]]) -> None:
    shards = out / "test"
    sizes = write_shards(shards, samples, IMAGES_PER_SHARD)
    for number, name in enumerate(sorted(sizes)):
        (shards / name).rename(shards / f"{number}.tar")
    (out / SHARD_COUNT).write_text(f"{len(sizes)}\n", encoding="utf-8")


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is not a CSV table: {error}") from None
    if not rows:
        raise UserError(f"{table} has no rows")
    return rows


def _list(text: str, table: Path, row: int) -> list[str]:
    """Parses a list of texts in JSON or Python syntax."""
    try:
        value = parse_json(text)
    except ValueError:
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise UserError(f"{table}, row {row + 1}: expected a list of texts, found {text[:60]!r}")
    return value
