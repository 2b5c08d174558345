"""A folder of images with captions beside them: `cat.jpg` and `cat.txt` (or `cat.json`)."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from neuclip.data.captions import CaptionRule
from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Unusable
from neuclip.data.sources.source import (
    Captions,
    Source,
    Texts,
    captions_required,
    even_blocks,
    read_image_file,
)
from neuclip.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_CHECKED = 100  # at least one of the first images must have a caption


class FolderSource(Source):
    """Images below a folder, sorted by path; the key of a sample is its path without extension."""

    def __init__(
        self, folder: Path, caption_key: str | None = None, captions: Captions = "required"
    ) -> None:
        """Lists the folder; captions are read with their samples.

        Args:
            folder: searched recursively.
            caption_key: take captions from this key of the `.json` file instead of the `.txt` file.

            captions: what a missing caption is.

        Raises:
            UserError: there are no images, or none of the first images has a caption although
                captions are required.
        """
        rule = CaptionRule.for_key(caption_key)
        self._folder, self._suffix = folder, ".json" if rule.json_keys else ".txt"
        self._images = Texts()
        for image in images_below(folder):
            self._images.append(image)
        if not self._images:
            raise UserError(
                f"{folder} contains no .tar shards, tables or images ({' '.join(IMAGE_EXTENSIONS)})"
            )
        first = [self._images[row] for row in range(min(len(self._images), _CHECKED))]
        self.has_captions = any(self._caption_path(image).is_file() for image in first)
        if captions == "required" and not self.has_captions:
            raise UserError(
                f"{folder}: images without captions: {first[0]} needs "
                f"{self._caption_path(first[0]).name} beside it"
            )
        required = captions_required(captions, has_captions=self.has_captions)
        self._captions = replace(rule, required=required)
        self.opened = (
            f"captions in {self._suffix} beside them" if self.has_captions else "no captions"
        )
        self.layout = Layout.of(str(folder), even_blocks(len(self._images)))

    def _content(self, position: int) -> Sample[bytes]:
        image = self._images[position]
        content = read_image_file(self._folder, image)
        return Sample(self.locate(position)[1], content, self._captions_of(image))

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The folder, and the key of a sample."""
        return self._folder, os.path.splitext(self._images[position])[0]  # noqa: PTH122  a text

    def file_of(self, position: int) -> str | Path:
        """The image."""
        return self._folder / self._images[position]

    def files(self) -> Iterator[Path]:
        """The images."""
        return (self._folder / self._images[row] for row in range(len(self._images)))

    def _caption_path(self, image: str) -> Path:
        return (self._folder / image).with_suffix(self._suffix)

    def _captions_of(self, image: str) -> tuple[str, ...]:
        path = self._caption_path(image)
        try:
            content = path.read_bytes()
        except OSError as error:
            if not self._captions.required and isinstance(error, FileNotFoundError):
                return ()
            raise Unusable("caption_missing", f"{path.name}: {error.strerror or error}") from error
        return self._captions.read(content)


def images_below(folder: Path) -> Iterator[str]:
    """Paths of the images below a folder, relative to it, in a reproducible order."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        below = os.path.relpath(root, folder)
        for file in sorted(files):
            if file.lower().endswith(IMAGE_EXTENSIONS) and not file.startswith("."):
                yield file if below == "." else f"{below}/{file}"
