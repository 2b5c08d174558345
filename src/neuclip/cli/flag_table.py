"""The table from flag to setting, generated from the fields of the settings. Imports no torch.

A flag takes its default, range, unit and meaning from the field, so the help is always true.
`neuclip.cli.published_flags` holds the flags that stand for several settings or for none.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import Annotated, Any, Literal, TypedDict, cast, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from neuclip.catalogue.fields import bounds, default_text, published_flag
from neuclip.catalogue.registry import METHODS
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import section_of, sections
from neuclip.errors import UserError

# Flags of fields whose name is unique only within their section.
FLAG_NAMES: Mapping[tuple[str, str], str] = {("model", "name"): "model"}

# Values that published trainers spell differently.
SYNONYMS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("model", "precision"): {"amp": "amp_fp16", "amp_bfloat16": "amp_bf16"},
}

# Values of published trainers that do not work here, each with what does.
REFUSED_VALUES: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("model", "precision"): {
        "fp16": "weights in float16 lose small updates; amp_fp16 keeps them in float32",
        "pure_fp16": "weights in float16 lose small updates; amp_fp16 keeps them in float32",
        "pure_bf16": "it lowers the LayerNorms too; bf16 keeps them in float32",
    },
}


@dataclass(frozen=True)
class Flag:
    """One row of the table: a flag and the setting it stands for.

    Attributes:
        name: the flag without its dashes.
        path: section ("" for the top of the tree) and key.
        fields: the field by the method that has it ("" outside the methods' settings).
    """

    name: str
    path: tuple[str, str]
    fields: Mapping[str, FieldInfo]

    @property
    def aliases(self) -> tuple[str, ...]:
        """Published names of the same flag."""
        found = [published_flag(field) for field in self.fields.values()]
        return tuple(dict.fromkeys(alias for alias in found if alias))

    @property
    def names(self) -> tuple[str, ...]:
        """Every spelling of the flag, ours first."""
        return (f"--{self.name}", *self.aliases)

    def names_for(self, method: str) -> tuple[str, ...]:
        """The spellings that one method has."""
        alias = published_flag(self.fields[method])
        return (f"--{self.name}", alias) if alias else (f"--{self.name}",)

    @property
    def _kind(self) -> object:
        """Type of the setting over all methods that have it."""
        return _union(field.annotation for field in self.fields.values())

    @property
    def optional(self) -> bool:
        """Whether `none` is a value."""
        return type(None) in get_args(self._kind)

    @property
    def holds_mapping(self) -> bool:
        """Whether the value is a section of its own or a mapping, given as words `key=value`."""
        return any(section_of(field) or _is_mapping(field) for field in self.fields.values())

    @property
    def counts(self) -> bool:
        """Whether the value is a whole number."""
        return int in (self._kind, *get_args(self._kind))

    def annotation(self) -> object:
        """The field's type as tyro parses it."""
        kind = tuple[str, ...] if self.holds_mapping else self._kind
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        metavar = "{" + ",".join(choices) + "}" if choices else _metavar(kind)
        metavar = "KEY=VALUE ..." if self.holds_mapping else metavar
        if words := {**SYNONYMS.get(self.path, {}), **REFUSED_VALUES.get(self.path, {})}:
            kind = Literal[(*choices, *words)]
        if self.optional and not self.holds_mapping:
            # The help writes none, as users do; tyro reads None.
            kind = cast(Any, kind) | Literal["none"]
        behaviour = self._behaviour()
        *first, last = self.names  # tyro shows aliases before the name
        return Annotated[
            cast(Any, kind),
            tyro.conf.arg(
                name=last.removeprefix("--"),
                help=self._text(lambda field: field.description or ""),
                help_behavior_hint=f"({behaviour})" if behaviour else "",
                metavar=metavar,
                aliases=first or None,
            ),
        ]

    def _behaviour(self) -> str:
        """Default, range, and the methods that have the setting unless all do."""
        owners = [name for name in self.fields if name]
        lacking = [name for name in METHODS if name not in owners]
        if not owners or not lacking:
            who = ""
        elif len(owners) <= 3:
            who = f"only {', '.join(owners)}"
        elif len(lacking) <= 3:
            who = f"not {', '.join(lacking)}"
        else:
            who = f"{len(owners)} of the methods"
        parts = [self._text(_default), self._text(lambda field: bounds(field) or "any"), who]
        return "; ".join(text for text in parts if text not in ("", "any"))

    def _text(self, text: Callable[[FieldInfo], str]) -> str:
        """The text that most methods give the field, then every other text with its methods."""
        by_text: dict[str, list[str]] = {}
        for method, field in self.fields.items():
            by_text.setdefault(text(field), []).append(method)
        most, *others = sorted(by_text, key=lambda each: -len(by_text[each]))
        exceptions = (f"{', '.join(by_text[each])}: {each}" for each in others)
        return "; ".join([most, *exceptions]).removeprefix("; ").replace(": default: ", ": ")


def _is_mapping(field: FieldInfo) -> bool:
    return any(get_origin(kind) is dict for kind in (field.annotation, *get_args(field.annotation)))


def _union(types: Iterable[object]) -> object:
    """One type for all methods; choices are joined."""
    kinds = list(dict.fromkeys(types))
    if all(get_origin(kind) is Literal for kind in kinds):
        return Literal[tuple(dict.fromkeys(value for kind in kinds for value in get_args(kind)))]
    return reduce(operator.or_, kinds)


def _metavar(kind: object) -> str | None:
    """Placeholder of a value in the help; none for a switch."""
    parts = [part for part in get_args(kind) if part is not type(None)] or [kind]
    names: dict[object, str] = {int: "INT", float: "FLOAT", str: "TEXT", ...: "..."}
    if all(get_origin(part) is tuple or part in names for part in parts):
        shown = [[names[word] for word in get_args(part) or (part,)] for part in parts]
        first, *rest = shown
        return " ".join([*first, *(f"[{' '.join(more[len(first) :])}]" for more in rest)])
    if get_origin(parts[0]) is Literal:
        return "{" + ",".join(get_args(parts[0])) + "}"
    return None


def _default(field: FieldInfo) -> str:
    """The default, unless the description explains `none`."""
    explained = field.default is None and "none:" in (field.description or "")
    return "" if explained else f"default: {default_text(field)}"


def table() -> tuple[Flag, ...]:
    """Every flag that stands for a setting, section by section."""
    return _table(tuple(METHODS))


@cache
def _table(methods: tuple[str, ...]) -> tuple[Flag, ...]:
    fields: dict[tuple[str, str], dict[str, FieldInfo]] = {
        ("", key): {"": field}
        for key, field in RunConfig.model_fields.items()
        if key != "method" and key not in sections()
    }
    for section, model in sections().items():
        fields |= {(section, key): {"": field} for key, field in model.model_fields.items()}
    for name in methods:
        for key, field in METHODS[name].settings.model_fields.items():
            if key != "name":
                fields.setdefault(("method", key), {})[name] = field
    flags = tuple(
        Flag(FLAG_NAMES.get(path, path[1]).replace("_", "-"), path, by_method)
        for path, by_method in fields.items()
    )
    _require_unique(flags)
    return flags


def _require_unique(flags: Iterable[Flag]) -> None:
    """Checks that no flag has two meanings.

    Raises:
        UserError: a method's setting has the flag of another setting.
    """
    owners: dict[str, Flag] = {}
    for flag in flags:
        for name in flag.names:
            other = owners.setdefault(name, flag)
            if other is not flag:
                raise UserError(
                    f"the flag {name} of method {', '.join(flag.fields)} is already the flag of "
                    f"{'.'.join(filter(None, other.path))}: give the setting another name"
                )


def flag_of(section: str, key: str) -> str:
    """A setting as the command line calls it."""
    flag = next((flag for flag in table() if flag.path == (section, key)), None)
    return f"--{flag.name}" if flag else ".".join(filter(None, (section, key)))


def settings_flags(section: str, keys: Iterable[str]) -> object:
    """Flags of `neuclip train` for another command: an argument of tyro.

    The argument is a dictionary of the values that were given, which
    `cli.flag_values.checked_section` checks.

    Args:
        section: name of the section.
        keys: its settings that the command takes.
    """
    flags = {flag.path: flag for flag in table()}
    annotations = {key: flags[section, key].annotation() for key in keys}
    given = cast(Any, TypedDict)(section, annotations, total=False)
    return tyro.conf.arg(constructor=given, help="The same flags as in `neuclip train`.")
