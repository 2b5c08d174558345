"""An evaluation split on disk: tar shards, and class names and templates where it has classes.

The names of the files are DataComp's (`classnames.txt`, `zeroshot_classification_templates.txt`).
"""

from dataclasses import dataclass
from pathlib import Path

from neuclip.data.sources.shards import ShardIndex, build_index, expand_patterns
from neuclip.errors import UserError

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class EvaluationSplit:
    """A split ready to be judged; without class names it is judged by retrieval only.

    Attributes:
        name: Its key in the results.
        index: Its samples.
        classnames: Name of every class, or nothing.
        templates: Prompts with `{c}`, or nothing.
    """

    name: str
    index: ShardIndex
    classnames: list[str]
    templates: list[str]


def open_split(folder: Path) -> EvaluationSplit:
    """Reads a split's folder; its name is the folder's.

    Raises:
        UserError: no folder, no shard in it, class names without templates or the reverse, an
            empty line between the names, or a template without `{c}`.
    """
    if not folder.is_dir():
        raise UserError(f"evaluation split {folder}: no such folder")
    classnames, templates = read_classes(folder)
    index = build_index(expand_patterns(str(folder)))
    if len(index) == 0:
        raise UserError(f"evaluation split {folder}: its shards hold no sample")
    return EvaluationSplit(folder.resolve().name, index, classnames, templates)


def read_classes(folder: Path) -> tuple[list[str], list[str]]:
    """Class names and templates of a folder; both empty if it has neither.

    Raises:
        UserError: one without the other, an empty line, or a template without `{c}`.
    """
    classnames, templates = _lines(folder / CLASSNAMES), _lines(folder / TEMPLATES)
    if (classnames is None) != (templates is None):
        present, absent = (TEMPLATES, CLASSNAMES) if classnames is None else (CLASSNAMES, TEMPLATES)
        raise UserError(
            f"evaluation split {folder} has {present} but no {absent}: "
            "zero-shot classification needs both (neither: retrieval only)"
        )
    for number, template in enumerate(templates or [], start=1):
        if "{c}" not in template:
            raise UserError(
                f"{folder / TEMPLATES}, line {number}: {template!r} has no {{c}}, "
                "which stands for the class name (for example: a photo of a {c}.)"
            )
    return classnames or [], templates or []


def _lines(path: Path) -> list[str] | None:
    """The lines of a file, none if there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text: {error}") from None
    lines = [line.removesuffix("\r") for line in lines]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise UserError(f"{path}, line {number} is empty; expected one entry a line")
    return lines
