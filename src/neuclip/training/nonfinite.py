"""Steps with non-finite numbers: masked on the device, reported by the host one step later.

Reading a number of the running step (`float(loss)`) makes the host wait for the device, and then
the device for the host's next launch. So no number is read while its step runs:

1. `FiniteOutputs` replaces non-finite feature rows, and the optimiser skips the update, both on the
   device;
2. `Readback` copies the step's status to the host in the background;
3. `StepMonitor` reads each status one step late on CUDA, at once on the CPU. It lists the batch of
   a skipped step, and ends the run after too many of them.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuclip.data.batch import Batch
from neuclip.errors import UserError
from neuclip.files import write_whole
from neuclip.parallel import collectives
from neuclip.run_folder import RunFolder

log = logging.getLogger("neuclip")

Outputs = dict[str, Tensor]

FEATURES = ("image_features", "text_features")
NEGATIVES = "negative_features"
KEYS = "key_features"
PATCHES = "patch_features"
PER_PAIR = (*FEATURES, NEGATIVES, PATCHES)
"""The towers' outputs with one row per pair; hard negatives only if the data have some, and patch
features only with supervision by tokens."""

ON_ANOTHER_RANK = "the loss is not finite on another process"


@dataclass(frozen=True)
class FiniteOutputs:
    """The towers' outputs with finite features.

    Losses keep the features that they see (tables, prototypes, queues), so that one infinite row
    would spoil their state for good.

    Attributes:
        outputs: the towers' outputs, and keys [2, pairs, dim] if there are any; a unit vector
            replaces every non-finite row of features and keys, zeros one of hard negatives.
        bad_rows: [2, 2], for the image and the text features: the number of non-finite rows, and
            the index of the first.
        any_bad: scalar bool: whether there is a non-finite row.
    """

    outputs: Outputs
    bad_rows: Tensor
    any_bad: Tensor

    @classmethod
    def of(cls, outputs: Outputs) -> "FiniteOutputs":
        """Replaces the non-finite rows of the towers' outputs."""
        finite, bad_rows = dict(outputs), []
        for name in FEATURES:
            finite[name], bad = _with_units(outputs[name])
            bad_rows.append(torch.stack([bad.sum(), bad.int().argmax()]))
        counts = torch.stack(bad_rows)
        any_bad = (counts[:, 0] > 0).any()
        if NEGATIVES in outputs:
            bad = ~torch.isfinite(outputs[NEGATIVES].detach()).all(-1)
            finite[NEGATIVES] = outputs[NEGATIVES].masked_fill(bad[:, None], 0)
            any_bad = any_bad | bad.any()
        if KEYS in outputs:
            finite[KEYS], bad = _with_units(outputs[KEYS])
            any_bad = any_bad | bad.any()
        return cls(finite, counts, any_bad)


