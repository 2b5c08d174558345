"""Decodes images: JPEG, PNG and other files become RGB images, in `ImageDecoder.__call__`.

Colours are those of Pillow's `convert("RGB")`, as in open_clip: alpha is dropped, palettes are
looked up, CMYK is converted, EXIF rotations are ignored. The one exception is 16-bit grey, which
Pillow clips to white: its upper eight bits are taken instead.
"""

import io
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from neuclip.config.data_sections import MAX_IMAGE_PIXELS
from neuclip.data.samples import Unusable
from neuclip.errors import UserError

Decode = Callable[[bytes], Image.Image]
"""Decodes the content of an image file to RGB; raises `Unusable` if it is corrupt."""

_ORIENTATION = 0x0112  # of EXIF
_TAIL = 4096  # bytes; some cameras write data after the end of the image

# Not EPS, PDF or the like: Pillow would start another program for them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000")

_BYTES = {"WEBP": 20, "JPEG2000": 20, "AVIF": 10}
_BYTES_ELSE = 8
"""The memory that decoding takes, in bytes a pixel."""
_SCANNED = 2**31  # pixels times scans of a JPEG: about three seconds
_SHORTEST_SCAN = 10  # bytes
_START_OF_SCAN = b"\xff\xda"
_IN_PYTHON = 2**21  # pixels of the formats that Pillow decodes in Python: about four seconds

# Formats whose plugin is present even if the library behind it is not.
_LIBRARIES = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}


