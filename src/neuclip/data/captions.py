"""The captions of a sample: from a `.txt` or `.json` file, or from a value in a table.

A sample may have several captions. All sources read them by one rule, `captions_of`; the batch
reader draws one for each visit (`--caption-choice`).
"""

import ast
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from neuclip.config.caption_keys import CaptionKeys
from neuclip.config.data_sections import ReadingConfig
from neuclip.data.samples import Unusable
from neuclip.untrusted import parse_json

_LONGEST_LIST = 2**16  # characters
_MAX_LENGTH = 4096  # characters; the longest token of open_clip's vocabulary has 25


class WeightedCaptions(NamedTuple):
    """The captions of a sample, and how likely each is drawn; without weights all are as likely."""

    texts: tuple[str, ...]
    weights: tuple[float, ...] = ()


NO_CAPTIONS = WeightedCaptions(())


@dataclass(frozen=True)
class CaptionRule:
    """Where captions come from, and how many a text holds.

    Attributes:
        json_keys: keys of the `.json` file, tried in order; none: the `.txt` file is read.
        lines: each line of a text is a caption, as in clip-benchmark's evaluation sets.
        required: a sample without a caption is corrupt.
        weights: how likely each key, or each caption column of a table, is drawn, in proportion.
    """

    json_keys: tuple[str, ...] = ()
    lines: bool = False
    required: bool = True
    weights: tuple[float, ...] = ()

    @classmethod
    def for_key(cls, caption_key: str | None) -> "CaptionRule":
        """The rule for the value of `--caption-key`: keys joined by `;`, or none."""
        return cls(CaptionKeys.prioritised(caption_key or "").names)

    @classmethod
    def of(cls, reading: ReadingConfig, *, required: bool = True) -> "CaptionRule":
        """The rule for `.txt` and `.json` files.

        Raises:
            UserError: the flags contradict each other, or their values are wrong.
        """
        keys = reading.caption_keys_read or CaptionKeys(())
        return cls(keys.names, required=required, weights=keys.weights)

    @classmethod
    def of_columns(cls, reading: ReadingConfig, *, required: bool = True) -> "CaptionRule":
        """The rule for the columns of a table; raises as `of` does."""
        keys = reading.caption_keys_read if reading.caption_keys is not None else None
        return cls(required=required, weights=keys.weights if keys else ())

    def read(self, content: bytes) -> tuple[str, ...]:
        """The captions in a `.txt` file, or under the keys of a `.json` file.

        Raises:
            Unusable: the file is not UTF-8 or not JSON, or has no caption although one is required.
        """
        return self.in_file(content).texts

    def in_file(self, content: bytes) -> WeightedCaptions:
        """As `read`, with the weights."""
        if self.json_keys:
            return self._in_record(read_record(content))
        text = decode_text(content)
        captions = captions_of(text.splitlines() if self.lines else text)
        return WeightedCaptions(self.checked(captions))

    def _in_record(self, record: Mapping[str, object]) -> WeightedCaptions:
        """The captions under the keys of a `.json` file; raises `Unusable`."""
        present = [key for key in self.json_keys if record.get(key) is not None]
        if not present and not self.required:
            return NO_CAPTIONS
        if not present:
            names = " or ".join(map(repr, self.json_keys))
            raise Unusable("caption_missing", f"the .json has no {names}")
        if self.weights:
            return self._drawn([(record.get(k), f"{k!r} in the .json") for k in self.json_keys])
        for key in present:
            captions = captions_of(record[key], f"{key!r} in the .json")
            if captions:
                return WeightedCaptions(captions)
        return WeightedCaptions(self.checked(()))

    def in_columns(self, values: Sequence[object]) -> WeightedCaptions:
        """The captions in the caption columns of a row; a list may be written as text.

        Raises:
            Unusable: a value is not a text or a list of texts, or there is no caption although one
                is required.
        """
        values = [_written_captions(value) for value in values]
        if self.weights:
            return self._drawn([(value, "the caption") for value in values])
        texts = tuple(text for value in values for text in captions_of(value))
        return WeightedCaptions(self.checked(texts))

    def _drawn(self, values: Sequence[tuple[object, str]]) -> WeightedCaptions:
        """The captions of all keys with their weights.

        The captions of a key share its weight. Keys of weight 0 stand in, the first with a caption,
        if no other key has one: as in open_clip, where a drawn order of the keys decides.

        Args:
            values: for each key its value, and its name for messages.
        """
        found = [captions_of(value, name) for value, name in values]
        texts: list[str] = []
        weights: list[float] = []
        for captions, weight in zip(found, self.weights, strict=True):
            if weight > 0:
                texts += captions
                weights += [weight / len(captions)] * len(captions) if captions else []
        if texts:
            return WeightedCaptions(tuple(texts), tuple(weights))
        return WeightedCaptions(self.checked(next(filter(None, found), ())))

    def checked(self, captions: tuple[str, ...]) -> tuple[str, ...]:
        """The captions of a sample.

        Raises:
            Unusable: there are none although one is required.
        """
        if self.required and not captions:
            raise Unusable("caption_empty", "the caption is empty")
        return captions


