"""Stop signals, and a second Ctrl-C: in processes of their own, which they end."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from neuclip import interrupts
from neuclip.interrupts import StopRequest, stop_requests

PROGRAM = """
import ctypes, multiprocessing, os, signal, sys, time
signal.signal(signal.SIGHUP, {hangup})
signal.signal(signal.SIGINT, {interrupt})
from neuclip import console, interrupts
with interrupts.second_interrupt_ends(), console.logging_shown():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    with interrupts.stop_requests(lambda request: None) as request:
        print("ready", flush=True)
        {work}
    print("stopped by", request.name, flush=True)
    child.terminate()
"""
IN_PYTHON = "while not request.asked: time.sleep(0.01)"
IN_C = "ctypes.CDLL(None).usleep(30_000_000); ctypes.CDLL(None).usleep(30_000_000)"


def start(work, hangup="signal.SIG_DFL", interrupt="signal.default_int_handler"):
    program = PROGRAM.format(work=work, hangup=hangup, interrupt=interrupt)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    child = int(process.stdout.readline())
    assert process.stdout.readline() == "ready\n"
    return process, child


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", interrupts.STOP_SIGNALS)
def test_a_signal_asks_to_stop(number):
    process, _ = start(IN_PYTHON)
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(0.05)
    os.kill(process.pid, number)
    output, errors = process.communicate(timeout=30)
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (process.returncode, output) == (0, f"stopped by {name}\n")
    assert "SIGHUP: the terminal has closed, and the run goes on" in errors
    assert f"{name}: saving after this step" in errors


def test_what_a_script_or_nohup_ignores_stays_ignored():
    process, _ = start(IN_PYTHON, "signal.SIG_IGN", "signal.SIG_IGN")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        os.kill(process.pid, number)
        time.sleep(0.05)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "stopped by SIGTERM\n")
    assert "SIGHUP" not in errors


def test_a_second_interrupt_ends_a_process_that_no_handler_reaches():
    """Such as one in a collective; reading processes end with it."""
    process, child = start(IN_C)
    begin = time.monotonic()
    for _ in range(2):
        time.sleep(0.1)  # two pending signals of one kind would be one
        os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == interrupts.INTERRUPTED
    assert time.monotonic() - begin < 10
    assert errors.endswith("neuclip: interrupted twice: left at once\n")
    assert "Traceback" not in errors
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def test_work_that_may_stop_where_it_is_stops_there():
    class Stopped(Exception):
        pass

    def at_once(request):
        raise Stopped(request.name)

    before = [signal.getsignal(number) for number in interrupts.STOP_SIGNALS]
    with pytest.raises(Stopped, match="SIGTERM"), stop_requests(at_once):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert [signal.getsignal(number) for number in interrupts.STOP_SIGNALS] == before


def test_outside_of_the_main_thread_signals_stay_as_they_are():
    names = []

    def work():
        with stop_requests(lambda request: None) as request, interrupts.second_interrupt_ends():
            names.append((request.asked, request.name))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [(False, StopRequest().name)]
