"""Parses delimited text (csv, tsv) into slices of the file, without a Python object per value.

Quotes follow the csv dialect of spreadsheets and pandas: a field may be quoted as a whole, and
then holds separators, line ends, and quotes written twice. A table whose quotes cannot be meant so
(a caption that begins with a lone inch mark) is read with its quotes as text, if every line then
has all columns; otherwise it is an error. A row is never swallowed by another one.
"""

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from neuclip.data.sources.source import Offsets, Slices, Strings, Texts

_NEWLINE, _RETURN, _QUOTE = b'\n\r"'
_BLOCK = 2**22  # bytes cut at a time
_SWALLOWS = "a quote opens a field that spans further rows"
_LONGEST_HEADER = 2**20  # bytes
_LONGEST_FIELD = 2**27  # characters; a caption can exceed csv's default of 131,072


class QuoteError(ValueError):
    """Quotes that would swallow rows, in a table that cannot be read without quotes either.

    Attributes:
        line: number of the line, from 1, on which the quote is.
    """

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")
        self.line = line


@dataclass(frozen=True)
class DelimitedRows:
    """The rows below the column names.

    Attributes:
        images: one value per row.
        captions: the caption columns, each with one value per row.
        note: how quotes were read, if not in the usual way.
    """

    images: Strings
    captions: tuple[Strings, ...]
    note: str = ""


@dataclass(frozen=True)
class DelimitedColumns:
    """Where to find the values of a row.

    Attributes:
        separator: one ASCII character.
        total: number of columns.
        image: index of the image column.
        captions: indices of the caption columns.
    """

    separator: str
    total: int
    image: int
    captions: tuple[int, ...]


def first_row(content: bytes, separator: str) -> list[str]:
    """The values of the first line that is not empty: the column names."""
    text = content[:_LONGEST_HEADER].lstrip(b"\r\n").decode("utf-8", "surrogateescape")
    with _long_fields():
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])


def parse(content: bytes, columns: DelimitedColumns) -> DelimitedRows:
    """Parses a table.

    Args:
        content: UTF-8; invalid bytes are kept.
        columns: separator and columns.

    Raises:
        QuoteError: quotes are unbalanced, and lines differ in their number of columns.
    """
    if b"\n" not in content:  # files of old Macs
        content = content.replace(b"\r", b"\n")
    table = _Table(content, np.frombuffer(content, np.uint8), columns)
    quotes = _positions(table.data, _QUOTE)
    try:
        if _well_formed(table.data, quotes, columns.separator):
            return _parse_in_blocks(table, quotes)
        return _parse_mixed(content, columns)
    except QuoteError as error:
        return _parse_in_blocks(table, quotes[:0], error)


@dataclass(frozen=True)
class _Table:
    """A table: its content, the same bytes as an array, and the columns that are read."""

    content: bytes
    data: NDArray[np.uint8]
    columns: DelimitedColumns


def _parse_in_blocks(
    table: _Table, quotes: Offsets, problem: QuoteError | None = None
) -> DelimitedRows:
    """Cuts a table at its line ends and separators, block by block to keep the arrays small.

    Args:
        table: the table.
        quotes: positions of the quotes; none to read quotes as text.
        problem: raised if a line lacks a column or has more.
    """
    wanted = (table.columns.image, *table.columns.captions)
    parts: list[list[tuple[Offsets, Offsets]]] = [[] for _ in wanted]
    for begin, end in _blocks(table.content, quotes):
        block = _Block.of(table, quotes, begin, end, skip=0 if parts[0] else 1)
        if problem is not None and (block.separators != table.columns.total - 1).any():
            raise problem
        block.check(quotes)
        for part, number in zip(parts, wanted, strict=True):
            part.append(block.column(number, quoted=len(quotes) > 0))
    images, *captions = (
        Slices(
            table.content,
            np.concatenate([starts for starts, _ in part]),
            np.concatenate([ends for _, ends in part]),
            doubled_quotes=len(quotes) > 0,
        )
        for part in parts
    )
    note = "" if problem is None else f"quotes are read as text ({problem})"
    return DelimitedRows(images, tuple(captions), note)


def _blocks(content: bytes, quotes: Offsets) -> Iterator[tuple[int, int]]:
    """Consecutive parts of a table that end with a row."""
    begin = 0
    while content[begin : begin + 1] in {b"\r", b"\n"}:
        begin += 1
    while begin < len(content):
        end = content.find(b"\n", begin + _BLOCK)
        while end >= 0 and np.searchsorted(quotes, end) % 2:
            end = content.find(b"\n", end + 1)
        end = end + 1 or len(content)
        yield begin, end
        begin = end


