"""Damaged files of every kind end as an answer, as damage or as a refusal: see the benchmark."""

import importlib.util
import os
import signal
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "fuzz_readers.py"
_spec = importlib.util.spec_from_file_location("fuzz_readers", SCRIPT)
assert _spec is not None and _spec.loader is not None
fuzz_readers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz_readers)


@pytest.mark.parametrize("kind", fuzz_readers.KINDS)
def test_damaged_files_end_no_process(kind):
    for seed in range(7):
        found, detail = fuzz_readers.outcome(fuzz_readers.KINDS[kind], seed)
        assert found in fuzz_readers.GOOD, f"seed {seed}: {found}\n{detail}"


@pytest.mark.parametrize(
    ("work", "outcome"),
    [
        (lambda: "answer", "answer"),
        (lambda: [][1], "traceback"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "dead"),
        (lambda: time.sleep(60), "hang"),
        (lambda: bytes([1]) * (600 * 2**20) and "answer", "traceback"),
    ],
)
def test_faults_are_seen(work, outcome, monkeypatch):
    monkeypatch.setattr(fuzz_readers, "SECONDS", 0.5 if outcome == "hang" else 20)
    assert fuzz_readers._in_child(work)[0] == outcome
