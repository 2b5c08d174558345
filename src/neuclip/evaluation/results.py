"""The files of evaluation results. Imports no torch, so that a report starts at once.

`eval_results/epoch_N_eval_results.jsonl` is in DataComp's line format;
`eval_results/gallery_SPLIT.json` holds a `Gallery`.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from neuclip.errors import UserError
from neuclip.files import locked, write_whole
from neuclip.untrusted import read_file


@dataclass(frozen=True)
class Provenance:
    """The inputs of a DataComp result; it may be reused while all of them are equal.

    Attributes:
        suite: version of the suite.
        checkpoint: SHA-256 of architecture and weights.
        data: SHA-256 of the task's texts and of name, size and time of its shards.
        precision: `fp32`, or `amp` (on CUDA, as in DataComp).
    """

    suite: str
    checkpoint: str
    data: str
    precision: str


@dataclass(frozen=True)
class EvaluatedData:
    """The samples that a result was computed from; equal for equal data, wherever they lie.

    Attributes:
        fingerprint: 16 hexadecimal digits over the content of the images, the captions, the
            classes and their names, in any order.
        samples: number of samples.
    """

    fingerprint: str
    samples: int


@dataclass(frozen=True)
class ProbeRecord:
    """The inputs of a set's probes.

    Attributes:
        data: digest of the files of the training data, with their sizes and times.
        settings: which probes, and how.
    """

    data: str
    settings: str


@dataclass(frozen=True)
class EvalResult:
    """One line of a results file.

    Attributes:
        key: key of the split or task.
        dataset: name to display.
        metrics: metrics by key.
        provenance: inputs of a DataComp result; none for other results.
        data: what was read; none in results of older versions.
        probe: inputs of the probes; none without probes.
    """

    key: str
    dataset: str
    metrics: dict[str, float]
    provenance: Provenance | None = None
    data: EvaluatedData | None = None
    probe: ProbeRecord | None = None


@dataclass(frozen=True)
class Picture:
    """An image of a gallery; `png` is base64."""

    key: str
    caption: str
    png: str


@dataclass(frozen=True)
class Retrieved:
    """A retrieved image: its cosine with the query, and whether it is right."""

    picture: Picture
    score: float
    hit: bool


@dataclass(frozen=True)
class Query:
    """A caption, its own image, and the retrieved images, best first."""

    caption: str
    answer: Picture
    results: list[Retrieved]


@dataclass(frozen=True)
class Gallery:
    """Queries drawn at random from a split, and the seed of the draw."""

    split: str
    seed: int
    queries: list[Query]


_LARGEST = 2**26  # bytes of results, or of a gallery
_RESULT = TypeAdapter(EvalResult)
_GALLERY = TypeAdapter(Gallery)


def write_eval_result(
    path: Path, key: str, metrics: dict[str, float], dataset: str | None = None
) -> None:
    """Writes the line of one split and keeps the lines of others; see `write_result`.

    Args:
        path: the results file, created with its folder if missing.
        key: key of the split.
        metrics: its metrics.
        dataset: name to display; if none, the key.

    Raises:
        UserError: a line of the file is invalid, or the file cannot be written.
    """
    write_result(path, EvalResult(key, dataset or key, metrics))


def write_result(path: Path, result: EvalResult) -> EvalResult:
    """Writes a result in place of an earlier one with the same key, and keeps all other lines.

    The file is replaced atomically, and processes that write to it wait for each other. A split
    whose key belongs to a result of other data gets a key of its own: `val@1f3a9c02`.

    Args:
        path: the results file, created with its folder if missing.
        result: the result.

    Returns:
        The result as written.

    Raises:
        UserError: a line of the file is invalid, or the file cannot be written.
    """
    with locked(path):
        lines = _lines(path) if path.exists() else []
        result = _with_own_key(result, {old.key: old for _, old in lines})
        kept = [line for line, old in lines if old.key != result.key]
        record = {
            name: value for name, value in dataclasses.asdict(result).items() if value is not None
        }
        write_whole(path, "\n".join([*kept, json.dumps(record)]) + "\n")
    return result


def _with_own_key(result: EvalResult, others: Mapping[str, EvalResult]) -> EvalResult:
    """The result, with its data's fingerprint in the key if the key belongs to other data."""
    same = others.get(result.key)
    if same is None or same.data is None or result.data in (None, same.data):
        return result
    if result.provenance is not None or same.provenance is not None:  # a task has one key
        return result
    own = f"{result.key}@{result.data.fingerprint[:8]}"
    return dataclasses.replace(result, key=own, dataset=own)


def read_eval_results(path: Path) -> list[EvalResult]:
    """Reads all results of a file.

    Raises:
        UserError: the file cannot be read, or a line is invalid.
    """
    return [result for _, result in _lines(path)]


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Writes a gallery; an older one is replaced atomically.

    Raises:
        UserError: the file cannot be written.
    """
    write_whole(path, json.dumps(dataclasses.asdict(gallery), indent=1) + "\n")


def read_gallery(path: Path) -> Gallery:
    """Reads a gallery.

    Raises:
        UserError: the file cannot be read, or is not a gallery.
    """
    try:
        return _GALLERY.validate_json(read_file(path, _LARGEST))
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is not a gallery: {_short(error)}") from None


def _lines(path: Path) -> list[tuple[str, EvalResult]]:
    """Lines with their parsed results."""
    try:
        lines = read_file(path, _LARGEST).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {_short(error)}") from None
    found: list[tuple[str, EvalResult]] = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append((line, _RESULT.validate_json(line)))
        except ValidationError as error:
            raise UserError(f"{path}, line {number} is not a result: {_short(error)}") from None
    return found


def _short(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return f"{where}: {first['msg']}" if where else first["msg"]
    return getattr(error, "strerror", None) or str(error)
