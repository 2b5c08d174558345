"""The process of one cell: its row, its time, and what the study keeps of a run's records."""

import ctypes
import datetime
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neuclip.errors import Preempted, UserError
from neuclip.evaluation.metric_names import METRICS
from neuclip.files import write_whole
from studies.shared.folder_lock import lock

EVALUATED = tuple(metric.key for metric in METRICS if metric.log)
TRAINED = ("samples_seen", "loss", "temperature", "lr", "grad_norm", "gamma", "weight_max")


def run_cell(spec: Path, measure: Callable[[Mapping[str, Any], Path], Mapping[str, Any]]) -> None:
    """Computes a cell's row and writes it to `row.json`, beside its specification.

    Args:
        spec: the file that the runner wrote.
        measure: trains and measures, given the specification and the cell's folder.
    """
    _stop_with_parent()
    folder = spec.parent
    with lock(folder, wait=True):
        described = json.loads(spec.read_text(encoding="utf-8"))
        row = {**described["cell"], "cell": folder.name, **facts(), **measure(described, folder)}
        write_whole(folder / "row.json", json.dumps(row))


def _stop_with_parent() -> None:
    """Asks for SIGTERM when the runner is killed, upon which the run writes a checkpoint."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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

    @property
    def rounded(self) -> dict[str, float]:
        """The sum in seconds, for a row."""
        return {key: round(value, 1) for key, value in self.spent.items()}


def train_run(config: Any, folder: Path) -> str | None:
    """Trains a run to its end.

    Args:
        config: the settings.
        folder: of the run.

    Returns:
        Why the run failed, if its loss became non-finite.

    Raises:
        SystemExit: with 75, if a signal asked to stop; a checkpoint is written.
        UserError: training could not start.
    """
    from neuclip.training.assemble import train

    try:
        train(config)
    except Preempted:
        raise SystemExit(75) from None
    except UserError as error:
        if not (folder / "metrics.jsonl").exists():
            raise  # training never started
        return str(error).splitlines()[0]
    return None


def facts() -> dict[str, str]:
    """Date, machine and version of torch, for a row."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"CPU ({platform.machine()}), {os.cpu_count()} cores, 1 thread per run",
        "torch": torch.__version__,
    }


def records(folder: Path) -> dict[str, list[dict[str, object]]]:
    """The run's own records, reduced to what a study uses."""
    from neuclip.run_folder import read_records

    evaluations, trained = [], []
    for record in read_records(folder / "metrics.jsonl"):
        if record["kind"] == "eval":
            where = {key: record[key] for key in ("epoch", "samples_seen", "split")}
            evaluations.append({**where, **kept_metrics(record["metrics"])})
        else:
            kept = {key: record[key] for key in TRAINED if key in record}
            trained.append({k: v and float(f"{v:.5g}") for k, v in kept.items()})
    return {"evaluations": evaluations, "training": trained}


def kept_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an evaluation that a row keeps."""
    return {k: round(v, 5) for k, v in metrics.items() if k in EVALUATED or "normal" in k}
