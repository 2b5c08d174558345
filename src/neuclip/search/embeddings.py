"""Image features of a source, computed once and kept on disk by checkpoint and data.

A folder holds `features.npy` [images, dim] in float16, `positions.npy` [images] in int64 (each
image's position in the source, ascending), and `damage.json`. It appears when it is complete.
"""

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from neuclip.data.batch import Unreadable
from neuclip.data.damage import DamageLog
from neuclip.data.loader import LoaderSettings, evaluation_loader, evaluation_requests
from neuclip.data.progress import Progress
from neuclip.data.reading import STALL_LIMIT
from neuclip.data.sources.source import Source, content_digest
from neuclip.errors import UserError, printable
from neuclip.evaluation.interfaces import ImageTextEncoder
from neuclip.files import cache_home, describe, folder_when_complete
from neuclip.untrusted import DAMAGED_ARRAYS, open_regular, read_json

_FEATURES, _POSITIONS, _DAMAGE = "features.npy", "positions.npy", "damage.json"


class FeatureRows:
    """The rows of `features.npy`, read as they are asked for.

    A memory map would end the process if the file shrank while it is open.

    Args:
        path: the file.

    Attributes:
        shape: rows and dimension.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not as `embed_source` writes it.
    """

    shape: tuple[int, int]

    def __init__(self, path: Path) -> None:
        self._path = path
        with open_regular(path) as file:
            npy.read_magic(file)
            (rows, dim), in_columns, kind = npy.read_array_header_1_0(file)
            self._start = file.tell()
        if in_columns or kind != np.float16 or min(rows, dim) < 0:
            raise ValueError(f"{path} does not hold rows of float16")
        self.shape = rows, dim

    def has(self, rows: int) -> bool:
        """Whether the file is as long as so many rows."""
        size = self._start + rows * self.shape[1] * np.dtype(np.float16).itemsize
        return rows <= self.shape[0] and self._path.stat().st_size >= size

    def __getitem__(self, rows: slice) -> NDArray[np.float16]:
        """Rows of a slice of step 1, [rows, dim].

        Raises:
            UserError: the file has been changed since it was opened.
        """
        first, last, _ = rows.indices(self.shape[0])
        row_bytes = self.shape[1] * np.dtype(np.float16).itemsize
        size = max(0, last - first) * row_bytes
        content = b""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(self._start + first * row_bytes)
            content = file.read(size)
        if len(content) < size:
            raise UserError(f"{self._path} was changed while in use: start the search again")
        return np.frombuffer(content, np.float16).reshape(-1, self.shape[1])


@dataclass(frozen=True)
class Embeddings:
    """Unit-norm features of the images of a source.

    Attributes:
        features: [images, dim], on disk; may have further rows, which are unused.
        positions: [images] position of each image in the source, ascending.
        damaged: number of corrupt samples.
        damage: summary of the corrupt samples.
        reused: whether the features were already on disk.
    """

    features: FeatureRows
    positions: NDArray[np.int64]
    damaged: int
    damage: str
    reused: bool

    def __len__(self) -> int:
        return len(self.positions)

    def row_of(self, position: int) -> int | None:
        """The row of an image by its position in the source; none if it has no features."""
        row = int(np.searchsorted(self.positions, position))
        return row if row < len(self) and self.positions[row] == position else None


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of the computation.

    Attributes:
        cache: folder for the features of all checkpoints and sources.
        batch_size: images per forward pass.
        workers: processes that read images.
        stall_limit: seconds without a batch after which reading fails.
    """

    cache: Path
    batch_size: int = 256
    workers: int = 2
    stall_limit: float = STALL_LIMIT


def default_cache() -> Path:
    """`neuclip/search` in the user's cache folder."""
    return cache_home() / "search"


