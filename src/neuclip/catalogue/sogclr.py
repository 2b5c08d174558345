"""`sogclr` and `isogclr`: a moving average per sample with a constant rate."""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.building import moving_average, temperature_rule
from neuclip.catalogue.cost import softmax_loss, table
from neuclip.catalogue.fields import setting
from neuclip.catalogue.formulas import AVERAGE, AVERAGE_STATE, INNER
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import (
    IndividualTemperatureSettings,
    LearnedThresholdSettings,
    StabilisedSettings,
    first_visits_only,
)
from neuclip.method.choices import BATCH_OPTIONS

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


class SogCLRSettings(LearnedThresholdSettings, StabilisedSettings):
    """Moving average with a constant rate, constant temperature."""

    name: Literal["sogclr"] = "sogclr"
    temperature: float = setting(0.01, "temperature, constant", gt=0, le=1)
    gamma: float = setting(
        0.9, "weight of the batch estimate after a pair's first visit", gt=0, le=1
    )

    def batch_only(self, epochs: float) -> str | None:
        """The average needs a second visit."""
        return first_visits_only(self.method, epochs)


class ISogCLRSettings(LearnedThresholdSettings, IndividualTemperatureSettings):
    """Moving average with a constant rate, individual temperatures by momentum."""

    name: Literal["isogclr"] = "isogclr"
    temperature: float = setting(0.01, "individual temperatures at the start", gt=0, le=1)
    gamma: float = setting(
        0.9, "weight of the batch estimate after a pair's first visit", gt=0, le=1
    )
    rho: float = setting(6.0, "temperature regulariser of every pair", ge=0)
    temperature_lr: float = setting(0.01, "learning rate of the individual temperatures", gt=0)
    temperature_min: float = setting(0.005, "lower bound of the individual temperatures", gt=0)
    temperature_max: float = setting(0.05, "upper bound of the individual temperatures", gt=0)
    temperature_beta: float = setting(
        0.9, "weight of the newest gradient in the temperature's momentum", gt=0, le=1
    )

    def batch_only(self, epochs: float) -> str | None:
        """The average needs a second visit."""
        return first_visits_only(self.method, epochs)


def _sogclr(settings: SogCLRSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss, Objective

    return GlobalContrastiveLoss(
        run.embed_dim,
        moving_average(settings, run, settings.gamma),
        Objective(epsilon=settings.epsilon, learns_temperature=False),
    )


def _isogclr(settings: ISogCLRSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.individual import IndividualContrastiveLoss
    from neuclip.method.temperature import IndividualTemperature

    rule = replace(temperature_rule(settings, "momentum", run), beta=settings.temperature_beta)
    return IndividualContrastiveLoss(
        run.embed_dim,
        moving_average(settings, run, settings.gamma),
        IndividualTemperature(run.num_samples, rule),
        epsilon=settings.epsilon,
        times_temperature=True,
    )


METHODS = (
    MethodInfo(
        settings=SogCLRSettings,
        build=_sogclr,
        takes=BATCH_OPTIONS,
        summary="moving average with a constant rate, constant temperature",
        normalizer="a moving average per sample, constant gamma",
        state=AVERAGE_STATE,
        formula=INNER
        + """\
  loss     = tau/2 * mean_i [ log(eps + g1_i) + log(eps + g2_i) ]
"""
        + AVERAGE,
        paper="Yuan et al., Provable Stochastic Optimization for Global Contrastive Learning: "
        "Small Batch Does Not Harm Performance, ICML 2022 (arXiv 2202.12387); LibAUC",
        needs_sample_ids=True,
        cost=lambda setup: softmax_loss(setup) + table(setup, 2),
    ),
    MethodInfo(
        settings=ISogCLRSettings,
        build=_isogclr,
        takes=BATCH_OPTIONS,
        summary="moving average with a constant rate, one temperature per image and per text",
        normalizer="a moving average per sample, constant gamma",
        state="6 numbers per sample: 24 bytes",
        formula=INNER
        + """\
  loss     = 1/2 * mean_i [ tau1_i (log(eps + g1_i) + rho) + tau2_i (log(eps + g2_i) + rho) ]
"""
        + AVERAGE
        + """
  tau_i    : a momentum step on its own gradient at every visit, within bounds""",
        paper="Qiu et al., Not All Semantics are Created Equal: Contrastive Self-supervised "
        "Learning with Automatic Temperature Individualization, ICML 2023 (arXiv 2305.11965); "
        "LibAUC",
        needs_sample_ids=True,
        cost=lambda setup: softmax_loss(setup, sent=3) + table(setup, 2) + table(setup, 4),
    ),
)
