"""The processes that a launcher started, joined: how they meet, wait for each other, and part.

What they compute together is in `parallel.collectives`. Here is what may take long or go wrong.
"""

import logging
import os
import time
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from neuclip.errors import OtherProcessFailed, Preempted, UserError
from neuclip.parallel.heartbeat import Failure, Heartbeat
from neuclip.parallel.launch import Launch, here, launch_environment, under_torchrun
from neuclip.parallel.rendezvous import hosts_store, meet

log = logging.getLogger("neuclip")

_LOST_PEER = ("gloo", "nccl", "process group", "connection closed", "connection reset")
"""What torch says, in a plain RuntimeError, when another process has left a collective."""


@dataclass(frozen=True)
class WaitLimits:
    """How long processes wait for one another.

    Attributes:
        timeout: seconds for a collective, and for all to come when a run starts.
        silence: seconds without a sign of life after which a process counts as dead.
    """

    timeout: float = 600.0
    silence: float = 30.0


class JoinedGroup:
    """The joined processes.

    Args:
        launch: this process's place.
        store: what all of them reach.
        watch: the eye on the others, already started.
    """

    def __init__(self, launch: Launch, store: Store, watch: Heartbeat) -> None:
        self.launch, self.watch = launch, watch
        self._store = store
        self._waits = 0

    def wait_for_all(self) -> None:
        """Returns once every process has come here, however long that takes while all live.

        Raises:
            OtherProcessFailed: one of them will not come.
        """
        self._waits += 1
        go = f"wait/{self._waits}/go"
        if self._store.add(f"wait/{self._waits}", 1) == self.launch.world_size:
            self._store.set(go, "")
        while True:
            if self.watch.failure is not None:
                raise OtherProcessFailed(str(self.watch.failure))
            try:
                self._store.wait([go], timedelta(seconds=2))
            except dist.DistStoreError:
                continue  # not yet
            return

    def part(self) -> None:
        """Leaves together; the process that hosts the store leaves last."""
        self.wait_for_all()
        self.watch.stop()
        gone, end = self._store.add("gone", 1), time.monotonic() + self.watch.patience
        while hosts_store(self.launch) and gone < self.launch.world_size:
            if time.monotonic() > end:
                return
            time.sleep(0.02)
            gone = self._store.add("gone", 0)


_joined: JoinedGroup | None = None


def joined() -> JoinedGroup | None:
    """The group that this process is in."""
    return _joined


@contextmanager
def open_process_group(
    device: torch.device, patience: WaitLimits = WaitLimits()
) -> Generator[Launch]:
    """Joins the processes that the launcher started, for the duration of a `with` block.

    When one of them fails, dies or falls silent, the block ends in all of them.

    Args:
        device: what this process computes on; a GPU selects NCCL, anything else gloo.
        patience: how long to wait for the others.

    Raises:
        UserError: the processes cannot meet.
        OtherProcessFailed: another process failed first; says which, and why.
    """
    launch = launch_environment()
    if launch.world_size == 1 or dist.is_initialized():
        yield launch
        return
    stopped: Preempted | None = None
    with _joining(launch, device, patience) as group:
        try:
            yield launch
        except Preempted as stop:  # all of them agreed to it
            stopped = stop
        group.part()
    if stopped is not None:
        raise stopped


@contextmanager
def reporting_errors() -> Generator[None]:
    """Tells the other processes of an error at once, before what is around this block is left.

    To leave it may need them: they must not wait for this process meanwhile.
    """
    try:
        yield
    except Preempted:
        raise
    except BaseException as error:
        if _joined is not None and not _follows_from_another(error):
            _joined.watch.report(Failure(_joined.launch.rank, here(), _in_words(error)))
        raise


@contextmanager
def _joining(launch: Launch, device: torch.device, patience: WaitLimits) -> Generator[JoinedGroup]:
    """Forms the group, and finds out what ended it if not all of its processes part in peace."""
    global _joined
    timeout = timedelta(seconds=patience.timeout)
    store = meet(launch, timeout)
    watch = Heartbeat(
        store.clone(), launch.rank, launch.world_size, patience.silence, hosts_store(launch)
    )
    _joined = JoinedGroup(launch, store, watch)
    watch.start()
    try:
        _form(launch, store, device, timeout)
        yield _joined
    except BaseException as error:
        failure = _first_failure(error, launch, watch)
        _tell_launcher(error)
        watch.await_told()
        if failure.rank == launch.rank:
            raise
        log.error("stopped: %s", failure)
        raise OtherProcessFailed(str(failure)) from error
    finally:
        _joined = None
        if dist.is_initialized():
            dist.destroy_process_group()
        watch.stop()  # until here it ends the process, should leaving hang


def _form(launch: Launch, store: Store, device: torch.device, timeout: timedelta) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("collectives", store),
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
    )


def _first_failure(error: BaseException, launch: Launch, watch: Heartbeat) -> Failure:
    """What ended the run: this process's error, or another's that it follows from."""
    if _follows_from_another(error):
        # Whoever left may need a moment to say why, and a killed process says nothing at all;
        # torchrun notices that by itself, and waits for the others to leave.
        silence = 0 if under_torchrun() else watch.silence
        found = watch.await_failure(silence + watch.patience)
        if found is not None:
            return found
    return watch.report(Failure(launch.rank, here(), _in_words(error)))


def _follows_from_another(error: BaseException) -> bool:
    if isinstance(error, OtherProcessFailed | dist.DistError):
        return True
    said = str(error).lower()
    return type(error) is RuntimeError and any(words in said for words in _LOST_PEER)


def _in_words(error: BaseException) -> str:
    """An error in a paragraph; a surprising one with the place it comes from."""
    if isinstance(error, UserError):
        return str(error)
    text = "".join(traceback.format_exception_only(error)).strip()[:2000]
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


def _tell_launcher(error: BaseException) -> None:
    """Leaves the error where torchrun's summary looks for it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
