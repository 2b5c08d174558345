"""The command line of `neuclip train`: argv to configuration. Imports no torch.

tyro reads the flags of `neuclip.cli.flag_table` into a tree of the values given. It is laid over
the tree of the configuration files, and that over the recipe's; what a published line says in
switches
of its own is put into our words by `neuclip.cli.published_flags`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import tyro
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from neuclip.catalogue.registry import METHODS, MethodSettings, NeuCLIPSettings
from neuclip.cli.flag_table import SYNONYMS, bounds, sections, table
from neuclip.cli.options import Switch
from neuclip.cli.published_flags import (
    PUBLISHED_FORM,
    PUBLISHED_NETWORK,
    SAME_AS,
    WITHOUT_EFFECT,
    Choice,
    Published,
    choose_method,
    flag_text,
)
from neuclip.config.recipes import merge, read_recipe, recipe_names, recipe_path
from neuclip.config.run_config import RunConfig
from neuclip.errors import UserError, nearest

DEFAULT_METHOD = str(RunConfig().method.model_dump()["name"])


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where the settings come from: recipe, then configuration files, then flags; later wins.

    Attributes:
        method: training method, one of METHODS
        recipe: start from a recipe of this package, one of RECIPES
        config: start from a YAML file, as --dry-run prints it
        smoke: shrink model, data and schedule to 20 steps of seconds, and change nothing else
        dry_run: print the resolved configuration as YAML, and stop
    """

    method: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help=f"training method: {', '.join(METHODS)}; see `neuclip methods`",
            help_behavior_hint=f"(default: {DEFAULT_METHOD})",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help=f"start from a recipe of this package: {', '.join(recipe_names())}",
            help_behavior_hint="",
        ),
    ] = None
    config: Annotated[
        tyro.conf.UseAppendAction[tuple[Path, ...]],
        tyro.conf.arg(metavar="FILE", help_behavior_hint="(repeatable)"),
    ] = ()
    smoke: Switch = False
    dry_run: Switch = False


@dataclass(frozen=True)
class TrainCommand:
    """What a command line of `neuclip train` asks for."""

    config: RunConfig
    notes: tuple[str, ...]
    dry_run: bool


@cache
def _parser() -> type:
    """The table as tyro takes it: a dictionary of the flags given, for each section."""
    typed_dict = cast(Any, TypedDict)
    groups: dict[str, dict[str, object]] = {}
    for flag in table():
        groups.setdefault(flag.path[0] or "run", {})[flag.path[1]] = flag.annotation()
    parts = {
        name: Annotated[
            typed_dict(name, annotations, total=False), tyro.conf.arg(help=_title(name))
        ]
        for name, annotations in groups.items()
    }
    return make_dataclass(
        "Train",
        [
            ("sources", Sources, field(default_factory=Sources)),
            *parts.items(),
            ("published", Published, field(default_factory=Published)),
        ],
        kw_only=True,
    )


def _title(group: str) -> str:
    """The line above a group of flags."""
    named = {"run": "The run itself.", "method": "See `neuclip methods NAME` for one method's."}
    return named.get(group) or (sections()[group].__doc__ or "")


