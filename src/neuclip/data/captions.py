"""The captions of a sample: from a `.txt` or `.json` file, or from a value in a table.

A sample may have several captions. All sources read them by one rule, `captions_of`; the batch
reader draws one for each visit (`--caption-choice`).
"""

from dataclasses import dataclass

from neuclip.data.samples import Unusable
from neuclip.untrusted import parse_json

_MAX_LENGTH = 4096  # characters; the longest token of open_clip's vocabulary has 25


@dataclass(frozen=True)
class CaptionRule:
    """Where captions come from, and how many a text holds.

    Attributes:
        json_keys: keys of the `.json` file, tried in order; none: the `.txt` file is read.
        lines: each line of a text is a caption, as in clip-benchmark's evaluation sets.
        required: a sample without a caption is corrupt.
    """

    json_keys: tuple[str, ...] = ()
    lines: bool = False
    required: bool = True

    @classmethod
    def for_key(cls, caption_key: str | None) -> "CaptionRule":
        """The rule for the value of `--caption-key`: keys joined by `;`, or none."""
        keys = (key.strip() for key in (caption_key or "").split(";"))
        return cls(tuple(key for key in keys if key))

    def read(self, content: bytes) -> tuple[str, ...]:
        """The captions in a `.txt` file, or under a key of a `.json` file.

        Raises:
            Unusable: the file is not UTF-8 or not JSON, or has no caption although one is required.
        """
        text = decode_text(content)
        if self.json_keys:
            captions = _from_json(text, self.json_keys)
        else:
            captions = captions_of(text.splitlines() if self.lines else text)
        return self.checked(captions)

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
        raise Unusable("caption_type", f"{name} is {_kind(value)}, not a text or a list of texts")
    captions: list[str] = []
    for entry in value:  # pyright: ignore[reportUnknownVariableType]  a list of anything
        if isinstance(entry, str):
            if entry.strip():
                captions.append(clean_caption(entry))
        elif entry is not None:
            raise Unusable("caption_type", f"{name} is a list with {_kind(entry)}, not of texts")
    return tuple(captions)


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


def _from_json(text: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The captions under the first key that has any."""
    try:
        record = parse_json(text)
    except ValueError as error:
        raise Unusable("caption_json", f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise Unusable("caption_missing", f"the .json is {_kind(record)}, not an object with keys")
    present = [key for key in keys if record.get(key) is not None]  # pyright: ignore[reportUnknownMemberType]
    for key in present:
        captions = captions_of(record[key], f"{key!r} in the .json")
        if captions:
            return captions
    if present:
        return ()
    names = " or ".join(map(repr, keys))
    raise Unusable("caption_missing", f"the .json has no {names}")


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
}


def _kind(value: object) -> str:
    """A short name of a value's type, for messages."""
    if isinstance(value, (list, tuple)):
        return "a list"
    return _KINDS.get(type(value), f"of type {type(value).__name__}")
