"""What data are opened for, and how labelled data lie in folders."""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.folder_contents import EVALUATION_SPLITS, TRAINING_SPLITS
from neuclip.data.recognition import recognise
from neuclip.data.sources.class_folders import ClassFolders
from neuclip.data.sources.source import Captions, Source
from neuclip.errors import UserError, quantity
from neuclip.evaluation.class_names import CLASSNAMES, DATASET_TYPE, TEMPLATES, default_prompt
from neuclip.evaluation.label_classes import Prompts

_SIDE_FILES = (CLASSNAMES, TEMPLATES, DATASET_TYPE)
_WORDNET_ID = re.compile(r"n\d{8}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Purpose:
    """What data are opened for.

    Attributes:
        splits: of data with several splits, the first of these is read.
        below: names of the folder of the samples in a folder with class names.
        prompts: what labels are that name nothing for a prompt.
        training: the training part of the data is opened, too.
        captions: what a missing caption is.
    """

    splits: tuple[str, ...]
    below: tuple[str, ...]
    prompts: Prompts
    training: bool = False
    captions: Captions = "if_any"


EVALUATION = Purpose(EVALUATION_SPLITS, ("test", "validation", "val", "valid"), "needed")
PROBED = replace(EVALUATION, prompts="wanted", training=True)
"""Evaluation with probes."""
PROBE_TRAINING = Purpose(TRAINING_SPLITS, ("train", "training"), "unused", captions="optional")
"""Labelled data that probes are trained on."""


class ClassFoldersFound(NamedTuple):
    """A folder per class, the names of the classes, and templates; none if names are no prompts."""

    source: Source
    classnames: list[str]
    templates: list[str]


def data_folder(folder: Path, purpose: Purpose) -> Path:
    """The folder of the samples: `test` or the like, if the folder itself has only texts."""
    below = next((folder / name for name in purpose.below if (folder / name).is_dir()), None)
    if below is None or any(folder.glob("*.tar")):
        return folder
    if any(below.glob("*.tar")):
        return below
    others = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return below if len(others) == 1 and not _has_files(folder) else folder


def _has_files(folder: Path) -> bool:
    texts = {*_SIDE_FILES, "nshards.txt"}
    return any(
        path.is_file() and path.name not in texts and path.suffix.lower() not in {".md", ".txt"}
        for path in folder.iterdir()
    )


def side_folder(folder: Path, purpose: Purpose) -> Path:
    """The folder of the class names: the folder, or the one above `test` and the like."""
    above = folder.absolute().parent
    own = any((folder / name).is_file() for name in _SIDE_FILES)
    if own or folder.absolute().name.lower() not in purpose.below:
        return folder
    return above if any((above / name).is_file() for name in _SIDE_FILES) else folder


def class_folders(
    folder: Path, classnames: list[str], templates: list[str], purpose: Purpose
) -> ClassFoldersFound | None:
    """A folder per class; none if the folder is something else.

    Raises:
        UserError: the folders' names are not names of classes, or others than `classnames.txt` has.
    """
    found = recognise(str(folder), ReadingConfig(), purpose.splits)
    if found.kind != "folder":
        return None
    folder = Path(found.paths[0])
    below = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    if len(below) < 2:
        return None
    numbered = all(each.isdecimal() for each in below)
    ordered = sorted(below, key=int) if numbered else sorted(below)
    if classnames and len(classnames) != len(ordered):
        raise UserError(
            f"{folder}: {len(ordered)} folders of classes, but {len(classnames)} class names in "
            f"{CLASSNAMES}"
        )
    strange = next((each for each in ordered if numbered or _WORDNET_ID.fullmatch(each)), None)
    prompts = purpose.prompts != "unused"
    if not classnames and strange is not None and prompts:
        what = (
            f"{folder}: a folder per class, but {strange!r} is not a name for a prompt: write the "
            f"names, one a line in the order of the folders, to {folder / CLASSNAMES}"
        )
        if purpose.prompts == "needed":
            raise UserError(f"{what} (ImageNet's own folders: --imagenet-val)")
        _log.warning("no zero-shot accuracy: %s", what)
        prompts = False
    classnames = classnames or [each.replace("_", " ") for each in ordered]
    _log.info(
        "%s: folder of images, one folder for each of %s", folder, quantity(len(ordered), "class")
    )
    templates = (templates or default_prompt(folder)) if prompts else []
    return ClassFoldersFound(ClassFolders(folder, ordered), classnames, templates)
