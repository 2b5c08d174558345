"""A trained model back from its run folder or checkpoint, for judging and export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from neuclip.checkpoint import storage
from neuclip.checkpoint.sharded import is_sharded
from neuclip.config.run_config import RunConfig, validate
from neuclip.errors import UserError
from neuclip.method.factory import Run, build_loss
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.clip import Clip, build_clip, init_for
from neuclip.model.device import choose_device, choose_precision
from neuclip.model.ema import AVERAGES, judged
from neuclip.model.encoder import Encoder
from neuclip.run_folder import RunFolder


@dataclass(frozen=True)
class RestoredRun:
    """What a checkpoint holds, ready to use.

    Attributes:
        folder: the run folder.
        config: the run's settings.
        encoder: the towers.
        loss: the loss with its state, which can predict log-normalizers.
        logit_scale: 1 / temperature.
        epoch: whole epochs trained.
        global_batch_size: pairs in a training step.
        path: the checkpoint's file, or its folder.
        averaged: whether the towers are the moving average of the run's weights.
        plain: whether they are not, though the run kept one.
    """

    folder: Path
    config: RunConfig
    encoder: Encoder
    loss: PairLoss
    logit_scale: float
    epoch: int
    global_batch_size: int
    path: Path
    averaged: bool
    plain: bool


def load_run(
    run: Path,
    *,
    epoch: int | None = None,
    device: str = "auto",
    local_rank: int = 0,
    ema: bool = True,
) -> RestoredRun:
    """Loads a run's checkpoint.

    Args:
        run: a run folder, or one of its checkpoints.
        epoch: which epoch's checkpoint of the folder; none: the newest.
        device: `auto`, `cpu` or `cuda`.
        local_rank: which GPU of this machine.
        ema: take the moving average of the weights where the run kept one, as training judges it.

    Raises:
        UserError: no such run or checkpoint; never another one in its place.
    """
    path = _checkpoint_of(run, epoch)
    content = storage.load(path)
    own: dict[str, Any] | None = content.get("neuclip")
    if own is None:
        raise UserError(f"{path} was not written by neuclip: its model and method are not recorded")
    config = validate(yaml.safe_load(own["config"]), str(path))
    plain = AVERAGES in content and not ema
    content, averaged = (content, False) if plain else judged(content)
    place = choose_device(device, local_rank)
    precision = choose_precision(config.model.precision, place)
    clip = build_clip(config.model.name, precision, place, init_for(content["state_dict"]))
    storage.load_weights(clip.towers, content, path)
    loss = restore_loss(content, clip, path, place)
    return RestoredRun(
        folder=path.parent.parent,
        config=config,
        encoder=Encoder(clip, place),
        loss=loss,
        logit_scale=clip.logit_scale,
        epoch=int(content["epoch"]),
        global_batch_size=int(own["global_batch_size"]),
        path=path,
        averaged=averaged,
        plain=plain,
    )


def restore_loss(content: dict[str, Any], clip: Clip, path: Path, device: torch.device) -> PairLoss:
    """The loss of a checkpoint of ours, with its full state on every rank.

    Args:
        content: the checkpoint.
        clip: its towers.
        path: its file, for messages.
        device: where the loss is to be.
    """
    own = content["neuclip"]
    config = validate(yaml.safe_load(own["config"]), str(path))
    sizes = Run(
        clip.embed_dim,
        own["steps_per_epoch"],
        own["num_samples"],
        own["global_batch_size"],
        sharded=False,
    )
    loss = build_loss(config.method, sizes).to(device)
    storage.load_loss(loss, own["loss"], path)
    return loss


def _checkpoint_of(run: Path, epoch: int | None) -> Path:
    if run.is_file() or is_sharded(run):
        if epoch is not None:
            raise UserError(
                f"{run} is a checkpoint already: --epoch {epoch} goes with a run folder"
            )
        return run
    folder = RunFolder(run)
    if not folder.checkpoints.is_dir():
        raise UserError(f"{run} is no run folder: it has no {folder.checkpoints.name} in it")
    return folder.latest if epoch is None else folder.epoch_checkpoint(epoch)
