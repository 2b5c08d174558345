"""NeuCLIP's normalizer: a network of prototypes predicts the log-normalizer (arXiv 2511.08417).

    alpha1_i = log( eps + 1/m sum_k exp((cos(e1_i, W1_k) - s_ii) / tau) )     W1: m text prototypes
    alpha2_i = log( eps + 1/m sum_k exp((cos(e2_i, W2_k) - s_ii) / tau) )     W2: m image prototypes

The prototypes are trained on CLIP's own objective (its conjugate form), T_u steps per batch, and
restarted from recent embeddings every T_r steps. The prediction is mixed with the batch estimate:

    normalizer_i = (1 - gamma_t) exp(alpha_i) + gamma_t (eps + g^_i)

Untrained prototypes (T_u = 0) are embeddings of pairs, and an anchor's own pair is no negative:
where sample ids are given, it has no part in the sum. (The mean stays one over m: about one
prototype in n is an anchor's own.) A trained prototype is nobody's, as published.

The inner step is written out instead of left to autograd. With c_ik = cos(e_i, W_k) / tau,
p_ik = softmax_k(c_ik), q_i = eps + g^_i and share_i = 1 - eps exp(-alpha_i):

    dL/dW_k = 1/|W_k| (I - w_k w_k^T) 1/B sum_i (1 - exp(-alpha_i) q_i) share_i p_ik e_i

with w = W/|W| (tau cancels). The projection is the gradient of the cosine; without it the rows
drift and diverge.

Over K ranks each owns m/K prototypes of each side: the sum over k becomes one all-reduce of B sums
a side per inner step, and the gradients of the prototypes stay where they are. The sums are of
exp((cos_ik - 1) / tau), in float64: exact for 1 / tau up to 340 (trainers clamp it at 100).
"""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.method.choices import PredictionGradient, PrototypeOptimizer
from neuclip.method.normalizers.embedding_ring import NOBODY, EmbeddingRing
from neuclip.method.normalizers.inner_optimizer import InnerOptimizer
from neuclip.method.notation import Anchors
from neuclip.method.objective import LOG_RATIO_LIMIT, conjugate, log_plus, mix
from neuclip.method.schedule import Gamma
from neuclip.parallel import collectives
from neuclip.parallel.collectives import Slice

Refresh = Literal["restart", "fifo", "rolling"]

_EXCLUDED = -1e30
"""A logit that weighs nothing; minus infinity would make NaN where all of a rank's are it."""


@dataclass(frozen=True)
class NetworkSettings:
    """How the prototypes are kept and trained; the fields are those of `NeuCLIPSettings`."""

    num_prototypes: int
    inner_steps: int
    restart_steps: int
    prototype_lr: float
    prototype_optimizer: PrototypeOptimizer
    refresh: Refresh
    gradient: PredictionGradient
    log_weights: bool
    gradient_prototypes: int | None = None


@dataclass(frozen=True)
class Readout:
    """The network's answer for some anchors, with what the gradients need."""

    directions: Float[Tensor, "2 owned dim"]
    norms: Float[Tensor, "2 owned 1"]
    weights: Float[Tensor, "2 batch owned"]
    """p_ik over all ranks' prototypes; this rank's columns."""
    log_mean: Float[Tensor, "2 batch"]
    """log 1/m sum_k exp((cos_ik - s_ii) / tau)."""


