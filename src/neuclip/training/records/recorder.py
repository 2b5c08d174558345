"""Passes a run's records, with speed and times, to all sinks; only the main process writes."""

import resource
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

import torch

from neuclip.config.run_config import RunConfig
from neuclip.evaluation.results import EvalResult
from neuclip.masking import mask_tree
from neuclip.parallel import collectives
from neuclip.run_folder import RunFolder, read_records
from neuclip.training.records.sinks import ConsoleSink, JsonLines, Record, Sink
from neuclip.training.records.step_timer import StepTimer
from neuclip.training.records.trackers import trackers
from neuclip.training.warning_signs import WarningSigns


class Recorder:
    """Times the steps between two records, and passes records to the sinks.

    Args:
        config: the run's settings.
        folder: the run folder.
        device: the device of the towers.

    Attributes:
        timer: times the sections of a step.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, device: torch.device) -> None:
        self.timer = StepTimer(device)
        self._config = config
        self._folder = folder
        self._device = device
        self._sinks: list[Sink] = []
        self._console: ConsoleSink | None = None
        self._signs = WarningSigns(config)
        self.start_period()

    @contextmanager
    def open(
        self, done: int, total: int, warm: int = 0, *, keep_later: bool = False
    ) -> Generator[None]:
        """Opens the sinks for the duration of a `with` block.

        Args:
            done: steps done already; records of later steps are dropped.
            total: steps of the whole run.
            warm: batches of the warm start done already; records of later ones are dropped.
            keep_later: keep the records of later steps, in an evaluation without training.
        """
        if not collectives.is_main():
            yield
            return
        tree = mask_tree(self._config.model_dump(mode="json"))
        processes = collectives.world_size()
        with trackers(self._config.output, self._folder.path, tree, processes) as extra:
            start_over = not (keep_later or done or warm)
            kept = sys.maxsize if keep_later else -1 if start_over else done
            lines = JsonLines(self._folder.metrics, kept, warm)
            self._signs = WarningSigns(self._config, read_records(self._folder.metrics))
            self._console = ConsoleSink(total, done)
            self._sinks = [lines, self._console, *extra]
            self.start_period()
            try:
                yield
            finally:
                self._console.close()
                lines.close()

    def is_due(self, step: int) -> bool:
        """Whether a step is recorded: the first, and every `log_every_n_steps`."""
        return step == 1 or step % self._config.output.log_every_n_steps == 0

    def advance(self, step: int) -> None:
        """Counts a step."""
        self.count_step()
        if self._console is not None:
            self._console.advance(step)

    def count_step(self) -> None:
        """Counts a step for the speed, without moving the progress bar."""
        self._steps += 1

    def start_period(self) -> None:
        """Starts the times anew, after a record and after an evaluation."""
        self.timer.reset()
        self._start = time.perf_counter()
        self._steps = 0

    def training(self, values: Mapping[str, float | str | None], global_batch_size: int) -> None:
        """Writes a training record with speed, times and memory; starts a new period."""
        self._step_record("train", values, global_batch_size)

    def warm_start(
        self, number: int, values: Mapping[str, float | str | None], global_batch_size: int
    ) -> None:
        """Writes a record of the warm start, after `number` batches; starts a new period."""
        self._step_record("warm_start", {"warm_step": number, **values}, global_batch_size)

    def _step_record(
        self, kind: str, values: Mapping[str, float | str | None], global_batch_size: int
    ) -> None:
        shares = self.timer.shares()
        seconds = time.perf_counter() - self._start
        record: Record = {
            "kind": kind,
            **values,
            "samples_per_second": round(self._steps * global_batch_size / seconds, 2),
            **{f"share_{name}": round(share, 4) for name, share in sorted(shares.items())},
            "memory_mb": round(_peak_memory_mb(self._device), 1),
            "seconds": round(seconds, 3),
        }
        self._emit(record)
        self._warn_after(record)
        self.start_period()

    def evaluation(self, position: Mapping[str, float], split: str, result: EvalResult) -> None:
        """Writes an evaluation record."""
        metrics = dict(result.metrics)
        record: Record = {"kind": "eval", **position, "split": split, "metrics": metrics}
        if result.data is not None:
            record["data"] = asdict(result.data)
        self._emit(record)
        self._warn_after(record)

    def _warn_after(self, record: Record) -> None:
        """Logs and records the warning signs that a record completes."""
        if not self._sinks:
            return
        position = {key: record[key] for key in ("step", "epoch", "samples_seen")}
        for sign in self._signs.after(record):
            self._emit({"kind": "warning", **position, "sign": sign.name, "subject": sign.subject,
                        "text": sign.text})  # fmt: skip

    def _emit(self, record: Record) -> None:
        for sink in self._sinks:
            sink(record)


def _peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
