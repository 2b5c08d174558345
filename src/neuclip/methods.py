"""The catalogue of training methods: their names, settings, formulas and papers. Imports no torch.

A method is a *name*; its settings are one frozen model per method, declared here once. The command
line, the configuration files, `neuclip methods` and `neuclip.create_loss` all read this table, so a
default or a range exists in exactly one place.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from neuclip.errors import UserError

Gradient = Literal["detached", "full", "union"]
Refresh = Literal["restart", "fifo", "rolling"]
PrototypeOptimizer = Literal["adagrad_norm", "adagrad", "adam", "sgd"]
GammaSchedule = Literal["cosine", "constant"]
TemperatureGradient = Literal["exact", "fastclip"]


def setting(
    default: Any, description: str, *, unit: str = "", flag: str = "", **bounds: Any
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


class GlobalContrastiveSettings(MethodSettings):
    """What every method on the robust global contrastive objective shares."""

    rho: float = setting(6.5, "temperature regulariser: rho * tau is added to the loss", ge=0)
    epsilon: float = setting(
        1e-14, "stabiliser inside log(epsilon + g)", flag="--fastclip-eps", ge=0, le=1
    )
    temperature_gradient: TemperatureGradient = setting(
        "exact", "exact, or counting one term twice as the published FastCLIP code does"
    )


class RGCLBatchSettings(GlobalContrastiveSettings):
    """Global contrastive objective, normalizer from the current batch."""

    name: Literal["rgcl_batch"] = "rgcl_batch"


class MixingSettings(GlobalContrastiveSettings):
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


class NeuCLIPSettings(MixingSettings):
    """Prototype network that predicts the log-normalizer."""

    name: Literal["neuclip"] = "neuclip"
    num_prototypes: int = setting(
        4096, "prototypes of each side, over all processes", flag="--npn-num-protos", ge=1
    )
    inner_steps: int = setting(
        10, "prototype steps per training step (T_u)", unit="steps", flag="--npn-repetition", ge=0
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
        "restart",
        "restart: all prototypes every restart_steps; fifo: the newest embeddings replace the "
        "oldest at every step; rolling: a share of 1/restart_steps is replaced at every step",
    )
    gradient: Gradient = setting(
        "detached",
        "detached: the prediction is a constant for the towers; full: the objective is "
        "differentiated through the prediction; union: prototypes act as extra negatives",
    )
    log_weights: bool = setting(False, "learn one log-weight per prototype")


@dataclass(frozen=True)
class MethodInfo:
    """One row of the catalogue."""

    settings: type[MethodSettings]
    summary: str
    normalizer: str
    state: str
    formula: str
    paper: str
    needs_sample_ids: bool = False
    counts_epochs: bool = False

    @property
    def name(self) -> str:
        """The name that selects the method."""
        return str(self.settings.model_fields["name"].default)


_ROBUST = """\
  g_i      = mean over j != i of exp((s_ij - s_ii) / tau)       all other samples
  loss     = tau/2 * mean_i [ log(eps + g1_i) + log(eps + g2_i) ] + rho * tau
"""

CATALOGUE: tuple[MethodInfo, ...] = (
    MethodInfo(
        settings=OpenCLIPSettings,
        summary="mini-batch InfoNCE with a learnable temperature (open_clip's ClipLoss)",
        normalizer="the current batch, positive included",
        state="none",
        formula="""\
  loss     = 1/2 * mean_i [ -s_ii/tau + log sum_j exp(s_ij/tau) ]  + the same for the texts
             (the family's member with the batch normalizer and eps = 1/(B-1), without tau)""",
        paper="Radford et al., Learning Transferable Visual Models From Natural Language "
        "Supervision, ICML 2021 (arXiv 2103.00020)",
    ),
    MethodInfo(
        settings=RGCLBatchSettings,
        summary="robust global contrastive objective, normalizer from the current batch",
        normalizer="the current batch, positive excluded (gamma = 1)",
        state="none",
        formula=_ROBUST
        + """\
  estimate : alpha_i = log(eps + g^_i), g^_i over the current batch; the gradient of
             tau * [ exp(-alpha_i) (eps + g^_i) + alpha_i - 1 ], alpha_i held constant""",
        paper="Wei et al., FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP "
        "Training with Limited Resources (arXiv 2407.01445), objective RGCL-g",
    ),
    MethodInfo(
        settings=NeuCLIPSettings,
        summary="log-normalizers predicted by a network of prototypes, trained in alternation",
        normalizer="a network of m prototypes per side, mixed with the batch by gamma",
        state="2 * m * d numbers in all, whatever the data size",
        formula=_ROBUST
        + """\
  estimate : log(eps + g) = min over alpha of exp(-alpha) (eps + g) + alpha - 1
             alpha1_i = log( eps + 1/m sum_k exp((cos(e1_i, W1_k) - s_ii) / tau) )   texts W1
             alpha2_i = log( eps + 1/m sum_k exp((cos(e2_i, W2_k) - s_ii) / tau) )   images W2
             normalizer_i = (1 - gamma_t) exp(alpha_i) + gamma_t (eps + g^_i)
             W: T_u steps per batch on the same objective; restarted every T_r steps""",
        paper="Wei, Lin, Yang, NeuCLIP: Efficient Large-Scale CLIP Training with Neural Normalizer "
        "Optimization, ICLR 2026 (arXiv 2511.08417)",
        counts_epochs=True,
    ),
)

METHODS: Mapping[str, MethodInfo] = {info.name: info for info in CATALOGUE}

AnyMethodSettings = Annotated[
    OpenCLIPSettings | RGCLBatchSettings | NeuCLIPSettings, Field(discriminator="name")
]


class _Adapter:
    """The union as a validator, built once (pydantic compiles it)."""

    settings: ClassVar[TypeAdapter[MethodSettings]] = TypeAdapter(AnyMethodSettings)


def nearest(word: str, known: list[str]) -> str:
    """The ending of an error message: the nearest known word, and all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(sorted(known))}"


def method_info(name: str) -> MethodInfo:
    """The catalogue's row of a method.

    Raises:
        UserError: no method has that name; the message lists the names.
    """
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; {nearest(name, list(METHODS))}")
    return METHODS[name]


def method_settings(name: str, values: Mapping[str, Any]) -> MethodSettings:
    """Validates the settings of a method.

    Args:
        name: a method of the catalogue.
        values: the settings that differ from the defaults.

    Raises:
        UserError: unknown method or setting (lists what exists), or a value out of range
            (says the range).
    """
    info = method_info(name)
    known = [key for key in info.settings.model_fields if key != "name"]
    for key in values:
        if key not in known:
            raise UserError(f"method {name!r} has no setting {key!r}; {nearest(key, known)}")
    try:
        return _Adapter.settings.validate_python({"name": name, **values})
    except ValidationError as error:
        problems = "; ".join(
            f"{problem['loc'][-1]}: {problem['msg']} (got {problem['input']!r})"
            for problem in error.errors()
        )
        raise UserError(f"method {name!r}: {problems}") from None


def gamma_floor(epochs: float) -> float:
    """The published rule for the final gamma: min(1, 4.177 * epochs^-0.7265) (24 epochs: 0.42)."""
    return min(1.0, round(4.177 * epochs**-0.7265, 4))
