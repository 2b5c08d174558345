"""Shards on other machines: read from a cache that is filled ahead of use.

A shard is fetched whole when it is needed, and its index is made then. How many samples it holds
must be known before, since samples are numbered through all shards: from the `manifest.json` beside
the shards, or by fetching each shard once, which is remembered in the cache.
"""

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from neuclip.config.sections import ReadingConfig
from neuclip.data.order import Layout
from neuclip.data.remote.cache import GIB, RemoteShard, ShardCache
from neuclip.data.remote.fetch import Expected, fetch_text
from neuclip.data.remote.manifest import MANIFEST, ShardEntry, parse_manifest
from neuclip.data.remote.prefetch import FetchingAhead
from neuclip.data.remote.transport import PIPE, FetchError, check_scheme
from neuclip.data.samples import Damage, SampleError
from neuclip.data.sources.shards import ShardIndex, build_index
from neuclip.data.sources.source import Content, Source
from neuclip.errors import UserError
from neuclip.files import replacing

WINDOW = 16
"""Shards shuffled together: at 10,000 samples each, thirty times open_clip's shuffle buffer."""

_OPEN_SHARDS = 256  # kept open by each process, where the window is larger
_SAME_START = 30.0  # seconds: a failure since then was met by another process of this run
_AT_ONCE = 4  # shards fetched at the same time to be counted
_log = logging.getLogger(__name__)


