"""Failure detection: every process learns, through a shared store, that one of them has failed.

Each rank counts up its own key in the store, the beat, and watches the beat of the rank below. So
every process is watched, at a cost that does not grow with their number. A process that fails, or
whose neighbour falls silent, writes a failure to the store. The first failure written counts. All
other processes read it at their next beat and stop, whatever they are waiting for.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch.distributed.distributed_c10d import Store

from neuclip.errors import printable
from neuclip.parallel.launch import hostname
from neuclip.untrusted import parse_json

log = logging.getLogger("neuclip")

_BEATS = 6
"""Beats within `silence`; but at least one a second."""

_GRACE = 5
"""Grace period in beats: how long a process may take to stop after it has read of a failure, how
long the store's host waits for the others to read it, and the gap after which a thread must have
been paused."""

_LINES, _LINE = 40, 1000
"""Largest number of lines, and of characters in one, that are taken from another's message."""

_FAILURE, _READERS = "failure", "failure_read"


@dataclass(frozen=True)
class Failure:
    """A failed process and the reason.

    Attributes:
        rank: of the process; none: the store failed, not a process of the run.
        host: its machine, if known.
        reason: the error message.
    """

    rank: int | None
    host: str
    reason: str

    @classmethod
    def read(cls, text: bytes) -> "Failure":
        """A failure from the store, to which any program that reaches the port can write.

        Text is shortened and its control characters are escaped; other content is replaced.
        """
        try:
            found = parse_json(text)
            rank, host, reason = (found[key] for key in ("rank", "host", "reason"))
        except (ValueError, TypeError, LookupError):
            rank, host, reason = None, None, None
        if not isinstance(host, str) or not isinstance(reason, str):
            return cls(None, "", f"unreadable message in the store: {_quoted(text)}")
        known = isinstance(rank, int) and not isinstance(rank, bool)
        lines = (printable(line, _LINE) for line in reason.splitlines()[:_LINES])
        return cls(rank if known else None, printable(host), "\n".join(lines))

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        who = "" if self.rank is None else f"process {self.rank}{where} failed: "
        return who + self.reason


class Heartbeat:
    """Sends this process's beat and watches for failures, in two threads.

    A lost connection to the store is a RuntimeError.

    Args:
        store: a connection that only this object uses.
        rank: of this process.
        size: number of processes.
        silence: seconds without a beat after which a process counts as dead.
        hosts_store: whether the store ends with this process.
        end: called with an exit code if the main thread does not stop by itself.

    Attributes:
        silence: as above.
        grace: see `_GRACE`, in seconds.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        silence: float,
        hosts_store: bool,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self.silence = silence
        self._period = min(1.0, silence / _BEATS)
        self.grace = _GRACE * self._period
        self._hosts_store = hosts_store
        self._end = end
        self._failure: Failure | None = None
        self._known = threading.Event()  # this process knows of a failure
        self._shared = threading.Event()  # the others know of it too
        self._leaving = threading.Event()
        self._answered = time.monotonic()  # when the store last answered
        self._beats = 0
        self._heard = ("", time.monotonic())  # the neighbour's last beat, and when it changed
        names = {"beat": self._beat, "guard": self._guard}
        self._threads = [
            threading.Thread(target=target, name=f"neuclip-{name}", daemon=True)
            for name, target in names.items()
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads, except one that waits for a store that does not answer."""
        self._leaving.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    @property
    def failure(self) -> Failure | None:
        """The first failure, once this process knows of it."""
        return self._failure

    def report(self, failure: Failure) -> Failure:
        """Writes a failure to the store, and returns the first one written."""
        if self._failure is None:
            text = json.dumps(asdict(failure))
            try:
                failure = Failure.read(self._store.compare_set(_FAILURE, "", text))
            except RuntimeError:
                log.warning("cannot notify the other processes: the store does not answer")
        return self._learn(failure)

    def await_failure(self, seconds: float) -> Failure | None:
        """Waits for a failure; returns none if there is none within `seconds`."""
        self._known.wait(seconds)
        return self._failure

    def await_readers(self) -> None:
        """Waits until the others have read the failure, if they need this process's store."""
        if self._hosts_store:
            self._shared.wait(self.grace + 2 * self._period)

    # --- the threads -----------------------------------------------------------------------

    def _beat(self) -> None:
        """Beats and watches until the process leaves or learns of a failure."""
        try:
            while not self._leaving.is_set() and not self._known.is_set():
                self._beat_once()
                self._leaving.wait(self._period)
            if self._known.is_set():
                self._acknowledge()
        except RuntimeError:
            if not self._leaving.is_set():
                self._learn(self._store_lost())
        finally:
            self._shared.set()

    def _beat_once(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", f"{self._beats} {hostname()}")
        if self._store.check([_FAILURE]):
            self._learn(Failure.read(self._store.get(_FAILURE)))
        neighbour = (self._rank - 1) % self._size
        key = f"beat/{neighbour}"
        beat = self._store.get(key).decode(errors="replace") if self._store.check([key]) else ""
        now, before, (heard, since) = time.monotonic(), self._answered, self._heard
        self._answered = now
        # After a pause of this process, the neighbour's silence proves nothing.
        if beat != heard or now - before > self.grace:
            self._heard = beat, now
        elif now - since > self.silence:
            self.report(_silent(neighbour, printable(beat.partition(" ")[2]), self.silence))

    def _acknowledge(self) -> None:
        """Counts this process as a reader of the failure; the host waits for all readers."""
        readers = self._store.add(_READERS, 1)
        end = time.monotonic() + self.grace
        while self._hosts_store and readers < self._size and time.monotonic() < end:
            time.sleep(self._period / 5)
            readers = self._store.add(_READERS, 0)

    def _guard(self) -> None:
        """Ends the process if it knows of a failure and does not stop; never uses the store."""
        before = time.monotonic()
        while not self._leaving.wait(self._period / 2):
            now = time.monotonic()
            if now - before > self.grace:
                self._answered = now  # this process was paused: the store could not answer
            before = now
            if now - self._answered > self.silence and not self._known.is_set():
                self._learn(self._store_lost())
            if self._known.is_set():
                break
        # Longer than `await_readers`, in which the main thread may be.
        if self._known.is_set() and not self._leaving.wait(2 * self.grace):
            log.error("stopped: %s", self._failure)
            self.await_readers()
            self._end(1)

    def _learn(self, failure: Failure) -> Failure:
        self._failure = self._failure or failure
        self._known.set()
        return self._failure

    def _store_lost(self) -> Failure:
        """The failure to report if the store does not answer."""
        if self._hosts_store:
            return Failure(None, "", "this process's own store no longer answers")
        return Failure(
            None,
            "",
            "lost the connection to MASTER_ADDR: process 0 (under torchrun: the launcher) was "
            "killed or paused, or its machine is down",
        )


def _quoted(text: bytes) -> str:
    return repr(printable(text[:200].decode(errors="replace")))


def _silent(rank: int, host: str, seconds: float) -> Failure:
    return Failure(
        rank,
        host,
        f"no sign of life for {seconds:g} s. It was killed (if out of memory, `dmesg` and the "
        "scheduler's log show it: lower --batch-size or --workers) or paused, or its machine is "
        "down",
    )
