"""Opens checkpoints: of a run folder, any file in open_clip's layout, or a repository on disk.

`open_checkpoint` reads the content. `load_pretrained` makes towers of it, for evaluation, export
and search; `load_run` makes towers and the loss that trained them.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from neuclip.catalogue.create import build_loss
from neuclip.catalogue.method_info import RunFacts
from neuclip.checkpoint import storage
from neuclip.checkpoint.common import CheckpointError
from neuclip.checkpoint.sharded import is_sharded
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import validate
from neuclip.errors import UserError
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.clip import Clip, build_clip, init_for
from neuclip.model.device import Precision, choose_device, choose_precision
from neuclip.model.ema import AVERAGES
from neuclip.model.encoder import Encoder
from neuclip.run_folder import RunFolder

REPOSITORY_CONFIG = "open_clip_config.json"
_REPOSITORY_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_WEIGHT_FILES = {".pt", ".pth", ".bin", ".safetensors"}


@dataclass(frozen=True)
class CheckpointChoice:
    """Which checkpoint to open, and which of its weights to take.

    Attributes:
        path: run folder, checkpoint, or Hugging Face open_clip repository on disk.
        epoch: in a run folder, the checkpoint after this epoch.
        step: in a run folder, the checkpoint after this step; with neither, the newest.
        arch: architecture; none: the one that the checkpoint records.
        ema: take the moving average of the weights if the checkpoint holds one, as evaluation
            during training does.
    """

    path: Path
    epoch: int | None = None
    step: int | None = None
    arch: str | None = None
    ema: bool = True


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: the chosen weights, and what it records beside them.

    Attributes:
        choice: what was asked for.
        path: its file, or its folder if it is sharded.
        weights: by open_clip's names, on the CPU.
        averaged: whether the weights are the moving average of the run's weights.
        plain: whether they are not, although the checkpoint holds the average.
        recorded: `epoch`, `name` and `neuclip` (everything that only neuclip writes), if present.
    """

    choice: CheckpointChoice
    path: Path
    weights: Mapping[str, Tensor]
    averaged: bool
    plain: bool
    recorded: Mapping[str, Any]

    @cached_property
    def config(self) -> RunConfig | None:
        """The settings of the run that wrote the checkpoint; none if neuclip did not write it."""
        return recorded_config(self.recorded, self.path)

    @cached_property
    def arch(self) -> str:
        """The architecture.

        Raises:
            UserError: it is neither recorded nor asked for.
        """
        if _is_repository(self.choice.path):
            return f"local-dir:{self.choice.path}"
        found = self.choice.arch or (self.config and self.config.model.name) or self._noted_arch
        if found is None:
            raise UserError(
                f"{self.path} does not record its architecture; name it, such as --arch ViT-B-32"
            )
        return found

    @property
    def _noted_arch(self) -> str | None:
        noted = RunFolder.of_checkpoint(self.path).open_clip_flags
        text = noted.read_text(encoding="utf-8") if noted.is_file() else ""
        found = re.search(r"^model: (\S+)$", text, re.MULTILINE)
        return found and found[1]

    @property
    def results(self) -> Path:
        """Where evaluation results of this checkpoint belong: in `eval_results` of its run folder.

        Results of plain weights have a file of their own if the checkpoint holds an average.
        """
        name = self.path.stem
        if name == "epoch_latest" and "epoch" in self.recorded:
            name = f"epoch_{int(self.recorded['epoch'])}"
        if _is_repository(self.choice.path):
            name = "repository"
        return RunFolder.of_checkpoint(self.path).results_of(name, plain=self.plain)

    def build_clip(self, precision: Precision, device: torch.device) -> Clip:
        """Builds the model with these weights.

        Raises:
            UserError: the architecture is unknown, or the weights belong to another one.
        """
        clip = build_clip(self.arch, precision, device, init_for(self.weights))
        storage.load_weights(clip.towers, self.weights, self.path)
        return clip

    def build_loss(self, clip: Clip, device: torch.device) -> PairLoss:
        """Builds the loss of the run with its full state, on every rank.

        Raises:
            UserError: neuclip did not write the checkpoint, so that its method is unknown.
        """
        if self.config is None:
            raise _unknown_method(self.path)
        own = self.recorded["neuclip"]
        run = RunFacts(
            clip.embed_dim,
            own["steps_per_epoch"],
            own["num_samples"],
            own["global_batch_size"],
            sharded=False,
        )
        loss = build_loss(self.config.method, run).to(device)
        storage.load_loss(loss, own["loss"], self.path)
        return loss

    def digest(self, clip: Clip) -> str:
        """SHA-256 of architecture and weights, which decide every result."""
        repository = self.choice.path / REPOSITORY_CONFIG
        identity = self.arch
        if repository.is_file():
            identity = json.dumps(json.loads(repository.read_text(encoding="utf-8")))
        digest = hashlib.sha256(identity.encode())
        for name, value in sorted(clip.towers.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def open_checkpoint(choice: CheckpointChoice, *, verified: bool = False) -> Checkpoint:
    """Reads a checkpoint onto the CPU.

    Args:
        choice: which checkpoint and which weights.
        verified: its checksums were compared already; it is not hashed again.

    Raises:
        UserError: no such checkpoint (another one is never taken instead), or it is damaged.
    """
    in_repository = _is_repository(choice.path)
    path = _path_in_repository(choice) if in_repository else _path_in_run(choice)
    content = _read(path, verified=verified)
    holds_average = AVERAGES in content
    averaged = holds_average and choice.ema
    weights: dict[str, Tensor] = content[AVERAGES if averaged else "state_dict"]
    return Checkpoint(
        choice=choice,
        path=path,
        weights={name.removeprefix("module."): value for name, value in weights.items()},
        averaged=averaged,
        plain=holds_average and not choice.ema,
        recorded={key: content[key] for key in ("epoch", "name", "neuclip") if key in content},
    )


def recorded_config(recorded: Mapping[str, Any], path: Path) -> RunConfig | None:
    """The settings that a checkpoint records; none if neuclip did not write it.

    Args:
        recorded: `Checkpoint.recorded`.
        path: the checkpoint, for messages.

    Raises:
        UserError: the settings are invalid, such as those of an unknown method.
    """
    own = recorded.get("neuclip")
    return None if own is None else validate(yaml.safe_load(own["config"]), str(path))


def _unknown_method(path: Path) -> UserError:
    return UserError(f"{path} was not written by neuclip: its model and method are not recorded")


def _is_repository(path: Path) -> bool:
    return (path / REPOSITORY_CONFIG).is_file()


def _path_in_run(choice: CheckpointChoice) -> Path:
    path, asked = choice.path, (choice.epoch, choice.step)
    if path.is_file() or is_sharded(path) or path.suffix in _WEIGHT_FILES:
        if asked != (None, None):
            raise UserError(f"{path} is a checkpoint: --epoch and --iter need a run folder")
        return path
    if None not in asked:
        raise UserError("--epoch and --iter name two checkpoints: give one")
    folder = RunFolder(path)
    if not folder.checkpoints.is_dir():
        raise UserError(
            f"{path} is neither a run folder (no {folder.checkpoints.name}/ in it), nor a "
            f"checkpoint, nor a repository (no {REPOSITORY_CONFIG})"
        )
    if choice.epoch is not None:
        return folder.epoch_checkpoint(choice.epoch)
    return folder.latest if choice.step is None else folder.step_checkpoint(choice.step)


def _path_in_repository(choice: CheckpointChoice) -> Path:
    for flag, value in (
        ("--epoch", choice.epoch),
        ("--iter", choice.step),
        ("--arch", choice.arch),
    ):
        if value is not None:
            raise UserError(f"{choice.path} is a repository with one model: leave out {flag}")
    for name in _REPOSITORY_WEIGHTS:
        if (choice.path / name).is_file():
            return choice.path / name
    raise UserError(f"{choice.path} has no weights: expected {' or '.join(_REPOSITORY_WEIGHTS)}")


def _read(path: Path, *, verified: bool) -> dict[str, Any]:
    """Reads a file of any form as a dict in open_clip's layout."""
    if path.suffix != ".safetensors":
        return storage.load(storage.VerifiedCheckpoint(path) if verified else path, bare=True)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        return {"state_dict": load_file(path)}
    except Exception as error:  # safetensors raises a class of its own from Rust
        raise CheckpointError(f"checkpoint {path} is damaged or incomplete: {error}") from None


@dataclass(frozen=True)
class Pretrained:
    """Towers in float32, and what their results need.

    Attributes:
        encoder: the towers.
        device: where they are.
        arch: their architecture.
        path: the checkpoint.
        sha256: of architecture and weights.
        results: file for evaluation results.
        clip: the towers with their transforms and tokenizer.
        name: of the run if recorded, otherwise of the file.
        recorded: `epoch`, `name` and `neuclip` of the checkpoint, if present.
        averaged: whether the weights are the moving average of the run's weights.
    """

    encoder: Encoder
    device: torch.device
    arch: str
    path: Path
    sha256: str
    results: Path
    clip: Clip
    name: str
    recorded: Mapping[str, Any]
    averaged: bool


def load_pretrained(
    choice: CheckpointChoice, device: str = "auto", local_rank: int = 0
) -> Pretrained:
    """Loads towers, in float32 whatever they were trained in.

    Args:
        choice: which checkpoint and which weights.
        device: `auto`, `cpu` or `cuda`.
        local_rank: index of the GPU on this machine.

    Raises:
        UserError: no such checkpoint, no architecture known, or weights of another architecture.
    """
    place = choose_device(device, local_rank)
    checkpoint = open_checkpoint(choice)
    clip = checkpoint.build_clip("fp32", place)
    return Pretrained(
        encoder=Encoder(clip, place),
        device=place,
        arch=checkpoint.arch,
        path=checkpoint.path,
        sha256=checkpoint.digest(clip),
        results=checkpoint.results,
        clip=clip,
        name=str(checkpoint.recorded.get("name") or checkpoint.path.stem),
        recorded=checkpoint.recorded,
        averaged=checkpoint.averaged,
    )


@dataclass(frozen=True)
class RestoredRun:
    """The model and the loss of a run, ready to use.

    Attributes:
        folder: the run folder.
        config: the run's settings.
        encoder: the towers.
        loss: the loss with its state, which may predict log-normalizers.
        logit_scale: 1 / temperature.
        epoch: full epochs trained.
        global_batch_size: pairs in a training step.
        path: the checkpoint.
        results: file for evaluation results.
        averaged: whether the towers hold the moving average of the run's weights.
    """

    folder: RunFolder
    config: RunConfig
    encoder: Encoder
    loss: PairLoss
    logit_scale: float
    epoch: int
    global_batch_size: int
    path: Path
    results: Path
    averaged: bool


def load_run(choice: CheckpointChoice, device: str = "auto", local_rank: int = 0) -> RestoredRun:
    """Loads a run's towers, in the precision of the run, and its loss.

    Args:
        choice: which checkpoint and which weights.
        device: `auto`, `cpu` or `cuda`.
        local_rank: index of the GPU on this machine.

    Raises:
        UserError: no such checkpoint, or neuclip did not write it.
    """
    place = choose_device(device, local_rank)
    checkpoint = open_checkpoint(choice)
    config = checkpoint.config
    if config is None:
        raise _unknown_method(checkpoint.path)
    clip = checkpoint.build_clip(choose_precision(config.model.precision, place), place)
    return RestoredRun(
        folder=RunFolder.of_checkpoint(checkpoint.path),
        config=config,
        encoder=Encoder(clip, place),
        loss=checkpoint.build_loss(clip, place),
        logit_scale=clip.logit_scale,
        epoch=int(checkpoint.recorded["epoch"]),
        global_batch_size=int(checkpoint.recorded["neuclip"]["global_batch_size"]),
        path=checkpoint.path,
        results=checkpoint.results,
        averaged=checkpoint.averaged,
    )
