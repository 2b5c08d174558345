"""Formats of weight files, recognised by their content and read without running code.

- `torch.save`'s zip archive, and its format before torch 1.6;
- safetensors;
- TorchScript, of which the tensors are read.

Everything else is named in the error.
"""

import argparse
import contextlib
import pathlib
import pickle
import re
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from neuclip.checkpoint import torchscript
from neuclip.checkpoint.common import CheckpointError, damaged, not_plain
from neuclip.checkpoint.stored_tensors import check_stored
from neuclip.errors import printable
from neuclip.files import describe as describe_error
from neuclip.first_bytes import ZIP, describe, first_bytes
from neuclip.untrusted import read_json

_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""The number at the start of torch's format before 1.6, as a pickle."""

_EXPANSION = 4
"""How many times its size the content of an archive may have; torch itself compresses nothing."""

_NUMPY = np._core.multiarray  # pyright: ignore[reportAttributeAccessIssue]
_KINDS = "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ?"
_ALLOWED: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PosixPath,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in _KINDS.split()),
    *(
        (getattr(_NUMPY, name), f"{package}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for package in ("numpy.core", "numpy._core")
    ),
]
"""Classes of plain values, beside torch's own, that checkpoints of others often hold."""


def read(path: Path) -> object:
    """Reads a file of weights onto the CPU; what it holds is up to the caller to check.

    A TorchScript archive gives its tensors by name, under the key `torchscript`.

    Raises:
        CheckpointError: truncated or damaged, a pickle of arbitrary objects, or no file of weights.
    """
    head = first_bytes(path)
    try:
        if head.startswith(ZIP):
            return _checked(_read_archive(path), path)
        if _LEGACY in head[:32]:
            return _checked(_load(path), path)
        if _starts_as_safetensors(head):
            return load_file(path)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _not_plain(path, error) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise damaged(path, describe_error(error)) from None
    except Exception as error:  # safetensors raises a class of its own from Rust
        raise damaged(path, printable(str(error), 200)) from None
    if head.startswith(b"\x80"):
        raise not_plain(path, "it is a bare pickle")
    what = _text(path, head) or describe(head)
    if what is None or what == "an empty file":
        raise damaged(path, what or "its first bytes are those of no known format")
    raise CheckpointError(f"{path} is not a file of weights: it is {what}")


def _checked(content: object, path: Path) -> object:
    check_stored(content, path)
    return content


def _read_archive(path: Path) -> object:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            content = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile:
        raise damaged(path, "its zip archive has no end") from None
    if content > _EXPANSION * path.stat().st_size:
        raise CheckpointError(
            f"{path} is a compressed zip archive of {content:,} bytes, which torch does not write"
        )
    if torchscript.is_torchscript(names):
        return {"torchscript": torchscript.read_tensors(path)}
    if not any(name.endswith("data.pkl") for name in names):
        first = printable(", ".join(names[:3]))
        raise CheckpointError(f"{path} is not a file of weights: it is a zip archive of {first}")
    return _load(path)


def _load(path: Path) -> object:
    # An open file: of a path, torch looks at the ending.
    with torch.serialization.safe_globals(_ALLOWED), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _not_plain(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """The error for a pickle with other classes; names them."""
    found = re.findall(r"GLOBAL ([\w.]+)|^([\w.]+) in ", str(error))
    found = ["".join(names) for names in found]
    if zipfile.is_zipfile(path):
        with torch.serialization.safe_globals(_ALLOWED), contextlib.suppress(Exception):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path) or found
    classes = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return not_plain(
        path,
        f"it holds Python objects ({printable(classes or str(error), 200)}); where these classes "
        "are installed, and if you trust the file, save its weights alone: "
        "torch.save(model.state_dict(), 'weights.pt')",
    )


def _starts_as_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length < 100_000_000


def _text(path: Path, head: bytes) -> str | None:
    """What a JSON or text file is, for the message."""
    start = head.lstrip()[:1]
    if start not in (b"{", b"["):
        return None
    try:
        tree = read_json(path)
    except (OSError, ValueError):
        return None
    if isinstance(tree, dict) and "weight_map" in tree:
        return (
            "the index of weights in several files, which are not read; transformers writes one "
            "file with from_pretrained(...).save_pretrained(DIR, max_shard_size='100GB')"
        )
    return "a JSON file; a model configuration is given as --model"
