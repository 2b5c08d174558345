"""AmorLIP's networks (arXiv 2505.18983): small MLPs that predict log partition functions.

    Z_i = c exp(s_ii / tau) + sum over j != i of exp(s_ij / tau)      over the global batch
    log lambda(e) = w3 . ReLU(u + e) + b3,  u = LN(ReLU(W2 h)),  h = LN(ReLU(W1 e))

There is one network per side, with an exponential moving average (EMA) of its weights, which moves
at steps 0, `ema_steps`, 2 `ema_steps` ... of each epoch. The networks restart at the start of every
`restart_epochs`-th epoch. The target z_i of the fit is

    z_i = beta_t lambda_before(e_i) + (1 - beta_t) Z_i       fit_previous: the EMA network at the
                                                             start of the epoch, beta_t by half a
                                                             cosine
    z_i = Z_i                                                otherwise

and the normalizer for the towers is z_i (fit_previous) or the EMA network's lambda. The objective
of the fit, with zeta_i = log lambda(e_i) and T_i = log z_i, is summed over both sides:

    log_l2       mean_i (zeta_i - T_i)^2
    kl_div_asym  1/B^2 sum_i Z_i / lambda_i (T_i - zeta_i)                    + weight * log_l2
    js_div       1/B^2 sum_ij 1/2 [P log(P/M) + Q log(Q/M)],  M = (P + Q)/2   + weight * log_l2
                 P_ij = w_ij exp(s_ij / tau) / lambda_i, Q_ij the same over z_i, w_ii = c, else 1

An anchor without a negative has no part in the means. P/M and Q/M do not depend on j, so the sums
over j are Z_i / lambda_i and Z_i / z_i, and no objective needs the matrix.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from neuclip.method.choices import Amortization
from neuclip.method.normalizers.inner_optimizer import InnerOptimizer
from neuclip.method.notation import Anchors, shares
from neuclip.method.objective import bounded_exp
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout

ANCHORS_AT_ONCE = 2**13


@dataclass(frozen=True)
class AmortizedSettings:
    """The networks and their training; the fields have the names of `AmorLIPSettings`."""

    positive_weight: float
    amortization: Amortization
    divergence_weight: float
    hidden_factor: float
    inner_steps: int
    lambda_lr: float
    lambda_clip_norm: float
    fit_previous: bool
    previous_weight: float
    previous_epochs: float
    ema_rate: float
    ema_steps: int
    restart_epochs: int

    def ramp(self, epoch: int) -> float:
        """The share of the earlier networks: 0 in the first epoch, half a cosine, then constant."""
        if epoch >= self.previous_epochs:
            return self.previous_weight
        return self.previous_weight * (
            1 - (1 + math.cos(math.pi * epoch / self.previous_epochs)) / 2
        )


class LambdaNetwork(nn.Module):
    """log lambda of both sides: two MLPs of one shape, their weights stacked along axis 0.

    Args:
        dim: width of the embeddings.
        hidden: width of the hidden layer.
        seed: seed of the weights, equal on all ranks and in a resumed run.
    """

    def __init__(self, dim: int, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:
            bound = fan_in**-0.5  # torch's default for linear layers
            values = torch.empty(2, *shape).uniform_(-bound, bound, generator=generator)
            return nn.Parameter(values, requires_grad=False)

        def constant(value: float, width: int) -> nn.Parameter:
            return nn.Parameter(torch.full((2, 1, width), float(value)), requires_grad=False)

        self.hidden_weight, self.hidden_bias = uniform(dim, hidden, dim), uniform(dim, 1, hidden)
        self.hidden_gain, self.hidden_shift = constant(1, hidden), constant(0, hidden)
        self.back_weight, self.back_bias = uniform(hidden, dim, hidden), uniform(hidden, 1, dim)
        self.back_gain, self.back_shift = constant(1, dim), constant(0, dim)
        self.out_weight, self.out_bias = uniform(dim, 1, dim), uniform(dim, 1, 1)

    def forward(self, features: Float[Tensor, "2 anchors dim"]) -> Float[Tensor, "2 anchors"]:
        """Computes log lambda."""
        hidden = features @ self.hidden_weight.transpose(1, 2) + self.hidden_bias
        hidden = _normalised(hidden.relu()) * self.hidden_gain + self.hidden_shift
        back = hidden @ self.back_weight.transpose(1, 2) + self.back_bias
        back = _normalised(back.relu()) * self.back_gain + self.back_shift
        out = (back + features).relu() @ self.out_weight.transpose(1, 2) + self.out_bias
        return out.squeeze(-1)


def _normalised(value: Tensor) -> Tensor:
    return functional.layer_norm(value, value.shape[-1:])


@dataclass(frozen=True)
class BatchTargets:
    """The data of the fit in one training step, as constants.

    Attributes:
        features: embeddings of this rank's anchors.
        layout: how the global batch is split over ranks.
        log_partition: log Z_i.
        log_target: log z_i.
        shares: see `notation.shares`, of the anchors that have a negative; none: all have one.
    """

    features: Float[Tensor, "2 local dim"]
    layout: BatchLayout
    log_partition: Float[Tensor, "2 local"]
    log_target: Float[Tensor, "2 local"]
    shares: Float[Tensor, "2 local"] | None

    def chunks(self) -> Iterator["BatchTargets"]:
        """Splits the anchors, so that only the activations of a chunk are in memory."""
        for start in range(0, self.features.shape[1], ANCHORS_AT_ONCE):
            chunk = slice(start, start + ANCHORS_AT_ONCE)
            yield BatchTargets(
                self.features[:, chunk],
                self.layout,
                self.log_partition[:, chunk],
                self.log_target[:, chunk],
                None if self.shares is None else self.shares[:, chunk],
            )

    def mean(self, values: Float[Tensor, "2 local"]) -> Float[Tensor, ""]:
        """This chunk's part of the rank's mean, summed over the sides."""
        if self.shares is not None:
            return (values * self.shares).sum()
        share = values.shape[1] / self.layout.sizes[self.layout.rank]
        return self.layout.mean(values).sum() * share


class AmortizedNormalizer(nn.Module):
    """Log partition functions from the networks, and the training of these.

    Args:
        embed_dim: width of the embeddings.
        settings: see `AmortizedSettings`.
        steps_per_epoch: training steps in an epoch.
    """

    def __init__(self, embed_dim: int, settings: AmortizedSettings, steps_per_epoch: int) -> None:
        super().__init__()
        self.settings = settings
        self.steps_per_epoch = steps_per_epoch
        self.embed_dim = embed_dim
        self.step_count = 0
        self.network = self._fresh(0)
        self.average = deepcopy(self.network)
        self.previous = deepcopy(self.network)
        self.optimizers = nn.ModuleList(
            InnerOptimizer("adam", settings.lambda_lr, weight)
            for weight in self.network.parameters()
        )
        self._last: dict[str, Tensor | float] = {}

    @torch.no_grad()
    def estimate(
        self, anchors: Anchors, log_partition: Float[Tensor, "2 local"]
    ) -> Float[Tensor, "2 local"]:
        """Trains the networks on the batch; returns the log partition functions for the towers.

        Args:
            anchors: this rank's anchors.
            log_partition: log Z_i, with the positives.
        """
        settings, features = self.settings, anchors.pairs.features.detach()
        epoch, within = divmod(self.step_count, self.steps_per_epoch)
        if within == 0:
            self._start_epoch(epoch)
        log_target, share = log_partition, settings.ramp(epoch)
        if settings.fit_previous and share > 0:
            before = self._log_lambda(self.previous, features) + math.log(share)
            log_target = torch.logaddexp(before, log_partition + math.log1p(-share))
        layout, known = anchors.pairs.layout, anchors.known
        weights = None if known is None else shares(known.to(features.dtype), layout)
        targets = BatchTargets(features, layout, log_partition, log_target, weights)
        for _ in range(settings.inner_steps):
            self._inner_step(targets)
        predicted = self._log_lambda(self.average, features)
        self.step_count += 1
        if within % settings.ema_steps == 0:
            rate = settings.ema_rate if settings.fit_previous else share
            for kept, weight in zip(
                self.average.parameters(), self.network.parameters(), strict=True
            ):
                kept.lerp_(weight, 1 - rate)
        self._last = {
            "previous_share": share,
            "log_partition": anchors.average(log_partition),
            "log_partition_error": anchors.average((predicted - log_partition).square()),
        }
        return log_target if settings.fit_previous else predicted

    @torch.no_grad()
    def log_lambda(self, features: Float[Tensor, "2 local dim"]) -> Float[Tensor, "2 local"]:
        """Computes log lambda by the EMA networks."""
        return self._log_lambda(self.average, features)

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last estimate."""
        return self._last

    def _fresh(self, epoch: int) -> LambdaNetwork:
        hidden = max(1, int(self.embed_dim * self.settings.hidden_factor))
        return LambdaNetwork(self.embed_dim, hidden, seed=epoch)

    @staticmethod
    def _log_lambda(network: nn.Module, features: Tensor) -> Tensor:
        weight = next(network.parameters())
        return network(features.to(weight.dtype)).to(features.dtype)

    def _start_epoch(self, epoch: int) -> None:
        """Copies the EMA networks to the earlier ones; restarts the networks if that is due."""
        self.previous.load_state_dict(self.average.state_dict())
        period = self.settings.restart_epochs
        if period == 0 or epoch % period != 0:
            return
        fresh = self._fresh(epoch).state_dict()
        self.network.load_state_dict(fresh)
        self.average.load_state_dict(fresh)
        for optimizer in self.optimizers:
            assert isinstance(optimizer, InnerOptimizer)
            optimizer.reset()

    def _inner_step(self, targets: BatchTargets) -> None:
        """Takes one Adam step on the objective of the fit."""
        with torch.enable_grad():
            weights = {
                name: weight.detach().requires_grad_()
                for name, weight in self.network.named_parameters()
            }
            grads = [torch.zeros_like(weight) for weight in weights.values()]
            for chunk in targets.chunks():
                features = chunk.features.to(grads[0].dtype)
                fit = self._objective(functional_call(self.network, weights, (features,)), chunk)
                found = torch.autograd.grad(fit, list(weights.values()))
                for grad, more in zip(grads, found, strict=True):
                    grad += more
        # One all-reduce for all weights.
        flat = collectives.mean_over_ranks(torch.cat([grad.flatten() for grad in grads]))
        flat *= (self.settings.lambda_clip_norm / (flat.norm() + 1e-6)).clamp_max(1.0)
        parts = flat.split([grad.numel() for grad in grads])
        for optimizer, weight, grad in zip(
            self.optimizers, self.network.parameters(), parts, strict=True
        ):
            assert isinstance(optimizer, InnerOptimizer)
            optimizer.step(weight.data, grad.view_as(weight))

    def _objective(self, log_lambda: Tensor, targets: BatchTargets) -> Tensor:
        """The objective of the fit, summed over the sides: this chunk's part of the rank's mean."""
        gap = targets.log_target - log_lambda
        square = targets.mean(gap.square())
        kind = self.settings.amortization
        if kind == "log_l2":
            return square
        log_p = targets.log_partition - log_lambda
        if kind == "kl_div_asym":
            terms = bounded_exp(log_p) * gap
        else:
            log_q = targets.log_partition - targets.log_target
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            terms = bounded_exp(log_p) * (log_p - log_m) + bounded_exp(log_q) * (log_q - log_m)
            terms = terms / 2
        divergence = targets.mean(terms) / targets.layout.total
        return divergence + self.settings.divergence_weight * square

    def get_extra_state(self) -> dict[str, int]:
        """The step counter, for `state_dict`."""
        return {"step_count": self.step_count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the step counter."""
        self.step_count = int(state["step_count"])
