"""A run's `out.log`: the log messages of this package, warnings, and messages of other packages."""

import contextlib
import logging
from pathlib import Path
from typing import TextIO

from neuclip import console
from neuclip.files import describe, open_to_append

_LOGGERS = (logging.getLogger("neuclip"), logging.getLogger())


def log_to(file: Path | None) -> None:
    """Appends log messages to a file, and closes the file before; `None` only closes it."""
    for logger in _LOGGERS:
        for handler in [each for each in logger.handlers if isinstance(each, _LogFile)]:
            logger.removeHandler(handler)
            handler.close()
    if file is not None:
        handler = _LogFile(file)
        for logger in _LOGGERS:
            logger.addHandler(handler)


class _LogFile(logging.Handler):
    """A log file; if it cannot be written, the terminal shows it once and the run goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file: TextIO | None = None
        self._failed = False
        self.setFormatter(console.MessageFormatter("%(asctime)s | %(levelname)s | %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        try:
            if self._file is None:
                self._file = open_to_append(self._path)
            self._file.write(self.format(record) + "\n")
            self._file.flush()
        except OSError as error:
            if not self._failed:
                self._failed = True
                console.write(f"cannot write {self._path}: {describe(error)}")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        super().close()
