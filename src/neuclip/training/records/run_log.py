"""A run's `out.log`: the log messages of this package, warnings, and messages of other packages."""

import logging
from pathlib import Path

from neuclip import console
from neuclip.files import describe

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


class _LogFile(logging.FileHandler):
    """A log file; if it cannot be written, the terminal shows it once and the run goes on."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace", delay=True)
        self._failed = False
        self.setFormatter(console.MessageFormatter("%(asctime)s | %(levelname)s | %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        try:
            if self.stream is None:
                self.stream = self._open()
            self.stream.write(self.format(record) + self.terminator)
            self.flush()
        except OSError as error:
            if not self._failed:
                self._failed = True
                console.write(f"cannot write {self.baseFilename}: {describe(error)}")
