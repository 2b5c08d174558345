"""From settings as they were asked for to settings in which every number is known.

`resolve` is called once per run. It needs the number of ranks and, where a run is continued, the
settings of that run.
"""

from typing import Any

from neuclip.catalogue.method_settings import MixingSettings
from neuclip.catalogue.registry import method_info
from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.config.batch_size import share_batch
from neuclip.config.run_config import RunConfig


class ResolvedConfig(RunConfig):
    """Settings without a default that is still open; only `resolve` makes them.

    `optim.beta1`, `beta2` and `eps` of AdamW, gamma and its length, the pool's sizes and
    `data.global_batch_size` are numbers, and `data.batch_size` and `data.accum_freq` are what each
    rank takes of a step.
    """


def resolve(config: RunConfig, world_size: int, before: RunConfig | None = None) -> ResolvedConfig:
    """Fills in every default that depends on other settings, and checks the whole.

    Args:
        config: the settings as they were asked for.
        world_size: number of ranks.
        before: the settings of the run that is continued; what is not asked for anew stays.

    Raises:
        UserError: settings contradict each other, or the ranks cannot take equal shares of a step.
    """
    config.check()
    config = share_batch(derived(config), world_size, before)
    info = method_info(config.method.method)
    earlier = None if before is None else before.method
    method = info.resolve(config.method, config.data.global_batch_size, earlier)
    fields: dict[str, Any] = {key: getattr(config, key) for key in RunConfig.model_fields}
    return ResolvedConfig.model_construct(**{**fields, "method": method})


def smoke(config: RunConfig) -> RunConfig:
    """The same run with a tiny model, 2 epochs of 10 steps, and no trace: seconds on a CPU.

    Schedules keep the values that they have in the full run.
    """
    config = derived(config)
    accum_freq = min(config.data.accum_freq, 8)
    data = {
        "batch_size": 16 // accum_freq, "accum_freq": accum_freq, "global_batch_size": None,
        "train_num_samples": 160, "data_size": None, "workers": 0,
    }  # fmt: skip
    stop = 1 if config.optim.stop_epochs == 1 else None
    optim = {
        "epochs": 2, "stop_epochs": stop, "warmup": min(config.optim.warmup, 2),
        "warm_start_steps": min(config.optim.warm_start_steps, 2),
    }  # fmt: skip
    if config.optim.epochs_cooldown is not None:
        optim["epochs_cooldown"] = 1
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": config.model.tiny(),
            "adaptation": AdaptationConfig(),  # it needs the weights that are left out
            "optim": config.optim.model_copy(update=optim),
            "output": config.output.model_copy(update={"profile": False}),
            "derive": None,
        }
    )


def derived(config: RunConfig) -> RunConfig:
    """The same settings with the defaults that depend on the model and on the run's length."""
    optim = config.optim
    if optim.opt == "adamw":
        vit = "vit" in config.model.short_name.lower()
        rates = {
            "beta1": _default(optim.beta1, 0.9),
            "beta2": _default(optim.beta2, 0.98 if vit else 0.999),
            "eps": _default(optim.eps, 1e-6 if vit else 1e-8),
        }
        optim = optim.model_copy(update=rates)
    method = config.method
    if isinstance(method, MixingSettings):
        method = method.for_length(float(max(config.optim.epochs, 1)))
        method = method.after_warm_start() if config.optim.warm_start_steps else method
    return config.model_copy(update={"optim": optim, "method": method})


def _default(value: float | None, default: float) -> float:
    return default if value is None else value
