"""Damaged and hostile input of every kind ends as an answer, as damage or as a refusal.

The cases of benchmarks/fuzz_readers.py that need milliseconds; the script runs all of them.
"""

import itertools
import os
import signal
import time

import fuzz_readers
import pytest
from fuzzing import runner

QUICK = [kind for kind in fuzz_readers.KINDS if kind not in fuzz_readers.SLOW]
CASES = 260


@pytest.fixture(scope="module")
def results():
    """The results of the cases, by kind."""
    fuzz_readers.prepare(QUICK)
    names = (name for name in fuzz_readers.names(10**6) if name.partition(":")[0] in QUICK)
    found = {}
    for result in runner.run(itertools.islice(names, CASES), fuzz_readers.KINDS):
        found.setdefault(result.case.partition(":")[0], []).append(result)
    return found


@pytest.mark.parametrize("kind", QUICK)
def test_no_input_ends_a_process(results, kind):
    assert len(results[kind]) >= CASES // len(QUICK)
    for result in results[kind]:
        assert result.good, f"--case {result.case}: {result.outcome}\n{result.detail}"


FAULTS = {
    "answer": lambda folder, rng: "answer",
    "traceback": lambda folder, rng: [][1],
    "dead": lambda folder, rng: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda folder, rng: time.sleep(60),
    "memory": lambda folder, rng: len(bytes([1]) * (600 * 2**20)),
    "files": lambda folder, rng: "answer" if not list(folder.iterdir()) else "damage",
}


def test_faults_are_seen_and_the_next_case_runs(monkeypatch):
    monkeypatch.setattr(runner, "SECONDS", 1)
    names = ["answer", "traceback", "dead", "hang", "memory", "files"]
    results = list(runner.run([f"{name}:0" for name in names], FAULTS))
    assert [result.case for result in results] == [f"{name}:0" for name in names]
    assert [result.outcome for result in results] == [
        "answer", "traceback", "dead", "hang", "traceback", "answer"
    ]  # fmt: skip
    assert "IndexError" in results[1].detail and "MemoryError" in results[4].detail


def test_what_does_not_happen_again_is_told_apart(tmp_path):
    def once(folder, rng):
        if (tmp_path / "seen").exists():
            return "answer"
        (tmp_path / "seen").touch()
        os._exit(3)

    (result,) = runner.run(["once:0"], {"once": once})
    assert result.outcome == "unrepeated" and result.detail.startswith("dead")
