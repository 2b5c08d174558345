"""Parameter groups, AdamW, and schedules as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuclip.config.sections import OptimConfig
from neuclip.parallel import fsdp

STEP_THRESHOLD = 0.03
"""FastCLIP divides lr_tau by three while the temperature is at most this."""


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `floor`, or constant.

    Attributes:
        peak: learning rate after the warm-up.
        floor: learning rate at the end of the cosine.
        warmup: steps of the warm-up.
        total: steps of the run.
        kind: `cosine` or `const`.
    """

    peak: float
    floor: float
    warmup: int
    total: int
    kind: str

    def at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "const":
            return self.peak
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.floor + 0.5 * (1 + math.cos(math.pi * progress)) * (self.peak - self.floor)


def _own_tau_schedule(settings: OptimConfig, total_steps: int) -> Schedule | None:
    """The schedule of `lr_tau` if it is a cosine of its own."""
    if settings.lr_tau is None or settings.lr_tau_scheduler != "cosine":
        return None
    return Schedule(settings.lr_tau, settings.lr_min, settings.warmup, total_steps, "cosine")


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


def is_gain_or_bias(name: str, parameter: Tensor) -> bool:
    """Whether a parameter gets no weight decay, by open_clip's rule."""
    marks = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim < 2 or any(mark in name for mark in marks)


class Optimizer:
    """AdamW over three groups: gains and biases, weights, and the temperature.

    It updates the local shard of a sharded parameter, a plain tensor, with the same fused kernels.

    Args:
        towers: the model; parameters without gradients are left out.
        settings: the `optim` settings.
        total_steps: length of the schedule.

    Attributes:
        adamw: torch's optimiser over the local shards.
        parameters: the trainable parameters, in the order of the towers.
        in_order: the same parameters, in the order of `adamw`'s state.
    """

    def __init__(self, towers: nn.Module, settings: OptimConfig, total_steps: int) -> None:
        named = [(name, p) for name, p in towers.named_parameters() if p.requires_grad]
        temperature = [p for name, p in named if name.endswith("logit_scale")]
        others = [(name, p) for name, p in named if not name.endswith("logit_scale")]
        plain = [p for name, p in others if is_gain_or_bias(name, p)]
        decayed = [p for name, p in others if not is_gain_or_bias(name, p)]
        groups: list[dict[str, Any]] = [
            {"params": plain, "weight_decay": 0.0},
            {"params": decayed, "weight_decay": settings.wd},
            {"params": temperature, "weight_decay": 0.0, "is_temperature": True},
        ]
        assert settings.beta2 is not None
        assert settings.eps is not None
        self._settings = settings
        self._schedule = Schedule(
            settings.lr, settings.lr_min, settings.warmup, total_steps, settings.lr_scheduler
        )
        self._tau_schedule = _own_tau_schedule(settings, total_steps)
        self.adamw = torch.optim.AdamW(
            [
                {**group, "params": [fsdp.local_shard(p) for p in group["params"]]}
                for group in groups
                if group["params"]
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )
        self.parameters = [p for _, p in named]
        self.in_order = [p for group in groups for p in group["params"]]

    def set_rates(self, step: int) -> float:
        """Sets the learning rates of a step, and returns that of the towers."""
        rate = self._schedule.at(step)
        for group in self.adamw.param_groups:
            if group.get("is_temperature", False):
                if self._tau_schedule is not None:
                    group["lr"] = self._tau_schedule.at(step)
                else:
                    group["lr"] = temperature_rate(self._settings, rate, group["params"][0])
            else:
                group["lr"] = rate
        return rate

    def hold(self) -> None:
        """Sets all learning rates to 0.

        A step then updates the moments and step counts, and changes no parameter: AdamW multiplies
        its weight decay by the rate, too.
        """
        for group in self.adamw.param_groups:
            group["lr"] = 0.0

    def gradient_norm(self) -> Tensor:
        """Returns the norm of all gradients, then clips them if `grad_clip_norm` is set.

        One non-finite gradient makes the norm non-finite.
        """
        if self._settings.grad_clip_norm is not None:
            return fsdp.clip_gradients(self.parameters, self._settings.grad_clip_norm)
        return fsdp.total_norm([p.grad for p in self.parameters if p.grad is not None])

    def step(self, skip: Tensor) -> None:
        """Updates the parameters and clears the gradients.

        Args:
            skip: float32 scalar; if 1, the fused kernels leave parameters, moments and step counts
                unchanged.
        """
        self.adamw.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        shards = [p for group in self.adamw.param_groups for p in group["params"]]
        for parameter, shard in zip(self.in_order, shards, strict=True):
            if shard is not parameter:
                shard.grad = None if parameter.grad is None else fsdp.to_local(parameter.grad)
        self.adamw.step()
        for parameter, shard in zip(self.in_order, shards, strict=True):
            parameter.grad = shard.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns AdamW's state with plain numbers as learning rates; waits for the device.

        Moments of sharded parameters are DTensors with the parameter's sharding.
        """
        state = self.adamw.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        state["state"] = {
            number: {key: _sharded(value, self.in_order[number]) for key, value in moments.items()}
            for number, moments in state["state"].items()
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state, full or sharded, whether or not the towers are sharded."""
        placed = {
            number: {key: _local(value, self.in_order[number]) for key, value in moments.items()}
            for number, moments in state["state"].items()
        }
        self.adamw.load_state_dict({**state, "state": placed})


def _sharded(value: object, parameter: nn.Parameter) -> object:
    """A local shard of a moment as a DTensor, sharded as its parameter; other values unchanged."""
    if isinstance(value, Tensor) and value.ndim:
        return fsdp.from_local(value, parameter)
    return value


def _local(value: object, parameter: nn.Parameter) -> object:
    """The local shard of a full or sharded moment; other values unchanged."""
    if isinstance(value, Tensor) and value.ndim:
        return fsdp.to_local(fsdp.shard_like(value, parameter))
    return value
