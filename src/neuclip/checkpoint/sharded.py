"""Sharded checkpoints: a folder to which every rank writes, by torch.distributed.checkpoint.

`epoch_N/` holds the same tree as `epoch_N.pt`. Its sharded tensors are in torch's own files
(`.metadata`, `__R_0.distcp`), everything else is in `values.pt`, and `SHA256SUMS` lists all files.
The folder is written under a hidden name and renamed when it is complete. Reading needs no process
group, and the number of ranks may differ from that of the writing run.
"""

import math
import pickle
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path, PosixPath
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.serialization import _get_layout  # pyright: ignore[reportPrivateUsage]

from neuclip.checkpoint.common import (
    SUMS,
    VALUES,
    CheckpointError,
    is_sharded,
    neighbours,
    not_plain,
    not_written,
    read_sums,
    remove,
)
from neuclip.checkpoint.stored_tensors import check_stored
from neuclip.errors import printable
from neuclip.files import describe, replacing, sha256, synchronize
from neuclip.parallel import collectives

_REFERENCE = "neuclip.sharded"
"""In `values.pt`, `{_REFERENCE: name}` stands in place of the sharded tensor of that name."""
_METADATA_FILE = ".metadata"
_SHARDS = ".distcp"
_PLAIN: dict[tuple[str, str], object] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "_MEM_FORMAT_ENCODING", "MetadataIndex", "StorageMeta",
        )
    },
    (filesystem.__name__, "_StorageInfo"): vars(filesystem)["_StorageInfo"],
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,  # its name in Python 3.13
    **{("torch", name): value for name, value in vars(torch).items() if type(value) is torch.dtype},
}  # fmt: skip
"""The names that `.metadata` may hold, each with its object: nothing is looked up or imported."""


def begin(path: Path, content: dict[str, Any], group: dist.ProcessGroup) -> Future[Any]:
    """Starts to write a checkpoint; a collective call.

    The content is copied first, so training can continue at once.

    Args:
        path: the folder; it appears when `finish` is called.
        content: the tree. All ranks write their shards, the first rank everything else.
        group: process group with a CPU backend, not used by anything else meanwhile.

    Returns:
        A future that is done when all ranks have written their shards.

    Raises:
        CheckpointError: disk full or permission denied; on all ranks.
    """
    partial = _partial(path)
    sharded: dict[str, Tensor] = {}
    values = _split(content, "", sharded)
    problem: CheckpointError | None = None
    if collectives.is_main():
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            with (partial / VALUES).open("xb") as file:
                torch.save(values, file)
            synchronize(partial / VALUES)
        except (OSError, RuntimeError) as error:
            problem = not_written(path, error)
    if collectives.any_rank(problem is not None):  # no rank is left waiting
        raise problem or CheckpointError(f"rank 0 could not write checkpoint {path}")
    writer = FileSystemWriter(partial, sync_files=True)
    pending = async_save(sharded, storage_writer=writer, process_group=group)
    return pending if isinstance(pending, Future) else pending.upload_completion


def wait(path: Path, written: Future[Any]) -> None:
    """Waits for the future of `begin`.

    Raises:
        CheckpointError: a rank could not write its shard; on all ranks.
    """
    try:
        written.result()
    except CheckpointException as error:  # torch sends every rank's failure to all ranks
        cause = _cause(error)
        raise not_written(path, cause if isinstance(cause, Exception) else OSError(cause)) from None


def finish(path: Path) -> None:
    """Adds the checksums to a checkpoint whose shards are all written, and gives it its name.

    One rank calls this.

    Raises:
        OSError: disk full or permission denied.
    """
    partial = _partial(path)
    files = sorted(file.name for file in partial.iterdir())
    lines = [f"{sha256(partial / name)}  {name}\n" for name in files]
    with replacing(partial / SUMS) as sums:
        sums.write("".join(lines).encode())
    synchronize(partial)
    remove(path)
    partial.replace(path)
    synchronize(path.parent)


