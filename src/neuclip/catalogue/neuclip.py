"""`neuclip`, as published, and `neuclip_pool`, this project's own method and the default.

Both predict the log-normalizer with m prototypes a side and mix the prediction with the batch
estimate by gamma. NeuCLIP *trains* its prototypes and holds the prediction constant for the towers.
The pool takes the newest embeddings as prototypes, trains none, and differentiates the objective
through the prediction.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from neuclip.catalogue.building import gamma_schedule, robust_objective, step_gamma
from neuclip.catalogue.cost import pool, prototypes, softmax_loss
from neuclip.catalogue.fastclip import DOUBLED
from neuclip.catalogue.fields import setting
from neuclip.catalogue.formulas import ROBUST
from neuclip.catalogue.method_info import MethodInfo, RunFacts
from neuclip.catalogue.method_settings import (
    RHO_TEXT,
    GlobalContrastiveSettings,
    MethodSettings,
    MixingSettings,
    ThresholdSettings,
)
from neuclip.catalogue.neuclip_readings import STATEMENTS
from neuclip.errors import UserError
from neuclip.method.choices import (
    BATCH_OPTIONS,
    Mixing,
    NetworkRefresh,
    PredictionGradient,
    PrototypeOptimizer,
    RestartFill,
    RestartSource,
    TemperatureGradient,
)

if TYPE_CHECKING:
    from neuclip.method.losses.pair_loss import PairLoss
    from neuclip.method.normalizers.pool import PoolSettings

_GRADIENT = (
    "detached: the prediction is a constant for the towers; full: the objective is differentiated "
    "through the prediction; union: prototypes act as extra negatives"
)

POOL_BATCHES = 128
"""Global batches in the default pool: more embeddings predict better (docs/study.md)."""
FRESH_BATCHES = 32
"""Global batches up to whose age embeddings carry the gradient."""
MAX_POOL = 16_384
"""The largest default pool: from here on B x m logits per side cost time."""


def default_pool_size(global_batch_size: int) -> int:
    """Embeddings of each side in the pool where the settings give no size."""
    return min(POOL_BATCHES * global_batch_size, MAX_POOL)


class NeuCLIPSettings(MixingSettings, GlobalContrastiveSettings):
    """Prototypes that are trained to predict the log-normalizer; the defaults are the paper's."""

    name: Literal["neuclip"] = "neuclip"
    rho: float | Literal["auto"] = setting(11.0, RHO_TEXT, ge=0)
    epsilon: float = setting(
        1e-6, "stabiliser inside log(epsilon + g)", flag="--fastclip-eps", ge=0, le=1
    )
    temperature_gradient: TemperatureGradient = setting(
        "fastclip", "exact, or counting one term twice as the published FastCLIP code does"
    )
    num_prototypes: int = setting(
        4096, "prototypes of each side (m), over all ranks", flag="--npn-num-protos", ge=1
    )
    inner_steps: int = setting(
        10,
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
        "adagrad_norm",
        "adagrad_norm: AdaGrad with one scalar accumulator for each matrix of prototypes; adagrad: "
        "one for each coordinate",
        flag="--npn-optimizer",
    )
    refresh: NetworkRefresh = setting(
        "restart",
        "restart: all prototypes every restart_steps; rolling: a share of 1/restart_steps is "
        "replaced at every step",
    )
    restart_from: RestartSource = setting(
        "earlier",
        "earlier: prototypes restart from the batches before the current one; current: from the "
        "newest, the current one included",
    )
    restart_fill: RestartFill = setting(
        "pool",
        "where m exceeds the batch: pool: a restart takes several batches; batch: it takes one and "
        "replaces as many prototypes, the next ones in turn",
    )
    restart_optimizer: bool = setting(True, "a restart also resets the prototypes' optimiser")
    mixing: Mixing = setting(
        "gamma",
        "gamma: the prediction is mixed with the batch estimate by gamma; none: it stands alone",
    )
    gradient: PredictionGradient = setting("detached", _GRADIENT)
    log_weights: bool = setting(False, "learn one log-weight per prototype")

    @model_validator(mode="before")
    @classmethod
    def _refuse_the_pool(cls, values: Any) -> Any:
        """Refuses settings of the time when the pool was called `neuclip`.

        Files written then hold every setting of both methods; what the network never used is
        dropped, since that changes nothing.
        """
        if not isinstance(values, Mapping):
            return values
        if _is_pool(values):
            raise PydanticCustomError("renamed_method", "{new}", {"new": _renamed(values)})
        return {key: value for key, value in values.items() if key != "gradient_prototypes"}

    def gamma_text(self, global_batch_size: int) -> str | None:
        """Without mixing there is no gamma."""
        return None if self.mixing == "none" else super().gamma_text(global_batch_size)

    def batch_only(self, epochs: float) -> str | None:
        """Without mixing the batch estimate has no part in the normalizer."""
        return None if self.mixing == "none" else super().batch_only(epochs)

    def idle(self) -> dict[str, str]:
        """Settings without effect: of training where none is, of mixing and restarts likewise."""
        idle: dict[str, str] = {}
        if not self.inner_steps:
            reason = "--inner-steps 0, which trains no prototypes: add --inner-steps 10"
            trained = ("prototype_lr", "prototype_optimizer", "log_weights", "restart_optimizer")
            idle |= dict.fromkeys(trained, reason)
        if self.mixing == "none":
            reason = "--mixing none, which leaves out the batch estimate: add --mixing gamma"
            idle |= dict.fromkeys(("gamma", "gamma_schedule", "gamma_decay_epochs"), reason)
        if self.refresh == "rolling":
            idle["restart_fill"] = "--refresh rolling: add --refresh restart"
        return idle


