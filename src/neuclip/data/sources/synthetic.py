"""Random images and captions, `synthetic:N`: for smoke tests and timing, as open_clip has them.

Samples repeat a few images, encoded once, so that reading costs what reading JPEG files costs.
"""

import io
import re
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from neuclip.data.order import Layout
from neuclip.data.samples import Sample
from neuclip.data.sources.source import Source, even_blocks
from neuclip.errors import UserError

SYNTHETIC = "synthetic:"
"""What the name of such a source begins with; the number of its samples follows."""

_IMAGES = 16
_SIDE = 256  # pixels
_WORDS = ("red", "green", "blue", "round", "square", "large", "small", "old", "new", "shiny")


class SyntheticSource(Source):
    """Random images with random captions; a sample depends on its position only."""

    def __init__(self, name: str) -> None:
        """Reads the number of samples.

        Args:
            name: `synthetic:N`.

        Raises:
            UserError: N is not a positive number.
        """
        count = name.removeprefix(SYNTHETIC)
        if not re.fullmatch(r"[0-9]{1,12}", count) or int(count) == 0:
            raise UserError(f"{name!r}: expected a number of samples, such as {SYNTHETIC}10000")
        self._name = name
        self.layout = Layout.of(name, even_blocks(int(count)))

    def _content(self, position: int) -> Sample[bytes]:
        return Sample(str(position), _image(position % _IMAGES), (_caption(position),))

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The source, and the position as the key."""
        return self._name, str(position)

    def files(self) -> tuple[str]:
        """The name of the source, since there are no files."""
        return (self._name,)


@cache
def _image(number: int) -> bytes:
    """A JPEG file of coloured noise, smooth as a photograph."""
    noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def _caption(position: int) -> str:
    words = np.random.default_rng(position).choice(_WORDS, 4)
    return f"a {' '.join(words)} thing, number {position}"
