"""The FastCLIP family: `fastclip_v0` to `fastclip_v3`, and `rgcl_batch`, their common baseline.

A moving average per sample estimates the normalizers, with gamma by a schedule; `rgcl_batch` takes
the batch estimate alone (gamma = 1).
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from neuclip.catalogue.building import (
    gamma_schedule,
    moving_average,
    robust_objective,
    temperature_rule,
)
from neuclip.catalogue.cost import softmax_loss, table
from neuclip.catalogue.fields import setting
from neuclip.catalogue.formulas import AVERAGE, AVERAGE_STATE, ROBUST, WITHOUT_TAU
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import (
    GlobalContrastiveSettings,
    GlobalTemperatureSettings,
    IndividualTemperatureSettings,
    LearnedThresholdSettings,
    MixingSettings,
    StabilisedSettings,
)
from neuclip.catalogue.published_trainers import FASTCLIP
from neuclip.method.choices import BATCH_OPTIONS, TemperatureGradient

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss

PAPER = (
    "Wei et al., FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with "
    "Limited Resources (arXiv 2407.01445)"
)
DOUBLED: dict[str, object] = {"temperature_gradient": "fastclip"}
"""What the published code computes: its rho and lr_tau were tuned with this gradient."""
DRRHO: dict[str, object] = {"objective_scale": "drrho"}
"""What DRRho-CLIP's code computes. Its lines have `--nu_update`, a flag of SCENT's patch."""


class RGCLBatchSettings(LearnedThresholdSettings, GlobalContrastiveSettings):
    """Global contrastive objective, normalizer from the current batch."""

    name: Literal["rgcl_batch"] = "rgcl_batch"


class FastCLIPv0Settings(
    LearnedThresholdSettings, MixingSettings, GlobalTemperatureSettings, StabilisedSettings
):
    """Moving average, learnable temperature, objective without the factor tau."""

    name: Literal["fastclip_v0"] = "fastclip_v0"


class FastCLIPv1Settings(LearnedThresholdSettings, MixingSettings, StabilisedSettings):
    """Moving average, constant temperature."""

    name: Literal["fastclip_v1"] = "fastclip_v1"
    temperature: float = setting(0.07, "temperature, constant", gt=0, le=1)


class FastCLIPv2Settings(LearnedThresholdSettings, MixingSettings, IndividualTemperatureSettings):
    """Moving average, individual temperatures."""

    name: Literal["fastclip_v2"] = "fastclip_v2"
    temperature: float = setting(0.03, "individual temperatures at the start", gt=0, le=1)
    temperature_gradient: TemperatureGradient = setting(
        "exact",
        "how the temperatures are stepped: exact: Adam, its moments started at the first gradient; "
        "fastclip: Adam as the published code corrects its moments, by the epoch. Both take the "
        "betas and eps of the model's optimiser",
    )


class FastCLIPv3Settings(LearnedThresholdSettings, MixingSettings, GlobalContrastiveSettings):
    """Moving average on RGCL-g."""

    name: Literal["fastclip_v3"] = "fastclip_v3"


def _rgcl_batch(settings: RGCLBatchSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss
    from neuclip.method.normalizers.minibatch import MinibatchNormalizer

    return GlobalContrastiveLoss(
        run.embed_dim, MinibatchNormalizer(settings.epsilon), robust_objective(settings)
    )


def _v0(settings: FastCLIPv0Settings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss, Objective

    objective = Objective(
        epsilon=settings.epsilon,
        temperature_gradient=settings.temperature_gradient,
        times_temperature=False,
    )
    normalizer = moving_average(settings, run, gamma_schedule(settings, run))
    return GlobalContrastiveLoss(run.embed_dim, normalizer, objective)


def _v1(settings: FastCLIPv1Settings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss, Objective

    objective = Objective(
        epsilon=settings.epsilon, times_temperature=False, learns_temperature=False
    )
    normalizer = moving_average(settings, run, gamma_schedule(settings, run))
    return GlobalContrastiveLoss(run.embed_dim, normalizer, objective)


def _v2(settings: FastCLIPv2Settings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.individual import IndividualContrastiveLoss
    from neuclip.method.temperature import IndividualTemperature

    gamma = gamma_schedule(settings, run)
    published = settings.temperature_gradient == "fastclip"
    rule = replace(
        temperature_rule(settings, "fastclip" if published else "adam", run),
        clip=5.0,
        steps_per_epoch=gamma.steps_per_epoch,
    )
    return IndividualContrastiveLoss(
        run.embed_dim,
        moving_average(settings, run, gamma),
        IndividualTemperature(run.num_samples, rule),
        epsilon=settings.epsilon,
        times_temperature=False,
    )


def _v3(settings: FastCLIPv3Settings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss

    normalizer = moving_average(settings, run, gamma_schedule(settings, run))
    return GlobalContrastiveLoss(run.embed_dim, normalizer, robust_objective(settings))


_BY_SCHEDULE = "a moving average per sample, gamma by schedule"

METHODS = (
    MethodInfo(
        settings=RGCLBatchSettings,
        build=_rgcl_batch,
        takes=BATCH_OPTIONS,
        summary="robust global contrastive objective, normalizer from the current batch",
        normalizer="the current batch, positive excluded (gamma = 1)",
        state="none",
        formula=ROBUST
        + """\
  estimate : alpha_i = log(eps + g^_i), g^_i over the current batch; the gradient of
             tau * [ exp(-alpha_i) (eps + g^_i) + alpha_i - 1 ], alpha_i held constant""",
        paper=PAPER + ", objective RGCL-g",
        cost=softmax_loss,
    ),
    MethodInfo(
        settings=FastCLIPv0Settings,
        build=_v0,
        takes=BATCH_OPTIONS,
        summary="moving average, learnable temperature, objective without the factor tau",
        normalizer=_BY_SCHEDULE,
        state=AVERAGE_STATE,
        formula=WITHOUT_TAU + AVERAGE,
        paper=PAPER,
        needs_sample_ids=True,
        spelling={"fastclip": True, "temperature_scheme": "global_learnable"},
        trainer=FASTCLIP,
        published=DOUBLED,
        cost=lambda setup: softmax_loss(setup) + table(setup, 2),
    ),
    MethodInfo(
        settings=FastCLIPv1Settings,
        build=_v1,
        takes=BATCH_OPTIONS,
        summary="moving average, constant temperature",
        normalizer=_BY_SCHEDULE,
        state=AVERAGE_STATE,
        formula=WITHOUT_TAU + AVERAGE,
        paper=PAPER,
        needs_sample_ids=True,
        spelling={"fastclip": True, "temperature_scheme": "global_constant"},
        trainer=FASTCLIP,
        cost=lambda setup: softmax_loss(setup) + table(setup, 2),
    ),
    MethodInfo(
        settings=FastCLIPv2Settings,
        build=_v2,
        takes=BATCH_OPTIONS,
        summary="moving average, one temperature per image and per text",
        normalizer=_BY_SCHEDULE,
        state="8 numbers per sample: 32 bytes",
        formula=WITHOUT_TAU
        + AVERAGE
        + """
  tau_i    : an Adam step on the gradient of tau_i (log(eps + g_i) + rho) at every visit, with the
             betas and eps of the model's optimiser""",
        paper=PAPER,
        needs_sample_ids=True,
        spelling={"fastclip": True, "temperature_scheme": "individual_learnable"},
        trainer=FASTCLIP,
        published=DOUBLED,
        cost=lambda setup: softmax_loss(setup, sent=3) + table(setup, 2) + table(setup, 6),
    ),
    MethodInfo(
        settings=FastCLIPv3Settings,
        build=_v3,
        takes=BATCH_OPTIONS,
        summary="moving average on the robust global contrastive objective",
        normalizer=_BY_SCHEDULE,
        state=AVERAGE_STATE,
        formula=ROBUST + AVERAGE,
        paper=PAPER,
        needs_sample_ids=True,
        spelling={
            "fastclip": True,
            "multiply_tau": True,
            "temperature_scheme": "global_learnable",
        },
        trainer=FASTCLIP,
        published=DOUBLED,
        published_with={"nu_update": DRRHO},
        cost=lambda setup: softmax_loss(setup) + table(setup, 2),
    ),
)
