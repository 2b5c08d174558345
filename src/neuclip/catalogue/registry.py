"""The catalogue of training methods: their names, formulas and papers. Imports no torch.

A method is a *name*; its settings are one frozen model per method
(`neuclip.catalogue.method_settings`). The command
line, the configuration files, `neuclip methods` and `neuclip.create_loss` all read this table, so a
default or a range exists in exactly one place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from neuclip.catalogue.method_settings import (
    AmorLIPSettings,
    FastCLIPv0Settings,
    FastCLIPv1Settings,
    FastCLIPv2Settings,
    FastCLIPv3Settings,
    GlobalContrastiveSettings,
    ISogCLRSettings,
    MethodSettings,
    MixingSettings,
    NeuCLIPSettings,
    OpenCLIPSettings,
    RGCLBatchSettings,
    ScentSettings,
    SigLIPSettings,
    SogCLRSettings,
)
from neuclip.errors import UserError, nearest

__all__ = [
    "CATALOGUE",
    "METHODS",
    "AnyMethodSettings",
    "GlobalContrastiveSettings",
    "MethodInfo",
    "MethodSettings",
    "MixingSettings",
    "NeuCLIPSettings",
    "gamma_floor",
    "method_info",
    "method_settings",
    "nearest",
]


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


_INNER = """\
  g_i      = mean over j != i of exp((s_ij - s_ii) / tau)       all other samples
"""
_ROBUST = (
    _INNER
    + """\
  loss     = tau/2 * mean_i [ log(eps + g1_i) + log(eps + g2_i) ] + rho * tau
"""
)
_WITHOUT_TAU = (
    _INNER
    + """\
  loss     = 1/2 * mean_i [ log(eps + g1_i) + log(eps + g2_i) ]
"""
)
_AVERAGE = """\
  estimate : u_i = (1 - gamma_t) u_i + gamma_t g^_i, one per image and per text; u_i = g^_i at the
             first visit; the gradient of exp(-alpha_i) (eps + g^_i), alpha_i = log(eps + u_i)"""
_FASTCLIP = (
    "Wei et al., FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with "
    "Limited Resources (arXiv 2407.01445)"
)
_AVERAGE_STATE = "2 numbers per sample: 8 bytes"

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
        settings=SigLIPSettings,
        summary="pairwise sigmoid loss with a learnable bias (open_clip's SigLipLoss)",
        normalizer="none",
        state="none",
        formula="""\
  loss     = mean_i sum_j log(1 + exp(-z_ij (s_ij/tau + bias))),  z_ii = 1, z_ij = -1 otherwise""",
        paper="Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023 "
        "(arXiv 2303.15343)",
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
        paper=_FASTCLIP + ", objective RGCL-g",
    ),
    MethodInfo(
        settings=SogCLRSettings,
        summary="moving average with a constant rate, constant temperature",
        normalizer="a moving average per sample, constant gamma",
        state=_AVERAGE_STATE,
        formula=_INNER
        + """\
  loss     = tau/2 * mean_i [ log(eps + g1_i) + log(eps + g2_i) ]
"""
        + _AVERAGE,
        paper="Yuan et al., Provable Stochastic Optimization for Global Contrastive Learning: "
        "Small Batch Does Not Harm Performance, ICML 2022 (arXiv 2202.12387); LibAUC",
        needs_sample_ids=True,
    ),
    MethodInfo(
        settings=ISogCLRSettings,
        summary="moving average with a constant rate, one temperature per image and per text",
        normalizer="a moving average per sample, constant gamma",
        state="6 numbers per sample: 24 bytes",
        formula=_INNER
        + """\
  loss     = 1/2 * mean_i [ tau1_i (log(eps + g1_i) + rho) + tau2_i (log(eps + g2_i) + rho) ]
