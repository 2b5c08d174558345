"""One process at a time uses a run folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from neuclip.errors import UserError
from neuclip.parallel import folder_lock
from neuclip.parallel.folder_lock import FolderLock

HOLD = """
import os, pathlib, sys, time
from neuclip.parallel import folder_lock
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


def test_of_many_that_start_at_once_one_goes_on(tmp_path):
    several = [start(tmp_path) for _ in range(4)]
    said = [process.stdout.readline() for process in several]
    assert said.count("held\n") == 1
    assert sum(" is using the run folder " in line for line in said) == 3
    for process in several:
        finish(process)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("copy", [shutil.copy2, shutil.copyfile], ids=["with times", "without"])
def test_a_copy_of_a_folder_in_use_is_free(tmp_path, copy):
    """The lock is on the folder, not on what its file says; the original keeps its own."""
    with FolderLock() as lock, FolderLock() as other:
        (tmp_path / "run").mkdir()
        lock.acquire(tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=copy)
        other.acquire(tmp_path / "copy")
        other.check()
        lock.check()


@pytest.mark.parametrize("jump", [-(10.0**9), 3600.0, 10.0**9])
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, jump):
    """Neither that of this machine, nor the times of a file that another one wrote."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + jump)
    with FolderLock() as lock:
        lock.acquire(tmp_path)
        os.utime(tmp_path / "run.lock", (now - jump, now - jump))
        time.sleep(0.25)
        lock.check()
        second = start(tmp_path)
        assert f"process {os.getpid()} on " in second.stdout.readline()
        finish(second)
    (tmp_path / "run.lock").write_text(other_machine())
    os.utime(tmp_path / "run.lock", (now + jump, now + jump))
    begin = time.monotonic()
    with FolderLock() as lock:
        lock.acquire(tmp_path)
    assert time.monotonic() - begin >= folder_lock.SILENCE


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
