"""Losses by name: the one place that knows which modules make up a method."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from neuclip.catalogue.method_settings import (
    AmorLIPSettings,
    FastCLIPv0Settings,
    FastCLIPv1Settings,
    FastCLIPv2Settings,
    FastCLIPv3Settings,
    GlobalContrastiveSettings,
    IndividualTemperatureSettings,
    ISogCLRSettings,
    MethodSettings,
    MixingSettings,
    NeuCLIPSettings,
    OpenCLIPSettings,
    RGCLBatchSettings,
    ScentSettings,
    SigLIPSettings,
    SogCLRSettings,
    StabilisedSettings,
)
from neuclip.catalogue.registry import method_settings
from neuclip.errors import UserError
from neuclip.method.choices import TemperatureOptimizer
from neuclip.method.losses.amorlip import AmorLIPLoss
from neuclip.method.losses.global_contrastive import GlobalContrastiveLoss, Objective
from neuclip.method.losses.individual import IndividualContrastiveLoss
from neuclip.method.losses.infonce import InfoNCELoss
from neuclip.method.losses.pair_loss import PairLoss
from neuclip.method.losses.sigmoid import SigmoidLoss
from neuclip.method.normalizers.amortized import AmortizedNormalizer, AmortizedSettings
from neuclip.method.normalizers.minibatch import MinibatchNormalizer
from neuclip.method.normalizers.moving_average import AnchorRate, MovingAverageNormalizer, Rate
from neuclip.method.normalizers.prototypes import NetworkSettings, PrototypeNormalizer
from neuclip.method.notation import Normalizer
from neuclip.method.schedule import Gamma
from neuclip.method.temperature import IndividualTemperature, TemperatureRule
from neuclip.parallel.collectives import Slice

POOL_BATCHES = 128
"""Batches in the default pool: the more embeddings, the better its value (docs/study.md)."""
FRESH_BATCHES = 32
"""Batches of the age up to which embeddings carry the gradient."""
MAX_POOL = 16_384
"""Where a pool begins to cost: B x m logits per side."""
POOL_UNLESS_KNOWN = 4096
"""Where the batch is not known."""


@dataclass(frozen=True)
class Run:
    """What a loss must know of the run it serves.

    Attributes:
        embed_dim: width of the embeddings.
        steps_per_epoch: training steps in an epoch, for schedules in epochs.
        num_samples: bound of the sample ids, for methods with a state per sample.
        global_batch_size: pairs in a training step, over all processes.
        sharded: whether each rank keeps only its shard of the prototypes; if not, every rank
            keeps all of them and predicts by itself.
    """

    embed_dim: int
    steps_per_epoch: int | None = None
    num_samples: int | None = None
    global_batch_size: int | None = None
    sharded: bool = True


def create_loss(
    name: str,
    *,
    embed_dim: int,
    steps_per_epoch: int | None = None,
    num_samples: int | None = None,
    global_batch_size: int | None = None,
    **settings: Any,  # noqa: ANN401  validated by the method's settings
) -> PairLoss:
    """Builds the loss of a method, ready for anybody's training loop.

    Args:
        name: a method of `neuclip methods`.
        embed_dim: width of the embeddings.
        steps_per_epoch: training steps in an epoch, for methods with a schedule in epochs.
        num_samples: sample ids run from 0 to num_samples - 1, for methods with a state per sample.
        global_batch_size: pairs in a training step over all processes; `neuclip` sizes its pool by
            it, unless num_prototypes is given.
        settings: the method's settings that differ from the defaults (`neuclip methods NAME`).

    Returns:
        A module called as `loss(image_features, text_features, logit_scale)`; all its state is in
        its `state_dict`.

    Raises:
        UserError: unknown method or setting (lists what exists), a value out of range, or a missing
            length of the schedule or number of samples.
    """
    run = Run(embed_dim, steps_per_epoch, num_samples, global_batch_size)
    return build_loss(method_settings(name, settings), run)


def build_loss(settings: MethodSettings, run: Run) -> PairLoss:
    """Builds the loss of validated settings.

    Raises:
        UserError: the run does not say what the method must know, or a setting has no effect.
    """
    for key in ("embed_dim", "steps_per_epoch", "num_samples", "global_batch_size"):
        value = getattr(run, key)
        if value is not None and value < 1:
            raise UserError(f"{key} {value}: must be at least 1")
    return _BUILDERS[type(settings)](resolve(settings, run), run)


def resolve(
    settings: MethodSettings, run: Run, before: MethodSettings | None = None
) -> MethodSettings:
    """The settings with numbers where their defaults follow from the run.

    What is kept of a run must say how large its network is, not how large it would be by the
    defaults of the day on which it is read.

    Args:
        settings: as asked for.
        run: what is trained.
        before: those of the run that is continued: what is not asked for stays as it was there.

    Raises:
        UserError: a number is asked for that nothing would use.
    """
    if not isinstance(settings, NeuCLIPSettings):
        return settings
    if isinstance(before, NeuCLIPSettings):
        settings = _as_before(settings, before)
    return settings.model_copy(
        update={
            "num_prototypes": _num_prototypes(settings, run),
            "gradient_prototypes": _gradient_prototypes(settings, run),
        }
    )


# --- one builder per method -----------------------------------------------------------------


def _openclip(_: MethodSettings, run: Run) -> PairLoss:
    return InfoNCELoss(run.embed_dim)


def _siglip(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, SigLIPSettings)
    return SigmoidLoss(run.embed_dim, settings.logit_bias)


def _rgcl_batch(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, RGCLBatchSettings)
    return GlobalContrastiveLoss(
        run.embed_dim, MinibatchNormalizer(settings.epsilon), _robust(settings)
    )


def _sogclr(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, SogCLRSettings)
    return GlobalContrastiveLoss(
        run.embed_dim,
        _moving_average(settings, run, settings.gamma),
        Objective(epsilon=settings.epsilon, learns_temperature=False),
    )


def _isogclr(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, ISogCLRSettings)
    rule = _rule(settings, "momentum")
    return IndividualContrastiveLoss(
        run.embed_dim,
        _moving_average(settings, run, settings.gamma),
        IndividualTemperature(
            _num_samples(settings, run), replace(rule, beta=settings.temperature_beta)
        ),
        epsilon=settings.epsilon,
        times_temperature=True,
    )


def _fastclip_v0(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, FastCLIPv0Settings)
    objective = Objective(
        epsilon=settings.epsilon,
        temperature_gradient=settings.temperature_gradient,
        times_temperature=False,
    )
    normalizer = _moving_average(settings, run, _gamma(settings, run))
    return GlobalContrastiveLoss(run.embed_dim, normalizer, objective)


def _fastclip_v1(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, FastCLIPv1Settings)
    objective = Objective(
        epsilon=settings.epsilon, times_temperature=False, learns_temperature=False
    )
    normalizer = _moving_average(settings, run, _gamma(settings, run))
    return GlobalContrastiveLoss(run.embed_dim, normalizer, objective)


def _fastclip_v2(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, FastCLIPv2Settings)
    gamma = _gamma(settings, run)
    published = settings.temperature_gradient == "fastclip"
    rule = replace(
        _rule(settings, "fastclip" if published else "adam"),
        clip=5.0,
        steps_per_epoch=gamma.steps_per_epoch,
    )
    return IndividualContrastiveLoss(
        run.embed_dim,
        _moving_average(settings, run, gamma),
        IndividualTemperature(_num_samples(settings, run), rule),
        epsilon=settings.epsilon,
        times_temperature=False,
    )


def _fastclip_v3(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, FastCLIPv3Settings)
    normalizer = _moving_average(settings, run, _gamma(settings, run))
    return GlobalContrastiveLoss(run.embed_dim, normalizer, _robust(settings))


def _scent(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, ScentSettings)
    normalizer = _moving_average(settings, run, AnchorRate(settings.gamma))
    return GlobalContrastiveLoss(run.embed_dim, normalizer, _robust(settings))


def _amorlip(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, AmorLIPSettings)
    networks = AmortizedSettings(
        **settings.model_dump(include=set(AmortizedSettings.__dataclass_fields__))
    )
    normalizer = AmortizedNormalizer(run.embed_dim, networks, _steps_per_epoch(settings, run))
    return AmorLIPLoss(
        run.embed_dim,
        normalizer,
        rho=(settings.rho, settings.late_rho),
        late_from=settings.late_rho_epoch,
    )


def _neuclip(settings: MethodSettings, run: Run) -> PairLoss:
    assert isinstance(settings, NeuCLIPSettings)
    network = NetworkSettings(
        **settings.model_dump(include=set(NetworkSettings.__dataclass_fields__))
    )
    normalizer = PrototypeNormalizer(
        run.embed_dim,
        network,
        _gamma(settings, run),
        settings.epsilon,
        shard=None if run.sharded else Slice(0, network.num_prototypes),
    )
    return GlobalContrastiveLoss(run.embed_dim, normalizer, _robust(settings))


# --- their parts ----------------------------------------------------------------------------


def _robust(settings: GlobalContrastiveSettings) -> Objective:
    return Objective(
        epsilon=settings.epsilon,
        rho=settings.rho,
        temperature_gradient=settings.temperature_gradient,
    )


def _moving_average(settings: StabilisedSettings, run: Run, rate: Rate) -> Normalizer:
    return MovingAverageNormalizer(_num_samples(settings, run), rate, settings.epsilon)


def _rule(
    settings: IndividualTemperatureSettings, optimizer: TemperatureOptimizer
) -> TemperatureRule:
    """How individual temperatures move.

    Raises:
        UserError: they start outside their bounds.
    """
    low, high = settings.temperature_min, settings.temperature_max
    if not low <= settings.temperature <= high:
        raise UserError(
            f"method {_name(settings)!r}: temperature {settings.temperature:g} must lie between "
            f"temperature_min {low:g} and temperature_max {high:g}"
        )
    return TemperatureRule(
        initial=settings.temperature,
        lr=settings.temperature_lr,
        low=low,
        high=high,
        rho=settings.rho,
        optimizer=optimizer,
    )


def _num_samples(settings: MethodSettings, run: Run) -> int:
    if run.num_samples is None:
        raise UserError(
            f"method {_name(settings)!r} keeps a state per sample: pass num_samples=..., one more "
            "than the largest sample id"
        )
    return run.num_samples


def _as_before(settings: NeuCLIPSettings, before: NeuCLIPSettings) -> NeuCLIPSettings:
    """What is not asked for, as the run had it; its gradient only where it still has the same."""
    kept = ["num_prototypes"]
    if (settings.refresh, settings.gradient) == (before.refresh, before.gradient):
        kept.append("gradient_prototypes")
    update = {key: getattr(before, key) for key in kept if getattr(settings, key) is None}
    return settings.model_copy(update=update)


def _num_prototypes(settings: NeuCLIPSettings, run: Run) -> int:
    """As many as are asked for, or those of so many batches."""
    if settings.num_prototypes is not None:
        return settings.num_prototypes
    if run.global_batch_size is None:
        return POOL_UNLESS_KNOWN
    # Without an order of age all prototypes carry the gradient: fewer of them are good.
    batches = POOL_BATCHES if settings.refresh == "fifo" else FRESH_BATCHES
    return min(batches * run.global_batch_size, MAX_POOL)


def _gradient_prototypes(settings: NeuCLIPSettings, run: Run) -> int | None:
    """How many of the newest carry the gradient; none: all.

    Raises:
        UserError: a number is asked for where no order of age is kept, or nothing would use it.
    """
    needed = {"refresh": ("fifo",), "gradient": ("full", "union")}
    wrong = next((key for key, right in needed.items() if getattr(settings, key) not in right), "")
    if settings.gradient_prototypes is None:
        batch = run.global_batch_size
        return None if wrong or batch is None else FRESH_BATCHES * batch
    if wrong:
        raise UserError(
            f"method 'neuclip': gradient_prototypes {settings.gradient_prototypes} has no effect "
            f"with {wrong} {getattr(settings, wrong)!r}: it needs {wrong} "
            f"{' or '.join(needed[wrong])}, or gradient_prototypes none"
        )
    return settings.gradient_prototypes


def _steps_per_epoch(settings: MethodSettings, run: Run) -> int:
    if run.steps_per_epoch is None:
        raise UserError(
            f"method {_name(settings)!r} has a schedule in epochs: pass steps_per_epoch=..."
        )
    return run.steps_per_epoch


def _gamma(settings: MixingSettings, run: Run) -> Gamma:
    """The schedule in steps.

    Raises:
        UserError: the schedule's lengths or its final value are not known.
    """
    steps_per_epoch, name = _steps_per_epoch(settings, run), _name(settings)
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
        steps_per_epoch=steps_per_epoch,
    )


def _name(settings: MethodSettings) -> str:
    return str(settings.model_dump()["name"])


_BUILDERS: dict[type[MethodSettings], Callable[[MethodSettings, Run], PairLoss]] = {
    OpenCLIPSettings: _openclip,
    SigLIPSettings: _siglip,
    RGCLBatchSettings: _rgcl_batch,
    SogCLRSettings: _sogclr,
    ISogCLRSettings: _isogclr,
    FastCLIPv0Settings: _fastclip_v0,
    FastCLIPv1Settings: _fastclip_v1,
    FastCLIPv2Settings: _fastclip_v2,
    FastCLIPv3Settings: _fastclip_v3,
    ScentSettings: _scent,
    AmorLIPSettings: _amorlip,
    NeuCLIPSettings: _neuclip,
}
