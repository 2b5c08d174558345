"""Parts of losses that several families build. Imports torch only inside its functions."""

from typing import TYPE_CHECKING

from neuclip.catalogue.method_info import RunFacts
from neuclip.catalogue.method_settings import (
    GlobalContrastiveSettings,
    IndividualTemperatureSettings,
    LearnedThresholdSettings,
    MixingSettings,
    StabilisedSettings,
    ThresholdSettings,
)
from neuclip.errors import UserError, quantity

if TYPE_CHECKING:
    from neuclip.method.choices import TemperatureOptimizer
    from neuclip.method.losses.global_contrastive import Objective
    from neuclip.method.losses.pair_loss import PairLoss
    from neuclip.method.normalizers.moving_average import MovingAverageNormalizer, Rate
    from neuclip.method.schedule import Gamma, StepGamma
    from neuclip.method.temperature import TemperatureRule


def robust_objective(settings: GlobalContrastiveSettings) -> "Objective":
    """The objective RGCL-g: with the factor tau, and rho as its regulariser."""
    from neuclip.method.losses.global_contrastive import Objective

    return Objective(
        epsilon=settings.epsilon,
        rho=None if settings.rho == "auto" else settings.rho,
        temperature_gradient=settings.temperature_gradient,
        scale=settings.objective_scale,
    )


def moving_average(
    settings: StabilisedSettings, run: RunFacts, rate: "Rate"
) -> "MovingAverageNormalizer":
    """A moving average per sample, with the rate that the method gives it."""
    from neuclip.method.normalizers.moving_average import MovingAverageNormalizer

    return MovingAverageNormalizer(run.num_samples, rate, settings.epsilon)


def gamma_schedule(settings: MixingSettings, run: RunFacts) -> "Gamma":
    """Gamma as published: constant within an epoch."""
    from neuclip.method.schedule import Gamma

    final, decay_epochs = _final_and_length(settings, run)
    return Gamma(
        final=final,
        schedule=settings.gamma_schedule,
        decay_epochs=decay_epochs,
        steps_per_epoch=run.epoch_length,
    )


def step_gamma(settings: MixingSettings, run: RunFacts) -> "StepGamma":
    """Gamma that changes at every step."""
    from neuclip.method.schedule import StepGamma

    final, decay_epochs = _final_and_length(settings, run)
    end = max(1, round(decay_epochs * run.epoch_length))
    return StepGamma(final=final, schedule=settings.gamma_schedule, end=end)


def _final_and_length(settings: MixingSettings, run: RunFacts) -> tuple[float, float]:
    known = settings.for_length(run.epochs(settings.EPOCHS_UNLESS_KNOWN))
    assert known.gamma is not None
    assert known.gamma_decay_epochs is not None
    return known.gamma, known.gamma_decay_epochs


def add_thresholds(loss: "PairLoss", settings: ThresholdSettings, run: RunFacts) -> None:
    """Gives a loss the thresholds of its settings, if they have any.

    A loss with a queue of past embeddings takes them from it, any other learns them in a table.

    Raises:
        UserError: no step of the run would use them.
    """
    if not settings.glofnd_alpha:
        return
    from neuclip.method.normalizers.embedding_queue import EmbeddingQueue
    from neuclip.method.thresholds import LearnedThresholds, QueueThresholds, ThresholdRule

    epochs = None if run.total_steps is None else run.total_steps / run.epoch_length
    start = settings.start_step(epochs, run.epoch_length)
    if run.total_steps is not None and start >= run.total_steps:
        length = quantity(run.total_steps / run.epoch_length, "epoch")
        raise UserError(
            f"method {settings.method!r}: glofnd_start {settings.glofnd_start:g} leaves no step of "
            f"the run ({length}) with thresholds: choose less, or glofnd_alpha 0"
        )
    alpha = settings.glofnd_alpha
    if isinstance(settings, LearnedThresholdSettings):
        rule = ThresholdRule(settings.glofnd_lr, run.epoch_length)
        loss.thresholds = LearnedThresholds(run.num_samples, alpha, start, rule)
        loss.needs_sample_ids = True
        return
    queue = next(module for module in loss.modules() if isinstance(module, EmbeddingQueue))
    loss.thresholds = QueueThresholds(queue, alpha, start)


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
