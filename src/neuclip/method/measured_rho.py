"""The rho at which the temperature of the starting weights stays, measured in a warm start.

The objective tau (log g + rho) has the derivative by tau

    dL/dtau = rho - KL,    KL = mean_i KL(p_i || uniform),  p_ij ~ exp(s_ij / tau) over negatives j

(for eps << g: d log g_i / dtau = -E_p[(s_ij - s_ii) / tau] / tau, and E_p[l] - log mean exp(l) is
the divergence of softmax(l) from uniform). So training moves tau until the mean divergence is rho,
whatever temperature the weights come with; rho = KL of the starting weights leaves it where it is.

The divergence is not computed. Rho has the weight 1 in dL/dtau under every form of the objective
(stabiliser, `fastclip` gradient, predicted normalizers), so rho - dL/dtau is the rho without a
gradient, and the backward pass of the training step yields dL/dtau. Steps are averaged with weights
that grow linearly, because a memory predicts better as it fills.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.parallel import collectives


class MeasuredRho(nn.Module):
    """Rho as the mean over the steps of a warm start, and a constant afterwards.

    Attributes:
        value: the mean so far.
        steps: steps that it is the mean of.
    """

    value: Float[Tensor, ""]

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self._upstream: Tensor | None = None
        self.register_buffer("value", torch.zeros(()))

    def watch(self, logit_scale: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns 1 / tau for a step that measures: its gradient updates the mean.

        The gradient that goes on to the model is that at the new mean, so that the optimiser's
        moments of the temperature settle around 0.

        Args:
            logit_scale: 1 / tau; without a gradient there is nothing to measure.
        """
        self.steps += 1
        watched = logit_scale * 1
        if watched.requires_grad:
            scale, weight = logit_scale.detach(), 2 / (self.steps + 1)
            watched.register_hook(lambda gradient: self._take(gradient, scale, weight))
        return watched

    def watch_loss(self, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Returns the loss of a step that measures: under float16 its gradient is scaled."""
        if loss.requires_grad:
            loss.register_hook(self._note)
        return loss

    def _note(self, upstream: Tensor) -> None:
        self._upstream = upstream.detach()

    @torch.no_grad()
    def _take(self, gradient: Tensor, scale: Tensor, weight: float) -> Tensor:
        """Adds a step; `gradient` is dL/d(1 / tau) of this rank's part of the loss."""
        upstream = torch.ones_like(gradient) if self._upstream is None else self._upstream
        by_scale = collectives.mean_over_ranks(gradient / upstream)
        square = scale.square()
        balanced = self.value + square * by_scale
        finite = torch.isfinite(balanced)
        balanced = torch.where(finite, balanced, self.value)
        self.value.lerp_(balanced.to(self.value.dtype), weight)
        return torch.where(finite, (balanced - self.value) / square * upstream, gradient)

    def known(self) -> Float[Tensor, ""]:
        """The measured value.

        Raises:
            UserError: nothing was measured.
        """
        if self.steps == 0:
            raise UserError(
                "rho 'auto' is measured in a warm start, while the weights stay as they are: set "
                "loss.settling = True for some batches first, or give a number"
            )
        return self.value

    def get_extra_state(self) -> dict[str, int]:
        """The number of steps, for `state_dict`."""
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the number of steps."""
        self.steps = int(state["steps"])
