"""One process at a time uses a run folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from neuclip.errors import UserError
from neuclip.training import folder_lock
from neuclip.training.folder_lock import FolderLock

HOLD = """
import os, pathlib, sys, time
from neuclip.training import folder_lock
folder_lock.GRACE, folder_lock.BEAT = float(sys.argv[2]), 0.1
try:
    with folder_lock.FolderLock() as lock:
        lock.acquire(pathlib.Path(sys.argv[1]))
        if os.fork() == 0:  # a reading process, which outlives a killed one
            time.sleep(3)
            os._exit(0)
        print("held", flush=True)
        sys.stdin.readline()
except folder_lock.UserError as error:
    print(error, flush=True)
"""


def start(folder, grace=0.2):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, str(grace)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    process.communicate(timeout=20)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(folder_lock, "GRACE", 0.2)
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    monkeypatch.setattr(folder_lock, "SILENCE", 1.0)


@pytest.mark.parametrize("stopped", [False, True])
def test_a_second_process_is_refused(tmp_path, stopped):
    """Also while the first one hangs: it could write again at any time."""
    first = start(tmp_path)
    assert first.stdout.readline() == "held\n"
    if stopped:
        os.kill(first.pid, signal.SIGSTOP)
    with FolderLock() as lock, pytest.raises(UserError) as caught:
        lock.acquire(tmp_path)
    assert f"process {first.pid} on " in str(caught.value)
    assert f"(kill {first.pid})" in str(caught.value)
    os.kill(first.pid, signal.SIGCONT)
    finish(first)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_lock(tmp_path):
    """Although its reading processes still live."""
    first = start(tmp_path)
    assert first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    first.stdin.close()
    first.stdout.close()
    assert (tmp_path / "run.lock").exists()
    with FolderLock() as lock:
        lock.acquire(tmp_path)
        lock.check()
    assert not (tmp_path / "run.lock").exists()


def test_a_process_that_is_ending_is_waited_for(tmp_path):
    first = start(tmp_path)
    assert first.stdout.readline() == "held\n"
    second = start(tmp_path, grace=20)
    time.sleep(0.5)
    finish(first)
    assert second.stdout.readline() == "held\n"
    finish(second)


def other_machine(beat=1):
    holder = {"host": "node-a", "pid": 7, "machine": "another", "token": "x", "beat": beat}
    return json.dumps(holder).ljust(400)


def test_another_machine_that_is_silent_is_replaced(tmp_path):
    (tmp_path / "run.lock").write_text(other_machine())
    with FolderLock() as lock:
        lock.acquire(tmp_path)
        lock.check()


def test_another_machine_that_beats_is_in_use(tmp_path, monkeypatch):
    (tmp_path / "run.lock").write_text(other_machine())
    beats = iter(range(2, 100))
    monkeypatch.setattr(
        folder_lock.time, "sleep",
        lambda _: (tmp_path / "run.lock").write_text(other_machine(next(beats))),
    )  # fmt: skip
    with FolderLock() as lock, pytest.raises(UserError, match="process 7 on 'node-a' is using"):
        lock.acquire(tmp_path)
    assert "node-a" in (tmp_path / "run.lock").read_text()


def test_a_paused_process_stops_when_it_was_replaced(tmp_path):
    with FolderLock() as lock:
        lock.acquire(tmp_path)
        (tmp_path / "run.lock").write_text(other_machine())
        with pytest.raises(UserError, match="'node-a' has taken over the run folder"):
            lock.check()
        time.sleep(0.3)  # its heartbeat does not take it back
    assert "node-a" in (tmp_path / "run.lock").read_text()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "[" * 3000, '{"pid": "x"}', "\0" * 400],
    ids=["empty", "cut", "list", "deep", "other types", "zeros"],
)
def test_a_damaged_lock_is_taken(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with FolderLock() as lock:
        lock.acquire(tmp_path)
        lock.check()
