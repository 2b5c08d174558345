"""The error for weights of another architecture: what differs, and which model they fit."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from neuclip.checkpoint.common import CheckpointError
from neuclip.checkpoint.stored_tensors import far_more, stored_numbers
from neuclip.errors import UserError, quantity
from neuclip.model.architecture import Architecture, find_architecture, model_names
from neuclip.model.clip import Clip, towers_without_values

BUFFERS = ("position_ids", "attn_mask", "num_batches_tracked", "total_ops", "total_params")
"""Ends of the names of buffers that some versions and programs store, and others do not."""
OPENAI = {"input_resolution", "context_length", "vocab_size"}
"""Sizes that OpenAI's archives hold beside their weights."""
_SHOWN = 2
_TRIED = 16
_PROJECTIONS = (
    "text_projection",
    "text_projection.weight",
    "visual.proj",
    "visual.head.proj.weight",
)


def does_not_fit(
    path: Path, weights: Mapping[str, Tensor], clip: Clip, trained: Architecture | None = None
) -> CheckpointError:
    """The error, with the models of open_clip that have exactly these weights.

    Args:
        path: the file of the weights.
        weights: by open_clip's names; position embeddings may be resized for the towers.
        clip: the towers that they do not fit.
        trained: the architecture recorded beside them, if there is one.
    """
    name, live = clip.architecture.short_name, clip.towers.state_dict()
    other = [key for key in live if key in weights and weights[key].shape != live[key].shape]
    missing = [key for key in live if key not in weights]
    extra = [key for key in weights if key not in live]
    details = [
        *(
            f"{key} is {_shape(weights[key])}, and {_shape(live[key])} in {name}"
            for key in other[:_SHOWN]
        ),
        *(f"{name} has {key}, the file does not" for key in missing[:_SHOWN]),
        *(f"the file has {key}, {name} does not" for key in extra[:_SHOWN]),
    ]
    wrong = len(other) + len(missing) + len(extra)
    more = f"; and {wrong - len(details)} more" if wrong > len(details) else ""
    return CheckpointError(
        f"{path} does not fit {name}, {quantity(wrong, 'weight')} differ: {'; '.join(details)}"
        f"{more}. {_named(trained, clip.architecture) or advice(weights)}"
    )


def check_size(
    path: Path,
    weights: Mapping[str, Tensor],
    architecture: Architecture,
    trained: Architecture | None = None,
) -> None:
    """Checks that towers are not much larger than the weights for them, before they are built.

    A file of a few bytes may describe towers of any size.

    Args:
        path: the file of the weights.
        weights: as `neuclip.model.foreign_weights.unwrap` returns them.
        architecture: of the towers.
        trained: the architecture recorded beside the weights, if there is one.

    Raises:
        CheckpointError: the towers need more memory than the weights can fill.
    """
    towers = towers_without_values(architecture)
    needed = sum(value.numel() for value in (*towers.parameters(), *towers.buffers()))
    held = stored_numbers(weights.values())
    if far_more(needed, held):
        raise CheckpointError(
            f"{path} does not fit {architecture.short_name}: the model has {needed:,} numbers, the "
            f"file has {held:,}. {_named(trained, architecture) or advice(weights)}"
        )


def _named(trained: Architecture | None, tried: Architecture) -> str | None:
    """The model that is recorded beside the weights, as a sentence."""
    if trained is None or trained.name == tried.name:
        return None
    return f"They are weights of {trained.name}: give --model {trained.name}"


def advice(weights: Mapping[str, Tensor]) -> str:
    """Which model to name for these weights, as a sentence."""
    fitting = models_of(weights)
    if not fitting:
        return (
            "No model of open_clip has these shapes: give their configuration as a file, "
            "--model FILE.json (for evaluation: --arch)"
        )
    found = f"These are the shapes of {', '.join(fitting)}: give --model (for evaluation: --arch)"
    if len(fitting) > 1:
        found += "; names with quickgelu are for the weights of OpenAI, DFN and MetaCLIP"
    return found


def models_of(weights: Mapping[str, Tensor]) -> list[str]:
    """The models of open_clip whose weights have exactly these names and shapes.

    If there is none, position embeddings may have other sizes: they are resized.
    """
    candidates = [name for name in model_names() if _plausible(name, weights)][:_TRIED]
    known = {name: _signature_of(name) for name in candidates}
    wanted = _signature(weights)
    exact = [name for name in candidates if known[name] == wanted]
    if exact:
        return exact
    plain = _without_positions(wanted)
    return [name for name in candidates if _without_positions(known[name]) == plain]


def _signature(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is trained, in one layout of the text tower."""
    return {
        name.removeprefix("text."): tuple(value.shape)
        for name, value in weights.items()
        if not name.startswith("logit_") and not name.endswith(BUFFERS) and name not in OPENAI
    }


def _without_positions(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: () if "pos" in name else shape for name, shape in shapes.items()}


@cache
def _signature_of(name: str) -> dict[str, tuple[int, ...]]:
    try:
        towers = towers_without_values(find_architecture(name))
    except UserError:  # its text tower is not on this machine
        return {}
    return _signature(towers.state_dict())


def _plausible(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether the configuration of a model may have these weights."""
    config = find_architecture(name).config
    vision, text = config["vision_cfg"], config["text_cfg"]
    projections = [
        weights[start + key]
        for start in ("", "text.")
        for key in _PROJECTIONS
        if start + key in weights
    ]
    if text.get("hf_model_name") or not all(
        config["embed_dim"] in value.shape for value in projections
    ):
        return False
    kind = _kind(vision)
    return any(key.startswith(kind) for key in weights) and text.get("layers", 12) == _blocks(
        weights
    )


def _kind(vision: Mapping[str, Any]) -> str:
    """The start of a name that towers of this kind have."""
    if vision.get("timm_model_name"):
        return "visual.trunk."
    return "visual.layer4." if isinstance(vision.get("layers"), list) else "visual.transformer."


def _blocks(weights: Mapping[str, Tensor]) -> int:
    """Number of blocks of the text tower."""
    names = (name.removeprefix("text.") for name in weights)
    start = "transformer.resblocks."
    return len({name.split(".")[2] for name in names if name.startswith(start)})


def _shape(value: Tensor) -> str:
    return "x".join(str(side) for side in value.shape) or "a number"
