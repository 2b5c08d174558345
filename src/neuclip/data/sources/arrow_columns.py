"""Columns of Arrow tables: which are read, whether their types hold images and captions, and texts.

Needs pyarrow, imported on first use.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys
from neuclip.data.sources.columns import ColumnIndices, find_columns
from neuclip.data.sources.source import Captions, Offsets, Slices, TextLists
from neuclip.errors import UserError, printable


@dataclass(frozen=True)
class ArrowColumns:
    """The columns that are read, by name.

    Attributes:
        image: the image column.
        captions: the caption columns; a sample has the captions of all of them.
        images_are_paths: whether the image column holds texts.
        annotations: the columns of `AnnotationKeys.names`, in their order.
    """

    image: str
    captions: tuple[str, ...]
    images_are_paths: bool
    annotations: tuple[str, ...] = ()

    @property
    def texts(self) -> list[str]:
        """The caption columns, then those of annotations, each once."""
        return list(dict.fromkeys((*self.captions, *self.annotations)))

    @property
    def names(self) -> list[str]:
        """The image column, then `texts`."""
        return [self.image, *(name for name in self.texts if name != self.image)]


def arrow_columns(
    schema: Any,  # noqa: ANN401  a pyarrow.Schema
    reading: ReadingConfig,
    where: Path,
    captions: Captions,
) -> ArrowColumns:
    """The columns that are read.

    Args:
        schema: a pyarrow.Schema.
        reading: may name the columns.
        where: the table, for messages.
        captions: whether a table without captions is accepted.

    Raises:
        UserError: a column is missing, of a type that holds no images or captions, or of a name
            that is not UTF-8.
    """
    try:
        found = find_columns(schema.names, reading, where, captions)
        return _columns(schema, found, reading, where)
    except UnicodeDecodeError:
        raise UserError(
            f"{where}: the name of a column is not UTF-8: the file is damaged"
        ) from None


def _columns(
    schema: Any,  # noqa: ANN401  a pyarrow.Schema
    found: ColumnIndices,
    reading: ReadingConfig,
    where: Path,
) -> ArrowColumns:
    types = pyarrow(where).types
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
    annotations = tuple(schema.field(index).name for index in found.annotations)
    for flag, name in AnnotationKeys.of(reading).by_flag.items():
        kind = schema.field(annotations[AnnotationKeys.of(reading).names.index(name)]).type
        listed = flag == "--hard-negative-key" and _is_caption(types, kind)
        if not listed and (types.is_nested(kind) or _is_bytes(types, kind)):
            raise UserError(f"{where}: column {name!r} of {flag} holds {_type(kind)}")
    return ArrowColumns(image.name, tuple(names), as_path, annotations)


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


class ArrowTexts:
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


def pyarrow(where: Path) -> Any:  # noqa: ANN401  a module that may be missing
    """The module pyarrow.

    Raises:
        UserError: it is not installed, which `where` needs.
    """
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(
            f"{where}: parquet and Arrow files need pyarrow; install it with "
            "pip install 'neuclip[parquet]'"
        ) from None
