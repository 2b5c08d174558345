"""The one writer on the terminal: log lines, warnings, notes, and a progress bar below them.

Everything but a command's result goes to standard error, by `write`. On a terminal, long lines are
wrapped at words, and a bar stays below them; in a pipe, a file or a notebook every line is plain,
and there is no bar. If the terminal closes, the process goes on without it. Imports no torch.
"""

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from neuclip.errors import without_controls
from neuclip.masking import mask

log = logging.getLogger("neuclip")

_SPEED_PERIOD = 600
"""Seconds over which the remaining time is estimated; a step may take longer than rich's 30."""
_BAR_WIDTH = 10
"""The smallest width of the bar; notes beside it are left out before it gets narrower."""
_ERASE_LINE = "\r\x1b[2K"


def write(text: str) -> None:
    """Writes lines to standard error: above the progress bar, if there is one.

    Secrets are masked, and control characters escaped.
    """
    text = without_controls(mask(text))
    try:
        if _shown is not None:
            _shown.print_above(text)
        else:
            on_terminal = _is_terminal(sys.stderr)
            shown = _erase + _wrapped(text) if on_terminal else text
            print(shown, file=sys.stderr, flush=True)
    except (OSError, ValueError) as error:  # a closed terminal, a broken pipe, a closed file
        _go_on_without_terminal(error)


class ProgressBar:
    """A progress bar on a terminal, with a few notes beside it. Elsewhere it shows nothing.

    Args:
        total: number of parts, if known.
        done: parts done already, in resumed work.
    """

    def __init__(self, total: int | None, done: int = 0) -> None:
        self._progress: Progress | None = None
        if _shown is None and _is_terminal(sys.stderr):
            self._start(total, done)

    def _start(self, total: int | None, done: int) -> None:
        global _shown
        console = Console(
            stderr=True,
            force_terminal=True,
            force_jupyter=False,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._progress = Progress(
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=_BAR_WIDTH)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            _NotesColumn(console),
            console=console,
            transient=True,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=_SPEED_PERIOD,
            # A piped standard output is the command's result, and stays apart.
            redirect_stdout=_is_terminal(sys.stdout),
        )
        self._task = self._progress.add_task("", total=total, completed=done, notes=())
        self._streams = sys.stdout, sys.stderr
        self._progress.start()
        _shown = self

    def advance(self, done: int, total: int | None = None) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def note(self, notes: Sequence[str]) -> None:
        """Replaces the notes beside the bar, the most important first."""
        if self._progress is not None:
            self._progress.update(self._task, notes=tuple(map(without_controls, notes)))

    def print_above(self, text: str) -> None:
        """Prints lines above the bar."""
        assert self._progress is not None
        console = self._progress.console
        console.print(Text(_wrapped(text)), soft_wrap=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._progress is None:
            return
        progress, self._progress = self._progress, None
        try:
            progress.stop()
        except (OSError, ValueError) as error:
            self.restore_streams()
            _go_on_without_terminal(error)
        finally:
            self.restore_streams()

    def restore_streams(self) -> None:
        """Gives the standard streams back, which the bar redirects while it is shown."""
        global _shown
        sys.stdout, sys.stderr = self._streams
        _shown = None


class _NotesColumn(ProgressColumn):
    """The notes beside the bar, as many as fit."""

    def __init__(self, console: Console) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._console = console

    def render(self, task: Task) -> Text:
        """The notes of a bar."""
        counts = 2 * len(str(task.total)) + 1
        room = self._console.width - counts - _BAR_WIDTH - len("0:00:00") - 3
        shown: list[str] = []
        for note in task.fields["notes"]:
            if len("  ".join([*shown, note])) > room:
                break
            shown.append(note)
        return Text("  ".join(shown))


@contextmanager
def progress() -> Generator[Callable[[str, int, int], None]]:
    """Shows the progress of long work on a terminal.

    Yields:
        A function of (activity, parts done, total parts).
    """
    bar = ProgressBar(None)

    def advance(what: str, done: int, total: int) -> None:
        bar.note([what])
        bar.advance(done, total)

    try:
        yield advance
    finally:
        bar.close()


@contextmanager
def logging_shown() -> Generator[None]:
    """Writes log messages and warnings of this package and of others, for a `with` block.

    Other packages' messages count from the level WARNING on; they are left to a program that has
    set up logging of its own.
    """
    global _showing
    if _showing:
        yield
        return
    handler = _Handler()
    root = logging.getLogger()
    loggers = [log] if root.handlers else [log, root]
    before = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    for logger in loggers:
        logger.addHandler(handler)
    if root in loggers:
        logging.captureWarnings(True)
    _showing = True
    try:
        yield
    finally:
        _showing = False
        log.setLevel(before[0])
        log.propagate = before[1]
        for logger in loggers:
            logger.removeHandler(handler)
        if root in loggers:
            logging.captureWarnings(False)


@contextmanager
def warnings_only() -> Generator[None]:
    """Drops this package's messages below the level WARNING, for a `with` block."""
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


class MessageFormatter(logging.Formatter):
    """Formats a message; other packages are named, and a warning is reduced to its first line.

    Secrets are masked, and control characters escaped.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The text of a record."""
        if record.name == "py.warnings":  # "FILE:LINE: CATEGORY: TEXT", and the line of code
            record = logging.makeLogRecord(vars(record))
            record.msg, record.args = record.getMessage().strip().splitlines()[0], None
        elif record.name.partition(".")[0] != log.name:
            record = logging.makeLogRecord(vars(record))
            record.msg, record.args = f"{record.name}: {record.getMessage()}", None
        return without_controls(mask(super().format(record)))


class _Handler(logging.Handler):
    """Writes log messages with `write`."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(MessageFormatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        write(self.format(record))


_shown: ProgressBar | None = None
"""The bar on the terminal."""
_showing = False
"""Whether log messages are written by this module."""
_erase = ""
"""Erases the bar of the parent process before a line of a child."""


def _is_terminal(stream: object) -> bool:
    """Whether a stream, if there is one, is a terminal; a notebook's is not."""
    isatty = getattr(stream, "isatty", None)
    try:
        return isatty is not None and bool(isatty()) and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _wrapped(text: str) -> str:
    """Wraps at words of the terminal; a long path stays in one piece, to be copied."""
    width = max(20, Console(stderr=True, force_terminal=True).width)
    return "\n".join(
        textwrap.fill(
            line, width, subsequent_indent=_indent(line), break_long_words=False,
            break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False,
        )
        for line in text.splitlines() or [""]
    )  # fmt: skip


def _indent(line: str) -> str:
    return " " * (8 if line.startswith(" ") else 4)


def _go_on_without_terminal(error: Exception) -> None:
    """Sends what follows nowhere, and logs why."""
    if _shown is not None:
        _shown.restore_streams()
    lost = [sys.stderr, sys.stdout] if sys.stdout.isatty() else [sys.stderr]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in lost:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())  # a flush at exit would fail, too
    os.close(nowhere)
    with contextlib.suppress(ValueError):
        log.warning("the terminal is gone (%s): the process goes on without it", error)


def _after_fork() -> None:
    """A child process draws no bar: it erases the line of the bar that its parent draws again."""
    global _erase
    if _shown is not None:
        _shown.restore_streams()
        _erase = _ERASE_LINE


os.register_at_fork(after_in_child=_after_fork)
