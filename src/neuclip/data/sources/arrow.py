"""Parquet tables and Hugging Face datasets on disk. Needs pyarrow, imported on first use.

An image is a path, as in csv tables, or the bytes of an image file, alone, as base64 text, or in a
struct with its path. pyarrow's threads are not used: they do not survive the fork of a worker
process.
"""

import base64
import contextlib
import importlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys
from neuclip.data.captions import CaptionRule
from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Unusable
from neuclip.data.sources.arrow_columns import ArrowColumns, ArrowTexts, arrow_columns, pyarrow
from neuclip.data.sources.columns import base64_image, columns_note, image_root
from neuclip.data.sources.source import (
    Captions,
    Source,
    captions_required,
    even_blocks,
    read_image_file,
)
from neuclip.data.sources.tables import TableRows, TableSource
from neuclip.errors import UserError, printable
from neuclip.untrusted import open_regular, read_json

_ROWS, _ROWS_PER_BYTE = 10_000_000, 10  # more than these a table cannot have
_WINDOW = 4  # row groups shuffled together, and kept in memory, if images are in the table


class ParquetSource(Source):
    """Parquet tables that contain the images.

    Reading a row means reading its row group, so row groups are the blocks. Each process keeps the
    last few in memory.
    """

    def __init__(
        self,
        tables: Sequence[Path],
        columns: Sequence[ArrowColumns],
        rule: "RowRule",
        kept: int | None,
    ) -> None:
        """Reads the tables' footers.

        Args:
            tables: parquet files.
            columns: the columns of each.
            rule: how a row is read.
            kept: row groups that each process keeps in memory; 0: all.
        """
        self._tables, self._columns, self._rule = tuple(tables), tuple(columns), rule
        self.shuffle_window = _WINDOW
        self._groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        for number, table in enumerate(tables):
            metadata = _open_parquet(table).metadata
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                sizes.append(metadata.row_group(group).num_rows)
        self._kept = len(sizes) if kept == 0 else kept or _WINDOW
        name = str(tables[0]) if len(tables) == 1 else str(tables[0].parent)
        self.layout = Layout.of(name, sizes)
        self.has_captions = any(each.captions for each in columns)
        self._loaded: OrderedDict[int, Any] = OrderedDict()
        self._loaded_texts: tuple[int, tuple[Any, ...]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_loaded": OrderedDict(), "_loaded_texts": None}

    def _content(self, position: int) -> Sample[bytes]:
        block = self.layout.block(position)
        table, key = self.locate(position)
        row, columns = position - int(self.layout.starts[block]), self._columns_of(block)
        values = self._rule.values(self._rows(block), columns.names, row)
        sample = self._rule.texts(key, values, columns)
        return sample.with_image(_image(values[columns.image], Path(table).parent))

    def _texts(self, position: int) -> Sample[None]:
        block = self.layout.block(position)
        row, columns = position - int(self.layout.starts[block]), self._columns_of(block)
        values = self._rule.values(self._rows(block, texts_only=True), columns.texts, row)
        return self._rule.texts(self.locate(position)[1], values, columns)

    def _columns_of(self, block: int) -> ArrowColumns:
        return self._columns[self._groups[block][0]]

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The table, and the row number in it."""
        block = self.layout.block(position)
        table, group = self._groups[block]
        first = block - group  # row groups of a table follow each other
        return self._tables[table], str(position - int(self.layout.starts[first]))

    def _rows(self, block: int, *, texts_only: bool = False) -> tuple[Any, ...]:
        """The columns of a row group; without the images, the last one read is kept."""
        if texts_only:
            if self._loaded_texts is None or self._loaded_texts[0] != block:
                self._loaded_texts = block, self._read(block, self._columns_of(block).texts)
            return self._loaded_texts[1]
        rows = self._loaded.pop(block, None)
        if rows is None:
            rows = self._read(block, self._columns_of(block).names)
        self._loaded[block] = rows
        if len(self._loaded) > self._kept:
            self._loaded.popitem(last=False)
        return rows

    def _read(self, block: int, names: list[str]) -> tuple[Any, ...]:
        table, group = self._groups[block]
        try:
            read = _open_parquet(self._tables[table]).read_row_group(
                group, columns=names, use_threads=False
            )
        except (UserError, *_errors()) as error:  # it may be gone since it was opened
            raise Unusable("shard", f"row group {group} cannot be read: {error}") from error
        return tuple(read.column(name) for name in names)


class DatasetSource(Source):
    """A Hugging Face dataset written by `save_to_disk`: memory-mapped Arrow files."""

    def __init__(
        self, folder: Path, reading: ReadingConfig, captions: Captions = "required"
    ) -> None:
        """Maps the files.

        Args:
            folder: the folder of one split.
            reading: may name the columns.
            captions: what a missing caption is.

        Raises:
            UserError: the folder is incomplete, or lacks a column of a readable type.
        """
        self._folder, self._files = folder, _dataset_files(folder)
        table = self._map()
        self._columns = arrow_columns(table.schema, reading, folder, captions)
        self._validate(table)
        self._rows: dict[str, Any] | None = None
        self.layout = Layout.of(str(folder), even_blocks(table.num_rows))
        self.has_captions = bool(self._columns.captions)
        self._rule = RowRule.of(reading, captions, has_captions=self.has_captions)
        self.opened = columns_note([self._columns.image], self._columns.captions, reading)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_rows": None}

    def _content(self, position: int) -> Sample[bytes]:
        values = self._values(position, self._columns.names)
        sample = self._rule.texts(str(position), values, self._columns)
        return sample.with_image(_image(values[self._columns.image], self._folder))

    def _texts(self, position: int) -> Sample[None]:
        values = self._values(position, self._columns.texts)
        return self._rule.texts(str(position), values, self._columns)

    def _values(self, position: int, names: list[str]) -> dict[str, Any]:
        if self._rows is None:
            table = self._map()
            self._rows = {name: table.column(name) for name in self._columns.names}
        return self._rule.values([self._rows[name] for name in names], names, position)

    def files(self) -> list[Path]:
        """The Arrow files."""
        return [self._folder / file for file in self._files]

    def file_of(self, position: int) -> str | Path:
        """The Arrow file at the position's share of all rows: files have about equal sizes."""
        return self._folder / self._files[position * len(self._files) // len(self)]

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The folder, and the row number."""
        return self._folder, str(position)

    def _map(self) -> Any:  # noqa: ANN401  a pyarrow.Table
        arrow = pyarrow(self._folder)
        try:
            for file in self._files:
                open_regular(self._folder / file).close()  # pyarrow waits for named pipes
            parts = [
                arrow.ipc.open_stream(arrow.memory_map(str(self._folder / file))).read_all()
                for file in self._files
            ]
            return arrow.concat_tables(parts)
        except _errors() as error:
            raise self._broken(error) from None

    def _validate(self, table: Any) -> None:  # noqa: ANN401  a pyarrow.Table
        """Checks the offsets and texts of the columns; invalid ones would end the process."""
        try:
            table.select(self._columns.names).validate(full=True)
        except _errors() as error:
            raise self._broken(error) from None

    def _broken(self, error: Exception) -> UserError:
        return UserError(
            f"{self._folder}: the dataset cannot be read: {printable(str(error), 300)}"
        )


def open_parquet(
    tables: Sequence[Path], reading: ReadingConfig, captions: Captions = "required"
) -> Source:
    """Opens parquet tables with images as paths or as bytes.

    Args:
        tables: parquet files.
        reading: names the columns, and how many row groups are shuffled together.
        captions: what a missing caption is.

    Raises:
        UserError: pyarrow is missing, a table cannot be read, or a column is missing or of a type
            that holds no images or captions.
    """
    columns = [arrow_columns(_open_parquet(t).schema_arrow, reading, t, captions) for t in tables]
    has_captions = any(each.captions for each in columns)
    rule = RowRule.of(reading, captions, has_captions=has_captions)
    note = columns_note([columns[0].image], columns[0].captions, reading)
    if all(each.images_are_paths for each in columns) and not _holds_base64(tables[0], columns[0]):
        source: Source = TableSource(
            [_table_rows(*each) for each in zip(tables, columns, strict=True)],
            rule.captions,
            rule.annotations,
        )
    else:
        source = ParquetSource(tables, columns, rule, reading.shuffle_window)
    source.opened = note
    return source


# rows --------------------------------------------------------------------------------------------


def _holds_base64(table: Path, columns: ArrowColumns) -> bool:
    """Whether the first image of a table is an image file as base64 text."""
    file = _open_parquet(table)
    for group in range(file.num_row_groups):
        column = _row_group(file, table, group, [columns.image])[0]
        for value in column:
            if value.is_valid:
                with contextlib.suppress(UnicodeDecodeError):  # not UTF-8, so not base64
                    return base64_image(value.as_py()) is not None
    return False


def _table_rows(table: Path, columns: ArrowColumns) -> TableRows:
    """A table of paths, read by row group, without a Python object per value."""
    file = _open_parquet(table)
    names = columns.names
    texts = {name: ArrowTexts(pyarrow(table)) for name in names}
    for group in range(file.num_row_groups):
        read = _row_group(file, table, group, names)
        for name, column in texts.items():
            for chunk in read.column(name).chunks:
                column.add(chunk)
    paths = texts[columns.image].slices()
    return TableRows(
        table,
        image_root(table, paths),
        paths,
        tuple(texts[name].values() for name in columns.captions),
        tuple(texts[name].values() for name in columns.annotations),
    )


@dataclass(frozen=True)
class RowRule:
    """How a row is read besides its image.

    Attributes:
        captions: whether captions are required, and their weights.
        annotations: the annotations to read.
    """

    captions: CaptionRule
    annotations: AnnotationKeys

    @classmethod
    def of(cls, reading: ReadingConfig, captions: Captions, *, has_captions: bool) -> "RowRule":
        """The rule that the flags give."""
        required = captions_required(captions, has_captions=has_captions)
        return cls(CaptionRule.of_columns(reading, required=required), AnnotationKeys.of(reading))

    def values(self, columns: Sequence[Any], names: Sequence[str], row: int) -> dict[str, Any]:
        """The values of a row by column; raises `Unusable`."""
        try:
            read = zip(names, columns, strict=True)
            return {name: column[row].as_py() for name, column in read}
        except UnicodeDecodeError as error:
            raise Unusable("caption_encoding", f"not UTF-8 ({error.reason})") from error
        except IndexError:  # of a damaged file: its columns differ in length
            raise Unusable("shard", f"a column of the table ends before row {row}") from None

    def texts(self, key: str, values: dict[str, Any], columns: ArrowColumns) -> Sample[None]:
        """A sample without its image; raises `Unusable`."""
        captions = self.captions.in_columns([values[name] for name in columns.captions])
        named = zip(self.annotations.names, columns.annotations, strict=True)
        record = {name: values[column] for name, column in named}
        annotations = self.annotations.read(record, captions.weights)
        return Sample(key, None, captions.texts, annotations=annotations)


def _image(image: Any, folder: Path) -> bytes:  # noqa: ANN401  a value of an image column
    """The content of an image file; raises `Unusable`."""
    path = None
    if isinstance(image, dict):
        image, path = image.get("bytes"), image.get("path")
    if image is None:
        image = path
    if image is None:
        raise Unusable("image_missing", "no image")
    if isinstance(image, str):
        encoded = base64_image(image) is not None
        image = _decoded(image) if encoded else read_image_file(folder, image)
    return image


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise Unusable("image", f"not base64: {error}") from error


def _dataset_files(folder: Path) -> list[str]:
    try:
        state = read_json(folder / "state.json")
        files = [str(each["filename"]) for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} does not describe a dataset: {error!r}") from None
    if not files:
        raise UserError(f"{folder}: the dataset is empty")
    return files


def _open_parquet(table: Path) -> Any:  # noqa: ANN401  a pyarrow.parquet.ParquetFile
    pyarrow(table)
    try:
        open_regular(table).close()  # pyarrow waits for named pipes
        file = importlib.import_module("pyarrow.parquet").ParquetFile(table, pre_buffer=False)
        rows, size = file.metadata.num_rows, table.stat().st_size
    except _errors() as error:
        raise _not_parquet(table, error) from None
    if not 0 <= rows <= max(_ROWS, _ROWS_PER_BYTE * size):
        raise _not_parquet(table, ValueError(f"{rows:,} rows in {size:,} bytes"))
    return file


def _row_group(file: Any, table: Path, group: int, names: list[str]) -> Any:  # noqa: ANN401
    try:
        return file.read_row_group(group, columns=names, use_threads=False)
    except _errors() as error:
        raise _not_parquet(table, error) from None


def _not_parquet(table: Path, error: Exception) -> UserError:
    return UserError(f"{table} cannot be read as a parquet table: {printable(str(error), 300)}")


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises on damaged files."""
    return OSError, ValueError, MemoryError, importlib.import_module("pyarrow").ArrowException
