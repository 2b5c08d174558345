"""Runs each part in a process with its own time limit, and writes what became of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpu_check.facts import Facts
from gpu_check.part import Job, Part, append

ROOT = Path(__file__).parents[2]
LAST_LINES = 6
"""Lines of a failed part's log that its result repeats."""


@dataclass(frozen=True)
class Check:
    """A check of one device.

    Attributes:
        facts: of the device.
        folder: for the results.
        scratch: for the files of the parts.
        minutes: until everything is stopped.
        toy: toy sizes.
    """

    facts: Facts
    folder: Path
    scratch: Path
    minutes: float
    toy: bool

    @property
    def results(self) -> Path:
        """One line of JSON a result."""
        return self.folder / "results.jsonl"

    @property
    def log(self) -> Path:
        """All output of all parts."""
        return self.folder / "log.txt"

    def run(self, parts: Sequence[Part]) -> int:
        """Runs the parts in order; returns how many failed or were stopped."""
        start, failed = time.time(), 0
        share = self.minutes * 60 / sum(part.minutes for part in parts)
        due = start
        for part in parts:
            due += part.minutes * share  # what an earlier part leaves is added
            begin = time.time()
            outcome, why = self._outcome(part, due)
            failed += outcome in {"failed", "stopped"}
            seconds = round(time.time() - begin, 1)
            row = {"part": part.name, "outcome": outcome, "seconds": seconds}
            append(self.results, row | ({"why": why} if why else {}))
            print(
                f"{seconds:6.1f} s  {part.name:10} {outcome}{f': {why}' if why else ''}", flush=True
            )
        append(
            self.results,
            {"part": "all", "seconds": round(time.time() - start, 1), "failed": failed},
        )
        return failed

    def _outcome(self, part: Part, due: float) -> tuple[str, str]:
        """What became of a part, and why if it did not pass."""
        if obstacle := part.obstacle(self.facts):
            return "left out", obstacle
        if due - time.time() < 1.0:
            return "left out", f"no time is left of {self.minutes:g} minutes"
        limit = due - time.time()
        files = self.scratch / part.name
        files.mkdir(exist_ok=True)
        job = Job(
            part.name, self.facts.device, self.toy, files, self.results, self.facts.free_gib, due
        )
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"--- {part.name}: {part.asks}\n")
            log.flush()
            begin = log.tell()
            code = _code(_command(part, job), log.fileno(), due)
        if code is None:
            return "stopped", f"not done within {limit:.0f} s"
        if code:
            text = self.log.read_bytes()[begin:].decode("utf-8", "replace").strip().splitlines()
            return "failed", " | ".join(text[-LAST_LINES:])
        return "passed", ""


def _command(part: Part, job: Job) -> list[str]:
    return [sys.executable, "-m", "gpu_check.child", f"gpu_check.{part.module}", job.to_json()]


def _code(words: list[str], output: int, due: float) -> int | None:
    """The exit code of a process; none if it had to be stopped, with all that it started."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src"), str(ROOT / "tests")])
    inherited = os.environ.get("PYTHONPATH")
    process = subprocess.Popen(
        words,
        stdout=output,
        stderr=output,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (path, inherited)))},
    )
    try:
        return process.wait(max(1.0, due - time.time()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # what a part leaves running would disturb the next
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
