"""The content of a checkpoint: everything that an exact resume needs, saved and restored."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from neuclip.checkpoint import storage
from neuclip.checkpoint.common import CheckpointError
from neuclip.checkpoint.entries import own_entry, restoring
from neuclip.checkpoint.rng import random_state, restore_random_state
from neuclip.checkpoint.storage import VerifiedCheckpoint
from neuclip.config.adaptation_section import AdaptationConfig
from neuclip.model.base_weights import ENTRY, LowRankRecord
from neuclip.model.ema import AVERAGES, MOMENTUM, WeightAverage
from neuclip.model.lora import stored_weights
from neuclip.training.components import Components
from neuclip.training.nonfinite import StepMonitor
from neuclip.training.records.data_record import DataRecord

log = logging.getLogger("neuclip")

TOKEN_HEAD = "token_head"
"""The entry of the token head, with its counts, in a checkpoint's `neuclip`."""
BEST_METRIC = "best"
"""The entry of the best metric so far in a checkpoint's `neuclip`."""


def resume_identity(run: Components) -> dict[str, Any]:
    """What must be equal in a checkpoint and in the run that resumes it.

    A resumed run repeats the uninterrupted one bit by bit only if these agree. The checkpoint
    records them, and `RunState.load` refuses another value. Add a new setting here if another value
    gives the resumed run other batches or another shape or meaning of its state. Settings that may
    change on a resume, such as `epochs`, `workers` or `log_every_n_steps`, stay out.
    """
    return {
        "method": run.config.method.method,
        "model": run.clip.name,
        "force_image_size": run.clip.architecture.resized,
        "seed": run.config.seed,
        "val_split": run.config.evaluation.val_split,
        "global_batch_size": run.loader.global_batch_size,
        "steps_per_epoch": run.loader.steps_per_epoch,
        "num_samples": run.num_samples,
        "held_out": run.held_out,
        "order_of_data": run.loader.order_digest,
        "optimizer": run.config.optim.opt,
        "lora": None if run.low_rank is None else _lora(run.config.adaptation, run.low_rank),
        "teacher": None if run.teacher is None else run.teacher.sha256,
        "token_vocabulary": None if run.supervision is None else run.supervision.vocabulary,
        # Last: the settings above change it, too, and say more.
        "parameter_groups": [len(group.parameters) for group in run.optimizer.groups],
    }


def _lora(settings: AdaptationConfig, record: LowRankRecord) -> str:
    """What a resumed run must have in common of LoRA, for comparison and messages."""
    parts = (
        f"rank {record.rank}",
        f"alpha {record.alpha:g}",
        f"targets {settings.lora_targets}",
        f"towers {settings.lora_towers}",
        f"modules to save {settings.lora_modules_to_save or 'none'}",
        f"starting weights sha256:{record.sha256[:16]}",
    )
    return ", ".join(parts)


_UNRECORDED = {"optimizer", "parameter_groups", "lora", "teacher", "token_vocabulary"}
"""What checkpoints of earlier versions do not record."""


