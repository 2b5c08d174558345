"""From the bytes of an image file to an RGB picture.

Colours are Pillow's `convert("RGB")`, as in open_clip: alpha is dropped, a palette looked up, CMYK
converted, an EXIF rotation left alone. The one exception is 16-bit grey, which that call clips to
white: its upper eight bits are taken instead.
"""

import io
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from neuclip.config.sections import MAX_IMAGE_PIXELS
from neuclip.data.samples import Unusable

Decode = Callable[[bytes], Image.Image]
"""Makes the RGB picture of an image file; raises `Unusable`."""

_ORIENTATION = 0x0112  # of EXIF
_TAIL = 4096  # some cameras write more behind the end of a picture

# No EPS, PDF or the like under an image's name: Pillow would start another program for them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000")


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image file tells.

    Attributes:
        format: Pillow's name of it, such as JPEG.
        mode: Pillow's name of its colours, such as CMYK.
        size: width and height in pixels, as stored.
        rotated: EXIF says that it is to be turned or mirrored for showing.
    """

    format: str
    mode: str
    size: tuple[int, int]
    rotated: bool


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes image files, within limits.

    Attributes:
        max_pixels: a picture of more pixels, as its header tells, is refused before decoding.
        smallest: shorter side in pixels that is always kept. A JPEG at least twice as large is
            decoded at 1/2, 1/4 or 1/8 of its scale, which skips most of the work; none: never.
    """

    max_pixels: int = MAX_IMAGE_PIXELS
    smallest: int | None = None

    @classmethod
    def for_model(
        cls, image_size: int, *, max_pixels: int = MAX_IMAGE_PIXELS, full: bool = False
    ) -> "ImageDecoder":
        """A decoder for a model that sees `image_size` pixels.

        A seventh more is kept than the model sees, so that what a random crop leaves is seldom
        enlarged again.
        """
        return cls(max_pixels, None if full else -(-image_size * 8 // 7))

    def __call__(self, content: bytes) -> Image.Image:
        """The RGB picture in an image file.

        Raises:
            Unusable: it is no picture, cut, or too large.
        """
        with self._opened(content) as image:
            if self.smallest is not None and image.format in {"JPEG", "MPO"}:
                image.draft(None, (self.smallest, self.smallest))
            return _rgb(image)

    def facts(self, content: bytes) -> "ImageFacts":
        """What the header of an image file tells.

        Raises:
            Unusable: it is no picture, or too large.
        """
        with self._opened(content) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            return ImageFacts(image.format or "", image.mode, image.size, orientation != 1)

    @contextmanager
    def _opened(self, content: bytes) -> Generator[Image.Image]:
        """The picture before decoding; whatever goes wrong with it becomes `Unusable`."""
        try:
            with _own_limit():
                image = Image.open(io.BytesIO(content), formats=_formats())
                self._check_size(image.size)
                yield image
        except Unusable:
            raise
        except Exception as error:  # on damaged files decoders raise nearly everything
            kind = "image_truncated" if _is_cut(content, error) else "image"
            detail = f"{type(error).__name__}: {error}"
            if isinstance(error, UnidentifiedImageError):  # its text is an address in memory
                detail = "no known image format"
            raise Unusable(kind, f"{detail} ({len(content)} bytes)") from error

    def _check_size(self, size: tuple[int, int]) -> None:
        width, height = size
        if width * height > self.max_pixels:
            raise Unusable(
                "image_too_large",
                f"{width} x {height} pixels are more than --max-image-pixels {self.max_pixels}",
            )


decode_image: Decode = ImageDecoder()
"""At full scale, with the default limit."""


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns
    return image.convert("RGB")


def _is_cut(content: bytes, error: Exception) -> bool:
    """Whether an image file that cannot be decoded begins well and has lost its end."""
    if content.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in content[-_TAIL:]
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-_TAIL:]
    if content.startswith(b"RIFF"):
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    return "truncated" in str(error).lower()


@contextmanager
def _own_limit() -> Generator[None]:
    """Pillow's limit lifted: ours takes its place."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
