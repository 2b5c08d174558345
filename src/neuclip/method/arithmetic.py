"""How a loss computes: by which kernels, from which number type, eager or compiled.

The value of a loss is the same in every form, to rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from neuclip.method.choices import CompiledLoss, FusedLoss

P = ParamSpec("P")
T = TypeVar("T")

BACKEND = "inductor"
"""Of torch.compile; tests take a faster one."""

FUSED_BY_DEFAULT = False
"""Whether `auto` takes the fused kernels on CUDA. They were never timed on a card: `make gpu-check`
compares them with the row blocks, and this changes when it finds them equal and faster."""


@dataclass(frozen=True)
class Arithmetic:
    """The form in which a loss is computed.

    Attributes:
        fused: whether softmaxes over the batch use the fused kernels of CUDA; `auto`: as
            `FUSED_BY_DEFAULT` says, where they run.
        low_precision: type to which the factors of the softmaxes' products are rounded, for tensor
            cores; sums stay in float32. None: the features' own type.
        compiled: whether torch.compile takes the passes over row blocks and NeuCLIP's inner steps.
    """

    fused: FusedLoss = "auto"
    low_precision: torch.dtype | None = None
    compiled: CompiledLoss = "off"

    def factor(self, features: Tensor) -> Tensor:
        """Features as factors of products: rounded if they are float32 and that is asked for."""
        if self.low_precision is None or features.dtype != torch.float32:
            return features
        return features.to(self.low_precision)


PLAIN = Arithmetic()
"""Row blocks in the features' own type."""


def compiled_form(function: Callable[P, T], *, graphs: bool = False) -> Callable[P, T]:
    """The function compiled; with `graphs` also recorded as a CUDA graph, where it is on CUDA.

    A CUDA graph writes its results where it wrote them before: the caller must have used or copied
    those of an earlier call.
    """
    if BACKEND == "inductor" and graphs:
        return torch.compile(function, mode="reduce-overhead")
    return torch.compile(function, backend=BACKEND)


def autocast_precision(device_type: str) -> torch.dtype | None:
    """The `low_precision` inside a user's autocast: bfloat16, or none.

    float16 is left out: softmaxes below its smallest number would be lost in the gradient.
    """
    if not (
        torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    ):
        return None
    return torch.bfloat16 if torch.get_autocast_dtype(device_type) == torch.bfloat16 else None
