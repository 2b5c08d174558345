"""ImageNet's validation images, and ImageNet v2's, in one folder per class."""

import re
from collections.abc import Sequence
from pathlib import Path

from neuclip.data.sources.class_folders import ClassFolders
from neuclip.errors import UserError
from neuclip.evaluation.datacomp.sets import TaskSet
from neuclip.evaluation.datacomp.suite import Task

CLASSES = 1000
_WORDNET_ID = re.compile(r"n\d{8}")

IMAGENET_VAL = Task("imagenet-val", "ImageNet validation", 50_000, folder="", source="")
IMAGENET_V2 = Task("imagenet-v2", "ImageNet v2", 10_000, folder="", source="")


def open_imagenet(
    folder: Path, task: Task, classnames: Sequence[str], templates: Sequence[str]
) -> TaskSet:
    """Opens a folder of ImageNet's 1000 classes.

    Class folders are named by WordNet id, in the order of the class indices, or by class index
    (0 ... 999) as in ImageNet v2.

    Args:
        folder: contains the class folders.
        task: `IMAGENET_VAL` or `IMAGENET_V2`.
        classnames: ImageNet's class names, by class index.
        templates: prompts with `{c}`.

    Raises:
        UserError: the folder is missing, or a class is missing or unknown.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of ImageNet images at {folder}")
    names = [path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    return TaskSet(
        task=task,
        index=ClassFolders(folder, _by_class_index(folder, names)),
        classnames=list(classnames),
        templates=list(templates),
        instances=[],
        fingerprint="",
    )


def _by_class_index(folder: Path, names: list[str]) -> list[str]:
    """The class folders, by class index.

    Raises:
        UserError: they are not ImageNet's.
    """
    numbered = bool(names) and all(name.isdecimal() for name in names)
    strange = [name for name in sorted(names) if not (numbered or _WORDNET_ID.fullmatch(name))]
    expected = (
        f"expected {CLASSES} folders, one per class, named by WordNet id (n01440764, ...) or by "
        f"class index (0 ... {CLASSES - 1})"
    )
    if strange:
        raise UserError(
            f"{folder}: {expected}; found {strange[0]!r}. Classes of your own: --val-data {folder}"
        )
    if len(names) != CLASSES or (numbered and {int(name) for name in names} != set(range(CLASSES))):
        raise UserError(
            f"{folder}: {expected}; found {len(names)}. The position of a folder among all of them "
            "is its class, so none may be missing"
        )
    return sorted(names, key=int) if numbered else sorted(names)
