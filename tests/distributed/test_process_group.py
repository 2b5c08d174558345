"""Processes that fail, die, pause or never arrive: the others stop and report the reason."""

import contextlib
import logging
import random
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from group_tasks import disagree, open_in_turn, slow_main, steps
from ranks import Ranks, free_port

from neuclip.errors import UserError
from neuclip.parallel import process_group, rendezvous
from neuclip.parallel.launch import Launch
from neuclip.parallel.process_group import WaitLimits

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("ranks")]

QUICK = WaitLimits(timeout=20, silence=3)
LONG = 10_000


@pytest.fixture
def ranks(tmp_path):
    started = []

    def start(size, task, *arguments, nodes=()):
        started.append(Ranks(tmp_path / str(len(started)), size, task, *arguments, nodes=nodes))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_all_leave_together(ranks):
    run = ranks(4, steps, QUICK, 3)
    assert run.exit_codes() == [0] * 4
    assert all(run.output(rank).endswith("finished") for rank in range(4))


@pytest.mark.parametrize("broken", [0, 2])
def test_an_error_on_one_rank_ends_all(ranks, broken):
    run = ranks(4, steps, QUICK, LONG, {(broken, 5): "raise out of ideas"})
    assert run.exit_codes() == [1] * 4
    assert "Traceback" in run.output(broken)
    for rank in {0, 1, 2, 3} - {broken}:
        expected = f"stopped: process {broken} on {socket.gethostname()} failed: ValueError: out of"
        assert expected in run.output(rank)
        assert "group_tasks.py, line" in run.output(rank)


def test_a_user_error_is_reported_unchanged(ranks):
    run = ranks(3, steps, QUICK, LONG, {(2, 5): "refuse --lr 0 is out of range"})
    assert run.exit_codes() == [1, 1, 2]
    assert "neuclip: --lr 0 is out of range" in run.output(2)
    assert "process 2" in run.output(0)
    assert "failed: --lr 0 is out of range" in run.output(0)


def test_a_process_that_does_not_communicate_is_ended_too(ranks):
    """It sleeps: the guard thread ends it."""
    run = ranks(2, steps, QUICK, LONG, {(0, 5): "sleep 300", (1, 5): "raise out of ideas"})
    assert run.exit_codes() == [1, 1]
    assert "stopped: process 1" in run.output(0)


def test_waiting_for_all_ends_when_one_fails(ranks):
    run = ranks(3, steps, QUICK, LONG, {(0, 5): "wait", (1, 5): "raise no", (2, 5): "wait"})
    assert run.exit_codes() == [1] * 3
    assert all("stopped: process 1" in run.output(rank) for rank in (0, 2))


@pytest.mark.parametrize("seed", [0])
def test_a_killed_process_ends_all(ranks, seed):
    draw = random.Random(seed)
    size, victim, step = 4, draw.randrange(1, 4), draw.randrange(3, 40)
    run = ranks(size, steps, QUICK, LONG)
    run.wait_for_output(victim, f"step {step}")
    run.signal(victim, signal.SIGKILL)
    others = [rank for rank in range(size) if rank != victim]
    assert run.exit_codes(*others) == [1] * 3
    for rank in others:
        expected = f"stopped: process {victim} on {socket.gethostname()} failed: no sign of life"
        assert expected in run.output(rank), (seed, victim, step, run.output(rank))


def test_the_death_of_the_stores_host_ends_all(ranks):
    run = ranks(3, steps, QUICK, LONG)
    run.wait_for_output(0, "step 5")
    run.signal(0, signal.SIGKILL)
    assert run.exit_codes(1, 2) == [1, 1]
    assert all("connection to MASTER_ADDR" in run.output(rank) for rank in (1, 2))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_paused_process_ends_all_and_itself_once_it_continues(ranks, victim):
    run = ranks(3, steps, QUICK, LONG)
    run.wait_for_output(victim, "step 5")
    run.signal(victim, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != victim]
    assert run.exit_codes(*others) == [1, 1]
    expected = "connection to MASTER_ADDR" if victim == 0 else "process 2 on"
    assert all(expected in run.output(rank) for rank in others)
    run.signal(victim, signal.SIGCONT)
    assert run.exit_codes(victim) == [1]


def test_a_short_pause_ends_nothing(ranks):
    run = ranks(3, steps, QUICK, 60)
    run.wait_for_output(1, "step 5")
    run.signal(1, signal.SIGSTOP)
    run.processes[0].join(1.5)
    run.signal(1, signal.SIGCONT)
    assert run.exit_codes() == [0] * 3


def test_a_living_process_that_misses_a_collective(ranks):
    run = ranks(2, steps, WaitLimits(timeout=2, silence=3), LONG, {(1, 5): "sleep 300"})
    assert run.exit_codes() == [1, 1]
    assert "imed out" in run.output(0)


def test_the_main_process_may_work_longer_than_the_timeout(ranks):
    run = ranks(3, slow_main, WaitLimits(timeout=2, silence=3), 4.0)
    assert run.exit_codes() == [0] * 3
    assert all("made by the main process" in run.output(rank) for rank in range(3))


