"""The settings of every method: one frozen model each. Imports no torch.

A default, a range or a published flag name stands here and nowhere else;
`neuclip.catalogue.registry` lists the methods these settings belong to.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from neuclip.method.choices import (
    Amortization,
    GammaSchedule,
    PredictionGradient,
    PrototypeOptimizer,
    TemperatureGradient,
)

Refresh = Literal["restart", "fifo", "rolling"]


def setting(
    default: Any,
    description: str,
    *,
    unit: str = "",
    flag: str = "",
    **bounds: Any,
) -> Any:
    """A settings field: default, description, unit, published flag, and range."""
    return Field(
        default, description=description, json_schema_extra={"unit": unit, "flag": flag}, **bounds
    )


class MethodSettings(BaseModel):
    """Settings that every method has."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    temperature: float = setting(0.07, "temperature at the start of training", gt=0, le=1)


class OpenCLIPSettings(MethodSettings):
    """Mini-batch InfoNCE, as open_clip's ClipLoss."""

    name: Literal["openclip"] = "openclip"


class SigLIPSettings(MethodSettings):
    """Pairwise sigmoid loss, as open_clip's SigLipLoss."""

    name: Literal["siglip"] = "siglip"
    temperature: float = setting(0.1, "temperature at the start of training", gt=0, le=1)
    logit_bias: float = setting(-10.0, "learnable bias of the logits at the start of training")


class StabilisedSettings(MethodSettings):
    """What every method with log(epsilon + g) has."""

    epsilon: float = setting(
        1e-14, "stabiliser inside log(epsilon + g)", flag="--fastclip-eps", ge=0, le=1
    )


class GlobalTemperatureSettings(MethodSettings):
    """A learnable temperature for all pairs inside the robust global contrastive objective."""

    temperature_gradient: TemperatureGradient = setting(
        "exact", "exact, or counting one term twice as the published FastCLIP code does"
    )


class GlobalContrastiveSettings(GlobalTemperatureSettings, StabilisedSettings):
    """The robust global contrastive objective with one learnable temperature (RGCL-g)."""

    rho: float = setting(6.5, "temperature regulariser: rho * tau is added to the loss", ge=0)


class RGCLBatchSettings(GlobalContrastiveSettings):
    """Global contrastive objective, normalizer from the current batch."""

    name: Literal["rgcl_batch"] = "rgcl_batch"


class MixingSettings(MethodSettings):
    """Mixing of a remembered or predicted normalizer with the fresh batch estimate."""

    gamma: float | None = setting(
        None,
        "final weight of the batch estimate; none: min(1, 4.177 * epochs^-0.7265)",
        ge=0,
        le=1,
    )
    gamma_schedule: GammaSchedule = setting(
        "cosine", "how gamma goes from 1 in the first epoch to its final value"
    )
    gamma_decay_epochs: float | None = setting(
        None, "epochs until gamma reaches its final value; none: the whole run", unit="epochs", gt=0
    )


class IndividualTemperatureSettings(StabilisedSettings):
    """One learnable temperature for every image and every text, with an optimiser of its own."""

    rho: float = setting(7.0, "temperature regulariser of every pair", ge=0)
    temperature_lr: float = setting(0.0133, "learning rate of the individual temperatures", gt=0)
    temperature_min: float = setting(0.01, "lower bound of the individual temperatures", gt=0)
    temperature_max: float = setting(1.0, "upper bound of the individual temperatures", gt=0)


class SogCLRSettings(StabilisedSettings):
    """Moving average with a constant rate, constant temperature."""

    name: Literal["sogclr"] = "sogclr"
    temperature: float = setting(0.01, "temperature, constant", gt=0, le=1)
    gamma: float = setting(
        0.9, "weight of the batch estimate after a pair's first visit", gt=0, le=1
    )


class ISogCLRSettings(IndividualTemperatureSettings):
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


class FastCLIPv0Settings(MixingSettings, GlobalTemperatureSettings, StabilisedSettings):
    """Moving average, learnable temperature, objective without the factor tau."""

    name: Literal["fastclip_v0"] = "fastclip_v0"


class FastCLIPv1Settings(MixingSettings, StabilisedSettings):
    """Moving average, constant temperature."""

    name: Literal["fastclip_v1"] = "fastclip_v1"
    temperature: float = setting(0.07, "temperature, constant", gt=0, le=1)


class FastCLIPv2Settings(MixingSettings, IndividualTemperatureSettings):
    """Moving average, individual temperatures."""

    name: Literal["fastclip_v2"] = "fastclip_v2"
    temperature: float = setting(0.03, "individual temperatures at the start", gt=0, le=1)
    temperature_gradient: TemperatureGradient = setting(
        "exact", "exact: Adam; fastclip: Adam without its square root, as the published code steps"
    )


class FastCLIPv3Settings(MixingSettings, GlobalContrastiveSettings):
    """Moving average on RGCL-g."""

    name: Literal["fastclip_v3"] = "fastclip_v3"


