"""The loop around the step. It knows batches and what a run writes, and names no method.

The state of a run is one number, the steps done: epoch and position in the data follow from it.
"""

import json
import logging
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from neuclip.checkpoint import storage
from neuclip.checkpoint.common import CheckpointError
from neuclip.checkpoint.rng import random_state, restore_random_state
from neuclip.checkpoint.saver import Saver
from neuclip.checkpoint.storage import VerifiedCheckpoint
from neuclip.data.damage import DamageLog, DamageReport
from neuclip.data.loader import Batch
from neuclip.errors import Preempted
from neuclip.files import write_whole
from neuclip.model.ema import AVERAGES, WeightAverage
from neuclip.parallel import collectives, fsdp, process_group
from neuclip.training import oom_advice
from neuclip.training.components import Parts
from neuclip.training.device_prefetch import Feed
from neuclip.training.evaluating import Judge
from neuclip.training.fingerprint import add_to_fingerprint
from neuclip.training.nonfinite_watch import Watch
from neuclip.training.records.recorder import Recorder
from neuclip.training.step import StepResult, TrainingStep

log = logging.getLogger("neuclip")

"""Key of the averaged weights in a checkpoint, beside `state_dict`."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Trainer:
    """Trains, records, judges, saves, and continues where a checkpoint was written.

    Args:
        parts: the run.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.step = 0
        self.damage = DamageLog()  # what this process meets
        self._earlier = DamageLog()  # what the run met before; only the main process has it
        self._begun = 0
        if collectives.is_main():
            self.damage.add(parts.shard_damage)
        self._recorder = Recorder(parts.config, parts.folder, parts.device)
        self._judge = Judge(parts, self._recorder)
        section = self._recorder.timer.section
        # The loader drops the samples that would make the ranks' batches differ in size.
        parts.loss.attach(section=section, equal_batches=True)
        self._update = TrainingStep(
            parts.clip,
            collectives.data_parallel(parts.clip.towers, parts.device),
            parts.loss,
            parts.optimizer,
            parts.device,
            section,
        )
        self._feed = Feed(parts.config.data.accum_freq, parts.device)
        self._watch = Watch(parts.config.optim.max_nonfinite_steps, parts.folder, parts.device)
        decay = parts.config.model.model_ema_decay
        self._average = None if decay is None else WeightAverage(parts.clip.towers, decay)
        self._saver = Saver(
            sharded=fsdp.is_sharded(parts.clip.towers),
            keep_step_checkpoints=parts.config.output.keep_step_checkpoints,
        )
        self.fingerprint = 0
        self._stop_asked = False
        self._rate = 0.0

    # --- the run ----------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the last epoch.

        Raises:
            UserError: the loss is not finite, or too much of the data is damaged.
            Preempted: a signal asked to stop; a checkpoint is written.
        """
        parts, steps = self.parts, self.parts.steps_per_epoch
        with (
            self._recorder.open(self.step, parts.last_epoch * steps),
            self._listening_to_signals(),
            self._saver.open(),
            self._reporting_damage(),
            self._profiler() as profiler,
            process_group.reporting_errors(),
        ):
            if self._judge.is_due(self.step) and not self._judge.has_judged(self.step):
                self._judge_towers()
            for epoch in range(self.step // steps, parts.last_epoch):
                parts.loader.set_position(epoch, self.step % steps)
                for batches in self._timed(iter(parts.loader)):
                    with oom_advice.explained(parts.config):
                        result = self.train_step(batches)
                    self._after_step(batches, result)
                    profiler.step()
                self._end_epoch()

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """One update of the towers (and of whatever the loss trains itself).

        Args:
            batches: the micro-batches of this process.

        Raises:
            UserError: too many steps met numbers that are not finite.
        """
        self._rate = self.parts.optimizer.set_rates(self.step)
        result = self._update(batches, self._stop_asked)
        self.step += 1
        self._watch.add(self.step, self._rate, batches, result.readback)
        return result

    def _after_step(self, batches: Sequence[Batch], result: StepResult) -> None:
        data, every = self.parts.config.data, self.parts.config.output.save_every_steps
        if self._average is not None:
            self._average.update(self.step)
        for batch in batches:
            self.fingerprint = add_to_fingerprint(self.fingerprint, batch.sample_ids)
            for damage in self.damage.add(batch.damage):
                log.warning("damaged: %s", damage)
        seen = (self.step - self._begun) * self.parts.process_batch_size
        self.damage.check(data.max_bad_fraction, seen)
        self._recorder.advance(self.step)
        if self._recorder.is_due(self.step):
            self._record(result)
        if self.step % self.parts.steps_per_epoch == 0:
            return  # the end of the epoch saves
        if self._watch.stop if collectives.is_active() else self._stop_asked:
            self._save_step()
            raise self._preempted()
        if every and self.step % every == 0:
            self._save_step()

    def _end_epoch(self) -> None:
        epoch = self.step // self.parts.steps_per_epoch
        frequency = self.parts.config.output.save_frequency
        if epoch == self.parts.last_epoch or (frequency and epoch % frequency == 0):
            self._save(self.parts.folder.epoch_checkpoint(epoch))
        else:
            self._save_step()
        if self._asked_to_stop():
            raise self._preempted()
        if self._judge.is_due(self.step):
            self._judge_towers()

    def _judge_towers(self) -> None:
        """Judges the towers: the average of their weights, where the run keeps one."""
        average = nullcontext() if self._average is None else self._average.applied()
        with average, fsdp.gathered(self.parts.clip.towers):
            self._judge.judge(self.step)

    def _asked_to_stop(self) -> bool:
        return collectives.any_rank(self._stop_asked)

    def _preempted(self) -> Preempted:
        return Preempted(
            f"stopped by a signal after step {self.step}; --resume auto continues "
            f"{self.parts.folder.path}"
        )

    def _timed(self, batches: Iterator[Batch]) -> Generator[list[Batch]]:
        """The micro-batches of each step, with the waiting counted as `data`."""
        while True:
            with self._recorder.timer.section("data"):
                step = self._feed.next_step(batches)
            if not step:
                return
            yield step

    # --- records ----------------------------------------------------------------------------

    def _record(self, result: StepResult) -> None:
        self._watch.settle()
        values = {
            **self.parts.position(self.step),
            "loss": float(collectives.mean_over_ranks(result.loss.clone())),
            "temperature": self.parts.temperature,
            "logit_scale": 1 / self.parts.temperature,
            "lr": self._rate,
            "grad_norm": float(result.gradient_norm),
            "skipped_steps": self._watch.skipped,
            "samples_fingerprint": f"{self._global_fingerprint():016x}",
            **self.parts.loss.metrics(),
        }
        self._recorder.training(values, self.parts.global_batch_size)

    def _global_fingerprint(self) -> int:
        return sum(collectives.gather_objects(self.fingerprint)) % 2**64

    def _global_damage(self) -> DamageReport:
        """What all processes have met, and the run before."""
        return self._with_earlier(collectives.gather_objects(self.damage.report()))

    def _with_earlier(self, reports: Sequence[DamageReport]) -> DamageReport:
        whole = DamageLog.from_report(self._earlier.report())
        for report in reports:
            whole.add_report(report)
        return whole.report()

    @contextmanager
    def _reporting_damage(self) -> Generator[None]:
        whole: DamageReport | None = None
        try:
            yield
            whole = self._global_damage()
        finally:
            if collectives.is_main():
                # When the run fails the others cannot be asked.
                whole = whole or self._with_earlier([self.damage.report()])
                path = self.parts.folder.data_report
                write_whole(path, json.dumps(whole, indent=2) + "\n")
                if whole["total"]:
                    found = DamageLog.from_report(whole).summary()
                    log.warning("damaged samples or shards met: %s; see %s", found, path)

    def _profiler(self) -> AbstractContextManager[Any]:
        """A trace of ten steps in `trace.json`, when asked for."""
        if not (self.parts.config.output.profile and collectives.is_main()):
            return nullcontext(_NoProfiler())
        path = str(self.parts.folder.trace)
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=10, warmup=2, active=10, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(path),
        )

    # --- stopping ---------------------------------------------------------------------------

    @contextmanager
    def _listening_to_signals(self) -> Generator[None]:
        """A signal only sets a flag: the step in flight ends, and a checkpoint is written.

        SIGTERM is what schedulers send before they kill; SIGUSR1 what Slurm's --signal asks for.
        """

        def ask(signum: int, frame: FrameType | None) -> None:
            log.info("received %s: saving after this step", signal.Signals(signum).name)
            self._stop_asked = True

        before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # --- state ------------------------------------------------------------------------------

    def _save_step(self) -> None:
        self._save(self.parts.folder.step_checkpoint(self.step))

    def _save(self, path: Path) -> None:
        self._watch.settle()
        self._saver.save(path, self.state_dict())

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a resume to be exact."""
        return {
            "method": self.parts.config.method.name,
            "model": self.parts.clip.name,
            "seed": self.parts.config.seed,
            "global_batch_size": self.parts.global_batch_size,
            "steps_per_epoch": self.parts.steps_per_epoch,
            "num_samples": self.parts.num_samples,
            "order_of_data": self.parts.loader.order_digest,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs, in open_clip's layout with our part beside it."""
        parts = self.parts
        averages = {} if self._average is None else {AVERAGES: self._average.state_dict()}
        return {
            "epoch": self.step // parts.steps_per_epoch,
            "name": parts.folder.path.name,
            "state_dict": parts.clip.towers.state_dict(),
            **averages,
            "optimizer": parts.optimizer.state_dict(),
            "neuclip": {
                **self._identity(),
                "step": self.step,
                "skipped": self._watch.skipped,
                "fingerprint": self._global_fingerprint(),
                "config": parts.config.to_yaml(),
                "loss": parts.loss.state_dict(),
                "damage": self._global_damage(),
                **random_state(parts.device),
            },
        }

    def load(self, checkpoint: VerifiedCheckpoint) -> None:
        """Continues from a checkpoint; a collective call.

        Raises:
            CheckpointError: it is damaged, or belongs to another model, method, or data.
        """
        path, parts = checkpoint.path, self.parts
        content = storage.load(checkpoint, live=self._live())
        own = content.get("neuclip")
        if own is None:
            raise CheckpointError(f"checkpoint {path} was not written by neuclip: it cannot resume")
        for key, value in self._identity().items():
            if own.get(key) != value:
                raise CheckpointError(
                    f"checkpoint {path} has {key} {own.get(key)!r}, this run has {value!r}; an "
                    "exact resume needs them equal"
                )
        storage.load_weights(parts.clip.towers, content["state_dict"], path)
        parts.optimizer.load_state_dict(content["optimizer"])
        self._load_average(content, path)
        storage.load_loss(parts.loss, own["loss"], path)
        self.step = self._begun = int(own["step"])
        self._watch.skipped = int(own["skipped"])
        restore_random_state(own, parts.device, parts.config.seed + self.step)
        self.damage = DamageLog()  # what the scan of the shards found is in the report already
        if collectives.is_main():
            self._earlier = DamageLog.from_report(own["damage"])
            self.fingerprint = int(own["fingerprint"])
        log.info("resumed %s at step %d", path, self.step)

    def _load_average(self, content: dict[str, Any], path: Path) -> None:
        """Continues the average of the weights; without a saved one it begins at the weights."""
        saved: dict[str, Tensor] | None = content.get(AVERAGES)
        if self._average is not None:
            if saved is None:
                log.warning("%s holds no average of the weights: it begins here", path)
            self._average.load_state_dict(saved or content["state_dict"])
        elif saved is not None:
            log.warning(
                "%s holds an average of the weights, which this run does not keep; "
                "--model-ema-decay continues it", path,
            )  # fmt: skip

    def _live(self) -> dict[str, Tensor]:
        """What may be sharded, by its name in a checkpoint: only this process's part is read."""
        weights, optimizer = self.parts.clip.towers.state_dict(), self.parts.optimizer
        return {
            **{f"{part}/{k}": v for part in ("state_dict", AVERAGES) for k, v in weights.items()},
            **{
                f"optimizer/state/{number}/{moment}": parameter
                for number, parameter in enumerate(optimizer.in_order)
                for moment in ("exp_avg", "exp_avg_sq")
            },
        }


class _NoProfiler:
    """Stands in for torch's profiler."""

    def step(self) -> None:
        """Does nothing."""