def verify(path: Path) -> None:
    """Compares the files with their checksums.

    Raises:
        CheckpointError: a file is missing, or its content differs from what was written.
    """
    if not is_sharded(path):
        raise CheckpointError(f"no sharded checkpoint at {path}{neighbours(path)}")
    sums = read_sums(path)
    if sums is None:
        raise CheckpointError(f"cannot read {path / SUMS}")
    listed = {name: digest for digest, name in sums}
    present = {file.name for file in path.iterdir() if file.name != SUMS}
    for name in sorted({_METADATA_FILE, VALUES, *listed} | {*filter(_is_shard, present)}):
        file = path / name
        plain = file.name == name and name in present and file.is_file()
        if not plain or sha256(file) != listed.get(name):
            raise CheckpointError(
                f"checkpoint {path} is damaged or incomplete: {printable(name)} is not as it was "
                f"written{neighbours(path)}"
            )


def _is_shard(name: str) -> bool:
    return name.endswith(_SHARDS)


def load(path: Path, live: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Reads a checkpoint as the tree that was saved; each rank independently.

    Args:
        path: the folder, already verified.
        live: tensors by their names in the tree, joined by '/'. Where this holds a DTensor, the
            result is a DTensor of the same placement; everything else is read in full, onto the
            CPU.

    Raises:
        CheckpointError: damaged, or it holds more than tensors and values.
    """
    try:
        values = torch.load(path / VALUES, map_location="cpu", weights_only=True)
        check_stored(values, path / VALUES)
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
    except _ODD_CONTENT as error:
        raise _damaged(path, error) from None
    try:
        content = _join(values, tensors)
    except KeyError as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"checkpoint {path} has no 'state_dict': not a training checkpoint")
    return cast(dict[str, Any], content)


_ODD_CONTENT = (
    RuntimeError, CheckpointException, EOFError, OSError, ValueError, TypeError, AttributeError,
    LookupError, ArithmeticError, MemoryError,
)  # fmt: skip
"""What torch raises for metadata that contradicts its files."""


def _damaged(path: Path, error: BaseException) -> CheckpointError:
    cause = _cause(error) if isinstance(error, CheckpointException) else error
    why = printable(f"{type(cause).__name__}: {cause}", 200)
    return CheckpointError(f"checkpoint {path} is damaged or incomplete: {why}{neighbours(path)}")


def _cause(error: CheckpointException) -> BaseException:
    """The first rank's failure."""
    return next(iter(error.failures.values()))[0]


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _split(value: object, name: str, sharded: dict[str, Tensor]) -> object:
    """The tree with references in place of its sharded tensors, which are added to `sharded`."""
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
    """An empty tensor to read into."""
    if isinstance(live, DTensor):
        return torch.empty_like(live, dtype=stored.properties.dtype)
    return torch.empty(stored.size, dtype=stored.properties.dtype)


class _Reader(FileSystemReader):
    """Reads `.metadata`, a pickle, without running code that a stranger may have put into it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401  torch's own
        folder = Path(self.path)
        with (folder / _METADATA_FILE).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{_METADATA_FILE} holds a {type(metadata).__name__}")
        _check_places(metadata, folder)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _check_places(metadata: Metadata, folder: Path) -> None:
    """Checks that tensors are in files of the folder, and are not larger than these files.

    Raises:
        pickle.UnpicklingError: a file elsewhere is named.
        ValueError: the tensors need more memory than all files have bytes.
    """
    for place in (metadata.storage_data or {}).values():
        name = place.relative_path
        if not isinstance(name, str) or "/" in name or not _is_shard(name):
            raise pickle.UnpicklingError(f"{_METADATA_FILE} names the file {printable(str(name))}")
    stored = sum(file.stat().st_size for file in folder.iterdir() if _is_shard(file.name))
    tensors = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    needed = sum(math.prod(t.size) * t.properties.dtype.itemsize for t in tensors.values())
    if not 0 <= needed <= stored:
        raise ValueError(f"its tensors take {needed:,} bytes, its files have {stored:,}")


class _MetadataUnpickler(pickle.Unpickler):
    """Accepts the names in `_PLAIN` only."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:  # noqa: ANN401  pickle's
        try:
            return _PLAIN[module_name, global_name]
        except KeyError:
            name = printable(f"{module_name}.{global_name}")
            raise pickle.UnpicklingError(f"{name} in {_METADATA_FILE}") from None
