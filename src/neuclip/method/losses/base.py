"""What every loss shares: checked inputs, float arithmetic under autocast, gathered features."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip import distributed
from neuclip.errors import UserError
from neuclip.method.blocks import log_inner_of_pairs, log_inner_of_rows
from neuclip.method.inputs import check_shapes, check_values
from neuclip.method.interfaces import Anchors, LogNormalizers, Section, no_section


class PairLoss(nn.Module):
    """Base of the losses; a subclass gives `pair_loss`, and `predict` if it knows normalizers.

    Args:
        embed_dim: width of the embeddings.

    Attributes:
        epsilon: stabiliser inside log(epsilon + g).
        needs_sample_ids: whether `sample_ids` must be passed.
        learns_temperature: whether `logit_scale` is to be trained; if not, freeze it.
        initial_logit_bias: where a learnable `logit_bias` starts, for losses that need one.
        learns_temperature: whether a trainer should let `logit_scale` learn.
        section: called with a name around the parts whose time a trainer wants to know.
    """

    epsilon: float = 0.0
    needs_sample_ids: bool = False
    learns_temperature: bool = True

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.section: Section = no_section
        self._checked_values = False
        self._last: dict[str, Tensor | float] = {}

    def pair_loss(
        self,
        features: Float[Tensor, "2 local dim"],
        logit_scale: Float[Tensor, ""],
        logit_bias: Float[Tensor, ""] | None,
        sample_ids: Int64[Tensor, " local"] | None,
    ) -> Float[Tensor, ""]:
        """The mean over this rank's anchors; averaged over ranks it is the global loss."""
        raise NotImplementedError

    def predict(
        self,
        features: Float[Tensor, "2 local dim"],
        logit_scale: Float[Tensor, ""],
        sample_ids: Int64[Tensor, " local"] | None,
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
                sample. Best left on the CPU: there their bounds are checked at every call.
            output_dict: return `{"contrastive_loss": loss}` as open_clip's losses do.

        Raises:
            UserError: shapes that do not fit, a single pair, ids missing or out of range, values
                that are not finite or not of unit norm (values are checked at every call on the
                CPU, at the first on other devices).
        """
        if self.needs_sample_ids and sample_ids is None:
            raise UserError(
                f"{type(self).__name__} keeps a state per sample: pass sample_ids, a tensor of "
                f"{len(image_features)} integers"
            )
        features = self._prepare(image_features, text_features, sample_ids)
        scale = logit_scale.to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            loss = self.pair_loss(features, scale, logit_bias, sample_ids)
        return {"contrastive_loss": loss} if output_dict else loss

    @torch.no_grad()
    def predict_log_normalizers(
        self,
        image_features: Float[Tensor, "*images"],
        text_features: Float[Tensor, "*texts"],
        logit_scale: Float[Tensor, ""],
        sample_ids: Tensor | None = None,
    ) -> LogNormalizers:
        """log(epsilon + g) of these anchors as the method predicts it; changes no state.

        Methods that know only the batch estimate it from the batch given, and so do methods that
        remember samples, for samples they have not seen or without `sample_ids`.
        """
        features = self._prepare(image_features, text_features, sample_ids)
        with torch.autocast(features.device.type, enabled=False):
            predicted = self.predict(features, logit_scale.to(features.dtype), sample_ids)
        return LogNormalizers(image=predicted[0], text=predicted[1])

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
        self, image_features: Tensor, text_features: Tensor, sample_ids: Tensor | None
    ) -> Float[Tensor, "2 local dim"]:
        check_shapes(image_features, text_features, self.embed_dim)
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
        return both if both.dtype == torch.float64 else both.float()


def similarities(
    features: Float[Tensor, "2 local dim"],
) -> tuple[Float[Tensor, "local batch"], Float[Tensor, "local batch"], int]:
    """Cosines of this rank's anchors with all candidates: images to texts, texts to images.

    Returns:
        The two matrices (one product for a single process), and the first positive's column.
    """
    image, text = features[0], features[1]
    if not distributed.is_active():
        similarity = image @ text.T
        return similarity, similarity.T, 0
    whole = distributed.gather(features.transpose(0, 1).contiguous())
    offset = distributed.rank() * image.shape[0]
    return image @ whole[:, 1].T, text @ whole[:, 0].T, offset


def log_inner(
    features: Float[Tensor, "2 local dim"], logit_scale: Float[Tensor, "*scales"]
) -> Float[Tensor, "2 local"]:
    """Log g^ of this rank's anchors over the global batch, without its matrix.

    Args:
        features: images, texts.
        logit_scale: one for all, or [2, local].
    """
    if not distributed.is_active():
        return log_inner_of_pairs(features, logit_scale)
    local = features.shape[1]
    whole = distributed.gather(features.transpose(0, 1).contiguous())
    scales, offset = logit_scale.expand(2, local), distributed.rank() * local
    image = log_inner_of_rows(features[0], whole[:, 1], scales[0], offset)
    text = log_inner_of_rows(features[1], whole[:, 0], scales[1], offset)
    return torch.stack([image, text])


def gathered_constant(features: Float[Tensor, "2 local dim"]) -> Float[Tensor, "2 batch dim"]:
    """Everybody's features without gradient."""
    return distributed.gather_constant(features.transpose(0, 1)).transpose(0, 1)


def anchors_of(
    features: Float[Tensor, "2 local dim"],
    logit_scale: Float[Tensor, "*scales"],
    sample_ids: Int64[Tensor, " local"] | None,
) -> Anchors:
    """The batch with its estimates log g^_i.

    Args:
        features: images, texts.
        logit_scale: one for all, or [2, local].
        sample_ids: stable ids of the pairs.
    """
    return Anchors(
        features=features,
        positive=(features[0] * features[1]).sum(-1),
        log_inner=log_inner(features, logit_scale),
        logit_scale=logit_scale,
        global_features=gathered_constant(features),
        sample_ids=sample_ids,
    )
