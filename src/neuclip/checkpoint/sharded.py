"""Checkpoints that every process writes its part of: torch.distributed.checkpoint in a folder.

`epoch_N/` holds the same tree as `epoch_N.pt`. Its sharded tensors are in torch's own files
(`.metadata`, `__R_0.distcp`), everything else in `values.pt`, and `SHA256SUMS` lists them all. The
folder is written under another name and gets its own when it is whole, so that a name means a whole
checkpoint. It needs no process group to be read, and is read for any number of processes.
"""

import pickle
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from neuclip.checkpoint.common import (
    SUMS,
    CheckpointError,
    neighbours,
    not_plain,
    not_written,
    remove,
)
from neuclip.files import describe, sha256, synchronize, write_whole
from neuclip.parallel import collectives

VALUES = "values.pt"
_REFERENCE = "neuclip.sharded"
"""Key of what stands in `values.pt` for a sharded tensor: `{_REFERENCE: its name}`."""
_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # as Python 3.13 calls it
}  # fmt: skip


def is_sharded(path: Path) -> bool:
    """Whether a path is a sharded checkpoint that was written to the end."""
    return (path / SUMS).is_file()


def begin(path: Path, content: dict[str, Any], group: dist.ProcessGroup) -> Future[Any]:
    """Begins to write a checkpoint; all processes call this together.

    What is to be written is copied first: training may go on at once.

    Args:
        path: the folder, in its place once `finish` was called.
        content: the tree. Sharded tensors are written by all processes, the rest by the first.
        group: has a CPU backend, and is used for nothing else meanwhile.

    Returns:
        Ends when the parts of all processes are written.

    Raises:
        CheckpointError: no space, or no right to write; on all processes.
    """
    partial = _partial(path)
    sharded: dict[str, Tensor] = {}
    values = _split(content, "", sharded)
    problem: CheckpointError | None = None
    if collectives.is_main():
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            torch.save(values, partial / VALUES)
            synchronize(partial / VALUES)
        except (OSError, RuntimeError) as error:
            problem = not_written(path, error)
    if collectives.any_rank(problem is not None):  # the others are not left waiting
        raise problem or CheckpointError(f"the first process could not write checkpoint {path}")
    writer = FileSystemWriter(partial, sync_files=True)
    pending = async_save(sharded, storage_writer=writer, process_group=group)
    return pending if isinstance(pending, Future) else pending.upload_completion


def wait(path: Path, written: Future[Any]) -> None:
    """Waits for what `begin` returned.

    Raises:
        CheckpointError: a process could not write its part; on all processes.
    """
    try:
        written.result()
    except CheckpointException as error:  # torch tells every process what each of them met
        cause = next(iter(error.failures.values()))[0]
        raise not_written(path, cause if isinstance(cause, Exception) else OSError(cause)) from None


def finish(path: Path) -> None:
    """Gives a checkpoint whose parts are all written its sums and its name; one process does this.

    Raises:
        OSError: no space, or no right to write.
    """
    partial = _partial(path)
    files = sorted(file.name for file in partial.iterdir())
    lines = [f"{sha256(partial / name)}  {name}\n" for name in files]
    write_whole(partial / SUMS, "".join(lines))
    synchronize(partial)
    remove(path)
    partial.replace(path)
    synchronize(path.parent)


def check(path: Path) -> None:
    """Compares the files with their sums.

    Raises:
        CheckpointError: a file is missing or is not as it was written.
    """
    if not is_sharded(path):
        raise CheckpointError(f"no sharded checkpoint at {path}{neighbours(path)}")
    for line in (path / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        file = path / name
        if not file.is_file() or sha256(file) != digest:
            raise CheckpointError(
                f"checkpoint {path} is damaged or incomplete: {name} is not as it was written"
                f"{neighbours(path)}"
            )


def load(path: Path, live: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Reads a checkpoint as the tree that was saved; each process for itself.

    Args:
        path: the folder.
        live: tensors by the names they have in the tree, joined by '/'. What is a DTensor here is
            read as one that is cut the same way; all else is read whole, onto the CPU.

    Raises:
        CheckpointError: missing or damaged, or it holds more than tensors and values.
    """
    check(path)
    try:
        values = torch.load(path / VALUES, map_location="cpu", weights_only=True)
        reader = _Reader(path)
        tensors = {
            name: _place_for(cast(TensorStorageMetadata, stored), (live or {}).get(name))
            for name, stored in reader.read_metadata().state_dict_metadata.items()
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a singl")
            load_tensors(tensors, storage_reader=reader, no_dist=True)
    except pickle.UnpicklingError as error:
        raise not_plain(path, describe(error)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged or incomplete: {describe(error)}{neighbours(path)}"
        ) from None
    content = _join(values, tensors)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"checkpoint {path} has no 'state_dict': not a training checkpoint")
    return cast(dict[str, Any], content)


def consolidate(path: Path) -> dict[str, Any]:
    """A sharded checkpoint in the layout of a checkpoint's file, whole, on the CPU.

    One process does this alone; it needs no process group.

    Raises:
        CheckpointError: as `load`.
    """
    return load(path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _split(value: object, name: str, sharded: dict[str, Tensor]) -> object:
    """The tree with references for its sharded tensors, which are added to `sharded`."""
    if isinstance(value, DTensor):
        sharded[name] = value
        return {_REFERENCE: name}
    if isinstance(value, dict):
        items = cast(dict[object, object], value).items()
        return {key: _split(inner, _join_name(name, key), sharded) for key, inner in items}
    if isinstance(value, list | tuple):
        parts = enumerate(cast(list[object], value))
        return type(value)(_split(inner, _join_name(name, n), sharded) for n, inner in parts)
    return value


def _join_name(name: str, key: object) -> str:
    return f"{name}/{key}" if name else str(key)


def _join(value: object, tensors: Mapping[str, Tensor]) -> object:
    """The inverse of `_split`."""
    if isinstance(value, dict):
        items = cast(dict[object, object], value)
        if _REFERENCE in items:
            return tensors[str(items[_REFERENCE])]
        return {key: _join(inner, tensors) for key, inner in items.items()}
    if isinstance(value, list | tuple):
        return type(value)(_join(inner, tensors) for inner in cast(list[object], value))
    return value


def _place_for(stored: TensorStorageMetadata, live: Tensor | None) -> Tensor:
    """Memory to read a tensor into."""
    if isinstance(live, DTensor):
        return torch.empty_like(live, dtype=stored.properties.dtype)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


class _Reader(FileSystemReader):
    """Reads `.metadata`, a pickle, without running what a stranger may have put into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401  torch's own
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(metadata).__name__}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of torch's metadata and no other."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:  # noqa: ANN401  pickle's
        known = (module_name, global_name) in _METADATA_CLASSES
        if known or isinstance(getattr(torch, global_name, None), torch.dtype):
            return super().find_class(module_name, global_name)
        raise pickle.UnpicklingError(f"{module_name}.{global_name} in .metadata")
