"""Checkpoints: written atomically in open_clip's layout, and read without unpickling code.

A checkpoint is a dict of tensors and plain values: `epoch`, `name`, `state_dict` and `optimizer`
as open_clip and the DataComp tools read them, and `neuclip`, the rest of what an exact resume
needs.

`SHA256SUMS` in the same folder lists the checkpoints in the format of sha256sum. A line is written
before its file appears, so every complete file has one.
"""

import contextlib
import hashlib
import logging
import os
import pickle
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from neuclip.checkpoint import formats, sharded
from neuclip.checkpoint.common import (
    SUMS,
    VALUES,
    CheckpointError,
    checkpoints_in,
    damaged,
    neighbours,
    not_written,
    read_sums,
    remove,
)
from neuclip.checkpoint.entries import OwnEntry, own_entry
from neuclip.errors import printable
from neuclip.files import describe, partial_name, replacing, sha256, system_error
from neuclip.first_bytes import ZIP, first_bytes
from neuclip.parallel import fsdp
from neuclip.run_folder import BEST, LATEST
from neuclip.untrusted import open_regular

log = logging.getLogger("neuclip")

_NAME = re.compile(r"(iter|epoch)_(\d+)(\.pt)?")
_SECOND_NAMES = {Path(name).stem for name in (LATEST, BEST)}
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError)
"""What torch raises for a file that it cannot map."""
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
            append_sum(path, hashing.digest())
    except (OSError, RuntimeError) as error:
        if system_error(error) is None:
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
        (int(match[2]), path)
        for path in folder.glob("iter_*")
        if (match := _NAME.fullmatch(path.name))
    )
    for _, path in numbered[:-keep]:
        remove(path)
    sums = read_sums(folder)
    if sums is not None:
        old = [(digest, name) for digest, name in sums[:-_SUMS_KEPT] if (folder / name).exists()]
        write_sums(folder, [*old, *sums[-_SUMS_KEPT:]])


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


def append_sum(path: Path, digest: str) -> None:
    """Adds the line of a file to `SHA256SUMS`."""
    write_sums(path.parent, [*(read_sums(path.parent) or ()), (digest, path.name)])


def write_sums(folder: Path, sums: list[tuple[str, str]]) -> None:
    """Replaces `SHA256SUMS` by digests and names."""
    with replacing(folder / SUMS) as file:
        file.write("".join(f"{digest}  {name}\n" for digest, name in sums).encode())


