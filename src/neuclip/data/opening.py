"""Opens data in whatever format they are: for training, evaluation, search, and `neuclip data`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys
from neuclip.data.captions import CaptionRule
from neuclip.data.endings import endings_of_keys
from neuclip.data.folder_contents import TRAINING_SPLITS, Recognised
from neuclip.data.progress import Progress
from neuclip.data.recognition import recognise
from neuclip.data.remote.cache import GIB, ShardCache
from neuclip.data.remote.fetch import RetryPolicy
from neuclip.data.remote.remote_shards import open_remote
from neuclip.data.sources.arrow import DatasetSource, open_parquet
from neuclip.data.sources.folders import FolderSource
from neuclip.data.sources.json_lines import read_json_lines
from neuclip.data.sources.mixture import Mixture, parse_factors
from neuclip.data.sources.shards import ShardIndex, build_index, expand_patterns
from neuclip.data.sources.source import Captions, Source, captions_required
from neuclip.data.sources.synthetic import SyntheticSource
from neuclip.data.sources.tables import TableSource, read_delimited
from neuclip.errors import UserError, quantity
from neuclip.files import cache_home

_log = logging.getLogger(__name__)


def open_source(
    pattern: str,
    reading: ReadingConfig | None = None,
    progress: Progress | None = None,
    retry: RetryPolicy | None = None,
    *,
    captions: Captions = "required",
    splits: Sequence[str] = TRAINING_SPLITS,
) -> Source:
    """Opens the data that a pattern such as `--train-data` names: one source, or several.

    What was recognised, and what is there but not read, is logged.

    Args:
        pattern: paths, patterns with braces, addresses or `pipe:` commands, joined by `::`.
        reading: how to open and read them.
        progress: called for each shard, source by source.
        retry: retries and timeouts of downloads.
        captions: what a missing caption is.
        splits: of a folder with several splits, the first that it has is read; FOLDER/SPLIT names
            another one.

    Raises:
        UserError: a source cannot be opened; the message names the remedy.
    """
    reading, retry = reading or ReadingConfig(), retry or RetryPolicy()
    parts = [part for part in pattern.split("::") if part] or [pattern]
    found = [recognise(part, reading, splits) for part in parts]
    kinds = {each.kind for each in found}
    if reading.data_size is not None and not kinds <= {"webdataset", "remote"}:
        raise UserError(
            f"data_size {reading.data_size} takes the keys of tar shards as sample ids; "
            f"{pattern!r} has no such keys: leave data_size out"
        )
    keys = (("--image-key", reading.image_key), ("--text-key", reading.text_key))
    given = [f"{flag} {key}" for flag, key in keys if key is not None]
    if given and kinds != {"webdataset"}:
        raise UserError(
            f"{', '.join(given)}: the endings of members in local tar shards; {pattern!r} is not "
            "of that kind: leave it out"
        )
    opener = _Opener(reading, retry, progress, captions)
    factors = reading.train_data_upsampling_factors
    if factors is None and len(kinds) == 1:
        source = opener.open(_together(found))
    else:
        source = Mixture(
            [opener.open(each) for each in found],
            [1.0] * len(parts) if factors is None else parse_factors(factors, len(parts)),
            ids_are_keys=reading.data_size is not None,
        )
    if captions == "required" and not source.has_captions:
        raise UserError(
            f"{pattern} has no captions: they are read from the .txt of a sample, or with "
            f"--caption-key KEY from its .json ({source.opened})"
        )
    _log.info("%s", source.opened)
    for line in source.unused:
        _log.info("not read: %s", line)
    return source


def _together(found: Sequence[Recognised]) -> Recognised:
    """Sources of one kind as one."""
    return replace(
        found[0],
        name="::".join(each.name for each in found),
        paths=tuple(path for each in found for path in each.paths),
        unused=tuple(line for each in found for line in each.unused),
    )


def _joined(sources: Sequence[Source]) -> Source:
    """Sources of one kind as one, each sample once."""
    return sources[0] if len(sources) == 1 else Mixture(sources, [1.0] * len(sources))


@dataclass(frozen=True)
class _Opener:
    """Opens sources of known kind."""

    reading: ReadingConfig
    retry: RetryPolicy
    progress: Progress | None
    captions: Captions

    def open(self, found: Recognised) -> Source:
        """One source; folders and datasets are opened one by one and joined."""
        source = self._open(found)
        details = f"; {source.opened}" if source.opened else ""
        if found.kind in {"webdataset", "remote"} and self.reading.caption_keys_read:
            keys = CaptionRule.of(self.reading).json_keys
            details += f"; captions from {' or '.join(map(repr, keys))} in the .json"
        source.opened = f"{found.words}, {quantity(len(source), 'sample')}{details}"
        source.unused = (*found.unused, *source.unused)
        return source

    def _open(self, found: Recognised) -> Source:
        if found.kind == "synthetic":
            return _joined([SyntheticSource(name) for name in found.paths])
        reading, paths = self.reading, [Path(path).expanduser() for path in found.paths]
        if found.kind == "webdataset":
            return self._shards(found)
        if found.kind == "remote":
            source = open_remote(list(found.paths), self._cache(), reading, self.progress)
            # Whether remote shards have captions is not known before they are read.
            source.captions_required = self.captions == "required"
            return source
        if found.kind == "parquet":
            return open_parquet(paths, reading, self.captions)
        if found.kind in {"csv", "jsonl"}:
            read = read_delimited if found.kind == "csv" else read_json_lines
            rows = [read(path, reading, self.captions) for path in paths]
            has_captions = any(each.captions for each in rows)
            required = captions_required(self.captions, has_captions=has_captions)
            rule = CaptionRule.of_columns(reading, required=required)
            return TableSource(rows, rule, AnnotationKeys.of(reading))
        if found.kind == "huggingface":
            return _joined([DatasetSource(folder, reading, self.captions) for folder in paths])
        folders = [FolderSource(folder, reading, self.captions) for folder in paths]
        for folder in folders:
            name = folder.layout.spans[0].name
            AnnotationKeys.of(reading).check(folder.record, len(folder), name)
        return _joined(folders)

    def _shards(self, found: Recognised) -> Source:
        shards = [shard for path in found.paths for shard in expand_patterns(path)]
        index = self._index(shards, required=self.captions != "optional")
        if self.captions == "if_any" and not index.has_captions:
            index = self._index(shards, required=False)
        name = index.layout.spans[0].name
        AnnotationKeys.of(self.reading).check(index.record, len(index), name)
        return index

    def _index(self, shards: Sequence[Path], *, required: bool) -> ShardIndex:
        return build_index(
            shards,
            captions=CaptionRule.of(self.reading, required=required),
            keys=AnnotationKeys.of(self.reading),
            data_size=self.reading.data_size,
            known=endings_of_keys(self.reading.image_key, self.reading.text_key),
            progress=self.progress,
        )

    def _cache(self) -> ShardCache:
        """The cache of downloaded shards."""
        own = self.reading.cache_dir
        folder = Path(own).expanduser() if own else cache_home() / "shards"
        return ShardCache(folder, int(self.reading.cache_size_gb * GIB), self.retry)