def _with_units(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features with unit vectors for their non-finite rows, and which rows these are."""
    bad = ~torch.isfinite(features.detach()).all(-1)
    unit = torch.zeros_like(features.flatten(0, -2)[0])
    unit[:1].fill_(1)
    return torch.where(bad[..., None], unit, features), bad


@dataclass(frozen=True)
class StepStatus:
    """The host's view of a finished step.

    Attributes:
        loss_rejected: the loss is not finite on some rank.
        stop: some rank was asked to stop before the step.
        loss: of this rank.
        gradient_norm: over all parameters, before clipping.
        temperature: before the step.
        loss_scale: of the step; 1 if the loss is not scaled.
        bad_rows: per side, the number of this rank's non-finite feature rows, and the index of the
            first.
        pairs: number of pairs on this rank.
    """

    loss_rejected: bool
    stop: bool
    loss: float
    gradient_norm: float
    temperature: float
    loss_scale: float
    bad_rows: tuple[tuple[int, int], tuple[int, int]]
    pairs: int

    @property
    def problem(self) -> str | None:
        """Why every rank skipped the update; none if it was applied, or the scale was too large."""
        for name, (count, first) in zip(FEATURES, self.bad_rows, strict=True):
            if count:
                return (
                    f"{name}: {count} of {self.pairs} rows are not finite, the first is row {first}"
                )
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if self.loss_rejected:
            return ON_ANOTHER_RANK
        if not math.isfinite(self.gradient_norm) and not self.overflow:
            return f"the gradient norm is {self.gradient_norm}"
        return None

    @property
    def overflow(self) -> bool:
        """Whether a gradient overflowed at a loss scale that can still be lowered.

        Every rank skipped the update, and the next step has half the scale.
        """
        finite = math.isfinite(self.loss) and not self.loss_rejected
        return finite and not math.isfinite(self.gradient_norm) and self.loss_scale > 1


class Readback:
    """A step status on its way to the host.

    Args:
        numbers: [10], the first six fields of `StepStatus` in order, then `bad_rows`.
        pairs: number of pairs on this rank.
    """

    def __init__(self, numbers: Tensor, pairs: int) -> None:
        self._pairs = pairs
        self._arrived: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> StepStatus:
        """Returns the status; waits until the step has finished."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss_rejected, stop, loss, norm, temperature, scale, *bad_rows = self._numbers.tolist()
        images, image, texts, text = (int(number) for number in bad_rows)
        return StepStatus(
            loss_rejected=bool(loss_rejected),
            stop=bool(stop),
            loss=loss,
            gradient_norm=norm,
            temperature=temperature,
            loss_scale=scale,
            bad_rows=((images, image), (texts, text)),
            pairs=self._pairs,
        )


@dataclass(frozen=True)
class _PendingStep:
    """A launched step whose status is not read yet."""

    number: int
    rate: float
    batches: Sequence[Batch]
    readback: Readback


class StepMonitor:
    """Reads the status of every step, and ends the run after too many skipped steps.

    Args:
        limit: `--max-nonfinite-steps`.
        folder: where the batches of skipped steps are listed.
        device: the device of the towers.

    Attributes:
        skipped: number of steps skipped so far.
        overflows: number of steps skipped because of the loss scale alone; `limit` does not count
            them.
        stop: a rank was asked to stop; becomes true at the same step on all ranks.
    """

    def __init__(self, limit: int, folder: RunFolder, device: torch.device) -> None:
        self._limit, self._folder = limit, folder
        self._delay = 1 if device.type == "cuda" else 0
        self._pending: deque[_PendingStep] = deque()
        self.skipped = self.overflows = 0
        self.stop = False

    def add(self, number: int, rate: float, batches: Sequence[Batch], readback: Readback) -> None:
        """Registers a launched step, and reads the status of an earlier one.

        Args:
            number: of the step, from 1.
            rate: its learning rate.
            batches: its micro-batches.
            readback: its status.

        Raises:
            UserError: too many steps were skipped.
        """
        self._pending.append(_PendingStep(number, rate, batches, readback))
        self._read_until(self._delay)

    def read_all(self) -> None:
        """Waits for all launched steps and reads their status, as a checkpoint needs.

        Raises:
            UserError: too many steps were skipped.
        """
        self._read_until(0)

    def _read_until(self, left: int) -> None:
        while len(self._pending) > left:
            step = self._pending.popleft()
            status = step.readback.read()
            self.stop = self.stop or status.stop
            if status.overflow:
                self.overflows += 1
                log.info(
                    "step %d: a gradient overflows at loss scale %.0f; skipped, the scale halved",
                    step.number,
                    status.loss_scale,
                )
            if status.problem is not None:
                self._count_skipped(step, _with_rank(status.problem), status.temperature)

    def _count_skipped(self, step: _PendingStep, problem: str, temperature: float) -> None:
        """Lists the batch of a skipped step.

        Raises:
            UserError: too many steps were skipped; names the step and what usually helps.
        """
        self.skipped += 1
        where = (
            f"step {step.number}: {problem} (temperature {temperature:.4g}, learning rate "
            f"{step.rate:.3g})"
        )
        path = self._folder.nonfinite_step(step.number, collectives.rank())
        listed = {
            "problem": where,
            "keys": [key for batch in step.batches for key in batch.keys],
            "sample_ids": [i for batch in step.batches for i in batch.sample_ids.tolist()],
        }
        write_whole(path, json.dumps(listed, indent=1) + "\n")
        if self.skipped > self._limit:
            raise UserError(
                f"{where}; {path} lists its batch. The last checkpoint is intact. Lower --lr, "
                "raise --warmup, clip with --grad-clip-norm 1.0, or allow skipped steps with "
                f"--max-nonfinite-steps (now {self._limit})"
            )
        log.warning(
            "skipped %s; %d of at most %d skipped steps; see %s",
            where,
            self.skipped,
            self._limit,
            path,
        )


def _with_rank(problem: str) -> str:
    """Finds the first rank with a problem of its own, and names it; all ranks call this."""
    found = collectives.first_rank_with(None if problem == ON_ANOTHER_RANK else problem)
    if found is None or not collectives.is_active():
        return problem
    return f"process {found[0]}: {found[1]}"
