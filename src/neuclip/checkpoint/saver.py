"""When a checkpoint is written, what becomes of the older ones, and who waits for whom."""

import logging
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuclip.checkpoint import sharded, storage
from neuclip.checkpoint.common import CheckpointError, not_written
from neuclip.parallel import collectives, fsdp

log = logging.getLogger("neuclip")


class Saver:
    """Writes a run's checkpoints.

    Unsharded towers go into one file, which the first process writes while the others wait. Sharded
    towers go into a folder: each process writes its part while training goes on, and the folder
    gets its name when all are done.

    Args:
        sharded: which of the two.
        keep_step_checkpoints: how many step checkpoints stay.
    """

    def __init__(self, *, sharded: bool, keep_step_checkpoints: int) -> None:
        self._keep = keep_step_checkpoints
        self._group = fsdp.background_group() if sharded else None
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[Path, Future[Any]] | None = None

    @contextmanager
    def open(self) -> Generator[None]:
        """For the duration of a run; what was begun is ended before it is left.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        try:
            yield
        except BaseException:
            try:
                self.finish()
            except CheckpointError as error:
                log.warning("%s", error)
            raise
        else:
            self.finish()
        finally:
            self._threads.shutdown()

    def save(self, path: Path, content: dict[str, Any]) -> None:
        """Writes a checkpoint, or begins to; all processes call this together.

        Args:
            path: its file's name.
            content: what it holds.

        Raises:
            CheckpointError: it, or the one begun before, cannot be written.
        """
        self.finish()
        if self._group is None:
            if collectives.is_main():
                storage.save(path, content)
                self._announce(path)
            collectives.barrier()
            return
        folder = path.with_suffix("")
        written = sharded.begin(folder, content, self._group)
        if collectives.is_main():
            written = self._threads.submit(self._name, folder, written)
        self._pending = (folder, written)

    def finish(self) -> None:
        """Waits for what was begun; all processes call this together.

        Raises:
            CheckpointError: it could not be written; on all processes.
        """
        if self._pending is None:
            return
        (path, written), self._pending = self._pending, None
        problem: CheckpointError | None = None
        try:
            sharded.wait(path, written)
        except CheckpointError as error:
            problem = error
        except OSError as error:  # giving the folder its name
            problem = not_written(path, error)
        if collectives.any_rank(problem is not None):
            raise problem or CheckpointError(f"another process could not write checkpoint {path}")

    def _name(self, folder: Path, written: Future[Any]) -> None:
        """Ends a sharded checkpoint once all processes have written their parts."""
        sharded.wait(folder, written)
        sharded.finish(folder)
        self._announce(folder)

    def _announce(self, path: Path) -> None:
        storage.point_latest_at(path)
        if path.name.startswith("iter_"):
            storage.drop_old_step_checkpoints(path.parent, self._keep)
