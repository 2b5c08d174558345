"""The formulas of the robust global contrastive objective, as pure functions. Nothing communicates.

    F(w, tau)    = tau/2 mean_i [ log(eps + g1_i) + log(eps + g2_i) ] + rho tau   (RGCL-g)
    log(eps + g) = min over alpha of  exp(-alpha) (eps + g) + alpha - 1           (conjugate)

F has FastCLIP's scale: half of the sum over the two sides, as open_clip's ClipLoss is.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def log_inner(
    similarity: Float[Tensor, "anchors candidates"],
    logit_scale: Float[Tensor, "*scales"],
    offset: int = 0,
) -> Float[Tensor, " anchors"]:
    """Log g^_i: log of the mean over j != i of exp((s_ij - s_ii) * logit_scale).

    Args:
        similarity: cosines of anchors (rows) and candidates; the positive of anchor i is
            column offset + i.
        logit_scale: 1 / temperature, one for all, or one per anchor.
        offset: column of the first anchor's positive.
    """
    anchors, candidates = similarity.shape
    scale = logit_scale if logit_scale.ndim == 0 else logit_scale[:, None]
    logits = similarity * scale
    positive = logits.diagonal(offset)[:anchors]
    own = torch.zeros_like(similarity, dtype=torch.bool)
    own.diagonal(offset)[:anchors] = True
    # Filled after the scaling: 0 * inf in the gradient of the scale would be NaN.
    others = logits.masked_fill(own, -math.inf)
    return torch.logsumexp(others, dim=1) - positive - math.log(candidates - 1)


def log_plus(log_value: Float[Tensor, "*shape"], epsilon: float) -> Float[Tensor, "*shape"]:
    """Gives log(epsilon + exp(log_value)), in log space."""
    if epsilon == 0:
        return log_value
    return torch.logaddexp(log_value, log_value.new_tensor(math.log(epsilon)))


def conjugate(
    log_value: Float[Tensor, "*shape"], log_normalizer: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """exp(-alpha) * value + alpha - 1: at least log(value), equal where alpha = log(value)."""
    return torch.exp(log_value - log_normalizer) + log_normalizer - 1


def mix(
    log_remembered: Float[Tensor, "*shape"], log_fresh: Float[Tensor, "*shape"], gamma: float
) -> Float[Tensor, "*shape"]:
    """Gives log((1 - gamma) * remembered + gamma * fresh): moving averages, NeuCLIP's mixing."""
    if gamma >= 1:
        return log_fresh
    if gamma <= 0:
        return log_remembered
    return torch.logaddexp(log_remembered + math.log1p(-gamma), log_fresh + math.log(gamma))


def count_gradient(value: Tensor, times: float) -> Tensor:
    """The same value, whose gradient counts `times` times."""
    return value if times == 1 else value.detach() + times * (value - value.detach())
