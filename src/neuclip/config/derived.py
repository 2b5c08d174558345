"""Settings of a fine-tuning run that follow from its weights and its data. Imports no torch.

A rule looks at the facts and at the settings known so far, and gives a setting with its reason. A
setting that the user gave is never derived. The rules run in the order in which they depend on each
other: the held-out share, the batch, the length of the run, then what is counted in steps.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from neuclip.catalogue.fields import Section
from neuclip.catalogue.method_settings import GlobalContrastiveSettings
from neuclip.config.data_sections import AugmentationConfig
from neuclip.config.run_config import RunConfig
from neuclip.config.sections import AUTO
from neuclip.errors import UserError, quantity

REFERENCE_BATCH = 256
REFERENCE_LR = 1e-5
"""The rate that fine-tuning of CLIP usually takes, at batches of about the size above."""
LR_RANGE = (1e-6, 3e-5)
WD = 0.1
LION = 10
"""Lion's rate is 3 to 10 times smaller than AdamW's and its decay as much larger, since its updates
have a larger norm and the product decides (Chen et al., arXiv 2302.06675, section 5). In
`studies/finetuning` a fifth is worse than a tenth."""
LORA_LR = 10
"""Factor on the rate for low-rank updates: LoRA's best rate is about ten times that of all weights,
whatever the rank, with alpha 32 (Schulman et al., LoRA Without Regret, 2025,
https://thinkingmachines.ai/blog/lora/)."""
EPOCHS_AT_ONE = 1000
"""Epochs are this number over the root of the number of pairs, within the range below."""
EPOCH_RANGE = (1, 20)
BATCH_RANGE = (16, 256)
STEPS_PER_EPOCH = 20
"""An epoch has at least as many steps, if the smallest batch allows it."""
WARM_START_RANGE = (10, 100)
HELD_OUT, HELD_OUT_PAIRS = 0.05, 20


@dataclass(frozen=True)
class Facts:
    """What the settings are derived from.

    Attributes:
        pairs: of the training data, before a share is held out.
        model: architecture that the weights record; none: it is given.
        temperature: of the weights; none: they record none, or one of a sigmoid loss.
        pairs_in_memory: pairs that a device holds in a step, by estimate; none: not estimated.
        processes: number of ranks.
    """

    pairs: int
    model: str | None
    temperature: float | None
    pairs_in_memory: int | None
    processes: int


@dataclass(frozen=True)
class Derived:
    """A derived setting.

    Attributes:
        section: of the settings.
        key: in the section.
        value: the setting's.
        reason: why it has this value, in a few words.
    """

    section: str
    key: str
    value: Any
    reason: str

    @property
    def words(self) -> list[str]:
        """The value as words of a command line."""
        if isinstance(self.value, Section):
            given = self.value.model_dump(exclude_defaults=True)
            return [f"{key}={value}" for key, value in given.items()]
        return [f"{self.value:g}" if isinstance(self.value, float) else str(self.value)]


def in_short(derived: Iterable[Derived]) -> str:
    """Derived settings in one line; `name` alone would read as the name of the run."""
    return ", ".join(
        f"{one.section if one.key == 'name' else one.key} {' '.join(one.words)}" for one in derived
    )


Number = TypeVar("Number", int, float)
Finding = tuple[Any, str] | None
"""A value and its reason; none: the rule does not apply."""
Rule = Callable[[RunConfig, Facts], Finding]


def derive(config: RunConfig, facts: Facts) -> tuple[RunConfig, tuple[Derived, ...]]:
    """Fills in what is not given.

    Args:
        config: the settings as asked for; those given are in the sections' `model_fields_set`.
        facts: of the weights, the data and the machine.

    Returns:
        The full settings, which derive nothing any more, and what was derived.

    Raises:
        UserError: a setting that depends on one that was given has no rule.
    """
    found: list[Derived] = []
    for (section, key), rule in _RULES.items():
        settings = getattr(config, section)
        if key in settings.model_fields_set or key not in type(settings).model_fields:
            continue
        if (finding := rule(config, facts)) is not None:
            found.append(Derived(section, key, *finding))
            changed = settings.model_copy(update={key: finding[0]})
            config = config.model_copy(update={section: changed})
    return config.model_copy(update={"derive": None}), tuple(found)


def kept(config: RunConfig, before: RunConfig) -> RunConfig:
    """The settings of a continued run: what is derived and not given is as the run recorded it."""
    for section, key in _RULES:
        now, then = getattr(config, section), getattr(before, section)
        fields = type(now).model_fields
        if type(now) is type(then) and key in fields and key not in now.model_fields_set:
            changed = now.model_copy(update={key: getattr(then, key)})
            config = config.model_copy(update={section: changed})
    return config.model_copy(update={"derive": None})


def _model(config: RunConfig, facts: Facts) -> Finding:
    if facts.model is None:
        return None
    return facts.model, "the architecture of the weights"


def _batch_size(config: RunConfig, facts: Facts) -> Finding:
    if {"global_batch_size", "accum_freq"} & config.data.model_fields_set:
        return None
    low, high = BATCH_RANGE
    by_data = _training_pairs(config, facts) // STEPS_PER_EPOCH // facts.processes
    limits = {f"at least {STEPS_PER_EPOCH} steps an epoch": by_data, "more is seldom better": high}
    if facts.pairs_in_memory is not None:
        limits["what memory holds, by estimate"] = facts.pairs_in_memory
    reason = min(limits, key=lambda each: limits[each])
    size = max(low, 2 ** int(math.log2(max(limits[reason], 1))))
    if size > limits[reason]:
        reason = "the smallest useful batch"
    return size, reason


def _epochs(config: RunConfig, facts: Facts) -> Finding:
    pairs = _training_pairs(config, facts)
    epochs, bound = _bounded(round(EPOCHS_AT_ONE / math.sqrt(pairs)), EPOCH_RANGE)
    return epochs, f"{EPOCHS_AT_ONE:,} / root of {pairs:,} pairs{bound}"


def _lr(config: RunConfig, facts: Facts) -> Finding:
    _check_known(config)
    batch = _global_batch(config, facts)
    rate, bound = _bounded(REFERENCE_LR * math.sqrt(batch / REFERENCE_BATCH), LR_RANGE)
    reason = f"{REFERENCE_LR:g} at batch {REFERENCE_BATCH}, by the root of the batch ({batch})"
    reason += bound
    if config.adaptation.lora_rank is not None:
        rate *= LORA_LR
        reason += f"; times {LORA_LR} for LoRA"
    if config.optim.opt == "lion":
        rate /= LION
        reason += f"; over {LION} for Lion"
    return float(f"{rate:.2g}"), reason


def _warmup(config: RunConfig, facts: Facts) -> Finding:
    steps = _steps(config, facts)
    return max(1, round(0.05 * steps)), f"5 % of {quantity(steps, 'step')}"


def _warm_start(config: RunConfig, facts: Facts) -> Finding:
    steps, bound = _bounded(_steps(config, facts) // 10, WARM_START_RANGE)
    return steps, f"a tenth of the run{bound}: moments and state settle"


def _wd(config: RunConfig, facts: Facts) -> Finding:
    _check_known(config)
    reason = "half of training's: the weights are good already"
    if config.optim.opt == "lion":
        return LION * WD, f"{reason}; times {LION} for Lion, whose rate is smaller"
    return WD, reason


def _check_known(config: RunConfig) -> None:
    """Checks that the usual rate and decay of the optimiser are known.

    Raises:
        UserError: they are not, and one of them is not given.
    """
    optim = config.optim
    if optim.opt in {"adamw", "lion"}:
        return
    missing = [f"--{key}" for key in ("lr", "wd") if key not in optim.model_fields_set]
    raise UserError(
        f"--opt {optim.opt}: give {' and '.join(missing)}; neuclip finetune derives rate and decay "
        "for adamw and lion alone, since other optimisers scale their updates in other ways (see "
        "their papers for usual values; --wd 0 is no decay)"
    )


def _layer_decay(tower: str) -> Rule:
    def rule(config: RunConfig, facts: Facts) -> Finding:
        if getattr(config.model, f"lock_{tower}") or config.adaptation.lora_rank is not None:
            return None
        return 0.75, "early layers are general: they move less"

    return rule


def _crops(config: RunConfig, facts: Facts) -> Finding:
    scale = AugmentationConfig(scale=(0.5, 1.0))
    return scale, "few pairs: crops of 50 to 100 % of the area"


def _temperature(config: RunConfig, facts: Facts) -> Finding:
    sigmoid = "logit_bias" in type(config.method).model_fields  # its two scalars belong together
    if facts.temperature is None or sigmoid:
        return None
    lowest = getattr(config.method, "temperature_min", 0.0)
    value = float(f"{min(1.0, max(facts.temperature, lowest)):.6g}")
    reason = "that of the weights" if lowest <= facts.temperature else "temperature_min"
    return value, reason


def _rho(config: RunConfig, facts: Facts) -> Finding:
    measured = isinstance(config.method, GlobalContrastiveSettings)
    if not measured or not config.optim.warm_start_steps:
        return None
    return "auto", "keeps the temperature; measured in the warm start"


def _val_split(config: RunConfig, facts: Facts) -> Finding:
    evaluation = config.evaluation
    if evaluation.val_data or evaluation.zero_shot or facts.pairs < 2 * HELD_OUT_PAIRS:
        return None
    few = HELD_OUT_PAIRS / facts.pairs
    bound = f": {HELD_OUT_PAIRS} pairs at least" if few > HELD_OUT else ""
    return round(max(HELD_OUT, few), 3), f"no validation data were given{bound}"


def _best_metric(config: RunConfig, facts: Facts) -> Finding:
    evaluation = config.evaluation
    if evaluation.val_split is not None:
        return "val/mean_recall@1", "the best epoch is kept"
    if evaluation.follows_something:
        return AUTO, "the best epoch is kept, by the main metric of the first validation data"
    return None


def _log_every(config: RunConfig, facts: Facts) -> Finding:
    every = min(50, max(1, _steps(config, facts) // 20))
    return every, "20 records or more"


def _bounded(value: Number, bounds: tuple[Number, Number]) -> tuple[Number, str]:
    """A value within bounds, and the bound that decided, in words."""
    low, high = bounds
    if value < low:
        return low, f", at least {low:g}"
    return (high, f", at most {high:g}") if value > high else (value, "")


def _global_batch(config: RunConfig, facts: Facts) -> int:
    data = config.data
    return data.global_batch_size or data.batch_size * data.accum_freq * facts.processes


def _training_pairs(config: RunConfig, facts: Facts) -> int:
    """Pairs that are not held out: at least one."""
    return max(1, round(facts.pairs * (1 - (config.evaluation.val_split or 0))))


def _steps(config: RunConfig, facts: Facts) -> int:
    """Steps of the run; groups that are held out whole change them a little."""
    epoch = config.data.train_num_samples or _training_pairs(config, facts)
    return max(1, config.optim.epochs * (epoch // _global_batch(config, facts)))


_RULES: Mapping[tuple[str, str], Rule] = {
    ("model", "name"): _model,
    ("evaluation", "val_split"): _val_split,
    ("evaluation", "best_metric"): _best_metric,
    ("data", "batch_size"): _batch_size,
    ("optim", "epochs"): _epochs,
    ("optim", "lr"): _lr,
    ("optim", "warmup"): _warmup,
    ("optim", "warm_start_steps"): _warm_start,
    ("optim", "wd"): _wd,
    ("optim", "image_layer_decay"): _layer_decay("image"),
    ("optim", "text_layer_decay"): _layer_decay("text"),
    ("data", "aug_cfg"): _crops,
    ("method", "temperature"): _temperature,
    ("method", "rho"): _rho,
    ("output", "log_every_n_steps"): _log_every,
}
