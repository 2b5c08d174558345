"""`neuclip runs`: the runs of a folder, one line each."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neuclip.config.sections import AUTO
from neuclip.errors import UserError, printable, quantity
from neuclip.evaluation.metric_names import MAIN_METRICS, METRICS
from neuclip.report.runs import LoadedRun, load_runs
from neuclip.run_folder import CANARY, RunFolder


@dataclass(frozen=True)
class ListedRun:
    """A run in one line.

    Attributes:
        name: name of its folder.
        method: the training method.
        data: the training data, shortened.
        progress: epochs done, of those asked for.
        best: best value of its metric, and when; empty if nothing was evaluated.
        state: running, finished, stopped, or why the folder cannot be read.
    """

    name: str
    method: str
    data: str
    progress: str
    best: str
    state: str


def list_runs(logs: Path, holder: Callable[[RunFolder], str | None]) -> list[ListedRun]:
    """The runs in a folder, by name; a run folder itself is a list of one.

    Args:
        logs: the folder of run folders.
        holder: says which process uses a run folder; None: no process does.

    Raises:
        UserError: the folder does not exist, or holds no run.
    """
    if not logs.is_dir():
        raise UserError(f"{logs}: no such folder")
    inside = [logs] if RunFolder(logs).config.is_file() else sorted(logs.iterdir())
    folders = [path for path in inside if RunFolder(path).config.is_file()]
    if not folders:
        raise UserError(
            f"{logs} holds no run: a run is a folder with {RunFolder(logs).config.name}, such as "
            "those in --logs of neuclip train"
        )
    return [_listed(path, holder) for path in folders]


def _listed(path: Path, holder: Callable[[RunFolder], str | None]) -> ListedRun:
    name = printable(path.name, 60)
    try:
        (run,) = load_runs([path])
    except (UserError, OSError) as error:
        return ListedRun(name, "-", "-", "-", "", printable(f"unreadable: {error}", 80))
    # The last steps of an epoch may have no training record.
    known = [record.get("epoch", 0.0) for record in run.train]
    done = max([*known, *(point.epoch for point in run.evaluations)], default=0.0)
    asked = _number(run, "optim.stop_epochs") or _number(run, "optim.epochs")
    using = holder(run.folder)
    if using is not None:
        state = f"running ({using})"
    elif _says_finished(run.folder) or (asked is not None and done >= asked):
        state = "finished"
    else:
        state = "stopped"
    data = run.config.get("data.train_data", "-").rstrip("/")
    length = quantity(float(f"{asked or done:.4g}"), "epoch")
    progress = f"{done:.4g} of {length}" if asked else length
    return ListedRun(name, run.method, printable(_shortened(data), 40), progress, _best(run), state)


def _shortened(data: str) -> str:
    """The last two parts of the path of each source."""
    return "::".join("/".join(part.split("/")[-2:]) for part in data.split("::"))


def _number(run: LoadedRun, key: str) -> float | None:
    try:
        value = float(run.config.get(key, "none"))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _best(run: LoadedRun) -> str:
    """The best value by `--best-metric`; without it, by the first data's main metric, as `auto`."""
    chosen = run.config.get("evaluation.best_metric", "none")
    split, _, key = chosen.rpartition("/")
    if chosen in {"none", AUTO}:
        splits = list(dict.fromkeys(point.split for point in run.evaluations))
        splits.sort(key=lambda split: split.startswith(CANARY))
        split = splits[0] if splits else ""
        known = {
            name for point in run.evaluations if point.split == split for name in point.metrics
        }
        key = next((metric.key for metric in MAIN_METRICS if metric.key in known), "main_metric")
    found = [
        (point.metrics[key], point.epoch)
        for point in run.evaluations
        if point.split == split and math.isfinite(point.metrics.get(key, math.nan))
    ]
    if not found:
        return ""
    metric = next((metric for metric in METRICS if metric.key == key), None)
    low = metric is not None and metric.better == "low"
    value, epoch = min(found, key=lambda pair: (pair[0] if low else -pair[0], pair[1]))
    shown = f"{100 * value:.2f} %" if metric is not None and metric.percent else f"{value:.4g}"
    return printable(f"{split}/{key} {shown} after epoch {epoch:g}", 80)


def _says_finished(folder: RunFolder) -> bool:
    """Whether the end of the log says so, as of a run that stopped early."""
    try:
        with folder.log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return False
    return bool(lines) and "| finished: " in lines[-1]
