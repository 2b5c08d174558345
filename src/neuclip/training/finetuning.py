"""Fine-tuning: the facts of weights, data and machine from which a run's settings are derived.

The rules are in `neuclip.config.derived`.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from neuclip.config.batch_size import check_epoch, factors
from neuclip.config.derived import Derived, Facts, derive, kept
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError
from neuclip.evaluation.held_out import HeldOut
from neuclip.model.architecture import Architecture, find_architecture
from neuclip.model.clip import build_clip, towers_without_values
from neuclip.model.device import choose_device, choose_precision
from neuclip.model.lora import Trained, add_updates, count_trained
from neuclip.model.mismatch import models_of
from neuclip.model.opened_checkpoint import Checkpoint
from neuclip.model.prepare import prepare
from neuclip.model.starting_weights import StartingWeightsReader, with_model_of_weights
from neuclip.parallel.launch import launch_environment
from neuclip.parallel.work_sharing import from_main
from neuclip.training.evaluation_plan import EvaluationPlan, open_plan
from neuclip.training.open_run import earlier_config
from neuclip.training.training_data import TrainingData

BYTES_PER_ACTIVATION = 34
"""Bytes that a transformer layer keeps for the backward pass, per token and channel, at 2 bytes a
number and without the attention matrix (Korthikanti et al., arXiv 2205.05198, equation 2)."""
BYTES_PER_WEIGHT = 16
"""In float32: the weight, its gradient and AdamW's two moments."""
BYTES_PER_FROZEN_WEIGHT = 8
"""Of LoRA, in float32: the weight, and its sum with the update, kept for the backward pass."""
BYTES_PER_TAUGHT_WEIGHT = 4
"""Of the teacher of distillation."""
USABLE = 0.8
"""Fraction of the free memory that the estimate fills."""


def complete(
    config: RunConfig,
    data: TrainingData | None = None,
    weights: StartingWeightsReader | None = None,
) -> tuple[RunConfig, tuple[Derived, ...]]:
    """The full settings of a run that derives some; all ranks call this together.

    A run that is continued keeps the settings that it recorded. Every run takes the model that
    published weights choose, if it names none.

    Args:
        config: the settings as asked for.
        data: the training data; opened if settings are derived from them. None: they are closed
            again.
        weights: keeps the starting weights if settings are derived from them; none: they are freed.

    Returns:
        The settings, and those that were derived with their reasons.

    Raises:
        UserError: weights or data are missing or do not open, or the model is not known.
    """
    if config.derive is None:
        return config.model_copy(update={"model": with_model_of_weights(config.model)}), ()
    config.check()
    if config.name is not None and config.resume is not None:
        name, resume = config.name, config.resume
        before = from_main(lambda: earlier_config(config.output.logs, name, resume))
        if before is not None:
            return kept(config, before), ()
    model = with_model_of_weights(config.model)
    chosen = model.given_name if config.model.given_name is None else None
    config = config.model_copy(update={"model": model})
    own = data or TrainingData(config, str(config.data.train_data))
    try:
        full, derived = derive(config, _facts(config, own, weights or StartingWeightsReader()))
    finally:
        if data is None:
            own.close()
    if chosen is not None:
        derived = (Derived("model", "name", chosen, "the model of the weights"), *derived)
    return full, derived


def check_evaluation(config: RunConfig, data: TrainingData) -> EvaluationPlan:
    """Opens what a run evaluates and checks the metric that it follows, before the run.

    All training data stand for the held-out share: which samples are held out takes a look at
    every image.

    Args:
        config: the full settings, resolved.
        data: the training data.

    Returns:
        What the run evaluates.

    Raises:
        UserError: as where the run opens them.
    """
    share, split = config.evaluation.val_split, None
    if share is not None:
        everything = np.arange(len(data.source), dtype=np.int64)
        label_key = config.data.label_key
        split = HeldOut(data.source, everything, share, 0, label_key=label_key).split
    return open_plan(config, split, starts_trained=True)


def check_length(config: RunConfig, data: TrainingData) -> None:
    """Checks that an epoch has a step, before the run.

    Reads no image, unless a share is held out of so few pairs that the rest may not make a batch.

    Args:
        config: the full settings, resolved.
        data: the training data.

    Raises:
        UserError: an epoch has fewer samples than one global batch.
    """
    index, settings = data.source, config.data
    batch = settings.global_batch_size or settings.batch_size
    held_out = round((config.evaluation.val_split or 0) * len(index))
    if len(index) - held_out < batch:
        index, _ = data.divided(config)
    processes = launch_environment().world_size
    parts = factors(settings.batch_size, settings.accum_freq, processes)
    check_epoch(settings.train_num_samples or index.layout.visits, batch, parts)


