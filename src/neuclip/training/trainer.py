"""The loop around the step: data, records, evaluation, checkpoints and signals.

It names no method. Epoch and position in the data follow from the number of steps done.
"""

import logging
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from neuclip.checkpoint.best import keep_as_best
from neuclip.checkpoint.saver import Saver
from neuclip.checkpoint.storage import saved_step
from neuclip.data.batch import Batch
from neuclip.errors import Preempted, quantity
from neuclip.interrupts import StopRequest, stop_requests
from neuclip.parallel import collectives, fsdp, process_group
from neuclip.training.components import Components
from neuclip.training.device_prefetch import DevicePrefetcher
from neuclip.training.evaluating import Evaluated, Evaluator
from neuclip.training.loss_arithmetic import loss_arithmetic
from neuclip.training.nonfinite import StepMonitor
from neuclip.training.oom_advice import advice_when_out_of_memory
from neuclip.training.records.data_record import DataRecord
from neuclip.training.records.recorder import Recorder
from neuclip.training.run_state import RunState
from neuclip.training.sameness import equal_captions, mean_cosines
from neuclip.training.step import StepResult, TrainingStep

log = logging.getLogger("neuclip")

WARM_START_EPOCH = 2**30
"""The epoch whose order the warm start reads in: training never gets there, so it reads its first
epoch as it would without a warm start."""