def decode_text(content: bytes) -> str:
    """The text in a file.

    Raises:
        Unusable: the file is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption_encoding", f"not UTF-8 ({error.reason})") from error


def read_record(content: bytes) -> Mapping[str, object]:
    """The object in a `.json` file.

    Raises:
        Unusable: the file is not UTF-8, not JSON, or holds something else.
    """
    try:
        record = parse_json(decode_text(content))
    except ValueError as error:
        raise Unusable("caption_json", f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise Unusable(
            "caption_missing", f"the .json is {kind_of(record)}, not an object with keys"
        )
    return record  # pyright: ignore[reportUnknownVariableType]  keys of JSON are texts


def captions_of(value: object, name: str = "the caption") -> tuple[str, ...]:
    """The captions in a value of a table, of JSON or of a text file: a text or a list of texts.

    Args:
        value: a text, a list of texts, or None for a missing value.
        name: what holds the value, for messages.

    Returns:
        The captions in order, each cleaned by `clean_caption`, without empty ones.

    Raises:
        Unusable: the value or an entry of the list is not a text, or a text is not UTF-8.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (clean_caption(value),) if value.strip() else ()
    if not isinstance(value, (list, tuple)):
        raise Unusable("caption_type", f"{name} is {kind_of(value)}, not a text or a list of texts")
    captions: list[str] = []
    for entry in value:  # pyright: ignore[reportUnknownVariableType]  a list of anything
        if isinstance(entry, str):
            if entry.strip():
                captions.append(clean_caption(entry))
        elif entry is not None:
            raise Unusable("caption_type", f"{name} is a list with {kind_of(entry)}, not of texts")
    return tuple(captions)


def written_list(value: object) -> object:
    """The list that a text stands for in JSON or Python, as in csv files; else the value."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    if len(value) >= _LONGEST_LIST:
        return value
    for parse in (parse_json, _python_literal):
        try:
            found: object = parse(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(found, list):
            return found  # pyright: ignore[reportUnknownVariableType]
    return value


def _written_captions(value: object) -> object:
    """The list of texts that a text stands for; another list, such as [1], may be a caption."""
    found = written_list(value)
    if found is value or not isinstance(found, list):
        return value
    entries: list[object] = found
    return entries if all(each is None or isinstance(each, str) for each in entries) else value


def _python_literal(text: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # a backslash in a caption
        warnings.simplefilter("ignore", DeprecationWarning)
        return ast.literal_eval(text)


def clean_caption(text: str) -> str:
    """A caption without surrounding space, shortened.

    Raises:
        Unusable: the caption is empty, or is not UTF-8 (read with `surrogateescape`).
    """
    text = shorten(text)
    if not text:
        raise Unusable("caption_empty", "the caption is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("caption_encoding", "not UTF-8") from None
    return text


def shorten(text: str) -> str:
    """A caption without surrounding space, cut far beyond the length that any model reads.

    Tokenizers cut at about 77 tokens, but only after tokenizing the whole text: a megabyte takes
    seconds.
    """
    text = text.strip()
    if len(text) > _MAX_LENGTH:
        # Collapse space first: tokenizers drop it, and words may follow a long run of it.
        text = " ".join(text.split(None, _MAX_LENGTH)[:_MAX_LENGTH])[:_MAX_LENGTH]
    return text


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """A short name of a value's type, for messages."""
    if isinstance(value, (list, tuple)):
        return "a list"
    return _KINDS.get(type(value), f"of type {type(value).__name__}")