class ScentSettings(GlobalContrastiveSettings):
    """Moving average whose rate is each anchor's own, on RGCL-g."""

    name: Literal["scent"] = "scent"
    rho: float = setting(11.0, "temperature regulariser: rho * tau is added to the loss", ge=0)
    epsilon: float = setting(
        1e-6, "stabiliser inside log(epsilon + g)", flag="--fastclip-eps", ge=0, le=1
    )
    gamma: float = setting(10.0, "c in the anchor's rate 1 / (1 + exp(-u_i - c))")
    gamma_schedule: Literal["constant"] = setting("constant", "c does not change")
    gamma_decay_epochs: float | None = setting(
        None, "accepted as published; c does not change", unit="epochs", gt=0
    )


class AmorLIPSettings(MethodSettings):
    """Amortised networks that predict the partition functions."""

    name: Literal["amorlip"] = "amorlip"
    rho: float = setting(8.5, "temperature regulariser: rho * tau is added to the loss")
    late_rho: float = setting(-8.5, "rho from late_rho_epoch on")
    late_rho_epoch: int = setting(11, "first epoch with late_rho", unit="epochs", ge=0)
    positive_weight: float = setting(
        1e-3, "weight of the pair itself in the normalizer", flag="--pos-coef", gt=0, le=1
    )
    amortization: Amortization = setting("log_l2", "what the networks minimise")
    divergence_weight: float = setting(
        0.1, "weight of log_l2 beside a divergence", flag="--div-reg-coef", ge=0
    )
    hidden_factor: float = setting(
        1.0, "hidden width over the embedding's", flag="--h-dim-factor", gt=0
    )
    inner_steps: int = setting(
        3,
        "Adam steps of the networks per training step",
        unit="steps",
        flag="--lambda-update-frequency",
        ge=0,
    )
    lambda_lr: float = setting(1e-3, "learning rate of the networks", gt=0)
    lambda_clip_norm: float = setting(1.0, "largest norm of the networks' gradient", gt=0)
    fit_previous: bool = setting(
        True,
        "fit to, and train with, the batch's normalizer mixed with the networks of the epoch "
        "before; off: train with the EMA networks",
        flag="--fit-w-prev",
    )
    previous_weight: float = setting(
        0.8,
        "final share of the networks of the epoch before (off: final EMA rate)",
        flag="--z-beta-max",
        ge=0,
        le=1,
    )
    previous_epochs: float = setting(
        16.0,
        "epochs until the share is reached, along half a cosine",
        unit="epochs",
        flag="--beta-decay-epochs",
        gt=0,
    )
    ema_rate: float = setting(
        0.92, "share that the EMA networks keep, with fit_previous", flag="--model-ema-beta", ge=0
    )
    ema_steps: int = setting(
        2,
        "training steps between EMA updates",
        unit="steps",
        flag="--update-ema-mlps-every-n-steps",
        ge=1,
    )
    restart_epochs: int = setting(
        1,
        "epochs between fresh networks; 0: never",
        unit="epochs",
        flag="--reinit-lambda-every-n-epochs",
        ge=0,
    )


class NeuCLIPSettings(MixingSettings, GlobalContrastiveSettings):
    """Prototype network that predicts the log-normalizer.

    The defaults are what the study found best (docs/study.md), not the published form: for that
    there is the recipe `neuclip-paper`.
    """

    name: Literal["neuclip"] = "neuclip"
    gamma: float | None = setting(
        0.4,
        "final weight of the batch estimate; none: min(1, 4.177 * epochs^-0.7265)",
        ge=0,
        le=1,
    )
    num_prototypes: int | None = setting(
        None,
        "prototypes of each side, over all processes; none: 128 global batches (32 unless refresh "
        "is fifo), at most 16,384 (4,096 in a loop of your own that does not tell its batch)",
        flag="--npn-num-protos",
        ge=1,
    )
    inner_steps: int = setting(
        0,
        "prototype steps per training step (T_u); 0: they stay the embeddings they were taken from",
        unit="steps",
        flag="--npn-repetition",
        ge=0,
    )
    restart_steps: int = setting(
        500,
        "training steps between restarts of the prototypes from recent embeddings (T_r)",
        unit="steps",
        flag="--npn-restart-iter",
        ge=1,
    )
    prototype_lr: float = setting(1.0, "learning rate of the prototypes", flag="--npn-lr", gt=0)
    prototype_optimizer: PrototypeOptimizer = setting(
        "adagrad_norm", "adagrad_norm keeps one scalar accumulator for each matrix of prototypes"
    )
    refresh: Refresh = setting(
        "fifo",
        "restart: all prototypes every restart_steps; fifo: the newest embeddings replace the "
        "oldest at every step; rolling: a share of 1/restart_steps is replaced at every step",
    )
    gradient: PredictionGradient = setting(
        "full",
        "detached: the prediction is a constant for the towers; full: the objective is "
        "differentiated through the prediction; union: prototypes act as extra negatives",
    )
    gradient_prototypes: int | None = setting(
        None,
        "only so many prototypes, the newest, carry the gradient of `full` or `union`, while all "
        "of them give the value; needs refresh fifo; none: those of 32 global batches "
        "(all in a loop of your own that does not tell its batch)",
        ge=1,
    )
    log_weights: bool = setting(False, "learn one log-weight per prototype")