@dataclass(frozen=True)
class ImageFacts:
    """The header of an image file.

    Attributes:
        format: Pillow's name of the format, such as JPEG.
        mode: Pillow's name of the colour mode, such as CMYK.
        size: width and height in pixels, as stored.
        rotated: whether EXIF asks for a rotation or reflection.
    """

    format: str
    mode: str
    size: tuple[int, int]
    rotated: bool


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes image files.

    Attributes:
        max_pixels: images with more pixels are refused before decoding; 0: none are.
        smallest: smallest useful length of the shorter side in pixels. A JPEG at least twice as
            large is decoded at 1/2, 1/4 or 1/8 of its scale, which skips most of the work. None:
            always at full scale.
        max_memory: images that take more bytes to decode are refused before; none: any.
    """

    max_pixels: int = MAX_IMAGE_PIXELS
    smallest: int | None = None
    max_memory: int | None = None

    @classmethod
    def for_model(
        cls,
        image_size: int,
        *,
        max_pixels: int = MAX_IMAGE_PIXELS,
        full: bool = False,
        smallest_crop: float = 0.9,
    ) -> "ImageDecoder":
        """A decoder for a model's input size.

        At the default crop it keeps a seventh more than the model needs, so that random crops are
        seldom enlarged; at smaller crops accordingly more.

        Args:
            image_size: input size of the model in pixels.
            max_pixels: images with more pixels are refused before decoding; 0: none are.
            full: decode at full scale.
            smallest_crop: smallest area of a random crop, as a fraction of the image.
        """
        if smallest_crop != 0.9:
            image_size = math.ceil(image_size * math.sqrt(0.9 / smallest_crop))
        return cls(max_pixels, None if full else -(-image_size * 8 // 7))

    def __call__(self, content: bytes) -> Image.Image:
        """Decodes the content of an image file to RGB.

        Raises:
            Unusable: the file is not an image, truncated, too large, or takes too long to decode.
        """
        with self._opened(content) as image:
            if self.smallest is not None and image.format in {"JPEG", "MPO"}:
                image.draft(None, (self.smallest, self.smallest))
            return to_rgb(image)

    def facts(self, content: bytes) -> "ImageFacts":
        """Reads the header of an image file.

        Raises:
            Unusable: the file is not an image, or too large.
        """
        with self._opened(content) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            return ImageFacts(image.format or "", image.mode, image.size, orientation != 1)

    @contextmanager
    def _opened(self, content: bytes) -> Generator[Image.Image]:
        """The image before decoding; turns all errors in the block into `Unusable`."""
        try:
            with _pillow_limit_lifted():
                image = Image.open(io.BytesIO(content), formats=_formats())
                self._check_size(image.size, image.format or "")
                _check_work(image, content)
                yield image
        except Unusable:
            raise
        except Exception as error:  # decoders raise nearly anything on corrupt files
            kind = "image_truncated" if _is_truncated(content, error) else "image"
            detail = f"{type(error).__name__}: {error}"
            if isinstance(error, UnidentifiedImageError):  # its message is an address in memory
                detail = "unknown image format"
            raise Unusable(kind, f"{detail} ({len(content)} bytes)") from error

    def _check_size(self, size: tuple[int, int], kind: str) -> None:
        width, height = size
        if 0 < self.max_pixels < width * height:
            raise Unusable(
                "image_too_large",
                f"{width} x {height} pixels are more than --max-image-pixels {self.max_pixels}",
            )
        needed = width * height * _BYTES.get(kind, _BYTES_ELSE)
        if self.max_memory is not None and needed > self.max_memory:
            raise Unusable(
                "image_too_large",
                f"{width} x {height} pixels of {kind} take {needed // 10**6} MB to decode, and at "
                f"most {self.max_memory // 10**6} MB are used",
            )


def _check_work(image: Image.Image, content: bytes) -> None:
    """Refuses images of few bytes that take minutes to decode.

    Raises:
        Unusable: a JPEG has very many scans, or Pillow decodes the format in Python.
    """
    pixels = image.width * image.height
    if image.format in {"JPEG", "MPO"}:
        # A scan can be empty: the number of bytes does not bound the work.
        most = pixels * len(content) // _SHORTEST_SCAN
        if most > _SCANNED and not _has_one_scan(image, content):
            scans = content.count(_START_OF_SCAN)
            if pixels * scans > _SCANNED:
                raise Unusable("image_too_large", f"{scans:,} scans of {pixels:,} pixels")
    elif pixels > _IN_PYTHON and _decodes_in_python(image):
        raise Unusable(
            "image_too_large",
            f"{pixels:,} pixels of a form of {image.format} that decodes slowly: at most "
            f"{_IN_PYTHON:,} are read",
        )


def _decodes_in_python(image: Image.Image) -> bool:
    return any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))


def _has_one_scan(image: Image.Image, content: bytes) -> bool:
    """Whether all components of a JPEG are in its first scan, and it is not progressive.

    Then the decoder stops after that scan. Pillow has read up to the end of its header.
    """
    layers = len(image.getbands())
    header = _START_OF_SCAN + bytes([0, 6 + 2 * layers, layers])
    file = getattr(image, "fp", None)
    end = 0 if file is None else file.tell()
    start = content.rfind(_START_OF_SCAN, 0, end)
    whole = content.startswith(header, start) and start + 8 + 2 * layers == end
    return whole and "progressive" not in image.info


decode_image: Decode = ImageDecoder()
"""Decodes at full scale, with the default limit."""


def decode_upload(content: bytes, decode: Decode = decode_image) -> Image.Image:
    """Decodes an image file that a user gave.

    Args:
        content: content of the file.
        decode: the decoder.

    Raises:
        UserError: the file cannot be decoded.
    """
    try:
        return decode(content)
    except Unusable as error:
        raise UserError(
            f"This file cannot be read as an image ({error.detail}). "
            f"These formats can: {', '.join(_formats())}."
        ) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in any colour mode as RGB, by the rules of this module."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colours; Pillow warns if converted directly to RGB
    return image.convert("RGB")


def _is_truncated(content: bytes, error: Exception) -> bool:
    """Whether a corrupt image file has a valid start and lacks its end."""
    if content.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in content[-_TAIL:]
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-_TAIL:]
    if content.startswith(b"RIFF"):
        return int.from_bytes(content[4:8], "little") + 8 > len(content)
    return "truncated" in str(error).lower()


@contextmanager
def _pillow_limit_lifted() -> Generator[None]:
    """Lifts Pillow's limit: `ImageDecoder.max_pixels` replaces it."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@cache
def _formats() -> tuple[str, ...]:
    """The formats that this build of Pillow can read."""
    Image.init()
    return tuple(
        name
        for name in _FORMATS
        if name in Image.OPEN and (name not in _LIBRARIES or features.check(_LIBRARIES[name]))
    )


@cache
def image_endings() -> tuple[str, ...]:
    """The endings of image files that this build of Pillow can read: lower case, without the dot.

    Sorted; they are the only list of image endings in the package.
    """
    formats = _formats()
    endings = Image.registered_extensions().items()
    return tuple(sorted(ending[1:].lower() for ending, name in endings if name in formats))
