"""Joins the processes of a run: rendezvous, failure detection, waiting, and leaving together.

`parallel.collectives` has the operations that they compute together.
"""

import logging
import os
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from neuclip import console
from neuclip.errors import OtherProcessFailed, Preempted, UserError
from neuclip.parallel.heartbeat import Failure, Heartbeat
from neuclip.parallel.launch import Launch, hostname, launch_environment, under_torchrun
from neuclip.parallel.rendezvous import hosts_store, open_store

log = logging.getLogger("neuclip")

_LOST_PEER = ("gloo", "nccl", "process group", "connection closed", "connection reset")
"""Words in torch's RuntimeError after another process has left a collective."""


@dataclass(frozen=True)
class WaitLimits:
    """How long processes wait for each other.

    Attributes:
        timeout: seconds for the rendezvous at the start, and for a collective.
        silence: seconds without a heartbeat after which a process counts as dead.
    """

    timeout: float = 600.0
    silence: float = 30.0


class JoinedGroup:
    """The joined processes of a run.

    Args:
        launch: the place of this process.
        store: shared by all processes.
        heartbeat: failure detection, already started.
    """

    def __init__(self, launch: Launch, store: Store, heartbeat: Heartbeat) -> None:
        self.launch, self.heartbeat = launch, heartbeat
        self._store = store
        self._waits = 0

    def wait_for_all(self) -> None:
        """Returns once every process has called this, without a time limit while all live.

        Raises:
            OtherProcessFailed: another process failed first.
        """
        self._waits += 1
        go = f"wait/{self._waits}/go"
        if self._store.add(f"wait/{self._waits}", 1) == self.launch.world_size:
            self._store.set(go, "")
        while True:
            if self.heartbeat.failure is not None:
                raise OtherProcessFailed(str(self.heartbeat.failure))
            try:
                self._store.wait([go], timedelta(seconds=2))
            except dist.DistStoreError:
                continue  # some are still missing
            return

    def leave(self) -> None:
        """Waits for all processes, then leaves; the process that hosts the store leaves last."""
        self.wait_for_all()
        self.heartbeat.stop()
        gone, end = self._store.add("gone", 1), time.monotonic() + self.heartbeat.grace
        while hosts_store(self.launch) and gone < self.launch.world_size:
            if time.monotonic() > end:
                return
            time.sleep(0.02)
            gone = self._store.add("gone", 0)


_joined: JoinedGroup | None = None


def joined() -> JoinedGroup | None:
    """The group that this process has joined; none for a single process."""
    return _joined


@contextmanager
def open_process_group(
    device: torch.device, limits: WaitLimits = WaitLimits()
) -> Generator[Launch]:
    """Joins the processes that the launcher started, for the duration of a `with` block.

    If one of them fails, dies or falls silent, the block ends on all of them. Messages below the
    level WARNING come from the main process only.

    Args:
        device: device of this process; a GPU selects NCCL, a CPU gloo.
        limits: how long to wait for the others.

    Yields:
        The place of this process.

    Raises:
        UserError: the rendezvous failed.
        OtherProcessFailed: another process failed first; names it and the reason.
    """
    launch = launch_environment()
    if launch.world_size == 1 or dist.is_initialized():
        yield launch
        return
    stopped: Preempted | None = None
    shown = console.warnings_only() if launch.rank else nullcontext()
    with shown, _joining(launch, device, limits) as group:
        try:
            yield launch
        except Preempted as stop:  # on all processes, after the same step
            stopped = stop
        group.leave()
    if stopped is not None:
        raise stopped


@contextmanager
def reporting_errors() -> Generator[None]:
    """Reports an error in a `with` block to the other processes before it leaves outer blocks.

    Leaving those may need the other processes, which must not wait for this one meanwhile.
    """
    try:
        yield
    except Preempted:
        raise
    except BaseException as error:
        if _joined is not None and not _follows_from_another(error):
            _joined.heartbeat.report(_own_failure(error, _joined.launch))
        raise


@contextmanager
def _joining(launch: Launch, device: torch.device, limits: WaitLimits) -> Generator[JoinedGroup]:
    """Forms the group; if it ends with an error, finds the failure that came first."""
    global _joined
    timeout = timedelta(seconds=limits.timeout)
    store = open_store(launch, timeout)
    heartbeat = Heartbeat(
        store.clone(), launch.rank, launch.world_size, limits.silence, hosts_store(launch)
    )
    _joined = JoinedGroup(launch, store, heartbeat)
    heartbeat.start()
    try:
        _init_torch(launch, store, device, timeout)
        yield _joined
    except BaseException as error:
        failure = _first_failure(error, launch, heartbeat)
        _record_for_torchrun(error)
        heartbeat.await_readers()
        if failure.rank == launch.rank:
            raise
        log.error("stopped: %s", failure)
        raise OtherProcessFailed(str(failure)) from error
    finally:
        _joined = None
        if dist.is_initialized():
            dist.destroy_process_group()
        heartbeat.stop()  # only now: it ends the process if leaving hangs


def _init_torch(launch: Launch, store: Store, device: torch.device, timeout: timedelta) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("collectives", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )


def _first_failure(error: BaseException, launch: Launch, heartbeat: Heartbeat) -> Failure:
    """The failure that ended the run: this process's error, or the one that caused it."""
    if _follows_from_another(error):
        # The other process may need a moment to report, and a killed one is only missed after
        # `silence`. torchrun detects that itself, and waits for the others to leave.
        silence = 0 if under_torchrun() else heartbeat.silence
        found = heartbeat.await_failure(silence + heartbeat.grace)
        if found is not None:
            return found
    return heartbeat.report(_own_failure(error, launch))


def _own_failure(error: BaseException, launch: Launch) -> Failure:
    return Failure(launch.rank, hostname(), _describe(error))


def _follows_from_another(error: BaseException) -> bool:
    """Whether an error only shows that another process has failed or left."""
    if isinstance(error, OtherProcessFailed | dist.DistError):
        return True
    message = str(error).lower()
    return type(error) is RuntimeError and any(words in message for words in _LOST_PEER)


def _describe(error: BaseException) -> str:
    """An error as one paragraph; file and line are added unless it is a user's mistake."""
    if isinstance(error, UserError):
        return str(error)
    text = "".join(traceback.format_exception_only(error)).strip()[:2000]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _record_for_torchrun(error: BaseException) -> None:
    """Writes the error to the file from which torchrun makes its summary."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
