"""Values of flags: as they are typed in a shell, and as other trainers spell them.

Imports no torch.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from neuclip.cli.flag_table import REFUSED_VALUES, SYNONYMS, flag_of, table
from neuclip.config.validation import validate
from neuclip.errors import UserError


def checked_section(name: str, given: Mapping[str, object]) -> Any:  # noqa: ANN401  any section
    """A section of the settings from flags that another command takes.

    Args:
        name: of the section.
        given: values of the flags, by setting.

    Raises:
        UserError: a value is out of range.
    """
    top = {name: dict(given)}
    translate_values(top)
    return getattr(validate(top, flag_of), name)


def translate_values(top: dict[str, Any]) -> list[str]:
    """Reads `none`, and translates values that open_clip and FastCLIP spell differently.

    Args:
        top: values of the flags given, by section and setting; changed in place.

    Returns:
        Lines for the user.

    Raises:
        UserError: a value is out of scope, or not of the form `key=value`.
    """
    for flag in table():
        section, key = flag.path
        values = top.get(section, {}) if section else top
        if flag.holds_mapping and key in values:
            values[key] = _mapping(flag.name, values[key])
        if flag.optional and values.get(key) == "none":
            values[key] = None
    notes: list[str] = []
    for (section, key), words in SYNONYMS.items():
        value = top.get(section, {}).get(key)
        if value in words:
            top[section][key] = words[value]
            notes.append(f"--{key.replace('_', '-')} {value} is called {words[value]} here")
    for (section, key), refused in REFUSED_VALUES.items():
        value = top.get(section, {}).get(key)
        if value in refused:
            raise UserError(f"--{key.replace('_', '-')} {value}: out of scope: {refused[value]}")
    return notes


def _mapping(flag: str, words: Sequence[str]) -> dict[str, object] | None:
    """Words `key=value` as a mapping; values are Python literals, as in open_clip."""
    if tuple(words) in {("none",), ("None",)}:
        return None
    values: dict[str, object] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key in values:
            raise UserError(f"--{flag} takes words like key=value, each key once (got {word!r})")
        try:
            values[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[key] = text
    return values


def cache_note(top: Mapping[str, Any]) -> list[str]:
    """A line if `--cache-dir` is given: open_clip's flag of the same name is about other files."""
    data = top.get("data", {})
    if data.get("cache_dir") is None:
        return []
    sources = str(data.get("train_data"))
    effect = "" if "://" in sources or "pipe:" in sources else ", of which there are none"
    return [
        f"--cache-dir holds downloaded shards here{effect}; open_clip's is for downloaded weights "
        "(set HF_HOME)"
    ]
