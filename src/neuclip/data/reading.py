"""Reading processes: how batches are passed, and what happens when a process dies or stalls.

Batches are passed in shared memory. Where `/dev/shm` has no room for one, such as in a container
with Docker's default of 64 MB, it goes through a pipe instead. A process that has died is reported
by the next request for a batch, never in the middle of a step or of a checkpoint.
"""

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, fields
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, from_numpy
from torch.utils.data import Dataset, get_worker_info

from neuclip.data.batch import Batch, BatchReader, Request, Unreadable
from neuclip.data.watchdog import Overdue, Watchdog, end_overdue_wait
from neuclip.errors import UserError

log = logging.getLogger("neuclip")

STALL_LIMIT = 1800.0
"""Seconds without a batch after which reading fails, unless the settings give another limit."""
WORD_AFTER = 30.0
"""Seconds without a batch after which the wait is reported, and reported again."""
_SHARED_MEMORY = Path("/dev/shm")


# --- in the reading processes -------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Replaces a batch: a user's mistake that only reading has found."""

    message: str


@dataclass(frozen=True)
class PipedBatch:
    """A batch outside of shared memory, which pickles by value.

    Attributes:
        arrays: its tensors, by field.
        rest: its other fields.
        room: bytes free in shared memory when it did not fit.
    """

    arrays: dict[str, NDArray[Any]]
    rest: dict[str, Any]
    room: int

    def unpack(self) -> Batch:
        """The batch; reports once per process that shared memory is full."""
        _report_full(sum(array.nbytes for array in self.arrays.values()), self.room)
        tensors = {name: from_numpy(array) for name, array in self.arrays.items()}
        return Batch(**tensors, **self.rest)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; torch calls this."""
        return self.unpack().pin_memory()


Passed = Batch | PipedBatch | Unreadable | Refused


class PassingReader(Dataset[Passed]):
    """A reader whose batches can be passed from a reading process to the main process."""

    def __init__(self, reader: BatchReader) -> None:
        self.reader = reader

    def __getitem__(self, request: Request) -> Passed:
        try:
            batch = self.reader[request]
        except UserError as error:
            return Refused(str(error))
        if get_worker_info() is None or isinstance(batch, Unreadable):
            return batch
        return _shared(batch)


def _shared(batch: Batch) -> Batch | PipedBatch:
    """The batch in shared memory; if that has no room, the batch as it goes through a pipe."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    try:
        for tensor in tensors.values():
            tensor.share_memory_()
    except (RuntimeError, OSError):
        rest = {name: value for name, value in values.items() if name not in tensors}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        return PipedBatch(arrays, rest, _free_shared_memory())
    return batch


# --- in the main process ------------------------------------------------------------------------


class Reading:
    """The batches of a loader, with its reading processes in view.

    Args:
        batches: torch's loader of a `PassingReader`; its timeout is `WORD_AFTER`.
        stall_limit: seconds without a batch after which reading fails.
    """

    def __init__(self, batches: Iterable[Passed], stall_limit: float = STALL_LIMIT) -> None:
        self._batches, self._limit = batches, stall_limit
        self._processes: list[BaseProcess] = []

    def start(self) -> Iterator[Batch | Unreadable]:
        """Starts the reading processes, if there are any, and returns the batches.

        Raises:
            UserError: (while iterating) a process has died or stalled, or met a user's mistake.
        """
        before = set(multiprocessing.active_children())
        try:
            iterator = iter(self._batches)
        except RuntimeError as error:
            if not _is_timeout(error):
                raise
            raise self._stalled(WORD_AFTER) from None
        self._processes += set(multiprocessing.active_children()) - before
        _take_over_child_signals()
        return self._results(iterator)

    def _results(self, iterator: Iterator[Passed]) -> Iterator[Batch | Unreadable]:
        with self._nexts(iterator) as take:
            while (result := take()) is not None:
                if isinstance(result, Refused):
                    raise UserError(result.message)
                yield result.unpack() if isinstance(result, PipedBatch) else result

    @contextlib.contextmanager
    def _nexts(self, iterator: Iterator[Passed]) -> Generator[Callable[[], Passed | None]]:
        """A function that returns the next result, or none at the end."""
        if self._processes:
            yield lambda: self._next(iterator)
            return
        watchdog = Watchdog(self._report, WORD_AFTER, self._limit)
        with watchdog.watching():
            yield lambda: self._read_here(iterator, watchdog)

    def _read_here(self, iterator: Iterator[Passed], watchdog: Watchdog) -> Passed | None:
        """The next result, which this process reads itself."""
        start = time.monotonic()
        try:
            with watchdog.wait():
                return next(iterator, None)
        except Overdue:
            raise self._stalled(time.monotonic() - start) from None

    def _next(self, iterator: Iterator[Passed]) -> Passed | None:
        """The next result; none at the end."""
        start = time.monotonic()
        while True:
            try:
                with _failing_on_death(self._processes):
                    return next(iterator, None)
            except RuntimeError as error:
                if not _is_timeout(error):
                    _check_alive(self._processes)
                    raise
            waited = time.monotonic() - start
            if waited >= self._limit:
                raise self._stalled(waited)
            self._report(waited)

    def _report(self, waited: float) -> None:
        log.warning("no batch for %.0f s: %s", waited, self._advice())

    def _stalled(self, waited: float) -> UserError:
        """Ends the reading processes, which would not end by themselves."""
        advice = self._advice()
        for process in self._processes:
            process.kill()
        return UserError(
            f"no batch for {waited:.0f} s, the limit of --data-timeout: {advice}. --resume auto "
            "continues from the last checkpoint"
        )

    def _advice(self) -> str:
        stopped = [process.pid for process in self._processes if _state(process) == "T"]
        if stopped:
            return f"reading processes are stopped: {_listed(stopped)} (`kill -CONT` continues one)"
        waiting = [process.pid for process in self._processes if _state(process) == "D"]
        if waiting:
            return f"waiting for the disk or network that holds the data: {_listed(waiting)}"
        if not self._processes:
            return "the data are slow to read; this process reads them (--workers 0)"
        return f"the data are slow to read; reading processes: {_listed(self._pids())}"

    def _pids(self) -> list[int | None]:
        return [process.pid for process in self._processes]


