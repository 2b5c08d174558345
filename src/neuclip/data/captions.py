"""From the bytes of a caption file to a caption."""

import json

from neuclip.data.samples import Unusable

_MAX_LENGTH = 4096  # characters; the longest token of open_clip's vocabulary has 25


def decode_caption(content: bytes, json_key: str | None) -> str:
    """The caption in a `.txt` file, or under a key of a `.json` file.

    Args:
        content: the file.
        json_key: key of the caption if the file is JSON.

    Raises:
        Unusable: the file is not UTF-8, or its JSON does not contain a caption.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable("caption_encoding", f"not UTF-8 ({error.reason})") from error
    return shorten(text if json_key is None else _from_json(text, json_key))


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


def _from_json(text: str, key: str) -> str:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise Unusable("caption_json", f"invalid JSON: {error}") from error
    caption = record.get(key) if isinstance(record, dict) else None
    if caption is None:
        raise Unusable("caption_missing", f"the .json has no {key!r}")
    if not isinstance(caption, str):
        raise Unusable("caption_json", f"{key!r} in the .json is not a string")
    return caption
