"""Tables of image paths and captions: csv, tsv, and JSON lines."""

import errno
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys
from neuclip.data.captions import CaptionRule
from neuclip.data.order import Layout
from neuclip.data.samples import Sample
from neuclip.data.sources.columns import columns_note, find_columns, image_root
from neuclip.data.sources.delimited import DelimitedColumns, QuoteError, first_row, parse
from neuclip.data.sources.source import (
    Captions,
    JsonValues,
    Source,
    Strings,
    TextLists,
    even_blocks,
    read_image_file,
)
from neuclip.errors import UserError, printable, quantity
from neuclip.files import describe
from neuclip.untrusted import read_file

SEPARATORS = "\t,;|"
_UNPACKED, _RATIO = 2**26, 100  # bytes a gzip file may unpack to, and how many times its size


@dataclass(frozen=True)
class TableRows:
    """The rows of one table.

    Attributes:
        table: path of the table.
        root: folder that image paths are relative to.
        images: image path of each row.
        captions: caption columns.
        annotations: the columns of `AnnotationKeys.names`, in their order.
        note: what was recognised: columns, separator, encoding.
        unused: rows that are not read, in one line per reason.
    """

    table: Path
    root: Path
    images: Strings
    captions: tuple[Strings | TextLists, ...]
    annotations: tuple[Strings | TextLists | JsonValues, ...] = ()
    note: str = ""
    unused: tuple[str, ...] = ()


