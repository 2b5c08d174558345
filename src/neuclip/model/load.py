"""Loads checkpoints for use.

`load_pretrained` makes towers in float32, for benchmarks and export; `load_towers` makes them in
the run's precision, for embeddings; `load_run` makes those and the loss that trained them.
"""

import json
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from neuclip.config.run_config import RunConfig
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.model.base_weights import hash_weights
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import Clip
from neuclip.model.device import Precision, choose_device, choose_precision
from neuclip.model.encoder import Encoder
from neuclip.model.opened_checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Pretrained:
    """The model of a checkpoint, ready to use.

    Attributes:
        checkpoint: its `weights` are those of the model.
        clip: the towers with their transforms and tokenizer.
        encoder: the towers for evaluation.
    """

    checkpoint: Checkpoint
    clip: Clip
    encoder: Encoder

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of architecture, preprocessing and weights, which decide every result."""
        identity = self.clip.architecture.record()
        del identity["name"]
        return hash_weights(self.checkpoint.weights, json.dumps(identity, sort_keys=True))


@dataclass(frozen=True)
class RestoredRun(Pretrained):
    """The model and the loss of a run, ready to use.

    Attributes:
        config: the run's settings; none if neuclip did not write the checkpoint.
        loss: the loss with its state, which may predict log-normalizers; none as for `config`.
    """

    config: RunConfig | None
    loss: PairLoss | None


def load_pretrained(
    choice: CheckpointChoice, device: str = "auto", local_rank: int = 0
) -> Pretrained:
    """Loads towers, in float32 whatever they were trained in.

    Args:
        choice: which checkpoint and which weights.
        device: as for `choose_device`.
        local_rank: index of the GPU on this machine.

    Raises:
        UserError: no such checkpoint, no architecture known, or weights of another architecture.
    """
    place = choose_device(device, local_rank)
    return _ready(open_checkpoint(choice), "fp32", place)


def load_towers(choice: CheckpointChoice, device: str = "auto", local_rank: int = 0) -> Pretrained:
    """Loads towers in the precision of the run; those of others' checkpoints in float32.

    Args:
        choice: which checkpoint and which weights.
        device: as for `choose_device`.
        local_rank: index of the GPU on this machine.

    Raises:
        UserError: no such checkpoint, no architecture known, or weights of another architecture.
    """
    place = choose_device(device, local_rank)
    checkpoint = open_checkpoint(choice)
    config = checkpoint.config
    wanted = "fp32" if config is None else config.model.precision
    return _ready(checkpoint, choose_precision(wanted, place), place)


def load_run(choice: CheckpointChoice, device: str = "auto", local_rank: int = 0) -> RestoredRun:
    """Loads a run's towers as `load_towers` does, and its loss.

    Of a checkpoint that neuclip did not write, the towers alone are loaded.

    Args:
        choice: which checkpoint and which weights.
        device: as for `choose_device`.
        local_rank: index of the GPU on this machine.

    Raises:
        UserError: no such checkpoint, no architecture known, or weights of another architecture.
    """
    towers = load_towers(choice, device, local_rank)
    checkpoint, clip, encoder = towers.checkpoint, towers.clip, towers.encoder
    config = checkpoint.config
    loss = None if config is None else checkpoint.build_loss(clip, encoder.device)
    return RestoredRun(checkpoint, clip, encoder, config, loss)


def _ready(checkpoint: Checkpoint, precision: Precision, device: torch.device) -> Pretrained:
    """Towers of a checkpoint on a device."""
    clip = checkpoint.build_clip(precision, device)
    return Pretrained(_sharing_weights(checkpoint, clip), clip, Encoder(clip, device))


def _sharing_weights(checkpoint: Checkpoint, clip: Clip) -> Checkpoint:
    """The checkpoint with the model's weights, so that the copy on the CPU can be freed."""
    return replace(checkpoint, weights=clip.towers.state_dict())
