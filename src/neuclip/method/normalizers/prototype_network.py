"""A network of prototypes that predicts log-normalizers (NeuCLIP, arXiv 2511.08417).

    log_mean1_i = log( 1/m sum_k exp((cos(e1_i, W1_k) - s_ii) / tau) )     W1: m text prototypes
    log_mean2_i = log( 1/m sum_k exp((cos(e2_i, W2_k) - s_ii) / tau) )     W2: m image prototypes
    alpha_i     = log( eps + exp(log_mean_i) )

These are functions of prototypes that their caller keeps. They read the batch of all ranks, since
each rank holds m/K prototypes of each side: the sum over k is one all-reduce of B sums a side, and
gradients by the prototypes need no communication. The sums are of exp((cos_ik - 1) / tau) in
float64: exact for 1 / tau up to 340 (trainers clamp it at 100).

The host launches some thirty kernels for a reading and a step, and small batches wait for it. So
constants of the inner steps are computed once a batch (`GlobalBatch`), and a softmax's normaliser
multiplies a number per anchor, not one per anchor and prototype.

Gradients are written out instead of left to autograd. With w = W/|W|, p_ik the softmax of
cos_ik / tau over k, and share_i = 1 - eps exp(-alpha_i):

    d alpha_i / d W_k     = share_i p_ik / (tau |W_k|) (I - w_k w_k^T) e_i
    d log_mean_i / d e_i  = ( sum_k p_ik w_k - d s_ii / d e_i ) / tau

The projection is the gradient of the cosine; without it the prototypes drift and diverge.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuclip.method.choices import PredictionGradient, QueuePositives
from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.sharded_rows import RowShard
from neuclip.method.notation import NO_ESTIMATE, Anchors, has_estimate, known_mean
from neuclip.method.objective import LOG_RATIO_LIMIT, conjugate, log_plus

_EXCLUDED = -1e30
"""The logit of an excluded prototype. Minus infinity would give NaN on a rank that has no other."""


@dataclass(frozen=True)
class NetworkOutput:
    """The network's output for the anchors of all ranks, with what the gradients need.

    Attributes:
        directions: w_k, this rank's.
        norms: |W_k|, this rank's.
        weights: exp(logit_ik - top_i), top_i the largest of this rank's logits; its columns.
        log_weight: log of what a weight of 1 adds to the mean, so p_ik = weights_ik
            exp(log_weight_i - log_mean_i); minus infinity for an anchor without a prototype.
        log_mean: see the module.
        count: prototypes that the means are over, for all anchors or for each.
    """

    directions: Float[Tensor, "2 owned dim"]
    norms: Float[Tensor, "2 owned 1"]
    weights: Float[Tensor, "2 batch owned"]
    log_weight: Float[Tensor, "2 batch"]
    log_mean: Float[Tensor, "2 batch"]
    count: int | Float[Tensor, "*sides batch"]

    @property
    def norm(self) -> Float[Tensor, "2 batch 1"]:
        """p_ik over the weights."""
        return (self.log_weight - self.log_mean).exp_()[..., None]


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
            `NO_ESTIMATE` and p_ik = 0.
    """
    norms = torch.linalg.vector_norm(prototypes, dim=-1, keepdim=True)
    directions = prototypes / norms.clamp_min(1e-30)
    factors = batch.scaled if batch.thresholds is None else batch.features
    logits = torch.bmm(factors, directions.transpose(1, 2))
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
    if isinstance(count, Tensor):
        offset = batch.shift + count.clamp_min(1).log()
    else:
        offset = batch.offset(log_count)
    top = top.squeeze(-1)
    log_weight, log_mean = top - offset, weights.sum(-1).log_()
    if shard.is_full:
        log_mean += log_weight
    else:
        # No cosine and no share of the weights exceeds 1: the bound.
        bound = batch.logit_scale + log_count
        log_mean = shard.logsumexp(log_mean.add_(top), bound) - offset
    if isinstance(count, Tensor):
        log_weight.masked_fill_(count == 0, -math.inf)
        log_mean.masked_fill_(count == 0, NO_ESTIMATE)
    return NetworkOutput(directions, norms, weights, log_weight, log_mean, count)


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


def weight_gradient(output: NetworkOutput, batch: GlobalBatch) -> Float[Tensor, "2 batch"]:
    """Derivative of each anchor's term of the prototypes' objective by log weights_ik, over tau.

    With the notation of `prototypes` it is (1 - exp(-alpha_i) q_i) share_i p_ik, of which this is
    the factor beside weights_ik. The objective is the mean of the terms, weighted by `batch.share`.
    """
    alpha = batch.plus_epsilon(output.log_mean)
    both = torch.stack([batch.log_target, output.log_weight]).sub_(alpha)
    ratio, factor = both.clamp_max_(LOG_RATIO_LIMIT).exp_()  # the factor is at most 1
    return factor.addcmul(factor, ratio, value=-1)


