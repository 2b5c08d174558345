"""Class names and prompt templates of evaluation sets: texts beside the samples, one a line."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from neuclip.errors import UserError
from neuclip.untrusted import read_file

CLASSNAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
DEFAULT_TEMPLATE = "a photo of a {c}."

_LARGEST_LIST = 2**24  # bytes of a file of class names or templates
_log = logging.getLogger(__name__)


def dataset_type(folder: Path) -> str | None:
    """The kind that a set of clip-benchmark says it is; none if it says nothing.

    Raises:
        UserError: the file is not text.
    """
    lines = text_lines(folder / DATASET_TYPE)
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
    classnames, templates = text_lines(folder / CLASSNAMES), text_lines(folder / TEMPLATES)
    if classnames and not templates and not default:
        raise UserError(f"{folder} has {CLASSNAMES} but no {TEMPLATES}: the set is not complete")
    if templates and not classnames:
        raise UserError(
            f"evaluation split {folder} has {TEMPLATES} but no {CLASSNAMES}: zero-shot "
            "classification needs the names, and retrieval needs neither"
        )
    templates = checked_templates(templates, str(folder / TEMPLATES))
    return classnames, (templates or default_prompt(folder)) if classnames else []


def prompts_of(templates: str, flag: str = "--val-templates") -> list[str]:
    """The prompts that a flag gives: of a text file, or joined by '::'.

    Args:
        templates: the value of the flag.
        flag: its name, for messages.

    Raises:
        UserError: a prompt has no place for the class name, or the file cannot be read.
    """
    inline = "{c}" in templates or "{}" in templates
    prompts = templates.split("::") if inline else text_lines(Path(templates).expanduser())
    if not prompts:
        raise UserError(
            f"{flag} {templates}: no such file, or an empty one; a prompt on the command "
            "line has {c} in place of the class name, as in 'a photo of a {c}.'"
        )
    return checked_templates(prompts, f"{flag} {templates}")


def beside(folder: Path) -> tuple[list[str], list[str]]:
    """The class names and the templates that lie in a folder; either may be empty.

    Raises:
        UserError: a file has an empty line, or a template has no `{c}`.
    """
    templates = checked_templates(text_lines(folder / TEMPLATES), str(folder / TEMPLATES))
    return text_lines(folder / CLASSNAMES), templates


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


def default_prompt(folder: Path) -> list[str]:
    """The prompt for class names without templates; logged."""
    _log.info("%s has no %s: the prompt is %r", folder, TEMPLATES, DEFAULT_TEMPLATE)
    return [DEFAULT_TEMPLATE]


def text_lines(path: Path) -> list[str]:
    """The lines of a file, stripped, without empty ones at its end; none if it does not exist.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or has an empty line.
    """
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
