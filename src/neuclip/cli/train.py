"""The command line of `neuclip train`: argv to settings. Imports no torch.

`neuclip.cli.foreign_flags` takes out flags that change nothing. tyro reads the flags of
`neuclip.cli.flag_table` into a tree of the values given. The tree is laid over that of the
configuration files, and both over the recipe's. `neuclip.cli.published_flags` reads the switches of
published command lines, `neuclip.cli.published_defaults` fills in what such lines leave out.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import tyro

from neuclip.catalogue.registry import DEFAULT_METHOD, METHODS
from neuclip.cli.flag_table import flag_of, table
from neuclip.cli.flag_values import cache_note, translate_values
from neuclip.cli.foreign_flags import ACCEPTED, flag_name, read_words
from neuclip.cli.options import Switch
from neuclip.cli.published_defaults import fill_in
from neuclip.cli.published_flags import (
    MethodChoice,
    PublishedFlags,
    choose_method,
    flag_text,
    translate,
)
from neuclip.config.recipes import merge, read_recipe, recipe_names, recipe_path
from neuclip.config.resolve import smoke
from neuclip.config.run_config import RunConfig
from neuclip.config.validation import sections, validate
from neuclip.errors import UserError
from neuclip.parallel.launch import launch_environment


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
    """What a command line of `neuclip train` asks for.

    Attributes:
        config: the settings as asked for; `neuclip.config.resolve` fills in the rest.
        notes: lines for the user.
        dry_run: print the resolved settings and stop.
        argv: the words of the command line, from the command on.
    """

    config: RunConfig
    notes: tuple[str, ...]
    dry_run: bool
    argv: tuple[str, ...] = ()


class FinetuneCommand(TrainCommand):
    """The same for `neuclip finetune`, which derives the settings that are not given."""


def _parser(words: Sequence[str]) -> type:
    """The flag table as tyro takes it: a dictionary of the flags given, for each section.

    For a line whose flags are all known it holds only these, which parses faster. Otherwise it
    holds all, for the help and for messages that show similar flags.
    """
    known = flag_names()
    typed = {f"--{flag_name(word)}" for word in words if word.startswith("-")}
    named = {flag if flag in known else flag.replace("--no-", "--", 1) for flag in typed}
    return _parser_of(tuple(METHODS), frozenset(named) if named <= known.keys() else None)


@cache
def _parser_of(methods: tuple[str, ...], given: frozenset[str] | None) -> type:
    """The parser of some flags, or of all."""
    typed_dict = cast(Any, TypedDict)
    groups: dict[str, dict[str, object]] = {}
    for flag in table():
        if given is None or given.intersection(flag.names):
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
            ("published", PublishedFlags, field(default_factory=PublishedFlags)),
        ],
        kw_only=True,
    )


def _title(group: str) -> str:
    """The line above a group of flags."""
    named = {"run": "The run itself.", "method": "See `neuclip methods NAME` for one method's."}
    return named.get(group) or (sections()[group].__doc__ or "")


def flag_names() -> dict[str, str]:
    """Every flag of `neuclip train`, aliases too, and what it sets; a test pins them."""
    names = {f"--{name.replace('_', '-')}": "source" for name in Sources.__dataclass_fields__}
    for flag in table():
        target = ".".join(filter(None, flag.path))
        names |= dict.fromkeys(flag.names, target)
    names |= {f"--{k.replace('_', '-')}": "published" for k in PublishedFlags.__dataclass_fields__}
    return names | dict.fromkeys((f"--{name}" for name in ACCEPTED), "note")


def resume_command(argv: Sequence[str], name: str) -> str:
    """The command line that continues a run, as one types it in a shell.

    Args:
        argv: the command line that started the run, from `train` on.
        name: of the run.
    """
    kept = [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if before not in _REPLACED and word not in _REPLACED
    ]
    kept = [word for word in kept if not word.startswith(tuple(f"{flag}=" for flag in _REPLACED))]
    command = shlex.join(["neuclip", *kept, "--name", name, "--resume", "auto"])
    if launch_environment().world_size > 1:
        return f"start all processes again with: {command}"
    return command


_REPLACED = ("--name", "--resume")


_ABOUT = {
    "train": "Train CLIP. The published flags of open_clip, FastCLIP and NeuCLIP work too.",
    "finetune": "Fine-tune weights (--pretrained) on your own pairs (--train-data). The flags are "
    "those of `neuclip train`; settings that are not given are derived from the weights and the "
    "data, and --dry-run shows each with its reason.",
}


def parse_train(argv: Sequence[str], command: str = "train") -> TrainCommand:
    """Reads a command line of `neuclip train`.

    Args:
        argv: the words after the command.
        command: `train`, or `finetune`, which has the same flags.

    Raises:
        UserError: a flag, a file or their combination is wrong.
        SystemExit: tyro printed the help (0), or an unknown flag or a value of the wrong type (2).
    """
    words = read_words(
        argv,
        {name: ".".join(flag.path) for flag in table() for name in flag.names},
        (name for flag in table() if flag.counts for name in flag.names),
    )
    parsed: object = tyro.cli(
        _parser(words.rest),
        args=list(words.rest),
        prog=f"neuclip {command}",
        description=_ABOUT[command],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    given: dict[str, Any] = dict(vars(parsed))
    sources: Sources = given.pop("sources")
    published: dict[str, object] = given.pop("published").given()
    top: dict[str, Any] = {
        **given.pop("run", {}),
        **{key: dict(value) for key, value in given.items() if value},
    }
    if command == "finetune":
        top.setdefault("derive", "finetune")
    notes = [*translate_values(top), *translate(published, top), *words.notes]
    notes += cache_note(top)
    tree = _files(sources, notes)
    _check_commands(tree, top)
    below = tree["method"].get("name") if "method" in tree else None
    choice = choose_method(published, sources.method, below)
    config = _lay_over(tree, top, choice, published, notes)
    if sources.smoke:
        config = smoke(config)
        notes.append(
            "--smoke puts glyph-tiny, batches of 16 and 2 epochs of 10 steps in place of the "
            "model, batch and length that were given; the method's schedules keep their length"
        )
    if not config.only_evaluates:
        notes = [*choice.notes, *notes]
    return TrainCommand(config, notes=tuple(notes), dry_run=sources.dry_run, argv=(command, *argv))


def _earlier_meaning(path: Path, given: Mapping[str, Any]) -> list[str]:
    """A file that was perhaps written when `neuclip` was the name of the pool."""
    method = given.get("method")
    if not isinstance(method, Mapping) or method.get("name") != "neuclip":
        return []
    old = {*METHODS["neuclip_pool"].settings.model_fields, "num_prototypes"}
    if method.keys() - old:
        return []
    return [
        f"{path}: method neuclip is the published NeuCLIP, whose prototypes are trained; until "
        "2026-11-28 this name meant neuclip_pool"
    ]


def _files(sources: Sources, notes: list[str]) -> dict[str, Any]:
    """Recipe and configuration files as one tree, each checked as it is laid on top."""
    paths = list(sources.config)
    if sources.recipe is not None:
        paths.insert(0, recipe_path(sources.recipe))
    tree: dict[str, Any] = {}
    for path in paths:
        # A section whose keys are all commented out reads as null.
        empty = {"method", *sections()}
        given = read_recipe(path)
        notes += _earlier_meaning(path, given) if path in sources.config else []
        tree = merge(tree, {k: v for k, v in given.items() if v is not None or k not in empty})
        if isinstance(tree.get("method"), dict):
            tree["method"].setdefault("name", DEFAULT_METHOD)
        validate(tree, str(path))
    return tree


def _check_commands(tree: Mapping[str, Any], top: Mapping[str, Any]) -> None:
    """Checks that commands are allowed on the command line, not by a file alone.

    Raises:
        UserError: a configuration file asks for `allow_pipe`, and no flag does.
    """
    if tree.get("data", {}).get("allow_pipe") and "allow_pipe" not in top.get("data", {}):
        raise UserError(
            "a configuration file says allow_pipe: true, which lets its 'pipe:' sources run shell "
            "commands: give --allow-pipe if you trust the file, or --no-allow-pipe"
        )


def _lay_over(
    tree: dict[str, Any],
    top: dict[str, Any],
    choice: MethodChoice,
    published: Mapping[str, object],
    notes: list[str],
) -> RunConfig:
    """The configuration: the flags over the files, with the method that was chosen."""
    method = choice.method or tree.get("method", {}).get("name", DEFAULT_METHOD)
    optim: dict[str, Any] = dict(top.get("optim", {}))
    settings = _own_settings(dict(top.get("method", {})), optim, method, choice, notes)
    if published.get("nu_update") == "sox" and settings.get("gamma", 0) > 1:
        # The published FastCLIP line on DFN-14M: a moving average has no rate above 1.
        notes.append(f"--gamma {settings['gamma']:g} is above 1, the rate of no memory: taken as 1")
        settings["gamma"] = 1.0
    tree = merge(tree, {**top, "optim": optim, "method": {"name": method, **settings}})
    if choice.published:
        trains = not validate(tree, flag_of).only_evaluates
        notes += fill_in(tree, METHODS[method], published, trains=trains)
    config = validate(tree, flag_of)
    for key, reason in config.method.idle().items():
        if settings.get(key) is not None and settings[key] is not False:
            raise UserError(f"--{key.replace('_', '-')} has no effect with {reason}")
    return config


def _own_settings(
    settings: dict[str, Any],
    optim: dict[str, Any],
    method: str,
    choice: MethodChoice,
    notes: list[str],
) -> dict[str, Any]:
    """The method's settings among the flags, under the names that the method has for them.

    Raises:
        UserError: a setting that the method does not have; it would be ignored.
    """
    info = METHODS[method]
    for key, own in info.aliases.items():
        if key in settings:
            if own in settings:
                raise UserError(
                    f"{flag_text(key, settings[key])} and {flag_text(own, settings[own])} set the "
                    "same thing: leave one out"
                )
            settings[own] = settings.pop(key)
            notes.append(f"--{key.replace('_', '-')} is {own} of {method}: {settings[own]:g}")
    for key, reason in info.without_effect.items():
        if key in settings:
            notes.append(f"{flag_text(key, settings.pop(key))} has no effect: {reason}")
    fields = info.settings.model_fields
    if choice.published and "temperature_lr" in fields and "lr_tau" in optim:
        # The towers have no individual temperatures: FastCLIP-v2's --lr_tau is for the method's.
        settings = {"temperature_lr": optim.pop("lr_tau"), **settings}
        notes.append(f"--lr-tau is temperature_lr of {method}: {settings['temperature_lr']:g}")
    flags = {flag.path[1]: flag for flag in table() if flag.path[0] == "method"}
    for key in settings:
        if key in info.settings.RENAMED:
            raise UserError(
                f"--{flags[key].name} is --{info.settings.RENAMED[key].replace('_', '-')} in "
                f"method {method}"
            )
        if key not in fields:
            has = ", ".join(f"--{flags[name].name}" for name in fields if name != "name")
            raise UserError(
                f"--{flags[key].name} is a setting of {', '.join(flags[key].fields)}; "
                f"method {method} has {has}"
            )
    return settings
