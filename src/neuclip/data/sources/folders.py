"""A folder of images with captions beside them: `cat.jpg` and `cat.txt` (or `cat.json`)."""

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.annotations import AnnotationKeys
from neuclip.data.captions import NO_CAPTIONS, CaptionRule, read_record
from neuclip.data.decode import image_endings
from neuclip.data.endings import IMAGE, JSON, TEXT, ending_of, split_names
from neuclip.data.order import Layout
from neuclip.data.samples import Sample, Tally, Unusable
from neuclip.data.sources.file_tree import FileTree
from neuclip.data.sources.image_files import ImageFiles
from neuclip.data.sources.source import (
    Captions,
    Source,
    captions_required,
    even_blocks,
    read_image_file,
)
from neuclip.errors import UserError, printable
from neuclip.untrusted import MAX_TEXT_FILE, read_file

_NONE = -1
_OF_A_SET = {"classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"}
"""Texts that describe an evaluation set."""


class FolderSource(Source):
    """Images below a folder, sorted by path; the key of a sample is its path without extension.

    Where the extension alone tells two images of a folder apart, it is part of their keys.
    """

    def __init__(
        self,
        folder: Path,
        reading: ReadingConfig | None = None,
        captions: Captions = "required",
    ) -> None:
        """Lists the folder; captions are read with their samples.

        Args:
            folder: searched recursively, through links to other folders.
            reading: may name keys of the `.json` files that hold captions, instead of the `.txt`
                files, and annotations.
            captions: what a missing caption is.

        Raises:
            UserError: there are no images, or no image has a caption although captions are
                required.
        """
        reading = reading or ReadingConfig()
        self._folder, self._captions = folder, CaptionRule.of(reading)
        self._keys = AnnotationKeys.of(reading)
        self._images = ImageFiles()
        self._endings: dict[str, int] = {}  # of all caption files, numbered
        self._caption_endings = array("b")  # number of each image's
        tree = FileTree(folder)
        for below, names in tree:
            self._add(below, names, tree.tally)
        self.unused = tree.tally.lines()
        if not self._images:
            raise UserError(self._no_images())
        self.has_captions = max(self._caption_endings) != _NONE
        if captions == "required" and not self.has_captions:
            raise UserError(self._no_captions())
        required = captions_required(captions, has_captions=self.has_captions)
        self._captions = replace(self._captions, required=required)
        endings = ", ".join(f".{ending}" for ending in self._endings)
        self.opened = f"captions in {endings} beside them" if self.has_captions else "no captions"
        self.layout = Layout.of(str(folder), even_blocks(len(self._images)))

    def _add(self, below: str, names: list[str], tally: Tally) -> None:
        """Adds the images of one folder, and counts its files that belong to no image."""
        caption_part = JSON if self._captions.json_keys else TEXT
        captions: dict[str, str] = {}
        images: list[tuple[str, str]] = []
        others: list[tuple[str, str]] = []
        for name, key, ending, part in split_names(names):
            if part == IMAGE:
                images.append((key, name))
            elif part is None:
                tally.add("ending", ending_of(name))
            elif part != caption_part:
                others.append((key, name))
            elif captions.setdefault(key, ending) != ending:
                tally.add("repeated", below + name)
        keys = {key for key, _ in images}
        if not captions.keys() <= keys:
            others += [(key, f"{key}.{ending}") for key, ending in captions.items()]
        for name in (name for key, name in others if key not in keys and name not in _OF_A_SET):
            tally.add("alone", below + name)
        for ending in dict.fromkeys(captions.values()):
            self._endings.setdefault(ending, len(self._endings))
        self._images.extend((name for _, name in images), below)
        for key, _ in images:
            self._caption_endings.append(self._endings.get(captions.get(key, ""), _NONE))

    def _content(self, position: int) -> Sample[bytes]:
        content = read_image_file(self._folder, self._images[position])
        return self._texts(position).with_image(content)

    def _texts(self, position: int) -> Sample[None]:
        content = self._caption_file(position)
        captions = self._captions.in_file(content) if content is not None else NO_CAPTIONS
        record = self.record(position) if self._keys.names else {}
        annotations = self._keys.read(record, captions.weights)
        return Sample(self.locate(position)[1], None, captions.texts, annotations=annotations)

    def record(self, position: int) -> Mapping[str, object]:
        """The values in the `.json` file of a sample; empty if there is none.

        Raises:
            Unusable: the file is corrupt.
        """
        path = self._beside(position, "json")
        try:
            return read_record(read_file(path, MAX_TEXT_FILE))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise Unusable("caption_json", f"{path.name}: {error.strerror or error}") from error

    def locate(self, position: int) -> tuple[str | Path, str]:
        """The folder, and the key of a sample."""
        return self._folder, self._images.key(position)

    def file_of(self, position: int) -> str | Path:
        """The image."""
        return self._folder / self._images[position]

    def files(self) -> Iterator[Path]:
        """The images."""
        return (self._folder / self._images[row] for row in range(len(self._images)))

    def _caption_file(self, position: int) -> bytes | None:
        """The file with the captions; None if there is none and none is required."""
        ending = self._caption_endings[position]
        if ending == _NONE:
            if self._captions.required:
                raise Unusable("caption_missing", "no caption")
            return None
        path = self._beside(position, [*self._endings][ending])
        try:
            return read_file(path, MAX_TEXT_FILE)
        except OSError as error:
            if not self._captions.required and isinstance(error, FileNotFoundError):
                return None
            raise Unusable("caption_missing", f"{path.name}: {error.strerror or error}") from error

    def _beside(self, position: int, ending: str) -> Path:
        return self._folder / f"{self._images[position].rpartition('.')[0]}.{ending}"

    def _no_images(self) -> str:
        shards = next(self._folder.glob("*/*.tar"), None)
        if shards is not None:  # DataComp's pool, beside its metadata
            return f"{self._folder} has its tar shards in {shards.parent}: give that folder"
        known = " ".join(f".{ending}" for ending in image_endings())
        return (
            f"{self._folder} contains no .tar shards, tables or images ({known}){self._not_read()}"
        )

    def _no_captions(self) -> str:
        image = self._images[0]
        ending = ".json" if self._captions.json_keys else ".txt"
        wanted = Path(image).with_suffix(ending).name
        hint = ""
        if ending == ".txt" and (self._folder / image).with_suffix(".json").is_file():
            hint = f", or --caption-key KEY to read {Path(wanted).with_suffix('.json')}"
        text = f"{self._folder}: images without captions: {image} needs {wanted} beside it{hint}"
        return printable(text, 1000) + self._not_read()

    def _not_read(self) -> str:
        return "".join(f"\n  not read: {line}" for line in self.unused)


def images_below(folder: Path, tally: Tally | None = None) -> Iterator[str]:
    """Paths of the images below a folder, relative to it, in a reproducible order.

    Args:
        folder: searched recursively, through links to other folders.
        tally: counts the files, and those that are not images.
    """
    tree = FileTree(folder)
    for below, names in tree:
        for name, _, _, part in split_names(names):
            if part == IMAGE:
                yield below + name
            else:
                tree.tally.add("ending", ending_of(name))
    if tally is not None:
        tally.merge(tree.tally)
