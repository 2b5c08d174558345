"""`--resume CHECKPOINT --epochs 0`: a checkpoint is judged as a run would, and nothing is trained.

No training data are read. Any checkpoint of open_clip's layout will do; `--model` says which
architecture it has.
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from neuclip.checkpoint import storage
from neuclip.config.run_config import RunConfig, validate
from neuclip.errors import UserError
from neuclip.evaluation.results import read_eval_results, write_result
from neuclip.model import ema
from neuclip.model.clip import Clip, build_clip, init_for
from neuclip.model.device import choose_precision
from neuclip.model.encoder import Encoder
from neuclip.model.restore import restore_loss
from neuclip.parallel import collectives
from neuclip.parallel.work_sharing import from_main
from neuclip.run_folder import RunFolder
from neuclip.training.evaluating import Subject, judge_all, open_splits, open_zero_shot
from neuclip.training.open_run import log_to, open_run_folder
from neuclip.training.records.recorder import Recorder

log = logging.getLogger("neuclip")


def judge_only(config: RunConfig, device: torch.device) -> Path:
    """Judges the checkpoint that `resume` names.

    The results go to the run's folder, which may be that of the checkpoint: nothing in it is lost.

    Args:
        config: the run's settings; `optim.epochs` is 0.
        device: where the towers live.

    Returns:
        The run folder.

    Raises:
        UserError: there is no such checkpoint, it is of another architecture, or there is nothing
            to judge it on.
    """
    log_to(None)
    evaluation = config.evaluation
    splits = open_splits(evaluation.val_data if evaluation.val_frequency else None)
    sets = open_zero_shot(evaluation) if evaluation.zeroshot_frequency else []
    if not splits and not sets:
        raise UserError(
            "--epochs 0 with --resume only judges, and there is nothing to judge on: give "
            "--imagenet-val, --imagenet-v2, --eval-tasks or --val-data, with a frequency above 0"
        )
    folder, path, config = _open_folder(config)
    content, averaged = ema.judged(storage.load(path, bare=True))
    precision = choose_precision(config.model.precision, device)
    clip = build_clip(config.model.name, precision, device, init_for(content["state_dict"]))
    storage.load_weights(clip.towers, content, path)
    own = content.get("neuclip")
    if own is not None:  # the record says by which method it was trained
        method = validate(yaml.safe_load(own["config"]), str(path)).method
        config = config.model_copy(update={"method": method})
    main = collectives.is_main()
    log_to(folder.log if main else None)
    if main and not folder.config.exists():
        folder.config.write_text(config.to_yaml(), encoding="utf-8")
    what = f"the moving average of {path}" if averaged else str(path)
    log.info("judging %s (%s, %s on %s); nothing is trained", what, clip.name, precision, device)
    recorder, position = Recorder(config, folder, device), _position(content)
    subject = _subject(clip, content, path, device)
    step, results = int(position["step"]), folder.results(int(position["epoch"]))
    before = read_eval_results(results) if results.exists() else []
    whole = {line.key for line in before if line.provenance is not None}  # the benchmark's own
    with recorder.open(step, step, keep_later=True):
        for result in judge_all(subject, splits, sets, config, folder.path):
            if main and result.key not in whole:
                write_result(results, result)
            if main:
                recorder.evaluation(position, result.key, result.metrics)
    log.info("written to %s", results)
    return folder.path


def _open_folder(config: RunConfig) -> tuple[RunFolder, Path, RunConfig]:
    """The folder of the results, the checkpoint, and the settings with the folder's name."""
    name = config.name or f"eval-{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = config.model_copy(update={"name": from_main(lambda: name)})
    assert config.name is not None
    folder, path = open_run_folder(config.output.logs, config.name, config.resume)
    if path is None:
        raise UserError(f"--epochs 0 only judges, and {folder.checkpoints} has no checkpoint")
    return folder, path, config


def _subject(clip: Clip, content: dict[str, Any], path: Path, device: torch.device) -> Subject:
    """The towers; of a checkpoint of ours also its loss, whole on every process."""
    encoder, own = Encoder(clip, device), content.get("neuclip")
    if own is None:
        return Subject(encoder)
    loss = restore_loss(content, clip, path, device)
    return Subject(encoder, loss, clip.logit_scale, int(own["global_batch_size"]))


def _position(content: dict[str, Any]) -> dict[str, float]:
    """Where the run was that wrote the checkpoint, as far as it says so."""
    own = content.get("neuclip") or {"step": 0, "global_batch_size": 0}
    step = int(own["step"])
    return {
        "step": step,
        "epoch": int(content.get("epoch", 0)),
        "samples_seen": step * int(own["global_batch_size"]),
    }
