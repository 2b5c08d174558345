"""Compares every method on the embedded data at equal samples seen.

    python studies/quality/run.py plan                      # done and open cells of the study
    python studies/quality/run.py report                    # its tables
    neuclip data demo --out demo-data
    python studies/quality/run.py run --data demo-data --out study --parallel 2
    python studies/quality/run.py plan --results study/results.jsonl

The runs are cells of a plan (`plan.py`). `neuclip` trains each one in a separate process with one
thread. The command can be killed at any time; the same command resumes it, also within a run.
`study/results.jsonl` gets one line per finished run; lines of another format, other code or other
data are refused. To continue the study itself, copy `results/full.jsonl` there. The whole plan
takes days of one core; every prefix of it is useful.
"""

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from plan import Cell, plan
from rows import ResultsFile, data_digest, lock

from neuclip.errors import Preempted, UserError
from neuclip.evaluation.metric_names import METRICS

MEMORY_PER_RUN = 2 * 2**30  # 1.1 GiB were measured with glyph-tiny at batch 256
DISK_PER_RUN = 2**30
HERE = Path(__file__).parent
EVALUATED = tuple(metric.key for metric in METRICS if metric.log)
TRAINED = ("samples_seen", "loss", "temperature", "lr", "grad_norm", "gamma", "weight_max")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train the open cells")
    run.add_argument("--data", type=Path, required=True, help="folder of `neuclip data demo`")
    run.add_argument("--out", type=Path, required=True, help="folder for results and checkpoints")
    run.add_argument("--parallel", type=int, default=1, help="runs at the same time")
    run.add_argument("--limit", type=int, help="stop after this number of runs")
    run.add_argument("--match", nargs="+", metavar="GLOB", help="only these cells: 'final_*'")
    run.add_argument(
        "--same-code", nargs="+", default=[], metavar="DIGEST",
        help="also continue rows of this code, which you know to compute the same numbers",
    )  # fmt: skip
    listing = commands.add_parser("plan", help="list done and open cells")
    report = commands.add_parser("report", help="print or write tables, draw figures")
    for command in (listing, report):
        command.add_argument("--results", type=Path, default=HERE / "results" / "full.jsonl")
    report.add_argument("--document", type=Path, help="write the tables between its markers")
    report.add_argument("--figures", type=Path, help="folder for the figures")
    report.add_argument("--page", type=Path, help="write the summary between its markers")
    cell = commands.add_parser("cell", help="train one cell (used by `run`)")
    cell.add_argument("spec", type=Path)
    return parser.parse_args()


# --- the runner -----------------------------------------------------------------------------


class Runner:
    """Starts a few cells at a time and collects their rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.out.mkdir(parents=True, exist_ok=True)
        self.data = args.data.resolve()
        self.results = ResultsFile(
            args.out / "results.jsonl", data_digest(self.data), args.same_code
        )
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
            for cell in plan(rows)
            if cell.name not in rows and cell.name not in self.running and self._wanted(cell)
        ]
        for cell in waiting:
            if len(self.running) >= self.args.parallel or self._limited():
                break
            self._start(cell)
        return bool(waiting) and not self._limited()

    def _wanted(self, cell: Cell) -> bool:
        globs = self.args.match
        return not globs or any(fnmatchcase(cell.name, glob) for glob in globs)

    def _limited(self) -> bool:
        return self.args.limit is not None and self.started >= self.args.limit

    def _start(self, cell: Cell) -> None:
        folder = self.args.out / "cells" / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        spec = folder / "cell.json"
        spec.write_text(json.dumps({"data": str(self.data), "cell": asdict(cell)}, indent=1))
        words = [sys.executable, __file__, "cell", str(spec)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
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
            self.results.append({"data": self.results.data, **json.loads(row.read_text())})
            shutil.rmtree(folder)
            say(f"finished {name}")
        return bool(ended)

    def _stop(self) -> None:
        """Stops the runs; they write a checkpoint first."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait()


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


# --- one run, in a separate process -----------------------------------------------------------


def run_cell(spec: Path) -> None:
    """Trains, measures, and writes `row.json` beside the cell's specification."""
    _stop_with_parent()
    with lock(spec.parent, wait=True):
        _run_cell(spec)


def _stop_with_parent() -> None:
    """Asks for SIGTERM when the runner is killed, upon which the run writes a checkpoint."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _run_cell(spec: Path) -> None:
    described = json.loads(spec.read_text())
    cell = Cell(**described["cell"])
    with Stopwatch(spec.parent / "times.json") as watch:
        found = _trained(cell, Path(described["data"]), spec.parent / "logs")
    times = {key: round(value, 1) for key, value in watch.spent.items()}
    partial = spec.parent / "row.json.partial"
    partial.write_text(json.dumps({**asdict(cell), "cell": cell.name, **facts(), **found, **times}))
    partial.replace(spec.parent / "row.json")


class Stopwatch:
    """Measures the time of a block, summed over interrupted processes that resume it.

    Args:
        path: file that keeps the sum between processes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0}

    def __enter__(self) -> "Stopwatch":
        self._start, self._cpu = time.perf_counter(), time.process_time()
        if self._path.exists():
            self.spent = json.loads(self._path.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        self.spent["seconds"] += time.perf_counter() - self._start
        self.spent["cpu_seconds"] += time.process_time() - self._cpu
        self._path.write_text(json.dumps(self.spent))


def _trained(cell: Cell, data: Path, logs: Path) -> dict[str, object]:
    """Trains and measures; a run whose loss becomes non-finite counts as failed."""
    import ideas  # noqa: F401  registers the variants of the pool
    from error import training_error

    from neuclip.training.assemble import train

    folder = logs / cell.name
    try:
        train(cell.config(data, logs))
    except Preempted:
        raise SystemExit(75) from None
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():
            raise  # training never started
        return {**records(folder), "failed": str(error).splitlines()[0]}
    epochs = range(cell.evaluated_every, cell.epochs + 1, cell.evaluated_every)
    errors = [training_error(folder, epoch) for epoch in epochs] if cell.measures else []
    return {**records(folder), "errors": errors}


def facts() -> dict[str, str]:
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"CPU ({platform.machine()}), {os.cpu_count()} cores, 1 thread per run",
        "torch": torch.__version__,
    }


def records(folder: Path) -> dict[str, list[dict[str, object]]]:
    """The run's own records, reduced to what the study uses."""
    from neuclip.run_folder import read_records

    evaluations, trained = [], []
    for record in read_records(folder / "metrics.jsonl"):
        if record["kind"] == "eval":
            metrics = record["metrics"]
            kept = {k: round(v, 5) for k, v in metrics.items() if k in EVALUATED or "normal" in k}
            where = {key: record[key] for key in ("epoch", "samples_seen", "split")}
            evaluations.append({**where, **kept})
        else:
            kept = {key: record[key] for key in TRAINED if key in record}
            trained.append({k: v and float(f"{v:.5g}") for k, v in kept.items()})
    return {"evaluations": evaluations, "training": trained}


def show_plan(args: argparse.Namespace) -> None:
    rows = ResultsFile(args.results, any_code=True).read()
    for cell in plan(rows):
        state = "failed" if rows.get(cell.name, {}).get("failed") else "done"
        print(f"{state if cell.name in rows else 'open':6} {cell.name}")


def main() -> int:
    args = arguments()
    try:
        if args.command == "run":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
            Runner(args).run()
        elif args.command == "cell":
            run_cell(args.spec)
        elif args.command == "plan":
            show_plan(args)
        else:
            from report import write_report

            rows = ResultsFile(args.results, any_code=True).read()
            write_report(rows, args.document, args.figures, args.page)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