def flag_names() -> dict[str, str]:
    """Every flag of `neuclip train`, aliases too, and what it sets: pinned by a test."""
    names = {f"--{name.replace('_', '-')}": "source" for name in Sources.__dataclass_fields__}
    for flag in table():
        target = ".".join(filter(None, flag.path))
        names |= dict.fromkeys(flag.names, target)
    for name in Published.__dataclass_fields__:
        names[f"--{name.replace('_', '-')}"] = ".".join(SAME_AS.get(name, ("published",)))
    return names


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """Reads a command line of `neuclip train`.

    Raises:
        UserError: a flag, a file or their combination is wrong.
        SystemExit: tyro printed the help (0), or an unknown flag or a value of the wrong type (2).
    """
    parsed: object = tyro.cli(
        _parser(),
        args=list(argv),
        prog="neuclip train",
        description="Train CLIP. The published flags of open_clip, FastCLIP and NeuCLIP work too.",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    given: dict[str, Any] = dict(vars(parsed))
    sources: Sources = given.pop("sources")
    published: dict[str, object] = given.pop("published").given()
    top: dict[str, Any] = {
        **given.pop("run"),
        **{key: value for key, value in given.items() if value},
    }
    notes = [*_translate_values(top), *_translate_published(published, top)]
    tree = _files(sources)
    below = tree["method"].get("name") if "method" in tree else None
    choice = choose_method(published, sources.method, below)
    config = _lay_over(tree, top, choice, published, notes)
    if sources.smoke:
        config = config.smoke()
        notes.append(
            "--smoke puts glyph-tiny, batches of 16 and 2 epochs of 10 steps in place of what is "
            "given for model, batch and length"
        )
    return TrainCommand(
        config=config,
        notes=(*choice.notes, *notes),
        dry_run=sources.dry_run,
    )


def checked_section(name: str, given: Mapping[str, object]) -> Any:  # noqa: ANN401  any section
    """A section of the settings from flags that another command takes.

    Args:
        name: of the section.
        given: values of the flags, by setting.

    Raises:
        UserError: a value is out of range.
    """
    top = {name: dict(given)}
    _translate_values(top)
    return getattr(_validate(top, None), name)


def _translate_values(top: dict[str, Any]) -> list[str]:
    """Reads `none`, and puts our words for open_clip's and FastCLIP's values and says so."""
    for flag in table():
        section, key = flag.path
        values = top.get(section, {}) if section else top
        if flag.optional and values.get(key) == "none":
            values[key] = None
    notes: list[str] = []
    for (section, key), words in SYNONYMS.items():
        value = top.get(section, {}).get(key)
        if value in words:
            top[section] = {**top[section], key: words[value]}
            notes.append(f"--{key.replace('_', '-')} {value} is called {words[value]} here")
    return notes


def _translate_published(published: Mapping[str, object], top: dict[str, Any]) -> list[str]:
    """Moves published flags that are settings into the tree, and names those without effect."""
    for name, (section, key) in SAME_AS.items():
        if name in published:
            own = top.get(section, {}).get(key, published[name])
            if own != published[name]:
                raise UserError(
                    f"{flag_text(name, published[name])} and {flag_text(key, own)} "
                    "set the same thing: leave one out"
                )
            top[section] = {**top.get(section, {}), key: own}
    return [
        f"{flag_text(name, published[name])} has no effect: {reason}"
        for name, reason in WITHOUT_EFFECT.items()
        if name in published
    ]


def _files(sources: Sources) -> dict[str, Any]:
    """Recipe and configuration files as one tree, each checked as it is laid on top."""
    paths = list(sources.config)
    if sources.recipe is not None:
        paths.insert(0, recipe_path(sources.recipe))
    tree: dict[str, Any] = {}
    for path in paths:
        # A section whose keys are all commented out reads as null.
        empty = {"method", *sections()}
        given = read_recipe(path)
        tree = merge(tree, {k: v for k, v in given.items() if v is not None or k not in empty})
        if isinstance(tree.get("method"), dict):
            tree["method"].setdefault("name", DEFAULT_METHOD)
        _validate(tree, str(path))
    return tree


def _lay_over(
    tree: dict[str, Any],
    top: dict[str, Any],
    choice: Choice,
    published: Mapping[str, object],
    notes: list[str],
) -> RunConfig:
    """The configuration: the flags over the files, with the method that was chosen."""
    below = tree.get("method", {}).get("name", DEFAULT_METHOD)
    method = choice.method or below
    settings: dict[str, Any] = dict(top.get("method", {}))
    _check_settings(settings, method)
    optim: dict[str, Any] = dict(top.get("optim", {}))
    own = METHODS[method].settings.model_fields
    if choice.published and "temperature_lr" in own and "lr_tau" in optim:
        # Individual temperatures are no parameter of the towers: FastCLIP-v2's --lr_tau is theirs.
        settings = {"temperature_lr": optim.pop("lr_tau"), **settings}
        notes.append(f"--lr-tau is temperature_lr of {method}: {settings['temperature_lr']:g}")
    if published.get("nu_update") == "sox" and settings.get("gamma", 0) > 1:
        # The published FastCLIP line on DFN-14M: a rate above 1 is none of a moving average.
        notes.append(f"--gamma {settings['gamma']:g} is above 1, the rate of no memory: taken as 1")
        settings["gamma"] = 1.0
    tree = merge(tree, {**top, "optim": optim, "method": {"name": method, **settings}})
    if choice.published:
        notes += _publish(tree["method"], method)
    config = _validate(tree, None).resolved().check()
    _refuse_idle(settings, config.method)
    return config


def _publish(settings: dict[str, Any], method: str) -> list[str]:
    """Gives a published line the published form, where neither it nor a file says otherwise."""
    own = METHODS[method].settings.model_fields
    form = {key: value for key, value in PUBLISHED_FORM.items() if key in own}
    if method == "neuclip":
        form |= PUBLISHED_NETWORK
    added = {key: value for key, value in form.items() if key not in settings}
    settings |= added
    shown = {key: value for key, value in added.items() if own[key].default != value}
    if not shown:
        return []
    words = ", ".join(f"{k} {'none' if v is None else v}" for k, v in shown.items())
    return [f"the published form: {words} (flags of these names say otherwise)"]


def _refuse_idle(given: Mapping[str, object], settings: MethodSettings) -> None:
    """Refuses flags of neuclip that the other settings leave without effect."""
    if not isinstance(settings, NeuCLIPSettings):
        return
    idle = {}
    if settings.refresh == "fifo":
        idle["restart_steps"] = "--refresh fifo, which never restarts: add --refresh restart"
    if settings.inner_steps == 0:
        reason = "--inner-steps 0, which trains no prototypes: add --inner-steps 10"
        idle |= dict.fromkeys(("prototype_lr", "prototype_optimizer", "log_weights"), reason)
    for key, value in given.items():
        if key in idle and value is not False:
            raise UserError(f"--{key.replace('_', '-')} has no effect with {idle[key]}")


def _check_settings(settings: Iterable[str], method: str) -> None:
    """Refuses a setting that the method does not have: it would be ignored."""
    own = METHODS[method].settings.model_fields
    flags = {flag.path[1]: flag for flag in table() if flag.path[0] == "method"}
    for key in settings:
        if key not in own:
            has = ", ".join(f"--{flags[name].name}" for name in own if name != "name")
            raise UserError(
                f"--{flags[key].name} is a setting of {', '.join(flags[key].fields)}; "
                f"method {method} has {has}"
            )


def _validate(tree: dict[str, Any], source: str | None) -> RunConfig:
    """Builds the configuration; what is wrong comes from the file `source`, or from a flag."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_problem(each, source) for each in error.errors())) from None


def _problem(problem: ErrorDetails, source: str | None) -> str:
    """One wrong value: where it is, what it is, and what would be right."""
    parts = [str(part) for part in problem["loc"]]
    # pydantic puts the method's name between the section and the key.
    owner = parts.pop(1) if parts[0] == "method" and len(parts) == 3 else ""
    section, key = (["", *parts])[-2:]
    flag = next((flag for flag in table() if flag.path == (section, key)), None)
    field = flag.fields.get(owner) if flag else None
    where = f"--{flag.name}" if flag and source is None else f"{source}: {'.'.join(parts)}"
    value = problem["input"]
    kind = problem["type"]
    if field is not None and kind.startswith(("greater_than", "less_than")):
        return f"{where}: {value:g} is out of range; it must be {bounds(field)}"
    if kind == "extra_forbidden":
        return f"{where}: no such key; {nearest(key, _keys(section, owner))}"
    if kind == "union_tag_invalid":
        return f"{where}: unknown method; {nearest(str(value['name']), list(METHODS))}"
    if kind.startswith("model_"):
        return f"{where}: a section is expected, with keys of its own (got {value!r})"
    return f"{where}: {problem['msg']} (got {value!r})"


def _keys(section: str, method: str) -> list[str]:
    """The keys that a section of the tree has."""
    if section == "method":
        return list(METHODS[method].settings.model_fields)
    return list((sections()[section] if section else RunConfig).model_fields)
