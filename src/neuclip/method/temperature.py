"""One temperature per image and per text, with its own optimiser (iSogCLR, FastCLIP).

    F(tau_i) = tau_i (log(eps + g_i) + rho)
    dF/dtau_i = alpha_i + rho - exp(log g^_i - alpha_i) d log g^_i / d s_i / tau_i,  s_i = 1 / tau_i

Three optimisers; a temperature steps only when its sample is in the batch, with a negative:

    momentum   m <- (1 - beta) m + beta grad;  tau <- tau - lr m                          iSogCLR
    adam       tau <- tau - lr m / (sqrt(v) + e);  m and v start at the first gradient, squared
    fastclip   the same step, as FastCLIP-v2's code corrects m and v: their rates are 0 in the first
               epoch, and the step divides them by 1 - rate^(epoch + 1)

`adam` and `fastclip` take the rates and e of the model's optimiser, as that code does. It has the
root since October 2024 (commit c3ae1f5 of Optimization-AI/fast_clip).
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip.method.choices import AdamRates, TemperatureOptimizer
from neuclip.method.notation import Anchors
from neuclip.method.sample_table import SampleTable


@dataclass(frozen=True)
class TemperatureRule:
    """How individual temperatures are updated.

    Attributes:
        initial: value at the start.
        lr: learning rate.
        low: lower bound.
        high: upper bound.
        rho: regulariser.
        optimizer: one of those above.
        beta: weight of the newest gradient (`momentum`).
        clip: bound of the absolute gradient.
        adam: the rates of `adam` and `fastclip`.
        steps_per_epoch: training steps in an epoch (`fastclip`).
    """

    initial: float
    lr: float
    low: float
    high: float
    rho: float
    optimizer: TemperatureOptimizer
    beta: float = 0.9
    clip: float = math.inf
    adam: AdamRates = field(default_factory=AdamRates)
    steps_per_epoch: int = 1


class IndividualTemperature(nn.Module):
    """The temperatures of all samples: 2 numbers per sample, and 2 (momentum) or 4 moments.

    Args:
        num_samples: ids run from 0 to num_samples - 1; none: the table grows with the ids seen.
        rule: how they are updated.
    """

    def __init__(self, num_samples: int | None, rule: TemperatureRule) -> None:
        super().__init__()
        self.rule = rule
        self.step_count = 0
        moments = 1 if rule.optimizer == "momentum" else 2
        self.table = SampleTable(num_samples, (rule.initial,) * 2 + (0.0,) * 2 * moments)

    def admit(self, sample_ids: Int64[Tensor, " local"]) -> None:
        """Before a training batch: checks the ids, and makes room for new ones.

        Raises:
            UserError: an id is out of range.
        """
        self.table.admit(sample_ids)

    def read(self, sample_ids: Int64[Tensor, " local"]) -> Float[Tensor, "2 local"]:
        """Returns the temperatures of the image anchors and of the text anchors.

        Raises:
            UserError: an id is out of range.
        """
        self.table.check(sample_ids)
        return self.table.read(sample_ids)[:2]

    @torch.no_grad()
    def step(self, anchors: Anchors, log_normalizer: Float[Tensor, "2 local"]) -> None:
        """Updates the temperatures of a batch.

        Args:
            anchors: the batch, with dlog_inner_dscale.
            log_normalizer: alpha_i.
        """
        sample_ids, by_scale = anchors.pairs.sample_ids, anchors.dlog_inner_dscale
        assert sample_ids is not None
        assert by_scale is not None
        log_inner = anchors.log_inner.detach()
        before = self.table.read(sample_ids).to(log_inner.dtype)
        temperature, *moments = before.split(2)
        ratio = (log_inner - log_normalizer).exp()
        grad = log_normalizer + self.rule.rho - ratio * by_scale / temperature
        move, moments = self._move(grad.clamp(-self.rule.clip, self.rule.clip), moments)
        temperature = (temperature - self.rule.lr * move).clamp(self.rule.low, self.rule.high)
        after = torch.cat([temperature, *moments])
        if (known := anchors.known) is not None:
            after = torch.where(known.repeat(1 + len(moments), 1), after, before)
        self.table.write(sample_ids, after, anchors.pairs.layout)
        self.step_count += 1

    def _move(self, grad: Tensor, moments: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The direction of the step, and the new moments."""
        if self.rule.optimizer == "momentum":
            (first,) = moments
            first = first + self.rule.beta * (grad - first)
            return first, [first]
        first, second = moments
        beta1, beta2, eps = self.rule.adam.beta1, self.rule.adam.beta2, self.rule.adam.eps
        if self.rule.optimizer == "adam":
            new = second == 0
            first = torch.where(new, grad, beta1 * first + (1 - beta1) * grad)
            second = torch.where(new, grad**2, beta2 * second + (1 - beta2) * grad**2)
            return first / (second.sqrt() + eps), [first, second]
        epoch = self.step_count // self.rule.steps_per_epoch
        if epoch == 0:
            beta1 = beta2 = 0.0
        first = beta1 * first + (1 - beta1) * grad
        second = beta2 * second + (1 - beta2) * grad**2
        mean, square = first / (1 - beta1 ** (epoch + 1)), second / (1 - beta2 ** (epoch + 1))
        return mean / (square.sqrt() + eps), [first, second]

    def get_extra_state(self) -> dict[str, int]:
        """The step counter, for `state_dict`."""
        return {"step_count": self.step_count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the step counter."""
        self.step_count = int(state["step_count"])
