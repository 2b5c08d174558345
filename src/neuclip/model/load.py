"""Towers to be judged: from a run folder, any open_clip checkpoint, or a repository on disk."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from neuclip.checkpoint import storage
from neuclip.checkpoint.sharded import is_sharded
from neuclip.config.run_config import validate
from neuclip.errors import UserError
from neuclip.model.clip import Clip, build_clip, init_for
from neuclip.model.device import choose_device
from neuclip.model.ema import AVERAGES, judged
from neuclip.model.encoder import Encoder
from neuclip.run_folder import PLAIN, RunFolder

REPOSITORY_CONFIG = "open_clip_config.json"
_REPOSITORY_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Choice:
    """Which model.

    Attributes:
        path: A run folder, a checkpoint, or a Hugging Face open_clip repository on disk.
        epoch: Of a run folder, the checkpoint of this epoch.
        step: Of a run folder, the checkpoint of this step; with neither, the newest.
        arch: The architecture; none: what the checkpoint says.
        ema: Take the moving average of the weights where the checkpoint holds one, as training
            judges it; otherwise the weights themselves.
    """

    path: Path
    epoch: int | None = None
    step: int | None = None
    arch: str | None = None
    ema: bool = True


@dataclass(frozen=True)
class Pretrained:
    """Towers in float32, with what their results need.

    Attributes:
        encoder: The towers.
        device: Where they are.
        arch: Their architecture.
        path: The checkpoint's file.
        sha256: Of architecture and weights.
        results: Where results belong.
        clip: The towers with their transforms and tokenizer.
        recorded: What else the checkpoint says: `epoch`, `name` and `neuclip`, where it has them.
        averaged: Whether the weights are the moving average of the training's.
    """

    encoder: Encoder
    device: torch.device
    arch: str
    path: Path
    sha256: str
    results: Path
    clip: Clip
    recorded: Mapping[str, Any]
    averaged: bool


def load_pretrained(choice: Choice, device: str = "auto", local_rank: int = 0) -> Pretrained:
    """Loads towers, in float32 whatever they were trained in.

    Args:
        choice: Which.
        device: `auto`, `cpu` or `cuda`.
        local_rank: Which GPU of this machine.

    Raises:
        UserError: no such checkpoint (never another one in its place), no architecture known,
            or weights of another architecture.
    """
    place = choose_device(device, local_rank)
    if (choice.path / REPOSITORY_CONFIG).is_file():
        path, name = _in_repository(choice), f"local-dir:{choice.path}"
    else:
        path, name = _in_run(choice), None
    content = _load(path)
    plain = AVERAGES in content and not choice.ema
    content, averaged = (content, False) if plain else judged(content)
    arch = name or choice.arch or _recorded_arch(content, path)
    clip = build_clip(arch, "fp32", place, init_for(content["state_dict"]))
    storage.load_weights(clip.towers, content, path)
    return Pretrained(
        encoder=Encoder(clip, place),
        device=place,
        arch=arch,
        path=path,
        sha256=_digest(_identity(choice, arch), clip.towers.state_dict()),
        results=_results(choice.path, path, content, plain=plain),
        clip=clip,
        recorded={key: content[key] for key in ("epoch", "name", "neuclip") if key in content},
        averaged=averaged,
    )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, run folder, repository or file of weights, by open_clip's names.

    Raises:
        UserError: there are none.
    """
    choice = Choice(path)
    in_repository = (path / REPOSITORY_CONFIG).is_file()
    content = _load(_in_repository(choice) if in_repository else _in_run(choice))
    return {name.removeprefix("module."): value for name, value in content["state_dict"].items()}


def _in_run(choice: Choice) -> Path:
    """The file that was asked for."""
    path, asked = choice.path, (choice.epoch, choice.step)
    if path.is_file() or is_sharded(path):
        if asked != (None, None):
            raise UserError(f"{path} is a checkpoint already: --epoch and --iter go with a folder")
        return path
    if None not in asked:
        raise UserError("--epoch and --iter name two checkpoints: give one")
    folder = RunFolder(path)
    if not folder.checkpoints.is_dir():
        raise UserError(
            f"{path} is no run folder (no checkpoints/ in it), no checkpoint, and no repository "
            f"(no {REPOSITORY_CONFIG})"
        )
    if choice.epoch is not None:
        return folder.epoch_checkpoint(choice.epoch)
    return folder.latest if choice.step is None else folder.step_checkpoint(choice.step)


def _in_repository(choice: Choice) -> Path:
    for flag, value in (
        ("--epoch", choice.epoch),
        ("--iter", choice.step),
        ("--arch", choice.arch),
    ):
        if value is not None:
            raise UserError(f"{choice.path} is a repository, which has one model: leave out {flag}")
    for name in _REPOSITORY_WEIGHTS:
        if (choice.path / name).is_file():
            return choice.path / name
    raise UserError(f"{choice.path} has no weights: expected {' or '.join(_REPOSITORY_WEIGHTS)}")


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint in open_clip's layout, whichever of its forms the file has."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}")
        try:
            return {"state_dict": load_file(path)}
        except Exception as error:  # its Rust side has an exception class of its own
            raise UserError(f"checkpoint {path} is damaged or incomplete: {error}") from None
    return storage.load(path, bare=True)


def _recorded_arch(content: dict[str, Any], path: Path) -> str:
    own: dict[str, Any] | None = content.get("neuclip")
    if own is not None:
        return validate(yaml.safe_load(own["config"]), str(path)).model.name
    noted = path.parent.parent / "params.txt"  # open_clip's record of a run's flags
    if noted.is_file():
        found = re.search(r"^model: (\S+)$", noted.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    raise UserError(f"{path} does not say of which architecture it is: give it, --arch ViT-B-32")


def _identity(choice: Choice, arch: str) -> str:
    """What decides the numbers beside the weights: of a repository its configuration."""
    config = choice.path / REPOSITORY_CONFIG
    return json.dumps(json.loads(config.read_text())) if config.is_file() else arch


def _digest(identity: str, weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(identity.encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _results(asked: Path, path: Path, content: dict[str, Any], *, plain: bool) -> Path:
    """Beside the checkpoints of a run, in `eval_results`; the name says which checkpoint it was.

    What stands under a checkpoint's name is of the moving average where there is one; results of
    the weights beside it (`plain`) have a name of their own.
    """
    name = path.stem
    if name == "epoch_latest" and "epoch" in content:
        name = f"epoch_{int(content['epoch'])}"
    if asked.is_dir() and path.parent == asked:
        name = "repository"
    if plain:
        name = f"{name}_{PLAIN}"
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return folder / "eval_results" / f"{name}_eval_results.jsonl"
