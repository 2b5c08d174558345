"""Which files of a folder are read: the kind of its data, and one of its splits."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neuclip.errors import UserError, quantity

Kind = Literal[
    "webdataset", "remote", "csv", "jsonl", "parquet", "folder", "huggingface", "synthetic"
]

TRAINING_SPLITS = ("train",)
EVALUATION_SPLITS = ("test", "validation")

WORDS: dict[Kind, str] = {
    "webdataset": "tar shards",
    "remote": "remote tar shards",
    "csv": "table",
    "jsonl": "JSON lines",
    "parquet": "parquet table",
    "folder": "folder of images",
    "huggingface": "Hugging Face dataset",
    "synthetic": "random images and captions",
}
_ENDINGS: dict[str, Kind] = {
    ".tar": "webdataset",
    ".csv": "csv",
    ".tsv": "csv",
    ".csv.gz": "csv",
    ".tsv.gz": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}
_DATA = tuple(_ENDINGS)
_ORDER: tuple[Kind, ...] = ("webdataset", "csv", "jsonl", "parquet")  # in a folder
_SPLITS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_SPLIT_WORD = re.compile(rf"(?:^|[^a-z0-9])({'|'.join(_SPLITS)})(?:[^a-z]|$)")
_SPLIT_FOLDER = re.compile(rf"({'|'.join(_SPLITS)})[-_]?\d*")
_METADATA = re.compile(r"metadata\.(jsonl|csv|parquet)")  # of a folder of images on the hub


@dataclass(frozen=True)
class Recognised:
    """A source of known kind.

    Attributes:
        kind: how it is read.
        name: what the user wrote.
        paths: the files or folders to open; for shards and addresses, patterns.
        split: the split that is read, if there are several.
        unused: what is there but not read, in one line per reason.
    """

    kind: Kind
    name: str
    paths: tuple[str, ...]
    split: str = ""
    unused: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """What it is, in one line."""
        split = f", split {self.split}" if self.split else ""
        return f"{self.name}: {WORDS[self.kind]}{split}"


def in_folder(folder: Path, splits: Sequence[str], given: Kind | None) -> Recognised:
    """What a folder holds, or the split of it that is read.

    Args:
        folder: an existing folder.
        splits: names of splits; the first that exists is read.
        given: the kind, if it is known.

    Raises:
        UserError: it has splits, but none of these, or no file of the given kind.
    """
    name = str(folder)
    if (folder / "state.json").is_file():
        return Recognised(given or "huggingface", name, (name,))
    folders, files = _listed(folder)
    below = _by_split(folders, _split_of_folder)
    is_divided = len(below) > 1 or (folder / "dataset_dict.json").is_file()
    if not is_divided or files:
        return _of_files(folder, files, splits, given)
    split, (chosen, *more) = _chosen(folder, below, splits)
    if more:
        raise UserError(f"{folder} holds several folders of its split {split}: give one")
    inside = in_folder(chosen, splits, given)
    unused = (*_others(below, split), *inside.unused)
    return Recognised(inside.kind, name, inside.paths, split, unused)


def _listed(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders in a folder, and its data files; a million images between them cost little."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            with contextlib.suppress(OSError):  # a link to itself
                if name.lower().endswith(_DATA) and entry.is_file():
                    files.append(name)
                elif entry.is_dir():
                    folders.append(name)
    return [folder / name for name in sorted(folders)], [folder / name for name in sorted(files)]


def _of_files(
    folder: Path, files: Sequence[Path], splits: Sequence[str], given: Kind | None
) -> Recognised:
    """A folder by the files in it: shards, else metadata of images, else tables, else images."""
    by_kind, metadata = _by_kind(files)
    unused = [_count(metadata, "metadata table")] if metadata else []
    described = [path for path in files if _METADATA.fullmatch(path.name)]
    if described and given is None and "webdataset" not in by_kind:
        return Recognised(ending_of(described[0]) or "jsonl", str(folder), (str(described[0]),))
    present: list[Kind] = [each for each in _ORDER if each in by_kind]
    kind: Kind = given or (present[0] if present else "folder")
    unused += [
        _count(paths, f"{paths[0].suffix} file")
        for other, paths in by_kind.items()
        if other != kind
    ]
    if kind in {"folder", "huggingface"}:
        return Recognised(kind, str(folder), (str(folder),), unused=tuple(unused))
    chosen, split = by_kind.get(kind, []), ""
    groups = _by_split(chosen, _split_of_file)
    if len(groups) > 1:
        rest = [path for path in chosen if _split_of_file(path) is None]
        split, chosen = _chosen(folder, groups, splits)
        unused += [*_others(groups, split), *([_count(rest, "undivided file")] if rest else [])]
    if not chosen:
        raise UserError(f"{folder}: no file of the format {given}")
    return Recognised(kind, str(folder), tuple(map(str, chosen)), split, tuple(unused))


def _by_kind(files: Sequence[Path]) -> tuple[dict[Kind, list[Path]], list[Path]]:
    """Data files by kind, and img2dataset's tables about its shards, which hold no samples."""
    by_kind: dict[Kind, list[Path]] = {}
    metadata: list[Path] = []
    for path in files:
        kind = ending_of(path)
        if kind == "parquet" and _is_metadata_of_shard(path):
            metadata.append(path)
        elif kind is not None:
            by_kind.setdefault(kind, []).append(path)
    return by_kind, metadata


