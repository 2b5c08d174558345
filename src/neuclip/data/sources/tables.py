"""Tables of image paths and captions (csv, tsv), as open_clip reads them."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from neuclip.config.sections import ReadingConfig
from neuclip.data.captions import clean_caption
from neuclip.data.order import Layout
from neuclip.data.samples import Sample
from neuclip.data.sources.source import Source, Texts, even_blocks, read_image_file
from neuclip.errors import UserError

IMAGE_COLUMNS = ("filepath", "image", "image_path", "img", "jpg", "png", "webp", "path", "file")
CAPTION_COLUMNS = ("title", "caption", "text", "txt", "captions")

_LONGEST_FIELD = 2**27  # characters; a caption can exceed csv's default of 131,072


def find_columns(names: Sequence[str], reading: ReadingConfig, where: Path) -> tuple[int, int]:
    """The indices of the image column and the caption column.

    Args:
        names: columns of the table, in order.
        reading: may name the columns; otherwise the first of the known names is taken.
        where: the table, for messages.

    Raises:
        UserError: there is no such column; the message lists the existing ones.
    """
    found: list[int] = []
    for what, flag, wanted, known in (
        ("image", "--csv-img-key", reading.csv_img_key, IMAGE_COLUMNS),
        ("caption", "--csv-caption-key", reading.csv_caption_key, CAPTION_COLUMNS),
    ):
        name = next((name for name in ((wanted,) if wanted else known) if name in names), None)
        if name is None:
            lacks = f"no column {wanted!r}" if wanted else f"none of the columns {', '.join(known)}"
            raise UserError(
                f"{where}: {lacks} for the {what}; its columns are {', '.join(map(repr, names))}: "
                f"name one with {flag} (and the separator with --csv-separator if these look "
                "joined)"
            )
        found.append(names.index(name))
    return found[0], found[1]


class TableSource(Source):
    """Rows of image path and caption; the key of a sample is its path as written.

    Paths are relative to the folder of their table.
    """

    def __init__(self, tables: Sequence[Path], rows: Sequence[tuple[Texts, Texts]]) -> None:
        """Joins the rows of several tables.

        Args:
            tables: paths of the tables.
            rows: image paths and captions of each table.
        """
        self._tables, self._rows = tuple(tables), tuple(rows)
        self._sizes = [len(images) for images, _ in rows]
        self._starts = [sum(self._sizes[:number]) for number in range(len(rows))]
        name = str(tables[0]) if len(tables) == 1 else str(tables[0].parent)
        self.layout = Layout.of(name, even_blocks(sum(self._sizes)))

    def _content(self, position: int) -> Sample[bytes]:
        table, row = self._row(position)
        images, captions = self._rows[table]
        caption = (clean_caption(captions[row]),)
        return Sample(
            images[row], read_image_file(self._tables[table].parent, images[row]), caption
        )

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Table and key of a sample."""
        table, row = self._row(position)
        return self._tables[table], self._rows[table][0][row]

    def files(self) -> Iterator[Path]:
        """The images."""
        for table, (images, _) in zip(self._tables, self._rows, strict=True):
            yield from (table.parent / images[row] for row in range(len(images)))

    def _row(self, position: int) -> tuple[int, int]:
        for table, start in enumerate(self._starts):
            if position < start + self._sizes[table]:
                return table, position - start
        raise IndexError(position)


def open_tables(tables: Sequence[Path], reading: ReadingConfig) -> TableSource:
    """Reads csv or tsv tables whose first line names the columns.

    A row with too few columns is a corrupt sample: its image or caption is missing.

    Raises:
        UserError: a table cannot be read, lacks a column, or there are no rows.
    """
    rows = [_read(table, reading) for table in tables]
    if not any(len(images) for images, _ in rows):
        raise UserError(f"{tables[0]}: no rows below the column names")
    return TableSource(tables, rows)


def _read(table: Path, reading: ReadingConfig) -> tuple[Texts, Texts]:
    images, captions = Texts(), Texts()
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        # Invalid UTF-8 is kept, and reported when the row is read.
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            first = file.readline()
            separator = reading.csv_separator or ("\t" if "\t" in first else ",")
            file.seek(0)
            lines = csv.reader(file, delimiter=separator)
            image, caption = find_columns(next(lines, []), reading, table)
            for row in _with_content(lines):
                images.append(row[image] if image < len(row) else "")
                captions.append(row[caption] if caption < len(row) else "")
    except OSError as error:
        raise UserError(f"{table} cannot be read: {error.strerror or error}") from None
    except csv.Error as error:
        raise UserError(f"{table} is not a csv table: {error}") from None
    except TypeError:
        raise UserError(
            f"--csv-separator {reading.csv_separator!r} must be one character, such as a comma or "
            "a tab"
        ) from None
    finally:
        csv.field_size_limit(before)
    return images, captions


def _with_content(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """Rows without empty lines."""
    return (row for row in rows if row)
