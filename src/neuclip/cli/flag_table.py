"""The table from flag to setting, generated from the fields of the settings tree. No torch here.

A flag's default, range, unit and meaning are the field's own, so the help cannot tell anything
else than what holds. What is not one-to-one is in `neuclip.cli.published_flags`.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import Annotated, Any, Literal, TypedDict, cast, get_args, get_origin

import tyro
from pydantic.fields import FieldInfo

from neuclip.catalogue.registry import CATALOGUE, METHODS
from neuclip.config.run_config import RunConfig, Section

# Field names that are unique in their section only: their flags.
FLAG_NAMES: Mapping[tuple[str, str], str] = {("model", "name"): "model"}

# Values that open_clip and FastCLIP call otherwise, and why ours is not the same word.
SYNONYMS: Mapping[tuple[str, str], Mapping[str, str]] = {
    ("model", "precision"): {"amp": "amp_bf16", "amp_bfloat16": "amp_bf16"},
    ("optim", "lr_tau_scheduler"): {"cosine": "same"},
}


@dataclass(frozen=True)
class Flag:
    """One row of the table: a flag and the setting it stands for.

    Attributes:
        name: The flag without its dashes.
        path: Section ("" for the top of the tree) and key.
        fields: The field, by the method that has it ("" outside the methods' settings).
    """

    name: str
    path: tuple[str, str]
    fields: Mapping[str, FieldInfo]

    @property
    def aliases(self) -> tuple[str, ...]:
        """Published names of the same flag."""
        extras = [field.json_schema_extra for field in self.fields.values()]
        found = [str(extra.get("flag", "")) for extra in extras if isinstance(extra, dict)]
        return tuple(dict.fromkeys(alias for alias in found if alias))

    @property
    def names(self) -> tuple[str, ...]:
        """The flag as it may be typed, ours first."""
        return (f"--{self.name}", *self.aliases)

    def names_for(self, method: str) -> tuple[str, ...]:
        """The names under which one method's users know it."""
        extra = self.fields[method].json_schema_extra
        alias = str(extra.get("flag", "")) if isinstance(extra, dict) else ""
        return (f"--{self.name}", alias) if alias else (f"--{self.name}",)

    @property
    def _kind(self) -> object:
        """The type of the setting, over all methods that have it."""
        return _union(field.annotation for field in self.fields.values())

    @property
    def optional(self) -> bool:
        """Whether `none` stands for a value that is derived, or for nothing."""
        return type(None) in get_args(self._kind)

    def annotation(self) -> object:
        """The field as tyro parses it."""
        kind = self._kind
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        metavar = "{" + ",".join(choices) + "}" if choices else _metavar(kind)
        if synonyms := SYNONYMS.get(self.path):
            kind = Literal[(*choices, *synonyms)]
        if self.optional:
            # The help writes none, as users do; tyro reads None only.
            kind = cast(Any, kind) | Literal["none"]
        behaviour = self._behaviour()
        *first, last = self.names  # tyro shows aliases before the name
        return Annotated[
            cast(Any, kind),
            tyro.conf.arg(
                name=last.removeprefix("--"),
                help=self._told(lambda field: field.description or ""),
                help_behavior_hint=f"({behaviour})" if behaviour else "",
                metavar=metavar,
                aliases=first or None,
            ),
        ]

    def _behaviour(self) -> str:
        """Default and range, and who has the setting if not everybody has."""
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
        told = [self._told(_default), self._told(lambda field: bounds(field) or "any"), who]
        return "; ".join(text for text in told if text not in ("", "any"))

    def _told(self, text: Callable[[FieldInfo], str]) -> str:
        """What most methods say of the field, then each other text with its methods."""
        by_text: dict[str, list[str]] = {}
        for method, field in self.fields.items():
            by_text.setdefault(text(field), []).append(method)
        most, *others = sorted(by_text, key=lambda each: -len(by_text[each]))
        exceptions = (f"{', '.join(by_text[each])}: {each}" for each in others)
        return "; ".join([most, *exceptions]).removeprefix("; ").replace(": default: ", ": ")


def _union(types: Iterable[object]) -> object:
    """One type for all methods; choices are those of all."""
    kinds = list(dict.fromkeys(types))
    if all(get_origin(kind) is Literal for kind in kinds):
        return Literal[tuple(dict.fromkeys(value for kind in kinds for value in get_args(kind)))]
    return reduce(operator.or_, kinds)


def _metavar(kind: object) -> str | None:
    """How a value is shown, without the None that resets it; nothing for a switch."""
    plain = next((part for part in get_args(kind) if part is not type(None)), kind)
    return {int: "INT", float: "FLOAT", str: "TEXT"}.get(cast(type, plain))


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
    extra = field.json_schema_extra
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


def default_text(field: FieldInfo) -> str:
    """The default of a field with its unit."""
    value = field.default
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text} {unit(field)}".rstrip()


def _default(field: FieldInfo) -> str:
    """The default, unless the description tells what none stands for."""
    told = field.default is None and "none:" in (field.description or "")
    return "" if told else f"default: {default_text(field)}"


def sections() -> dict[str, type[Section]]:
    """The sections of the tree besides the method's, by name."""
    return {
        name: field.annotation
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


@cache
def table() -> tuple[Flag, ...]:
    """Every flag that stands for a setting, section by section."""
    fields: dict[tuple[str, str], dict[str, FieldInfo]] = {
        ("", key): {"": field}
        for key, field in RunConfig.model_fields.items()
        if key != "method" and key not in sections()
    }
    for section, model in sections().items():
        fields |= {(section, key): {"": field} for key, field in model.model_fields.items()}
    for info in CATALOGUE:
        for key, field in info.settings.model_fields.items():
            if key != "name":
                fields.setdefault(("method", key), {})[info.name] = field
    return tuple(
        Flag(FLAG_NAMES.get(path, path[1]).replace("_", "-"), path, by_method)
        for path, by_method in fields.items()
    )


def settings_flags(section: str, keys: Iterable[str]) -> object:
    """Flags of `neuclip train` for another command: an argument of tyro.

    The argument is a dictionary of the values that were given; `cli.train.checked_section` checks
    them.

    Args:
        section: name of the section.
        keys: its settings that the command takes.
    """
    flags = {flag.path: flag for flag in table()}
    annotations = {key: flags[section, key].annotation() for key in keys}
    given = cast(Any, TypedDict)(section, annotations, total=False)
    return tyro.conf.arg(constructor=given, help="The same flags as in `neuclip train`.")