def _is_timeout(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader timed out")


def _listed(pids: list[int | None]) -> str:
    return ", ".join(map(str, pids))


def _state(process: BaseProcess) -> str:
    """The state of a process as Linux gives it: R, S, D (in I/O), T (stopped); "" elsewhere."""
    try:
        content = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return ""
    return content.rpartition(")")[2].split()[0]


def _check_alive(processes: list[BaseProcess]) -> None:
    """Checks that no process has died.

    Raises:
        UserError: one has; names the likely reason, and what helps.
    """
    for process in processes:
        code = process.exitcode
        if code:
            raise UserError(
                f"reading process {process.pid} {_ending(code)}. The checkpoints are complete: "
                "--resume auto continues from the last one"
            )


def _ending(code: int) -> str:
    """How a process ended, and what helps."""
    if code == -signal.SIGKILL:
        return (
            "was killed (SIGKILL), most often because memory ran out (`dmesg` or the scheduler's "
            "log shows it): lower --workers, or raise the job's memory"
        )
    if code == -signal.SIGBUS:
        return (
            f"lost its memory (SIGBUS): {_SHARED_MEMORY} is full ({_free_shared_memory():,} bytes "
            "free), or a file was cut while it was read. In a container, start it with "
            "--shm-size=8g or --ipc=host"
        )
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return (
                f"crashed ({name}), most often while it decoded a damaged image: "
                "`neuclip data inspect` reads the data; --workers 0 reads in the main process"
            )
    return (
        f"ended with exit code {code}; --workers 0 reads in the main process, and shows the error"
    )


class _Died(Exception):
    """A reading process has died while the main process waited for it."""


_awaited: list[BaseProcess] = []
"""The processes that the main thread waits for."""


@contextlib.contextmanager
def _failing_on_death(processes: list[BaseProcess]) -> Generator[None]:
    """Fails at once if one of the processes dies within the block, or has died before."""
    if not processes or threading.current_thread() is not threading.main_thread():
        yield
        return
    _check_alive(processes)
    _awaited[:] = processes
    try:
        yield
    except _Died:
        _check_alive(processes)
    finally:
        _awaited.clear()


def _take_over_child_signals() -> None:
    """Replaces torch's handler of SIGCHLD, which raises an error wherever the program is."""
    global _handler
    before = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or before is _handler:
        return

    def child_ended(number: int, frame: FrameType | None) -> None:
        if callable(before):
            with contextlib.suppress(RuntimeError):
                before(number, frame)
        if any(process.exitcode for process in _awaited):
            raise _Died
        end_overdue_wait()

    _handler = child_ended
    signal.signal(signal.SIGCHLD, child_ended)


_handler: Callable[[int, FrameType | None], None] | None = None


def _free_shared_memory() -> int:
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return 0


_reported_full = False


def _report_full(needed: int, room: int) -> None:
    global _reported_full
    if _reported_full:
        return
    _reported_full = True
    log.warning(
        "%s has %s MB left, too little for a batch of %s MB: such batches go through pipes, which "
        "is slower. For full speed start the container with --shm-size=8g or --ipc=host, or lower "
        "--workers",
        _SHARED_MEMORY, f"{room / 1e6:.1f}", f"{needed / 1e6:.1f}",
    )  # fmt: skip


def _after_fork() -> None:
    _awaited.clear()


os.register_at_fork(after_in_child=_after_fork)
