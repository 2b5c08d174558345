"""A folder of images with one folder per class, as torchvision's ImageFolder reads it."""

from pathlib import Path

from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Tally
from neuclip.data.sources.folders import images_below, key_of_file
from neuclip.data.sources.source import Source, Texts, read_image_file
from neuclip.errors import UserError


class ClassFolders(Source):
    """Images by class, each class sorted by path; captions are empty.

    The key of a sample is its path without the extension; its class index is the index of its
    folder.
    """

    def __init__(self, folder: Path, classes: list[str]) -> None:
        """Lists the folders.

        Args:
            folder: contains one folder per class.
            classes: folder names in the order of the class indices.

        Raises:
            UserError: a class has no images.
        """
        self._folder = folder
        self._images = Texts()
        sizes: list[int] = []
        tally = Tally("files")
        for name in classes:
            before = len(self._images)
            for image in images_below(folder / name, tally):
                self._images.append(f"{name}/{image}")
            sizes.append(len(self._images) - before)
            if sizes[-1] == 0:
                raise UserError(f"{folder / name}: no images of this class")
        self.unused = tally.lines()
        self.layout = Layout.of(str(folder), sizes)

    def _content(self, position: int) -> Sample[bytes]:
        image = read_image_file(self._folder, self._images[position])
        return Sample(self.locate(position)[1], image, (), self.layout.block(position))

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The folder, and the key of a sample."""
        return self._folder, key_of_file(self._images[position])