class Trainer:
    """Trains, records, evaluates and saves a run, from its start or from a checkpoint.

    Args:
        run: the components of the run.
        before_save: called on the main process before a checkpoint is written; an error that it
            raises ends the run.

    Attributes:
        state: what a checkpoint holds.
    """

    def __init__(self, run: Components, before_save: Callable[[], None] = lambda: None) -> None:
        config = run.config
        self._run = run
        self._recorder = Recorder(config, run.folder, run.device)
        self._evaluator = Evaluator(run, self._recorder)
        section = self._recorder.timer.section
        # The loader drops incomplete batches, so ranks always hold the same number of pairs.
        arithmetic = loss_arithmetic(config.compute, run.device)
        run.loss.attach(section=section, equal_batches=True, arithmetic=arithmetic)
        self._update = TrainingStep(
            run.clip,
            collectives.data_parallel(run.clip.towers, run.device),
            run.loss,
            run.optimizer,
            run.device,
            section,
            run.teacher,
            run.supervision,
        )
        self._prefetcher = DevicePrefetcher(config.data.accum_freq, run.device)
        self._monitor = StepMonitor(config.optim.max_nonfinite_steps, run.folder, run.device)
        self._data = DataRecord(
            config.data.max_bad_fraction, run.shard_damage, run.data, run.unused
        )
        momentum = self._update.momentum
        average = None if momentum is None else momentum.average
        self.state = RunState(run, self._monitor, self._data, average)
        self._saver = Saver(
            sharded=fsdp.is_sharded(run.clip.towers),
            keep_step_checkpoints=config.output.keep_step_checkpoints,
            before_save=before_save,
        )
        self._stop = StopRequest()
        self._saved_batches = 0
        self._rate = 0.0

    # --- the run ----------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the last epoch.

        Raises:
            UserError: too many steps are not finite, or too many samples are corrupt.
            Preempted: a signal asked to stop; a checkpoint has all steps.
        """
        run, steps = self._run, self._run.loader.steps_per_epoch
        start = self.state.step
        self._saved_batches = self.state.batches
        with (
            self._recorder.open(start, run.last_epoch * steps, self.state.warm_steps),
            stop_requests(self._stop_at_once) as self._stop,
            self._saver.open(),
            self._data.reporting(run.folder),
            self._profiler() as profiler,
            process_group.reporting_errors(),
        ):
            if self._evaluator.is_due(start):
                self._evaluate(self._evaluator.recorded(start) if self.state.batches else {})
            self._check_best()
            self._warm_start()
            for epoch in range(start // steps, run.last_epoch):
                if run.plan.best is not None and run.plan.best.stops:
                    self._stop_early()
                    break
                run.loader.set_position(epoch, self.state.step % steps)
                for batches in self._timed(iter(run.loader)):
                    with advice_when_out_of_memory(run.config):
                        result = self.train_step(batches)
                    self._after_step(batches, result)
                    profiler.step()
                self._end_epoch()

    def _warm_start(self) -> None:
        """Lets the state of optimiser and loss settle on the starting weights, before step 1."""
        total = self._run.config.optim.warm_start_steps
        if self.state.step or not total:
            return
        if self.state.warm_steps < total:
            self._settle(total)
        self._run.optimizer.release()

    def _settle(self, total: int) -> None:
        """Runs the batches of the warm start that are left of all of them."""
        run = self._run
        with self._update.settling():
            while self.state.warm_steps < total:
                epoch, first = divmod(self.state.warm_steps, run.loader.steps_per_epoch)
                stop = min(first + total - self.state.warm_steps, run.loader.steps_per_epoch)
                run.loader.set_position(WARM_START_EPOCH + epoch, first, stop)
                for batches in self._timed(iter(run.loader)):
                    with advice_when_out_of_memory(run.config):
                        result = self._update(batches, self._stop.asked)
                    self._after_warm_step(batches, result)
        self._monitor.read_all()
        log.info("warm start done: %s", self._warm_start_text())

    def _after_warm_step(self, batches: Sequence[Batch], result: StepResult) -> None:
        self.state.warm_steps += 1
        number, every = self.state.warm_steps, self._run.config.output.save_every_steps
        self._monitor.add(number, 0.0, batches, result.readback)
        self._data.add(batches)
        self._recorder.count_step()
        if self._recorder.is_due(number):
            values = self._measured(batches, result)
            self._recorder.warm_start(number, values, self._run.loader.global_batch_size)
        if self._asked_to_stop():
            self._save_step()
            raise self._preempted()
        if every and number % every == 0:
            self._save_step()

    def _warm_start_text(self) -> str:
        """What the warm start has done, in words."""
        number, pairs = self.state.warm_steps, self._run.loader.global_batch_size
        rho = self._run.loss.metrics().get("rho")
        measured = "" if rho is None else f"; rho {rho:.3g} keeps the temperature"
        return f"{quantity(number, 'batch')} of {pairs} pairs, towers unchanged{measured}"

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """Runs one step.

        Args:
            batches: the micro-batches of this rank.

        Raises:
            UserError: too many steps are not finite.
        """
        state = self.state
        self._rate = self._run.optimizer.set_rates(state.step)
        result = self._update(batches, self._stop.asked)
        state.step += 1
        self._monitor.add(state.step, self._rate, batches, result.readback)
        return result

    def _after_step(self, batches: Sequence[Batch], result: StepResult) -> None:
        step, every = self.state.step, self._run.config.output.save_every_steps
        if self.state.average is not None:
            self.state.average.update(step)
        self._data.add(batches)
        self._recorder.advance(step)
        if self._recorder.is_due(step):
            self._record(batches, result)
        if step % self._run.loader.steps_per_epoch == 0:
            return  # the end of the epoch saves
        if self._asked_to_stop():
            self._save_step()
            raise self._preempted()
        if every and step % every == 0:
            self._save_step()

    def _end_epoch(self) -> None:
        run, step = self._run, self.state.step
        epoch = step // run.loader.steps_per_epoch
        frequency = run.config.output.save_frequency
        if epoch == run.last_epoch or (frequency and epoch % frequency == 0):
            self._save(run.folder.epoch_checkpoint(epoch))
        else:
            self._save_step()
        self._stop_if_asked()
        if self._evaluator.is_due(step):
            self._evaluate({})

    def _evaluate(self, done: Evaluated, *, at_end: bool = False) -> None:
        """Evaluates the towers, with the average of their weights if the run keeps one.

        Args:
            done: what was evaluated after this step before the run was interrupted.
            at_end: the run ends here, before its last epoch.
        """
        step, average = self.state.step, self.state.average
        due = self._evaluator.due(step, at_end=at_end)
        sets = [each for each in due if each.key not in done]
        found = dict(done)
        if sets:
            with (
                nullcontext() if average is None else average.applied(),
                fsdp.gathered(self._run.clip.towers),
            ):
                found |= self._evaluator.evaluate(sets, step, self._stop_if_asked)
        if not at_end:
            self._follow_best(found)

    # --- the best checkpoint ----------------------------------------------------------------

    def _follow_best(self, found: Evaluated) -> None:
        """Keeps the checkpoint of this step if it is the best so far; all ranks agree."""
        run, step = self._run, self.state.step
        if run.plan.best is None or run.plan.best.split not in found:
            return
        value = collectives.broadcast_object(run.plan.best.value_in(found[run.plan.best.split]))
        if not run.plan.best.update(value, step, step // run.loader.steps_per_epoch):
            return
        assert self.state.saved_at is not None  # the end of an epoch saves first
        self._saver.keep_best(self.state.saved_at, run.folder.checkpoints)
        if collectives.is_main():
            but = "" if run.plan.best.improves else ", not better than the starting weights"
            log.info(
                "%s is the best so far%s: kept as %s", run.plan.best.name, but, run.folder.best
            )

    def _check_best(self) -> None:
        """In a resumed run, finds the best checkpoint again if it is not the one of its state."""
        best, folder = self._run.plan.best, self._run.folder
        if best is None or best.value is None or not collectives.is_main():
            return
        if folder.best.exists() and saved_step(0, folder.best) == best.step:
            return
        kept = folder.epoch_checkpoint(best.epoch)
        if kept.exists():
            keep_as_best(kept, folder.checkpoints)
        else:
            log.warning("%s, but its checkpoint is gone: %s is missing or of another epoch",
                        best.summary(), folder.best)  # fmt: skip

    def _stop_early(self) -> None:
        """Evaluates what is due at the end of a run only, and says why the run ends."""
        best, step = self._run.plan.best, self.state.step
        assert best is not None
        self._evaluate(self._evaluator.recorded(step), at_end=True)
        if collectives.is_main():
            log.info("stopped early after epoch %d: %s without a better %s",
                     step // self._run.loader.steps_per_epoch,
                     quantity(best.misses, "evaluation"), best.name)  # fmt: skip

    def _timed(self, batches: Iterator[Batch]) -> Generator[list[Batch]]:
        """Yields the micro-batches of each step; the time spent waiting counts as `data`."""
        while True:
            with self._recorder.timer.section("data"):
                step = self._prefetcher.next_step(batches)
            if not step:
                return
            yield step

    def _record(self, batches: Sequence[Batch], result: StepResult) -> None:
        values = {"lr": self._rate, **self._measured(batches, result)}
        self._recorder.training(values, self._run.loader.global_batch_size)

    def _measured(self, batches: Sequence[Batch], result: StepResult) -> dict[str, float | str]:
        """The numbers of a step for its record; waits for the device."""
        self._monitor.read_all()
        run, temperature = self._run, 1 / self._run.clip.logit_scale
        return {
            **run.position(self.state.step),
            "loss": float(collectives.mean_over_ranks(result.loss.clone())),
            "temperature": temperature,
            "logit_scale": 1 / temperature,
            "grad_norm": float(result.gradient_norm),
            "skipped_steps": self._monitor.skipped,
            **self._loss_scale(),
            **_distilled(result),
            **_token_loss(result),
            "samples_fingerprint": f"{self._data.fingerprint():016x}",
            **mean_cosines(result.mean_features, run.loader.global_batch_size),
            "equal_captions": equal_captions(c for batch in batches for c in batch.captions),
            **run.loss.metrics(),
        }

    def _loss_scale(self) -> dict[str, float]:
        """The loss scale and the steps that it cost, if the loss is scaled."""
        loss_scale = self._run.optimizer.loss_scale
        if loss_scale is None:
            return {}
        return {"loss_scale": float(loss_scale.scale), "overflow_steps": self._monitor.overflows}

    def _profiler(self) -> AbstractContextManager[Any]:
        """Records a trace of ten steps in `trace.json`, if `--profile` asks for it."""
        if not (self._run.config.output.profile and collectives.is_main()):
            return nullcontext(_NoProfiler())
        path = str(self._run.folder.trace)
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=10, warmup=2, active=10, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(path),
        )

    # --- checkpoints ------------------------------------------------------------------------

    def _save_step(self) -> None:
        self._save(self._run.folder.step_checkpoint(self.state.step))

    def _save(self, path: Path) -> None:
        self._monitor.read_all()
        self._saver.save(path, self.state.state_dict())
        self._saved_batches = self.state.batches
        self.state.saved_at = self._saver.name_of(path)

    # --- stopping ---------------------------------------------------------------------------

    def _asked_to_stop(self) -> bool:
        """Whether all ranks know after this step that one of them was asked to stop."""
        return self._monitor.stop if collectives.is_active() else self._stop.asked

    def _stop_if_asked(self) -> None:
        """Stops all ranks if a signal asked one of them to; nothing is unsaved here."""
        if collectives.any_rank(self._stop.asked):
            raise self._preempted()

    def _stop_at_once(self, request: StopRequest) -> None:
        """Stops at a signal where no step would be lost: in an evaluation, before a first step.

        Several ranks must stop at the same place, and agree on it in their next step.
        """
        if self.state.batches == self._saved_batches and not collectives.is_active():
            self._stop = request
            raise self._preempted()

    def _preempted(self) -> Preempted:
        step, warm, folder = self.state.step, self.state.warm_steps, self._run.folder.path
        saved = f"after step {step}, which is saved" if step else "before the first step"
        if warm and not step:
            saved = f"after batch {warm} of the warm start, which is saved"
        return Preempted(
            f"stopped by {self._stop.name} {saved}; --resume auto continues {folder}",
            folder.name,
            interrupted=self._stop.signal is signal.SIGINT,
        )


def _distilled(result: StepResult) -> dict[str, float]:
    """The loss of distillation and the divergence from the teacher, if there is one."""
    if result.distilled is None:
        return {}
    loss, divergence = collectives.mean_over_ranks(result.distilled.clone()).tolist()
    return {"distill_loss": loss, "distill_divergence": divergence}


def _token_loss(result: StepResult) -> dict[str, float]:
    """The loss of the token head, if there is one."""
    if result.token_loss is None:
        return {}
    return {"token_loss": float(collectives.mean_over_ranks(result.token_loss.clone()))}


class _NoProfiler:
    """Replaces torch's profiler in runs without `--profile`."""

    def step(self) -> None:
        """Does nothing."""
