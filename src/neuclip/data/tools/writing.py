"""Writing tar shards in the webdataset layout, in folders that appear only when complete."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path


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
