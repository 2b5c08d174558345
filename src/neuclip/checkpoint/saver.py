"""When a checkpoint is written, which older ones are deleted, and which rank waits for which."""

import logging
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuclip.checkpoint import sharded, storage
from neuclip.checkpoint.best import keep_as_best
from neuclip.checkpoint.common import CheckpointError, not_written, remove, remove_partial
from neuclip.parallel import collectives, fsdp

log = logging.getLogger("neuclip")


class Saver:
    """Writes a run's checkpoints.

    Unsharded towers are saved in one file, which the first rank writes while the others wait.
    Sharded towers are saved in a folder: each rank writes its shard while training continues, and
    the folder gets its name when all ranks are done.

    Args:
        sharded: whether the towers are sharded.
        keep_step_checkpoints: number of step checkpoints to keep.
        before_save: called on the main process before a checkpoint is written.
    """

    def __init__(
        self,
        *,
        sharded: bool,
        keep_step_checkpoints: int,
        before_save: Callable[[], None] = lambda: None,
    ) -> None:
        self._before_save = before_save
        self._keep = keep_step_checkpoints
        self._group = fsdp.background_group() if sharded else None
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[Path, Future[Any]] | None = None

    @contextmanager
    def open(self) -> Generator[None]:
        """For the duration of a run; waits for a pending checkpoint at the end.

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
        """Writes a checkpoint, or starts to; a collective call.

        Args:
            path: the file; a sharded checkpoint takes the name without `.pt`.
            content: the tree to save.

        Raises:
            CheckpointError: this checkpoint, or the pending one, cannot be written.
        """
        self.finish()
        if collectives.is_main():
            self._before_save()
        if self._group is None:
            if collectives.is_main():
                storage.save(path, content)
                self._announce(path)
            collectives.barrier()
            return
        folder = self.name_of(path)
        written = sharded.begin(folder, content, self._group)
        if collectives.is_main():
            written = self._threads.submit(self._name, folder, written)
        self._pending = (folder, written)

    def name_of(self, path: Path) -> Path:
        """The checkpoint that `save` writes for a path: a sharded one has no `.pt`."""
        return path if self._group is None else path.with_suffix("")

    def keep_best(self, path: Path, folder: Path) -> None:
        """Keeps a checkpoint as the best one of the run; a collective call.

        Args:
            path: the checkpoint.
            folder: the checkpoints of the run.

        Raises:
            CheckpointError: the pending checkpoint, or this one, cannot be written.
        """
        self.finish()
        if collectives.is_main():
            self._before_save()
            keep_as_best(path, folder)
        collectives.barrier()

    def finish(self) -> None:
        """Waits for the pending checkpoint; a collective call.

        Raises:
            CheckpointError: it could not be written; on all ranks.
        """
        if self._pending is None:
            return
        (path, written), self._pending = self._pending, None
        problem: CheckpointError | None = None
        try:
            sharded.wait(path, written)
        except CheckpointError as error:
            problem = error
        if collectives.any_rank(problem is not None):
            raise problem or CheckpointError(f"another process could not write checkpoint {path}")

    def _name(self, folder: Path, written: Future[Any]) -> None:
        """Completes a sharded checkpoint after all ranks have written their shards."""
        sharded.wait(folder, written)
        try:
            sharded.finish(folder)
        except OSError as error:
            raise not_written(folder, error) from None
        self._announce(folder)

    def _announce(self, path: Path) -> None:
        """Makes a complete checkpoint the latest one and tidies the folder.

        The other form of the same checkpoint goes, which a run leaves that is continued with or
        without --fsdp.
        """
        try:
            remove(path.with_suffix("") if path.suffix else path.with_suffix(".pt"))
            storage.point_latest_at(path)
            if path.name.startswith("iter_"):
                storage.drop_old_step_checkpoints(path.parent, self._keep)
            remove_partial(path.parent)  # no other save is in progress now
        except OSError as error:
            raise not_written(path, error) from None
