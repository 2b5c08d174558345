"""A cache folder that others can write to: planted links, and notes with strange times."""

import os
import time

import pytest

from neuclip.data.remote.cache import RemoteShard, ShardCache
from neuclip.data.remote.fetch import Expected
from neuclip.data.remote.transport import FetchError


@pytest.fixture
def shard(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"content")
    return RemoteShard(f"pipe:cat {tmp_path / '0.tar'}")


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 10**9)


@pytest.mark.parametrize("name", ["{}.partial", "{}.partial.size", ".locks/{}"])
def test_no_planted_link_is_written_through(cache, shard, tmp_path, name):
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    link = cache.folder / name.format(cache.path(shard).name)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(theirs)
    with pytest.raises(OSError, match="symbolic links"):
        cache.fetch(RemoteShard(shard.url, Expected(size=7)))
    assert theirs.read_text() == "theirs"


@pytest.mark.parametrize(
    ("age", "kept_out"), [(0, True), (-5, True), (-(10**6), False), (10**6, False)]
)
def test_a_failure_is_forgotten_whatever_the_clock_does(cache, shard, age, kept_out):
    """One from the future, by a clock that was ahead, keeps a shard out no longer than others."""
    failed = cache.path(shard).with_name(cache.path(shard).name + ".failed")
    failed.parent.mkdir()
    failed.write_text("HTTP 404")
    os.utime(failed, (time.time() - age,) * 2)
    if kept_out:
        with pytest.raises(FetchError, match="404"):
            cache.fetch(shard)
    else:
        assert cache.fetch(shard) and cache.path(shard).read_bytes() == b"content"
