import logging

import pytest

from neuclip.training.records.run_log import log_to


@pytest.fixture(autouse=True)
def handlers():
    """Puts the logger's handlers back."""
    log = logging.getLogger("neuclip")
    before, propagate = list(log.handlers), log.propagate
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
