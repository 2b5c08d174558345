import io
import logging
import sys

import pytest

from neuclip.training.records.run_log import log_to
from neuclip.training.records.sinks import ConsoleSink


@pytest.fixture(autouse=True)
def handlers():
    """Puts the logger's handlers back."""
    log = logging.getLogger("neuclip")
    before, propagate = list(log.handlers), log.propagate
    log.handlers = []  # `log_to` closes those that it finds
    yield
    for handler in log.handlers:
        handler.close()
    log.handlers, log.propagate = before, propagate


def test_messages_reach_the_terminal_and_the_file(tmp_path, capsys):
    log = logging.getLogger("neuclip")
    log_to(None)
    log.info("before the folder exists")
    log_to(tmp_path / "out.log")
    log.warning("step %d", 3)
    assert capsys.readouterr().err == "before the folder exists\nstep 3\n"
    assert (tmp_path / "out.log").read_text().endswith(" | WARNING | step 3\n")


def test_messages_appear_above_the_progress_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    log_to(None)
    console = ConsoleSink(10, 0)
    console.advance(5)
    logging.getLogger("neuclip").info("a message")
    console.close()
    assert "10" in terminal.getvalue()
    # Rich erases the bar's line, writes the message on a line of its own, and draws the bar again.
    assert "\x1b[2Ka message\n" in terminal.getvalue()
