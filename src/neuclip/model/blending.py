"""Mixes the weights of two models, tensor by tensor (WiSE-FT, https://arxiv.org/abs/2109.01903).

theta(alpha) = (1 - alpha) theta_old + alpha theta_new, in float32.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from neuclip.errors import UserError
from neuclip.model.architecture import Architecture
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import Clip
from neuclip.model.encoder import Encoder
from neuclip.model.foreign_weights import Given, fit
from neuclip.model.load import Pretrained
from neuclip.model.opened_checkpoint import Checkpoint, open_checkpoint

log = logging.getLogger("neuclip")

_BEYOND_SHAPES = {
    "vision_cfg": ("head_width", "pool_type", "final_ln_after_pool", "no_ln_pre", "timm_pool"),
    "text_cfg": ("heads", "pool_type", "final_ln_after_pool", "no_causal_mask"),
}
"""Settings of towers that change what weights compute, and not the shapes of the weights."""


def mix_weights(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """The weights at one point of the line between two models.

    As in WiSE-FT, everything is mixed: `logit_scale` as it is stored (a logarithm, so temperatures
    are mixed by their geometric mean), and the running statistics of BatchNorm, which are not
    measured again. Integers, such as BatchNorm's counter, come from the nearer end.

    Args:
        old: weights of the one end, by name.
        new: weights of the other end, of the same names and shapes.
        alpha: place on the line, from 0 (`old`) to 1 (`new`).

    Returns:
        Floating-point weights in float32, whatever they were. At 0 and 1 they are those of the
        ends bit by bit; where both ends are equal, so is every mix.
    """
    return {name: _mixed(old[name], new[name], alpha) for name in new}


def _mixed(old: Tensor, new: Tensor, alpha: float) -> Tensor:
    nearer = new if alpha >= 0.5 else old
    if not new.is_floating_point():
        return nearer.clone()
    if alpha in (0.0, 1.0):  # arithmetic would lose the sign of -0.0
        return nearer.to(torch.float32, copy=True)
    return torch.lerp(old.to(torch.float32), new.to(torch.float32), alpha)


@dataclass(frozen=True)
class BlendEnds:
    """Two models of one architecture, and towers that take any mix of them.

    Attributes:
        clip: the towers.
        encoder: the towers for evaluation.
        old: weights of the one end, on the CPU, by the names of the towers.
        new: weights of the other end, on the CPU.
        checkpoint: of the new end.
    """

    clip: Clip
    encoder: Encoder
    old: dict[str, Tensor]
    new: dict[str, Tensor]
    checkpoint: Checkpoint

    def take(self, alpha: float) -> None:
        """Gives the towers the weights at `alpha`."""
        self.clip.towers.load_state_dict(mix_weights(self.old, self.new, alpha))

    def as_pretrained(self, out: Path) -> Pretrained:
        """The model with the weights that the towers have now, for an export to `out`.

        It has no recipe, no training data and no results: those of the new end are not its own.
        """
        choice = CheckpointChoice(out, arch=self.clip.architecture.name)
        checkpoint = replace(
            self.checkpoint,
            choice=choice,
            path=out / out.name,
            weights=self.clip.towers.state_dict(),
            averaged=False,
            plain=False,
            epoch=None,
            name=out.name,
            own=None,
            published=None,
        )
        return Pretrained(checkpoint, self.clip, self.encoder)


def open_ends(old: CheckpointChoice, new: Pretrained) -> BlendEnds:
    """Reads the old end, and brings its weights to the towers of the new one.

    Position embeddings of another image size or text length are resized to those of the new end.

    Args:
        old: the checkpoint of the old end.
        new: the model at the other end.

    Raises:
        UserError: the old end cannot be read or is of another architecture, a weight is not finite,
            or both ends have the same weights.
    """
    towers = new.clip.towers
    new_weights = {name: value.cpu().clone() for name, value in towers.state_dict().items()}
    opened = open_checkpoint(old, model=new.clip.architecture.name)
    given = opened.given()
    _check_same(given, new)
    try:
        fitted = fit(given, new.clip)
    except UserError as error:
        raise UserError(f"weights of different architectures cannot be mixed: {error}") from None
    old_weights = {name: fitted[name].detach().cpu().clone() for name in new_weights}
    _check_values(old_weights, opened.shown)
    _check_values(new_weights, new.checkpoint.shown)
    if all(torch.equal(old_weights[name].to(v.dtype), v) for name, v in new_weights.items()):
        raise UserError(
            f"{opened.shown} and {new.checkpoint.shown} hold the same weights: there is nothing to "
            "mix"
        )
    statistics = [name for name in new_weights if name.endswith(("running_mean", "running_var"))]
    if any(not torch.equal(old_weights[name], new_weights[name]) for name in statistics):
        log.warning(
            "the towers have BatchNorm: its running statistics are mixed as the weights are, and "
            "not measured again, so mixes may be worse than they could be"
        )
    _warn_of_preprocessing(opened.recorded_architecture, new.clip.architecture)
    return BlendEnds(new.clip, new.encoder, old_weights, new_weights, new.checkpoint)


def _check_same(old: Given, new: Pretrained) -> None:
    """Checks what shapes do not show: equal weights may stand for another function.

    Raises:
        UserError: names the setting that differs.
    """
    here, there = new.clip.architecture, old.trained
    differing = list[tuple[str, object, object]]()
    if old.quick_gelu is not None and old.quick_gelu != here.quick_gelu:
        differing.append(("quick_gelu", old.quick_gelu, here.quick_gelu))
    if there is not None:
        differing += [
            (f"{tower}.{name}", there.config[tower].get(name), here.config[tower].get(name))
            for tower, names in _BEYOND_SHAPES.items()
            for name in names
            if there.config[tower].get(name) != here.config[tower].get(name)
        ]
    if differing:
        name, value, wanted = differing[0]
        raise UserError(
            f"weights of different architectures cannot be mixed: {name} is {value} in {old.path}, "
            f"and {wanted} in {new.checkpoint.shown}"
        )


def _check_values(weights: Mapping[str, Tensor], path: Path) -> None:
    """Checks that all weights are finite.

    Raises:
        UserError: names the first one that is not.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise UserError(f"{path}: {name} has values that are not finite, so no mix is usable")


def _warn_of_preprocessing(old: Architecture | None, new: Architecture) -> None:
    if old is None:
        return
    one, other = old.all_preprocessing, new.all_preprocessing
    differing = [
        key
        for key in ("mean", "std", "interpolation", "resize_mode")
        if _plain(one[key]) != _plain(other[key])
    ]
    if differing:
        log.warning(
            "OLD and NEW record different preprocessing of images (%s): every mix, OLD included, "
            "gets that of NEW", ", ".join(differing),
        )  # fmt: skip


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
