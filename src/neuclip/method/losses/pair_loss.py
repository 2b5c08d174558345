"""What every loss shares: checked inputs, float arithmetic under autocast, gathered features."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.method.inputs import check_layout, check_shapes, check_values
from neuclip.method.notation import Anchors, Pairs, Section, SharedOut, no_section
from neuclip.method.softmax.log_inner import log_inner
from neuclip.parallel import collectives
from neuclip.parallel.collectives import BatchLayout


class PairLoss(nn.Module):
    """Base of the losses; a subclass gives `pair_loss`, and `predict` if it knows normalizers.

    Args:
        embed_dim: width of the embeddings.

    Attributes:
        epsilon: stabiliser inside log(epsilon + g).
        needs_sample_ids: whether `sample_ids` must be passed.
        learns_temperature: whether `logit_scale` is to be trained; if not, freeze it.
    """

    epsilon: float = 0.0
    needs_sample_ids: bool = False
    learns_temperature: bool = True

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.attach()
        self._layout_checked = False
        self._checked_values = False
        self._last: dict[str, Tensor | float] = {}

    def attach(self, *, section: Section = no_section, equal_batches: bool = False) -> None:
        """Connects the loss to a training loop.

        Args:
            section: context manager factory, entered with a name around each timed part.
            equal_batches: set if every rank holds the same number of pairs at every call. The
                numbers are then all-gathered and checked at the first call only; otherwise at
                every call, and they may differ.
        """
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
        """This rank's part: averaged over ranks it is the global loss (see `BatchLayout.mean`)."""
        raise NotImplementedError

    def predict(
        self,
        pairs: Pairs,
        logit_scale: Float[Tensor, ""],
    ) -> Float[Tensor, "2 local"]:
        """The method's own log(epsilon + g) of some anchors."""
        raise UserError(f"{type(self).__name__} has no log-normalizers to predict")

    def forward(
        self,
        image_features: Float[Tensor, "*images"],
        text_features: Float[Tensor, "*texts"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None = None,
        *,
        sample_ids: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of a batch of pairs.

        Args:
            image_features: unit-norm embeddings of this rank's images, [local, dim].
            text_features: those of their texts, same shape.
            logit_scale: 1 / temperature (not its logarithm), as open_clip's models return it.
            logit_bias: only for sigmoid losses.
            sample_ids: stable ids of the pairs (int64, [local]), for methods with a state per
                sample, and for `neuclip` to know an anchor's own pair in its pool. Best left on
                the CPU: there their bounds are checked at every call.
            output_dict: return `{"contrastive_loss": loss}` as open_clip's losses do.

        Raises:
            UserError: shapes that do not fit, a single pair, a rank without pairs, ids missing or
                out of range, values that are not finite or not of unit norm (values are checked at
                every call on the CPU, at the first on other devices).
        """
        if self.needs_sample_ids and sample_ids is None:
            raise UserError(
                f"{type(self).__name__} keeps a state per sample: pass sample_ids, a tensor of "
                f"{len(image_features)} integers"
            )
        pairs = self._prepare(image_features, text_features, sample_ids, self._training_layout)
        scale = logit_scale.to(pairs.features.dtype)
        with torch.autocast(scale.device.type, enabled=False):
            loss = self.pair_loss(pairs, scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    @torch.no_grad()
    def predict_log_normalizers(
        self,
        image_features: Float[Tensor, "*images"],
        text_features: Float[Tensor, "*texts"],
        logit_scale: Float[Tensor, ""],
        sample_ids: Tensor | None = None,
    ) -> Float[Tensor, "2 local"]:
        """Predicts log(epsilon + g) of the image anchors and of the text anchors; keeps all state.

        Methods without a memory estimate it from the batch. Methods with a state per sample do so
        too, for samples they have not seen and where `sample_ids` is not given.

        Raises:
            UserError: the loss has no log-normalizers (see `predicts_log_normalizers`).
        """
        layout = (
            collectives.layout_of
        )  # batches to be judged may differ where those trained on don't
        pairs = self._prepare(image_features, text_features, sample_ids, layout)
        scale = logit_scale.to(pairs.features.dtype)
        with torch.autocast(scale.device.type, enabled=False):
            return self.predict(pairs, scale)

    @contextmanager
    def whole(self) -> Generator[None]:
        """All of its state on every process meanwhile, so that each can predict by itself.

        All processes enter together; inside, one in `distributed.alone()` predicts as a single
        process does. Nothing may be trained meanwhile.
        """
        checked = self._layout_checked
        with ExitStack() as stack:
            for module in self.modules():
                if isinstance(module, SharedOut):
                    stack.enter_context(module.gathered())
            yield
        self._layout_checked = checked  # by a process alone: the others may not have predicted

    def metrics(self) -> dict[str, float]:
        """Diagnostics of the last call. Waits for the device."""
        return {name: float(value) for name, value in self._last.items()}

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        """Keeps diagnostics for `metrics`, on the device."""
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
                f"[{len(image_features)}] of torch.int64, one a pair"
            )
        both = torch.stack([image_features, text_features])
        features = both if both.dtype == torch.float64 else both.float()
        return Pairs(features, layout, sample_ids)

    def _training_layout(self, local: int) -> BatchLayout:
        """How many pairs each rank holds; asked at the first call only if they are to be equal."""
        known = self.equal_batches and self._layout_checked
        layout = collectives.layout_of(local, equal=known)
        if self.equal_batches and not layout.even:
            raise UserError(
                f"the processes hold {list(layout.sizes)} pairs, and equal_batches is set: leave "
                "it unset where numbers differ"
            )
        self._layout_checked = True
        return layout


def anchors_of(pairs: Pairs, logit_scale: Float[Tensor, "*scales"]) -> Anchors:
    """The batch with its estimates log g^_i.

    Args:
        pairs: this rank's part of it.
        logit_scale: one for all, or [2, local].
    """
    features = pairs.features
    by_pair = features.transpose(0, 1)
    whole = collectives.gather_constant(by_pair, pairs.layout).transpose(0, 1)
    estimate, slope = log_inner(features, logit_scale, whole, pairs.layout)
    return Anchors(
        pairs=pairs,
        positive=(features[0] * features[1]).sum(-1),
        log_inner=estimate,
        logit_scale=logit_scale,
        global_features=whole,
        dlog_inner_dscale=slope,
    )