class RunState:
    """The state of a run.

    Args:
        run: its components; the towers, the optimiser and the loss hold most of the state.
        monitor: counts the skipped steps.
        data: the record of what was read.
        momentum: the weights of the momentum towers, if the run has some.

    Attributes:
        step: steps done; epoch and position in the data follow from it.
        warm_steps: batches of the warm start done, before the first step.
        average: the moving average of the weights, if the run keeps one.
        saved_at: the newest checkpoint that holds this state or an earlier one; none if there is
            none.
    """

    def __init__(
        self,
        run: Components,
        monitor: StepMonitor,
        data: DataRecord,
        momentum: WeightAverage | None = None,
    ) -> None:
        self._run, self._monitor, self._data = run, monitor, data
        self._momentum = momentum
        self.step = 0
        self.warm_steps = 0
        self.saved_at: Path | None = None
        self._left_metric: dict[str, Any] | None = None  # kept for a later resume that follows it
        decay = run.config.model.model_ema_decay
        self.average = None if decay is None else WeightAverage(run.clip.towers, decay)

    @property
    def batches(self) -> int:
        """Batches used so far, those of the warm start included."""
        return self.warm_steps + self.step

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint: open_clip's layout, with our state in `neuclip`.

        All ranks call this together.
        """
        run = self._run
        given = {AVERAGES: self.average, MOMENTUM: self._momentum}
        averages = {key: each.state_dict() for key, each in given.items() if each is not None}
        best = self._left_metric if run.plan.best is None else run.plan.best.state_dict()
        own = {} if best is None else {BEST_METRIC: best}
        if run.supervision is not None:
            own[TOKEN_HEAD] = run.supervision.head.state_dict()
        return {
            "epoch": self.step // run.loader.steps_per_epoch,
            "name": run.folder.path.name,
            "state_dict": stored_weights(run.clip.towers),
            **averages,
            "optimizer": run.optimizer.state_dict(),
            "neuclip": {
                **resume_identity(run),
                "step": self.step,
                "warm_steps": self.warm_steps,
                "skipped": self._monitor.skipped,
                **self._loss_scale(),
                "fingerprint": self._data.fingerprint(),
                "config": run.config.to_yaml(),
                "architecture": run.clip.architecture.record(),
                **({} if run.low_rank is None else {ENTRY: run.low_rank.entry}),
                "loss": run.loss.state_dict(),
                "damage": self._data.damage(),
                **own,
                **random_state(run.device),
            },
        }

    def load(self, checkpoint: VerifiedCheckpoint) -> None:
        """Restores the state from a checkpoint; all ranks call this together.

        Raises:
            CheckpointError: it is corrupt, or belongs to another model, method, or data.
        """
        run, path = self._run, checkpoint.path
        content = storage.load(checkpoint, live=self._sharded_tensors())
        own = own_entry(content, path)
        if own is None:
            raise CheckpointError(
                f"checkpoint {path} was not written by neuclip: it cannot resume; --pretrained "
                f"{path} starts from its weights"
            )
        for key, value in resume_identity(run).items():
            if own.get(key) != value and (key in own or key not in _UNRECORDED):
                raise CheckpointError(
                    f"checkpoint {path} has {key} {own.get(key)!r}, this run has {value!r}; an "
                    "exact resume needs them equal"
                )
        with restoring(path):
            frozen = run.clip.towers.state_dict() if run.low_rank is not None else {}
            storage.load_weights(run.clip.towers, {**frozen, **content["state_dict"]}, path)
            run.optimizer.load_state_dict(content["optimizer"])
            self._load_average(content, path)
            if self._momentum is not None:
                self._momentum.load_state_dict(content[MOMENTUM])
            storage.load_loss(run.loss, own["loss"], path)
            if run.supervision is not None:
                storage.load_loss(run.supervision.head, own[TOKEN_HEAD], path)
            self.step, self.warm_steps = int(own["step"]), int(own.get("warm_steps", 0))
            self._monitor.skipped = int(own["skipped"])
            self._load_loss_scale(own)
            restore_random_state(own, run.device, run.config.seed + self.step)
            self._data.resume(int(own["fingerprint"]), own["damage"])
            self._load_best(own.get(BEST_METRIC))
        self.saved_at = path
        log.info("resumed %s at step %d%s", path, self.step, self._within_warm_start())

    def _within_warm_start(self) -> str:
        if self.step or not self.warm_steps:
            return ""
        return f", after batch {self.warm_steps} of the warm start"

    def _load_best(self, saved: dict[str, Any] | None) -> None:
        """Restores the best value so far; another metric than before starts without one.

        A run that follows no metric any more keeps the value for one that does again.
        """
        best = self._run.plan.best
        if best is None:
            self._left_metric = saved
            if saved is not None:
                log.warning(
                    "the run followed %s until here and does not any more: %s stays as it is, and "
                    "nothing ends the run early; --best-metric %s continues",
                    saved["name"], self._run.folder.best, saved["name"],
                )  # fmt: skip
            return
        if saved is not None and saved["name"] == best.name:
            best.load_state_dict(saved)
        elif self.step:
            before = "without --best-metric" if saved is None else f"with {saved['name']}"
            log.warning(
                "the run began %s: the best %s counts from step %d on",
                before, best.name, self.step,
            )  # fmt: skip

    def _load_average(self, content: dict[str, Any], path: Path) -> None:
        """Restores the average of the weights; without a saved one it starts at the weights."""
        saved: dict[str, Tensor] | None = content.get(AVERAGES)
        if self.average is not None:
            if saved is None:
                log.warning("%s has no average of the weights: the average starts here", path)
            self.average.load_state_dict(saved or content["state_dict"])
        elif saved is not None:
            log.warning(
                "%s has an average of the weights, but this run keeps none; --model-ema-decay "
                "continues it", path,
            )  # fmt: skip

    def _loss_scale(self) -> dict[str, Any]:
        """The loss scale and the steps that it cost, if the loss is scaled."""
        scale = self._run.optimizer.loss_scale
        if scale is None:
            return {}
        return {"loss_scale": {**scale.state_dict(), "overflows": self._monitor.overflows}}

    def _load_loss_scale(self, own: Mapping[str, Any]) -> None:
        """Restores the loss scale; without a saved one it starts anew."""
        scale = self._run.optimizer.loss_scale
        if scale is not None and "loss_scale" in own:
            scale.load_state_dict(own["loss_scale"])
            self._monitor.overflows = int(own["loss_scale"]["overflows"])

    def _sharded_tensors(self) -> dict[str, Tensor]:
        """Live tensors by their names in a checkpoint; of a sharded one, only a shard is read."""
        weights, optimizer = self._run.clip.towers.state_dict(), self._run.optimizer
        parts = ("state_dict", AVERAGES, MOMENTUM)
        return {
            **{f"{part}/{k}": v for part in parts for k, v in weights.items()},
            **{
                f"optimizer/state/{number}/{moment}": parameter
                for number, parameter in enumerate(optimizer.in_order)
                for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg")
            },
        }
