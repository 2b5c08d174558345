"""Evaluates a checkpoint as training does, without training.

So do `--resume CHECKPOINT --epochs 0` and, as in open_clip, `--pretrained WEIGHTS` with evaluation
data and without training data. Any checkpoint of open_clip's layout is accepted; `--model` gives
the architecture, unless the checkpoint records it.
"""

import logging
import time
from pathlib import Path

import torch

from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError
from neuclip.evaluation.evaluate import EvaluationSet, evaluate_sets
from neuclip.evaluation.interfaces import EvaluatedModel
from neuclip.evaluation.splits import open_splits, require_label_classes, with_templates
from neuclip.files import write_whole
from neuclip.model.checkpoint_choice import CheckpointChoice
from neuclip.model.clip import Clip
from neuclip.model.device import choose_precision
from neuclip.model.encoder import Encoder
from neuclip.model.opened_checkpoint import Checkpoint, open_checkpoint
from neuclip.model.starting_weights import with_model_of_weights
from neuclip.parallel import collectives
from neuclip.parallel.folder_lock import FolderLock
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import RunFolder
from neuclip.training.evaluating import evaluation_settings
from neuclip.training.evaluation_plan import open_zero_shot
from neuclip.training.open_run import open_run_folder
from neuclip.training.records.recorder import Recorder
from neuclip.training.records.run_log import log_to
from neuclip.training.records.trackers import check_packages

log = logging.getLogger("neuclip")


def evaluate_checkpoint(config: RunConfig, device: torch.device) -> Path:
    """Evaluates the checkpoint that `resume` or `pretrained` names.

    The results go to the run folder. It may be the checkpoint's own: earlier records stay.

    Args:
        config: the run's settings, which only evaluate.
        device: the device of the towers.

    Returns:
        The run folder.

    Raises:
        UserError: the checkpoint is missing or has another architecture, or no evaluation data is
            given.
    """
    from_main(lambda: check_packages(config.output))
    config = config.model_copy(update={"model": with_model_of_weights(config.model)})
    evaluation = config.evaluation
    val_data = evaluation.val_data if evaluation.val_frequency else None
    splits = open_splits(val_data, config.data)
    require_label_classes(splits, config.data)
    splits = with_templates(splits, evaluation.val_templates)
    sets = open_zero_shot(evaluation) if evaluation.zeroshot_frequency else []
    if not splits and not sets:
        raise UserError(
            "this line only evaluates, and no evaluation data is given: add "
            "--imagenet-val, --imagenet-v2, --eval-tasks or --val-data, with a frequency above 0"
        )
    with FolderLock() as lock:
        return _evaluate(config, device, [*splits, *sets], lock)


def _evaluate(
    config: RunConfig, device: torch.device, sets: list[EvaluationSet], lock: FolderLock
) -> Path:
    """Evaluates into the run folder that the lock is acquired for."""
    folder, checkpoint, config = _open(config, lock)
    precision = choose_precision(config.model.precision, device)
    clip = checkpoint.build_clip(precision, device)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"name": clip.name})}
    )
    if checkpoint.config is not None:
        config = config.model_copy(update={"method": checkpoint.config.method})
    main = collectives.is_main()
    log_to(folder.log if main else None)
    if main and not folder.config.exists():
        write_whole(folder.config, config.to_yaml())
    average = "the moving average of " if checkpoint.averaged else ""
    log.info(
        "evaluating %s%s (%s, %s on %s) without training",
        average, checkpoint.shown, clip.name, precision, device,
    )  # fmt: skip
    recorder, position = Recorder(config, folder, device), _position(checkpoint)
    model, settings = _model(checkpoint, clip, device), evaluation_settings(config)
    step, results = int(position["step"]), folder.results(int(position["epoch"]))
    with recorder.open(step, step, keep_later=True):
        for done in evaluate_sets(model, sets, settings, results):
            recorder.evaluation(position, done.data.key, done.result)
    log.info("wrote %s", results)
    return folder.path


def _open(config: RunConfig, lock: FolderLock) -> tuple[RunFolder, Checkpoint, RunConfig]:
    """The folder for the results, the checkpoint, and the settings with the folder's name."""
    resume, arch = config.resume, config.model.given_name
    weights = str(resume or config.model.pretrained)
    label = config.model.short_name if arch else Path(weights).stem
    now = f"eval-{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    name = config.name or from_main(lambda: now)
    folder, start = from_main(lambda: open_run_folder(config.output.logs, name, resume, lock))
    if start is None and resume is not None:
        raise UserError(f"this line only evaluates, and {folder.checkpoints} has no checkpoint")
    path = Path(weights) if start is None else start.path
    choice = CheckpointChoice(path, arch=arch, changes=config.model)
    checkpoint = open_checkpoint(choice, verified=start is not None)
    return folder, checkpoint, config.model_copy(update={"name": name})


def _model(checkpoint: Checkpoint, clip: Clip, device: torch.device) -> EvaluatedModel:
    """The towers, and the loss if neuclip wrote the checkpoint."""
    encoder = Encoder(clip, device)
    if checkpoint.config is None:
        return EvaluatedModel(encoder)
    loss = checkpoint.build_loss(clip, device)
    return EvaluatedModel(encoder, loss, clip.logit_scale, checkpoint.global_batch_size)


def _position(checkpoint: Checkpoint) -> dict[str, float]:
    """The position in the run that wrote the checkpoint, as far as it is recorded."""
    return {
        "step": checkpoint.step,
        "epoch": checkpoint.epoch or 0,
        "samples_seen": checkpoint.step * checkpoint.global_batch_size,
    }
