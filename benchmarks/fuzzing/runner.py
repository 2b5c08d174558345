"""Runs cases in child processes, each of which handles many; a fault is attributed to its case.

The parent has loaded everything, and forks. A child gets the names of cases through a pipe, and
answers each with a line of JSON. A child that dies or is silent for `SECONDS` is replaced, and its
case is run once more, alone: only what happens again is a fault, and otherwise it is counted as
`unrepeated`.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import random
import resource
import select
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fuzzing.outcomes import GOOD

SECONDS, MEMORY = 20, 512 * 2**20
_CASES_A_CHILD = 400
_MALLOC_ARENAS = -8  # M_ARENA_MAX: threads would reserve 64 MB of addresses each

Case = Callable[[Path, random.Random], str]
"""Writes files into an empty folder, reads them, and returns how that ended."""


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Attributes:
        case: `KIND:SEED`.
        outcome: `answer`, `damage`, `refusal`, or a fault: `traceback`, `hang`, `dead`, `memory`.
        detail: of a fault.
        seconds: wall time.
        megabytes: largest resident memory above that at the start of the case.
    """

    case: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0

    @property
    def good(self) -> bool:
        """Whether it ended as it should."""
        return self.outcome in GOOD


def run(names: Iterable[str], kinds: Mapping[str, Case]) -> Iterator[Result]:
    """Runs cases in order; what a child did not survive is run again in a child of its own."""
    child = None
    try:
        for name in names:
            if child is None or child.handled >= _CASES_A_CHILD:
                child = _renewed(child, kinds)
            result = child.ask(name)
            if result.outcome in ("dead", "hang", "memory"):
                child = _renewed(child, kinds)
                again = child.ask(name)
                if again.good:
                    again = Result(name, "unrepeated", f"{result.outcome}: {result.detail}")
                child, result = _renewed(child, kinds), again
            yield result
    finally:
        if child is not None:
            child.close()


def _renewed(child: "_Child | None", kinds: Mapping[str, Case]) -> "_Child":
    if child is not None:
        child.close()
    return _Child(kinds)


class _Child:
    """A child process that runs cases."""

    def __init__(self, kinds: Mapping[str, Case]) -> None:
        self.handled = 0
        asked, self._asking = os.pipe()
        self._answers, answering = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._asking)
            os.close(self._answers)
            _serve(asked, answering, kinds)
        os.close(asked)
        os.close(answering)
        self._alive = True

    def ask(self, name: str) -> Result:
        """Runs a case; the child is of no use after `dead` and `hang`."""
        self.handled += 1
        start, queued = time.monotonic(), self._queued()
        with contextlib.suppress(BrokenPipeError):
            os.write(self._asking, f"{name}\n".encode())
        text = b""
        while not text.endswith(b"\n"):
            if not select.select([self._answers], [], [], SECONDS / 20)[0]:
                if time.monotonic() - start - self._queued() + queued < SECONDS:
                    continue
                self.close()
                return Result(name, "hang", f"more than {SECONDS} s", SECONDS)
            part = os.read(self._answers, 65536)
            if not part:
                status = self.close()
                return Result(name, "dead", f"wait status {status}", time.monotonic() - start)
            text += part
        return Result(name, seconds=round(time.monotonic() - start, 3), **json.loads(text))

    def _queued(self) -> float:
        """Seconds in which the child could have run, and other programs had the processor."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self._pid}/schedstat").read_text().split()[1]) / 1e9
        return 0.0

    def close(self) -> int:
        """Ends the child; returns how it ended."""
        if not self._alive:
            return 0
        self._alive = False
        os.close(self._asking)
        os.close(self._answers)
        # It may have died already: then the signal changes nothing.
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if not done:
            time.sleep(0.02)
            done, status = os.waitpid(self._pid, os.WNOHANG)
        if not done:
            os.kill(self._pid, signal.SIGKILL)
            _, status = os.waitpid(self._pid, 0)
        return status


def _serve(asked: int, answering: int, kinds: Mapping[str, Case]) -> None:
    """Runs in the child, until the parent closes the pipe."""
    faulthandler.disable()
    gc.freeze()
    ctypes.CDLL(None).mallopt(_MALLOC_ARENAS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    try:
        with os.fdopen(asked) as names:
            for name in names:
                found = _outcome(name.strip(), kinds)
                os.write(answering, json.dumps(found).encode() + b"\n")
    finally:
        os._exit(0)


def _outcome(name: str, kinds: Mapping[str, Case]) -> dict[str, object]:
    """How a case ends, with limits on memory, in this process."""
    kind = name.partition(":")[0]
    gc.collect()  # quick: what the parent made is frozen
    before = _resident()
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        _limit_memory(_addresses() + MEMORY)
        try:
            outcome, detail = kinds[kind](Path(folder), random.Random(name)), ""
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            outcome, detail = "traceback", text[-1800:].encode("utf-8", "replace").decode()
        finally:
            os.chdir("/")
            _limit_memory(resource.RLIM_INFINITY)
    above = _peak() - before
    if above > MEMORY and outcome in GOOD:
        outcome, detail = "memory", f"{above / 2**20:.0f} MB above the start"
    return {"outcome": outcome, "detail": detail, "megabytes": round(above / 2**20, 1)}


def _limit_memory(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def _addresses() -> int:
    """Bytes of address space that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _resident() -> int:
    """Bytes in memory; the largest number so far begins anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    """The largest number of bytes in memory since `_resident`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass
class Totals:
    """Sums over results, by kind."""

    outcomes: dict[str, Counter[str]]
    seconds: dict[str, float]
    slowest: dict[str, float]
    megabytes: dict[str, float]
    faults: list[dict[str, object]]

    @classmethod
    def of(cls, results: Iterable[Result]) -> "Totals":
        """The sums."""
        totals = cls({}, {}, {}, {}, [])
        for result in results:
            kind = result.case.partition(":")[0]
            totals.outcomes.setdefault(kind, Counter())[result.outcome] += 1
            totals.seconds[kind] = round(totals.seconds.get(kind, 0) + result.seconds, 2)
            totals.slowest[kind] = max(totals.slowest.get(kind, 0), result.seconds)
            totals.megabytes[kind] = max(totals.megabytes.get(kind, 0), result.megabytes)
            if not result.good:
                totals.faults.append(asdict(result))
        return totals
