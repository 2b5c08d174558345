"""Reads run folders: complete, killed in the middle, or not evaluated yet."""

import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from neuclip.catalogue.neuclip import recorded_method
from neuclip.config.bounded_yaml import LARGEST
from neuclip.config.recipes import read_yaml
from neuclip.errors import UserError, printable
from neuclip.evaluation.results import Gallery, read_eval_results, read_gallery
from neuclip.files import describe
from neuclip.run_folder import RunFolder, record_lines
from neuclip.untrusted import read_file

Numbers = dict[str, float]

EXAMPLES = 20
_LARGEST_REPORT = 2**26  # bytes
_LARGEST = 1e100
"""Larger numbers cannot be measurements, and overflow when figures are drawn."""


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one split at one epoch; `samples_seen` is none if unknown."""

    split: str
    epoch: float
    samples_seen: float | None
    metrics: Numbers


@dataclass(frozen=True)
class DamagedSample:
    """One corrupt sample; `shard` is a file's name."""

    shard: str
    key: str
    kind: str
    detail: str


@dataclass(frozen=True)
class DataRead:
    """Identity of the training data, as `neuclip.data.identity` defines it."""

    samples: int
    digest: str


@dataclass(frozen=True)
class DataReport:
    """Corrupt samples of the training data: their number, by kind, with examples.

    `data` is none in reports of earlier versions.
    """

    total: int
    by_kind: dict[str, int]
    examples: list[DamagedSample]
    data: DataRead | None = None


@dataclass(frozen=True)
class LoadedRun:
    """The content of a run folder.

    Attributes:
        folder: its paths.
        label: name of the folder, with its parent's if two runs have the same name.
        method: name of the method.
        config: flat settings, `section.key` to text.
        config_text: the configuration file.
        train: training records by ascending step.
        evaluations: evaluations by ascending epoch.
        galleries: retrieved images, by split.
        damage: corrupt samples of the training data; none if they were not recorded.
        gaps: missing or unreadable content, as sentences.
        warnings: what the run warned of, and after which epoch, as sentences.
    """

    folder: RunFolder
    label: str
    method: str
    config: dict[str, str]
    config_text: str
    train: list[Numbers]
    evaluations: list[Evaluation]
    galleries: dict[str, Gallery]
    damage: DataReport | None
    gaps: list[str]
    warnings: list[str] = field(default_factory=list[str])

    @property
    def data(self) -> DataRead | None:
        """Identity of the training data; none if it was not recorded."""
        return None if self.damage is None else self.damage.data

    def series(self, key: str) -> list[tuple[float, float]]:
        """(samples seen, value) of a training record's key, where both are finite numbers."""
        points = [(r.get("samples_seen", math.nan), r.get(key, math.nan)) for r in self.train]
        return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]

    def eval_series(self, split: str, key: str) -> list[tuple[float, float]]:
        """(samples seen, value) of a metric of a split."""
        return [
            (point.samples_seen, point.metrics[key])
            for point in self.evaluations
            if point.split == split and point.samples_seen is not None and key in point.metrics
        ]

    def final(self, split: str) -> Numbers:
        """The metrics of a split at its latest evaluation."""
        points = [point for point in self.evaluations if point.split == split]
        latest = max((point.epoch for point in points), default=0.0)
        merged: Numbers = {}
        for point in points:
            if point.epoch == latest:
                merged |= point.metrics
        return merged

    def median(self, key: str) -> float | None:
        """Median of a training record's key: robust to slow first steps."""
        values = [y for _, y in self.series(key)]
        return statistics.median(values) if values else None

    def share(self, key: str) -> float | None:
        """Mean of a training record's key, weighted by the records' seconds."""
        known = [r for r in self.train if key in r]
        seconds = sum(r.get("seconds", 1.0) for r in self.train)
        return sum(r[key] * r.get("seconds", 1.0) for r in known) / seconds if known else None

    def last(self, key: str) -> float | None:
        """Last finite value of a training record's key."""
        values = self.series(key)
        return values[-1][1] if values else None


def load_runs(folders: list[Path]) -> list[LoadedRun]:
    """Reads run folders; a folder given twice counts once.

    Raises:
        UserError: no folder is given, or one is not a run folder.
    """
    unique = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not unique:
        raise UserError("a report needs at least one run folder")
    names = [folder.name for folder in unique]
    labels = (
        folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}"
        for folder in unique
    )
    return [
        _load(RunFolder(folder), printable(label, 300))
        for folder, label in zip(unique, labels, strict=True)
    ]


def _load(folder: RunFolder, label: str) -> LoadedRun:
    if not folder.path.is_dir():
        found = "is a file, not a run folder" if folder.path.exists() else "no such folder"
        raise UserError(f"{folder.path}: {found}")
    if not folder.config.is_file():
        raise UserError(
            f"{folder.path} is not a run folder: it has no {folder.config.name} "
            f"(a run folder is <logs>/<name>; all runs of a folder: {folder.path}/*)"
        )
    tree = read_yaml(folder.config)
    method = tree.get("method")
    gaps: list[str] = []
    warnings: list[str] = []
    train, evaluations = _read_metrics(folder.metrics, gaps, warnings)
    return LoadedRun(
        folder=folder,
        label=label,
        method=recorded_method(method) if isinstance(method, dict) else "unknown",
        config=dict(_flatten(tree)),
        config_text=read_file(folder.config, LARGEST).decode("utf-8", "replace"),
        train=train,
        evaluations=_add_results(folder, evaluations, gaps),
        galleries=_read_galleries(folder, gaps),
        damage=_read_damage(folder.data_report, gaps),
        gaps=gaps,
        warnings=warnings,
    )


