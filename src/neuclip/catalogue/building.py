"""Parts of losses that several families build. Imports torch only inside its functions."""

from typing import TYPE_CHECKING

from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.method_settings import (
    GlobalContrastiveSettings,
    IndividualTemperatureSettings,
    MethodSettings,
    MixingSettings,
    StabilisedSettings,
)
from neuclip.errors import UserError

if TYPE_CHECKING:
    from neuclip.method.choices import TemperatureOptimizer
    from neuclip.method.losses.global_contrastive import Objective
    from neuclip.method.normalizers.moving_average import MovingAverageNormalizer, Rate
    from neuclip.method.schedule import Gamma
    from neuclip.method.temperature import TemperatureRule


def robust_objective(settings: GlobalContrastiveSettings) -> "Objective":
    """The objective RGCL-g: with the factor tau, and rho as its regulariser."""
    from neuclip.method.losses.global_contrastive import Objective

    return Objective(
        epsilon=settings.epsilon,
        rho=settings.rho,
        temperature_gradient=settings.temperature_gradient,
        scale=settings.objective_scale,
    )


def moving_average(
    settings: StabilisedSettings, run: RunFacts, rate: "Rate"
) -> "MovingAverageNormalizer":
    """A moving average per sample, with the rate that the method gives it."""
    from neuclip.method.normalizers.moving_average import MovingAverageNormalizer

    return MovingAverageNormalizer(num_samples(settings, run), rate, settings.epsilon)


def gamma_schedule(settings: MixingSettings, run: RunFacts) -> "Gamma":
    """Gamma as a function of the step.

    Raises:
        UserError: the schedule's lengths or its final value are unknown.
    """
    from neuclip.method.schedule import Gamma

    per_epoch, name = steps_per_epoch(settings, run), settings.method
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
        steps_per_epoch=per_epoch,
    )


def temperature_rule(
    settings: IndividualTemperatureSettings, optimizer: "TemperatureOptimizer", run: RunFacts
) -> "TemperatureRule":
    """The optimiser of individual temperatures.

    Raises:
        UserError: the temperatures start outside their bounds.
    """
    from neuclip.method.temperature import TemperatureRule

    low, high = settings.temperature_min, settings.temperature_max
    if not low <= settings.temperature <= high:
        raise UserError(
            f"method {settings.method!r}: temperature {settings.temperature:g} must lie between "
            f"temperature_min {low:g} and temperature_max {high:g}"
        )
    return TemperatureRule(
        initial=settings.temperature,
        lr=settings.temperature_lr,
        low=low,
        high=high,
        rho=settings.rho,
        optimizer=optimizer,
        adam=run.adam,
    )


def num_samples(settings: MethodSettings, run: RunFacts) -> int:
    """The number of samples.

    Raises:
        UserError: it is unknown.
    """
    if run.num_samples is None:
        raise UserError(
            f"method {settings.method!r} keeps a state per sample: pass num_samples=..., one more "
            "than the largest sample id"
        )
    return run.num_samples


def steps_per_epoch(settings: MethodSettings, run: RunFacts) -> int:
    """Training steps in an epoch.

    Raises:
        UserError: the number is unknown.
    """
    if run.steps_per_epoch is None:
        raise UserError(
            f"method {settings.method!r} has a schedule in epochs: pass steps_per_epoch=..."
        )
    return run.steps_per_epoch
