"""Images given one by one: paths of image files, and images of Pillow."""

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from neuclip.data.decode import to_rgb
from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Unusable
from neuclip.data.sources.source import Source, even_blocks, read_image_file
from neuclip.errors import UserError

GivenImage = str | Path | Image.Image
"""The path of an image file, or an image."""


class ImageList(Source):
    """Images without captions, in the order of a list; the key of a file is its path."""

    def __init__(self, images: Sequence[GivenImage]) -> None:
        """Keeps the list; files are read with their samples.

        Args:
            images: paths and images, in any mixture.

        Raises:
            UserError: the list is empty, or holds something else.
        """
        for number, image in enumerate(images):
            if not isinstance(image, GivenImage):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UserError(
                    f"image {number} is of type {type(image).__name__}: expected a path or a "
                    "PIL.Image.Image"
                )
        if not images:
            raise UserError("the list of images is empty")
        self._images = list(images)
        self.has_captions = False
        self.opened = "a list of images"
        self.layout = Layout.of(self.opened, even_blocks(len(images)))

    def _content(self, position: int) -> Sample[bytes]:
        image = self._images[position]
        key = self.locate(position)[1]
        if isinstance(image, Image.Image):
            return Sample(key, _as_file(image), ())
        return Sample(key, read_image_file(Path(), str(Path(image).expanduser())), ())

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The list, and the path of a file or the number of an image."""
        image = self._images[position]
        key = f"image {position}" if isinstance(image, Image.Image) else str(image)
        return self.opened, key


def _as_file(image: Image.Image) -> bytes:
    """An image as the content of a PPM file: every pixel of it in RGB, and fast to write."""
    content = io.BytesIO()
    try:
        to_rgb(image).save(content, "PPM")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow decodes a file at first use
        raise Unusable("image", f"{type(error).__name__}: {error}") from error
    return content.getvalue()
