"""Trees of plain values become settings; an error names the place, the value and the remedy."""

from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from neuclip.catalogue.fields import Section, bounds
from neuclip.catalogue.registry import METHODS, unknown_method
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError, nearest, printable

Place = Callable[[str, str], str]
"""How a setting is called where it was given: from section ("" for the top) and key."""


def validate(tree: dict[str, Any], place: str | Place) -> RunConfig:
    """Builds the configuration from a tree of plain values.

    Args:
        tree: sections and keys.
        place: the file that holds the tree, or how its settings are called.

    Raises:
        UserError: every wrong key or value, with its place, the value and what would be right.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        called = in_file(place) if isinstance(place, str) else place
        method = tree.get("method")
        owner = str(method.get("name")) if isinstance(method, Mapping) else ""
        lines = [_problem(each, called, owner) for each in error.errors()]
        raise UserError("\n".join(lines)) from None


def in_file(path: str) -> Place:
    """Names settings by the file that holds them."""
    return lambda section, key: f"{path}: {'.'.join(filter(None, (section, key)))}"


def sections() -> dict[str, type[Section]]:
    """The sections of the tree besides the method's, by name."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if name != "method"
        and isinstance(field.annotation, type)
        and issubclass(field.annotation, Section)
    }


def _problem(problem: ErrorDetails, called: Place, method: str) -> str:
    """One wrong value: where it is, what it is, and what would be right."""
    path, value, kind = (
        [printable(str(part)) for part in problem["loc"]],
        problem["input"],
        problem["type"],
    )
    grouped = path[0] == "method" or path[0] in sections()
    section, key, *inside = [*path, ""] if grouped else ["", *path]
    where = called(section, key)
    fields = _fields(section, method)
    if grouped and len(path) > 2 and (parts := section_of(fields[key])):
        where, fields, key = f"{where} {inside[0]}", parts.model_fields, inside[0]
    if key in fields and kind.startswith(("greater_than", "less_than")):
        right = bounds(fields[key]) + (", or none" if type(None) in _kinds(fields[key]) else "")
        return f"{where}: {_shown(value)} is out of range; it must be {right}"
    if kind == "extra_forbidden":
        return f"{where}: no such key; {nearest(key, list(fields))}"
    if kind == "unknown_method":
        return f"{where}: {unknown_method(method)}"
    if kind in {"renamed_method", "renamed_setting"}:
        return f"{where}: {problem['msg']}"
    if kind.startswith("model_"):
        return f"{where}: a section is expected, with keys of its own (got {_shown(value)})"
    return f"{where}: {problem['msg']} (got {_shown(value)})"


def _shown(value: object) -> str:
    """A given value in a message: short, without control characters."""
    if isinstance(value, float):
        return f"{value:g}"
    return printable(repr(value))


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a setting holds, or none if it holds a plain value."""
    return next((k for k in _kinds(field) if isinstance(k, type) and issubclass(k, Section)), None)


def _kinds(field: FieldInfo) -> tuple[Any, ...]:
    """What a setting's value may be: its annotation, and the parts of a union."""
    return field.annotation, *get_args(field.annotation)


def _fields(section: str, method: str) -> Mapping[str, FieldInfo]:
    """The fields that a section of the tree has."""
    if section == "method":
        return METHODS[method].settings.model_fields if method in METHODS else {}
    return (sections()[section] if section else RunConfig).model_fields
