"""One step: encode, loss, backward, update. It names no method, and keeps nothing between steps.

The host never waits for the device in it: see `neuclip.training.nonfinite`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip.data.batch import Batch
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.notation import Section, no_section
from neuclip.model.clip import Clip, clamp_logit_scale
from neuclip.parallel import collectives
from neuclip.training.accumulation import CachedFeatures
from neuclip.training.nonfinite import Containment, Outputs, Readback
from neuclip.training.optim import Optimizer


@dataclass(frozen=True)
class StepResult:
    """What a step came to, on the device.

    Attributes:
        loss: the mean over this process's pairs.
        gradient_norm: of all parameters, before clipping.
        readback: what the host will read of it.
    """

    loss: Tensor
    gradient_norm: Tensor
    readback: Readback


class TrainingStep:
    """Updates the towers, and whatever the loss trains itself, with a batch.

    Args:
        clip: the model.
        towers: its towers as this process calls them (with several processes: their wrapper).
        loss: the method.
        optimizer: of the towers.
        device: where they live; batches are moved there.
        section: called with a name around the parts of the step.
    """

    def __init__(
        self,
        clip: Clip,
        towers: nn.Module,
        loss: PairLoss,
        optimizer: Optimizer,
        device: torch.device,
        section: Section = no_section,
    ) -> None:
        self._clip, self._towers = clip, towers
        self._loss, self._optimizer = loss, optimizer
        self._device, self._section = device, section

    def __call__(self, batches: Sequence[Batch], stop_asked: bool = False) -> StepResult:
        """One update; none of the towers where a process met a number that is not finite.

        Args:
            batches: the micro-batches that together are this process's batch.
            stop_asked: tells the other processes, in the verdict, that this one was asked to stop.
        """
        cached = None
        if len(batches) == 1:
            outputs = self._encode(batches[0])
        else:
            cached = CachedFeatures(self._encode, batches, self._device)
            outputs = cached.outputs
        contained = Containment.of(outputs)
        ids = [batch.sample_ids for batch in batches]
        with self._section("loss"):
            loss = self._loss(**contained.outputs, sample_ids=torch.cat(ids) if cached else ids[0])
        assert isinstance(loss, Tensor)
        value = loss.detach().masked_fill(contained.any_wrong, torch.nan)
        votes = torch.stack([~torch.isfinite(value), torch.full_like(value, stop_asked).bool()])
        votes = collectives.max_over_ranks(votes.float())
        with self._section("backward"):
            loss.backward()
            if cached is not None:
                cached.backward(self._towers)
        with self._section("optimizer"):
            norm = self._update(votes[0])
        temperature = 1 / outputs["logit_scale"].detach()
        numbers = [*votes, *(number.float() for number in (value, norm, temperature))]
        stacked = torch.cat([torch.stack(numbers), contained.wrong.flatten().float()])
        return StepResult(value, norm, Readback(stacked, len(outputs["image_features"])))

    def _encode(self, batch: Batch) -> Outputs:
        with self._section("encode"), self._clip.autocast(self._device):
            batch = batch.inputs_to(self._device)
            # Convolutions follow the layout of their input; a ViT's patches are cut from either.
            images = batch.images.to(self._clip.input_dtype, memory_format=torch.channels_last)
            return self._towers(images, batch.tokens)

    def _update(self, voted_down: Tensor) -> Tensor:
        """Steps the towers, unless that was voted down or the gradient is not finite.

        Args:
            voted_down: a scalar, 1: a process met a loss that is not finite.

        Returns:
            The gradient's norm, the same on all processes.
        """
        norm = self._optimizer.gradient_norm()
        self._optimizer.step(skip=torch.maximum(voted_down, (~torch.isfinite(norm)).float()))
        clamp_logit_scale(self._clip.towers)
        return norm
