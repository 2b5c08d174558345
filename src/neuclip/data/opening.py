"""Opens the data that `--train-data` names, in whatever format they are."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braceexpand import braceexpand

from neuclip.config.sections import ReadingConfig
from neuclip.data.captions import CaptionRule
from neuclip.data.progress import Progress
from neuclip.data.remote.cache import GIB, ShardCache
from neuclip.data.remote.fetch import RetryPolicy
from neuclip.data.remote.remote_shards import open_remote
from neuclip.data.remote.transport import PIPE
from neuclip.data.sources.arrow import DatasetSource, open_parquet
from neuclip.data.sources.folders import FolderSource
from neuclip.data.sources.mixture import Mixture, parse_factors
from neuclip.data.sources.shards import build_index, expand_patterns
from neuclip.data.sources.source import Source
from neuclip.data.sources.tables import open_tables
from neuclip.errors import UserError
from neuclip.files import cache_home

_Format = Literal["webdataset", "remote", "csv", "parquet", "folder", "huggingface"]

_TABLES: dict[str, _Format] = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def open_source(
    pattern: str,
    reading: ReadingConfig | None = None,
    progress: Progress | None = None,
    retry: RetryPolicy | None = None,
) -> Source:
    """Opens the data that a pattern such as `--train-data` names: one source, or several.

    Args:
        pattern: paths, patterns with braces, addresses or `pipe:` commands, joined by `::`.
        reading: how to open and read them.
        progress: called for each shard, source by source.
        retry: retries and timeouts of downloads.

    Raises:
        UserError: a source cannot be opened; the message names the remedy.
    """
    reading, retry = reading or ReadingConfig(), retry or RetryPolicy()
    parts = [part for part in pattern.split("::") if part] or [pattern]
    formats: list[_Format] = [_detect(part, reading) for part in parts]
    if reading.data_size is not None and not set(formats) <= {"webdataset", "remote"}:
        raise UserError(
            f"data_size {reading.data_size} takes the keys of tar shards as sample ids; "
            f"{pattern!r} has no such keys: leave data_size out"
        )
    opener = _Opener(reading, retry, progress)
    factors = reading.train_data_upsampling_factors
    if factors is None and len(set(formats)) == 1:
        return opener.open(formats[0], parts)
    return Mixture(
        [opener.open(each, [part]) for each, part in zip(formats, parts, strict=True)],
        [1.0] * len(parts) if factors is None else parse_factors(factors, len(parts)),
        ids_are_keys=reading.data_size is not None,
    )


def _detect(part: str, reading: ReadingConfig) -> _Format:
    """The format of one source; raises `UserError` for a source that cannot be read."""
    if part.startswith(PIPE) and not reading.allow_pipe:
        raise UserError(f"{part!r} runs a shell command: allow it with --allow-pipe")
    path, suffix = Path(part).expanduser(), os.path.splitext(part)[1].lower()  # noqa: PTH122
    if part.startswith(PIPE) or "://" in part:
        if reading.data_format not in {"auto", "webdataset"} or suffix in _TABLES:
            raise UserError(
                f"{part!r}: only tar shards can be read remotely: copy the data to a local disk"
            )
        return "remote"
    if reading.data_format != "auto":
        return reading.data_format
    return _detect_in_folder(path) if path.is_dir() else _TABLES.get(suffix, "webdataset")


def _detect_in_folder(folder: Path) -> _Format:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent for path in folder.glob("*/state.json"))
        named = ", ".join(str(split) for split in splits)
        raise UserError(f"{folder} holds several splits: give the folder of one: {named}")
    if (folder / "state.json").is_file():
        return "huggingface"
    suffixes = {path.suffix.lower() for path in folder.iterdir()}
    if ".tar" in suffixes:
        return "webdataset"
    for suffix, table in _TABLES.items():
        if suffix in suffixes:
            return table
    return "folder"


@dataclass(frozen=True)
class _Opener:
    """Opens sources of known format."""

    reading: ReadingConfig
    retry: RetryPolicy
    progress: Progress | None

    def open(self, data_format: _Format, parts: Sequence[str]) -> Source:
        """One source; folders and datasets are opened one by one and joined."""
        reading = self.reading
        if data_format == "webdataset":
            return build_index(
                expand_patterns("::".join(parts)),
                captions=CaptionRule.for_key(reading.caption_key),
                data_size=reading.data_size,
                progress=self.progress,
            )
        if data_format == "remote":
            urls = [url for part in parts for url in _braces(part)]
            return open_remote(urls, self._cache(), reading, self.progress)
        if data_format == "csv":
            return open_tables(_files(parts, (".csv", ".tsv")), reading)
        if data_format == "parquet":
            return open_parquet(_files(parts, (".parquet",)), reading)
        sources = [
            DatasetSource(folder, reading)
            if data_format == "huggingface"
            else FolderSource(_existing(folder), reading.caption_key)
            for folder in (Path(path).expanduser() for part in parts for path in _braces(part))
        ]
        return sources[0] if len(sources) == 1 else Mixture(sources, [1.0] * len(sources))

    def _cache(self) -> ShardCache:
        """The cache of downloaded shards."""
        own = self.reading.cache_dir
        folder = Path(own).expanduser() if own else cache_home() / "shards"
        return ShardCache(folder, int(self.reading.cache_size_gb * GIB), self.retry)


def _files(parts: Sequence[str], endings: tuple[str, ...]) -> list[Path]:
    """The files named by patterns and folders."""
    files: list[Path] = []
    for part in parts:
        for name in _braces(part):
            path = Path(name).expanduser()
            inside = sorted(path.iterdir()) if path.is_dir() else [_existing(path)]
            files += [each for each in inside if path == each or each.suffix.lower() in endings]
    if not files:
        raise UserError(f"{'::'.join(parts)}: no file ending in {' or '.join(endings)}")
    return files


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return path


def _braces(part: str) -> list[str]:
    try:
        return list(braceexpand(part))
    except ValueError:  # braceexpand's UnbalancedBracesError
        raise UserError(f"unbalanced braces in the pattern {part!r}") from None
