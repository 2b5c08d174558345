"""A network of prototypes that predicts log-normalizers (NeuCLIP, arXiv 2511.08417).

    log_mean1_i = log( 1/m sum_k exp((cos(e1_i, W1_k) - s_ii) / tau) )     W1: m text prototypes
    log_mean2_i = log( 1/m sum_k exp((cos(e2_i, W2_k) - s_ii) / tau) )     W2: m image prototypes
    alpha_i     = log( eps + exp(log_mean_i) )

These are functions of prototypes that their caller keeps. They read the batch of all ranks, since
each rank holds m/K prototypes of each side: the sum over k is one all-reduce of B sums a side, and
gradients by the prototypes need no communication. The sums are of exp((cos_ik - 1) / tau) in
float64: exact for 1 / tau up to 340 (trainers clamp it at 100).

Gradients are written out instead of left to autograd. With w = W/|W|, p_ik the softmax of
cos_ik / tau over k, and share_i = 1 - eps exp(-alpha_i):

    d alpha_i / d W_k     = share_i p_ik / (tau |W_k|) (I - w_k w_k^T) e_i
    d log_mean_i / d e_i  = ( sum_k p_ik w_k - d s_ii / d e_i ) / tau

The projection is the gradient of the cosine; without it the prototypes drift and diverge.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from neuclip.method.choices import PredictionGradient
from neuclip.method.normalizers.sharded_rows import RowShard
from neuclip.method.notation import NO_ESTIMATE, Anchors, has_estimate, known_mean
from neuclip.method.objective import LOG_RATIO_LIMIT, conjugate, log_plus
from neuclip.parallel import collectives

_EXCLUDED = -1e30
"""The logit of an excluded prototype. Minus infinity would give NaN on a rank that has no other."""


@dataclass(frozen=True)
class GlobalBatch:
    """The anchors of all ranks, as constants.

    Attributes:
        features: images, texts.
        positive: s_ii.
        logit_scale: 1 / tau.
        log_inner: log g^_i.
        sample_ids: the anchors' ids, if given and asked for.
        groups: the anchors' groups, if given.
        thresholds: the anchors' thresholds, if they have any.
    """

    features: Float[Tensor, "2 batch dim"]
    positive: Float[Tensor, " batch"]
    logit_scale: Float[Tensor, ""]
    log_inner: Float[Tensor, "2 batch"]
    sample_ids: Int64[Tensor, " batch"] | None
    groups: Int64[Tensor, "batch kinds"] | None
    thresholds: Float[Tensor, "2 batch"] | None

    @classmethod
    @torch.no_grad()
    def of(
        cls, anchors: Anchors, dtype: torch.dtype, *, with_sample_ids: bool = False
    ) -> "GlobalBatch":
        """Gathers the batch estimates of all ranks, and the sample ids in the same message."""
        features = anchors.global_features.to(dtype)
        numbers, ids = anchors.log_inner.detach().T, anchors.pairs.sample_ids
        if not with_sample_ids or ids is None:
            log_inner, ids = collectives.gather_constant(numbers, anchors.pairs.layout), None
        else:
            bits = ids.to(numbers.device, non_blocking=True)[:, None].view(numbers.dtype)
            message = torch.cat([numbers, bits], 1)
            message = collectives.gather_constant(message, anchors.pairs.layout)
            log_inner, bits = message[:, :2], message[:, 2:]
            ids = bits.contiguous().view(torch.int64).squeeze(1)
        thresholds = anchors.pairs.thresholds
        return cls(
            features=features,
            positive=(features[0] * features[1]).sum(-1),
            logit_scale=anchors.logit_scale.detach().to(dtype),
            log_inner=log_inner.T.to(dtype),
            sample_ids=ids,
            groups=anchors.global_groups,
            thresholds=None if thresholds is None else thresholds.everybody.to(dtype),
        )

    @property
    def leaves_out(self) -> bool:
        """Whether an anchor may have no negative, in the batch or among the prototypes."""
        return self.groups is not None or self.thresholds is not None

    @property
    def known(self) -> Bool[Tensor, "2 batch"] | None:
        """Which anchors have a negative in the batch; none: all, because none leaves out any."""
        return has_estimate(self.log_inner) if self.leaves_out else None

    @property
    def candidates(self) -> Float[Tensor, "2 batch dim"]:
        """Texts (candidates of image anchors), images."""
        return self.features.flip(0)


@dataclass(frozen=True)
class NetworkOutput:
    """The network's output for the anchors of all ranks, with what the gradients need.

    Attributes:
        directions: w_k, this rank's.
        norms: |W_k|, this rank's.
        weights: p_ik over the prototypes of all ranks; this rank's columns.
        log_mean: see the module.
        count: prototypes that the means are over, for all anchors or for each.
    """

    directions: Float[Tensor, "2 owned dim"]
    norms: Float[Tensor, "2 owned 1"]
    weights: Float[Tensor, "2 batch owned"]
    log_mean: Float[Tensor, "2 batch"]
    count: int | Float[Tensor, "*sides batch"]


@torch.no_grad()
def network_output(
    prototypes: Float[Tensor, "2 owned dim"],
    batch: GlobalBatch,
    shard: RowShard,
    *,
    log_shares: Float[Tensor, "2 owned"] | None = None,
    excluded: Bool[Tensor, "*batch owned"] | None = None,
    count: int | Float[Tensor, " batch"] | None = None,
) -> NetworkOutput:
    """The forward pass.

    Args:
        prototypes: this rank's.
        batch: the anchors of all ranks.
        shard: which prototypes are this rank's.
        log_shares: see `log_shares`; none: all prototypes weigh 1/m.
        excluded: prototypes left out of an anchor's sum, or out of all sums.
        count: prototypes that the mean is over, for all anchors or for each; none: all m. Those
            above an anchor's threshold leave its sum and its count. An anchor with none has
            `NO_ESTIMATE` and weights of 0.
    """
    norms = torch.linalg.vector_norm(prototypes, dim=-1, keepdim=True)
    directions = prototypes / norms.clamp_min(1e-30)
    logits = torch.bmm(batch.features, directions.transpose(1, 2))
    count = shard.size if count is None else count
    log_count = math.log(count if isinstance(count, int) else shard.size)
    if batch.thresholds is not None:
        excluded, count = _above(logits, batch.thresholds, excluded, count, shard)
    logits *= batch.logit_scale
    if log_shares is not None:
        logits += (log_shares + log_count)[:, None, :]
    if excluded is not None:
        logits.masked_fill_(excluded, _EXCLUDED)
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    # No cosine and no share of the weights exceeds 1: the bound.
    bound = batch.logit_scale + log_count
    log_sum = shard.logsumexp(weights.sum(-1, keepdim=True).log_().add_(top), bound)
    weights.mul_(top.sub_(log_sum).exp_())
    mean_over = count.clamp_min(1).log() if isinstance(count, Tensor) else log_count
    log_mean = log_sum.squeeze(-1) - mean_over - batch.positive * batch.logit_scale
    if isinstance(count, Tensor):
        weights.masked_fill_((count == 0)[..., None], 0)
        log_mean.masked_fill_(count == 0, NO_ESTIMATE)
    return NetworkOutput(directions, norms, weights, log_mean, count)


def _above(
    similarity: Float[Tensor, "2 batch owned"],
    thresholds: Float[Tensor, "2 batch"],
    excluded: Bool[Tensor, "*batch owned"] | None,
    count: int | Float[Tensor, " batch"],
    shard: RowShard,
) -> tuple[Bool[Tensor, "2 batch owned"], Float[Tensor, "2 batch"]]:
    """What an anchor leaves out with its threshold, and what remains of its count."""
    above = similarity > thresholds[..., None]
    if excluded is not None:
        above &= ~excluded
    left_out = shard.sum(above.sum(-1).to(thresholds.dtype))
    return above if excluded is None else above | excluded, count - left_out


def log_shares(log_weights: Float[Tensor, "2 owned"], shard: RowShard) -> Float[Tensor, "2 owned"]:
    """Logarithms of the learned weights, normalised over the prototypes of all ranks."""
    top = shard.max(log_weights.amax(-1, keepdim=True))
    total = shard.sum((log_weights - top).exp_().sum(-1, keepdim=True))
    return log_weights - top - total.log()


def log_mean_gradient(
    output: NetworkOutput, batch: GlobalBatch, epsilon: float
) -> Float[Tensor, "2 batch"]:
    """Derivative of the prototypes' objective by the log-means, over tau.

    (1 - exp(-alpha_i) q_i) share_i / B, with the notation of `prototypes`; the mean is over the
    anchors that have a negative.
    """
    log_target, known = log_plus(batch.log_inner, epsilon), batch.known
    alpha = log_plus(output.log_mean, epsilon)
    ratio = (log_target - alpha).clamp_max(LOG_RATIO_LIMIT).exp_()
    gradient = (1 - ratio) * (output.log_mean - alpha).exp_()
    if known is None:
        return gradient / log_target.shape[-1]
    return gradient * known / known.sum(-1, keepdim=True).clamp_min(1)


def prototype_gradient(
    output: NetworkOutput,
    features: Float[Tensor, "2 batch dim"],
    by_log_mean: Float[Tensor, "2 batch"],
) -> Float[Tensor, "2 owned dim"]:
    """The gradient by the prototypes, from the gradient by the log-means over tau."""
    grad = torch.bmm(output.weights.transpose(1, 2), features * by_log_mean[..., None])
    radial = torch.linalg.vecdot(grad, output.directions)[..., None]
    return grad.addcmul_(output.directions, radial, value=-1).div_(output.norms)


def attach_gradient(
    output: NetworkOutput,
    anchors: Anchors,
    gradient: PredictionGradient,
    shard: RowShard,
    newest: list[slice] | None = None,
) -> Float[Tensor, "2 local"]:
    """This rank's log-means, with their gradient by the anchors unless it is `detached`.

    d log_mean_i = d( scale * (e_i . v_i - s_ii) ) with v_i = sum_k p_ik w_k held constant, so
    adding that difference attaches the exact gradient, however the prototypes are sharded.

    Args:
        output: the network's, for the anchors of all ranks.
        anchors: this rank's.
        gradient: `detached` attaches none.
        shard: which prototypes are this rank's.
        newest: the prototypes that carry the gradient, this rank's rows; none: all do. Then v_i is
            the mean over those, and the value is not touched: stale embeddings still give a good
            value but poor gradient directions.
    """
    value = anchors.pairs.layout.own(output.log_mean).to(anchors.pairs.features.dtype)
    if gradient == "detached":
        return value
    centre, weight = _centre(output, anchors, shard, newest)
    centre = centre.to(anchors.pairs.features.dtype)
    linear = anchors.logit_scale * ((anchors.pairs.features * centre).sum(-1) - anchors.positive)
    if weight is not None and anchors.pairs.leaves_out:
        linear = linear.masked_fill(weight == 0, 0)  # none of the newest was left to the anchor
    return value + (linear - linear.detach())


@torch.no_grad()
def _centre(
    output: NetworkOutput, anchors: Anchors, shard: RowShard, newest: list[slice] | None
) -> tuple[Float[Tensor, "2 local dim"], Float[Tensor, "2 local"] | None]:
    """v_i of this rank's anchors: the mean of all ranks' prototypes under p_ik.

    The second result is the sum of p_ik over the newest, if only those carry the gradient.
    """
    if newest is None:
        means = torch.bmm(output.weights, output.directions)
        centre = shard.scatter_sum(means.transpose(0, 1), anchors.pairs.layout).transpose(0, 1)
        return centre, None
    # The sums of the weights travel as another column: one message.
    sums = output.weights.new_zeros(*output.weights.shape[:2], anchors.pairs.features.shape[-1] + 1)
    for rows in newest:
        weights = output.weights[..., rows]
        sums[..., :-1] += torch.bmm(weights, output.directions[:, rows])
        sums[..., -1] += weights.sum(-1)
    total = shard.scatter_sum(sums.transpose(0, 1), anchors.pairs.layout).transpose(0, 1)
    return total[..., :-1] / total[..., -1:].clamp_min(1e-30), total[..., -1]


def diagnostics(
    log_mean: Float[Tensor, "2 batch"], batch: GlobalBatch, epsilon: float, gamma: float
) -> dict[str, Tensor | float]:
    """The prediction beside the batch estimate, as means over the anchors of all ranks."""
    alpha, log_target = log_plus(log_mean, epsilon), log_plus(batch.log_inner, epsilon)
    known = batch.known
    if known is not None:
        known = known & has_estimate(log_mean)
    return {
        "gamma": gamma,
        "predicted_log_normalizer": known_mean(alpha, known),
        "prototype_objective": known_mean(conjugate(log_target, alpha), known),
        "prototype_ratio": known_mean(
            (log_target - alpha).clamp_max(LOG_RATIO_LIMIT).exp_(), known
        ),
    }
