"""What became of the steps: read one step late on CUDA, at once elsewhere."""

import json
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuclip.data.batch import Batch
from neuclip.errors import UserError
from neuclip.files import write_whole
from neuclip.parallel import collectives
from neuclip.run_folder import RunFolder
from neuclip.training.nonfinite import ELSEWHERE, Readback

log = logging.getLogger("neuclip")


@dataclass(frozen=True)
class _Step:
    """A step that was asked for."""

    number: int
    rate: float
    batches: Sequence[Batch]
    readback: Readback


class Watch:
    """Counts the steps that were skipped, and ends the run when they are too many.

    Args:
        limit: `--max-nonfinite-steps`.
        folder: where the batches of such steps are listed.
        device: what the steps run on.

    Attributes:
        skipped: so many were not finite.
        stop: a process was asked to stop; the same on all of them at the same step.
    """

    def __init__(self, limit: int, folder: RunFolder, device: torch.device) -> None:
        self._limit, self._folder = limit, folder
        self._late = 1 if device.type == "cuda" else 0
        self._steps: deque[_Step] = deque()
        self.skipped = 0
        self.stop = False

    def add(self, number: int, rate: float, batches: Sequence[Batch], readback: Readback) -> None:
        """A step was asked for; reads the verdict of an earlier one.

        Args:
            number: of the step, from 1.
            rate: its learning rate.
            batches: what it read.
            readback: its verdict.

        Raises:
            UserError: too many steps were not finite.
        """
        self._steps.append(_Step(number, rate, batches, readback))
        self._settle(self._late)

    def settle(self) -> None:
        """Waits for all verdicts, as before a checkpoint.

        Raises:
            UserError: too many steps were not finite.
        """
        self._settle(0)

    def _settle(self, open_steps: int) -> None:
        while len(self._steps) > open_steps:
            step = self._steps.popleft()
            verdict = step.readback.read()
            self.stop = self.stop or verdict.stop
            if verdict.problem is not None:
                self._skip(step, _named(verdict.problem), verdict.temperature)

    def _skip(self, step: _Step, problem: str, temperature: float) -> None:
        """Lists the batch of a step that left the towers as they were.

        Raises:
            UserError: says where it happened and what usually helps.
        """
        self.skipped += 1
        where = (
            f"{problem}; step {step.number}, temperature {temperature:.4g}, learning rate "
            f"{step.rate:.3g}"
        )
        path = self._folder.nonfinite_step(step.number, collectives.rank())
        found = {
            "problem": where,
            "keys": [key for batch in step.batches for key in batch.keys],
            "sample_ids": [i for batch in step.batches for i in batch.sample_ids.tolist()],
        }
        write_whole(path, json.dumps(found, indent=1) + "\n")
        if self.skipped > self._limit:
            raise UserError(
                f"{where}; the batch is listed in {path}. The last checkpoint is intact. Lower "
                "--lr, raise --warmup, clip with --grad-clip-norm 1.0, or let some steps be "
                f"skipped with --max-nonfinite-steps (now {self._limit})"
            )
        log.warning(
            "skipped: %s (%d of at most %d); see %s", where, self.skipped, self._limit, path
        )


def _named(problem: str) -> str:
    """The problem of the first process that has one, and which that is; all call this together."""
    found = collectives.first_of(None if problem == ELSEWHERE else problem)
    if found is None or not collectives.is_active():
        return problem
    return f"process {found[0]}: {found[1]}"
