"""Exponential moving averages (EMA) of the towers' weights.

One is for evaluation, as in timm's ModelEmaV3; the other encodes the keys of momentum contrast.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from neuclip.model.lora import stored_weights
from neuclip.parallel import fsdp

AVERAGES = "ema_state_dict"
"""Key of the averaged weights in a checkpoint, beside `state_dict`."""
MOMENTUM = "momentum_state_dict"
"""Key of the weights that encode the keys of momentum contrast, beside `state_dict`."""


class WeightAverage:
    """average <- d * average + (1 - d) * weights after each step, at least in float32.

    The decay at step s is d_s = min(decay, (1 + s) / (10 + s)), so the random initial weights are
    forgotten early; or it is the same at every step. BatchNorm's running statistics are averaged
    too; integers are copied. Each rank averages its own shard of sharded towers. Of LoRA, the
    low-rank matrices are averaged, not their products.

    Args:
        towers: the model, on its device and already sharded if it will be.
        decay: limit of d_s.
        constant: whether d_s is the decay from the first step on.
    """

    def __init__(self, towers: nn.Module, decay: float, *, constant: bool = False) -> None:
        self._towers = towers
        self._decay = decay
        self._constant = constant
        self._average = {name: _copy(value) for name, value in stored_weights(towers).items()}

    def decay_at(self, step: int) -> float:
        """The decay d_s at a step."""
        return self._decay if self._constant else min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Adds the weights after `step` steps to the average."""
        averages, weights = list[Tensor](), list[Tensor]()
        for name, value in stored_weights(self._towers).items():
            average, weight = fsdp.to_local(self._average[name]), fsdp.to_local(value)
            if not average.is_floating_point():
                average.copy_(weight)
            elif average.numel():  # a shard may be empty
                averages.append(average)
                weights.append(weight.to(average.dtype))
        get_ema_multi_avg_fn(self.decay_at(step))(averages, weights, step)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Puts the averages in place of the weights within a `with` block without training.

        Sharded towers that are gathered at either end of the block would keep the other weights,
        so they are resharded.
        """
        fsdp.reshard(self._towers)
        weights = stored_weights(self._towers)
        kept = {name: value.clone() for name, value in weights.items()}
        _copy_into(weights, self._average)
        try:
            yield
        finally:
            fsdp.reshard(self._towers)
            _copy_into(weights, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by name, sharing memory with this object."""
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from saved averages, full or sharded."""
        _copy_into(
            self._average,
            {name: fsdp.shard_like(state[name], value) for name, value in self._average.items()},
        )


def _copy(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    return copy.float() if copy.is_floating_point() and copy.element_size() < 4 else copy


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        fsdp.to_local(target).copy_(fsdp.to_local(values[name]))