def ending_of(path: Path) -> Kind | None:
    """The kind that the ending of a file's name stands for."""
    name = path.name.lower()
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)


def _is_metadata_of_shard(path: Path) -> bool:
    """Whether a parquet table describes a shard or folder of the same name, as of img2dataset."""
    return path.with_suffix("").is_dir() or path.with_suffix(".tar").is_file()


def _count(paths: Sequence[Path], what: str) -> str:
    return f"{quantity(len(paths), what)} ({paths[0].name}{', ...' if len(paths) > 1 else ''})"


# splits ------------------------------------------------------------------------------------------


def _split_of_file(path: Path) -> str | None:
    found = _SPLIT_WORD.search(path.name.lower())
    return _SPLITS[found[1]] if found else None


def _split_of_folder(path: Path) -> str | None:
    found = _SPLIT_FOLDER.fullmatch(path.name.lower())
    return _SPLITS[found[1]] if found else None


def _by_split(
    paths: Iterable[Path], split_of: Callable[[Path], str | None]
) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in paths:
        split = split_of(path)
        if split is not None:
            groups.setdefault(split, []).append(path)
    return groups


def _chosen(
    folder: Path, groups: dict[str, list[Path]], splits: Sequence[str]
) -> tuple[str, list[Path]]:
    """The first of the wanted splits that exists."""
    for split in splits:
        if split in groups:
            return split, groups[split]
    wanted, ways = " or ".join(splits), " or ".join(f"{folder}/{split}" for split in groups)
    raise UserError(f"{folder} has no split {wanted}: name the one to read, {ways}")


def _others(groups: dict[str, list[Path]], split: str) -> list[str]:
    return [_count(paths, f"{name} file") for name, paths in groups.items() if name != split]


def split_by_name(part: str, path: Path, given: Kind | None) -> Recognised | None:
    """FOLDER/SPLIT where no folder has this name; None if there is no such split."""
    split, folder = _SPLITS.get(path.name.lower()), path.parent
    if split is None or not folder.is_dir():
        return None
    folders, listed = _listed(folder)
    below, files = _by_split(folders, _split_of_folder), _by_split(listed, _split_of_file)
    if split not in below and split not in files:
        return None
    if files and split in files and len(files) == 1:  # the only split: every file belongs to it
        return _of_files(folder, files[split], (split,), given)
    found = in_folder(folder, (split,), given)
    return Recognised(found.kind, part, found.paths, split)