def _read_metrics(
    path: Path, gaps: list[str], warnings: list[str]
) -> tuple[list[Numbers], list[Evaluation]]:
    """Training records and evaluations; warnings are added to `warnings`.

    A resumed run may record some steps twice: the later record counts.
    """
    records = _read_lines(path, gaps)
    absurd: set[str] = set()
    train: list[Numbers] = []
    evaluations: list[Evaluation] = []
    for record in records:
        if record is None:
            continue
        numbers = _numbers(record, absurd)
        if record.get("kind") == "train":
            step = numbers.get("step", math.inf)
            while train and train[-1].get("step", -math.inf) >= step:
                train.pop()
            train.append(numbers)
        elif record.get("kind") == "eval":
            split, epoch = str(record.get("split", "")), numbers.get("epoch", 0.0)
            evaluations = [e for e in evaluations if e.split != split or e.epoch < epoch]
            metrics = _numbers(record.get("metrics"), absurd)
            evaluations.append(Evaluation(split, epoch, numbers.get("samples_seen"), metrics))
        elif record.get("kind") == "warning":
            text = printable(str(record.get("text", "")), 600)
            warnings.append(f"after epoch {numbers.get('epoch', 0.0):g}: {text}")
    _add_absurd(gaps, path.name, absurd)
    broken = [number for number, record in enumerate(records, start=1) if record is None]
    if broken and broken == [len(records)]:
        gaps.append(f"the last line of {path.name} is cut off, as in a killed run; it is left out")
    elif broken:
        where = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        gaps.append(f"{path.name} has unreadable lines, which are left out: {where}")
    if records and not train:
        gaps.append(f"{path.name} has no training records: no training curves")
    return train, evaluations


def _add_results(folder: RunFolder, known: list[Evaluation], gaps: list[str]) -> list[Evaluation]:
    """Adds the results files; samples seen are those of the evaluation during training."""
    found = list(known)
    for epoch, path in folder.results_by_epoch().items():
        try:
            results = read_eval_results(path)
        except UserError as error:
            gaps.append(_without_folder(error, path.parent))
            continue
        seen = next((e.samples_seen for e in known if e.epoch == epoch), None)
        absurd: set[str] = set()
        for result in results:
            same = [e for e in found if e.split == result.key and e.epoch == epoch]
            metrics = _numbers(result.metrics, absurd)
            for older in same:
                metrics = {**older.metrics, **metrics}
                found.remove(older)
            found.append(Evaluation(result.key, epoch, seen, metrics))
        _add_absurd(gaps, path.name, absurd)
    if not found:
        gaps.append(
            f"no evaluation yet: neither in {folder.metrics.name} nor in {folder.eval_results.name}"
        )
    return sorted(found, key=lambda evaluation: evaluation.epoch)


def _read_galleries(folder: RunFolder, gaps: list[str]) -> dict[str, Gallery]:
    galleries: dict[str, Gallery] = {}
    for path in folder.galleries():
        try:
            gallery = read_gallery(path)
        except UserError as error:
            gaps.append(_without_folder(error, path.parent))
        else:
            galleries[gallery.split] = gallery
    if not galleries:
        gaps.append("no gallery of retrieved images")
    return galleries


def _read_damage(path: Path, gaps: list[str]) -> DataReport | None:
    if not path.is_file():
        return None
    try:
        report = TypeAdapter(DataReport).validate_json(read_file(path, _LARGEST_REPORT))
    except (OSError, ValidationError):
        gaps.append(f"{path.name} is unreadable")
        return None
    examples = [replace(e, shard=Path(e.shard).name) for e in report.examples[:EXAMPLES]]
    return replace(report, examples=examples)


def _without_folder(error: UserError, folder: Path) -> str:
    """The message without the path of the folder: a report may be published."""
    return str(error).replace(f"{folder}/", "")


def _numbers(record: object, absurd: set[str]) -> Numbers:
    """The numeric entries of an object. Keys of numbers that cannot be drawn go to `absurd`."""
    if not isinstance(record, dict):
        return {}
    found: Numbers = {}
    for key, value in record.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if _LARGEST < abs(value) < math.inf:  # NaN and infinity are recorded as they are
            absurd.add(printable(str(key)))
        else:
            found[str(key)] = float(value)
    return found


def _read_lines(path: Path, gaps: list[str]) -> list[dict[str, Any] | None]:
    if not path.is_file():
        gaps.append(f"{path.name} is missing: no curves")
        return []
    try:
        return record_lines(path)
    except OSError as error:
        gaps.append(f"{path.name} cannot be read: {describe(error)}")
        return []


def _add_absurd(gaps: list[str], name: str, absurd: set[str]) -> None:
    if absurd:
        keys = ", ".join(sorted(absurd)[:5])
        gaps.append(f"{name} has numbers beyond {_LARGEST:g}, which are left out: {keys}")


def _flatten(tree: object, path: str = "") -> list[tuple[str, str]]:
    """Leaves of nested objects as (dotted path, text); lists of plain values are one leaf."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, dict | list) for value in tree):
        items = [(str(position), value) for position, value in enumerate(tree, start=1)]
    elif isinstance(tree, list):
        return [(path, ", ".join(map(str, tree)) or "none")]
    else:
        return [(path, "none" if tree is None else str(tree))]
    return [
        leaf for key, value in items for leaf in _flatten(value, f"{path}.{key}" if path else key)
    ]
