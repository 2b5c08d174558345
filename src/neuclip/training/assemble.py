"""From settings to a run: builds the components, in the order in which they depend on each other.

1. the device and the processes         5. the towers' starting weights, locks and shards
2. the training data                    6. the optimiser, over the parameters that stay trainable
3. the model, and the loader, which     7. the run folder, once no input can fail any more
   fixes the length of an epoch            (of a run that goes on: before the model)
4. the loss, whose schedules count in   8. the state in the checkpoint to resume from
   epochs
"""

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from neuclip import console
from neuclip.catalogue.create import build_loss
from neuclip.catalogue.method_info import RunFacts
from neuclip.checkpoint.storage import VerifiedCheckpoint
from neuclip.config.data_sections import AugmentationConfig, DataConfig
from neuclip.config.derived import Derived, in_short
from neuclip.config.resolve import resolve
from neuclip.config.run_config import RunConfig
from neuclip.data.batch import Extras
from neuclip.data.decode import ImageDecoder
from neuclip.data.identity import identify
from neuclip.data.loader import LoaderSettings, TrainLoader
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, quantity
from neuclip.files import write_whole
from neuclip.model import prepare as tower_parts
from neuclip.model.clip import Clip, augmented, build_clip
from neuclip.model.device import choose_device, choose_precision
from neuclip.model.lora import add_updates, count_trained
from neuclip.model.resumed_weights import read_resumed
from neuclip.model.starting_weights import StartingWeights, StartingWeightsReader
from neuclip.parallel import collectives, fsdp
from neuclip.parallel.folder_lock import FolderLock
from neuclip.parallel.launch import launch_environment
from neuclip.parallel.process_group import WaitLimits, open_process_group
from neuclip.parallel.rank_consistency import check_same_data, check_same_program
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import RunFolder
from neuclip.training.components import Components
from neuclip.training.evaluate_only import evaluate_checkpoint
from neuclip.training.evaluation_plan import EvaluationPlan, open_plan
from neuclip.training.finetuning import complete
from neuclip.training.loss_arithmetic import loss_arithmetic
from neuclip.training.loss_scale import LossScale
from neuclip.training.open_run import changed_settings, earlier_config, open_run_folder
from neuclip.training.optim import Optimizer
from neuclip.training.optimizer_kind import OptimizerKind
from neuclip.training.records.run_log import log_to
from neuclip.training.records.trackers import check_packages
from neuclip.training.teacher import Teacher
from neuclip.training.token_supervision import TokenSupervision
from neuclip.training.trainer import Trainer
from neuclip.training.training_data import TrainingData

log = logging.getLogger("neuclip")


def train(config: RunConfig) -> Path:
    """Trains a run.

    Returns:
        The run folder.

    Raises:
        UserError: invalid input, found before the first batch where possible.
        Preempted: a signal asked to stop; a checkpoint is written.
    """
    config.check()
    with console.logging_shown():
        try:
            if config.only_evaluates:
                return _evaluate_only(config)
            return _join_and_train(config)
        finally:
            log_to(None)  # closes the run's out.log


def _join_and_train(config: RunConfig) -> Path:
    if config.data.train_data is None:
        raise UserError(
            "--train-data is missing: give a folder of .tar shards or a pattern such as "
            "'shards/{00000..00331}.tar' (neuclip data demo --out DIR makes a data set). With "
            "--pretrained or --resume, and --val-data or --imagenet-val, a run only evaluates"
        )
    OptimizerKind.of(config.optim)  # a wrong name or argument fails before data are opened
    device = _device(config)
    with (
        open_process_group(device, _wait_limits(config)),
        fsdp.ensure_process_group(device.type, wanted=config.parallel.fsdp),
    ):
        check_same_program(config.model_dump(mode="json"))
        loss_arithmetic(config.compute, device)  # fails before data are opened
        from_main(lambda: check_packages(config.output))
        data = TrainingData(config, config.data.train_data)
        weights = StartingWeightsReader()
        config, derived = complete(config, data, weights)
        name = config.name or from_main(lambda: _new_name(config))
        named = config.model_copy(update={"name": name})
        with FolderLock() as lock:
            return _train(named, data, weights, device, derived, lock)


