"""A study's file of results: one JSON object per line, all of one format, code and data."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from neuclip.errors import UserError

Row = dict[str, Any]
DigestOf = Callable[[Mapping[str, Any]], str | None]
"""The digest of the data that a row must have; None: any."""


class ResultsFile:
    """Rows by the name of their cell.

    Args:
        path: the file.
        rows: the format of the rows, and what to do with rows of earlier ones: `{1: "advice"}`.
        code: digest of the present code; None: rows of all code are read, for reports.
        data: gives the digest of the data that a row must have.
        same_code: digests of other code that the user knows to compute the same numbers.
    """

    def __init__(
        self,
        path: Path,
        rows: tuple[int, Mapping[int, str]],
        code: str | None,
        data: DigestOf | None = None,
        same_code: Iterable[str] = (),
    ) -> None:
        self.path = path
        self.code = code
        self._format, self._advice = rows
        self._digest_of = data
        self._accepted = {code, *same_code}

    def read(self) -> dict[str, Row]:
        """All rows, without a last line that was cut off.

        Raises:
            UserError: a row has another format, or comes from other code or data.
        """
        rows: dict[str, Row] = {}
        if not self.path.exists():
            return rows
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            if line.endswith("\n"):
                row = self._parsed(line, number)
                rows[row["cell"]] = row
        return rows

    def _parsed(self, line: str, number: int) -> Row:
        where = f"{self.path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        found = row.get("format") if isinstance(row, dict) else None
        if found != self._format:
            advice = self._advice.get(
                found, "results of two formats are not mixed, choose another --out"
            )
            raise UserError(f"{where} has format {found!r}, expected {self._format}: {advice}")
        if self.code is not None and row["code"] not in self._accepted:
            raise UserError(
                f"{where} was computed by code {row['code']}, the present code is {self.code}: "
                "choose another --out, or, if both compute the same numbers, add --same-code "
                f"{row['code']}"
            )
        expected = None if self._digest_of is None else self._digest_of(row)
        if expected is not None and row["data"] != expected:
            raise UserError(
                f"{where} was computed on data {row['data']}, the data given are {expected}: "
                "give those data, or choose another --out"
            )
        return row

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends a row and drops the remains of a row that was cut off."""
        with self.path.open("a+", encoding="utf-8") as file:
            _end_on_a_line(file)
            file.write(json.dumps({"format": self._format, "code": self.code, **row}) + "\n")


def _end_on_a_line(file: TextIO) -> None:
    file.seek(0)
    content = file.read()
    if content and not content.endswith("\n"):
        file.truncate(len(content[: content.rfind("\n") + 1].encode()))
