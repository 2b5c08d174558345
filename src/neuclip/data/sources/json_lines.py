"""Tables in JSON: one object a line (`.jsonl`, `metadata.jsonl`), or one list of objects."""

import io
import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.sources.columns import columns_note, find_columns, image_root
from neuclip.data.sources.source import Captions, JsonValues, TextLists, Texts
from neuclip.data.sources.tables import TableRows, text_of
from neuclip.errors import UserError, printable, quantity
from neuclip.untrusted import MAX_JSON, parse_json

_EXPECTED = "expected one JSON object a line, or a list of objects"


def read_json_lines(table: Path, reading: ReadingConfig, captions: Captions) -> TableRows:
    """Reads a table of JSON objects; the first one names the columns.

    A caption may be a list of captions. Lines that are not an object are left out and counted.

    Raises:
        UserError: the table cannot be read, lacks a column, has values of other types, or none of
            its images exists.
    """
    content, encoding = text_of(table)
    bad: list[int] = []
    names: list[str] = []
    images, image = Texts(), ""
    captions_by_key: dict[str, _CaptionLists] = {}
    annotations: dict[str, JsonValues] = {}
    for line, record in _records(content, bad):
        if not names:
            names = list(record)
            found = find_columns(names, reading, table, captions)
            image = names[found.image]
            captions_by_key = {names[index]: _CaptionLists() for index in found.captions}
            annotations = {names[index]: JsonValues() for index in found.annotations}
        where = f"{table}, line {line}"
        images.append(_image(record.get(image), image, where))
        for key, column in captions_by_key.items():
            column.append(_captions(record.get(key), key, where))
        for key, values in annotations.items():
            values.append(record.get(key))
    if not names:
        raise UserError(f"{table} contains no JSON object: {_EXPECTED}")
    return TableRows(
        table,
        image_root(table, images),
        images,
        tuple(column.lists() for column in captions_by_key.values()),
        tuple(annotations.values()),
        ", ".join(filter(None, (columns_note([image], list(captions_by_key), reading), encoding))),
        _left_out(table, bad),
    )


class _CaptionLists:
    """The captions of one key, which grow."""

    def __init__(self) -> None:
        self._texts, self._ends = Texts(), array("q")

    def append(self, captions: Iterable[str]) -> None:
        for text in captions:
            self._texts.append(text)
        self._ends.append(len(self._texts))

    def lists(self) -> TextLists:
        return TextLists(self._texts, np.asarray(self._ends, dtype=np.int64))


def _records(content: bytes, bad: list[int]) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects with the numbers of their lines (entries of a list); adds others to `bad`."""
    entries: Iterable[object]
    if content.lstrip()[:1] == b"[":
        parsed = _parsed(content, None)
        entries = parsed if isinstance(parsed, list) else []
    else:
        entries = (_parsed(line) if line.strip() else "" for line in io.BytesIO(content))
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, dict):
            yield number, entry
        elif entry != "":  # an empty line
            bad.append(number)


def _parsed(text: bytes, max_size: int | None = MAX_JSON) -> object:
    """What a JSON text stands for; None if it is not JSON."""
    try:
        return parse_json(text.decode("utf-8", "surrogateescape"), max_size)
    except ValueError:
        return None


def _left_out(table: Path, bad: list[int]) -> tuple[str, ...]:
    if not bad:
        return ()
    lines = quantity(len(bad), "line")
    return (f"{lines} of {table} without a JSON object (first: line {bad[0]})",)


def _image(value: object, key: str, where: str) -> str:
    if value is None or isinstance(value, str):
        return _encodable(value or "")
    raise UserError(f"{where}: {key!r} is {_shown(value)}, not the path of an image")


def _captions(value: object, key: str, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not all(each is None or isinstance(each, str) for each in values):
        raise UserError(
            f"{where}: {key!r} is {_shown(value)}, not a text or a list of texts: name another key "
            "with --csv-caption-key"
        )
    return [_encodable(each) for each in values if isinstance(each, str)]


def _encodable(text: str) -> str:
    """A text without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _shown(value: object) -> str:
    return printable(json.dumps(value), 60)
