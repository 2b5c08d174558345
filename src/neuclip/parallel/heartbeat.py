"""How processes learn that one of them has failed: through a store that all of them reach.

Each process beats: it counts up a number of its own in the store, and looks whether its neighbour
(the process numbered one below) still does; so every process is watched, at a cost that does not
grow with their number. Whoever fails, or finds its neighbour silent, writes why. The first to write
is believed; all others read it at their next beat and stop, whatever they are waiting for.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from neuclip.parallel.launch import here

log = logging.getLogger("neuclip")

_BEATS = 6
"""Beats in the silence after which a process counts as dead; but at least one a second."""

_PATIENCE = 5
"""Beats: that a process has to stop by itself when it knows of a failure, that the store's host
waits for the others to know, and after which a thread that did not run was paused."""

_FAILURE, _READ = "failure", "failure_read"


@runtime_checkable
class Store(Protocol):
    """What is used of torch's key-value stores. A lost connection is a RuntimeError."""

    def set(self, key: str, value: str, /) -> None:
        """Writes."""
        ...

    def get(self, key: str, /) -> bytes:
        """Reads; waits until there is something."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""
        ...

    def add(self, key: str, amount: int, /) -> int:
        """Adds to a counter and returns it."""
        ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        """Writes if there is what was expected, and returns what is there then."""
        ...


@dataclass(frozen=True)
class Failure:
    """Which process failed, and why.

    Attributes:
        rank: its number; none: it is no process of the run, but what they meet at.
        host: its machine, where that is known.
        reason: in words.
    """

    rank: int | None
    host: str
    reason: str

    def __str__(self) -> str:
        where = f" on {self.host}" if self.host else ""
        who = "" if self.rank is None else f"process {self.rank}{where} failed: "
        return who + self.reason


class Heartbeat:
    """This process's beat and its eye on the others, in threads of their own.

    Args:
        store: a connection that nothing else uses.
        rank: this process's number.
        size: the number of processes.
        silence: seconds without a beat after which a process counts as dead.
        hosts_store: the store ends with this process.
        end: called with an exit code when the main thread does not stop by itself.
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
        self.patience = _PATIENCE * self._period
        self._hosts_store = hosts_store
        self._end = end
        self._failure: Failure | None = None
        self._known = threading.Event()  # a failure is known
        self._told = threading.Event()  # the others know it too
        self._leaving = threading.Event()
        self._answered = time.monotonic()
        self._beats = 0
        self._heard = ("", time.monotonic())
        names = {"beat": self._beat, "guard": self._guard}
        self._threads = [
            threading.Thread(target=target, name=f"neuclip-{name}", daemon=True)
            for name, target in names.items()
        ]

    def start(self) -> None:
        """Begins."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads, unless one waits for a store that does not answer."""
        self._leaving.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    @property
    def failure(self) -> Failure | None:
        """The first failure, as far as it is known here."""
        return self._failure

    def report(self, failure: Failure) -> Failure:
        """Says that a process failed, and returns the first failure there was."""
        if self._failure is None:
            text = json.dumps(asdict(failure))
            try:
                failure = Failure(**json.loads(self._store.compare_set(_FAILURE, "", text)))
            except RuntimeError:
                log.warning("the other processes could not be told: the store does not answer")
        return self._learn(failure)

    def await_failure(self, seconds: float) -> Failure | None:
        """The failure, once it is known; none after so many seconds."""
        self._known.wait(seconds)
        return self._failure

    def await_told(self) -> None:
        """Waits until the others have read of the failure, if they need this process for it."""
        if self._hosts_store:
            self._told.wait(self.patience + 2 * self._period)

    # --- the threads -----------------------------------------------------------------------

    def _beat(self) -> None:
        """Beats and listens until it leaves or learns of a failure."""
        try:
            while not self._leaving.is_set() and not self._known.is_set():
                self._look()
                self._leaving.wait(self._period)
            if self._known.is_set():
                self._pass_on()
        except RuntimeError:
            if not self._leaving.is_set():
                self._learn(self._store_lost())
        finally:
            self._told.set()

    def _look(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", f"{self._beats} {here()}")
        if self._store.check([_FAILURE]):
            self._learn(Failure(**json.loads(self._store.get(_FAILURE))))
        neighbour = (self._rank - 1) % self._size
        key = f"beat/{neighbour}"
        beat = self._store.get(key).decode() if self._store.check([key]) else ""
        now, looked, (heard, since) = time.monotonic(), self._answered, self._heard
        self._answered = now
        # After a pause of this process itself, what it has not heard meanwhile says nothing.
        if beat != heard or now - looked > self.patience:
            self._heard = beat, now
        elif now - since > self.silence:
            self.report(_silent(neighbour, beat.partition(" ")[2], self.silence))

    def _pass_on(self) -> None:
        """Says that this process has read of the failure; the host waits for all to say so."""
        readers = self._store.add(_READ, 1)
        end = time.monotonic() + self.patience
        while self._hosts_store and readers < self._size and time.monotonic() < end:
            time.sleep(self._period / 5)
            readers = self._store.add(_READ, 0)

    def _guard(self) -> None:
        """Ends the process when it knows of a failure and does not stop; touches no store."""
        before = time.monotonic()
        while not self._leaving.wait(self._period / 2):
            now = time.monotonic()
            if now - before > self.patience:
                self._answered = now  # paused itself: nobody can have answered
            before = now
            if now - self._answered > self.silence and not self._known.is_set():
                self._learn(self._store_lost())
            if self._known.is_set():
                break
        # Longer than `await_told`, which the main thread may be in.
        if self._known.is_set() and not self._leaving.wait(2 * self.patience):
            log.error("stopped: %s", self._failure)
            self.await_told()
            self._end(1)

    def _learn(self, failure: Failure) -> Failure:
        self._failure = self._failure or failure
        self._known.set()
        return self._failure

    def _store_lost(self) -> Failure:
        """What it means that the store does not answer."""
        if self._hosts_store:
            return Failure(None, "", "the processes' own store does not answer any more")
        return Failure(
            None,
            "",
            "the connection to MASTER_ADDR, where the processes meet, is lost: process 0 (under "
            "torchrun: the launcher) was killed or paused, or its machine is down",
        )


def _silent(rank: int, host: str, seconds: float) -> Failure:
    return Failure(
        rank,
        host,
        f"no sign of life for {seconds:g} s. It was killed (out of memory? `dmesg` and the "
        "scheduler's log say so: lower --batch-size or --workers), was paused, or its machine is "
        "down",
    )
