"""Evaluation splits: any data that training reads, and class names and templates if they have some.

`--val-data` takes what `--train-data` takes, and besides:

- a set of clip-benchmark or DataComp as it lies on disk (`published`): `classnames.txt` and
  `zeroshot_classification_templates.txt`, or `dataset_type.txt` with `retrieval` and captions one a
  line; shards in the folder or in `test/` below it;
- a folder of images with one folder per class, as torchvision's ImageFolder reads it.
"""

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from neuclip.config.data_sections import ReadingConfig
from neuclip.data.captions import CaptionRule
from neuclip.data.folder_contents import EVALUATION_SPLITS
from neuclip.data.opening import open_source
from neuclip.data.progress import Progress
from neuclip.data.recognition import recognise
from neuclip.data.sources.class_folders import ClassFolders
from neuclip.data.sources.shards import build_index, expand_patterns
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, all_of
from neuclip.masking import mask
from neuclip.untrusted import read_file

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
DEFAULT_TEMPLATE = "a photo of a {c}."

_SIDE_FILES = (CLASSNAMES, TEMPLATES, DATASET_TYPE)
_DATA_BELOW = ("test", "validation", "val", "valid")
_LARGEST_LIST = 2**24  # bytes of a file of class names or templates
_GENERIC = {
    *_DATA_BELOW, "train", "training", "testing", "dev", "eval", "data", "images", "shards", "tars",
}  # fmt: skip
_WORDNET_ID = re.compile(r"n\d{8}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSplit:
    """An open split; without class names, only retrieval is evaluated.

    Attributes:
        name: key in the results.
        index: the samples.
        classnames: names of the classes, or nothing.
        templates: prompts with `{c}`, or nothing.
        published: laid out as clip-benchmark's and DataComp's sets are, so that it is evaluated by
            their rules.
        origin: where the samples come from, in a line for the log, if that is not `--val-data`.
        allow_damage: leave out corrupt samples and count them, whatever the settings say.
    """

    name: str
    index: Source
    classnames: list[str]
    templates: list[str]
    published: bool = False
    origin: str = ""
    allow_damage: bool = False

    @property
    def key(self) -> str:
        """Key in the results."""
        return self.name

    @property
    def title(self) -> str:
        """Name to display."""
        return self.name

    @property
    def classes_digest(self) -> int:
        """64-bit digest of class names and templates; 0 without classes."""
        return classes_digest(self.classnames, self.templates)


def open_splits(
    pattern: str | None, reading: ReadingConfig | None = None, progress: Progress | None = None
) -> list[EvaluationSplit]:
    """Opens the splits of `--val-data`, joined by '::'.

    Args:
        pattern: the splits, each as for `--train-data`; none or empty: no split.
        reading: how tables, captions and remote shards are read, as in training.
        progress: called while shards are indexed.

    Raises:
        UserError: splits cannot be opened; names all of them.
    """
    parts = [part for part in (pattern or "").split("::") if part]
    return all_of(
        partial(open_split, part, name, reading, progress)
        for part, name in zip(parts, split_names(parts), strict=True)
    )


def with_templates(
    splits: Sequence[EvaluationSplit], templates: str | None
) -> list[EvaluationSplit]:
    """The splits with the prompts of `--val-templates` in place of their own.

    Args:
        splits: the splits.
        templates: a text file with a prompt a line, or prompts joined by '::'; none: as they are.

    Raises:
        UserError: a prompt has no place for the class name, the file cannot be read, or no split
            has classes.
    """
    if templates is None:
        return list(splits)
    if not any(split.classnames for split in splits):
        raise UserError(
            f"--val-templates {templates}: no split of --val-data has class names; templates are "
            "for zero-shot classification"
        )
    inline = "{c}" in templates or "{}" in templates
    prompts = templates.split("::") if inline else _lines(Path(templates).expanduser())
    if not prompts:
        raise UserError(
            f"--val-templates {templates}: no such file, or an empty one; a prompt on the command "
            "line has {c} in place of the class name, as in 'a photo of a {c}.'"
        )
    prompts = checked_templates(prompts, f"--val-templates {templates}")
    return [replace(split, templates=prompts) if split.classnames else split for split in splits]


def split_names(parts: Sequence[str]) -> list[str]:
    """A name for each split: the end of its path, with as many folders as tell it from the others.

    A folder called `val`, `test` or the like is named with the folder above it (`coco/val`).
    """
    paths = [_components(part) for part in parts]
    length = [2 if path[-1].lower() in _GENERIC else 1 for path in paths]
    while True:
        names = ["/".join(path[-n:]) for path, n in zip(paths, length, strict=True)]
        same = [names.count(name) > 1 for name in names]
        longer = [
            n + 1 if again and n < len(path) else n
            for path, n, again in zip(paths, length, same, strict=True)
        ]
        if longer == length:
            break
        length = longer
    return [f"{name}#{names[:i].count(name) + 1}" if names[:i].count(name) else name
            for i, name in enumerate(names)]  # fmt: skip


def _components(part: str) -> list[str]:
    """The path of a split, without secrets; files that a pattern names stand for their folder."""
    if "://" in part or part.startswith("pipe:"):
        part = mask(part)
        path = (part.partition("://")[2] or part.removeprefix("pipe:")).partition("?")[0]
    else:
        path = str(Path(part).expanduser().absolute())
    found = [piece for piece in path.split("/") if piece and piece != "."]
    files = len(found) > 1 and (found[-1].lower().endswith(".tar") or "{" in found[-1])
    return (found[:-1] if files else found) or [part]


def open_split(
    part: str | Path,
    name: str | None = None,
    reading: ReadingConfig | None = None,
    progress: Progress | None = None,
) -> EvaluationSplit:
    """Opens one split.

    Args:
        part: as for `--train-data`, or one of the layouts above.
        name: key in the results; if none, from the path.
        reading: how tables, captions and remote shards are read.
        progress: called while shards are indexed.

    Raises:
        UserError: the data are missing or empty, have neither captions nor classes, or their class
            names are invalid.
    """
    part = str(part)
    name = name or split_names([part])[0]
    folder = Path(part).expanduser()
    if not folder.is_dir():
        source = _open(part, reading, progress)
        return EvaluationSplit(name, _with_captions(part, source), [], [])
    side, data = _side_folder(folder), _data_folder(folder)
    kind = dataset_type(side)
    if kind not in {None, "classification", "retrieval"}:
        raise UserError(
            f"{side / DATASET_TYPE}: {kind} is not supported, only classification and retrieval"
        )
    classnames, templates = ([], []) if kind == "retrieval" else read_classes(side)
    published = (data != folder or side != folder or kind is not None) and any(data.glob("*.tar"))
    if published or (classnames and any(data.glob("*.tar"))):
        rule = CaptionRule(lines=published, required=not classnames)
        index = build_index(expand_patterns(str(data)), captions=rule, progress=progress)
        source = index if classnames else _with_captions(part, index)
        return EvaluationSplit(name, source, classnames, templates, published)
    source = _open(str(data), reading, progress)
    if source.has_captions and not classnames:
        return EvaluationSplit(name, source, [], [])
    return _class_folders(name, data, classnames, templates) or EvaluationSplit(
        name, source if classnames else _with_captions(part, source), classnames, templates
    )


def _open(part: str, reading: ReadingConfig | None, progress: Progress | None) -> Source:
    """Opens data as in training, without the settings that decide order and ids of samples."""
    neutral = {"train_data_upsampling_factors": None, "data_size": None, "data_format": "auto"}
    neutral |= {"label_key": None, "hard_negative_key": None, "pair_weight_key": None}
    reading = (reading or ReadingConfig()).model_copy(update=neutral)
    source = open_source(part, reading, progress, captions="if_any", splits=EVALUATION_SPLITS)
    if source.has_captions or reading.caption_key is None:
        return source
    reading = reading.model_copy(update={"caption_key": None})
    return open_source(part, reading, progress, captions="if_any", splits=EVALUATION_SPLITS)


def _with_captions(part: str, source: Source) -> Source:
    """The source, which is evaluated by its captions alone."""
    if not source.has_captions:
        raise UserError(
            f"evaluation split {part} has neither captions nor class names: retrieval needs "
            f"captions; zero-shot classification needs {CLASSNAMES} beside the shards (class "
            "indices in .cls), or a folder per class"
        )
    return source


# layouts -----------------------------------------------------------------------------------------


def _data_folder(folder: Path) -> Path:
    """The folder of the samples: `test` or the like, if the folder itself has only texts."""
    below = next((folder / name for name in _DATA_BELOW if (folder / name).is_dir()), None)
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


def _side_folder(folder: Path) -> Path:
    """The folder of the class names: the folder, or the one above `test` and the like."""
    above = folder.absolute().parent
    own = any((folder / name).is_file() for name in _SIDE_FILES)
    if own or folder.absolute().name.lower() not in _DATA_BELOW:
        return folder
    return above if any((above / name).is_file() for name in _SIDE_FILES) else folder


def _class_folders(
    name: str, folder: Path, classnames: list[str], templates: list[str]
) -> EvaluationSplit | None:
    """A folder per class; none if the folder is something else.

    Raises:
        UserError: the folders' names are not names of classes, or others than `classnames.txt` has.
    """
    found = recognise(str(folder), ReadingConfig(), EVALUATION_SPLITS)
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
    if not classnames:
        strange = next((each for each in ordered if numbered or _WORDNET_ID.fullmatch(each)), None)
        if strange is not None:
            raise UserError(
                f"{folder}: a folder per class, but {strange!r} is not a name for a prompt: write "
                f"the names, one a line in the order of the folders, to {folder / CLASSNAMES} "
                "(ImageNet's own folders: --imagenet-val)"
            )
        classnames = [each.replace("_", " ") for each in ordered]
    _log.info("%s: folder of images, one folder for each of %d classes", folder, len(ordered))
    return EvaluationSplit(
        name, ClassFolders(folder, ordered), classnames, templates or _default(folder)
    )


# class names and templates -----------------------------------------------------------------------


def dataset_type(folder: Path) -> str | None:
    """The kind that a set of clip-benchmark says it is; none if it says nothing.

    Raises:
        UserError: the file is not text.
    """
    lines = _lines(folder / DATASET_TYPE)
    return lines[0].lower() if lines else None


def classes_digest(classnames: Sequence[str], templates: Sequence[str]) -> int:
    """64-bit digest of class names and templates; 0 without classes."""
    if not classnames:
        return 0
    text = "\n".join([*classnames, "", *templates])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def read_classes(folder: Path, *, default: bool = True) -> tuple[list[str], list[str]]:
    """Class names and templates of a folder; both empty if it has no class names.

    Args:
        folder: has `classnames.txt` and `zeroshot_classification_templates.txt`, one entry a line.
        default: without templates, use `DEFAULT_TEMPLATE` and log it.

    Raises:
        UserError: a file has an empty line or is missing, or a template has no `{c}`.
    """
    classnames, templates = _lines(folder / CLASSNAMES), _lines(folder / TEMPLATES)
    if classnames and not templates and not default:
        raise UserError(f"{folder} has {CLASSNAMES} but no {TEMPLATES}: the set is not complete")
    if templates and not classnames:
        raise UserError(
            f"evaluation split {folder} has {TEMPLATES} but no {CLASSNAMES}: zero-shot "
            "classification needs the names, and retrieval needs neither"
        )
    templates = checked_templates(templates, str(folder / TEMPLATES))
    return classnames, (templates or _default(folder)) if classnames else []


def checked_templates(templates: Sequence[str], where: str) -> list[str]:
    """Templates with `{c}` as the place of the class name; OpenAI wrote `{}`.

    Args:
        templates: the prompts.
        where: what holds them, for the message.

    Raises:
        UserError: a template has no place for the class name.
    """
    found = [template.replace("{}", "{c}") for template in templates]
    for number, template in enumerate(found, start=1):
        if "{c}" not in template:
            raise UserError(
                f"{where}, line {number}: {template!r} has no {{c}}, the place of "
                "the class name (for example: a photo of a {c}.)"
            )
    return found


def _default(folder: Path) -> list[str]:
    _log.info("%s has no %s: the prompt is %r", folder, TEMPLATES, DEFAULT_TEMPLATE)
    return [DEFAULT_TEMPLATE]


def _lines(path: Path) -> list[str]:
    """The lines of a file, stripped, without empty ones at its end; none if it does not exist."""
    try:
        text = read_file(path, _LARGEST_LIST).decode("utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    lines = [line.strip() for line in text.rstrip().splitlines()]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise UserError(f"{path}, line {number} is empty; expected one entry per line")
    return lines