def embed_source(
    encoder: ImageTextEncoder,
    checkpoint: str,
    source: Source,
    settings: EmbedSettings,
    progress: Progress | None = None,
) -> Embeddings:
    """Reads the features of a source from disk, or computes and keeps them.

    Memory is bounded by one batch.

    Args:
        encoder: the towers.
        checkpoint: SHA-256 of architecture and weights.
        source: the images.
        settings: settings of the computation.
        progress: called with the activity, the number of images done and their total.

    Raises:
        UserError: no image can be read, a feature is not finite, or the disk is full.
    """
    folder = settings.cache / f"{checkpoint[:24]}-{content_digest(source)[:24]}"
    kept = _open(folder, len(source))
    if kept is not None:
        return kept
    try:
        with folder_when_complete(folder) as partial:
            _compute(encoder, source, settings, partial, progress)
    except OSError as error:
        raise UserError(
            f"cannot keep embeddings in {settings.cache}: {describe(error)}; choose "
            "another folder with --embeddings"
        ) from None
    made = _open(folder, len(source))
    if made is None:
        raise UserError(f"{folder} was changed while it was written: start the search again")
    return replace(made, reused=False)


def _compute(
    encoder: ImageTextEncoder,
    source: Source,
    settings: EmbedSettings,
    folder: Path,
    progress: Progress | None,
) -> None:
    damage = DamageLog()
    damage.add(source.damage)
    requests = evaluation_requests(np.arange(len(source)), settings.batch_size)
    reading = LoaderSettings(
        settings.batch_size, workers=settings.workers, stall_limit=settings.stall_limit
    )
    batches = evaluation_loader(source, encoder.transform, _no_tokens, requests, reading)
    positions = np.empty(len(source), dtype=np.int64)
    done = 0
    with (folder / _FEATURES).open("wb") as features:
        for batch in batches:
            damage.add(batch.damage)
            if isinstance(batch, Unreadable):
                continue
            found = _encode(encoder, batch.images)
            if not done:
                _write_header(features, found.dtype, (len(source), found.shape[1]))
            end = done + len(found)
            features.write(found.tobytes())
            positions[done:end] = batch.sample_ids.numpy()
            done = end
            if progress is not None:
                progress("embedding images", end, len(source))
    if not done:
        raise UserError(f"none of {len(source)} images could be read: {damage.summary()}")
    with (folder / _POSITIONS).open("wb") as file:  # np.save reports no cause of a failure
        _write_header(file, positions.dtype, (done,))
        file.write(positions[:done].tobytes())
    corrupt = {"total": damage.total, "summary": damage.summary()}
    (folder / _DAMAGE).write_text(json.dumps(corrupt) + "\n", encoding="utf-8")


def _encode(encoder: ImageTextEncoder, images: Tensor) -> NDArray[np.float16]:
    with torch.no_grad():
        found = encoder.encode_image(images).to("cpu")
    if not bool(found.isfinite().all()):
        raise UserError(
            "the image tower returns features that are not finite: the model has diverged, or "
            "its weights are corrupt"
        )
    return found.numpy().astype(np.float16)


def _write_header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Announces an array.

    `features.npy` announces a row per sample and has none for corrupt samples, the last rows.
    """
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(file, header)


def _open(folder: Path, samples: int) -> Embeddings | None:
    """The features in a folder; none if they are missing or changed, to be computed again.

    Args:
        folder: the folder.
        samples: number of samples of the source.
    """
    try:
        positions, features = _positions(folder, samples), FeatureRows(folder / _FEATURES)
        corrupt = read_json(folder / _DAMAGE)
        total, summary = corrupt["total"], corrupt["summary"]
    except DAMAGED_ARRAYS:
        return None
    told = isinstance(total, int) and isinstance(summary, str)
    if not told or not features.has(len(positions)):
        return None
    return Embeddings(features, positions, total, printable(summary, 1000), reused=True)


def _positions(folder: Path, samples: int) -> NDArray[np.int64]:
    """The positions: ascending, and within the source.

    Raises:
        ValueError: the file holds anything else.
    """
    with open_regular(folder / _POSITIONS) as file:
        npy.read_magic(file)
        (rows,), _, kind = npy.read_array_header_1_0(file)
        if kind != np.int64 or not 0 < rows <= samples:
            raise ValueError("not positions in this source")
        found = np.frombuffer(file.read(8 * rows), np.int64)
    if len(found) != rows or found[0] < 0 or found[-1] >= samples or (np.diff(found) <= 0).any():
        raise ValueError("not positions in this source")
    return found


def _no_tokens(texts: list[str]) -> Tensor:
    """Placeholder tokens: captions are not embedded."""
    return torch.zeros(len(texts), 1, dtype=torch.int64)
