"""One step: encode, loss, backward, update. It names no method, and keeps nothing between steps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip import distributed
from neuclip.data.batch import Batch
from neuclip.method.inputs import NotFiniteError
from neuclip.method.interfaces import Section, no_section
from neuclip.method.losses.base import PairLoss
from neuclip.training.accumulation import CachedFeatures, Outputs
from neuclip.training.model import Clip, clamp_logit_scale
from neuclip.training.optim import Optimizer


@dataclass(frozen=True)
class StepResult:
    """What a step came to.

    Attributes:
        loss: the mean over this process's pairs.
        gradient_norm: of all parameters, before clipping; none if there was no backward pass.
        problem: why the towers were left as they were, if they were.
    """

    loss: Tensor
    gradient_norm: Tensor | None
    problem: str | None


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
        loss.section = section

    def __call__(self, batches: Sequence[Batch]) -> StepResult:
        """One update.

        Args:
            batches: the micro-batches that together are this process's batch.

        Raises:
            NotFiniteError: with several processes, embeddings that are not finite: the others wait
                inside the loss, and only ending the run frees them.
        """
        cached = None
        if len(batches) == 1:
            outputs = self._encode(batches[0])
        else:
            cached = CachedFeatures(self._encode, batches, self._device)
            outputs = cached.outputs
        ids = [batch.sample_ids for batch in batches]
        loss, problem = self._evaluate(outputs, torch.cat(ids) if cached else ids[0])
        # All processes agree before the backward pass, which waits for all of them.
        if distributed.any_rank(problem is not None):
            problem = problem or "another process met a loss that is not finite"
            return StepResult(loss.detach(), None, problem)
        with self._section("backward"):
            loss.backward()
            if cached is not None:
                cached.backward(self._towers)
        with self._section("optimizer"):
            return self._update(loss.detach())

    def _encode(self, batch: Batch) -> Outputs:
        with self._section("encode"), self._clip.autocast(self._device):
            batch = batch.to(self._device, non_blocking=True)
            return self._towers(batch.images.to(self._clip.input_dtype), batch.tokens)

    def _evaluate(self, outputs: Outputs, sample_ids: Tensor) -> tuple[Tensor, str | None]:
        """The loss, and what is wrong with it if it is not finite."""
        try:
            with self._section("loss"):
                loss = self._loss(**outputs, sample_ids=sample_ids)
        except NotFiniteError as error:
            if distributed.is_active():
                raise
            return torch.tensor(torch.nan, device=self._device), str(error)
        assert isinstance(loss, Tensor)
        finite = bool(torch.isfinite(loss))
        return loss, None if finite else f"the loss is {float(loss.detach())}"

    def _update(self, loss: Tensor) -> StepResult:
        """Steps the towers, unless the gradient (the same on all processes) is not finite."""
        norm = self._optimizer.gradient_norm()
        if not bool(torch.isfinite(norm)):
            return StepResult(loss, norm, f"the gradient's norm is {float(norm)}")
        self._optimizer.step()
        clamp_logit_scale(self._clip.towers)
        return StepResult(loss, norm, None)
