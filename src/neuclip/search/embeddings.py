"""Image features of a source, computed once and kept on disk by checkpoint and data.

A folder holds `features.npy` [images, dim] in float16, `positions.npy` [images] in int64 (each
image's position in the source, ascending), and `damage.json`. It appears when it is complete.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor

from neuclip.data.batch import Unreadable
from neuclip.data.damage import DamageLog
from neuclip.data.loader import evaluation_loader, evaluation_requests
from neuclip.data.progress import Progress
from neuclip.data.sources.source import Source, content_digest
from neuclip.errors import UserError
from neuclip.evaluation.interfaces import ImageTextEncoder
from neuclip.files import cache_home, folder_when_complete

_FEATURES, _POSITIONS, _DAMAGE = "features.npy", "positions.npy", "damage.json"


@dataclass(frozen=True)
class Embeddings:
    """Unit-norm features of the images of a source.

    Attributes:
        features: [images, dim], memory-mapped.
        positions: [images] position of each image in the source, ascending.
        damaged: number of corrupt samples.
        damage: summary of the corrupt samples.
        reused: whether the features were already on disk.
    """

    features: NDArray[np.float16]
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
    """

    cache: Path
    batch_size: int = 256
    workers: int = 2


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
    if (folder / _DAMAGE).is_file():
        return _open(folder, reused=True)
    try:
        with folder_when_complete(folder) as partial:
            _compute(encoder, source, settings, partial, progress)
    except OSError as error:
        raise UserError(
            f"cannot keep embeddings in {settings.cache}: {error.strerror or error}; choose "
            "another folder with --embeddings"
        ) from None
    return _open(folder, reused=False)


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
    batches = evaluation_loader(source, encoder.transform, _no_tokens, requests, settings.workers)
    features: NDArray[np.float16] | None = None
    positions = np.empty(len(source), dtype=np.int64)
    done = 0
    for batch in batches:
        damage.add(batch.damage)
        if isinstance(batch, Unreadable):
            continue
        with torch.no_grad():
            found = encoder.encode_image(batch.images).to("cpu")
        if not bool(found.isfinite().all()):
            raise UserError(
                "the image tower returns features that are not finite: the model has diverged, or "
                "its weights are corrupt"
            )
        if features is None:
            features = open_memmap(
                folder / _FEATURES, "w+", dtype=np.float16, shape=(len(source), found.shape[1])
            )
        end = done + len(found)
        features[done:end] = found.numpy()
        positions[done:end] = batch.sample_ids.numpy()
        done = end
        if progress is not None:
            progress("embedding images", end, len(source))
    if features is None:
        raise UserError(f"none of {len(source)} images could be read: {damage.summary()}")
    features.flush()
    np.save(folder / _POSITIONS, positions[:done])
    corrupt = {"total": damage.total, "summary": damage.summary()}
    (folder / _DAMAGE).write_text(json.dumps(corrupt) + "\n", encoding="utf-8")


def _open(folder: Path, *, reused: bool) -> Embeddings:
    positions: NDArray[np.int64] = np.load(folder / _POSITIONS)
    features: NDArray[np.float16] = np.load(folder / _FEATURES, mmap_mode="r")
    corrupt = json.loads((folder / _DAMAGE).read_text(encoding="utf-8"))
    # The file has a row for each sample; the last rows, one per corrupt sample, are unused.
    return Embeddings(
        features[: len(positions)], positions, corrupt["total"], corrupt["summary"], reused
    )


def _no_tokens(texts: list[str]) -> Tensor:
    """Placeholder tokens: captions are not embedded."""
    return torch.zeros(len(texts), 1, dtype=torch.int64)
