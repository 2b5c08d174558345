"""The formulas of the robust global contrastive objective, as pure functions. Nothing communicates.

    F(w, tau)    = tau/2 mean_i [ log(eps + g1_i) + log(eps + g2_i) ] + rho tau   (RGCL-g)
    log(eps + g) = min over alpha of  exp(-alpha) (eps + g) + alpha - 1           (conjugate)

F has FastCLIP's scale: half of the sum over the two sides, as open_clip's ClipLoss is.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LOG_RATIO_LIMIT = 30.0
"""Above it, exp(log q_i - alpha_i) continues along its tangent: an anchor with a single hard
negative can exceed it, and in float32 the exponential or its square would overflow."""


def log_plus(log_value: Float[Tensor, "*shape"], epsilon: float) -> Float[Tensor, "*shape"]:
    """Computes log(epsilon + exp(log_value)) in log space."""
    if epsilon == 0:
        return log_value
    # Filled on the device: copying a number there would synchronise with it.
    return torch.logaddexp(log_value, log_value.new_full((), math.log(epsilon)))


def bounded_exp(exponent: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The exponential up to `LOG_RATIO_LIMIT`, then its tangent: finite, with a gradient."""
    capped = exponent.clamp_max(LOG_RATIO_LIMIT)
    return capped.exp() * (1 + exponent - capped)


def conjugate(
    log_value: Float[Tensor, "*shape"], log_normalizer: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """exp(-alpha) value + alpha - 1, which is at least log(value); equal at alpha = log(value)."""
    return bounded_exp(log_value - log_normalizer) + log_normalizer - 1


def mix(
    log_remembered: Float[Tensor, "*shape"], log_fresh: Float[Tensor, "*shape"], gamma: float
) -> Float[Tensor, "*shape"]:
    """Computes log((1 - gamma) remembered + gamma fresh), for moving averages and predictions."""
    if gamma >= 1:
        return log_fresh
    if gamma <= 0:
        return log_remembered
    return torch.logaddexp(log_remembered + math.log1p(-gamma), log_fresh + math.log(gamma))


def count_gradient(value: Tensor, times: float) -> Tensor:
    """Returns the value with its gradient multiplied by `times`."""
    return value if times == 1 else value.detach() + times * (value - value.detach())
