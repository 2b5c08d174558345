"""A folder of images with their captions beside them: `cat.jpg` and `cat.txt` (or `cat.json`)."""

import os
from collections.abc import Iterator
from pathlib import Path

from neuclip.data.order import Layout
from neuclip.data.samples import Unusable, caption_of_json
from neuclip.data.sources.source import (
    Content,
    Source,
    Texts,
    clean_caption,
    even_blocks,
    read_image_file,
    sample_error,
)
from neuclip.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_LOOKED_AT = 100  # images among which one caption must be, or the folder is another kind of data


class FolderSource(Source):
    """Images below a folder, sorted by path; a sample's key is its path without the extension."""

    def __init__(self, folder: Path, caption_key: str | None = None) -> None:
        """Lists the folder; captions are looked for when a sample is read.

        Args:
            folder: searched with all folders in it.
            caption_key: take captions from this entry of the `.json` instead of from the `.txt`.

        Raises:
            UserError: there is no image, or none of the first has a caption.
        """
        self._folder, self._caption_key = folder, caption_key
        self._suffix = ".txt" if caption_key is None else ".json"
        self._images = Texts()
        for image in images_below(folder):
            self._images.append(image)
        if not self._images:
            raise UserError(
                f"{folder}: neither .tar shards, tables nor images in it "
                f"({' '.join(IMAGE_EXTENSIONS)})"
            )
        first = [self._images[row] for row in range(min(len(self._images), _LOOKED_AT))]
        if not any(self._caption_path(image).is_file() for image in first):
            raise UserError(
                f"{folder}: images without captions: {first[0]} needs "
                f"{self._caption_path(first[0]).name} beside it"
            )
        self.layout = Layout.of(str(folder), even_blocks(len(self._images)))

    def content(self, position: int) -> Content:
        """One sample as it is stored; see `Source.content`."""
        image, key = self._images[position], self._key(position)
        try:
            return Content(key, read_image_file(self._folder, image), self._caption(image))
        except Unusable as error:
            raise sample_error(str(self._folder), key, error) from error.__cause__

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The folder, and the key of a sample."""
        return self._folder, self._key(position)

    def files(self) -> Iterator[Path]:
        """The images."""
        return (self._folder / self._images[row] for row in range(len(self._images)))

    def _key(self, position: int) -> str:
        return os.path.splitext(self._images[position])[0]  # noqa: PTH122  of a text, not a file

    def _caption_path(self, image: str) -> Path:
        return (self._folder / image).with_suffix(self._suffix)

    def _caption(self, image: str) -> str:
        path = self._caption_path(image)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise Unusable("caption_missing", f"{path.name}: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise Unusable("caption_encoding", f"not UTF-8 ({error.reason})") from error
        if self._caption_key is not None:
            text = caption_of_json(text, self._caption_key)
        return clean_caption(text)


def images_below(folder: Path) -> Iterator[str]:
    """Paths of the images below a folder, relative to it, in an order that is always the same."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        below = os.path.relpath(root, folder)
        for file in sorted(files):
            if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith("."):
                yield file if below == "." else f"{below}/{file}"