def _evaluate_only(config: RunConfig) -> Path:
    device = _device(config)
    with open_process_group(device, _wait_limits(config)):
        return evaluate_checkpoint(config, device)


def _device(config: RunConfig) -> torch.device:
    launch = launch_environment()
    return choose_device(config.device, launch.local_rank, launch.world_size)


def _wait_limits(config: RunConfig) -> WaitLimits:
    return WaitLimits(config.parallel.dist_timeout, config.parallel.dist_silence)


def _new_name(config: RunConfig) -> str:
    return f"{config.method.method}-{config.model.short_name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _train(
    asked: RunConfig,
    training: TrainingData,
    weights: StartingWeightsReader,
    device: torch.device,
    derived: Sequence[Derived],
    lock: FolderLock,
) -> Path:
    """Builds and trains the run, in joined processes; `asked` has a name.

    A run that goes on opens its folder first: the checkpoint says what the towers are.
    """
    logs, name, resume = asked.output.logs, str(asked.name), asked.resume
    before = from_main(lambda: earlier_config(logs, name, resume))
    opened = partial(from_main, lambda: open_run_folder(logs, name, resume, lock))
    resumed = opened() if before is not None or resume not in {None, "latest", "auto"} else None
    config = resolve(asked, collectives.world_size(), before)
    index, held_out = training.divided(config)
    starting = _read_weights(resumed[1] if resumed else None, config, weights)
    split = None if held_out is None else held_out.split
    plan = open_plan(config, split, starts_trained=all(starting.begins_trained))
    clip = _build_clip(config, device, starting)
    loader = _build_loader(config, index, clip, training.components(config, held_out))
    data = identify(index)
    check_same_data(data.samples, loader.order_digest, data.digest)
    num_samples = config.data.data_size or len(index)
    facts = RunFacts(
        clip.embed_dim,
        loader.steps_per_epoch,
        num_samples,
        loader.global_batch_size,
        adam=config.optim.adam,
        total_steps=config.optim.epochs * loader.steps_per_epoch,
    )
    loss = build_loss(config.method, facts).to(device)
    low_rank = starting.low_rank_record(config.adaptation)
    teacher = _prepare_towers(config, clip, starting, learns_temperature=loss.learns_temperature)
    del starting  # frees the copy on the CPU
    supervision = TokenSupervision.of(config, clip, device)
    optimizer = _build_optimizer(config, clip, loader.steps_per_epoch, supervision)
    folder, start = resumed or opened()
    log_to(folder.log if collectives.is_main() else None)
    components = Components(
        config=config,
        folder=folder,
        device=device,
        clip=clip,
        loss=loss,
        optimizer=optimizer,
        loader=loader,
        plan=plan,
        num_samples=num_samples,
        shard_damage=index.damage,
        data=data,
        unused=index.unused,
        held_out=None if held_out is None else held_out.digest,
        low_rank=low_rank,
        teacher=teacher,
        supervision=supervision,
    )
    trainer = Trainer(components, lock.check)
    if start is not None:
        trainer.state.load(start)
    if collectives.is_main():
        write_whole(folder.config, _recorded_config(asked, components).to_yaml())
        _announce(components, index, derived)
        if before is not None and (changes := changed_settings(before, config)):
            log.warning("continued with other settings than before: %s", changes)
    try:
        trainer.fit()
    finally:
        index.close()
    if collectives.is_main():
        _announce_end(plan, folder)
    return folder.path


def _read_weights(
    resumed: VerifiedCheckpoint | None, config: RunConfig, reader: StartingWeightsReader
) -> StartingWeights:
    if resumed is None:
        return reader.take(config.model)
    return read_resumed(resumed, config.model, config.adaptation, reader)


