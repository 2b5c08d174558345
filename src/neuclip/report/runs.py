"""Run folders as the report reads them: whole, killed in the middle, or not judged yet."""

import json
import math
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from neuclip.config.recipes import read_yaml
from neuclip.errors import UserError
from neuclip.evaluation.results import Gallery, read_eval_results, read_gallery

Record = dict[str, float]

EXAMPLES = 20


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one split at one point of a run; `samples_seen` is none where unknown."""

    split: str
    epoch: float
    samples_seen: float | None
    metrics: Record


@dataclass(frozen=True)
class DamagedSample:
    """One example of damage; `shard` is a file's name."""

    shard: str
    key: str
    kind: str
    detail: str


@dataclass(frozen=True)
class DataReport:
    """What of the training data could not be read."""

    total: int
    by_kind: dict[str, int]
    examples: list[DamagedSample]


@dataclass(frozen=True)
class Run:
    """What a run folder tells.

    Attributes:
        folder: The folder.
        label: Name of the folder (with its parent's where two runs share one).
        method: Name of the method.
        config: Flat settings, `section.key` to text.
        config_text: The configuration file as it stands.
        train: Training records by ascending step.
        evaluations: Evaluations in the order of training.
        galleries: Retrieved pictures, by split.
        damage: What of the training data could not be read; none if there is no such file.
        gaps: What is missing or unreadable, in words.
    """

    folder: Path
    label: str
    method: str
    config: dict[str, str]
    config_text: str
    train: list[Record]
    evaluations: list[Evaluation]
    galleries: dict[str, Gallery]
    damage: DataReport | None
    gaps: list[str]

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

    def final(self, split: str) -> Record:
        """The metrics of a split at the latest epoch at which it was judged."""
        points = [point for point in self.evaluations if point.split == split]
        latest = max((point.epoch for point in points), default=0.0)
        merged: Record = {}
        for point in points:
            if point.epoch == latest:
                merged |= point.metrics
        return merged

    def median(self, key: str) -> float | None:
        """Median of a training record's key: robust against the first, slow steps."""
        values = [y for _, y in self.series(key)]
        return statistics.median(values) if values else None

    def share(self, key: str) -> float | None:
        """Mean of a training record's key over the time that the records cover."""
        known = [r for r in self.train if key in r]
        seconds = sum(r.get("seconds", 1.0) for r in self.train)
        return sum(r[key] * r.get("seconds", 1.0) for r in known) / seconds if known else None

    def last(self, key: str) -> float | None:
        """Last finite value of a training record's key."""
        values = self.series(key)
        return values[-1][1] if values else None


def load_runs(folders: list[Path]) -> list[Run]:
    """Reads run folders; a folder given twice counts once.

    Raises:
        UserError: no folder is given, or one is no run folder (says what it lacks).
    """
    unique = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not unique:
        raise UserError("a report needs at least one run folder")
    names = [folder.name for folder in unique]
    return [
        _load(folder, folder.name if names.count(folder.name) == 1 else _long_name(folder))
        for folder in unique
    ]


