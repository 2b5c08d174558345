"""`scent`: a moving average whose rate is each anchor's own."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from neuclip.catalogue.building import moving_average, robust_objective
from neuclip.catalogue.cost import softmax_loss, table
from neuclip.catalogue.fastclip import DOUBLED, DRRHO
from neuclip.catalogue.fields import setting
from neuclip.catalogue.formulas import AVERAGE_STATE, ROBUST
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import (
    RHO_TEXT,
    GlobalContrastiveSettings,
    LearnedThresholdSettings,
    first_visits_only,
)
from neuclip.catalogue.published_trainers import SCENT
from neuclip.method.choices import BATCH_OPTIONS

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss


class ScentSettings(LearnedThresholdSettings, GlobalContrastiveSettings):
    """Moving average whose rate is each anchor's own, on RGCL-g."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "gamma": "rate_offset", "gamma_schedule": "", "gamma_decay_epochs": "",
    }  # fmt: skip

    name: Literal["scent"] = "scent"
    rho: float | Literal["auto"] = setting(11.0, RHO_TEXT, ge=0)
    epsilon: float = setting(
        1e-6, "stabiliser inside log(epsilon + g)", flag="--fastclip-eps", ge=0, le=1
    )
    rate_offset: float = setting(
        10.0, "c in the anchor's rate 1 / (1 + exp(-alpha_i - c)); published as --gamma"
    )
    first_rate_offset: float | None = setting(
        None,
        "c in the first epoch, 1 in the published code; used for samples that this epoch meets "
        "again; none: rate_offset",
    )

    def batch_only(self, epochs: float) -> str | None:
        """The average needs a second visit."""
        return first_visits_only(self.method, epochs)


def _build(settings: ScentSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss
    from neuclip.method.normalizers.moving_average import AnchorRate

    rate = AnchorRate(settings.rate_offset, settings.rate_offset)
    if settings.first_rate_offset is not None:
        first = settings.first_rate_offset
        rate = AnchorRate(settings.rate_offset, first, run.epoch_length)
    normalizer = moving_average(settings, run, rate)
    return GlobalContrastiveLoss(run.embed_dim, normalizer, robust_objective(settings))


METHODS = (
    MethodInfo(
        settings=ScentSettings,
        build=_build,
        takes=BATCH_OPTIONS,
        summary="moving average with a rate per anchor, from its own value",
        normalizer="a moving average per sample, a gamma of its own for each anchor",
        state=AVERAGE_STATE,
        formula=ROBUST
        + """\
  estimate : alpha_i = log( (1 - gamma_i) exp(alpha_i) + gamma_i (eps + g^_i) ),
             gamma_i = 1 / (1 + exp(-alpha_i - c)), c = rate_offset (first_rate_offset in the
             first epoch); log(eps + g^_i) at the first visit""",
        paper="SCENT: stochastic proximal mirror descent on the dual (arXiv 2602.02877)",
        needs_sample_ids=True,
        spelling={
            "fastclip": True,
            "multiply_tau": True,
            "temperature_scheme": "global_learnable",
            "nu_update": "scent",
        },
        trainer=SCENT,
        published={**DOUBLED, **DRRHO, "first_rate_offset": 1.0},
        aliases={"gamma": "rate_offset"},
        without_effect={
            "gamma_schedule": "the rate's offset c is constant in scent",
            "gamma_decay_epochs": "the rate's offset c is constant in scent",
        },
        cost=lambda setup: softmax_loss(setup) + table(setup, 2),
    ),
)