def _recorded_config(asked: RunConfig, run: Components) -> RunConfig:
    """The settings as given, with the resolved global batch size, optimiser and method."""
    data = asked.data.model_copy(update={"global_batch_size": run.loader.global_batch_size})
    resolved = {"method": run.config.method, "optim": run.config.optim}
    return asked.model_copy(update={"data": data, **resolved})


_SCALARS = {"temperature": "logit_scale", "logit_bias": "logit_bias"}
"""Settings of a method, and the parameters that start with them."""


def _build_clip(config: RunConfig, device: torch.device, starting: StartingWeights) -> Clip:
    """Builds the model with equal weights on all ranks, then seeds each rank differently."""
    torch.manual_seed(config.seed)
    init = {key: value for key, value in config.method.model_dump().items() if key in _SCALARS}
    clip = build_clip(
        starting.architecture(),
        choose_precision(config.model.precision, device),
        device,
        init,
        config.model.force_patch_dropout,
        pretrained_image=config.model.pretrained_image and starting.resumed is None,
    )
    torch.manual_seed(config.seed + collectives.rank())
    augmentation = config.data.aug_cfg
    return clip if augmentation is None else augmented(clip, augmentation.given())


def _own_scalars(config: RunConfig, *, learns_temperature: bool) -> set[str]:
    """The scalars of the model that do not follow starting weights: those that the user set.

    A method with temperatures of another kind keeps its own, too.
    """
    given = {name for key, name in _SCALARS.items() if key in config.method.model_fields_set}
    return given if learns_temperature else given | {"logit_scale"}


def _prepare_towers(
    config: RunConfig, clip: Clip, starting: StartingWeights, *, learns_temperature: bool
) -> Teacher | None:
    """Loads, locks and shards the towers, before the optimiser takes their parameters.

    Returns:
        The teacher of distillation, if there is one.
    """
    starting.load(clip, kept=_own_scalars(config, learns_temperature=learns_temperature))
    if learns_temperature and starting.resumed is None:
        config.method.check_weights(1 / clip.logit_scale)
    teacher = Teacher.of(config, clip, starting, _logit_scale(clip).device)
    if not learns_temperature:
        _logit_scale(clip).requires_grad_(False)
    if config.adaptation.lora_rank is not None:
        add_updates(clip.towers, config.adaptation, config.seed)
    tower_parts.prepare(clip.towers, config.model, starting.begins_trained)
    if config.parallel.fsdp:
        units = tower_parts.blocks(clip.towers)
        low = clip.autocast_dtype
        fsdp.shard(clip.towers, units, _logit_scale(clip).device, low_precision=low)
    return teacher


def _build_optimizer(
    config: RunConfig, clip: Clip, steps_per_epoch: int, supervision: TokenSupervision | None
) -> Optimizer:
    scaled = clip.precision == "amp_fp16"
    loss_scale = LossScale(_logit_scale(clip).device) if scaled else None
    steps = config.optim.epochs * steps_per_epoch
    head = None if supervision is None else supervision.head
    return Optimizer(clip.towers, config.optim, steps, loss_scale, head)


def _build_loader(
    config: RunConfig, index: Source, clip: Clip, components: NDArray[np.int64] | None
) -> TrainLoader:
    settings = LoaderSettings(
        batch_size=config.data.batch_size,
        accum_freq=config.data.accum_freq,
        rank=collectives.rank(),
        world_size=collectives.world_size(),
        seed=config.seed,
        workers=config.data.workers,
        num_samples=config.data.train_num_samples,
        window=config.data.shuffle_window,
        pin_memory=_logit_scale(clip).device.type == "cuda",
        stall_limit=config.data.data_timeout,
        caption_choice=config.data.caption_choice,
        extras=Extras(
            groups=config.data.false_negatives == "mask",
            pair_weights=config.data.pair_weight_key is not None,
            hard_negatives=config.data.hard_negative_key is not None,
        ),
        components=components,
        decode=ImageDecoder.for_model(
            clip.image_size,
            max_pixels=config.data.max_image_pixels,
            full=config.data.full_decode,
            smallest_crop=(config.data.aug_cfg or AugmentationConfig()).scale[0],
        ),
    )
    return TrainLoader(index, clip.train_transform, clip.tokenize, settings)


