"""A folder of images with one folder per class, as torchvision's ImageFolder reads it."""

from pathlib import Path

from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Tally
from neuclip.data.sources.folders import images_below
from neuclip.data.sources.image_files import ImageFiles
from neuclip.data.sources.source import Source, read_image_file
from neuclip.errors import UserError


class ClassFolders(Source):
    """Images by class, each class sorted by path; captions are empty.

    The key of a sample is its path without the extension, which stays where it alone tells two
    images of a folder apart; its class index is the index of its folder.
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
        self._images = ImageFiles()
        sizes: list[int] = []
        tally = Tally("files")
        for name in classes:
            before = len(self._images)
            self._images.extend(images_below(folder / name, tally), f"{name}/")
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
        return self._folder, self._images.key(position)
