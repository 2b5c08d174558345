"""The error for weights that are not where the user says: what the text names instead."""

import difflib
import re
from pathlib import Path

import open_clip

from neuclip.checkpoint.common import checkpoints_in
from neuclip.errors import UserError, printable
from neuclip.model.architecture import HUB, LOCAL, REPOSITORY_CONFIG
from neuclip.run_folder import RunFolder

_WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_SHOWN = 3


def absent(path: Path, model: str | None) -> UserError:
    """The error for a path that is not a run folder, a checkpoint or a repository.

    Args:
        path: as it was given; it may be meant as a tag of open_clip's or a name on the hub.
        model: the architecture that the weights are for, if it is known.
    """
    text = str(path)
    if path.is_dir():
        return UserError(_folder(path))
    if text.startswith(LOCAL):
        return UserError(f"give the folder alone: {text.removeprefix(LOCAL)}")
    if text in open_clip.list_models():
        return UserError(f"{text} is a model, not weights: give it as --model (--arch)")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.endswith(_WEIGHTS)
    if on_hub and not path.parent.is_dir():
        return UserError(
            f"there is no folder {text}; a repository on the hub is {HUB}{text} (it is downloaded)"
        )
    return UserError(f"there is no {text}{_neighbours(path)}{_tags(text, model)}")


def _folder(path: Path) -> str:
    """What a folder holds that is none of the three."""
    weights = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS)
    found = checkpoints_in(path)
    if found and path == RunFolder(path.parent).checkpoints:
        names = sorted(checkpoint.name for checkpoint in found)
        return (
            f"{path} holds the checkpoints of a run: give the run folder, {path.parent}, or one of "
            f"them: {printable(', '.join(names[:_SHOWN]))}"
        )
    said = f"{path} is neither a run folder (no checkpoints/), nor a repository (no "
    said += f"{REPOSITORY_CONFIG})"
    if weights:
        return f"{said}; give one of its files: {printable(', '.join(weights[:_SHOWN]))}"
    runs = sorted(folder.parent.name for folder in path.glob("*/checkpoints"))
    if runs:
        return f"{said}; give one of its runs: {printable(', '.join(runs[:_SHOWN]))}"
    return f"{said}, and it holds no files of weights ({', '.join(_WEIGHTS)})"


def _neighbours(path: Path) -> str:
    """The files beside the path with the nearest names, as the end of a sentence."""
    parent = path.parent
    if not parent.is_dir():
        return f": there is no folder {printable(str(parent))}"
    here = sorted(other.name for other in parent.iterdir() if not other.name.startswith("."))
    near = difflib.get_close_matches(path.name, here, n=_SHOWN, cutoff=0.3)
    return f"; there are: {printable(', '.join(near))}" if near else ""


def _tags(text: str, model: str | None) -> str:
    """The nearest tags of published weights, as the end of a sentence; none for a path."""
    if "/" in text or text.endswith(_WEIGHTS):
        return ""
    of_model = open_clip.list_pretrained_tags_by_model(model or "")
    near = difflib.get_close_matches(text, of_model, n=_SHOWN, cutoff=0)
    if near:
        return f". Published weights of {model} have the tags {', '.join(near)}"
    every = sorted({tag for _, tag in open_clip.list_pretrained()})
    near = difflib.get_close_matches(text, every, n=_SHOWN, cutoff=0.6)
    return f". Tags of published weights are {', '.join(near)}" if near else ""
