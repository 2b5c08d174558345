"""The runner of a study: one process per cell, a few at a time; it can be killed and resumed.

A study gives it the plan, a function of the rows so far, and what each process gets to know: the
cell, the data and where to leave its row (`cell.json`). `studies.shared.cell_process` is the other
side.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from neuclip.errors import UserError
from studies.shared.code_digest import PACKAGES
from studies.shared.folder_lock import lock
from studies.shared.results_file import ResultsFile, Row

MEMORY_PER_RUN = 2 * 2**30  # 1.1 GiB were measured with glyph-tiny at batch 256
DISK_PER_RUN = 2**30


class AnyCell(Protocol):
    """A cell of a study: a dataclass with a name."""

    __dataclass_fields__: dict[str, Any]

    @property
    def name(self) -> str:
        """Unique in the plan."""
        ...


@dataclass
class Study:
    """What the runner needs of a study.

    Attributes:
        module: starts a cell: `python -m MODULE cell SPEC`.
        plan: the cells, in order, given the rows so far.
        facts: what a cell's process gets to know besides the cell; it is JSON.
    """

    module: str
    plan: Callable[[Mapping[str, Row]], Sequence[Any]]
    facts: Callable[[Any], dict[str, Any]]


def add_runner_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the runner reads."""
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for results and checkpoints"
    )
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    parser.add_argument("--limit", type=int, help="stop after this number of runs")
    parser.add_argument("--match", nargs="+", metavar="GLOB", help="only cells with such a name")
    add_same_code(parser)


def add_same_code(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--same-code", nargs="+", default=[], metavar="DIGEST",
        help="also accept rows of this code, which you know to compute the same numbers",
    )  # fmt: skip


def matches(name: str, globs: Sequence[str] | None) -> bool:
    """Whether `--match` chooses a cell; without patterns it chooses all."""
    return not globs or any(fnmatchcase(name, glob) for glob in globs)


class Runner:
    """Starts a few cells at a time and collects their rows.

    Args:
        study: what to run.
        results: the file of the rows.
        args: of `add_runner_flags`.
    """

    def __init__(self, study: Study, results: ResultsFile, args: argparse.Namespace) -> None:
        self.study, self.results, self.args = study, results, args
        args.out.mkdir(parents=True, exist_ok=True)
        check_machine(args.out, args.parallel)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.started = 0

    def run(self) -> None:
        with lock(self.args.out):
            try:
                while self._fill() or self.running:
                    while not self._reap():
                        time.sleep(1.0)
            finally:
                self._stop()

    def _fill(self) -> bool:
        """Starts as many cells as allowed; returns whether any are left to start."""
        rows = self.results.read()
        waiting = [
            cell
            for cell in self.study.plan(rows)
            if cell.name not in rows and cell.name not in self.running and self._wanted(cell)
        ]
        for cell in waiting:
            if len(self.running) >= self.args.parallel or self._limited():
                break
            self._start(cell)
        return bool(waiting) and not self._limited()

    def _wanted(self, cell: AnyCell) -> bool:
        return matches(cell.name, self.args.match)

    def _limited(self) -> bool:
        return self.args.limit is not None and self.started >= self.args.limit

    def _start(self, cell: AnyCell) -> None:
        folder = self.args.out.resolve() / "cells" / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        spec = folder / "cell.json"
        facts = {**self.study.facts(cell), "cell": asdict(cell)}
        spec.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        words = [sys.executable, "-m", self.study.module, "cell", str(spec)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path()}
        with (folder / "output.log").open("ab") as log:
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        self.running[cell.name] = process
        self.started += 1
        say(f"started {cell.name}")

    def _reap(self) -> bool:
        """Collects the rows of finished runs; returns whether there were any."""
        ended = [name for name, process in self.running.items() if process.poll() is not None]
        for name in ended:
            process = self.running.pop(name)
            folder = self.args.out / "cells" / name
            row = folder / "row.json"
            if not row.exists():
                tail = (folder / "output.log").read_text(errors="replace")[-500:]
                raise UserError(
                    f"{name} exited with code {process.returncode} and without a result; the end "
                    f"of {folder / 'output.log'}:\n{tail}"
                )
            self.results.append(json.loads(row.read_text(encoding="utf-8")))
            shutil.rmtree(folder)
            say(f"finished {name}")
        return bool(ended)

    def _stop(self) -> None:
        """Stops the runs; they write a checkpoint first."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait()


def _search_path() -> str:
    """The path on which a cell's process finds the same `studies` as this one."""
    return os.pathsep.join([str(PACKAGES["studies"].parent), *filter(None, sys.path)])


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def check_machine(out: Path, parallel: int) -> None:
    """Checks memory and disk before anything starts.

    Raises:
        UserError: this machine has too little; the message gives both numbers.
    """
    if parallel < 1:
        raise UserError(f"--parallel {parallel}: must be at least 1")
    needed = parallel * MEMORY_PER_RUN
    free = available_memory()
    if free is not None and free < needed:
        raise UserError(
            f"--parallel {parallel} needs {needed / 2**30:.0f} GiB of memory, "
            f"{free / 2**30:.1f} GiB are free: lower --parallel"
        )
    disk = shutil.disk_usage(out).free
    if disk < parallel * DISK_PER_RUN:
        raise UserError(
            f"--out {out}: {disk / 2**30:.1f} GiB are free, checkpoints need {parallel} GiB"
        )


def available_memory() -> int | None:
    """Bytes available to a new process; None where the system does not report them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def exit_code(action: Callable[[], object], *, stoppable: bool = False) -> int:
    """Carries out a command of a study, prints its error, and returns the exit code.

    Args:
        action: the command.
        stoppable: whether SIGTERM ends it as a keyboard's interrupt does, with the cells stopped.
    """
    if stoppable:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    try:
        action()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader left (`plan | head`), and the flush at exit would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0
