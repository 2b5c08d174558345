"""Initial weights from files: of the full model, or of one tower."""

import logging
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from neuclip.checkpoint import storage
from neuclip.config.sections import ModelConfig
from neuclip.model.load import CheckpointChoice, open_checkpoint

log = logging.getLogger("neuclip")

Tower = Literal["image", "text"]


def load_starting_weights(
    towers: nn.Module, settings: ModelConfig, *, learns_temperature: bool
) -> None:
    """Loads the weights given by `--pretrained*`; a tower's own file overrides the model's.

    Args:
        towers: the model, with random weights.
        settings: of the towers.
        learns_temperature: whether to take over the temperature of `--pretrained`; a method with
            another kind of temperature keeps its own.

    Raises:
        UserError: no such file, or weights of another architecture.
    """
    if settings.pretrained is not None:
        _load_model(towers, Path(settings.pretrained), learns_temperature=learns_temperature)
    files: tuple[tuple[Tower, str | None], ...] = (
        ("image", settings.pretrained_image_path),
        ("text", settings.pretrained_text_path),
    )
    for tower, file in files:
        if file is not None:
            _load_tower(towers, tower, Path(file))


def _load_model(towers: nn.Module, path: Path, *, learns_temperature: bool) -> None:
    weights, live = _weights(path), towers.state_dict()
    for name in ("logit_scale", "logit_bias"):
        keep = name not in weights or (name == "logit_scale" and not learns_temperature)
        if name not in live:
            weights.pop(name, None)
        elif keep:
            weights[name] = live[name]
    storage.load_weights(towers, weights, path)
    log.info("initial weights: %s", path)


def _load_tower(towers: nn.Module, tower: Tower, path: Path) -> None:
    weights, live = _weights(path), towers.state_dict()
    if any(name.startswith("visual.") for name in weights):  # the file holds a full model
        found = {name: value for name, value in weights.items() if _tower_of(name) == tower}
    else:
        prefix = "visual." if tower == "image" else "text." if hasattr(towers, "text") else ""
        found = {f"{prefix}{name}": value for name, value in weights.items()}
    rest = {name: value for name, value in live.items() if _tower_of(name) != tower}
    storage.load_weights(towers, {**rest, **found}, path)
    log.info("initial weights of the %s tower: %s", tower, path)


def _weights(path: Path) -> dict[str, Tensor]:
    return dict(open_checkpoint(CheckpointChoice(path, ema=False)).weights)


def _tower_of(name: str) -> Tower | None:
    """The tower a weight belongs to; none for the temperature and the bias."""
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith("visual.") else "text"
