"""The optimiser of the towers: its groups, its learning rates, and steps that are skipped."""

from typing import Any

from torch import Tensor, nn

from neuclip.config.optimizer_section import OptimConfig
from neuclip.parallel import fsdp
from neuclip.training.learning_rate import Schedule, temperature_rate
from neuclip.training.loss_scale import LossScale
from neuclip.training.optimizer_kind import OptimizerKind, skips_on_device
from neuclip.training.parameter_groups import parameter_groups


class Optimizer:
    """The optimiser of the towers, by default AdamW, over their groups of parameters.

    It updates the local shard of a sharded parameter, a plain tensor.

    Args:
        towers: the model; parameters without gradients are left out.
        settings: the `optim` settings, resolved.
        total_steps: length of the schedule.
        loss_scale: for gradients of a scaled loss, which are divided by the scale; none: the loss
            is not scaled.
        head: trained beside the towers; none: there is none.

    Attributes:
        inner: torch's optimiser over the local shards.
        parameters: the trainable parameters, in the order of the towers, and the head's.
        groups: the same parameters, in the order of the optimiser's groups and state.
        loss_scale: as given.

    Raises:
        UserError: no such optimiser, or one that cannot update these towers.
    """

    def __init__(
        self,
        towers: nn.Module,
        settings: OptimConfig,
        total_steps: int,
        loss_scale: LossScale | None = None,
        head: nn.Module | None = None,
    ) -> None:
        kind = OptimizerKind.of(settings)
        if fsdp.is_sharded(towers):
            kind.check_shards()
        self._settings = settings
        self._schedule = Schedule.of_towers(settings, total_steps)
        self._tau_schedule = Schedule.of_temperature(settings, total_steps)
        self.loss_scale = loss_scale
        self.groups = parameter_groups(
            towers, settings, embeddings_apart=kind.leaves_embeddings, head=head
        )
        self.parameters = [p for p in towers.parameters() if p.requires_grad]
        self.parameters += [] if head is None else head.parameters()
        self.inner = kind.create(
            [
                {
                    "params": [fsdp.local_shard(p) for p in group.parameters],
                    "weight_decay": group.weight_decay,
                    **({"is_temperature": True} if group.is_temperature else {}),
                    **({"use_fallback": True} if group.fallback else {}),
                }
                for group in self.groups
            ],
            settings.lr,
            self.parameters[0].device,
        )
        self._skips_on_device = skips_on_device(self.inner)
        chosen = {"weight_decay", *kind.arguments}
        self._chosen = [
            {key: value for key, value in group.items() if key in chosen}
            for group in self.inner.param_groups
        ]

    @property
    def in_order(self) -> list[nn.Parameter]:
        """The parameters in the order of the optimiser's state."""
        return [p for group in self.groups for p in group.parameters]

    def set_rates(self, step: int) -> float:
        """Sets the learning rates of a step, and returns that of the towers' last layers."""
        rate = self._schedule.at(step)
        for group, inner in zip(self.groups, self.inner.param_groups, strict=True):
            own: float | Tensor = rate * group.rate_scale
            if group.is_temperature and self._tau_schedule is not None:
                own = self._tau_schedule.at(step)
            elif group.is_temperature:
                own = temperature_rate(self._settings, rate, inner["params"][0])
            inner["lr"] = own if self._skips_on_device else float(own)
        return rate

    def hold(self) -> None:
        """Sets all learning rates to 0.

        A step then updates the moments and step counts, and changes no parameter: the optimisers
        multiply their weight decay by the rate, too.
        """
        for group in self.inner.param_groups:
            group["lr"] = 0.0

    def release(self) -> None:
        """Ends what `hold` began; `set_rates` gives the rates.

        A parameter that had no gradient so far, such as a matrix of LoRA whose partner is 0, starts
        anew. Otherwise its first gradients would count for more than one step: second moments of 0
        are not corrected for their bias any more after many steps. Waits for the device.
        """
        for state in self.inner.state.values():
            moments = [v for v in state.values() if isinstance(v, Tensor) and v.ndim]
            if moments and not any(bool(moment.any()) for moment in moments):
                state.clear()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose backward pass gives the gradients that this optimiser takes."""
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    def gradient_norm(self) -> Tensor:
        """Returns the norm of all gradients, then clips them if `grad_clip_norm` is set.

        Gradients of a scaled loss are divided by the scale first. One non-finite gradient makes the
        norm non-finite.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale([fsdp.to_local(grad) for grad in gradients])
        if self._settings.grad_clip_norm is not None:
            return fsdp.clip_gradients(self.parameters, self._settings.grad_clip_norm)
        return fsdp.total_norm(gradients)

    def step(self, skip: Tensor) -> None:
        """Updates the parameters and clears the gradients.

        Args:
            skip: float32 scalar, equal on all ranks; if 1, parameters and state stay unchanged.
                Fused Adam and AdamW read it on the device; for other optimisers the host waits for
                it.
        """
        shards = [p for group in self.inner.param_groups for p in group["params"]]
        if self._skips_on_device:
            self.inner.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
        if self._skips_on_device or not bool(skip):
            for parameter, shard in zip(self.in_order, shards, strict=True):
                if shard is not parameter:
                    shard.grad = None if parameter.grad is None else fsdp.to_local(parameter.grad)
            self.inner.step()
        for parameter, shard in zip(self.in_order, shards, strict=True):
            parameter.grad = shard.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state with plain numbers as learning rates; waits for the device.

        Moments of sharded parameters are DTensors with the parameter's sharding.
        """
        state = self.inner.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        parameters = self.in_order
        state["state"] = {
            number: {key: _sharded(value, parameters[number]) for key, value in moments.items()}
            for number, moments in state["state"].items()
        }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a saved state, full or sharded, whether or not the towers are sharded.

        Weight decay and other numbers that the settings give stay as in the settings.
        """
        parameters = self.in_order
        placed = {
            number: {key: _local(value, parameters[number]) for key, value in moments.items()}
            for number, moments in state["state"].items()
        }
        self.inner.load_state_dict({**state, "state": placed})
        self._restore_types(placed)
        for group, chosen in zip(self.inner.param_groups, self._chosen, strict=True):
            group |= chosen

    def _restore_types(self, saved: dict[int, dict[str, Any]]) -> None:
        """Undoes torch's conversion of the state to the parameters' type."""
        shards = [p for group in self.inner.param_groups for p in group["params"]]
        for number, moments in saved.items():
            live = self.inner.state[shards[number]]
            for key, value in moments.items():
                now = live.get(key)
                both = isinstance(value, Tensor) and isinstance(now, Tensor)
                if both and now.dtype != value.dtype:
                    live[key] = value.to(now.device, copy=True)


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
