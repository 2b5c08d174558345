"""NeuCLIP's normalizer: trained prototypes predict the log-normalizer (arXiv 2511.08417).

The prototypes (see `prototype_network`) are trained on CLIP's own objective in its conjugate form,
T_u steps a batch, and restarted from recent embeddings every T_r steps. The prediction is mixed
with the batch estimate:

    normalizer_i = (1 - gamma_t) exp(alpha_i) + gamma_t (eps + g^_i)

The paper states this form; how it restarts, mixes and trains in detail are readings, each of which
has a setting (`neuclip methods neuclip` lists them).

An inner step has q_i = eps + g^_i, in the notation of `prototype_network`, and the gradient

    dL/dW_k = 1/|W_k| (I - w_k w_k^T) 1/B sum_i (1 - exp(-alpha_i) q_i) share_i p_ik e_i

where tau cancels, since the objective is tau times the conjugate.

Trained prototypes belong to no sample, so groups cannot exclude any of them. They are trained on
batch estimates that leave out an anchor's groups, over the anchors that have a negative.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.method.arithmetic import compiled_form
from neuclip.method.choices import (
    CompiledLoss,
    NetworkRefresh,
    PredictionGradient,
    PrototypeOptimizer,
    RestartFill,
    RestartSource,
)
from neuclip.method.normalizers.embedding_ring import EmbeddingRing
from neuclip.method.normalizers.global_batch import GlobalBatch
from neuclip.method.normalizers.inner_optimizer import InnerOptimizer
from neuclip.method.normalizers.prototype_network import (
    NetworkOutput,
    PredictionRecord,
    attach_gradient,
    log_shares,
    network_output,
    prototype_gradient,
    weight_gradient,
)
from neuclip.method.normalizers.sharded_rows import RowShard, gathered_rows, keep_full_in_state
from neuclip.method.notation import Anchors
from neuclip.method.objective import log_plus, mix
from neuclip.method.schedule import Gamma
from neuclip.parallel.collectives import Slice


@dataclass(frozen=True)
class NetworkSettings:
    """How the prototypes are kept and trained; the fields are those of `NeuCLIPSettings`."""

    num_prototypes: int
    inner_steps: int
    restart_steps: int
    prototype_lr: float
    prototype_optimizer: PrototypeOptimizer
    refresh: NetworkRefresh
    restart_from: RestartSource
    restart_fill: RestartFill
    restart_optimizer: bool
    gradient: PredictionGradient
    log_weights: bool


class PrototypeNormalizer(nn.Module):
    """Log-normalizers from prototypes, and the training of these.

    Args:
        embed_dim: width of the embeddings.
        settings: see `NetworkSettings`.
        gamma: weight of the batch estimate over time; none: the prediction alone.
        epsilon: stabiliser of the objective.
        shard: the prototypes that this rank keeps; none: its share, `collectives.owned_slice`.

    Attributes:
        prototypes: W, this rank's texts and images.
        log_weights: their learned log-weights; empty without them.
    """

    needs_sample_ids = False

    prototypes: Float[Tensor, "2 owned dim"]
    log_weights: Float[Tensor, "2 weights"]

    def __init__(
        self,
        embed_dim: int,
        settings: NetworkSettings,
        gamma: Gamma | None,
        epsilon: float,
        *,
        shard: Slice | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.gamma = gamma
        self.epsilon = epsilon
        self.step_count = 0
        self.shard = RowShard.of(settings.num_prototypes, shard)
        self.ring = EmbeddingRing(self.shard, embed_dim)
        owned = len(self.shard)
        self.register_buffer("prototypes", torch.zeros(2, owned, embed_dim))
        self.register_buffer("log_weights", torch.zeros(2, owned if settings.log_weights else 0))
        kind, lr = settings.prototype_optimizer, settings.prototype_lr
        self.optimizer = InnerOptimizer(kind, lr, self.prototypes, self.shard)
        weight_shard = self.shard if settings.log_weights else None
        self.weight_optimizer = InnerOptimizer(kind, lr, self.log_weights, weight_shard)
        self._last: PredictionRecord | None = None
        self._compiled: dict[CompiledLoss, Callable[[GlobalBatch], None]] = {}
        self.register_load_state_dict_pre_hook(_drop_sample_ids)
        keep_full_in_state(self, self._row_names())

    @property
    def direct(self) -> bool:
        """Whether the estimate is itself the objective, not the alpha of the conjugate."""
        return self.settings.gradient == "union"

    def estimate(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Refreshes and trains the prototypes on the batch, and mixes their prediction with it."""
        batch = GlobalBatch.of(anchors, self.prototypes.dtype, self.epsilon)
        is_first = self.ring.written == 0
        at_once = is_first or self.settings.restart_from == "current"
        if at_once:
            self._remember(batch)
        self._refresh(batch, is_first)
        self._train(batch, anchors.pairs.arithmetic.compiled)
        output = self._read(batch)
        gamma = 0.0 if self.gamma is None else self.gamma.at(self.step_count)
        self.step_count += 1
        if not at_once:
            self._remember(batch)
        self._last = PredictionRecord(
            output.log_mean, batch.log_inner, batch.known, self.epsilon, gamma
        )
        predicted = attach_gradient(output, anchors, self.settings.gradient, self.shard)
        estimate = anchors.log_inner if self.direct else anchors.log_inner.detach()
        return log_plus(mix(predicted, estimate, gamma), self.epsilon)

    @torch.no_grad()
    def predict(self, anchors: Anchors) -> Float[Tensor, "2 local"]:
        """Alpha of the anchors by the prototypes alone."""
        output = self._read(GlobalBatch.of(anchors, self.prototypes.dtype, self.epsilon))
        local = anchors.pairs.layout.own(output.log_mean)
        return log_plus(local, self.epsilon).to(anchors.pairs.features.dtype)

    @contextmanager
    def gathered(self) -> Generator[None]:
        """Inside, every rank has all prototypes to predict from; all ranks enter together."""
        with gathered_rows(self, *self._row_names()):
            yield

    def metrics(self) -> dict[str, Tensor | float]:
        """Diagnostics of the last estimate."""
        return {} if self._last is None else self._last.diagnostics()

    def _row_names(self) -> tuple[str, ...]:
        """Buffers with one row per prototype."""
        return ("prototypes", "log_weights") if self.settings.log_weights else ("prototypes",)

    def _read(self, batch: GlobalBatch) -> NetworkOutput:
        shares = log_shares(self.log_weights, self.shard) if self.settings.log_weights else None
        return network_output(self.prototypes, batch, self.shard, log_shares=shares)

    def _train(self, batch: GlobalBatch, compiled: CompiledLoss) -> None:
        """Takes the inner steps on a batch."""
        if compiled != "off":
            batch.precompute(self.shard.size)
        inner_step = self._inner_step_as(compiled)
        for _ in range(self.settings.inner_steps):
            inner_step(batch)

    def _inner_step_as(self, compiled: CompiledLoss) -> Callable[[GlobalBatch], None]:
        """The inner step, compiled at its first call if that is wanted.

        Prototypes and optimiser state stay where they are, as a CUDA graph needs.
        """
        if compiled == "off":
            return self._inner_step
        if compiled not in self._compiled:
            self._compiled[compiled] = compiled_form(self._inner_step, graphs=compiled == "graphs")
        return self._compiled[compiled]

    @torch.no_grad()
    def _inner_step(self, batch: GlobalBatch) -> None:
        """One step of the prototypes on the objective, everything else fixed."""
        output = self._read(batch)
        by_weight = weight_gradient(output, batch)
        if self.settings.log_weights:
            shares = log_shares(self.log_weights, self.shard).exp()
            terms = by_weight * batch.share
            grad = (terms[:, None] @ output.weights).squeeze(1)
            # p_ik of all prototypes sums to 1.
            grad -= shares * (terms / output.norm.squeeze(-1)).sum(-1, keepdim=True)
            self.weight_optimizer.step(self.log_weights, grad / batch.logit_scale)
        grad = prototype_gradient(output, batch, by_weight)
        self.optimizer.step(self.prototypes, grad)

    # --- refreshing -------------------------------------------------------------------------

    @torch.no_grad()
    def _refresh(self, batch: GlobalBatch, is_first: bool) -> None:
        """Renews prototypes from recent embeddings, as the settings say.

        `restart_from` is `earlier` by default: an anchor's own positive is not a negative, and as
        one of m prototypes it would hold alpha_i above -log(m). Only the first batch has no earlier
        one.
        """
        period = self.settings.restart_steps
        due = self.settings.refresh == "restart" and self.step_count % period == 0
        if due and not is_first and self.settings.restart_fill == "batch":
            self._replace(batch.features.shape[1])
        elif is_first or due:
            self._restart()
        elif self.settings.refresh == "rolling" and self.ring.is_full:
            self._roll(period)

    @torch.no_grad()
    def _remember(self, batch: GlobalBatch) -> None:
        """Pushes the batch's embeddings; restarts once, when the ring has just become full."""
        was_full = self.ring.is_full
        self.ring.push(batch.candidates)
        by_batch = self.settings.refresh == "restart" and self.settings.restart_fill == "batch"
        if self.ring.is_full and not was_full and not by_batch:
            self._restart()

    def _restart(self) -> None:
        """Restarts all prototypes from the ring; until it is full, its embeddings repeat."""
        self.ring.fill_up()
        self.prototypes.copy_(self.ring.slots)
        self.log_weights.zero_()
        self._reset_optimizers()

    def _replace(self, batch_size: int) -> None:
        """Restarts as many prototypes as a batch has, the next ones in turn, from the newest."""
        size = self.shard.size
        count = min(batch_size, size)
        end, device = self.ring.written, self.prototypes.device
        newest = torch.arange(end - count, end, device=device) % size
        taken = self.shard.gather(self.ring.slots)[:, newest]
        restarts = self.step_count // self.settings.restart_steps
        for first, rows in self.shard.window(restarts * count % size, count):
            self.prototypes[:, rows] = taken[:, first : first + rows.stop - rows.start]
            if self.settings.log_weights:
                self.log_weights[:, rows] = 0
        self._reset_optimizers()

    def _reset_optimizers(self) -> None:
        if self.settings.restart_optimizer:
            self.optimizer.reset()
            self.weight_optimizer.reset()

    def _roll(self, period: int) -> None:
        """Replaces a moving window of prototypes: each is renewed once in `period` steps."""
        size = self.shard.size
        start, stop = ((self.step_count + k) * size // period for k in (0, 1))
        pieces = [rows for _, rows in self.shard.window(start, stop - start)]
        for rows in pieces:
            self.prototypes[:, rows] = self.ring.slots[:, rows]
            if self.settings.log_weights:
                self.log_weights[:, rows] = 0
        for optimizer in (self.optimizer, self.weight_optimizer):
            if not self.settings.restart_optimizer:
                continue
            optimizer.forget(pieces, (stop - start) / size)

    # --- state ------------------------------------------------------------------------------

    def get_extra_state(self) -> dict[str, int]:
        """The counters, for `state_dict`."""
        return {"step_count": self.step_count, "written": self.ring.written}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restores the counters."""
        self.step_count = int(state["step_count"])
        self.ring.written = int(state["written"])


def _drop_sample_ids(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Before `load_state_dict`: states of before 2026-11-28 have sample ids that nothing uses."""
    for name in ("owners", "ring.owners"):
        state.pop(prefix + name, None)
