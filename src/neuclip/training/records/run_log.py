"""The package's log messages: to the terminal, and to a run's `out.log`."""

import logging
import sys
from pathlib import Path
from typing import TextIO

log = logging.getLogger("neuclip")


class _TerminalHandler(logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stderr`, which a progress bar replaces to keep lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to(file: Path | None) -> None:
    """Sends the package's messages to the terminal (standard error), and to a file if given."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    terminal = _TerminalHandler()
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        log.addHandler(to_file)
