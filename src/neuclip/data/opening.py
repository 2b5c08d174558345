"""From what `--train-data` says to a source."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from neuclip.config.sections import DataFormat
from neuclip.data.remote.cache import GIB, ShardCache
from neuclip.data.remote.fetch import Patience
from neuclip.data.remote.remote_shards import Reading, open_remote
from neuclip.data.remote.transport import PIPE
from neuclip.data.sources.arrow import DatasetSource, open_parquet
from neuclip.data.sources.folders import FolderSource
from neuclip.data.sources.mixture import Mixture, parse_factors
from neuclip.data.sources.shards import build_index, expand_patterns
from neuclip.data.sources.source import Source
from neuclip.data.sources.tables import Columns, open_tables
from neuclip.errors import UserError
from neuclip.files import cache_home

_Kind = Literal["webdataset", "remote", "csv", "parquet", "folder", "huggingface"]

_TABLES: dict[str, _Kind] = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class OpenSettings:
    """How to open and read sources.

    Attributes:
        data_format: what all of them are; auto: told from each one's name and content.
        caption_key: take captions from this entry of a `.json` instead of from a `.txt`.
        data_size: take the keys, integers below this bound, as sample ids (tar shards only).
        columns: of tables.
        factors: how often a round visits each source, joined by `::`.
        window: blocks shuffled together, if the user says so.
        cache_dir: where remote shards are kept; none: `neuclip/shards` in the user's cache folder.
        cache_size_gb: how much of them, in GiB.
        allow_pipe: run the commands of `pipe:` sources.
        patience: how long to try to fetch.
    """

    data_format: DataFormat = "auto"
    caption_key: str | None = None
    data_size: int | None = None
    columns: Columns = field(default_factory=Columns)
    factors: str | None = None
    window: int | None = None
    cache_dir: str | None = None
    cache_size_gb: float = 50.0
    allow_pipe: bool = False
    patience: Patience = field(default_factory=Patience)

    @property
    def cache(self) -> ShardCache:
        """The cache of remote shards."""
        own = cache_home() / "shards"
        folder = Path(self.cache_dir).expanduser() if self.cache_dir else own
        return ShardCache(folder, int(self.cache_size_gb * GIB), self.patience)


def open_source(
    spec: str,
    settings: OpenSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Opens what `--train-data` names: one source, or several joined by `::`.

    Args:
        spec: paths, patterns with braces, addresses or `pipe:` commands.
        settings: how to open and read.
        progress: called with the number of shards indexed and of all, of one source at a time.

    Raises:
        UserError: a source cannot be opened; the message says what would be right.
    """
    settings = settings or OpenSettings()
    parts = [part for part in spec.split("::") if part] or [spec]
    kinds: list[_Kind] = [_kind(part, settings) for part in parts]
    if settings.data_size is not None and not set(kinds) <= {"webdataset", "remote"}:
        raise UserError(
            f"data_size {settings.data_size} takes the keys of tar shards as sample ids; "
            f"{spec!r} has no such keys: leave data_size out"
        )
    if settings.factors is None and len(set(kinds)) == 1:
        return _open(kinds[0], parts, settings, progress)
    factors = [1.0] * len(parts)
    if settings.factors is not None:
        factors = parse_factors(settings.factors, len(parts))
    sources = [
        _open(kind, [part], settings, progress) for kind, part in zip(kinds, parts, strict=True)
    ]
    return Mixture(sources, factors, ids_are_keys=settings.data_size is not None)


def _kind(part: str, settings: OpenSettings) -> _Kind:
    """What a source is; raises `UserError` where it cannot be read at all."""
    if part.startswith(PIPE) and not settings.allow_pipe:
        raise UserError(f"{part!r} runs a command of the shell: allow it with --allow-pipe")
    path, ending = Path(part).expanduser(), os.path.splitext(part)[1].lower()  # noqa: PTH122
    if part.startswith(PIPE) or "://" in part:
        if settings.data_format not in {"auto", "webdataset"} or ending in _TABLES:
            raise UserError(f"{part!r}: of remote data only tar shards are read: copy it first")
        return "remote"
    if settings.data_format != "auto":
        return settings.data_format
    return _kind_of_folder(path) if path.is_dir() else _TABLES.get(ending, "webdataset")


def _kind_of_folder(folder: Path) -> _Kind:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise UserError(f"{folder} holds several splits: name one of {', '.join(splits)} in it")
    if (folder / "state.json").is_file():
        return "huggingface"
    endings = {path.suffix.lower() for path in folder.iterdir()}
    if ".tar" in endings:
        return "webdataset"
    for ending, kind in _TABLES.items():
        if ending in endings:
            return kind
    return "folder"


def _open(
    kind: _Kind,
    parts: Sequence[str],
    settings: OpenSettings,
    progress: Callable[[int, int], None] | None,
) -> Source:
    """One source of one kind; parts that are no shards are opened one by one and joined."""
    if kind == "webdataset":
        shards = expand_patterns("::".join(parts))
        return build_index(
            shards,
            caption_key=settings.caption_key,
            data_size=settings.data_size,
            progress=progress,
        )
    if kind == "remote":
        reading = Reading(settings.caption_key, settings.data_size, settings.window)
        urls = [url for part in parts for url in _braces(part)]
        return open_remote(urls, settings.cache, reading, progress)
    if kind == "csv":
        return open_tables(_files(parts, (".csv", ".tsv")), settings.columns)
    if kind == "parquet":
        return open_parquet(_files(parts, (".parquet",)), settings.columns, settings.window)
    folders = [Path(path).expanduser() for part in parts for path in _braces(part)]
    sources = [
        DatasetSource(folder, settings.columns)
        if kind == "huggingface"
        else FolderSource(_existing(folder), settings.caption_key)
        for folder in folders
    ]
    return sources[0] if len(sources) == 1 else Mixture(sources, [1.0] * len(sources))


def _files(parts: Sequence[str], endings: tuple[str, ...]) -> list[Path]:
    """Files that patterns and folders name."""
    files: list[Path] = []
    for part in parts:
        for name in _braces(part):
            path = Path(name).expanduser()
            inside = sorted(path.iterdir()) if path.is_dir() else [_existing(path)]
            files += [each for each in inside if path == each or each.suffix.lower() in endings]
    if not files:
        raise UserError(f"{'::'.join(parts)}: no file ending in {' or '.join(endings)} there")
    return files


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return path


def _braces(part: str) -> list[str]:
    try:
        return list(braceexpand(part))
    except ValueError:  # braceexpand's UnbalancedBracesError
        raise UserError(f"the braces of the pattern {part!r} do not match") from None