class TableSource(Source):
    """Rows of image path and captions; the key of a sample is its path as written."""

    def __init__(
        self,
        rows: Sequence[TableRows],
        captions: CaptionRule | None = None,
        keys: AnnotationKeys | None = None,
    ) -> None:
        """Joins the rows of several tables.

        Args:
            rows: the tables.
            captions: whether captions are required (by default they are), and their weights.
            keys: the annotations to read.

        Raises:
            UserError: there are no rows.
        """
        self._rows, self._captions = tuple(rows), captions or CaptionRule()
        self._keys = keys or AnnotationKeys()
        self._sizes = [len(each.images) for each in rows]
        self._starts = [sum(self._sizes[:number]) for number in range(len(rows))]
        if not sum(self._sizes):
            raise UserError(f"{rows[0].table}: no rows below the column names")
        name = str(rows[0].table) if len(rows) == 1 else str(rows[0].table.parent)
        self.layout = Layout.of(name, even_blocks(sum(self._sizes)))
        self.has_captions = any(each.captions for each in rows)
        self.opened = rows[0].note
        self.unused = tuple(line for each in rows for line in each.unused)

    def _content(self, position: int) -> Sample[bytes]:
        sample = self._texts(position)
        root = self._rows[self._row(position)[0]].root
        return sample.with_image(read_image_file(root, sample.key))

    def _texts(self, position: int) -> Sample[None]:
        number, row = self._row(position)
        rows = self._rows[number]
        captions = self._captions.in_columns([column[row] for column in rows.captions])
        values = zip(self._keys.names, rows.annotations, strict=True)
        annotations = self._keys.read(
            {name: column[row] for name, column in values}, captions.weights
        )
        return Sample(rows.images[row], None, captions.texts, annotations=annotations)

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Table and key of a sample."""
        number, row = self._row(position)
        return self._rows[number].table, self._rows[number].images[row]

    def file_of(self, position: int) -> str | Path:
        """The image."""
        number, row = self._row(position)
        return self._rows[number].root / self._rows[number].images[row]

    def files(self) -> Iterator[Path]:
        """The images."""
        for rows in self._rows:
            yield from (rows.root / rows.images[row] for row in range(len(rows.images)))

    def _row(self, position: int) -> tuple[int, int]:
        for number, start in enumerate(self._starts):
            if position < start + self._sizes[number]:
                return number, position - start
        raise IndexError(position)


# csv and tsv -------------------------------------------------------------------------------------


def read_delimited(table: Path, reading: ReadingConfig, captions: Captions) -> TableRows:
    """Reads a csv or tsv table whose first line names the columns.

    A row with too few columns is a corrupt sample: its image or caption is missing.

    Raises:
        UserError: the table cannot be read, lacks a column, has quotes that would swallow rows, or
            none of its images exists.
    """
    content, encoding = text_of(table)
    separator, names = _header(content, table, reading, captions)
    found = find_columns(names, reading, table, captions)
    try:
        texts = (*found.captions, *found.annotations)
        rows = parse(content, DelimitedColumns(separator, len(names), found.image, texts))
    except QuoteError as error:
        raise UserError(
            f"{table}, {error}: rows would be lost. Write quotes inside of quoted fields twice, or "
            "remove them"
        ) from None
    several = len(found.captions)
    return TableRows(
        table,
        image_root(table, rows.images),
        rows.images,
        rows.captions[:several],
        rows.captions[several:],
        _join(
            columns_note([names[found.image]], [names[index] for index in found.captions], reading),
            "" if separator in "\t," else f"separator '{printable(separator)}'",
            encoding,
            rows.note,
        ),
        _not_utf8(table, rows.captions[:several]),
    )


def _header(
    content: bytes, table: Path, reading: ReadingConfig, captions: Captions
) -> tuple[str, list[str]]:
    """Separator and column names; without `--csv-separator`, the first that gives known columns."""
    if reading.csv_separator is not None:
        return reading.csv_separator, first_row(content, reading.csv_separator)
    for separator in SEPARATORS:
        names = first_row(content, separator)
        try:
            find_columns(names, reading, table, captions)
        except UserError:
            continue
        return separator, names
    separator = "\t" if len(first_row(content, "\t")) > 1 else ","
    return separator, first_row(content, separator)


def text_of(table: Path) -> tuple[bytes, str]:
    """The content of a table as UTF-8, and a word on its encoding if it has another one.

    Raises:
        UserError: the file cannot be read, or is not valid in its encoding.
    """
    try:
        content = read_file(table)
        if content.startswith(b"\x1f\x8b"):
            content = _unpacked(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{table} cannot be read: {describe(error)}") from None
    head = content[:1000]
    for encoding, mark in (("utf-16", b"\xff\xfe"), ("utf-16", b"\xfe\xff")):
        if head.startswith(mark):
            return _decoded(table, content, encoding), "UTF-16"
    if head.count(0) > len(head) // 4:
        return _decoded(table, content, "utf-16-be" if head[:1] == b"\0" else "utf-16-le"), "UTF-16"
    return content.removeprefix(b"\xef\xbb\xbf"), ""


def _unpacked(content: bytes) -> bytes:
    """The content of a gzip file."""
    limit = max(_UNPACKED, _RATIO * len(content))
    with gzip.open(io.BytesIO(content)) as file:
        unpacked = file.read(limit + 1)
    if len(unpacked) > limit:
        raise OSError(errno.EFBIG, f"{len(content):,} bytes unpack to more than {limit:,}")
    return unpacked


def _decoded(table: Path, content: bytes, encoding: str) -> bytes:
    try:
        return content.decode(encoding).encode()
    except UnicodeError as error:
        raise UserError(f"{table} is not valid {encoding.upper()}: {describe(error)}") from None


def _not_utf8(table: Path, captions: Sequence[Strings]) -> tuple[str, ...]:
    """A line about captions that are not UTF-8; each is damage when it is read."""
    bad = sum(column.count_invalid() for column in captions)
    return (
        (
            f"{quantity(bad, 'caption')} of {table}, not in UTF-8: convert the table, for example "
            f"with iconv -f latin1 -t utf8 {table} > utf8{table.suffix}",
        )
        if bad
        else ()
    )


def _join(*notes: str) -> str:
    return ", ".join(note for note in notes if note)
