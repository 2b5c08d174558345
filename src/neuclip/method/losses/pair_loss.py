"""The base of all losses: checks of the inputs, float32 under autocast, metrics."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.method.arithmetic import PLAIN, Arithmetic, autocast_precision
from neuclip.method.choices import BatchOption
from neuclip.method.inputs import (
    check_layout,
    check_shapes,
    check_values,
    with_keys,
    with_options,
)
from neuclip.method.notation import (
    LOGIT_SCALE_BOUNDS,
    Anchors,
    Pairs,
    SectionTimer,
    ShardedState,
    no_timer,
)
from neuclip.method.softmax.candidates import Candidates
from neuclip.method.softmax.hard_negatives import with_hard_negatives
from neuclip.method.softmax.log_inner import log_inner
from neuclip.method.thresholds import FalseNegativeThresholds
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout

Metrics = Mapping[str, Tensor | float]
"""Diagnostics by name."""


class PairLoss(nn.Module):
    """Base of the losses. A subclass defines `pair_loss`, and `predict` if it has normalizers.

    Args:
        embed_dim: width of the embeddings.

    Attributes:
        epsilon: stabiliser inside log(epsilon + g).
        needs_sample_ids: whether `sample_ids` must be passed.
        key_momentum: decay of the moving average of the towers that encodes `key_features`, which
            must be passed then; none: the loss takes none.
        takes: which of `groups`, `pair_weights` and `negative_features` may be passed.
        learns_temperature: whether `logit_scale` gets a gradient; if not, freeze it.
        logit_scale_bounds: within which the trainer keeps 1 / temperature.
        has_fused_kernels: whether its softmaxes can use the fused kernels.
        thresholds: which negatives an anchor takes for false and leaves out; none: it keeps all.
        settling: set while the towers stay as they are and only the loss's state learns: individual
            temperatures stay too, and a rho that is to be measured is.
    """

    epsilon: float = 0.0
    needs_sample_ids: bool = False
    key_momentum: float | None = None
    takes: frozenset[BatchOption] = frozenset()
    learns_temperature: bool = True
    logit_scale_bounds: tuple[float, float] = LOGIT_SCALE_BOUNDS
    has_fused_kernels: bool = True
    settling: bool = False

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.thresholds: FalseNegativeThresholds | None = None
        self.attach()
        self._layout_checked = False
        self._checked_values = False
        self._checked_options = False
        self._checked_keys = False
        self._last: Metrics | Callable[[], Metrics] = {}

    def attach(
        self,
        *,
        section: SectionTimer = no_timer,
        equal_batches: bool = False,
        arithmetic: Arithmetic = PLAIN,
    ) -> None:
        """Connects the loss to a training loop.

        Args:
            section: times the parts of the loss.
            equal_batches: set if every rank holds the same number of pairs at every call. The
                numbers are then all-gathered and checked at the first call only; otherwise at
                every call, and they may differ.
            arithmetic: how the loss computes. Inside autocast with bfloat16, products of features
                are of bfloat16 factors whatever it says.

        Raises:
            UserError: it asks for fused kernels, and this loss has none.
        """
        if arithmetic.fused == "on" and not (self.has_fused_kernels and self.thresholds is None):
            why = "leaves out false negatives by similarity" if self.thresholds else "has none"
            raise UserError(
                f"--fused-loss on: fused kernels are not for this loss, {type(self).__name__}, "
                f"which {why}; leave the flag out"
            )
        self.arithmetic = arithmetic
        self.section = section
        self.equal_batches = equal_batches

    @property
    def predicts_log_normalizers(self) -> bool:
        """Whether the loss has log-normalizers to predict: whether it defines `predict`."""
        return type(self).predict is not PairLoss.predict

    def pair_loss(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
    ) -> Float[Tensor, ""]:
        """This rank's part of the loss; the mean over ranks is the loss (`BatchLayout.mean`)."""
        raise NotImplementedError

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """Predicts log(epsilon + g) of the anchors."""
        raise UserError(f"{type(self).__name__} has no log-normalizers to predict")

    def forward(  # noqa: PLR0913  open_clip's arguments, and what a batch may bring
        self,
        image_features: Float[Tensor, "*images"],
        text_features: Float[Tensor, "*texts"],
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        sample_ids: Tensor | None = None,
        groups: Tensor | None = None,
        pair_weights: Tensor | None = None,
        negative_features: Tensor | None = None,
        key_features: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Computes the loss of a batch of pairs.

        Args:
            image_features: unit-norm embeddings of this rank's images, [local, dim].
            text_features: unit-norm embeddings of their texts, [local, dim].
            logit_scale: 1 / temperature (not its logarithm), as open_clip's models return it: a
                tensor with one element, or a number if the temperature is constant.
            logit_bias: bias of the logits, for the sigmoid loss only.
            sample_ids: stable ids of the pairs (int64, [local]), for methods with a state per
                sample, and for `neuclip_pool` to leave an anchor's own pair out of its pool. Pass
                them on the CPU: their bounds are checked there at every call.
            groups: groups of the pairs (int64, [local] or [local, kinds]), on any device. Two pairs
                with the same number other than 0 in some column are not negatives of each other.
            pair_weights: weights of the pairs in the loss ([local], 0 or more), on any device; only
                their ratios over the global batch count. A pair of weight 0 counts as
                no anchor and stays a negative of the others.
            negative_features: unit-norm embeddings of the texts' hard negatives, [local, dim]:
                further candidates of the image anchors. A row of zeros: the pair has none.
            key_features: unit-norm embeddings of the same images and of the same texts by momentum
                towers ([2, local, dim], without gradient), for `moco`. The towers are a moving
                average of the model's with the decay `key_momentum`.
            output_dict: return `{"contrastive_loss": loss}`, as open_clip's losses do.

        Raises:
            UserError: wrong shapes, a single pair, a rank without pairs, ids missing or out of
                range, embeddings that are not finite or not of unit norm, weights that are negative
                or not finite (checked at every call on the CPU, at the first call on other
                devices), or an argument that this method does not take.
        """
        if self.needs_sample_ids and sample_ids is None:
            raise UserError(
                f"{type(self).__name__} keeps a state per sample: pass sample_ids, a tensor of "
                f"{len(image_features)} integers, such as the pairs' positions in the data"
            )
        pairs = self._prepare(image_features, text_features, sample_ids, self._training_layout)
        if (low := autocast_precision(image_features.device.type)) is not None:
            pairs = replace(pairs, arithmetic=replace(self.arithmetic, low_precision=low))
        given = {
            "groups": groups,
            "pair_weights": pair_weights,
            "negative_features": negative_features,
        }
        pairs = self._with_options(pairs, {key: v for key, v in given.items() if v is not None})
        pairs = self._with_keys(pairs, key_features)
        scale = _scalar("logit_scale", logit_scale, pairs.features)
        bias = None if logit_bias is None else _scalar("logit_bias", logit_bias, pairs.features)
        with torch.autocast(scale.device.type, enabled=False):
            pairs = self._with_thresholds(pairs, learn=True)
            loss = self.pair_loss(pairs, scale, bias)
        return {"contrastive_loss": loss} if output_dict else loss

    @torch.no_grad()
    def predict_log_normalizers(
        self,
        image_features: Float[Tensor, "*images"],
        text_features: Float[Tensor, "*texts"],
        logit_scale: Tensor | float,
        sample_ids: Tensor | None = None,
    ) -> Float[Tensor, "2 local"]:
        """Predicts log(epsilon + g) of the image anchors and of the text anchors; keeps all state.

        Methods without a memory estimate it from the batch. Methods with a state per sample do so
        too, for samples they have not seen and where `sample_ids` is not given.

        Raises:
            UserError: the loss has no log-normalizers (see `predicts_log_normalizers`).
        """
        # Evaluation batches may differ in size between ranks even with `equal_batches`.
        layout_of = collectives.layout_of
        pairs = self._prepare(image_features, text_features, sample_ids, layout_of)
        pairs = self._with_thresholds(pairs, learn=False)
        scale = _scalar("logit_scale", logit_scale, pairs.features)
        with torch.autocast(scale.device.type, enabled=False):
            return self.predict(pairs, scale)

    @contextmanager
    def full_state(self) -> Generator[None]:
        """Inside, every rank has the full state and can predict without the others.

        All ranks enter together. A rank predicts by itself in `collectives.alone()`. Training
        inside would lose its updates.
        """
        checked = self._layout_checked
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, ShardedState):
                    stack.enter_context(module.gathered())
            yield
        # Ranks may have predicted different numbers of batches; they must agree on this flag.
        self._layout_checked = checked

    def metrics(self) -> dict[str, float]:
        """Returns diagnostics of the last call. Waits for the device."""
        found = {} if self.thresholds is None else self.thresholds.metrics()
        with torch.no_grad():
            last = self._last() if callable(self._last) else self._last
        return {name: float(value) for name, value in {**last, **found}.items()}

    def record_metrics(self, values: Metrics | Callable[[], Metrics]) -> None:
        """Keeps diagnostics for `metrics`, on the device.

        Args:
            values: the numbers; or a function that computes them, so that a step whose metrics
                nobody reads does not pay for them. It must keep no more than small tensors alive.
        """
        if callable(values):
            self._last = values
            return
        self._last = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }

    def _prepare(
        self,
        image_features: Tensor,
        text_features: Tensor,
        sample_ids: Tensor | None,
        layout_of: Callable[[int], BatchLayout],
    ) -> Pairs:
        check_shapes(image_features, text_features, self.embed_dim)
        layout = layout_of(len(image_features))
        check_layout(layout)
        if image_features.device.type == "cpu" or not self._checked_values:
            check_values(image_features, text_features)
            self._checked_values = True
        if sample_ids is not None and (
            sample_ids.shape != image_features.shape[:1] or sample_ids.dtype != torch.int64
        ):
            raise UserError(
                f"sample_ids {list(sample_ids.shape)} of {sample_ids.dtype}: expected "
                f"[{len(image_features)}] of torch.int64, one per pair"
            )
        both = torch.stack([image_features, text_features])
        features = both if both.dtype == torch.float64 else both.float()
        return Pairs(features, layout, sample_ids, arithmetic=self.arithmetic)

    def _with_options(self, pairs: Pairs, given: Mapping[str, Tensor]) -> Pairs:
        """The pairs with what their batch brings, checked and on the device of the features."""
        if refused := sorted(given.keys() - self.takes):
            raise UserError(
                f"this loss does not take {', '.join(refused)}: leave it out, or, if the method is "
                "your own and treats it, name it in `takes` of its MethodInfo"
            )
        if not given:
            return pairs
        check = pairs.features.device.type == "cpu" or not self._checked_options
        self._checked_options = True
        return with_options(pairs, given, check_values=check)

    def _with_keys(self, pairs: Pairs, keys: Tensor | None) -> Pairs:
        """The pairs with their keys, checked, if the loss contrasts with keys."""
        if self.key_momentum is None:
            if keys is not None:
                raise UserError("this loss contrasts with no key_features: leave them out")
            return pairs
        if keys is None:
            raise UserError(
                f"{type(self).__name__} contrasts with the embeddings of momentum towers: pass "
                f"key_features, {list(pairs.features.shape)}, those of the same images and texts "
                f"by a moving average of the model with decay {self.key_momentum:g}"
            )
        check = pairs.features.device.type == "cpu" or not self._checked_keys
        self._checked_keys = True
        return with_keys(pairs, keys, check_values=check)

    def _with_thresholds(self, pairs: Pairs, *, learn: bool) -> Pairs:
        """The pairs with the thresholds of their anchors, if the loss has any."""
        return pairs if self.thresholds is None else self.thresholds.applied(pairs, learn=learn)

    def _training_layout(self, local: int) -> BatchLayout:
        """The ranks' numbers of pairs, all-gathered at the first call only if they are equal."""
        known = self.equal_batches and self._layout_checked
        layout = collectives.layout_of(local, equal=known)
        if self.equal_batches and not layout.even:
            raise UserError(
                f"the processes hold {list(layout.sizes)} pairs, and equal_batches is set: leave "
                "it unset if the numbers differ"
            )
        self._layout_checked = True
        return layout


def _scalar(name: str, value: Tensor | float, features: Tensor) -> Float[Tensor, ""]:
    """A number of the call in the type of the features, with its gradient.

    Raises:
        UserError: it has more than one element.
    """
    if not isinstance(value, Tensor):
        return features.new_full((), value)
    if value.numel() != 1:
        raise UserError(f"{name} {list(value.shape)}: must be one number")
    return value.to(features.dtype).reshape(())


def anchors_of(pairs: Pairs, logit_scale: Float[Tensor, "*scales"]) -> Anchors:
    """Gathers the features of all ranks and computes the batch estimates log g^_i.

    Args:
        pairs: this rank's pairs.
        logit_scale: 1 / tau, one for all anchors or [2, local].
    """
    features = pairs.features
    candidates = pairs.candidates or Candidates.gather(features, pairs.groups, pairs.layout)
    estimate, derivative = log_inner(features, logit_scale, candidates, pairs.arithmetic)
    anchors = Anchors(
        pairs=pairs,
        positive=(features[0] * features[1]).sum(-1),
        log_inner=estimate,
        logit_scale=logit_scale,
        global_features=candidates.features,
        negatives=candidates.counts,
        global_groups=candidates.groups,
        dlog_inner_dscale=derivative,
    )
    return anchors if pairs.negatives is None else with_hard_negatives(anchors, pairs.negatives)
