"""Learning rates as pure functions of the step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neuclip.config.optimizer_section import OptimConfig

STEP_THRESHOLD = 0.03
"""FastCLIP divides lr_tau by three while the temperature is at most this."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `floor`, or constant.

    `const-cooldown` is constant, then falls to `floor` over the last steps (open_clip's
    `const_lr_cooldown`).

    Attributes:
        peak: learning rate after the warm-up.
        floor: learning rate at the end of the cosine or the cooldown.
        warmup: steps of the warm-up.
        total: steps of the run.
        kind: `cosine`, `const` or `const-cooldown`.
        cooldown: steps of the cooldown.
        power: of the cooldown's decay; 1 is linear.
    """

    peak: float
    floor: float
    warmup: int
    total: int
    kind: str
    cooldown: int = 0
    power: float = 1.0

    @classmethod
    def of_towers(cls, settings: OptimConfig, total_steps: int) -> "Schedule":
        """The schedule of the towers.

        Args:
            settings: the `optim` settings.
            total_steps: steps of all epochs.
        """
        kind, cooling = settings.lr_scheduler, settings.lr_scheduler == "const-cooldown"
        floor = settings.lr_cooldown_end if cooling else settings.lr_min
        cooldown = total_steps * (settings.epochs_cooldown or 0) // max(settings.epochs, 1)
        return cls(
            settings.lr, floor, settings.warmup, total_steps, kind, cooldown,
            settings.lr_cooldown_power,
        )  # fmt: skip

    @classmethod
    def of_temperature(cls, settings: OptimConfig, total_steps: int) -> "Schedule | None":
        """The schedule of `lr_tau` if it is a cosine of its own."""
        if settings.lr_tau is None or settings.lr_tau_scheduler != "cosine":
            return None
        return cls(settings.lr_tau, settings.lr_min, settings.warmup, total_steps, "cosine")

    def at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "const":
            return self.peak
        if self.kind == "const-cooldown":
            start = self.total - self.cooldown
            if step < start:
                return self.peak
            left = max(0.0, 1 - (step - start) / max(1, self.cooldown))
            return left**self.power * (self.peak - self.floor) + self.floor
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.floor + 0.5 * (1 + math.cos(math.pi * progress)) * (self.peak - self.floor)


def temperature_rate(
    settings: OptimConfig, towers_rate: float, logit_scale: Tensor
) -> float | Tensor:
    """The learning rate of `logit_scale` at a step, unless it has a cosine of its own.

    Args:
        settings: hold `lr_tau` and its schedule.
        towers_rate: the towers' learning rate at this step.
        logit_scale: logarithm of the current inverse temperature.

    Returns:
        A number; for `step_thresh` a scalar on the device, so that the host does not wait.
    """
    if settings.lr_tau is None:
        return towers_rate
    if settings.lr_tau_scheduler == "same":
        return settings.lr_tau * towers_rate / settings.lr
    if settings.lr_tau_scheduler == "step_thresh":
        # The fused kernels read the rate as float32 on CUDA, as float64 on the CPU.
        dtype = torch.float64 if logit_scale.device.type == "cpu" else torch.float32
        rate = torch.full_like(logit_scale, settings.lr_tau, dtype=dtype, requires_grad=False)
        low = (-logit_scale.detach()).exp() <= STEP_THRESHOLD
        return rate.masked_fill_(low, settings.lr_tau / 3)
    return settings.lr_tau
