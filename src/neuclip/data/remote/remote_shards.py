"""Remote shards, read from a cache that is filled ahead of use.

A shard is downloaded and indexed when it is needed. Samples are numbered through all shards, so
their counts must be known before: from the `manifest.json` beside the shards, or by downloading
each shard once. The cache remembers the counts.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys
from neuclip.data.captions import CaptionRule
from neuclip.data.order import Layout
from neuclip.data.progress import Progress
from neuclip.data.remote.cache import GIB, RemoteShard, ShardCache
from neuclip.data.remote.fetch import Expected, fetch_text
from neuclip.data.remote.manifest import MANIFEST, ShardEntry, parse_manifest
from neuclip.data.remote.prefetch import Prefetcher
from neuclip.data.remote.transport import PIPE, FetchError, check_addresses
from neuclip.data.samples import Damage, Sample, SampleError, Tally
from neuclip.data.sources.shards import ShardIndex, build_index
from neuclip.data.sources.source import ImageT, Source
from neuclip.errors import UserError, quantity
from neuclip.files import replacing
from neuclip.masking import mask
from neuclip.untrusted import read_json

WINDOW = 16
"""Shards shuffled together by default.

At 10,000 samples each, the window is thirty times open_clip's shuffle buffer.
"""

_LARGEST_SHUFFLE = 2**26  # samples; their order takes 1.5 GB for a moment
_OPEN_SHARDS = 256  # limit of open shards in each process
_SAME_START = 30.0  # seconds: a more recent failure is from another process of this run
_AT_ONCE = 4  # simultaneous downloads for counting
_log = logging.getLogger(__name__)


class RemoteShards(Source):
    """Samples of remote shards; created by `open_remote`.

    Attributes:
        captions_required: whether a sample without a caption is corrupt.
    """

    captions_required: bool = True

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        cache: ShardCache,
        reading: ReadingConfig,
        damage: tuple[Damage, ...] = (),
    ) -> None:
        """Sets up reading.

        Args:
            shards: shards with known numbers of samples, in the order of the samples.
            cache: where shards are downloaded to.
            reading: how to read them.
            damage: corrupt shards and samples, which are left out.
        """
        self._shards, self._cache, self._reading = tuple(shards), cache, reading
        self.damage = damage
        self.shuffle_window = WINDOW if reading.shuffle_window is None else reading.shuffle_window
        self.layout = Layout.of(shards[0].url, [shard.samples or 0 for shard in shards])
        self._kept = min(self.shuffle_window or len(shards), _OPEN_SHARDS)
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._keys_checked = False
        self._owner = os.getpid()
        self._prefetcher = Prefetcher(cache, shards)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_open": OrderedDict(), "_prefetcher": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._prefetcher = Prefetcher(self._cache, self._shards)

    def _content(self, position: int) -> Sample[bytes]:
        return self._of_shard(position, ShardIndex.content)

    def _texts(self, position: int) -> Sample[None]:
        return self._of_shard(position, ShardIndex.texts)

    def _of_shard(
        self, position: int, read: Callable[[ShardIndex, int], Sample[ImageT]]
    ) -> Sample[ImageT]:
        """A sample of a shard, whose damage names the address."""
        block = self.layout.block(position)
        index = self._index(block)
        try:
            return read(index, position - int(self.layout.starts[block]))
        except SampleError as error:
            found = replace(error.damage, shard=mask(self._shards[block].url))
            raise SampleError(found) from error.__cause__

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Address of the shard, and the key of a sample if the shard can be downloaded."""
        block = self.layout.block(position)
        place = mask(self._shards[block].url)
        try:
            return place, self._index(block).locate(position - int(self.layout.starts[block]))[1]
        except SampleError:
            return place, ""

    def file_of(self, position: int) -> str:
        """The address of the shard; nothing is downloaded."""
        return self._shards[self.layout.block(position)].url

    def first_captions(self, samples: int = 20) -> list[tuple[str, ...]]:
        """Nothing: no shard is downloaded for a description."""
        return []

    def files(self) -> list[str]:
        """The addresses of the shards."""
        return [shard.url for shard in self._shards]

    def sample_id(self, position: int) -> int:
        """Stable id of one sample: its position, or its integer key."""
        if self._reading.data_size is None:
            return position
        block = self.layout.block(position)
        return self._index(block).sample_id(position - int(self.layout.starts[block]))

    def expect(self, blocks: Sequence[int]) -> None:
        """Prefetches these shards."""
        self._prefetcher.want(blocks)

    def close(self) -> None:
        """Ends prefetching, and releases the shards in use."""
        self._prefetcher.close()
        self._open.clear()

    def _index(self, block: int) -> ShardIndex:
        """The index of a shard, downloaded if it is missing; raises `SampleError`."""
        if self._owner != os.getpid():
            # A fork shares its parent's locks and would hold them after the parent released them.
            self._owner = os.getpid()
            self._open.clear()
        opened = self._open.pop(block, None) or self._opened(block)
        self._open[block] = opened
        if len(self._open) > self._kept:
            self._open.popitem(last=False)
        return opened.index

    def _opened(self, block: int) -> "_Opened":
        shard = self._shards[block]
        try:
            lease = self._cache.lease(shard)
        except FetchError as error:
            raise SampleError(Damage(shard.url, "", "shard", f"not reachable: {error}")) from error
        try:
            required = self.captions_required
            index = _index_of(lease.path, self._reading, captions_required=required)
        except UserError as error:
            raise SampleError(Damage(shard.url, "", "shard_changed", str(error))) from error
        if not self._keys_checked:  # of the first shard: others are not downloaded for it
            AnnotationKeys.of(self._reading).check(index.record, len(index), mask(shard.url))
            self._keys_checked = True
        if len(index) != shard.samples:
            detail = f"{len(index)} samples instead of the {shard.samples} counted before"
            raise SampleError(Damage(shard.url, "", "shard_changed", detail))
        return _Opened(lease, index)