class RemoteShards(Source):
    """Samples of remote shards; make one with `open_remote`."""

    def __init__(
        self,
        shards: Sequence[RemoteShard],
        cache: ShardCache,
        reading: ReadingConfig,
        damage: tuple[Damage, ...] = (),
    ) -> None:
        """Shards whose numbers of samples are known.

        Args:
            shards: in the order in which their samples are numbered.
            cache: where they are fetched to.
            reading: how to read them.
            damage: shards that are left out.
        """
        self._shards, self._cache, self._reading = tuple(shards), cache, reading
        self.damage = damage
        self.shuffle_window = WINDOW if reading.shuffle_window is None else reading.shuffle_window
        self.layout = Layout.of(shards[0].url, [shard.samples or 0 for shard in shards])
        self._kept = min(self.shuffle_window or len(shards), _OPEN_SHARDS)
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._owner = os.getpid()
        self._ahead = FetchingAhead(cache, shards)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_open": OrderedDict(), "_ahead": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._ahead = FetchingAhead(self._cache, self._shards)

    def content(self, position: int) -> Content:
        """One sample as it is stored; see `Source.content`."""
        block = self.layout.block(position)
        index = self._index(block)
        try:
            return index.content(position - int(self.layout.starts[block]))
        except SampleError as error:
            known = replace(error.damage, shard=self._shards[block].url)
            raise SampleError(known) from error.__cause__

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Address of the shard, and the key of a sample, if the shard can be had."""
        block = self.layout.block(position)
        url = self._shards[block].url
        try:
            return url, self._index(block).locate(position - int(self.layout.starts[block]))[1]
        except SampleError:
            return url, ""

    def files(self) -> list[str]:
        """The addresses of the shards."""
        return [shard.url for shard in self._shards]

    def sample_id(self, position: int) -> int:
        """The id of a sample: its position, or its integer key."""
        if self._reading.data_size is None:
            return position
        block = self.layout.block(position)
        return self._index(block).sample_id(position - int(self.layout.starts[block]))

    def expect(self, blocks: Sequence[int]) -> None:
        """Fetch these shards ahead of use."""
        self._ahead.want(blocks)

    def close(self) -> None:
        """End the fetching in the background, and give up the shards held here."""
        self._ahead.close()
        self._open.clear()

    def _index(self, block: int) -> ShardIndex:
        """The index of a shard, which is fetched if it must be; raises `SampleError`."""
        if self._owner != os.getpid():
            # A fork shares its parent's locks, which would outlast the parent's interest.
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
            index = _index_of(lease.path, self._reading)
        except UserError as error:
            raise SampleError(Damage(shard.url, "", "shard_changed", str(error))) from error
        if len(index) != shard.samples:
            detail = f"it holds {len(index)} samples instead of the {shard.samples} counted before"
            raise SampleError(Damage(shard.url, "", "shard_changed", detail))
        return _Opened(lease, index)


def _index_of(path: Path, reading: ReadingConfig) -> ShardIndex:
    """The index of one downloaded shard; raises `UserError` if it holds no sample."""
    return build_index([path], caption_key=reading.caption_key, data_size=reading.data_size)


class _Opened:
    """A shard that is being read, and stays in the cache for as long as this lives."""

    def __init__(self, lease: object, index: ShardIndex) -> None:
        self._lease, self.index = lease, index


def open_remote(
    urls: Sequence[str],
    cache: ShardCache,
    reading: ReadingConfig,
    progress: Callable[[int, int], None] | None = None,
) -> RemoteShards:
    """Counts the samples of remote shards, and makes a source of them.

    Args:
        urls: addresses (`http`, `https`, whatever fsspec opens) or `pipe:` commands.
        cache: where shards are fetched to.
        reading: how to read them.
        progress: called with the number of shards counted and of all.

    Raises:
        UserError: an address cannot be opened, no shard holds a sample, or the cache is too small.
    """
    for scheme in {url.partition("://")[0]: url for url in urls}.values():
        check_scheme(scheme)
    cache.forget_failures(_SAME_START)
    known = _from_manifests(urls, cache)
    counted: list[_Counted] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        work = pool.map(lambda url: _count(url, known.get(url), cache, reading), urls)
        for done, result in enumerate(work):
            if progress is not None:
                progress(done, len(urls))
            counted.append(result)
    damage = tuple(damage for result in counted for damage in result.damage)
    for found in damage:
        _log.warning("%s", found)
    shards = [result.shard for result in counted]
    if not any(shard.samples for shard in shards):
        reasons = "".join(f"\n  {found}" for found in damage[:5])
        raise UserError(f"no samples in {len(urls)} remote shard(s), {urls[0]} first:{reasons}")
    source = RemoteShards(shards, cache, reading, damage)
    _check_room(shards, cache, source.shuffle_window)
    return source


def _check_room(shards: Sequence[RemoteShard], cache: ShardCache, window: int) -> None:
    """Two windows must fit: the one that is read, and the one that is fetched meanwhile."""
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
    """A shard with its number of samples, 0 where it cannot be had."""

    shard: RemoteShard
    damage: tuple[Damage, ...] = ()


def _count(
    url: str, known: ShardEntry | None, cache: ShardCache, reading: ReadingConfig
) -> _Counted:
    if known is not None:
        return _Counted(RemoteShard(url, Expected(known.size, known.sha256), known.samples))
    identity = hashlib.sha256(f"{url}\n{reading.caption_key}".encode()).hexdigest()[:32]
    note = cache.folder / ".counted" / f"{identity}.json"
    try:
        entry = json.loads(note.read_text(encoding="utf-8"))
        damage = tuple(Damage(**each) for each in entry["damage"])
        return _Counted(RemoteShard(url, Expected(entry["size"]), entry["samples"]), damage)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not counted yet
    shard = RemoteShard(url, samples=0)
    try:
        lease = cache.lease(shard)
    except FetchError as error:
        return _Counted(shard, (Damage(url, "", "shard", f"not reachable: {error}"),))
    try:
        size = lease.path.stat().st_size
        samples, damage = _samples_and_damage(url, lease.path, reading)
    finally:
        lease.release()
    _write(note, {"size": size, "samples": samples, "damage": [vars(each) for each in damage]})
    # A command may print other bytes of the same content: its size is no promise.
    expected = Expected() if url.startswith(PIPE) else Expected(size)
    return _Counted(RemoteShard(url, expected, samples), damage)


def _samples_and_damage(
    url: str, path: Path, reading: ReadingConfig
) -> tuple[int, tuple[Damage, ...]]:
    try:
        index = build_index([path], caption_key=reading.caption_key)
    except UserError as error:
        reason = str(error).replace(str(path), url).splitlines()[-1].strip()
        return 0, (Damage(url, "", "shard", reason),)
    return len(index), tuple(replace(found, shard=url) for found in index.damage)


def _from_manifests(urls: Sequence[str], cache: ShardCache) -> dict[str, ShardEntry]:
    """What the manifests beside the shards say, by address."""
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
    """A manifest, or the copy of it from before when the network is down."""
    identity = hashlib.sha256(url.encode()).hexdigest()[:32]
    copy = cache.folder / ".counted" / f"{identity}.manifest"
    try:
        text = fetch_text(url, cache.patience)
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
