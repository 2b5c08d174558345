"""Whether a step may count, decided on the device; the host reads it when it no longer waits.

A host that looks at a number of the step it just asked for (`float(loss)`) waits until the device
has done all of it, and the device then waits for the host to ask for the next. So nothing of a step
is read while it runs: what is not finite is masked on the device, in the update itself, and what
the host must say about it travels to it in the background.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = dict[str, Tensor]

FEATURES = ("image_features", "text_features")


@dataclass(frozen=True)
class Containment:
    """Features that a loss can keep, whatever the towers made.

    Attributes:
        outputs: the towers' outputs; a row that is not finite is replaced by a unit vector. Losses
            keep what they see (tables, prototypes): one infinite row would spoil them for good.
        wrong: [2, 2] of the image and of the text features: how many rows are not finite, and which
            is the first.
        any_wrong: whether there is such a row, a scalar of bool.
    """

    outputs: Outputs
    wrong: Tensor
    any_wrong: Tensor

    @classmethod
    def of(cls, outputs: Outputs) -> "Containment":
        """The outputs of the towers, contained."""
        contained, wrong = dict(outputs), []
        for name in FEATURES:
            features = outputs[name]
            bad = ~torch.isfinite(features.detach()).all(-1)
            unit = torch.zeros_like(features[:1])
            unit[:, 0].fill_(1)
            contained[name] = torch.where(bad[:, None], unit, features)
            wrong.append(torch.stack([bad.sum(), bad.int().argmax()]))
        counts = torch.stack(wrong)
        return cls(contained, counts, (counts[:, 0] > 0).any())


ELSEWHERE = "another process met a loss that is not finite"


@dataclass(frozen=True)
class Verdict:
    """What the host learns of a step.

    Attributes:
        voted_down: a process met a loss that is not finite.
        stop: a process was asked to stop before the step.
        loss: of this process.
        gradient_norm: of all parameters, before clipping.
        temperature: before the step.
        wrong: per side, how many rows of this process's features are not finite, and the first.
        pairs: rows of this process's features.
    """

    voted_down: bool
    stop: bool
    loss: float
    gradient_norm: float
    temperature: float
    wrong: tuple[tuple[int, int], tuple[int, int]]
    pairs: int

    @property
    def problem(self) -> str | None:
        """Why the towers were left as they were, on all processes, if they were."""
        for name, (count, first) in zip(FEATURES, self.wrong, strict=True):
            if count:
                return (
                    f"{name}: {count} of {self.pairs} rows are not finite, the first is row {first}"
                )
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if self.voted_down:
            return ELSEWHERE
        if not math.isfinite(self.gradient_norm):
            return f"the gradient's norm is {self.gradient_norm}"
        return None


class Readback:
    """A verdict on its way to the host.

    Args:
        numbers: voted down, stop, loss, norm, temperature, and the four of `Containment.wrong`.
        pairs: rows of the features.
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

    def read(self) -> Verdict:
        """The verdict; waits until the step is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        voted_down, stop, loss, norm, temperature, *wrong = self._numbers.tolist()
        images, image, texts, text = (int(number) for number in wrong)
        return Verdict(
            voted_down=bool(voted_down),
            stop=bool(stop),
            loss=loss,
            gradient_norm=norm,
            temperature=temperature,
            wrong=((images, image), (texts, text)),
            pairs=self._pairs,
        )
