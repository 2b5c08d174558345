"""A folder of images with a folder for each class, as torchvision's ImageFolder reads it."""

import os
from pathlib import Path

from neuclip.data.order import Layout
from neuclip.data.samples import Unusable
from neuclip.data.sources.folders import images_below
from neuclip.data.sources.source import Content, Source, Texts, read_image_file, sample_error
from neuclip.errors import UserError


class ClassFolders(Source):
    """Images by class, each class sorted by path; captions are empty.

    A sample's key is its path without the extension, its class index the place of its folder.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        """Lists the folders.

        Args:
            folder: has the folders of all classes in it.
            classes: name of every class's folder, in the order of the class indices.

        Raises:
            UserError: a class has no image.
        """
        self._folder = folder
        self._images = Texts()
        sizes: list[int] = []
        for name in classes:
            before = len(self._images)
            for image in images_below(folder / name):
                self._images.append(f"{name}/{image}")
            sizes.append(len(self._images) - before)
            if sizes[-1] == 0:
                raise UserError(f"{folder / name}: no image of this class")
        self.layout = Layout.of(str(folder), sizes)

    def content(self, position: int) -> Content:
        """One sample as it is stored; see `Source.content`."""
        key = self.locate(position)[1]
        try:
            image = read_image_file(self._folder, self._images[position])
        except Unusable as error:
            raise sample_error(str(self._folder), key, error) from error.__cause__
        return Content(key, image, "", class_index=self.layout.block(position))

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The folder, and the key of a sample."""
        return self._folder, os.path.splitext(self._images[position])[0]  # noqa: PTH122  a text
