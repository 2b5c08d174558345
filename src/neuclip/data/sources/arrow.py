"""Parquet tables and Hugging Face datasets on disk. Needs pyarrow, imported on first use.

An image is a path, as in csv tables, or the bytes of an image file, alone or in a struct with its
path. pyarrow's threads are not used: they do not survive the fork of a worker process.
"""

import importlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuclip.config.sections import ReadingConfig
from neuclip.data.captions import clean_caption
from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Unusable
from neuclip.data.sources.source import Source, Texts, even_blocks, read_image_file
from neuclip.data.sources.tables import TableSource, find_columns
from neuclip.errors import UserError

_WINDOW = 4  # row groups shuffled together, and kept in memory, if images are in the table


class ParquetSource(Source):
    """Parquet tables that contain the images.

    Reading a row means reading its row group, so row groups are the blocks. Each process keeps the
    last few in memory.
    """

    def __init__(self, tables: Sequence[Path], columns: tuple[str, str], kept: int | None) -> None:
        """Reads the tables' footers.

        Args:
            tables: parquet files.
            columns: names of the image and the caption column.
            kept: row groups that each process keeps in memory; 0: all.
        """
        self._tables, self._columns = tuple(tables), columns
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
        self._loaded: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_loaded": OrderedDict()}

    def _content(self, position: int) -> Sample[bytes]:
        block = self.layout.block(position)
        table, key = self.locate(position)
        row = position - int(self.layout.starts[block])
        return _sample(key, self._rows(block), row, Path(table).parent)

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The table, and the row number in it."""
        block = self.layout.block(position)
        table, group = self._groups[block]
        first = block - group  # row groups of a table follow each other
        return self._tables[table], str(position - int(self.layout.starts[first]))

    def _rows(self, block: int) -> tuple[Any, Any]:
        rows = self._loaded.pop(block, None)
        if rows is None:
            table, group = self._groups[block]
            try:
                read = _open_parquet(self._tables[table]).read_row_group(
                    group, columns=list(self._columns), use_threads=False
                )
            except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
                raise Unusable("shard", f"row group {group} cannot be read: {error}") from error
            rows = tuple(read.column(name) for name in self._columns)
        self._loaded[block] = rows
        if len(self._loaded) > self._kept:
            self._loaded.popitem(last=False)
        return rows


class DatasetSource(Source):
    """A Hugging Face dataset written by `save_to_disk`: memory-mapped Arrow files."""

    def __init__(self, folder: Path, reading: ReadingConfig) -> None:
        """Maps the files.

        Raises:
            UserError: the folder is incomplete or lacks a column.
        """
        self._folder, self._files = folder, _dataset_files(folder)
        table = self._map()
        image, caption = find_columns(table.column_names, reading, folder)
        self._columns = table.column_names[image], table.column_names[caption]
        self._rows: tuple[Any, Any] | None = None
        self.layout = Layout.of(str(folder), even_blocks(table.num_rows))

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_rows": None}

    def _content(self, position: int) -> Sample[bytes]:
        if self._rows is None:
            table = self._map()
            self._rows = table.column(self._columns[0]), table.column(self._columns[1])
        return _sample(str(position), self._rows, position, self._folder)

    def files(self) -> list[Path]:
        """The Arrow files."""
        return [self._folder / file for file in self._files]

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The folder, and the row number."""
        return self._folder, str(position)

    def _map(self) -> Any:  # noqa: ANN401  a pyarrow.Table
        arrow = _pyarrow(self._folder)
        try:
            parts = [
                arrow.ipc.open_stream(arrow.memory_map(str(self._folder / file))).read_all()
                for file in self._files
            ]
        except (OSError, ValueError) as error:
            raise UserError(f"{self._folder}: the dataset cannot be read: {error}") from None
        return arrow.concat_tables(parts)


def open_parquet(tables: Sequence[Path], reading: ReadingConfig) -> Source:
    """Opens parquet tables with images as paths or as bytes.

    Args:
        tables: parquet files with the same columns.
        reading: names the columns, and how many row groups are shuffled together.

    Raises:
        UserError: pyarrow is missing, a table cannot be read, or a column is missing.
    """
    schema = _open_parquet(tables[0]).schema_arrow
    columns = find_columns(schema.names, reading, tables[0])
    image, caption = (schema.names[number] for number in columns)
    types = _pyarrow(tables[0]).types
    kind = schema.field(image).type
    if not (types.is_string(kind) or types.is_large_string(kind)):
        return ParquetSource(tables, (image, caption), reading.shuffle_window)
    rows: list[tuple[Texts, Texts]] = []
    for table in tables:
        read = _open_parquet(table).read(columns=[image, caption], use_threads=False)
        rows.append((_texts(read.column(image)), _texts(read.column(caption))))
    return TableSource(tables, rows)


def _texts(column: Any) -> Texts:  # noqa: ANN401  a pyarrow.ChunkedArray
    texts = Texts()
    for chunk in column.chunks:
        for value in chunk:
            texts.append(_text(value.as_py()))
    return texts


def _sample(key: str, rows: tuple[Any, Any], row: int, folder: Path) -> Sample[bytes]:
    """One row of an image column and a caption column; raises `Unusable`."""
    image, caption = rows[0][row].as_py(), _text(rows[1][row].as_py())
    path = None
    if isinstance(image, dict):
        image, path = image.get("bytes"), image.get("path")
    if image is None:
        image = path
    if image is None:
        raise Unusable("image_missing", "no image")
    if isinstance(image, str):
        image = read_image_file(folder, image)
    if not isinstance(image, bytes):
        raise Unusable("image", f"the image column holds {type(image).__name__}, not an image file")
    return Sample(key, image, (clean_caption(caption),))


def _text(value: object) -> str:
    """A caption, or the first of several."""
    if isinstance(value, list):
        value = value[0] if value else None
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"the caption column holds {type(value).__name__}, not text: name another column with "
            "--csv-caption-key"
        )
    return value or ""


def _dataset_files(folder: Path) -> list[str]:
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [str(each["filename"]) for each in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} does not describe a dataset: {error!r}") from None
    if not files:
        raise UserError(f"{folder}: the dataset is empty")
    return files


def _open_parquet(table: Path) -> Any:  # noqa: ANN401  a pyarrow.parquet.ParquetFile
    _pyarrow(table)
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(table, pre_buffer=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{table} cannot be read as a parquet table: {error}") from None


def _pyarrow(where: Path) -> Any:  # noqa: ANN401  a module that may be missing
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(
            f"{where}: pyarrow is needed to read this; install it with "
            "pip install 'neuclip[parquet]'"
        ) from None
