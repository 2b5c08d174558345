"""Fields of the settings: meaning, unit, range and published flag. Imports no torch."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Base of all settings: frozen; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


def setting(
    default: Any,
    description: str,
    *,
    unit: str = "",
    flag: str = "",
    **bounds: Any,
) -> Any:
    """Declares a field of a method's settings.

    Args:
        default: its value where nothing is given.
        description: the text of the help.
        unit: of the value, for the help.
        flag: the published flag of the same meaning, beside the field's own name.
        bounds: `ge`, `gt`, `le`, `lt` as pydantic's Field takes them.
    """
    return Field(
        default, description=description, json_schema_extra={"unit": unit, "flag": flag}, **bounds
    )


def bounds(field: FieldInfo) -> str:
    """The range of a field in words, or nothing."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(
        f"{sign} {getattr(bound, key):g}"
        for bound in field.metadata
        for key, sign in signs.items()
        if getattr(bound, key, None) is not None
    )


def unit(field: FieldInfo) -> str:
    """The unit of a field, or nothing."""
    return _extra(field, "unit")


def published_flag(field: FieldInfo) -> str:
    """The published flag of a field, or nothing."""
    return _extra(field, "flag")


def default_text(field: FieldInfo) -> str:
    """The default of a field with its unit."""
    value = field.default
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text} {unit(field)}".rstrip()


def _extra(field: FieldInfo, key: str) -> str:
    extra = field.json_schema_extra
    return str(extra.get(key, "")) if isinstance(extra, dict) else ""
