"""The error for weights that are not where the user says: what the text names instead."""

import difflib
import re
from pathlib import Path

import open_clip

from neuclip.errors import UserError, printable
from neuclip.model.architecture import LOCAL, REPOSITORY_CONFIG, model_names

_HUB = "hf-hub:"
_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_SHOWN = 3


def absent(path: Path, model: str | None) -> UserError:
    """The error for a path that is not a run folder, a checkpoint or a repository.

    Args:
        path: as it was given; it may be a tag of open_clip's or a name on the hub.
        model: the architecture that the weights are for, if it is known.
    """
    text = str(path)
    if path.is_dir():
        return UserError(_folder(path))
    if text.startswith(LOCAL):
        return UserError(f"give the folder alone: {text.removeprefix(LOCAL)}")
    models = open_clip.list_pretrained_models_by_tag(text)
    if models:
        return UserError(_tag(text, models, model))
    if text in open_clip.list_models():
        return UserError(f"{text} is a model, not weights: give it as --model (--arch)")
    hub = text.removeprefix(_HUB)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not hub.endswith(_WEIGHTS)
    if text.startswith(_HUB) or (on_hub and not path.parent.is_dir()):
        return UserError(
            f"there is no folder {text}; if it is a repository on the hub, download it first "
            f"(nothing is downloaded here): hf download {hub} --local-dir DIR, and give DIR"
        )
    return UserError(f"there is no {text}{_neighbours(path)}")


def _folder(path: Path) -> str:
    """What a folder holds that is none of the three."""
    weights = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS)
    said = f"{path} is neither a run folder (no checkpoints/), nor a repository (no "
    said += f"{REPOSITORY_CONFIG})"
    if weights:
        return f"{said}; give one of its files: {printable(', '.join(weights[:_SHOWN]))}"
    runs = sorted(folder.parent.name for folder in path.glob("*/checkpoints"))
    if runs:
        return f"{said}; give one of its runs: {printable(', '.join(runs[:_SHOWN]))}"
    return f"{said}, and it holds no files of weights ({', '.join(_WEIGHTS)})"


def _tag(tag: str, models: list[str], model: str | None) -> str:
    """Where the weights of a tag are, for the model or for some that have it."""
    said = f"{tag!r} is open_clip's name of published weights, and nothing is downloaded here. "
    if model in models:
        return f"{said}For {model}: {_download(model, tag)}"
    known = [name for name in model_names() if name == model]
    other = open_clip.list_pretrained_tags_by_model(known[0]) if known else []
    if other:
        near = difflib.get_close_matches(tag, other, n=_SHOWN, cutoff=0) or other
        said += f"{model} has none of that name, but {', '.join(near)}. "
    shown = "; ".join(f"for {name}: {_download(name, tag)}" for name in models[:_SHOWN])
    more = f"; {len(models) - _SHOWN} more models have it" if len(models) > _SHOWN else ""
    return f"{said}It exists {shown}{more}"


def _download(model: str, tag: str) -> str:
    """How to get the weights of a tag, and what to give then."""
    found = open_clip.get_pretrained_cfg(model, tag)
    hub, _, file = str(found.get("hf_hub", "")).rpartition("/")
    if hub and not file:
        return f"`hf download {hub} --local-dir DIR`, and give DIR"
    if hub:
        return f"`hf download {hub} {file} --local-dir DIR`, and give DIR/{file}"
    url = str(found["url"])
    return f"`curl -LO {url}`, and give {url.rpartition('/')[2]}"


def _neighbours(path: Path) -> str:
    """The files beside the path with the nearest names, as the end of a sentence."""
    parent = path.parent
    if not parent.is_dir():
        return f": there is no folder {printable(str(parent))}"
    here = sorted(other.name for other in parent.iterdir() if not other.name.startswith("."))
    near = difflib.get_close_matches(path.name, here, n=_SHOWN, cutoff=0.3)
    return f"; there are: {printable(', '.join(near))}" if near else ""
