"""The file name endings that shards and folders read, and how a name splits into key and ending."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cache

from neuclip.data.decode import image_endings
from neuclip.errors import UserError

IMAGE, TEXT, JSON, CLASS, METADATA = range(5)
"""The parts of a sample; also the columns of a tar index."""

_OTHERS = {
    "txt": TEXT,
    "text": TEXT,
    "caption": TEXT,
    "json": JSON,
    "cls": CLASS,
    "npy": METADATA,
}


@cache
def known_endings() -> Mapping[str, int]:
    """The part of a sample that a file holds, by its ending in lower case, without the dot."""
    return {**dict.fromkeys(image_endings(), IMAGE), **_OTHERS}


def endings_of_keys(image_key: str | None, text_key: str | None) -> Mapping[str, int]:
    """The endings to read from tar shards, as open_clip's `--image-key` and `--text-key` say.

    Args:
        image_key: endings of images, joined by `;`; None: all that are known.
        text_key: endings of captions, likewise.

    Raises:
        UserError: a key names no ending.
    """
    endings = dict(known_endings())
    for flag, keys, part in (("--image-key", image_key, IMAGE), ("--text-key", text_key, TEXT)):
        if keys is None:
            continue
        given = [key.strip().lower().removeprefix(".") for key in keys.split(";")]
        if not all(given):
            raise UserError(f"{flag} {keys!r}: expected endings joined by ';', such as 'jpg;png'")
        endings = {ending: which for ending, which in endings.items() if which != part}
        endings |= dict.fromkeys(given, part)
    return endings


def split_names(names: Iterable[str]) -> Iterator[tuple[str, str, str, int | None]]:
    """Splits file names at their last dots.

    Yields:
        Name, key, ending, and the part of a sample that the file holds; None if the ending is
        unknown.
    """
    known = known_endings()
    for name in names:
        key, _, ending = name.rpartition(".")
        yield name, key, ending, known.get(ending.lower()) if key else None


def ending_of(name: str) -> str:
    """The ending of a file name with its dot, or "no ending"."""
    key, dot, ending = name.rpartition(".")
    return f".{ending}" if key and dot else "no ending"