@dataclass(frozen=True)
class _Block:
    """Some rows of a table, cut at their separators.

    Attributes:
        table: the table.
        starts: [rows] first byte of each row.
        ends: [rows] end of each row, without its line end.
        cuts: positions of all separators, and of the end.
        first: [rows] index in `cuts` of the first separator of each row.
        separators: [rows] number of separators.
    """

    table: _Table
    starts: Offsets
    ends: Offsets
    cuts: Offsets
    first: Offsets
    separators: Offsets

    @classmethod
    def of(cls, table: _Table, quotes: Offsets, begin: int, end: int, skip: int) -> "_Block":
        """Cuts rows outside of their quoted fields, without empty lines and the first `skip`."""
        data = table.data[begin:end]
        newlines = _outside(_positions(data, _NEWLINE) + begin, quotes)
        cuts = _outside(_positions(data, ord(table.columns.separator)) + begin, quotes)
        starts = np.concatenate([[begin], newlines + 1])
        ends = np.concatenate([newlines, [end]])
        has_content = ends > starts
        ends[has_content] -= table.data[ends[has_content] - 1] == _RETURN
        rows = np.flatnonzero(ends > starts)[skip:]
        starts, ends = starts[rows], ends[rows]
        first = np.searchsorted(cuts, starts)
        separators = np.searchsorted(cuts, ends) - first
        return cls(table, starts, ends, np.append(cuts, end), first, separators)

    def column(self, number: int, *, quoted: bool) -> tuple[Offsets, Offsets]:
        """Start and end of a column's value in each row; empty if the row is too short."""
        starts, ends = self.starts.copy(), self.ends.copy()
        if number:
            before = self.cuts[np.minimum(self.first + number - 1, len(self.cuts) - 1)] + 1
            starts = np.where(self.separators >= number, before, self.ends)
        closed = self.separators > number
        ends[closed] = self.cuts[self.first[closed] + number]
        if quoted:
            wrapped = np.flatnonzero(ends - starts >= 2)
            wrapped = wrapped[self.table.data[starts[wrapped]] == _QUOTE]
            starts[wrapped] += 1
            ends[wrapped] -= 1
        return starts, ends

    def check(self, quotes: Offsets) -> None:
        """Raises `QuoteError` if a quoted field of several lines looks as if it held rows."""
        if not len(quotes) or not len(self.starts):
            return
        begin, end = int(self.starts[0]), int(self.ends[-1])
        newlines = _positions(self.table.data[begin:end], _NEWLINE) + begin
        inside = newlines[np.searchsorted(quotes, newlines) % 2 == 1]
        for row in np.unique(np.searchsorted(self.starts, inside, side="right") - 1).tolist():
            start, end = int(self.starts[row]), int(self.ends[row])
            text = self.table.content[start:end].decode("utf-8", "surrogateescape")
            if _holds_rows(text.split("\n"), self.table.columns):
                line = self.table.content.count(b"\n", 0, start) + 1
                raise QuoteError(line, _SWALLOWS)


def _parse_mixed(content: bytes, columns: DelimitedColumns) -> DelimitedRows:
    """Reads a table with quotes inside of fields, which are text: row by row, with `csv`."""
    images, captions = Texts(), [Texts() for _ in columns.captions]
    read: list[str] = []  # lines of the current row

    def lines() -> Iterator[str]:
        for line in io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""):
            read.append(line)
            yield line

    rows = csv.reader(lines(), delimiter=columns.separator, strict=True)
    line = 1
    with _long_fields():
        try:
            for number, row in enumerate(filter(None, rows)):
                if len(read) > 1 and _holds_rows(read, columns):
                    raise QuoteError(line, _SWALLOWS)
                line = rows.line_num + 1
                read.clear()
                if number:
                    images.append(_field(row, columns.image))
                    for column, index in zip(captions, columns.captions, strict=True):
                        column.append(_field(row, index))
        except csv.Error as error:
            unclosed = "end of data" in str(error)
            how = "is not closed" if unclosed else "is closed in the middle of a field"
            raise QuoteError(line, f"a quote opens a field and {how}") from None
    return DelimitedRows(images, tuple(captions))


def _field(row: list[str], number: int) -> str:
    return row[number] if number < len(row) else ""


def _holds_rows(lines: list[str], columns: DelimitedColumns) -> bool:
    """Whether the lines of one row look like several: with all columns, and an image in each."""
    kinds = [_image_ending(line, columns) for line in lines if line.strip("\r\n")]
    return any(kind and kind == kinds[0] for kind in kinds[1:])


def _image_ending(line: str, columns: DelimitedColumns) -> str:
    values = line.rstrip("\r\n").split(columns.separator)
    if len(values) < columns.total:
        return ""
    return os.path.splitext(values[columns.image].strip('" '))[1].lower()  # noqa: PTH122  a text


def _well_formed(data: NDArray[np.uint8], quotes: Offsets, separator: str) -> bool:
    """Whether every quote begins or ends a field, or is doubled inside of a quoted field."""
    if len(quotes) % 2:
        return False
    edges = np.array([ord(separator), _NEWLINE, _RETURN, _QUOTE], dtype=np.uint8)
    opening, closing = quotes[::2], quotes[1::2]
    before = data[opening[opening > 0] - 1]
    after = data[closing[closing < len(data) - 1] + 1]
    return bool(np.isin(before, edges).all() and np.isin(after, edges).all())


def _outside(positions: Offsets, quotes: Offsets) -> Offsets:
    """The positions that are not between an opening and a closing quote."""
    return positions[np.searchsorted(quotes, positions) % 2 == 0] if len(quotes) else positions


def _positions(data: NDArray[np.uint8], byte: int) -> Offsets:
    """Where a byte occurs, searched in pieces to keep the mask small."""
    found = [
        np.flatnonzero(data[start : start + _BLOCK] == byte) + start
        for start in range(0, len(data), _BLOCK)
    ]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


class _long_fields:
    """Lifts the limit that `csv` sets for the length of a field."""

    def __enter__(self) -> None:
        self._before = csv.field_size_limit(_LONGEST_FIELD)

    def __exit__(self, *_: object) -> None:
        csv.field_size_limit(self._before)
