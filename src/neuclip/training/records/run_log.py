"""The package's log messages: to the terminal, and to a run's `out.log`."""

import logging
import sys
from pathlib import Path

log = logging.getLogger("neuclip")


def log_to(file: Path | None) -> None:
    """Sends the package's messages to the terminal (standard error), and to a file if given."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(terminal)
    if file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s"))
        log.addHandler(to_file)
