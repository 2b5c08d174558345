"""Watches the main process while it reads a batch itself, with `--workers 0`.

A thread reports a wait, and interrupts it after the limit. A system call that the kernel does not
interrupt, such as one on a lost network drive, is reported only.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_SHORTEST_LOOK = 1.0  # seconds between two looks


class Overdue(Exception):
    """The main thread has waited for a batch longer than the limit."""


class Watchdog:
    """Looks at the clock while a batch is read.

    Args:
        report: called with the seconds waited so far, in the thread that watches.
        every: seconds of waiting after which it is reported, and reported again.
        limit: seconds after which the wait is interrupted, if the main thread waits.
    """

    def __init__(self, report: Callable[[float], None], every: float, limit: float) -> None:
        self._report, self._every, self._limit = report, every, limit
        self._since: float | None = None
        self._ended = threading.Event()

    @contextmanager
    def watching(self) -> Generator[None]:
        """Watches the waits inside of a `with` block."""
        thread = threading.Thread(target=self._watch, name="neuclip-watchdog", daemon=True)
        with contextlib.suppress(RuntimeError):  # no further thread can be started
            thread.start()
        try:
            yield
        finally:
            self._ended.set()

    @contextmanager
    def wait(self) -> Generator[None]:
        """A wait.

        Raises:
            Overdue: it took longer than the limit; from the signal handler of the main thread.
        """
        main = threading.current_thread() is threading.main_thread()
        self._since = time.monotonic()
        if main:
            _waits.append(self)
        try:
            yield
        finally:
            self._since = None
            if main:
                _waits.remove(self)

    @property
    def overdue(self) -> bool:
        """Whether the present wait is longer than the limit."""
        since = self._since
        return since is not None and time.monotonic() - since >= self._limit

    def _watch(self) -> None:
        told = 0.0  # seconds of the present wait that are reported
        look = min(_SHORTEST_LOOK, self._every / 4, self._limit / 4)
        while not self._ended.wait(look):
            since = self._since
            waited = 0.0 if since is None else time.monotonic() - since
            if waited < told:
                told = 0.0
            if waited >= told + self._every:
                told = waited
                self._report(waited)
            if self.overdue and self in _waits:
                signal.pthread_kill(_main(), signal.SIGCHLD)


_waits: list[Watchdog] = []
"""The waits of the main thread."""


def end_overdue_wait() -> None:
    """Ends an overdue wait of the main thread; its handler of SIGCHLD calls this.

    Raises:
        Overdue: there is one.
    """
    if any(wait.overdue for wait in _waits):
        raise Overdue


def _main() -> int:
    identity = threading.main_thread().ident
    assert identity is not None
    return identity
