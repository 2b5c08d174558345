"""Weights as other programs write them, brought to the names and shapes of open_clip's towers.

`unwrap` finds the weights in a file's content, without knowing the towers. `fit` adapts them to
towers; what does not fit is described by `neuclip.model.mismatch`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, cast

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor

from neuclip.checkpoint.common import CheckpointError
from neuclip.errors import printable, quantity
from neuclip.model import transformers_siglip
from neuclip.model.architecture import Architecture, model_names
from neuclip.model.clip import Clip
from neuclip.model.mismatch import BUFFERS, OPENAI, does_not_fit
from neuclip.model.positions import resize_positions
from neuclip.model.transformers_names import is_transformers_clip, open_clip_weights
from neuclip.model.transformers_siglip import is_transformers_siglip

log = logging.getLogger("neuclip")

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "torchscript", "net", "weights")
_PREFIXES = ("module.", "model.", "net.", "clip.", "clip_model.")
_SEGMENTS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that torch adds when a module is compiled, sharded or checkpointed."""
_TOP = ("visual.", "vision_model.", "image_encoder.", "logit_scale", "text_projection")
"""Starts of names that show that no prefix is left."""
_SCALARS = ("logit_scale", "logit_bias")


def unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The weights in the content of a file, without the prefixes that wrappers put on their names.

    Args:
        content: as `neuclip.checkpoint.formats.read` returns it.
        path: the file, for messages.

    Raises:
        CheckpointError: there are no weights, or those of a model that is not one of open_clip's.
    """
    found = _innermost(content, depth=3)
    if not found:
        kind = type(content).__name__
        held = ", ".join(str(key) for key in content) if isinstance(content, Mapping) else kind
        raise CheckpointError(f"{path} holds no weights by name; it holds: {printable(held)}")
    weights = _plain_names(found)
    if is_transformers_siglip(weights):
        weights = transformers_siglip.open_clip_weights(weights, path)
        log.info("%s: weights of transformers' SiglipModel, read by open_clip's names", path)
    elif is_transformers_clip(weights):
        weights = open_clip_weights(weights, path)
        log.info("%s: weights of transformers' CLIPModel, read by open_clip's names", path)
    return weights


def _innermost(content: object, depth: int) -> dict[str, Tensor]:
    """The tensors of a state dict, however deep it is wrapped; empty if there is none."""
    if not isinstance(content, Mapping):
        return {}
    items = cast(Mapping[object, object], content)
    tensors = {str(key): value for key, value in items.items() if isinstance(value, Tensor)}
    if tensors:
        numbers = {
            str(key): torch.tensor(float(cast(Any, value)))
            for key, value in items.items()
            if str(key).endswith(_SCALARS) and isinstance(value, Real)
        }
        return tensors | numbers
    inner = (_innermost(items.get(key), depth - 1) for key in _WRAPPERS if depth)
    return next((found for found in inner if found), {})


def _plain_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without wrappers' parts of their names; other names stay as they are."""
    plain = {
        ".".join(part for part in name.split(".") if part not in _SEGMENTS): value
        for name, value in weights.items()
    }
    while not any(name.startswith(_TOP) for name in plain):
        inside = [each for each in _PREFIXES if _belongs(each, plain)]
        if not inside:
            break
        plain = {name.removeprefix(inside[0]): value for name, value in plain.items()}
    return plain


def _belongs(prefix: str, names: Iterable[str]) -> bool:
    """Whether a prefix is a wrapper's: of all names, or of those of the towers."""
    with_it = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    known = (*_TOP, *_PREFIXES)
    return bool(with_it) and (
        len(with_it) == len(list(names)) or any(name.startswith(known) for name in with_it)
    )


@dataclass(frozen=True)
class Given:
    """Weights to load.

    Attributes:
        weights: as `unwrap` returns them.
        path: their file, for messages.
        trained: the architecture that they were trained in, if it is known.
        quick_gelu: whether they were trained with QuickGELU, if it is known.
    """

    weights: Mapping[str, Tensor]
    path: Path
    trained: Architecture | None = None
    quick_gelu: bool | None = None


