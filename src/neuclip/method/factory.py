"""Losses by name: the one place that knows which modules make up a method."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from neuclip.errors import UserError
from neuclip.method.losses.base import PairLoss
from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss
from neuclip.method.losses.infonce import InfoNCELoss
from neuclip.method.normalizers.minibatch import MinibatchNormalizer
from neuclip.method.normalizers.prototypes import NetworkSettings, PrototypeNormalizer
from neuclip.method.schedule import Gamma
from neuclip.methods import (
    METHODS,
    GlobalContrastiveSettings,
    MethodSettings,
    MixingSettings,
    NeuCLIPSettings,
    method_settings,
)


@dataclass(frozen=True)
class Run:
    """What a loss must know of the run it serves."""

    embed_dim: int
    steps_per_epoch: int | None = None


def create_loss(
    name: str,
    *,
    embed_dim: int,
    steps_per_epoch: int | None = None,
    **settings: Any,  # noqa: ANN401  validated by the method's settings
) -> PairLoss:
    """Builds the loss of a method, ready for anybody's training loop.

    Args:
        name: a method of `neuclip methods`.
        embed_dim: width of the embeddings.
        steps_per_epoch: training steps in an epoch, for methods with a schedule in epochs (gamma).
        settings: the method's settings that differ from the defaults (`neuclip methods NAME`).

    Returns:
        A module called as `loss(image_features, text_features, logit_scale)`; all its state is in
        its `state_dict`.

    Raises:
        UserError: unknown method or setting (lists what exists), a value out of range, or a missing
            length of the schedule.
    """
    return build_loss(method_settings(name, settings), Run(embed_dim, steps_per_epoch))


def build_loss(settings: MethodSettings, run: Run) -> PairLoss:
    """Builds the loss of validated settings."""
    if run.embed_dim < 1:
        raise UserError(f"embed_dim {run.embed_dim}: must be at least 1")
    return _BUILDERS[type(settings)](settings, run)


def _openclip(_: MethodSettings, run: Run) -> PairLoss:
    return InfoNCELoss(run.embed_dim)


def _rgcl_batch(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, GlobalContrastiveSettings)
    return _global_contrastive(settings, run, MinibatchNormalizer(settings.epsilon))


def _neuclip(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, NeuCLIPSettings)
    network = NetworkSettings(
        **settings.model_dump(include=set(NetworkSettings.__dataclass_fields__))
    )
    normalizer = PrototypeNormalizer(
        run.embed_dim, network, _gamma(settings, run), settings.epsilon
    )
    return _global_contrastive(settings, run, normalizer)


def _global_contrastive(
    settings: GlobalContrastiveSettings, run: Run, normalizer: nn.Module
) -> PairLoss:
    return GlobalContrastiveLoss(
        run.embed_dim,
        normalizer,  # pyright: ignore[reportArgumentType]  a module that keeps the protocol
        epsilon=settings.epsilon,
        rho=settings.rho,
        temperature_gradient=settings.temperature_gradient,
    )


def _gamma(settings: MixingSettings, run: Run) -> Gamma:
    """The schedule in steps.

    Raises:
        UserError: the schedule's lengths or its final value are not known.
    """
    name = str(settings.model_dump()["name"])
    if run.steps_per_epoch is None:
        raise UserError(f"method {name!r} changes gamma once an epoch: pass steps_per_epoch=...")
    if settings.gamma is None:
        raise UserError(
            f"method {name!r}: pass gamma=... (for 24 epochs, the published rule gives 0.42)"
        )
    if settings.gamma_schedule == "cosine" and settings.gamma_decay_epochs is None:
        raise UserError(
            f"method {name!r}: pass gamma_decay_epochs=... (usually all epochs), or "
            "gamma_schedule='constant'"
        )
    return Gamma(
        final=settings.gamma,
        schedule=settings.gamma_schedule,
        decay_epochs=settings.gamma_decay_epochs or 1.0,
        steps_per_epoch=run.steps_per_epoch,
    )


_BUILDERS: dict[type[MethodSettings], Callable[[MethodSettings, Run], PairLoss]] = {
    METHODS["openclip"].settings: _openclip,
    METHODS["rgcl_batch"].settings: _rgcl_batch,
    METHODS["neuclip"].settings: _neuclip,
}