def recorded_method(record: Mapping[str, Any]) -> str:
    """The method of a run's record; records of before 2026-11-28 call the pool `neuclip`.

    Args:
        record: the section `method` of the run's config.yaml.
    """
    name = str(record.get("name", "unknown"))
    return "neuclip_pool" if name == "neuclip" and _is_pool(record) else name


def _is_pool(values: Mapping[str, Any]) -> bool:
    return values.get("refresh") == "fifo" or values.get("gradient_prototypes") is not None


def _renamed(values: Mapping[str, Any]) -> str:
    new = ["name: neuclip_pool"]
    for old, name in (("num_prototypes", "pool_size"), ("gradient_prototypes", "gradient_size")):
        if values.get(old) is not None:
            new.append(f"{name}: {values[old]}")
    if values.get("inner_steps"):
        return (
            "refresh 'fifo' is the method neuclip_pool, whose prototypes are not trained; write "
            f"'{', '.join(new)}' for it, or refresh 'rolling' to train prototypes here"
        )
    left = "refresh, inner_steps, restart_steps, prototype_lr, prototype_optimizer, log_weights"
    return (
        "neuclip is the published method now; the pool of the newest embeddings (refresh fifo, "
        f"gradient_prototypes) is neuclip_pool: write '{', '.join(new)}' and leave out {left}"
    )