def prototype_gradient(
    output: NetworkOutput, batch: GlobalBatch, by_weight: Float[Tensor, "2 batch"]
) -> Float[Tensor, "2 owned dim"]:
    """The gradient by the prototypes, from `weight_gradient`."""
    terms = batch.weighted * by_weight[..., None]
    grad = torch.bmm(output.weights.transpose(1, 2), terms)
    radial = torch.linalg.vecdot(grad, output.directions)[..., None]
    return grad.addcmul_(output.directions, radial, value=-1).div_(output.norms)


def attach_gradient(
    output: NetworkOutput,
    anchors: Anchors,
    gradient: PredictionGradient,
    shard: RowShard,
    newest: list[slice] | None = None,
    positives: QueuePositives = "pair",
) -> Float[Tensor, "2 local"]:
    """This rank's log-means, with their gradient by the anchors unless it is `detached`.

    d log_mean_i = d( scale * (e_i . v_i - s_ii) ) with v_i = sum_k p_ik w_k held constant, so
    adding that difference attaches the exact gradient, however the prototypes are sharded.

    s_ii moves both embeddings of the pair, for either of them as the anchor, while prototypes push
    the anchor alone: pulled twice and pushed once. With `anchor`, s_ii has a gradient by the anchor
    alone, as the positives of MoCo have, which are constants as its negatives are.

    Args:
        output: the network's, for the anchors of all ranks.
        anchors: this rank's.
        gradient: `detached` attaches none.
        shard: which prototypes are this rank's.
        newest: the prototypes that carry the gradient, this rank's rows; none: all do. Then v_i is
            the mean over those, and the value is not touched: stale embeddings still give a good
            value but poor gradient directions.
        positives: what s_ii has a gradient by, both embeddings of the pair or the anchor.
    """
    value = anchors.pairs.layout.own(output.log_mean).to(anchors.pairs.features.dtype)
    if gradient == "detached":
        return value
    centre, weight = _centre(output, anchors, shard, newest)
    features = anchors.pairs.features
    centre = centre.to(features.dtype)
    positive = anchors.positive
    if positives == "anchor":
        positive = (features * features.flip(0).detach()).sum(-1)
    linear = anchors.logit_scale * ((features * centre).sum(-1) - positive)
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
        means = torch.bmm(output.weights, output.directions).mul_(output.norm)
        centre = shard.scatter_sum(means.transpose(0, 1), anchors.pairs.layout).transpose(0, 1)
        return centre, None
    # The sums of the weights travel as another column: one message.
    sums = output.weights.new_zeros(*output.weights.shape[:2], anchors.pairs.features.shape[-1] + 1)
    for rows in newest:
        weights = output.weights[..., rows]
        sums[..., :-1] += torch.bmm(weights, output.directions[:, rows])
        sums[..., -1] += weights.sum(-1)
    sums *= output.norm
    total = shard.scatter_sum(sums.transpose(0, 1), anchors.pairs.layout).transpose(0, 1)
    return total[..., :-1] / total[..., -1:].clamp_min(1e-30), total[..., -1]


@dataclass(frozen=True)
class PredictionRecord:
    """What the last estimate's diagnostics follow from; they cost nothing until they are read.

    Attributes:
        log_mean: the prediction, see the module.
        log_inner: the batch's own estimate.
        known: which anchors have a negative; none: all.
        epsilon: stabiliser of the objective.
        gamma: weight of the batch estimate.
    """

    log_mean: Float[Tensor, "2 batch"]
    log_inner: Float[Tensor, "2 batch"]
    known: Bool[Tensor, "2 batch"] | None
    epsilon: float
    gamma: float

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Tensor | float]:
        """The prediction beside the batch estimate, as means over the anchors of all ranks."""
        alpha, known = log_plus(self.log_mean, self.epsilon), self.known
        log_target = log_plus(self.log_inner, self.epsilon)
        if known is not None:
            known = known & has_estimate(self.log_mean)
        ratio = (log_target - alpha).clamp_max(LOG_RATIO_LIMIT).exp_()
        return {
            "gamma": self.gamma,
            "predicted_log_normalizer": known_mean(alpha, known),
            "prototype_objective": known_mean(conjugate(log_target, alpha), known),
            "prototype_ratio": known_mean(ratio, known),
        }
