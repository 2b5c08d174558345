"""Every method on the embedded data at equal samples seen: which is best, and what is worth what.

    neuclip data demo --out demo-data
    python studies/quality/run.py run --data demo-data --out study --parallel 2
    python studies/quality/run.py plan --out study          # what is done and what is not
    python studies/quality/run.py report --out study        # tables and figures

The runs are cells of a plan (`plan.py`), each trained by `neuclip` itself in a process of
its own with one thread. Kill it at any time: the same command goes on where it stopped, in the
middle of a run too. `study/results.jsonl` gets a line for each run that ended; lines of another
format, other code or other data are refused. The whole plan takes days of one core; it comes in an
order in which every prefix is useful.
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
EVALUATED = tuple(metric.key for metric in METRICS if metric.log)
TRAINED = ("samples_seen", "loss", "temperature", "lr", "grad_norm", "gamma", "weight_max")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "plan", "report"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--same-code", nargs="+", default=[], metavar="DIGEST")
        if name == "run":
            command.add_argument("--data", type=Path, required=True)
            command.add_argument("--parallel", type=int, default=1)
            command.add_argument("--limit", type=int, help="stop after so many runs")
            command.add_argument(
                "--match", nargs="+", metavar="GLOB", help="only cells of such a name: 'final_*'"
            )
        if name == "report":
            command.add_argument("--document", type=Path, help="put the tables between its markers")
            command.add_argument("--figures", type=Path, help="folder for the figures")
    cell = commands.add_parser("cell")
    cell.add_argument("spec", type=Path)
    return parser.parse_args()


# --- the runner -----------------------------------------------------------------------------


class Runner:
    """Starts cells, a few at a time, and collects their rows."""

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
        """Starts what there is room for; whether anything is left to start."""
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
        """Collects the rows of runs that ended; whether there was one."""
        ended = [name for name, process in self.running.items() if process.poll() is not None]
        for name in ended:
            process = self.running.pop(name)
            folder = self.args.out / "cells" / name
            row = folder / "row.json"
            if not row.exists():
                tail = (folder / "output.log").read_text(errors="replace")[-500:]
                raise UserError(
                    f"{name} ended with code {process.returncode} and without a result; the end "
                    f"of {folder / 'output.log'}:\n{tail}"
                )
            self.results.append({"data": self.results.data, **json.loads(row.read_text())})
            shutil.rmtree(folder)
            say(f"finished {name}")
        return bool(ended)

    def _stop(self) -> None:
        """The runs write a checkpoint and end."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait()


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


def check_machine(out: Path, parallel: int) -> None:
    """Refuses before anything starts what this machine cannot hold.

    Raises:
        UserError: says what there is and what is needed.
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
    """Bytes that a new process can have; none where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


# --- one run, in a process of its own ---------------------------------------------------------


def run_cell(spec: Path) -> None:
    """Trains, measures, and writes `row.json` beside the cell's description."""
    _end_with_parent()
    with lock(spec.parent, wait=True):
        _run_cell(spec)


def _end_with_parent() -> None:
    """A runner that is killed takes its runs along: they write a checkpoint and end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _run_cell(spec: Path) -> None:
    from ideas import using

    described = json.loads(spec.read_text())
    cell = Cell(**described["cell"])
    with Stopwatch(spec.parent / "times.json") as watch, using(cell.idea):
        found = _trained(cell, Path(described["data"]), spec.parent / "logs")
    times = {key: round(value, 1) for key, value in watch.spent.items()}
    partial = spec.parent / "row.json.partial"
    partial.write_text(json.dumps({**asdict(cell), "cell": cell.name, **facts(), **found, **times}))
    partial.replace(spec.parent / "row.json")


class Stopwatch:
    """The time of a block, over all processes that were interrupted inside it and began again.

    Args:
        path: where it is kept in between.
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
    """Trains and measures; a run that ends with a loss that is not finite counts as failed."""
    from error import training_error

    from neuclip.training.assemble import train

    folder = logs / cell.name
    try:
        train(cell.config(data, logs))
    except Preempted:
        raise SystemExit(75) from None
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():
            raise  # it never began
        return {**records(folder), "failed": str(error).splitlines()[0]}
    epochs = range(cell.judged_every, cell.epochs + 1, cell.judged_every)
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
    """What the run itself recorded, shortened."""
    from neuclip.training.records.sinks import read_records

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
    rows = ResultsFile(args.out / "results.jsonl", same_code=args.same_code).read()
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

            results = ResultsFile(args.out / "results.jsonl", same_code=args.same_code)
            write_report(results.read(), args.document, args.figures)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
