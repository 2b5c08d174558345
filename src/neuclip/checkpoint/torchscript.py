"""Reads the tensors of a TorchScript archive, such as OpenAI's `ViT-B-32.pt`.

torch reads such an archive only by loading its program. Here the program is left alone: a
restricted unpickler reads `data.pkl`, in which every object of the module is a plain holder of its
attributes.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def is_torchscript(names: list[str]) -> bool:
    """Whether an archive with these members is TorchScript."""
    return any(name.endswith("/constants.pkl") for name in names)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of the archived module, by name.

    Raises:
        pickle.UnpicklingError: `data.pkl` holds more than modules, tensors and plain values.
        ValueError: a tensor lies outside of its storage, or a storage is missing.
        zipfile.BadZipFile: the archive is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(root) as file:
            module = _Unpickler(file, archive, root.removesuffix(".pkl")).load()
    found: dict[str, Tensor] = {}
    _collect(module, "", found)
    return found


class _Held:
    """An object of the archived module: its attributes, and none of its code."""


def _collect(holder: object, prefix: str, found: dict[str, Tensor]) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, Tensor):
            found[f"{prefix}{name}"] = value
        elif isinstance(value, _Held):
            _collect(value, f"{prefix}{name}.", found)


class _Unpickler(pickle.Unpickler):
    """Accepts modules, tensors and plain values only."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, storages: str) -> None:  # noqa: ANN401
        super().__init__(file)
        self._archive, self._storages = archive, storages

    def find_class(self, module_name: str, global_name: str, /) -> Any:  # noqa: ANN401  pickle's
        if module_name.startswith("__torch__"):
            return _Held
        if module_name == "torch" and global_name in _STORAGES:
            return _STORAGES[global_name]
        known = _FUNCTIONS.get((module_name, global_name))
        if known is None:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} in {self._storages}.pkl")
        return known

    def persistent_load(self, pid: Any, /) -> Tensor:  # noqa: ANN401  pickle's
        _, dtype, key, _, count = pid
        try:
            content = bytearray(self._archive.read(f"{self._storages}/{key}"))
        except KeyError:
            raise ValueError(f"no storage {key}") from None
        if not content:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(content, dtype=dtype, count=count)


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise ValueError(f"a tensor of {size} lies outside of its storage of {len(storage)}")
    return storage.as_strided(size, stride, offset)


def _same(value: object, *_: object) -> object:
    return value


_FUNCTIONS = {
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.jit._pickle", "build_intlist"): _same,
    ("torch.jit._pickle", "build_doublelist"): _same,
    ("torch.jit._pickle", "build_boollist"): _same,
    ("torch.jit._pickle", "build_tensorlist"): _same,
    ("torch.jit._pickle", "restore_type_tag"): _same,
}
