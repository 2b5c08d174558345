"""Settings that a published command line leaves out, as its trainer has them. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from neuclip.catalogue.method_info import MethodInfo
from neuclip.catalogue.published_trainers import PublishedTrainer

Tree = dict[str, Any]


def fill_in(
    tree: Tree, info: MethodInfo, switches: Mapping[str, object], *, trains: bool
) -> list[str]:
    """Adds the published form of a method and its trainer's defaults to the settings.

    Args:
        tree: the settings of the line over those of its files; what it lacks is added.
        info: the method that the line selects by published switches.
        switches: the published flags of the line.
        trains: whether the line trains; one that only evaluates needs no model of the trainer.

    Returns:
        What the user should know, in one line.
    """
    added: dict[str, object] = {}
    settings = tree["method"]
    trainer = info.trainer or PublishedTrainer("")
    fields = info.settings.model_fields
    assumed = {**{k: v for k, v in trainer.method.items() if k in fields}, **info.published}
    for switch in switches:
        assumed |= info.published_with.get(switch, {})
    for key, value in assumed.items():
        if key not in settings:
            settings[key] = value
            if fields[key].default != value:
                added[key] = value
    if trains:
        added |= _run_defaults(tree, trainer)
        added |= _rates(tree, info, trainer)
    return _notes(trainer, added)


def _run_defaults(tree: Tree, trainer: PublishedTrainer) -> dict[str, object]:
    added: dict[str, object] = {}
    for (section, key), value in trainer.run.items():
        values = tree.setdefault(section, {})
        if key not in values:
            values[key] = value
            added["model" if (section, key) == ("model", "name") else key] = value
    return added


def _rates(tree: Tree, info: MethodInfo, trainer: PublishedTrainer) -> dict[str, object]:
    """The trainer's rules about learning rates, where they differ from this project's."""
    added: dict[str, object] = {}
    if not trainer.name:
        return added
    optim, settings = tree.setdefault("optim", {}), tree["method"]
    rate, constant = optim.get("lr", 5e-4), optim.get("lr_scheduler") == "const"
    if constant and not trainer.const_warms_up:
        optim["warmup"] = added["warmup"] = 0  # even if the line gives one, as in the trainer
    fields = info.settings.model_fields
    if "lambda_clip_norm" in fields and optim.get("grad_clip_norm") is not None:
        added |= _fill(settings, {"lambda_clip_norm": optim["grad_clip_norm"]})
    if "temperature_lr" in fields:
        return added | _fill(settings, {"temperature_lr": rate})
    if (info.spelling or {}).get("temperature_scheme") == "global_constant":
        return added
    if {"lr_tau", "lr_tau_scheduler"} & optim.keys() or constant:
        added |= _fill(optim, {"lr_tau": rate, "lr_tau_scheduler": trainer.tau_schedule})
    return added


def _fill(values: Tree, defaults: Mapping[str, object]) -> dict[str, object]:
    added = {key: value for key, value in defaults.items() if key not in values}
    values |= added
    return added


def _notes(trainer: PublishedTrainer, added: Mapping[str, object]) -> list[str]:
    if not added:
        return []
    words = ", ".join(f"{key} {_text(value)}" for key, value in added.items())
    whose = f"{trainer.name}'s values" if trainer.name else "the published form"
    return [f"{whose} for what the line leaves out: {words} (flags of these names override them)"]


def _text(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
