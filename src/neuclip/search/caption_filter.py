"""Images by a part of their caption."""

import re
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from neuclip.data.sources.source import Strings
from neuclip.errors import UserError

LONGEST_PART = 1000  # characters
_REMEMBERED = 4  # results, since the pages of one search ask for the same


class CaptionFilter:
    """Finds the captions that contain some characters. Case and kinds of space do not count.

    Args:
        captions: the captions of all images; a folded copy of them is kept in one buffer.
    """

    def __init__(self, captions: Strings) -> None:
        folded = bytearray()
        starts = np.empty(len(captions), np.int64)
        for row in range(len(captions)):
            starts[row] = len(folded)
            folded += _folded(captions[row]) + b"\n"
        self._folded, self._starts = bytes(folded), starts
        self._rows = lru_cache(_REMEMBERED)(self._find)

    def rows(self, part: str) -> Int64[np.ndarray, " rows"]:
        """The images whose captions contain a text, ascending.

        Raises:
            UserError: the text is too long.
        """
        if len(part) > LONGEST_PART:
            raise UserError(f"The part of a caption has more than {LONGEST_PART:,} characters.")
        return self._rows(_folded(part))

    def _find(self, part: bytes) -> Int64[np.ndarray, " rows"]:
        # A match takes the rest of its line, so that a caption is found once.
        found = re.finditer(re.escape(part) + rb"[^\n]*", self._folded)
        places = np.fromiter((match.start() for match in found), np.int64)
        return np.searchsorted(self._starts, places, side="right") - 1


def _folded(text: str) -> bytes:
    """A text in one line and without case; bytes that are not UTF-8 are kept."""
    return " ".join(text.casefold().split()).encode("utf-8", "surrogatepass")
