"""Checkpoints: written atomically in open_clip's layout, and read without unpickling code.

A checkpoint is a dict of tensors and plain values: `epoch`, `name`, `state_dict` and `optimizer`
as open_clip and the DataComp tools read them, and `neuclip`, the rest of what an exact resume
needs.

`SHA256SUMS` in the same folder lists the checkpoints in the format of sha256sum. A line is written
before its file appears, so every complete file has one.
"""

import hashlib
import logging
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

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
from neuclip.files import describe, partial_name, replacing, sha256
from neuclip.parallel import fsdp
from neuclip.run_folder import LATEST

log = logging.getLogger("neuclip")

_STEP_NAME = re.compile(r"iter_(\d+)(\.pt)?$")
_SUMS_KEPT = 4
"""The newest lines stay even if their files are deleted: `epoch_latest.pt` is one of the files."""


# --- writing --------------------------------------------------------------------------------


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint. The file appears when it is complete.

    Raises:
        CheckpointError: disk full or permission denied; an older file of that name is untouched.
    """
    try:
        with replacing(path) as file:
            hashing = _HashingFile(file)
            torch.save(content, hashing)  # pyright: ignore[reportArgumentType]  it needs `write`
            _append_sum(path, hashing.digest())
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_write_failure(error):
            raise
        raise not_written(path, error) from None


def point_latest_at(path: Path) -> None:
    """Makes `epoch_latest.pt` the same file as `path`: a hard link, or a copy.

    For a sharded checkpoint, `epoch_latest` is a symbolic link. Only one of the two names exists.

    Raises:
        OSError: disk full or permission denied.
    """
    file, folder = path.with_name(LATEST), path.with_name(Path(LATEST).stem)
    latest, other = (folder, file) if path.is_dir() else (file, folder)
    link = partial_name(latest)
    link.unlink(missing_ok=True)
    try:
        if path.is_dir():
            link.symlink_to(path.name)
        else:
            os.link(path, link)
        link.replace(latest)
    except OSError:
        if path.is_dir():
            raise
        with path.open("rb") as source, replacing(latest) as copy:
            shutil.copyfileobj(source, copy)
    other.unlink(missing_ok=True)


def drop_old_step_checkpoints(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` step checkpoints, and their lines in `SHA256SUMS`."""
    numbered = sorted(
        (int(match[1]), path)
        for path in folder.glob("iter_*")
        if (match := _STEP_NAME.fullmatch(path.name))
    )
    for _, path in numbered[:-keep]:
        remove(path)
    lines = _sum_lines(folder)
    if lines is not None:
        old = [line for line in lines[:-_SUMS_KEPT] if (folder / line.split()[-1]).exists()]
        _write_sums(folder, [*old, *lines[-_SUMS_KEPT:]])


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
        """SHA-256 of everything written so far."""
        return self._hash.hexdigest()


def _sum_lines(folder: Path) -> list[str] | None:
    """The lines of `SHA256SUMS`; none if there is no such file."""
    sums = folder / SUMS
    if not sums.exists():
        return None
    return [line for line in sums.read_text(encoding="utf-8").splitlines() if line]


def _append_sum(path: Path, digest: str) -> None:
    _write_sums(path.parent, [*(_sum_lines(path.parent) or ()), f"{digest}  {path.name}"])


def _write_sums(folder: Path, lines: list[str]) -> None:
    with replacing(folder / SUMS) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())


def _is_write_failure(error: RuntimeError) -> bool:
    # torch reports a failed write of its zip archive as a RuntimeError instead of the OSError.
    return any(
        word in str(error) for word in ("PytorchStreamWriter", "file write failed", "iostream")
    )


# --- verifying ------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose content matches its checksums: `load` does not hash it again.

    One process verifies a checkpoint and sends this to the others, which only read.

    Attributes:
        path: its file, or its folder if it is sharded.
    """

    path: Path


def verify(path: Path) -> VerifiedCheckpoint:
    """Compares a checkpoint with its checksums. A file from elsewhere, without sums, passes.

    Raises:
        CheckpointError: missing, or the content differs from what was written.
    """
    if path.is_dir():
        sharded.verify(path)
        return VerifiedCheckpoint(path)
    _check_exists(path)
    lines = _sum_lines(path.parent)
    # By content, not by name: `epoch_latest.pt` has no line of its own.
    if lines is not None and sha256(path) not in {line.split()[0] for line in lines}:
        raise _damaged(path, f"its SHA-256 is none of those in {SUMS}")
    return VerifiedCheckpoint(path)


def newest_complete(folder: Path) -> VerifiedCheckpoint | None:
    """Finds the checkpoint of a run that went furthest; warns of damaged ones and skips them.

    The content is hashed, not loaded. A file without sums is read through for the checksums of its
    zip archive.
    """
    if not folder.is_dir():
        return None
    # Checkpoints are written in the order of steps: the newest complete one went furthest.
    found = checkpoints_in(folder)
    for path in sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            if path.is_file() and _sum_lines(folder) is None:
                _verify_zip(path)
            return verify(path)
        except CheckpointError as error:
            log.warning("left out: %s", error)
    return None


def _verify_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise _damaged(path, describe(error)) from None
    if broken is not None:
        raise _damaged(path, f"wrong checksum of {broken}")


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}{neighbours(path)}")


def _damaged(path: Path, why: str) -> CheckpointError:
    size = f"{path.stat().st_size:,} bytes"
    return CheckpointError(
        f"checkpoint {path} is damaged or incomplete ({size}): {why}{neighbours(path)}"
    )


# --- reading --------------------------------------------------------------------------------


def load(
    checkpoint: Path | VerifiedCheckpoint,
    *,
    bare: bool = False,
    live: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU, with `weights_only=True`.

    Args:
        checkpoint: the file, or the folder of a sharded checkpoint; verified first if it is a path.
        bare: accept a file of weights alone, and return it as the `state_dict`.
        live: for a sharded checkpoint, tensors of which only this rank's shard is read (see
            `sharded.load`).

    Raises:
        CheckpointError: missing, truncated or damaged, or a pickle of arbitrary objects.
    """
    path = checkpoint if isinstance(checkpoint, Path) else checkpoint.path
    _check_exists(path)
    if path.is_file() and _is_bare_pickle(path):
        raise not_plain(path, "it is a bare pickle")
    if isinstance(checkpoint, Path):
        verify(path)
    if path.is_dir():
        return sharded.load(path, live)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise not_plain(path, describe(error)) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise _damaged(path, describe(error)) from None
    if bare and isinstance(content, dict) and _are_weights(content):
        return {"state_dict": content}
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"checkpoint {path} has no 'state_dict': not a training checkpoint")
    return content


def _is_bare_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _are_weights(content: dict[str, Any]) -> bool:
    return bool(content) and all(isinstance(value, Tensor) for value in content.values())


def load_weights(towers: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copies weights into the towers, which may be sharded.

    Args:
        towers: the model.
        weights: by open_clip's names, full or sharded.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: the weights belong to another architecture; names what differs.
    """
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
            "give the --model (for evaluation: --arch) it was trained with"
        )
    towers.load_state_dict(
        {key: fsdp.shard_like(weights[key], value) for key, value in live.items()}
    )


def load_loss(loss: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Loads the state of a loss: prototypes, tables, counters.

    Raises:
        CheckpointError: the state belongs to other settings, or to another version of the package.
    """
    try:
        loss.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint {path}: the state of its loss does not fit this run's method settings "
            f"(num_prototypes, data_size, ... must be those it was trained with): {reason}"
        ) from None
