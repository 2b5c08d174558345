"""Atomic checkpoints in open_clip's layout, read back without unpickling code.

A checkpoint is a dict of plain values and tensors: `epoch`, `name`, `state_dict` and `optimizer`
as open_clip and the DataComp tools read them, and `neuclip`, what an exact resume needs beside.

`SHA256SUMS` in the same folder has a line per checkpoint, as sha256sum reads it. The line is
written before the file appears, so a complete file always has one.
"""

import hashlib
import logging
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from neuclip.checkpoint import sharded
from neuclip.checkpoint.common import (
    SUMS,
    CheckpointError,
    checkpoints_in,
    neighbours,
    not_plain,
    not_written,
    remove,
)
from neuclip.files import describe, sha256, write_whole
from neuclip.parallel import fsdp
from neuclip.run_folder import LATEST

log = logging.getLogger("neuclip")

_STEP_NAME = re.compile(r"iter_(\d+)(\.pt)?$")
_SUMS_KEPT = (
    4  # newest lines that stay whatever is deleted: `epoch_latest.pt` is one of those files
)


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint: the file is complete or not there at all.

    Raises:
        CheckpointError: no space, or no right to write; an older file of that name is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            hashing = _HashingFile(file)
            torch.save(content, hashing)  # pyright: ignore[reportArgumentType]  it needs `write`
            file.flush()
            os.fsync(file.fileno())
        _note_sum(path, hashing.digest())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and not _is_write_failure(error):
            raise
        raise not_written(path, error) from None


def point_latest_at(path: Path) -> None:
    """Makes `epoch_latest.pt` the same file as `path`: a hard link, or a copy.

    Of a sharded checkpoint, `epoch_latest` is a symbolic link. There is only one of the two.
    """
    file, folder = path.with_name(LATEST), path.with_name(Path(LATEST).stem)
    latest, other = (folder, file) if path.is_dir() else (file, folder)
    partial = path.with_name(f".{latest.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        if path.is_dir():
            partial.symlink_to(path.name)
        else:
            os.link(path, partial)
    except OSError:
        if path.is_dir():
            raise
        partial.write_bytes(path.read_bytes())
    partial.replace(latest)
    other.unlink(missing_ok=True)


def drop_old_step_checkpoints(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` step checkpoints."""
    numbered = sorted(
        (int(match[1]), path)
        for path in folder.glob("iter_*")
        if (match := _STEP_NAME.fullmatch(path.name))
    )
    for _, path in numbered[:-keep]:
        remove(path)
    sums = folder / SUMS
    if sums.exists():
        lines = sums.read_text(encoding="utf-8").splitlines(keepends=True)
        old = [line for line in lines[:-_SUMS_KEPT] if (folder / line.split()[-1]).exists()]
        write_whole(sums, "".join(old + lines[-_SUMS_KEPT:]))


def newest_complete(folder: Path) -> Path | None:
    """The checkpoint of a run that went furthest; damaged ones are left out with a warning."""
    if not folder.is_dir():
        return None
    # Checkpoints are written in the order of steps: the newest that is whole went furthest.
    found = checkpoints_in(folder)
    for path in sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            sharded.check(path) if path.is_dir() else load(path)
        except CheckpointError as error:
            log.warning("left out: %s", error)
        else:
            return path
    return None


class _HashingFile:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Writes and hashes."""
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()

    def digest(self) -> str:
        """SHA-256 of all that was written."""
        return self._hash.hexdigest()


def _note_sum(path: Path, digest: str) -> None:
    with (path.parent / SUMS).open("a", encoding="utf-8") as file:
        file.write(f"{digest}  {path.name}\n")
        file.flush()
        os.fsync(file.fileno())


def _check_sum(path: Path) -> None:
    """Compares a file with the sums beside it; a file taken elsewhere has none.

    Raises:
        CheckpointError: the file is none of those that were written.
    """
    sums = path.parent / SUMS
    if not sums.exists():
        return
    known = {line.split()[0] for line in sums.read_text(encoding="utf-8").splitlines() if line}
    if sha256(path) not in known:
        raise CheckpointError(
            f"checkpoint {path} is damaged or incomplete ({path.stat().st_size:,} bytes): its "
            f"SHA-256 is none of those in {sums.name}{neighbours(path)}"
        )


def load(
    path: Path, *, bare: bool = False, live: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, with `weights_only=True`.

    Args:
        path: the file, or the folder of a sharded checkpoint.
        bare: take a file of weights alone, too, as the `state_dict`.
        live: of a sharded checkpoint, tensors to read only this process's part of (see
            `sharded_checkpoint.load`).

    Raises:
        CheckpointError: missing, truncated or damaged, or a pickle of arbitrary objects.
    """
    if path.is_dir():
        return sharded.load(path, live)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}{neighbours(path)}")
    with path.open("rb") as file:
        is_pickle = file.read(1) == b"\x80"
    if is_pickle:
        raise not_plain(path, "it is a bare pickle")
    _check_sum(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise not_plain(path, describe(error)) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or incomplete ({path.stat().st_size:,} bytes): "
            f"{describe(error)}{neighbours(path)}"
        ) from None
    if bare and isinstance(content, dict) and _are_weights(content):
        return {"state_dict": content}
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"checkpoint {path} has no 'state_dict': not a training checkpoint")
    return content


def _are_weights(content: dict[str, Any]) -> bool:
    return bool(content) and all(isinstance(v, torch.Tensor) for v in content.values())


def load_weights(towers: torch.nn.Module, content: dict[str, Any], path: Path) -> None:
    """Puts a checkpoint's weights into the towers.

    Raises:
        CheckpointError: the checkpoint belongs to another architecture; names what differs.
    """
    weights = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    live = towers.state_dict()
    expected = {key: tuple(value.shape) for key, value in live.items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if expected != found:
        missing = sorted(expected.keys() - found.keys())
        extra = sorted(found.keys() - expected.keys())
        other = sorted(k for k in expected.keys() & found.keys() if expected[k] != found[k])
        details = [
            f"{len(names)} {what} (first: {names[0]})"
            for what, names in (("missing", missing), ("unknown", extra), ("of other shape", other))
            if names
        ]
        raise CheckpointError(
            f"checkpoint {path} is of another architecture: weights {', '.join(details)}; "
            "give the --model (in judging: --arch) it was trained with"
        )
    towers.load_state_dict(
        {key: fsdp.shard_like(weights[key], value) for key, value in live.items()}
    )


def load_loss(loss: torch.nn.Module, state: dict[str, Any], path: Path) -> None:
    """Puts a checkpoint's state of the loss (prototypes, tables, counters) back.

    Raises:
        CheckpointError: the state is of other settings, or of another version of the package.
    """
    try:
        loss.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint {path}: the state of its loss does not fit this run's method settings "
            f"(num_prototypes, data_size, ... must be those it was trained with): {reason}"
        ) from None


def _is_write_failure(error: RuntimeError) -> bool:
    # torch reports a failed write of its zip archive as a RuntimeError, not as the OSError it was.
    return any(
        word in str(error) for word in ("PytorchStreamWriter", "file write failed", "iostream")
    )
