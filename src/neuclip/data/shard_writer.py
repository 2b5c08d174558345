"""Writes tar shards in the webdataset layout."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path


def write_shards(
    folder: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], per_shard: int
) -> dict[str, int]:
    """Creates `folder` and writes `00000.tar`, `00001.tar`, ... into it.

    The bytes depend only on the samples: owner, mode and time of every member are constants.

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
                add_sample(tar, key, members)
        sizes[shard.name] = shard.stat().st_size
    return sizes


def add_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, bytes]) -> None:
    """Adds the members of one sample, given by extension, to an open tar file."""
    for extension, content in members.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