class PrototypeNormalizer(nn.Module):
    """The prototype network with its training: NeuCLIP's source of log-normalizers.

    Args:
        embed_dim: width of the embeddings.
        settings: see `NetworkSettings`.
        gamma: weight of the batch estimate over time.
        epsilon: stabiliser of the objective.
        shard: the prototypes this rank keeps; none: its share, `collectives.owned_slice`.

    The state (`state_dict`) always holds all prototypes, whatever the number of ranks: it can be
    loaded with another one. With several ranks, all must ask for it: it is gathered.
    """

    needs_sample_ids = False

    prototypes: Tensor
    log_weights: Tensor
    owners: Tensor

    def __init__(
        self,
        embed_dim: int,
        settings: NetworkSettings,
        gamma: Gamma,
        epsilon: float,
        *,
        shard: Slice | None = None,
    ) -> None:
        super().__init__()
        if shard is None and settings.num_prototypes < collectives.world_size():
            raise UserError(
                f"num_prototypes {settings.num_prototypes} is below the number of processes "
                f"({collectives.world_size()}), each of which keeps a share of them"
            )
        self.settings = settings
        self.gamma = gamma
        self.epsilon = epsilon
        self.step_count = 0
        self.ring = EmbeddingRing(settings.num_prototypes, embed_dim, shard)
        owned = len(self.ring.owned)
        self.register_buffer("prototypes", torch.zeros(2, owned, embed_dim))
        self.register_buffer("log_weights", torch.zeros(2, owned if settings.log_weights else 0))
        self.register_buffer("owners", self.ring.owners.clone())
        kind, lr = settings.prototype_optimizer, settings.prototype_lr
        self.optimizer = InnerOptimizer(kind, lr, self.prototypes)
        self.weight_optimizer = InnerOptimizer(kind, lr, self.log_weights)
        self._last: dict[str, Tensor | float] = {}
        self.register_state_dict_post_hook(_gather_rows)
        self.register_load_state_dict_pre_hook(_own_rows)

    @property
    def direct(self) -> bool:
        """Whether the estimate is itself the objective, not the alpha of the conjugate."""
        return self.settings.gradient == "union"

    @property
    def _trained(self) -> bool:
        """Whether prototypes are something else than the embeddings they started from."""
        return self.settings.inner_steps > 0

    # --- what the loss asks for -------------------------------------------------------------

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Refreshes and trains the prototypes on the batch, and mixes their prediction with it."""
        dtype = self.prototypes.dtype
        features = anchors.global_features.to(dtype)
        assert anchors.logit_scale.ndim == 0
        scale = anchors.logit_scale.detach().to(dtype)
        positive = (features[0] * features[1]).sum(-1)
        fresh, ids = self._gather(anchors)
        fresh = fresh.to(dtype)
        candidates = features.flip(0)
        first = self.ring.filled == 0
        if first:
            self.ring.push(candidates, ids)
        self._refresh(first)
        log_target = log_plus(fresh, self.epsilon)
        for _ in range(self.settings.inner_steps):
            self._inner_step(features, positive, scale, log_target)
        readout = self.read(features, positive, scale, self._own(ids))
        newest = self._newest()  # of those just read, before the batch replaces the oldest
        gamma = self.gamma.at(self.step_count)
        self.step_count += 1
        if not first:
            self._remember(candidates, ids)
        self._note(readout.log_mean, log_target, gamma)
        mixed = self._mix(self._attach(readout, anchors, newest), anchors.log_inner, gamma)
        return log_plus(mixed, self.epsilon)

    def _mix(self, predicted: Tensor, batch: Tensor, gamma: float) -> Float[Tensor, "2 local"]:
        """The prediction with the batch's estimate, which is a constant unless it is minimised."""
        return mix(predicted, batch if self.direct else batch.detach(), gamma)

    @torch.no_grad()
    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Alpha of the anchors by the prototypes alone."""
        dtype = self.prototypes.dtype
        features = anchors.global_features.to(dtype)
        positive = (features[0] * features[1]).sum(-1)
        own = self._own(self._gather(anchors)[1])
        readout = self.read(features, positive, anchors.logit_scale.to(dtype), own)
        local = anchors.layout.own(readout.log_mean)
        return log_plus(local, self.epsilon).to(anchors.features.dtype)

    @contextmanager
    def gathered(self) -> Generator[None]:
        """All prototypes on every rank meanwhile; all ranks enter together, and only to predict."""
        shares, size = (self.prototypes, self.log_weights, self.owners), self.ring.size
        if self.prototypes.shape[1] < size:
            self.prototypes = collectives.gather_slices(self.prototypes, size, axis=1)
            self.owners = collectives.gather_slices(self.owners, size, axis=1)
            if self.settings.log_weights:
                self.log_weights = collectives.gather_slices(self.log_weights, size, axis=1)
        try:
            yield
        finally:
            self.prototypes, self.log_weights, self.owners = shares

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last estimate."""
        return self._last

    def _gather(
        self, anchors: Anchors
    ) -> tuple[Float[Tensor, "2 batch"], Int64[Tensor, " batch"] | None]:
        """The batch estimates and, if used, the sample ids of all ranks' anchors; one exchange."""
        numbers, ids = anchors.log_inner.detach().T, anchors.sample_ids
        if ids is None or self._trained:
            return collectives.gather_constant(numbers, anchors.layout).T, None
        bits = ids.to(numbers.device, non_blocking=True)[:, None].view(numbers.dtype)
        whole = collectives.gather_constant(torch.cat([numbers, bits], 1), anchors.layout)
        return whole[:, :2].T, whole[:, 2:].contiguous().view(torch.int64).squeeze(1)

    # --- the network ------------------------------------------------------------------------

    def _own(
        self, sample_ids: Int64[Tensor, " batch"] | None
    ) -> Bool[Tensor, "batch owned"] | None:
        """Which prototypes are embeddings of the anchors' own pairs; none: not to be known."""
        if sample_ids is None or self._trained:
            return None
        return sample_ids[:, None] == self.owners

    @torch.no_grad()
    def read(
        self,
        features: Float[Tensor, "2 batch dim"],
        positive: Float[Tensor, " batch"],
        logit_scale: Float[Tensor, ""],
        own: Bool[Tensor, "batch owned"] | None = None,
    ) -> Readout:
        """The network's forward pass, for the anchors of all ranks.

        Args:
            features: of the anchors.
            positive: their s_ii.
            logit_scale: 1 / temperature.
            own: this rank's prototypes that have no part in an anchor's sum.
        """
        norms = torch.linalg.vector_norm(self.prototypes, dim=-1, keepdim=True)
        directions = self.prototypes / norms.clamp_min(1e-30)
        logits = torch.bmm(features, directions.transpose(1, 2)).mul_(logit_scale)
        log_count = math.log(self.settings.num_prototypes)
        if self.settings.log_weights:
            logits += (self._log_shares() + log_count)[:, None, :]
        if own is not None:
            logits.masked_fill_(own, _EXCLUDED)
        top = logits.amax(-1, keepdim=True)
        weights = logits.sub_(top).exp_()
        # No cosine exceeds 1 and no share of the weights does: the bound.
        log_sum = collectives.logsumexp_over_ranks(
            weights.sum(-1, keepdim=True).log_().add_(top), logit_scale + log_count
        )
        weights.mul_(top.sub_(log_sum).exp_())
        log_mean = log_sum.squeeze(-1) - log_count - positive * logit_scale
        return Readout(directions, norms, weights, log_mean)

    @torch.no_grad()
    def _inner_step(
        self, features: Tensor, positive: Tensor, scale: Tensor, log_target: Tensor
    ) -> None:
        """One step of the prototypes on the objective, everything else fixed."""
        readout = self.read(features, positive, scale)
        slope = self._slope(readout, log_target)
        if self.settings.log_weights:
            shares = self._log_shares().exp()
            grad = (slope[:, None] @ readout.weights).squeeze(1)
            grad -= shares * slope.sum(-1, keepdim=True)
            self.weight_optimizer.step(self.log_weights, grad / scale)
        self.optimizer.step(self.prototypes, self._gradient(readout, features, slope))

    def _slope(self, readout: Readout, log_target: Tensor) -> Float[Tensor, "2 batch"]:
        """(1 - exp(-alpha_i) q_i) share_i / B: derivative by the log-mean, over tau."""
        alpha = log_plus(readout.log_mean, self.epsilon)
        ratio = (log_target - alpha).clamp_max(LOG_RATIO_LIMIT).exp_()
        return (1 - ratio) * (readout.log_mean - alpha).exp_() / log_target.shape[-1]

    def _gradient(
        self, readout: Readout, features: Tensor, slope: Tensor
    ) -> Float[Tensor, "2 owned dim"]:
        """The gradient by the prototypes, through the cosine: without radial part."""
        pull = torch.bmm(readout.weights.transpose(1, 2), features * slope[..., None])
        radial = torch.linalg.vecdot(pull, readout.directions)[..., None]
        return pull.addcmul_(readout.directions, radial, value=-1).div_(readout.norms)

    def _log_shares(self) -> Float[Tensor, "2 owned"]:
        """Logarithm of the normalised learned weights."""
        top = collectives.max_over_ranks(self.log_weights.amax(-1, keepdim=True))
        total = collectives.sum_over_ranks((self.log_weights - top).exp_().sum(-1, keepdim=True))
        return self.log_weights - top - total.log()

    def _newest(self) -> list[slice] | None:
        """This rank's rows of the prototypes that carry the anchors' gradient; none: all do."""
        count = self.settings.gradient_prototypes
        if count is None or count >= self.ring.size:
            return None
        first = max(self.ring.written - count, 0)
        return [rows for _, rows in self.ring.window(first, count)]

    def _attach(
        self, readout: Readout, anchors: Anchors, newest: list[slice] | None
    ) -> Float[Tensor, "2 local"]:
        """This rank's log-means, carrying the anchors' gradient unless it is `detached`.

        d log_mean_i = d( scale * (e_i . v_i - s_ii) ) with v_i = sum_k p_ik w_k held constant, so
        adding that difference attaches the exact gradient, however the prototypes are shared out.
        If only the newest prototypes carry it, v_i is the mean over those, and the value is not
        touched: old embeddings still count rightly, but no longer show where negatives are.
        """
        value = anchors.layout.own(readout.log_mean).to(anchors.features.dtype)
        if self.settings.gradient == "detached":
            return value
        centre = self._centre(readout, anchors, newest).to(anchors.features.dtype)
        linear = anchors.logit_scale * ((anchors.features * centre).sum(-1) - anchors.positive)
        return value + (linear - linear.detach())

    def _centre(
        self, readout: Readout, anchors: Anchors, newest: list[slice] | None
    ) -> Float[Tensor, "2 local dim"]:
        """v_i of this rank's anchors: the mean of all ranks' prototypes under p_ik."""
        if newest is None:
            means = torch.bmm(readout.weights, readout.directions)
            return collectives.scatter_sum(means.transpose(0, 1), anchors.layout).transpose(0, 1)
        # The weights' sums go along as another column: one exchange.
        sums = readout.weights.new_zeros(*readout.weights.shape[:2], anchors.features.shape[-1] + 1)
        for rows in newest:
            weights = readout.weights[..., rows]
            sums[..., :-1] += torch.bmm(weights, readout.directions[:, rows])
            sums[..., -1] += weights.sum(-1)
        total = collectives.scatter_sum(sums.transpose(0, 1), anchors.layout).transpose(0, 1)
        return total[..., :-1] / total[..., -1:].clamp_min(1e-30)

    # --- refreshing -------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh(self, first: bool) -> None:
        """Renews prototypes from the embeddings of earlier batches, as the settings say.

        Not from the batch to be read: an anchor's own positive is no negative, and as one of m
        prototypes it would hold alpha_i above -log(m). Only the first batch has no earlier one.
        """
        period = self.settings.restart_steps
        due = self.settings.refresh == "restart" and self.step_count % period == 0
        if first or due:
            self._restart()
        elif self.settings.refresh == "rolling" and self.ring.filled == self.ring.size:
            self._roll(period)

    @torch.no_grad()
    def _remember(
        self, candidates: Float[Tensor, "2 batch dim"], owners: Int64[Tensor, " batch"] | None
    ) -> None:
        """Takes in the batch's embeddings, after it was read."""
        full_before = self.ring.filled == self.ring.size
        rows = self.ring.push(candidates, owners)
        if self.settings.refresh == "fifo":
            self._replace(rows, min(candidates.shape[1], self.ring.size))
        elif self.ring.filled == self.ring.size and not full_before:
            self._restart()

    def _restart(self) -> None:
        """All prototypes anew from the ring; while it is not full, the embeddings repeat."""
        if self.ring.filled == self.ring.size:
            self.prototypes.copy_(self.ring.slots)
            self.owners.copy_(self.ring.owners)
        else:
            source = torch.arange(self.ring.owned.start, self.ring.owned.stop) % self.ring.filled
            source = source.to(self.owners.device)
            for kept, slots in (
                (self.prototypes, self.ring.slots), (self.owners, self.ring.owners)
            ):  # fmt: skip
                whole = collectives.gather_slices(slots, self.ring.size, axis=1)
                kept.copy_(whole[:, source])
        self.log_weights.zero_()
        self.optimizer.reset()
        self.weight_optimizer.reset()

    def _roll(self, period: int) -> None:
        """Replaces a moving window of prototypes: each is renewed once in `period` steps."""
        size = self.ring.size
        start, stop = ((self.step_count + k) * size // period for k in (0, 1))
        self._replace([rows for _, rows in self.ring.window(start, stop - start)], stop - start)

    def _replace(self, pieces: list[slice], count: int) -> None:
        """Renews prototypes: this rank's rows `pieces`, over all ranks `count` of them."""
        for rows in pieces:
            self.prototypes[:, rows] = self.ring.slots[:, rows]
            self.owners[:, rows] = self.ring.owners[:, rows]
            if self.settings.log_weights:
                self.log_weights[:, rows] = 0
        for optimizer in (self.optimizer, self.weight_optimizer):
            optimizer.forget(pieces, count / self.ring.size)

    # --- state ------------------------------------------------------------------------------

    def _note(self, log_mean: Tensor, log_target: Tensor, gamma: float) -> None:
        alpha = log_plus(log_mean, self.epsilon)
        self._last = {
            "gamma": gamma,
            "predicted_log_normalizer": alpha.mean(),
            "prototype_objective": conjugate(log_target, alpha).mean(),
            "prototype_ratio": (log_target - alpha).clamp_max(LOG_RATIO_LIMIT).exp_().mean(),
        }

    def get_extra_state(self) -> dict[str, int]:
        """The counters, for `state_dict`."""
        return {"step_count": self.step_count, "written": self.ring.written}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the counters."""
        self.step_count = int(state["step_count"])
        self.ring.written = int(state["written"])


_OWNERS = ("owners", "ring.owners")
_ROW_TENSORS = ("prototypes", "log_weights", "ring.slots", *_OWNERS)


def _row_names(module: PrototypeNormalizer) -> list[str]:
    """State entries with one row per prototype, shared out over ranks."""
    names = [name for name in _ROW_TENSORS if name != "log_weights" or module.settings.log_weights]
    names += [f"optimizer.{name}" for name in module.optimizer.row_tensors]
    if module.settings.log_weights:
        names += [f"weight_optimizer.{name}" for name in module.weight_optimizer.row_tensors]
    return names


def _gather_rows(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    """After `state_dict`: every rank's rows, so that a checkpoint holds the whole network."""
    assert isinstance(module, PrototypeNormalizer)
    if len(module.ring.owned) == module.ring.size:
        return
    for name in _row_names(module):
        state[prefix + name] = collectives.gather_slices(
            state[prefix + name], module.ring.size, axis=1
        )


def _own_rows(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: keeps this rank's rows of the whole network."""
    assert isinstance(module, PrototypeNormalizer)
    owned, size = module.ring.owned, module.ring.size
    for name in _OWNERS:  # states of before 2026-11-27 have none
        state.setdefault(prefix + name, torch.full((1, size), NOBODY))
    for name in _row_names(module):
        key = prefix + name
        if key not in state:
            continue
        if state[key].shape[1] != size:
            raise UserError(
                f"the saved state has {state[key].shape[1]} prototypes, this loss has {size}: "
                f"create it with num_prototypes={state[key].shape[1]}"
            )
        state[key] = state[key][:, owned.start : owned.stop]
