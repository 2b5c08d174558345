"""Writing tar shards in the webdataset layout, in folders that appear only when complete."""

import io
import os
import shutil
import tarfile
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

_STALE_SECONDS = 600  # without a change: a leftover of a killed process, not one at work


@contextmanager
def appearing_when_complete(out: Path) -> Generator[Path]:
    """A folder to fill that takes the name `out` at the end, and goes away on any failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{out.name}.partial-*"):
        if time.time() - old.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "new").mkdir(parents=True)
    try:
        yield staging / "new"
        if out.exists():
            out.rename(staging / "old")
        (staging / "new").rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_shards(
    folder: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], per_shard: int
) -> dict[str, int]:
    """Make `folder` and write `00000.tar`, `00001.tar`, ... into it.

    The bytes depend on the samples alone: owner, mode and time of every member are constants.

    Args:
        folder: must not exist.
        samples: pairs of key and members by extension (`{"png": ..., "txt": ...}`).
        per_shard: samples in every shard but the last.

    Returns:
        Sizes of the shards in bytes, by file name.
    """
    folder.mkdir()
    sizes: dict[str, int] = {}
    remaining = iter(samples)
    while part := list(islice(remaining, per_shard)):
        shard = folder / f"{len(sizes):05d}.tar"
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, members in part:
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        sizes[shard.name] = shard.stat().st_size
    return sizes
