"""Sinks for a run's records: a JSON lines file and the console."""

import contextlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from neuclip.console import ProgressBar
from neuclip.evaluation.metric_names import METRICS
from neuclip.files import open_to_append, write_whole, writing
from neuclip.run_folder import read_records

log = logging.getLogger("neuclip")

SECTIONS = ("data", "encode", "loss", "normalizer", "backward", "optimizer")
"""The sections of a step, in the order in which log lines show their times."""

Record = Mapping[str, Any]
Sink = Callable[[Record], None]


class JsonLines:
    """Writes `metrics.jsonl`, one JSON object a line; everything else is derived from it.

    Args:
        path: the file.
        from_step: the step that the run starts from. Records of later steps are dropped: a process
            wrote them after this checkpoint, before it was killed. Broken lines are dropped, too.
        from_warm_step: the same for batches of the warm start.
    """

    def __init__(self, path: Path, from_step: int, from_warm_step: int = 0) -> None:
        kept = [
            record
            for record in read_records(path)
            if record["step"] <= from_step and record.get("warm_step", 0) <= from_warm_step
        ]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path = path
        with writing(path):
            self._file = open_to_append(path)

    def __call__(self, record: Record) -> None:
        """Writes a record at once, so that a killed run keeps it; NaN and infinity become null."""
        plain = {key: _plain(value) for key, value in record.items()}
        with writing(self._path):
            self._file.write(json.dumps(plain) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # reported when it was written
            self._file.close()


def _plain(value: Any) -> Any:  # noqa: ANN401  any JSON value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return value


class ConsoleSink:
    """Logs a line per record, and shows a progress bar on a terminal.

    Args:
        total_steps: steps of the whole run.
        done: steps done already, in a resumed run.
    """

    def __init__(self, total_steps: int, done: int) -> None:
        self._total = total_steps
        self._bar = ProgressBar(total_steps, done)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.advance(step)

    def __call__(self, record: Record) -> None:
        """Logs a record."""
        if record["kind"] == "eval":
            log.info("%s", evaluation_line(record))
            return
        if record["kind"] == "warning":
            log.warning("%s", record["text"])
            return
        if record["kind"] == "warm_start":
            log.info("warm start: batch %d  %s", record["warm_step"], training_line(record))
            return
        speed = f"{record['samples_per_second']:.0f} samples/s"
        self._bar.note([f"loss {record['loss']:.4f}", speed, f"epoch {record['epoch']:.2f}"])
        log.info("%6d/%d  %s", record["step"], self._total, training_line(record))

    def close(self) -> None:
        """Removes the bar."""
        self._bar.close()


def training_line(record: Record) -> str:
    """Formats a training record as a line of text."""
    parts = [
        f"epoch {record['epoch']:.2f}",
        f"loss {record['loss']:.4f}",
        f"tau {record['temperature']:.4f}",
    ]
    if "lr" in record:
        parts.append(f"lr {record['lr']:.2e}")
    if "gamma" in record:
        parts.append(f"gamma {record['gamma']:.2f}")
    parts.append(f"{record['samples_per_second']:.0f} samples/s")
    shares = {key[6:]: value for key, value in record.items() if key.startswith("share_")}
    sections = [*SECTIONS, *sorted(shares.keys() - set(SECTIONS))]
    shown = [f"{name} {shares[name]:.0%}" for name in sections if shares.get(name, 0) >= 0.005]
    return "  ".join([*parts, "time: " + " ".join(shown)])


def evaluation_line(record: Record) -> str:
    """Formats an evaluation record as a line of text."""
    metrics = record["metrics"]
    shown = [metric for metric in METRICS if metric.log and metrics.get(metric.key) is not None]
    parts = [
        f"{metric.key} {metrics[metric.key]:{'.2%' if metric.percent else '.4f'}}"
        for metric in shown
    ]
    main = metrics.get("main_metric")
    if main is not None and main not in [metrics[metric.key] for metric in shown]:
        parts.append(f"main metric {main:.2%}")
    if "partial_of" in metrics:
        parts.append(f"on {metrics['num_samples']:.0f} of {metrics['partial_of']:.0f} samples")
    if "chance" in metrics:
        parts.append(f"chance {metrics['chance']:.2%}")
    if "normalizer_mse" in metrics:
        batch = metrics.get("minibatch_normalizer_mse", math.nan)
        parts.append(f"normalizer MSE {metrics['normalizer_mse']:.2f} (batch {batch:.2f})")
    return f"{record['split']} after epoch {record['epoch']:g}: " + "  ".join(parts)
