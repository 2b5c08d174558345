"""Results of the study of quality: one JSON object a line, never two versions in one file."""

import ast
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import neuclip
from neuclip.errors import UserError

FORMAT = 1

_PACKAGE = Path(neuclip.__file__).parent
DECIDING = (
    "catalogue/**/*.py",
    "config/*.py",
    "data/batch.py",
    "data/captions.py",
    "data/decode.py",
    "data/loader.py",
    "data/order.py",
    "data/samples.py",
    "evaluation/embed.py",
    "evaluation/metrics.py",
    "evaluation/normalizer_error.py",
    "evaluation/ranking.py",
    "evaluation/retrieval.py",
    "evaluation/zero_shot.py",
    "method/**/*.py",
    "model/clip.py",
    "model/model_configs/*.json",
    "recipes/demo.yaml",
    "training/accumulation.py",
    "training/nonfinite.py",
    "training/optim.py",
    "training/step.py",
    "training/trainer.py",
)
"""The files of the package that decide a number, given a cell and the data."""


def code_digest(package: Path = _PACKAGE) -> str:
    """A digest of the code that decides the numbers: the definitions in the `DECIDING` files.

    Equal for code that differs in comments, docstrings, layout and imports only, or whose
    definitions moved from one deciding file to another. A renamed variable changes it.
    """
    paths = {path for pattern in DECIDING for path in package.glob(pattern)}
    statements = sorted(text for path in paths for text in _statements(path))
    return hashlib.sha256("\0".join(statements).encode()).hexdigest()[:12]


def _statements(path: Path) -> Iterator[str]:
    """The top-level statements of a file without imports and docstrings; other files entire."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield text
        return
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _decides_nothing(each)]  # type: ignore[attr-defined]
    yield from map(ast.dump, tree.body)


def _decides_nothing(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.Import | ast.ImportFrom)


def data_digest(data: Path) -> str:
    """Of the embedded data set's description, which names every shard's size and font.

    Raises:
        UserError: there is no such data set.
    """
    path = data / "demo.json"
    if not path.is_file():
        raise UserError(
            f"--data {data}: no embedded data there (no demo.json); make it with "
            f"`neuclip data demo --out {data}`"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class ResultsFile:
    """`results.jsonl`: rows by the name of their cell.

    Args:
        path: the file.
        data: digest of the data.
        same_code: digests of other code whose numbers are equal to this one's, says the user.
    """

    def __init__(self, path: Path, data: str | None = None, same_code: Iterable[str] = ()) -> None:
        self.path = path
        self.code = code_digest()
        self.data = data
        self._accepted = {self.code, *same_code}

    def read(self) -> dict[str, dict[str, Any]]:
        """All rows; a last line that was cut off is left out.

        Raises:
            UserError: a row is of another format, other code or other data.
        """
        rows: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return rows
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if line.endswith("\n"):
                row = self._parsed(line, number)
                rows[row["cell"]] = row
        return rows

    def _parsed(self, line: str, number: int) -> dict[str, Any]:
        where = f"{self.path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        found = row.get("format") if isinstance(row, dict) else None
        if found != FORMAT:
            raise UserError(
                f"{where} has format {found!r}, this script writes format {FORMAT}: give another "
                "--out, results of two formats are not mixed"
            )
        if row["code"] not in self._accepted:
            raise UserError(
                f"{where} was computed by code {row['code']}, this is {self.code}: give another "
                f"--out, or, if both compute the same numbers, --same-code {row['code']}"
            )
        if self.data is not None and row["data"] != self.data:
            raise UserError(
                f"{where} is of the data {row['data']}, these are {self.data}: give another --out"
            )
        return row

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row at once; what a kill left of an earlier one is dropped."""
        with self.path.open("a+", encoding="utf-8") as file:
            _end_on_a_line(file)
            file.write(json.dumps({"format": FORMAT, "code": self.code, **row}) + "\n")


def _end_on_a_line(file: TextIO) -> None:
    file.seek(0)
    content = file.read()
    if content and not content.endswith("\n"):
        file.truncate(len(content[: content.rfind("\n") + 1].encode()))


def lock(folder: Path, *, wait: bool = False) -> TextIO:
    """Keeps a second process out of the folder for as long as the file is open.

    Raises:
        UserError: another one works there, and we do not wait for it.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise UserError(f"--out {folder}: another run of this script works there") from None
    return file