class NeuCLIPPoolSettings(ThresholdSettings, MixingSettings, GlobalContrastiveSettings):
    """The newest embeddings as prototypes; the defaults are what docs/study.md found best."""

    RENAMED: ClassVar[Mapping[str, str]] = {
        "num_prototypes": "pool_size",
        "gradient_prototypes": "gradient_size",
    }
    EPOCHS_UNLESS_KNOWN: ClassVar[float] = 2.0

    name: Literal["neuclip_pool"] = "neuclip_pool"
    gamma: float | None = setting(
        0.4,
        "final weight of the batch estimate; none: min(1, 4.177 * epochs^-0.7265)",
        ge=0,
        le=1,
    )
    pool_size: int | None = setting(
        None,
        "embeddings of each side in the pool, over all ranks; none: those of 128 global batches, "
        "at most 16,384",
        ge=1,
    )
    gradient: PredictionGradient = setting("full", _GRADIENT)
    gradient_size: int | None = setting(
        None,
        "the newest embeddings that carry the gradient of `full` or `union`, while the whole pool "
        "gives the value; none: those of 32 global batches",
        ge=1,
    )

    def gamma_text(self, global_batch_size: int) -> str | None:
        """The schedule changes at every step."""
        if self.gamma == 1:
            return None
        assert self.pool_size is not None
        fill = -(-self.pool_size // global_batch_size)
        way = f"{self.gamma:g}"
        if self.gamma_schedule == "final":
            return f"{way} from the first step"
        if self.gamma_schedule == "cosine":
            way = f"along half a cosine to {way} at the end of epoch {self.gamma_decay_epochs:g}"
        return (
            f"1 while the pool fills ({fill} steps, or a quarter of the way if that is less), "
            f"then {way}, changing at every step"
        )

    def batch_only(self, epochs: float) -> str | None:
        """Gamma changes by steps: only a final gamma of 1 leaves the pool unused."""
        if self.gamma != 1:
            return None
        return (
            "gamma stays 1: neuclip_pool uses the batch's own normalizers, as rgcl_batch does "
            "(--gamma 0.4 mixes in those of the pool)"
        )

    def idle(self) -> dict[str, str]:
        """The gradient's part of the pool, where the prediction has no gradient."""
        if self.gradient != "detached":
            return super().idle()
        reason = "--gradient detached: add --gradient full or --gradient union"
        return {**super().idle(), "gradient_size": reason}


def _neuclip(settings: NeuCLIPSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss
    from neuclip.method.normalizers.prototypes import NetworkSettings, PrototypeNormalizer
    from neuclip.parallel.collectives import Slice

    network = NetworkSettings(
        **settings.model_dump(include=set(NetworkSettings.__dataclass_fields__))
    )
    normalizer = PrototypeNormalizer(
        run.embed_dim,
        network,
        gamma_schedule(settings, run) if settings.mixing == "gamma" else None,
        settings.epsilon,
        shard=None if run.sharded else Slice(0, network.num_prototypes),
    )
    return GlobalContrastiveLoss(run.embed_dim, normalizer, robust_objective(settings))


def _pool(settings: NeuCLIPPoolSettings, run: RunFacts) -> "PairLoss":
    from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss
    from neuclip.method.normalizers.pool import PoolNormalizer

    normalizer = PoolNormalizer(
        run.embed_dim,
        _pool_of(settings),
        step_gamma(settings, run),
        settings.epsilon,
        for_batch=partial(_pool_for_batch, settings),
        sharded=run.sharded,
    )
    return GlobalContrastiveLoss(run.embed_dim, normalizer, robust_objective(settings))


def _pool_of(settings: NeuCLIPPoolSettings) -> "PoolSettings":
    from neuclip.method.normalizers.pool import PoolSettings

    return PoolSettings(settings.pool_size, settings.gradient, settings.gradient_size)


def _pool_for_batch(settings: NeuCLIPPoolSettings, global_batch_size: int) -> "PoolSettings":
    return _pool_of(_pool_sizes(settings, global_batch_size, None))


def _pool_sizes(
    settings: NeuCLIPPoolSettings, global_batch_size: int | None, before: MethodSettings | None
) -> NeuCLIPPoolSettings:
    """The sizes that follow from the batch, if known; a continued run keeps its own.

    Raises:
        UserError: the gradient's part of the pool is given where nothing uses it.
    """
    if isinstance(before, NeuCLIPPoolSettings):
        kept = ["pool_size", *(["gradient_size"] if settings.gradient == before.gradient else [])]
        update = {key: getattr(before, key) for key in kept if getattr(settings, key) is None}
        settings = settings.model_copy(update=update)
    size, newest = settings.pool_size, settings.gradient_size
    if newest is not None and settings.gradient == "detached":
        raise UserError(
            f"method 'neuclip_pool': gradient_size {newest} has no effect with gradient 'detached'"
            ": it needs gradient full or union, or gradient_size none"
        )
    if size is None and global_batch_size is not None:
        size = default_pool_size(global_batch_size)
    if newest is None and global_batch_size is not None and settings.gradient != "detached":
        newest = FRESH_BATCHES * global_batch_size
    return settings.model_copy(update={"pool_size": size, "gradient_size": newest})


_PREDICTION = """\
  estimate : log(eps + g) = min over alpha of exp(-alpha) (eps + g) + alpha - 1
             alpha1_i = log( eps + 1/m sum_k exp((cos(e1_i, W1_k) - s_ii) / tau) )   texts W1
             alpha2_i = log( eps + 1/m sum_k exp((cos(e2_i, W2_k) - s_ii) / tau) )   images W2
             normalizer_i = (1 - gamma_t) exp(alpha_i) + gamma_t (eps + g^_i)
"""

PAPER = (
    "Wei, Lin, Yang, NeuCLIP: Efficient Large-Scale CLIP Training with Neural Normalizer "
    "Optimization, ICLR 2026 (arXiv 2511.08417)"
)

METHODS = (
    MethodInfo(
        settings=NeuCLIPSettings,
        build=_neuclip,
        takes=BATCH_OPTIONS,
        summary="NeuCLIP as published: a trained network of prototypes predicts log-normalizers",
        normalizer="a trained network of m prototypes per side, mixed with the batch by gamma",
        state="4 * m * d numbers whatever the data size: prototypes and recent embeddings, two "
        "sides",
        formula=ROBUST
        + _PREDICTION
        + """\
             W: T_u steps per batch on the same objective, restarted from recent embeddings every
             T_r steps; alpha is a constant for the towers""",
        paper=PAPER,
        statements=STATEMENTS,
        spelling={
            "fastclip": True,
            "npn": True,
            "multiply_tau": True,
            "temperature_scheme": "global_learnable",
        },
        published=DOUBLED,
        cost=lambda setup: softmax_loss(setup) + prototypes(setup, through=False),
    ),
    MethodInfo(
        settings=NeuCLIPPoolSettings,
        build=_pool,
        takes=BATCH_OPTIONS,
        resolve=_pool_sizes,
        summary="the newest embeddings predict log-normalizers; the loss is differentiated through",
        normalizer="a pool of the newest m embeddings per side, mixed with the batch by gamma",
        state="2 * m * d numbers and m sample ids, whatever the data size",
        formula=ROBUST
        + _PREDICTION
        + """\
             W: the newest m embeddings of earlier batches, not trained; an anchor's own pair has
             no part in its sum; the loss is differentiated through alpha""",
        paper="this project; a descendant of cross-batch memory (Wang et al., Cross-Batch Memory "
        "for Embedding Learning, CVPR 2020, arXiv 1912.06798) inside NeuCLIP's objective: " + PAPER,
        cost=pool,
    ),
)
