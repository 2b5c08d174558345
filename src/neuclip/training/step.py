"""One training step: encode, loss, backward, update. Knows no method and keeps no state.

The host never waits for the device in a step: see `neuclip.training.nonfinite`.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuclip.data.batch import Batch
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.notation import SectionTimer, no_timer
from neuclip.model.clip import Clip, clamp_logit_scale
from neuclip.model.patch_features import captured_patches
from neuclip.parallel import collectives
from neuclip.training.accumulation import CachedFeatures, running_statistics_frozen
from neuclip.training.momentum import MomentumTowers
from neuclip.training.nonfinite import (
    FEATURES,
    KEYS,
    PATCHES,
    FiniteOutputs,
    Outputs,
    Readback,
)
from neuclip.training.optim import Optimizer
from neuclip.training.teacher import Teacher
from neuclip.training.token_supervision import TokenSupervision


@dataclass(frozen=True)
class StepResult:
    """The numbers of a step, on the device.

    Attributes:
        loss: the mean over this rank's pairs.
        gradient_norm: over all parameters, before clipping.
        mean_features: [2, dim] the mean embedding of this rank's images and of its texts.
        readback: the step's status, on its way to the host.
        distilled: [2] of this rank, the loss of distillation before its weight, and the divergence
            from the teacher; none without a teacher.
        token_loss: of this rank, before its weight; none without supervision by tokens.
    """

    loss: Tensor
    gradient_norm: Tensor
    mean_features: Tensor
    readback: Readback
    distilled: Tensor | None = None
    token_loss: Tensor | None = None


class TrainingStep:
    """Updates the towers, and the state that the loss trains itself, with a batch.

    Args:
        clip: the model.
        towers: the model's towers as called in training (over several ranks, the DDP wrapper).
        loss: the method's loss.
        optimizer: of the towers.
        device: of the towers; batches are moved there.
        section: opens a named section of the step timer.
        teacher: of distillation, whose loss is added; none: without distillation.
        supervision: by tokens, whose loss is added; none: without.

    Attributes:
        momentum: the momentum towers, for a loss that contrasts with keys; none for any other.
    """

    def __init__(  # noqa: PLR0913  the parts of a step
        self,
        clip: Clip,
        towers: nn.Module,
        loss: PairLoss,
        optimizer: Optimizer,
        device: torch.device,
        section: SectionTimer = no_timer,
        teacher: Teacher | None = None,
        supervision: TokenSupervision | None = None,
    ) -> None:
        self._teacher, self._supervision = teacher, supervision
        self.momentum = MomentumTowers.of(loss, clip)
        self._clip, self._towers = clip, towers
        self._loss, self._optimizer = loss, optimizer
        self._device, self._section = device, section
        self._settling = False

    @contextmanager
    def settling(self) -> Generator[None]:
        """Inside, steps leave the towers and the temperature as they are.

        The optimiser's moments and the state of the loss learn as in any step (TuneCLIP, arXiv
        2601.09859, stage 1). The caller sets the learning rates again for the steps after it.
        """
        self._settling = self._loss.settling = True
        self._optimizer.hold()
        try:
            with running_statistics_frozen(self._towers):
                yield
        finally:
            self._settling = self._loss.settling = False

    def __call__(self, batches: Sequence[Batch], stop_asked: bool = False) -> StepResult:
        """Runs one step; every rank skips the towers' update if any rank has a non-finite number.

        Args:
            batches: the micro-batches of this rank's batch.
            stop_asked: this rank was asked to stop; the step status passes it on to all ranks.
        """
        keys = self._encode_keys(batches)
        cached = None
        if len(batches) == 1:
            outputs = self._encode(batches[0])
        else:
            cached = CachedFeatures(self._encode, batches, self._device)
            outputs = cached.outputs
        outputs = dict(outputs)
        patches = outputs.pop(PATCHES, None)
        finite = FiniteOutputs.of({**outputs, **keys})
        ids = [batch.sample_ids for batch in batches]
        given = {"sample_ids": torch.cat(ids) if cached else ids[0], **_batch_options(batches)}
        # The loss computes in float32 but for the factors of its large products.
        with self._section("loss"), self._clip.autocast(self._device):
            loss = self._loss(**finite.outputs, **given)
        assert isinstance(loss, Tensor)
        loss, distilled, token_loss = self._with_others(loss, batches, finite.outputs, patches)
        value = loss.detach().masked_fill(finite.any_bad, torch.nan)
        flags = torch.stack([~torch.isfinite(value), torch.full_like(value, stop_asked).bool()])
        flags = collectives.max_over_ranks(flags.float())
        self._backward(loss, cached)
        loss_scale = self._optimizer.loss_scale
        scale = torch.ones_like(value) if loss_scale is None else loss_scale.scale
        with self._section("optimizer"):
            norm = self._update(loss_rejected=flags[0])
        temperature = 1 / outputs["logit_scale"].detach()
        numbers = [*flags, *(number.float() for number in (value, norm, temperature, scale))]
        status = torch.cat([torch.stack(numbers), finite.bad_rows.flatten().float()])
        means = torch.stack([outputs[name].detach().float().mean(0) for name in FEATURES])
        readback = Readback(status, len(outputs["image_features"]))
        return StepResult(value, norm, means, readback, distilled, token_loss)

    def _with_others(
        self, loss: Tensor, batches: Sequence[Batch], outputs: Outputs, patches: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The loss with those of the teacher and of the token head added, and these alone."""
        distilled = token_loss = None
        if self._teacher is not None:
            with self._section("distillation"):
                added, distilled = self._teacher.losses(batches, outputs, self._device)
            loss = loss + added
        if self._supervision is not None:
            assert patches is not None
            with self._section("token head"), self._clip.autocast(self._device):
                added, token_loss = self._supervision.loss(batches, patches, self._device)
            loss = loss + added
        return loss, distilled, token_loss

    def _backward(self, loss: Tensor, cached: CachedFeatures | None) -> None:
        with self._section("backward"):
            self._optimizer.scaled(loss).backward()
            if cached is not None:
                cached.backward(self._towers)
            if self._supervision is not None:
                self._supervision.average_gradients()

    def _encode(self, batch: Batch) -> Outputs:
        with self._section("encode"), self._clip.autocast(self._device):
            batch, images = self._inputs(batch)
            if batch.negative_tokens is None:
                return self._outputs(images, batch.tokens)
            # One pass of the text tower for captions and hard negatives.
            captions = torch.cat([batch.tokens, batch.negative_tokens])
            return _split(self._outputs(images, captions), batch)

    def _outputs(self, images: Tensor, tokens: Tensor) -> Outputs:
        """What the towers return, with the patch features if a head reads them."""
        if self._supervision is None:
            return self._towers(images, tokens)
        with captured_patches(self._clip.towers) as patches:
            outputs = self._towers(images, tokens)
        return {**outputs, PATCHES: patches[-1]}

    def _encode_keys(self, batches: Sequence[Batch]) -> Outputs:
        """The keys of the batch, if the loss contrasts with keys; before the towers' own pass."""
        if self.momentum is None:
            return {}
        with self._section("keys"):
            return {KEYS: self.momentum.keys(self._encode_key, batches)}

    def _encode_key(self, batch: Batch) -> Outputs:
        with self._clip.autocast(self._device):
            batch, images = self._inputs(batch)
            return self._clip.towers(images, batch.tokens)

    def _inputs(self, batch: Batch) -> tuple[Batch, Tensor]:
        """The batch on the device, and its images as the towers take them."""
        batch = batch.inputs_to(self._device)
        # Convolutions keep the memory layout of their input; a ViT accepts either.
        layout = self._clip.image_format(self._device)
        return batch, batch.images.to(self._clip.input_dtype, memory_format=layout)

    def _update(self, loss_rejected: Tensor) -> Tensor:
        """Updates the towers, unless the loss or the gradient is not finite on some rank.

        Args:
            loss_rejected: scalar; 1 if the loss is not finite on some rank.

        Returns:
            The gradient norm, equal on all ranks.
        """
        norm = self._optimizer.gradient_norm()
        if self._optimizer.loss_scale is not None:
            self._optimizer.loss_scale.update(norm, loss_rejected)
        self._optimizer.step(skip=torch.maximum(loss_rejected, (~torch.isfinite(norm)).float()))
        if not self._settling:
            clamp_logit_scale(self._clip.towers, self._loss.logit_scale_bounds)
        return norm


def _split(outputs: Outputs, batch: Batch) -> Outputs:
    """The outputs with the hard negatives apart; rows of pairs without one are 0."""
    text, negative = outputs["text_features"].split(len(batch))
    assert batch.has_negative is not None
    negative = negative.masked_fill(~batch.has_negative[:, None], 0)
    return {**outputs, "text_features": text, "negative_features": negative}


def _batch_options(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The groups and weights of the pairs of all micro-batches, as far as batches have them."""
    found: dict[str, Tensor] = {}
    for name in ("groups", "pair_weights"):
        parts = [getattr(batch, name) for batch in batches]
        if parts[0] is not None:
            found[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found
