"""The starting weights of LoRA: what a checkpoint records of them, and where they are found again.

A checkpoint of LoRA holds the low-rank updates alone. Whoever reads it needs the starting weights:
they are recorded by name, file and digest, and never replaced by others.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuclip.checkpoint.common import CheckpointError
from neuclip.checkpoint.entries import restoring
from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.errors import UserError, printable
from neuclip.model.published import find_published
from neuclip.run_folder import BEST, LATEST

ENTRY = "low_rank"
"""The entry of the record in a checkpoint's `neuclip`."""


@dataclass(frozen=True)
class LowRankRecord:
    """What a checkpoint of LoRA records of its updates, and of its starting weights.

    Attributes:
        rank: of the updates.
        alpha: they are scaled by alpha / rank.
        given: the starting weights as `--pretrained` or `--model` named them.
        file: their file.
        sha256: their digest, as of `hash_weights`.
    """

    rank: int
    alpha: float
    given: str
    file: str
    sha256: str

    @classmethod
    def of(cls, settings: AdaptationConfig, given: str, file: Path, sha256: str) -> "LowRankRecord":
        """The record of a run with LoRA."""
        assert settings.lora_rank is not None
        lasting = str(_lasting(file).absolute())
        return cls(settings.lora_rank, settings.lora_alpha, given, lasting, sha256)

    @classmethod
    def read(cls, entry: Mapping[str, Any], path: Path) -> "LowRankRecord":
        """The record in a checkpoint.

        Raises:
            CheckpointError: it is not as neuclip writes it.
        """
        with restoring(path):
            texts = (str(entry[name]) for name in ("given", "file", "sha256"))
            return cls(int(entry["rank"]), float(entry["alpha"]), *texts)

    @property
    def entry(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self)

    @property
    def scale(self) -> float:
        """The factor of an update."""
        return self.alpha / self.rank

    def places(self, checkpoint: Path, model: str) -> Iterator[Path]:
        """Where the starting weights may be: nothing is downloaded.

        These are the file of the run, a copy named `starting_weights` beside the checkpoint or in
        its run folder, what was given, and the cache of the hub.

        Args:
            checkpoint: the file that holds the updates.
            model: the architecture.
        """
        file = Path(self.file)
        yield file
        yield checkpoint.parent / self._copy
        yield checkpoint.parent.parent / self._copy
        yield Path(self.given)
        try:
            published = find_published(self.given, model)
        except UserError:
            return
        if published is not None and published.cached is not None:
            yield published.cached

    def missing(self, checkpoint: Path, found: str) -> CheckpointError:
        """The error for starting weights that are gone.

        Args:
            checkpoint: the file that holds the updates.
            found: what is in their place, or nothing.
        """
        where = f"{printable(self.file)}, given as {printable(self.given)}"
        return CheckpointError(
            f"checkpoint {checkpoint} holds the low-rank updates of LoRA alone, and needs the "
            f"weights that they were trained on: {where}; digest sha256:{self.sha256[:16]}. {found}"
            f"Put that file back, or copy it beside the checkpoint as {self._copy} (weights of the "
            "hub: download them first, for example with neuclip eval)"
        )

    @property
    def _copy(self) -> str:
        """The name of a copy beside the checkpoint."""
        return f"starting_weights{Path(self.file).suffix}"


def hash_weights(weights: Mapping[str, Tensor], start: str = "") -> str:
    """SHA-256 of weights by name, wherever and in whatever format they are kept.

    Args:
        weights: by name.
        start: hashed before them.
    """
    digest = hashlib.sha256(start.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _lasting(file: Path) -> Path:
    """A name of a run's checkpoint that stays when the run goes on."""
    if file.is_dir():
        return file.resolve()
    if file.name not in (LATEST, BEST):
        return file
    numbered = [*file.parent.glob("epoch_[0-9]*.pt"), *file.parent.glob("iter_[0-9]*.pt")]
    return next((other for other in numbered if other.samefile(file)), file)
