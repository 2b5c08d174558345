"""Weights to begin with, from files: of the whole model, or of one tower."""

import logging
from pathlib import Path

from torch import Tensor, nn

from neuclip.checkpoint import storage
from neuclip.config.sections import ModelConfig
from neuclip.model.load import read_weights

log = logging.getLogger("neuclip")


def load_starting_weights(
    towers: nn.Module, settings: ModelConfig, *, learns_temperature: bool
) -> None:
    """Loads what `--pretrained` and its kin name; a tower's own file goes over the model's.

    Args:
        towers: the model, with fresh weights.
        settings: of the towers.
        learns_temperature: begin with the temperature of `--pretrained`; a method with another kind
            of temperature keeps its own.

    Raises:
        UserError: no such file, or weights of another architecture.
    """
    if settings.pretrained is not None:
        path = Path(settings.pretrained)
        weights, live = read_weights(path), towers.state_dict()
        for name in ("logit_scale", "logit_bias"):
            keep = name not in weights or (name == "logit_scale" and not learns_temperature)
            if name not in live:
                weights.pop(name, None)
            elif keep:
                weights[name] = live[name]
        storage.load_weights(towers, {"state_dict": weights}, path)
        log.info("begins with the weights of %s", path)
    for tower, name in (
        ("image", settings.pretrained_image_path),
        ("text", settings.pretrained_text_path),
    ):
        if name is not None:
            _load_tower(towers, tower, Path(name))
            log.info("begins with the %s tower of %s", tower, name)


def _load_tower(towers: nn.Module, tower: str, path: Path) -> None:
    weights, live = read_weights(path), towers.state_dict()
    if any(name.startswith("visual.") for name in weights):  # of a whole model
        found = {name: value for name, value in weights.items() if _tower_of(name) == tower}
    else:
        prefix = "visual." if tower == "image" else "text." if hasattr(towers, "text") else ""
        found = {f"{prefix}{name}": value for name, value in weights.items()}
    rest: dict[str, Tensor] = {k: v for k, v in live.items() if _tower_of(k) != tower}
    storage.load_weights(towers, {"state_dict": {**rest, **found}}, path)


def _tower_of(name: str) -> str | None:
    """Which tower a weight belongs to; the temperature and the bias to none."""
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith("visual.") else "text"
