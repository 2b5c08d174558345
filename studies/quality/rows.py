"""The files of the study: rows of both parts, weights, and the code that decides the numbers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from studies.quality.cell import Cell
from studies.quality.datasets import DataFolder
from studies.shared.code_digest import MODELS, TRAINING, code_digest
from studies.shared.results_file import ResultsFile

FORMAT = 3
ENTRIES = (*TRAINING, "studies.quality.measure")
DEVELOPMENT, TEST = "development.jsonl", "test.jsonl"
CONCEPTS, DRIFT = "concepts.jsonl", "drift.jsonl"


def present_code() -> str:
    """The digest of the code that decides the numbers of a cell."""
    return code_digest(ENTRIES, MODELS)


def results_file(
    path: Path,
    code: str | None = None,
    folders: Mapping[str, DataFolder] | None = None,
    same_code: Iterable[str] = (),
) -> ResultsFile:
    """A file of rows of this study.

    Args:
        path: the file.
        code: digest of the code whose rows are accepted; None: of any.
        folders: the data given, by data set; rows of other data sets are accepted.
        same_code: digests of other code that the user knows to compute the same numbers.
    """

    def digest(row: Mapping[str, Any]) -> str | None:
        folder = (folders or {}).get(str(row["data_set"]))
        return None if folder is None else folder.digest

    return ResultsFile(path, (FORMAT, {}), code, digest, same_code)


def weights_of(out: Path, cell: Cell) -> Path:
    """The file of the final weights of a cell."""
    return out / "weights" / f"{cell.name}.pt"
