"""The study's file of results: one JSON object per line, all of one format, code and data."""

import ast
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import neuclip
from neuclip.errors import UserError

FORMAT = 2

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
    """A digest of the embedded data's description, which names every shard's size and font.

    Raises:
        UserError: the folder has no embedded data.
    """
    path = data / "demo.json"
    if not path.is_file():
        raise UserError(
            f"--data {data}: no embedded data (demo.json is missing); create it with "
            f"`neuclip data demo --out {data}`"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class ResultsFile:
    """`results.jsonl`: rows by the name of their cell.

    Args:
        path: the file.
        data: digest of the data; None: any.
        same_code: digests of other code that the user knows to compute the same numbers.
        any_code: whether rows of all code are read, for reports.
    """

    def __init__(
        self,
        path: Path,
        data: str | None = None,
        same_code: Iterable[str] = (),
        *,
        any_code: bool = False,
    ) -> None:
        self.path = path
        self.any_code = any_code
        self.code = code_digest()
        self.data = data
        self._accepted = {self.code, *same_code}

    def read(self) -> dict[str, dict[str, Any]]:
        """All rows, without a last line that was cut off.

        Raises:
            UserError: a row has another format, or comes from other code or data.
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
        if found == 1:
            raise UserError(
                f"{where} has format 1, with the method names used until 2026-11-28: rewrite it "
                f"with `python studies/quality/migrate.py {self.path}`"
            )
        if found != FORMAT:
            raise UserError(
                f"{where} has format {found!r}, expected {FORMAT}: results of two formats are not "
                "mixed, choose another --out"
            )
        if not self.any_code and row["code"] not in self._accepted:
            raise UserError(
                f"{where} was computed by code {row['code']}, the present code is {self.code}: "
                "choose another --out, or, if both compute the same numbers, add --same-code "
                f"{row['code']}"
            )
        if self.data is not None and row["data"] != self.data:
            raise UserError(
                f"{where} was computed on data {row['data']}, --data is {self.data}: choose "
                "another --out"
            )
        return row

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends a row and drops the remains of a row that was cut off."""
        with self.path.open("a+", encoding="utf-8") as file:
            _end_on_a_line(file)
            file.write(json.dumps({"format": FORMAT, "code": self.code, **row}) + "\n")


def _end_on_a_line(file: TextIO) -> None:
    file.seek(0)
    content = file.read()
    if content and not content.endswith("\n"):
        file.truncate(len(content[: content.rfind("\n") + 1].encode()))


def lock(folder: Path, *, wait: bool = False) -> TextIO:
    """Locks the folder against other processes until the returned file is closed.

    Raises:
        UserError: another process holds the lock, and `wait` is false.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        file.close()
        raise UserError(f"--out {folder}: in use by another run of this script") from None
    return file
