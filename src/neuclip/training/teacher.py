"""The teacher of distillation: a frozen copy of given weights that encodes each batch, too."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Batch
from neuclip.errors import UserError
from neuclip.method.losses.distillation import distillation
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import Clip
from neuclip.model.opened_checkpoint import open_checkpoint
from neuclip.model.starting_weights import StartingWeights
from neuclip.training.nonfinite import FEATURES, Outputs

log = logging.getLogger("neuclip")


@dataclass(frozen=True)
class Teacher:
    """The teacher of a run.

    Attributes:
        clip: its model, frozen and in evaluation mode.
        weight: of its loss.
        sha256: digest of its weights.
    """

    clip: Clip
    weight: float
    sha256: str

    @classmethod
    def of(
        cls, config: RunConfig, clip: Clip, starting: StartingWeights, device: torch.device
    ) -> "Teacher | None":
        """The teacher that the settings ask for; none without distillation.

        Args:
            config: the settings.
            clip: the model with its starting weights, before it is changed for training.
            starting: these weights.
            device: of the towers.

        Raises:
            UserError: there are no starting weights, or the teacher reads other images or texts.
        """
        settings = config.adaptation
        if settings.distill_start is not None:
            if not all(starting.begins_trained):
                raise UserError(
                    f"--distill-start {settings.distill_start:g} keeps the model near its starting "
                    "weights: it needs weights of both towers (--pretrained)"
                )
            return cls(frozen_copy(clip), settings.distill_start, starting.sha256)
        if settings.distill_pretrained is None:
            return None
        choice = CheckpointChoice(Path(settings.distill_pretrained), arch=settings.distill_model)
        found = open_checkpoint(choice, model=settings.distill_model)
        other = found.build_clip(clip.precision, device)
        _check_inputs(clip, other)
        return cls(_freeze(other), 1.0, found.sha256)

    def losses(
        self, batches: Sequence[Batch], outputs: Outputs, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The loss of distillation times its weight; and, [2], the loss and the divergence alone.

        Args:
            batches: the micro-batches of this rank.
            outputs: the model's finite outputs for them.
            device: of the towers.
        """
        taught, scale = self._encode(batches, device)
        features = torch.stack([outputs[name] for name in FEATURES])
        with torch.autocast(device.type, enabled=False):
            both = distillation(features, outputs["logit_scale"], taught, scale)
        return self.weight * both[0], both.detach()

    @torch.no_grad()
    def _encode(self, batches: Sequence[Batch], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embeddings [2, pairs, dim] of the batch, and 1 / temperature."""
        parts, scale = list[Tensor](), torch.ones(())
        for given in batches:
            batch = given.inputs_to(device)
            layout = self.clip.image_format(device)
            images = batch.images.to(self.clip.input_dtype, memory_format=layout)
            with self.clip.autocast(device):
                found: Outputs = self.clip.towers(images, batch.tokens)
            parts.append(torch.stack([found[name].float() for name in FEATURES]))
            scale = found["logit_scale"]
        return torch.cat(parts, 1), scale


def frozen_copy(clip: Clip) -> Clip:
    """A copy of a model that is not trained."""
    return _freeze(replace(clip, towers=copy.deepcopy(clip.towers)))


def _freeze(clip: Clip) -> Clip:
    clip.towers.requires_grad_(False)
    clip.towers.eval()
    return clip


def _check_inputs(clip: Clip, teacher: Clip) -> None:
    """Checks that the teacher reads the batch as the model does.

    Raises:
        UserError: names what differs.
    """
    ours, theirs = clip.architecture, teacher.architecture
    text = "A photo of two cats, and of 3 dogs."
    tokens, others = clip.tokenize([text]), teacher.tokenize([text])
    for what, one, other in (
        ("images of size", _image_size(clip), _image_size(teacher)),
        ("images with mean", ours.all_preprocessing["mean"], theirs.all_preprocessing["mean"]),
        ("images with std", ours.all_preprocessing["std"], theirs.all_preprocessing["std"]),
        ("tokens", tokens.tolist(), others.tolist()),
    ):
        if _plain(one) != _plain(other):
            values = "" if what == "tokens" else f" {_plain(other)}, the model {_plain(one)}"
            raise UserError(
                f"--distill-model {theirs.short_name}: the teacher reads other {what}{values}; "
                "both encode the same batch: take a teacher with the image size, preprocessing and "
                "tokenizer of the model"
            )


def _image_size(clip: Clip) -> object:
    return cast(Any, clip.towers.visual).image_size


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