def check_weights(config: RunConfig, weights: StartingWeightsReader) -> None:
    """Loads the starting weights into towers, as the run does, for its errors and messages.

    Args:
        config: the full settings.
        weights: has read the weights.

    Raises:
        UserError: they are of another architecture; names what differs and which model fits.
    """
    starting = weights.take(config.model)
    starting.load(build_clip(starting.architecture(), "fp32", torch.device("cpu")))


def _facts(config: RunConfig, data: TrainingData, weights: StartingWeightsReader) -> Facts:
    starting = weights.read(config.model)
    if starting.model is None:
        raise UserError(
            "neuclip finetune starts from weights: --pretrained takes a run folder, a file, a "
            "repository on disk or the name of published weights"
        )
    model = None if config.model.given_name else _model_of(starting.model)
    launch = launch_environment()
    device = choose_device(config.device, launch.local_rank)
    architecture = find_architecture(model or config.model.name)
    low = choose_precision(config.model.precision, device) != "fp32"
    numbers = sum(value.numel() for value in starting.model.weights.values())
    found = Facts(
        pairs=len(data.source),
        model=model,
        temperature=_temperature(starting.model.weights),
        pairs_in_memory=_pairs_in_memory(
            architecture, device, numbers * _bytes_per_weight(config), 2 if low else 4
        ),
        processes=launch.world_size,
    )
    return from_main(lambda: found)


def _model_of(checkpoint: Checkpoint) -> str:
    """The architecture that comes with the weights, or the only one that they fit.

    Raises:
        UserError: several models have these shapes, or none.
    """
    recorded = checkpoint.recorded_architecture
    if recorded is not None:
        return recorded.name
    fitting = models_of(checkpoint.weights)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{checkpoint.path} fits several models: give --model, one of {', '.join(fitting)} "
            "(names with quickgelu are for the weights of OpenAI, DFN and MetaCLIP)"
        )
    raise UserError(
        f"{checkpoint.path} fits no model of open_clip: give its configuration as --model FILE.json"
    )


def _temperature(weights: Mapping[str, torch.Tensor]) -> float | None:
    """The temperature of contrastive weights; a sigmoid's belongs to its bias."""
    if "logit_scale" not in weights or "logit_bias" in weights:
        return None
    return math.exp(-float(weights["logit_scale"]))


def _bytes_per_weight(config: RunConfig) -> int:
    lora = config.adaptation.lora_rank is not None
    own = BYTES_PER_FROZEN_WEIGHT if lora else BYTES_PER_WEIGHT
    return own + (BYTES_PER_TAUGHT_WEIGHT if config.adaptation.distills else 0)


def trained_weights(config: RunConfig) -> Trained:
    """What a run trains of the towers, which are built without memory for their weights.

    Args:
        config: the full settings.

    Raises:
        UserError: as where the towers are prepared.
    """
    architecture = find_architecture(config.model.name).changed(config.model)
    towers = towers_without_values(architecture)
    if config.adaptation.lora_rank is not None:
        add_updates(towers, config.adaptation, config.seed)
    as_built = {"grad_checkpointing": False, "torchcompile": False}
    prepare(towers, config.model.model_copy(update=as_built), (True, True))
    return count_trained(towers)


def _pairs_in_memory(
    architecture: Architecture, device: torch.device, weight_bytes: int, number_bytes: int
) -> int | None:
    """Pairs that fit into the free memory, by estimate; None if a tower is not a transformer."""
    per_pair = bytes_per_pair(architecture.config, number_bytes)
    if per_pair is None:
        return None
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
    else:
        free = 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, int((USABLE * free - weight_bytes) / per_pair))


def bytes_per_pair(config: Mapping[str, Any], number_bytes: int) -> float | None:
    """Bytes of activations of a pair in training.

    Args:
        config: as in open_clip's model_configs.
        number_bytes: of a number in the towers' precision.

    Returns:
        An estimate; None if a tower is not a transformer of open_clip.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    layers = vision.get("layers", 12)
    if not isinstance(layers, int) or vision.get("timm_model_name") or text.get("hf_model_name"):
        return None
    size, patch = (_pair(vision.get(key, default)) for key, default in _SIZES)
    patches = (size[0] // patch[0]) * (size[1] // patch[1]) + 1
    image = patches * vision.get("width", 768) * layers
    words = text.get("context_length", 77) * text.get("width", 512) * text.get("layers", 12)
    return BYTES_PER_ACTIVATION * number_bytes / 2 * (image + words)


_SIZES = (("image_size", 224), ("patch_size", 16))


def _pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