def fit(given: Given, clip: Clip) -> dict[str, Tensor]:
    """Adapts weights to towers, and logs what was changed or left out.

    Text towers change between open_clip's two layouts, numbers between their shapes, and position
    embeddings between image sizes and text lengths. Temperature and bias stay those of the towers
    where the file has none.

    Args:
        given: the weights, full and not sharded.
        clip: the towers, not sharded.

    Returns:
        The weights by the names of the towers, in their shapes.

    Raises:
        CheckpointError: they are of another architecture.
    """
    path, live = given.path, clip.towers.state_dict()
    _warn_of_quick_gelu(given, clip)
    weights = _of_apple(dict(given.weights), clip)
    weights = _same_text_layout(weights, live)
    for name, value in weights.items():
        if name in live and value.numel() == live[name].numel() == 1:
            weights[name] = value.reshape(live[name].shape)
    for change in resize_positions(weights, live, clip, given.trained):
        log.info("%s: %s", path, change)
    weights = _without_extras(weights, live, path)
    for name in _SCALARS:
        if name in live and name not in weights:
            weights[name] = live[name]
            log.info("%s has no %s: it starts at %.4g", path, name, float(live[name]))
    if any(name not in weights or weights[name].shape != live[name].shape for name in live) or any(
        name not in live for name in weights
    ):
        raise does_not_fit(path, weights, clip, given.trained)
    return weights


def _warn_of_quick_gelu(given: Given, clip: Clip) -> None:
    """Warns of weights trained with another activation than the towers compute."""
    name, computed = clip.architecture.short_name, clip.architecture.quick_gelu
    wanted = True if given.weights.keys() >= OPENAI else given.quick_gelu
    if wanted is None or wanted == computed:
        return
    other, flag = f"{name}-quickgelu", "add --force-quick-gelu"
    remedy = f"{flag}, or give --model {other}" if other in model_names() else flag
    if not wanted:
        plain = name.removesuffix("-quickgelu")
        remedy = "leave out --force-quick-gelu" if plain == name else f"give --model {plain}"
    kinds = ("GELU", "QuickGELU")
    log.warning(
        "%s: these weights were trained with %s, and %s computes %s, which harms embeddings; %s",
        given.path, kinds[wanted], name, kinds[computed], remedy,
    )  # fmt: skip


def _of_apple(weights: dict[str, Tensor], clip: Clip) -> dict[str, Tensor]:
    """Apple's MobileCLIP files by open_clip's names; other weights as they are."""
    try:
        return convert_state_dict(cast(Any, clip.towers), weights)
    except (KeyError, AttributeError, RuntimeError):
        return weights


def _same_text_layout(weights: dict[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Moves the text tower below `text.`, or out of it, as the towers have it."""
    below = any(name.startswith("text.") for name in live)
    if below and "text.text_projection" in live:
        return convert_to_custom_text_state_dict(weights)
    if not below and not any(name in live and name.startswith("text.") for name in weights):
        return {name.removeprefix("text."): value for name, value in weights.items()}
    return weights


def _without_extras(
    weights: dict[str, Tensor], live: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Leaves out what is outside of the towers: losses, teachers, buffers of other versions."""
    parts = {name.partition(".")[0] for name in live} | {"visual", "text", "transformer"}
    extra = [
        name
        for name in weights
        if name not in live
        and (name.endswith(BUFFERS) or name in _SCALARS or name.partition(".")[0] not in parts)
    ]
    counted = [name for name in extra if name not in OPENAI and not name.endswith(BUFFERS)]
    if counted:
        log.info(
            "%s: %s beside the towers left out (%s)",
            path, quantity(len(counted), "weight"), printable(", ".join(counted)),
        )  # fmt: skip
    return {name: value for name, value in weights.items() if name not in extra}