def _index_of(path: Path, reading: ReadingConfig, *, captions_required: bool) -> ShardIndex:
    """The index of one downloaded shard; raises `UserError` if it holds no sample."""
    return build_index(
        [path],
        captions=CaptionRule.of(reading, required=captions_required),
        keys=AnnotationKeys.of(reading),
        data_size=reading.data_size,
    )


class _Opened:
    """An open shard, which stays in the cache as long as this object exists."""

    def __init__(self, lease: object, index: ShardIndex) -> None:
        self._lease, self.index = lease, index


def open_remote(
    urls: Sequence[str],
    cache: ShardCache,
    reading: ReadingConfig,
    progress: Progress | None = None,
) -> RemoteShards:
    """Counts the samples of remote shards, and opens them as a source.

    Args:
        urls: addresses (`http`, `https`, or a scheme of fsspec) or `pipe:` commands.
        cache: where shards are downloaded to.
        reading: how to read them.
        progress: called for each shard.

    Raises:
        UserError: an address cannot be opened, there are no samples, or the cache is too small.
    """
    check_addresses(urls, allow_pipe=reading.allow_pipe)
    cache.forget_failures(_SAME_START)
    known = _from_manifests(urls, cache)
    counted: list[_Counted] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        work = pool.map(lambda url: _count(url, known.get(url), cache, reading), urls)
        for done, result in enumerate(work):
            if progress is not None:
                progress("indexing", done, len(urls))
            counted.append(result)
    damage = tuple(damage for result in counted for damage in result.damage)
    for found in damage:
        _log.warning("%s", found)
    shards = [result.shard for result in counted]
    if not any(shard.samples for shard in shards):
        reasons = "".join(f"\n  {found}" for found in damage[:5])
        raise UserError(
            f"no samples in {quantity(len(urls), 'remote shard')}, {urls[0]} first:{reasons}"
        )
    source = RemoteShards(shards, cache, reading, damage)
    tally = Tally("members")
    for result in counted:
        tally.merge(result.tally)
    source.unused = tally.lines()
    _check_room(shards, cache, source.shuffle_window)
    return source


