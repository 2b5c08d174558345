"""Stop signals: the first asks the running work to stop, a second Ctrl-C ends the process at once.

Python runs a signal handler only between its own instructions: a collective or a long computation
delays it. A thread therefore counts the interrupts. Imports no torch.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from types import FrameType

log = logging.getLogger("neuclip")

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C sends SIGINT. Schedulers send SIGTERM before they kill a job; Slurm's `--signal` can ask
for SIGUSR1."""
INTERRUPTED = 128 + signal.SIGINT
"""The exit code of a program that Ctrl-C ended."""


class StopRequest:
    """Whether a signal has asked to stop.

    Attributes:
        signal: the first one; none so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal as the user knows it."""
        if self.signal is None:
            return "a signal to another process"
        return "Ctrl-C" if self.signal is signal.SIGINT else self.signal.name


@contextmanager
def stop_requests(at_once: Callable[[StopRequest], None]) -> Generator[StopRequest]:
    """Turns stop signals into a request for the duration of a `with` block; a hangup is ignored.

    Outside of the main thread nothing changes: signals belong to that thread.

    Args:
        at_once: called with each signal; it raises an error if the work may stop where it is.

    Yields:
        The request, which the work reads between two steps.
    """
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = request.signal or signal.Signals(number)
        at_once(request)
        again = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
        _log_from_handler("%s: saving after this step%s", request.name, again)

    def hang_up(number: int, frame: FrameType | None) -> None:
        _log_from_handler("SIGHUP: the terminal has closed, and the run goes on")

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = dict.fromkeys(
        STOP_SIGNALS, ask
    )
    handlers[signal.SIGHUP] = hang_up
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:  # in the background of a script, under nohup
            del handlers[number]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_from_handler(message: str, *arguments: str) -> None:
    """Logs from a signal handler, which may have interrupted the writing of another message."""
    threading.Thread(target=log.info, args=(message, *arguments), daemon=True).start()


@contextmanager
def second_interrupt_ends() -> Generator[None]:
    """A second Ctrl-C within a `with` block ends the process at once, whatever it is doing."""
    global _counting
    if _counting or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=_count, args=(reader,), name="neuclip-interrupts", daemon=True)
    _counting = True
    thread.start()
    try:
        yield
    finally:
        _counting = False
        signal.set_wakeup_fd(before)
        os.write(writer, bytes([0]))
        thread.join()
        os.close(reader)
        os.close(writer)


def _count(reader: int) -> None:
    """Reads a byte for each signal; ends the process after two interrupts."""
    interrupts = 0
    while number := os.read(reader, 1)[0]:
        interrupts += number == signal.SIGINT
        if interrupts == 2:
            _end()


def _end() -> None:
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError):
            child.kill()
    with contextlib.suppress(OSError, ValueError):
        clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""  # the bar hides the cursor
        os.write(2, f"{clear}neuclip: interrupted twice: left at once\n".encode())
    os._exit(INTERRUPTED)


_counting = False


def _after_fork() -> None:
    """A child has no thread that counts, and must not write to its parent's."""
    global _counting
    if _counting and threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)
    _counting = False


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)


def end_with_parent() -> None:
    """Ends this worker process of `multiprocessing` with its parent, which may be killed."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