# --- verifying ------------------------------------------------------------------------------


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint whose content matches its checksums: `load` does not hash it again.

    One process verifies a checkpoint and sends this to the others, which only read.

    Attributes:
        path: its file, or its folder if it is sharded.
    """

    path: Path


def verify(path: Path, *, of_run: bool = False) -> VerifiedCheckpoint:
    """Compares a checkpoint with its checksums.

    Of a file from elsewhere, which has no sum, the checksums inside its zip archive are compared.
    Files of other formats have none and pass.

    Args:
        path: its file, or its folder if it is sharded.
        of_run: a run wrote it, so that no other format is possible.

    Raises:
        CheckpointError: missing, or the content differs from what was written.
    """
    _check_exists(path)
    if path.is_dir():
        sharded.verify(path)
        return VerifiedCheckpoint(path)
    known = _known_digests(path)
    if not known:
        if of_run or first_bytes(path).startswith(ZIP):
            _verify_zip(path)
        return VerifiedCheckpoint(path)
    try:
        digest = sha256(path)
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {describe(error)}") from None
    if digest not in known:
        raise damaged(path, f"its SHA-256 is none of those in {SUMS}")
    return VerifiedCheckpoint(path)


def _known_digests(path: Path) -> set[str]:
    """The digests that a file may have; none if `SHA256SUMS` does not list it.

    `epoch_latest.pt` has no line of its own: it is a second name of one of the files.
    """
    sums = read_sums(path.parent) or []
    return {digest for digest, name in sums if path.name in (name, LATEST)}


def furthest_complete(folder: Path) -> VerifiedCheckpoint | None:
    """Finds the checkpoint of a run that went furthest; warns of damaged ones and skips them.

    The step decides, not the file's time: a copied folder may have other times. The content is
    hashed, not loaded. A file without sums is read through for the checksums of its zip archive.
    Files that no run names so are left out.
    """
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in checkpoints_in(folder):
        match = _NAME.fullmatch(path.name)
        if match:
            kinds.setdefault(match[1], []).append((int(match[2]), path))
        elif path.stem in _SECOND_NAMES:
            kinds[path.stem] = [(0, path)]
        else:
            log.info("left out: %s is not named as a checkpoint of a run", path)
    for numbered in kinds.values():
        numbered.sort()
    while kinds := {kind: numbered for kind, numbered in kinds.items() if numbered}:
        kind = _furthest_kind(kinds)
        path = kinds[kind][-1][1]
        try:
            return verify(path, of_run=True)
        except CheckpointError as error:
            log.warning("left out: %s", error)
            kinds[kind].pop()
    return None


def _furthest_kind(kinds: Mapping[str, list[tuple[int, Path]]]) -> str:
    """The kind of name whose last checkpoint went furthest."""
    if len(kinds) == 1:
        return next(iter(kinds))
    return max(kinds, key=lambda kind: (saved_step(*kinds[kind][-1]), kind not in _SECOND_NAMES))


def saved_step(number: int, path: Path) -> int:
    """The step in a checkpoint, whose tensors are not read; the number in its name if it has none.

    A damaged one counts as the furthest, so that it is looked at, and reported.
    """
    try:
        content = _open_values(path)
    except _UNREADABLE:
        return sys.maxsize
    own = content.get("neuclip") if isinstance(content, dict) else None
    step = own.get("step") if isinstance(own, dict) else None
    return step if isinstance(step, int) else number


def read_own_entry(checkpoint: VerifiedCheckpoint) -> OwnEntry | None:
    """What only neuclip writes of a checkpoint; its tensors are mapped, not read.

    Returns:
        The entry; None if neuclip did not write the checkpoint.

    Raises:
        CheckpointError: damaged, or a value is not of the kind that neuclip writes.
    """
    path = checkpoint.path
    try:
        content = _open_values(path)
    except _UNREADABLE:
        content = read(checkpoint)  # says why, or reads what cannot be mapped
    return own_entry(content, path) if isinstance(content, dict) else None


def _open_values(path: Path) -> object:
    file = path / VALUES if path.is_dir() else path
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _verify_zip(path: Path) -> None:
    """Compares the checksums inside of a zip archive, which torch does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise damaged(path, describe(error)) from None
    except (NotImplementedError, RuntimeError, zlib.error) as error:  # as a flipped bit asks for
        raise damaged(path, describe(error)) from None
    if broken is not None:
        raise damaged(path, f"wrong checksum of {printable(broken)}")


def _check_exists(path: Path) -> None:
    """Checks that something has a name, and can be read.

    Raises:
        CheckpointError: it does not exist or cannot be read.
    """
    try:
        if not path.parent.is_dir():
            raise CheckpointError(f"no checkpoint at {path}: there is no folder {path.parent}")
        path.stat()
        with contextlib.nullcontext() if path.is_dir() else open_regular(path):
            return
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}{neighbours(path)}") from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds NUL
        name = printable(str(path), 200)
        raise CheckpointError(f"cannot read checkpoint {name}: {describe(error)}") from None


# --- reading --------------------------------------------------------------------------------


def load(
    checkpoint: Path | VerifiedCheckpoint, *, live: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Reads a training checkpoint onto the CPU; see `read`.

    Raises:
        CheckpointError: as in `read`, or the file is not a training checkpoint.
    """
    path = checkpoint if isinstance(checkpoint, Path) else checkpoint.path
    content = read(checkpoint, live=live)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"checkpoint {path} has no 'state_dict': not a training checkpoint")
    return cast(dict[str, Any], content)


def read(
    checkpoint: Path | VerifiedCheckpoint, *, live: Mapping[str, Tensor] | None = None
) -> object:
    """Reads a checkpoint or another file of weights onto the CPU, without running code.

    Args:
        checkpoint: the file, or the folder of a sharded checkpoint; verified first if it is a path.
        live: for a sharded checkpoint, tensors of which only this rank's shard is read (see
            `sharded.load`).

    Raises:
        CheckpointError: missing, truncated or damaged, a pickle of arbitrary objects, or not a file
            of weights.
    """
    path = checkpoint if isinstance(checkpoint, Path) else checkpoint.path
    _check_exists(path)
    if isinstance(checkpoint, Path):
        verify(path)
    return sharded.load(path, live) if path.is_dir() else formats.read(path)


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
