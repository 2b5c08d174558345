"""The image tower over a source, once: features on disk, found again by checkpoint and data.

A folder holds `features.npy` [pictures, dim] in float16, `positions.npy` [pictures] int64 (where
in the source each picture is, ascending), and `damage.json`. It appears when it is complete.
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
    """Unit-norm features of the pictures of a source.

    Attributes:
        features: [pictures, dim], mapped from the disk.
        positions: [pictures] Where each is in the source, ascending.
        damaged: Samples that could not be read.
        damage: What was wrong with them, in a few words.
        reused: They were on the disk already.
    """

    features: NDArray[np.float16]
    positions: NDArray[np.int64]
    damaged: int
    damage: str
    reused: bool

    def __len__(self) -> int:
        return len(self.positions)

    def row_of(self, position: int) -> int | None:
        """The row of a picture by its position in the source; none if it has no features."""
        row = int(np.searchsorted(self.positions, position))
        return row if row < len(self) and self.positions[row] == position else None


@dataclass(frozen=True)
class EmbedSettings:
    """How to compute features.

    Attributes:
        cache: Folder of the features of all checkpoints and sources.
        batch_size: Pictures per forward pass.
        workers: Reading processes.
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
    """The features of a source: from the disk, or computed and kept there.

    Memory stays bounded by a batch, whatever the source's size.

    Args:
        encoder: The towers.
        checkpoint: SHA-256 of architecture and weights.
        source: The pictures.
        settings: How, and where to keep them.
        progress: Called with what is done, how many pictures of how many.

    Raises:
        UserError: no picture can be read, a feature is not finite, or there is no room to write.
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
                "the image tower gives features that are not finite: the model has diverged or "
                "its weights are damaged"
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
            progress("embedding pictures", end, len(source))
    if features is None:
        raise UserError(f"none of {len(source)} pictures could be read: {damage.summary()}")
    features.flush()
    np.save(folder / _POSITIONS, positions[:done])
    told = {"total": damage.total, "summary": damage.summary()}
    (folder / _DAMAGE).write_text(json.dumps(told) + "\n", encoding="utf-8")


def _open(folder: Path, *, reused: bool) -> Embeddings:
    positions: NDArray[np.int64] = np.load(folder / _POSITIONS)
    features: NDArray[np.float16] = np.load(folder / _FEATURES, mmap_mode="r")
    told = json.loads((folder / _DAMAGE).read_text(encoding="utf-8"))
    # The file has a row for each sample; those of damaged ones, at its end, were never written.
    return Embeddings(features[: len(positions)], positions, told["total"], told["summary"], reused)


def _no_tokens(texts: list[str]) -> Tensor:
    """Captions are not embedded."""
    return torch.zeros(len(texts), 1, dtype=torch.int64)
