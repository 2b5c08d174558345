"""The one writer on the terminal: every line once, and the bar below them."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
import warnings

import pytest

from neuclip import console
from neuclip.training.records.run_log import log_to
from neuclip.training.records.sinks import ConsoleSink

LINE = (
    "    50/186  epoch 0.65  loss 0.2747  tau 0.0684  lr 9.90e-04  gamma 1.00  132 samples/s  "
    "time: data 8% encode 29% normalizer 4% backward 37% optimizer 20%"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_terminal(monkeypatch):
    """Puts a terminal on both standard streams; pytest sets its own before every test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def screen(raw):
    """The rows that a terminal shows after a stream: erased and overwritten ones are gone."""
    rows = []
    for row in re.sub(r"\x1b\[\?25[lh]", "", raw).split("\n"):
        shown = re.sub(r".*\x1b\[2K", "", row)
        rows.append(re.sub(r"\x1b\[[0-9;]*m", "", shown.rpartition("\r")[2]).rstrip())
    return rows


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_bar_and_every_line_fit_the_terminal(monkeypatch, width):
    terminal = use_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(width))
    bar = console.ProgressBar(186, done=10)
    bar.note(["loss 0.2747", "132 samples/s", "epoch 0.65"])
    for step in range(11, 14):
        bar.advance(step)
        console.write(f"{step} {LINE}")
        print(f"another program's line {step}")
    bar._progress.refresh()
    rows = screen(terminal.getvalue())
    bar.close()
    assert all(len(row) <= width for row in rows)
    text = " ".join(" ".join(rows).split())
    for step in range(11, 14):
        assert text.count(" ".join(f"{step} {LINE}".split())) == 1
        assert text.count(f"another program's line {step}") == 1
    assert rows[-1].startswith(" 13/186 ━")
    assert re.search(r" (-:--:--|\d:\d\d:\d\d) loss 0.2747", rows[-1])
    assert ("epoch 0.65" in rows[-1]) == (width > 60)
    assert screen(terminal.getvalue())[-1] == ""  # nothing of the bar stays


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_without_a_terminal_every_line_is_plain(capsys, monkeypatch, term):
    """In a pipe, a file, a notebook (whose streams are no terminals), and a dumb terminal."""
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("FORCE_COLOR", "1")
    if term == "dumb":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sink = ConsoleSink(186, 0)
    sink.advance(3)
    console.write(LINE)
    with console.progress() as advance:
        advance("indexing", 1, 2)
    sink.close()
    assert capsys.readouterr().err == LINE + "\n"


def test_logs_and_warnings_of_all_packages_use_the_writer(monkeypatch, tmp_path):
    terminal = use_terminal(monkeypatch)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with console.logging_shown(), warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        log_to(tmp_path / "out.log")
        bar = console.ProgressBar(10)
        logging.getLogger("neuclip").info("ours: %s", "\udcff")
        logging.getLogger("PIL.Image").warning("theirs")
        logging.getLogger("PIL.Image").info("too small")
        warnings.warn("careful", stacklevel=1)
        bar.close()
        log_to(None)
    logging.getLogger("neuclip").info("after the end")
    rows = screen(terminal.getvalue().encode("utf-8", "replace").decode())
    kept = (tmp_path / "out.log").read_text().splitlines()
    for lines in (rows, kept):
        assert sum("ours: " in line for line in lines) == 1
        assert sum("PIL.Image: theirs" in line for line in lines) == 1
        assert sum("UserWarning: careful" in line for line in lines) == 1
    assert len(kept) == 3
    assert kept[0].endswith(" | INFO | ours: \\udcff")
    assert not any("too small" in row or "after the end" in row for row in rows)


def test_a_program_with_logging_of_its_own_keeps_it(monkeypatch, capsys):
    theirs = logging.NullHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [theirs])
    with console.logging_shown(), console.logging_shown():
        assert logging.getLogger().handlers == [theirs]
        logging.getLogger("neuclip").warning("once")
    assert capsys.readouterr().err == "once\n"


def test_processes_beside_the_main_one_show_warnings_only(capsys):
    ours = logging.getLogger("neuclip")
    with console.logging_shown():
        with console.warnings_only():
            ours.info("hidden")
            ours.warning("shown")
        ours.info("shown again")
    assert capsys.readouterr().err == "shown\nshown again\n"


@pytest.mark.parametrize("why", ["a folder", "a link", "gone"])
def test_a_log_file_that_cannot_be_written_is_reported_once(tmp_path, capsys, why):
    path = tmp_path / "folder" / "out.log"
    if why == "a folder":
        path.mkdir(parents=True)
    elif why == "a link":
        path.parent.mkdir()
        path.symlink_to(tmp_path / "theirs")
    with console.logging_shown():
        log_to(path)
        for number in range(3):
            logging.getLogger("neuclip").info("line %d", number)
        log_to(None)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("line")] == ["line 0", "line 1", "line 2"]
    (problem,) = (line for line in lines if not line.startswith("line"))
    assert problem.startswith(f"cannot write {path}: ")
    assert not (tmp_path / "theirs").exists()


CHILD = """
import logging, os, sys, time
from neuclip import console
with console.logging_shown():
    bar = console.ProgressBar(4)
    if os.fork() == 0:
        logging.getLogger("PIL").warning("from a reading process")
        os._exit(0)
    os.wait()
    bar._progress.refresh()
    for step in range(1, 4):
        print("ready", file=sys.__stdout__, flush=True)
        sys.stdin.readline()
        bar.advance(step)
        logging.getLogger("neuclip").info("line %d", step)
    bar.close()
with open(sys.argv[1], "w") as file:
    file.write("went on")
"""


@pytest.mark.parametrize("closes", [False, True])
def test_children_and_a_closed_terminal(tmp_path, closes):
    """On a real terminal a forked process writes beside the bar, and the terminal closes."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path / "out"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=theirs, text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    raw = b""
    for step in range(3):
        process.stdout.readline()
        if step == 1:
            time.sleep(0.1)
            raw = os.read(ours, 100_000)
            if closes:
                os.close(ours)
        process.stdin.write("go\n")
        process.stdin.flush()
    if not closes:
        process.wait(30)
        raw += os.read(ours, 100_000)
        os.close(ours)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "")
    assert (tmp_path / "out").read_text() == "went on"
    rows = screen(raw.decode().replace("\r\n", "\n"))
    assert rows.count("PIL: from a reading process") == 1
    assert rows.count("line 1") == 1
    assert rows.count("line 3") == (not closes)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x1b]0;title\x07b", r"a\x1b[2J\x1b]0;title\x07b"),
        ("a\rb\x08c\x7f", r"a\rb\x08c\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("a\u2028b\x85c", r"a\u2028b\x85c"),
        ("a\udcffb", r"a\udcffb"),
        ("ä 猫 ± é\tx\ny", "ä 猫 ± é\tx\ny"),
    ],
)
def test_control_characters_reach_neither_terminal_nor_log(monkeypatch, text, shown):
    """Of names in archives, of servers' answers, of other processes; the bar's notes too."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console.write(text)
    assert stream.getvalue() == shown + "\n"
    record = logging.LogRecord("neuclip", logging.INFO, "", 0, "%s", (text,), None)
    assert console.MessageFormatter("%(message)s").format(record) == shown
    terminal = use_terminal(monkeypatch)
    bar = console.ProgressBar(1)
    bar.note([text.partition("\n")[0]])
    console.write(text)
    bar.close()
    assert "\x1b[2J\x1b]0;" not in terminal.getvalue() and "\u202e" not in terminal.getvalue()