"""
        + _AVERAGE
        + """
  tau_i    : a momentum step on its own gradient at every visit, within bounds""",
        paper="Qiu et al., Not All Semantics are Created Equal: Contrastive Self-supervised "
        "Learning with Automatic Temperature Individualization, ICML 2023 (arXiv 2305.11965); "
        "LibAUC",
        needs_sample_ids=True,
    ),
    MethodInfo(
        settings=FastCLIPv0Settings,
        summary="moving average, learnable temperature, objective without the factor tau",
        normalizer="a moving average per sample, gamma by schedule",
        state=_AVERAGE_STATE,
        formula=_WITHOUT_TAU + _AVERAGE,
        paper=_FASTCLIP,
        needs_sample_ids=True,
        counts_epochs=True,
    ),
    MethodInfo(
        settings=FastCLIPv1Settings,
        summary="moving average, constant temperature",
        normalizer="a moving average per sample, gamma by schedule",
        state=_AVERAGE_STATE,
        formula=_WITHOUT_TAU + _AVERAGE,
        paper=_FASTCLIP,
        needs_sample_ids=True,
        counts_epochs=True,
    ),
    MethodInfo(
        settings=FastCLIPv2Settings,
        summary="moving average, one temperature per image and per text",
        normalizer="a moving average per sample, gamma by schedule",
        state="8 numbers per sample: 32 bytes",
        formula=_WITHOUT_TAU
        + _AVERAGE
        + """
  tau_i    : an Adam step on the gradient of tau_i (log(eps + g_i) + rho) at every visit""",
        paper=_FASTCLIP,
        needs_sample_ids=True,
        counts_epochs=True,
    ),
    MethodInfo(
        settings=FastCLIPv3Settings,
        summary="moving average on the robust global contrastive objective",
        normalizer="a moving average per sample, gamma by schedule",
        state=_AVERAGE_STATE,
        formula=_ROBUST + _AVERAGE,
        paper=_FASTCLIP,
        needs_sample_ids=True,
        counts_epochs=True,
    ),
    MethodInfo(
        settings=ScentSettings,
        summary="moving average with a rate per anchor, from its own value",
        normalizer="a moving average per sample, a gamma of its own for each anchor",
        state=_AVERAGE_STATE,
        formula=_ROBUST
        + """\
  estimate : alpha_i = log( (1 - gamma_i) exp(alpha_i) + gamma_i (eps + g^_i) ),
             gamma_i = 1 / (1 + exp(-alpha_i - c)); log(eps + g^_i) at the first visit""",
        paper="SCENT: stochastic proximal mirror descent on the dual (arXiv 2602.02877)",
        needs_sample_ids=True,
    ),
    MethodInfo(
        settings=AmorLIPSettings,
        summary="partition functions amortised by small networks",
        normalizer="an MLP per side with an EMA copy, mixed with the batch",
        state="8 * (2 d^2 + ...) numbers: the networks, their Adam state and two copies",
        formula="""\
  Z_i      = c exp(s_ii / tau) + sum over j != i of exp(s_ij / tau)        over the batch
  fit      : log lambda(e_i) to log z_i = log( beta lambda_before(e_i) + (1 - beta) Z_i )
  loss     = tau~ * mean_i [ -2 s_ii/tau + Z1_i / z1_i + Z2_i / z2_i ] + rho tau
             tau~, z held constant; without fit_previous z is the EMA network's lambda""",
        paper="AmorLIP: Efficient Language-Image Pretraining via Amortization (arXiv 2505.18983)",
        counts_epochs=True,
    ),
    MethodInfo(
        settings=NeuCLIPSettings,
        summary="log-normalizers predicted by a network of prototypes",
        normalizer="a network of m prototypes per side, mixed with the batch by gamma",
        state="2 * m * d numbers in all, whatever the data size",
        formula=_ROBUST
        + """\
  estimate : log(eps + g) = min over alpha of exp(-alpha) (eps + g) + alpha - 1
             alpha1_i = log( eps + 1/m sum_k exp((cos(e1_i, W1_k) - s_ii) / tau) )   texts W1
             alpha2_i = log( eps + 1/m sum_k exp((cos(e2_i, W2_k) - s_ii) / tau) )   images W2
             normalizer_i = (1 - gamma_t) exp(alpha_i) + gamma_t (eps + g^_i)
             W: the newest m embeddings (an anchor's own pair has no part in its sum), and the
             loss is differentiated through alpha (default);
             as published: T_u steps per batch on the same objective, restarted every T_r steps,
             alpha a constant for the towers""",
        paper="Wei, Lin, Yang, NeuCLIP: Efficient Large-Scale CLIP Training with Neural Normalizer "
        "Optimization, ICLR 2026 (arXiv 2511.08417)",
        counts_epochs=True,
    ),
)

METHODS: Mapping[str, MethodInfo] = {info.name: info for info in CATALOGUE}

AnyMethodSettings = Annotated[
    OpenCLIPSettings
    | SigLIPSettings
    | RGCLBatchSettings
    | SogCLRSettings
    | ISogCLRSettings
    | FastCLIPv0Settings
    | FastCLIPv1Settings
    | FastCLIPv2Settings
    | FastCLIPv3Settings
    | ScentSettings
    | AmorLIPSettings
    | NeuCLIPSettings,
    Field(discriminator="name"),
]


class _Adapter:
    """The union as a validator, built once (pydantic compiles it)."""

    settings: ClassVar[TypeAdapter[MethodSettings]] = TypeAdapter(AnyMethodSettings)


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