def _logit_scale(clip: Clip) -> torch.Tensor:
    scale = clip.towers.logit_scale
    assert isinstance(scale, torch.Tensor)
    return scale


def _announce_end(plan: EvaluationPlan, folder: RunFolder) -> None:
    if plan.best is not None:
        log.info("%s (%s)", plan.best.summary(), folder.best)
    log.info("finished: %s", folder.path)


def _announce_captions(index: Source, data: DataConfig) -> None:
    """Logs which caption is read if samples have several."""
    keys, choice = data.caption_keys_read, data.caption_choice
    if keys is not None and keys.weights:
        shares = zip(keys.names, keys.weights, strict=True)
        total = sum(keys.weights)
        words = ", ".join(f"{name} {weight / total:.0%}" for name, weight in shares)
        log.info("captions: each visit draws one, by key: %s", words)
        return
    numbers = [len(captions) for captions in index.first_captions()]
    if max(numbers, default=0) > 1:
        which = (
            "each visit draws one (--caption-choice first takes the first)"
            if choice == "random"
            else "the first is read (--caption-choice random draws one for each visit)"
        )
        log.info("captions: up to %d per sample; %s", max(numbers), which)


def _announce(run: Components, index: Source, derived: Sequence[Derived]) -> None:
    """Logs method, model, data and length of the run before its first step."""
    config, steps = run.config, run.loader.steps_per_epoch
    millions = count_trained(run.clip.towers).total / 1e6
    log.info(
        "%s: method %s, model %s (%.1f M parameters), %s on %s",
        run.folder.path, config.method.method, run.clip.name, millions,
        run.clip.precision, run.device,
    )  # fmt: skip
    if run.low_rank is not None:
        trained = count_trained(run.clip.towers)
        log.info("LoRA of rank %d trains %s", run.low_rank.rank, trained.text)
    if run.teacher is not None:
        log.info(
            "distillation from %s, weight %g: one more forward pass a step, and its weights",
            config.adaptation.distill_pretrained or "the starting weights", run.teacher.weight,
        )  # fmt: skip
    if run.supervision is not None:
        head = run.supervision.head.tokens
        log.info(
            "token head, weight %g: %.1f M parameters predict %s tokens; it is not exported",
            run.supervision.weight, head.weight.numel() / 1e6, f"{head.out_features:,}",
        )  # fmt: skip
    log.info(
        "%s: %s; %s", config.data.train_data, quantity(len(index), "sample"), run.loader.description
    )
    if run.held_out is not None:
        log.info("%s", run.plan.splits[0].origin)
    _announce_captions(index, config.data)
    if derived:
        log.info("derived (neuclip finetune --dry-run says why): %s", in_short(derived))
    log.info(
        "epochs: %d of %s; pairs per step: %d = %s",
        run.last_epoch, quantity(steps, "step"), run.loader.global_batch_size,
        run.loader.factors,
    )  # fmt: skip
    if config.optim.warmup >= config.optim.epochs * steps:
        log.warning(
            "the warm-up (%s) lasts the whole run (%s): the rate stays below %g",
            quantity(config.optim.warmup, "step"), quantity(config.optim.epochs * steps, "step"),
            config.optim.lr,
        )  # fmt: skip
    if words := config.method.gamma_text(run.loader.global_batch_size):
        log.info("gamma: %s", words)
    if reason := config.method.batch_only(run.last_epoch):
        log.warning("%s", reason)