def _long_name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _load(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder: there is no such folder")
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(
            f"{folder} is no run folder: it has no config.yaml "
            "(a run folder is <logs>/<name>, as written by neuclip train)"
        )
    tree = read_yaml(config_file)
    method = tree.get("method")
    gaps: list[str] = []
    train, evaluations = _read_metrics(folder / "metrics.jsonl", gaps)
    evaluations = _add_results(folder / "eval_results", evaluations, gaps)
    return Run(
        folder=folder,
        label=label,
        method=str(method.get("name", "unknown")) if isinstance(method, dict) else "unknown",
        config=dict(_flatten(tree)),
        config_text=config_file.read_text(encoding="utf-8"),
        train=train,
        evaluations=evaluations,
        galleries=_read_galleries(folder / "eval_results", gaps),
        damage=_read_damage(folder / "data_report.json", gaps),
        gaps=gaps,
    )


def _read_metrics(path: Path, gaps: list[str]) -> tuple[list[Record], list[Evaluation]]:
    """Training records and evaluations.

    A run that was killed and continued writes some steps twice; the later writing counts. Its
    last line before the kill may be cut off; it is left out, and said so.
    """
    if not path.is_file():
        gaps.append("metrics.jsonl is missing: no curves")
        return [], []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    train: list[Record] = []
    evaluations: list[Evaluation] = []
    unreadable: list[int] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            unreadable.append(number)
            continue
        numbers, step = _numbers(record), _numbers(record).get("step", math.inf)
        if record.get("kind") == "train":
            while train and train[-1].get("step", -math.inf) >= step:
                train.pop()
            train.append(numbers)
        elif record.get("kind") == "eval":
            split, epoch = str(record.get("split", "")), numbers.get("epoch", 0.0)
            evaluations = [e for e in evaluations if e.split != split or e.epoch < epoch]
            metrics = _numbers(record.get("metrics"))
            evaluations.append(Evaluation(split, epoch, numbers.get("samples_seen"), metrics))
    if unreadable == [len(lines)]:
        gaps.append("the last line of metrics.jsonl is cut off, as by a kill; it is left out")
    elif unreadable:
        where = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        gaps.append(f"metrics.jsonl has unreadable lines, which are left out: {where}")
    if not train:
        gaps.append("metrics.jsonl holds no training record: no training curves")
    return train, evaluations


def _add_results(folder: Path, known: list[Evaluation], gaps: list[str]) -> list[Evaluation]:
    """Adds the results files, each at the samples seen of the training's own evaluation."""
    found = list(known)
    for epoch, path in results_files(folder.parent):
        try:
            results = read_eval_results(path)
        except UserError as error:
            gaps.append(_within(folder, error))
            continue
        seen = next((e.samples_seen for e in known if e.epoch == epoch), None)
        for result in results:
            same = [e for e in found if e.split == result.key and e.epoch == epoch]
            metrics = dict(result.metrics)
            for older in same:
                metrics = {**older.metrics, **metrics}
                found.remove(older)
            found.append(Evaluation(result.key, epoch, seen, metrics))
    if not found:
        gaps.append("no evaluation yet: neither in metrics.jsonl nor in eval_results")
    return sorted(found, key=lambda evaluation: evaluation.epoch)


def results_files(folder: Path) -> list[tuple[int, Path]]:
    """The results files of a run with the epochs of their checkpoints, ascending."""
    found: list[tuple[int, Path]] = []
    for path in (folder / "eval_results").glob("epoch_*_eval_results.jsonl"):
        match = re.fullmatch(r"epoch_(\d+)_eval_results\.jsonl", path.name)
        if match is not None:
            found.append((int(match[1]), path))
    return sorted(found)


def _read_galleries(folder: Path, gaps: list[str]) -> dict[str, Gallery]:
    galleries: dict[str, Gallery] = {}
    for path in sorted(folder.glob("gallery_*.json")):
        try:
            gallery = read_gallery(path)
        except UserError as error:
            gaps.append(_within(folder, error))
        else:
            galleries[gallery.split] = gallery
    if not galleries:
        gaps.append("no gallery of retrieved pictures")
    return galleries


def _read_damage(path: Path, gaps: list[str]) -> DataReport | None:
    if not path.is_file():
        return None
    try:
        report = TypeAdapter(DataReport).validate_json(path.read_bytes())
    except ValidationError:
        gaps.append("data_report.json is unreadable")
        return None
    examples = [replace(e, shard=Path(e.shard).name) for e in report.examples[:EXAMPLES]]
    return replace(report, examples=examples)


def _within(folder: Path, error: UserError) -> str:
    """The message without the machine's path: a report may be shown to anybody."""
    return str(error).replace(f"{folder}/", "")


def _parse(text: str) -> dict[str, object] | None:
    try:
        record = json.loads(text)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _numbers(record: object) -> Record:
    """The numeric entries of an object."""
    if not isinstance(record, dict):
        return {}
    return {
        str(key): float(value)
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


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