def test_machines_open_data_in_turn(ranks, tmp_path):
    """Ranks 0 and 2 are the first of their machines."""
    (tmp_path / "turns").mkdir()
    nodes = [{"SLURM_LOCALID": local} for local in "0101"]
    run = ranks(4, open_in_turn, QUICK, tmp_path / "turns", nodes=nodes)
    assert run.exit_codes() == [0] * 4
    said = [run.output(rank) for rank in range(4)]
    assert all(text.endswith(" no room on the second machine") for text in said)
    turns = [text.removesuffix(" no room on the second machine") for text in said]
    assert turns[0] == "before:"
    assert turns[2] == "before: 0"
    assert all(turns[rank].startswith("before: 0") and "2" in turns[rank] for rank in (1, 3))
    assert {path.name for path in (tmp_path / "turns").glob("once*")} == {"once 0", "once 2"}


def test_differences_between_processes_are_named(ranks):
    same = {"torch": "2.14", "seed": "1"}
    mine = [same, same, {"torch": "2.11", "seed": "1"}, {"torch": "2.14"}]
    run = ranks(4, disagree, QUICK, mine)
    assert set(run.exit_codes()) <= {1, 2}
    host = socket.gethostname()
    for rank in range(4):
        said = run.output(rank)
        assert f"torch: 2.14 on process 0, 1, 3 ({host}); 2.11 on process 2 ({host})" in said
        assert f"seed: 1 on process 0, 1, 2 ({host}); missing on process 3 ({host})" in said


# --- rendezvous -----------------------------------------------------------------------------------


def as_rank(monkeypatch, rank, port):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def refusal(timeout=1.0):
    with (
        pytest.raises(UserError) as caught,
        process_group.open_process_group(torch.device("cpu"), WaitLimits(timeout)),
    ):
        pass
    return str(caught.value)


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        as_rank(monkeypatch, 0, port)
        said = refusal()
    assert f"port {port} (MASTER_PORT) is in use on {socket.gethostname()}" in said
    assert "SLURM_JOB_ID % 20000" in said


def test_a_process_that_never_arrives(monkeypatch):
    port = free_port()
    as_rank(monkeypatch, 0, port)
    said = refusal()
    assert f"some of the 2 processes did not reach 127.0.0.1:{port} within 1 s" in said
    assert said.endswith("missing: 1")


def test_no_main_process(monkeypatch):
    port = free_port()
    as_rank(monkeypatch, 1, port)
    said = refusal()
    assert f"process 1 on {socket.gethostname()} found no process 0 at 127.0.0.1:{port}" in said


@pytest.mark.parametrize(("rank", "whom"), [(0, "all 2 processes"), (1, "process 0")])
def test_a_long_wait_names_the_missing_process(monkeypatch, caplog, rank, whom):
    monkeypatch.setattr("neuclip.parallel.rendezvous._QUIET", 0.1)
    monkeypatch.setattr(logging.getLogger("neuclip"), "propagate", True)
    port = free_port()
    as_rank(monkeypatch, rank, port)
    refusal()
    (said,) = [r.getMessage() for r in caplog.records if "still waits" in r.getMessage()]
    assert f"process {rank} on {socket.gethostname()} still waits for {whom}" in said
    assert f"127.0.0.1:{port} (MASTER_ADDR, MASTER_PORT), up to 1 s (--dist-timeout)" in said


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_something_else_listens(monkeypatch, answer):
    """A listener that never answers has no limit in torch."""
    monkeypatch.setattr("neuclip.parallel.rendezvous._LOOK", 0.1)
    done, kept = threading.Event(), []

    def serve():
        while not done.is_set():
            with contextlib.suppress(TimeoutError):
                each, _ = other.accept()
                kept.append(each)
                each.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.05)
        server = threading.Thread(target=serve)
        server.start()
        as_rank(monkeypatch, 1, other.getsockname()[1])
        start = time.monotonic()
        said = refusal(timeout=60.0)
        done.set()
        server.join()
    for each in kept:
        each.close()
    assert time.monotonic() - start < 20
    assert "found something else than process 0 at 127.0.0.1:" in said


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_for_one_machine_listens_on_that_machine_only(monkeypatch, host):
    port = free_port()
    as_rank(monkeypatch, 0, port)
    monkeypatch.setenv("MASTER_ADDR", host)
    launch = Launch(0, 2, 0)
    store = rendezvous._store_in_time(launch, host, port, timedelta(seconds=5))
    addresses = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    addresses |= {line.split()[1] for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]}
    assert {a for a in addresses if a.endswith(f":{port:04X}")} >= {f"0100007F:{port:04X}"}
    assert not {f"00000000:{port:04X}", f"{'0' * 32}:{port:04X}"} & addresses
    other = rendezvous._store_in_time(Launch(1, 2, 1), host, port, timedelta(seconds=5))
    other.set("key", "value")
    assert store.get("key") == b"value"
