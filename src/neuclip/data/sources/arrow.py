"""Parquet tables and Hugging Face datasets on disk. Needs pyarrow, imported on first use.

An image is a path, as in csv tables, or the bytes of an image file, alone, as base64 text, or in a
struct with its path. pyarrow's threads are not used: they do not survive the fork of a worker
process.
"""

import base64
import importlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuclip.config.sections import ReadingConfig
from neuclip.data.captions import CaptionRule, captions_of
from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Unusable
from neuclip.data.sources.columns import base64_image, columns_note, find_columns, image_root
from neuclip.data.sources.source import (
    Captions,
    Offsets,
    Slices,
    Source,
    TextLists,
    captions_required,
    even_blocks,
    read_image_file,
)
from neuclip.data.sources.tables import TableRows, TableSource
from neuclip.errors import UserError, printable

_WINDOW = 4  # row groups shuffled together, and kept in memory, if images are in the table


@dataclass(frozen=True)
class _Columns:
    """The columns that are read, by name; a sample has the captions of all caption columns."""

    image: str
    captions: tuple[str, ...]
    images_are_paths: bool

    @property
    def names(self) -> list[str]:
        return [self.image, *self.captions]


class ParquetSource(Source):
    """Parquet tables that contain the images.

    Reading a row means reading its row group, so row groups are the blocks. Each process keeps the
    last few in memory.
    """

    def __init__(
        self,
        tables: Sequence[Path],
        columns: Sequence[_Columns],
        captions: CaptionRule,
        kept: int | None,
    ) -> None:
        """Reads the tables' footers.

        Args:
            tables: parquet files.
            columns: the columns of each.
            captions: whether captions are required.
            kept: row groups that each process keeps in memory; 0: all.
        """
        self._tables, self._columns, self._captions = tuple(tables), tuple(columns), captions
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

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_loaded": OrderedDict()}

    def _content(self, position: int) -> Sample[bytes]:
        block = self.layout.block(position)
        table, key = self.locate(position)
        row = position - int(self.layout.starts[block])
        return _sample(key, self._rows(block), row, Path(table).parent, self._captions)

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The table, and the row number in it."""
        block = self.layout.block(position)
        table, group = self._groups[block]
        first = block - group  # row groups of a table follow each other
        return self._tables[table], str(position - int(self.layout.starts[first]))

    def _rows(self, block: int) -> tuple[Any, ...]:
        rows = self._loaded.pop(block, None)
        if rows is None:
            table, group = self._groups[block]
            names = self._columns[table].names
            try:
                read = _open_parquet(self._tables[table]).read_row_group(
                    group, columns=names, use_threads=False
                )
            except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
                raise Unusable("shard", f"row group {group} cannot be read: {error}") from error
            rows = tuple(read.column(name) for name in names)
        self._loaded[block] = rows
        if len(self._loaded) > self._kept:
            self._loaded.popitem(last=False)
        return rows


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
        self._columns = _columns(table.schema, reading, folder, captions)
        self._rows: tuple[Any, ...] | None = None
        self.layout = Layout.of(str(folder), even_blocks(table.num_rows))
        self.has_captions = bool(self._columns.captions)
        self._captions = CaptionRule(
            required=captions_required(captions, has_captions=self.has_captions)
        )
        self.opened = columns_note([self._columns.image], self._columns.captions)

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_rows": None}

    def _content(self, position: int) -> Sample[bytes]:
        if self._rows is None:
            table = self._map()
            self._rows = tuple(table.column(name) for name in self._columns.names)
        return _sample(str(position), self._rows, position, self._folder, self._captions)

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
        arrow = _pyarrow(self._folder)
        try:
            parts = [
                arrow.ipc.open_stream(arrow.memory_map(str(self._folder / file))).read_all()
                for file in self._files
            ]
        except (OSError, ValueError) as error:
            raise UserError(f"{self._folder}: the dataset cannot be read: {error}") from None
        return arrow.concat_tables(parts)


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
    columns = [_columns(_open_parquet(t).schema_arrow, reading, t, captions) for t in tables]
    has_captions = any(each.captions for each in columns)
    rule = CaptionRule(required=captions_required(captions, has_captions=has_captions))
    note = columns_note([columns[0].image], columns[0].captions)
    if all(each.images_are_paths for each in columns) and not _holds_base64(tables[0], columns[0]):
        source: Source = TableSource(
            [_table_rows(*each) for each in zip(tables, columns, strict=True)], rule
        )
    else:
        source = ParquetSource(tables, columns, rule, reading.shuffle_window)
    source.opened = note
    return source


# columns and their types -------------------------------------------------------------------------


def _columns(schema: Any, reading: ReadingConfig, where: Path, captions: Captions) -> _Columns:  # noqa: ANN401  a pyarrow.Schema
    """The columns that are read; raises `UserError` for types that hold no images or captions."""
    found = find_columns(schema.names, reading, where, captions)
    types = _pyarrow(where).types
    image = schema.field(found.image)
    as_path = _is_text(types, image.type)
    if not (as_path or _is_image(types, image.type)):
        raise UserError(
            f"{where}: column {image.name!r} holds {_type(image.type)}, not images: paths, bytes, "
            "or a struct {bytes, path}; name another one with --csv-img-key"
        )
    names: list[str] = []
    for index in found.captions:
        caption = schema.field(index)
        if not _is_caption(types, caption.type):
            others = [each.name for each in schema if _is_text(types, each.type)]
            known = f" (text columns: {', '.join(map(repr, others[:8]))})" if others else ""
            raise UserError(
                f"{where}: column {caption.name!r} holds {_type(caption.type)}, not captions: a "
                f"text or a list of texts; name another one with --csv-caption-key{known}"
            )
        names.append(caption.name)
    return _Columns(image.name, tuple(names), as_path)


def _is_text(types: Any, kind: Any) -> bool:  # noqa: ANN401  pyarrow.types and a DataType
    if types.is_dictionary(kind):
        kind = kind.value_type
    view = getattr(types, "is_string_view", None)
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or (view is not None and view(kind))
    )


def _is_bytes(types: Any, kind: Any) -> bool:  # noqa: ANN401
    view = getattr(types, "is_binary_view", None)
    return bool(
        types.is_binary(kind) or types.is_large_binary(kind) or (view is not None and view(kind))
    )


def _is_image(types: Any, kind: Any) -> bool:  # noqa: ANN401
    """Whether a type is that of image files: bytes, or a struct that has them or a path."""
    if types.is_struct(kind):
        fields = {kind.field(number).name: kind.field(number).type for number in range(len(kind))}
        has_bytes = "bytes" in fields and _is_bytes(types, fields["bytes"])
        return has_bytes or ("path" in fields and _is_text(types, fields["path"]))
    return _is_bytes(types, kind)


def _is_caption(types: Any, kind: Any) -> bool:  # noqa: ANN401
    if _is_list(types, kind):
        return _is_text(types, kind.value_type)
    return _is_text(types, kind) or bool(types.is_null(kind))


def _is_list(types: Any, kind: Any) -> bool:  # noqa: ANN401
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _type(kind: Any) -> str:  # noqa: ANN401
    hint = " (labels?)" if "int" in str(kind) and "<" not in str(kind) else ""
    return f"values of type {printable(str(kind))}{hint}"


# rows --------------------------------------------------------------------------------------------


def _holds_base64(table: Path, columns: _Columns) -> bool:
    """Whether the first image of a table is an image file as base64 text."""
    file = _open_parquet(table)
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=[columns.image], use_threads=False)[0]
        for value in column:
            if value.is_valid:
                return base64_image(value.as_py()) is not None
    return False


def _table_rows(table: Path, columns: _Columns) -> TableRows:
    """A table of paths, read by row group, without a Python object per value."""
    file = _open_parquet(table)
    texts = [_ArrowTexts(_pyarrow(table)) for _ in columns.names]
    for group in range(file.num_row_groups):
        read = file.read_row_group(group, columns=columns.names, use_threads=False)
        for column, name in zip(texts, columns.names, strict=True):
            for chunk in read.column(name).chunks:
                column.add(chunk)
    images, *captions = texts
    paths = images.slices()
    return TableRows(
        table, image_root(table, paths), paths, tuple(each.values() for each in captions)
    )


class _ArrowTexts:
    """A column of texts, or of lists of texts, copied from Arrow's buffers; nulls are empty."""

    def __init__(self, arrow: Any) -> None:  # noqa: ANN401  the module
        self._arrow = arrow
        self._content = bytearray()
        self._starts: list[Offsets] = []
        self._ends: list[Offsets] = []
        self._lengths: list[Offsets] = []

    def add(self, chunk: Any) -> None:  # noqa: ANN401  a pyarrow.Array
        """Adds an array."""
        if _is_list(self._arrow.types, chunk.type):
            compute = importlib.import_module("pyarrow.compute")
            lengths = compute.fill_null(compute.list_value_length(chunk), 0)
            self._lengths.append(np.asarray(lengths, dtype=np.int64))
            chunk = chunk.flatten()
        texts = chunk.cast(self._arrow.large_string())
        if not len(texts):
            return
        _, offsets, data = texts.buffers()
        numbers = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        first, last, size = int(numbers[0]), int(numbers[-1]), len(self._content)
        if data is not None:
            self._content += memoryview(data)[first:last]
        self._starts.append(numbers[:-1] + (size - first))
        self._ends.append(numbers[1:] + (size - first))

    def slices(self) -> Slices:
        """The texts, of all lists."""
        nothing = np.zeros(0, dtype=np.int64)
        return Slices(
            self._content,
            np.concatenate([nothing, *self._starts]),
            np.concatenate([nothing, *self._ends]),
        )

    def values(self) -> Slices | TextLists:
        """The values of the column."""
        if not self._lengths:
            return self.slices()
        return TextLists(self.slices(), np.cumsum(np.concatenate(self._lengths)))


def _sample(
    key: str, rows: tuple[Any, ...], row: int, folder: Path, rule: CaptionRule
) -> Sample[bytes]:
    """One row of an image column and of caption columns; raises `Unusable`."""
    image, *values = (column[row].as_py() for column in rows)
    captions = rule.checked(tuple(text for value in values for text in captions_of(value)))
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
    return Sample(key, image, captions)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise Unusable("image", f"not base64: {error}") from error


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