def _check_room(shards: Sequence[RemoteShard], cache: ShardCache, window: int) -> None:
    """Refuses a cache without room for two windows: one being read, one being prefetched.

    Raises:
        UserError: there is no room, or a window has more samples than memory: a manifest may claim
            any number.
    """
    numbers = sorted((shard.samples or 0 for shard in shards), reverse=True)
    together = sum(numbers[:window] if window else numbers)
    if together > _LARGEST_SHUFFLE:
        raise UserError(
            f"up to {together:,} samples would be shuffled together, more than "
            f"{_LARGEST_SHUFFLE:,}: set a smaller --shuffle-window, or check manifest.json"
        )
    sizes = sorted((shard.expected.size or 0 for shard in shards), reverse=True)
    needed = sum(sizes[: 2 * window] if window else sizes)
    if needed > cache.limit:
        what = f"two windows of {window} shards" if window else "all shards, shuffled as one"
        raise UserError(
            f"--cache-size-gb {cache.limit / GIB:g} is too small: {what} take up to "
            f"{needed / GIB:.3g} GiB. Raise it, or set a smaller --shuffle-window"
        )


@dataclass(frozen=True)
class _Counted:
    """A shard with its number of samples; 0 if it cannot be downloaded."""

    shard: RemoteShard
    damage: tuple[Damage, ...] = ()
    tally: Tally = field(default_factory=lambda: Tally("members"))


def _count(
    url: str, known: ShardEntry | None, cache: ShardCache, reading: ReadingConfig
) -> _Counted:
    if known is not None:
        return _Counted(RemoteShard(url, Expected(known.size, known.sha256), known.samples))
    in_json = CaptionRule.of(reading).json_keys  # samples are counted by their caption files
    identity = hashlib.sha256(f"{url}\n{';'.join(in_json) or None}".encode()).hexdigest()[:32]
    note = cache.folder / ".counted" / f"{identity}.json"
    try:
        entry = read_json(note)
        damage = tuple(Damage(**each) for each in entry["damage"])
        shard = RemoteShard(url, Expected(entry["size"]), entry["samples"])
        return _Counted(shard, damage, Tally(**entry.get("tally", {"unit": "members"})))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not counted yet
    shard = RemoteShard(url, samples=0)
    try:
        lease = cache.lease(shard)
    except FetchError as error:
        return _Counted(shard, (Damage(mask(url), "", "shard", f"not reachable: {error}"),))
    try:
        size = lease.path.stat().st_size
        samples, damage, tally = _indexed(url, lease.path, reading)
    finally:
        lease.release()
    content = {"damage": [vars(each) for each in damage], "tally": vars(tally)}
    _write(note, {"size": size, "samples": samples, **content})
    # A command may output other bytes for the same content, so its size is not checked.
    expected = Expected() if url.startswith(PIPE) else Expected(size)
    return _Counted(RemoteShard(url, expected, samples), damage, tally)


def _indexed(url: str, path: Path, reading: ReadingConfig) -> tuple[int, tuple[Damage, ...], Tally]:
    """Number of samples, damage and members of a downloaded shard."""
    try:
        index = build_index([path], captions=CaptionRule.of(reading))
    except UserError as error:
        reason = str(error).replace(str(path), url).splitlines()[-1].strip()
        return 0, (Damage(mask(url), "", "shard", reason),), Tally("members")
    damage = tuple(replace(found, shard=mask(url)) for found in index.damage)
    return len(index), damage, index.tally


def _from_manifests(urls: Sequence[str], cache: ShardCache) -> dict[str, ShardEntry]:
    """The entries of the manifests beside the shards, by address."""
    known: dict[str, ShardEntry] = {}
    folders: dict[str, dict[str, ShardEntry]] = {}
    for url in urls:
        if url.startswith(PIPE):
            continue
        folder, _, _ = url.partition("?")[0].rpartition("/")
        if folder not in folders:
            folders[folder] = _manifest(f"{folder}/{MANIFEST}", cache)
        entry = folders[folder].get(RemoteShard(url).name)
        if entry is not None:
            known[url] = entry
    return known


def _manifest(url: str, cache: ShardCache) -> dict[str, ShardEntry]:
    """A manifest; without a network, the copy that the cache keeps."""
    identity = hashlib.sha256(url.encode()).hexdigest()[:32]
    copy = cache.folder / ".counted" / f"{identity}.manifest"
    try:
        text = fetch_text(url, cache.retry)
    except FetchError as error:
        _log.warning("%s: %s", url, error)
        text = copy.read_bytes() if copy.exists() else None
    if text is None:
        return {}
    try:
        entries = parse_manifest(text)
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None
    _write(copy, text)
    return entries


def _write(path: Path, content: bytes | dict[str, object]) -> None:
    """Writes a small file in one piece."""
    with replacing(path, durable=False) as file:
        file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
