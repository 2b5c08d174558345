"""An evaluation split on disk: tar shards, and class names and templates if it has classes.

The file names are DataComp's (`classnames.txt`, `zeroshot_classification_templates.txt`).
"""

from dataclasses import dataclass
from pathlib import Path

from neuclip.data.sources.shards import ShardIndex, build_index, expand_patterns
from neuclip.errors import UserError

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class EvaluationSplit:
    """An open split; without class names, only retrieval is evaluated.

    Attributes:
        name: key in the results.
        index: the samples.
        classnames: names of the classes, or nothing.
        templates: prompts with `{c}`, or nothing.
    """

    name: str
    index: ShardIndex
    classnames: list[str]
    templates: list[str]

    @property
    def key(self) -> str:
        """Key in the results."""
        return self.name

    @property
    def title(self) -> str:
        """Name to display."""
        return self.name


def open_splits(folders: str | None) -> list[EvaluationSplit]:
    """Opens the splits of `--val-data`, folders separated by '::'."""
    return [open_split(Path(folder)) for folder in folders.split("::")] if folders else []


def open_split(folder: Path) -> EvaluationSplit:
    """Opens a split; its name is that of the folder.

    Raises:
        UserError: the folder or its shards are missing or empty, or `read_classes` fails.
    """
    if not folder.is_dir():
        raise UserError(f"evaluation split {folder}: no such folder")
    classnames, templates = read_classes(folder)
    index = build_index(expand_patterns(str(folder)))
    if len(index) == 0:
        raise UserError(f"evaluation split {folder}: its shards contain no samples")
    return EvaluationSplit(folder.resolve().name, index, classnames, templates)


def read_classes(folder: Path) -> tuple[list[str], list[str]]:
    """Class names and templates of a folder; both empty if it has neither.

    Raises:
        UserError: one is missing, a line is empty, or a template has no `{c}`.
    """
    classnames, templates = _lines(folder / CLASSNAMES), _lines(folder / TEMPLATES)
    if (classnames is None) != (templates is None):
        present, absent = (TEMPLATES, CLASSNAMES) if classnames is None else (CLASSNAMES, TEMPLATES)
        raise UserError(
            f"evaluation split {folder} has {present} but no {absent}: "
            "zero-shot classification needs both, and retrieval alone needs neither"
        )
    for number, template in enumerate(templates or [], start=1):
        if "{c}" not in template:
            raise UserError(
                f"{folder / TEMPLATES}, line {number}: {template!r} has no {{c}}, the place of the "
                "class name (for example: a photo of a {c}.)"
            )
    return classnames or [], templates or []


def _lines(path: Path) -> list[str] | None:
    """The lines of a file; none if the file does not exist."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{path}, line {number} is empty; expected one entry per line")
    return lines
