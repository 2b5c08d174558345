"""open_clip's towers, transforms and tokenizers; only this and `export_info` import open_clip.

Models are built from their configuration files; nothing is downloaded. The temperature is kept as
open_clip does, in `logit_scale` = log(1 / temperature), so checkpoints load in open_clip unchanged.
"""

import logging
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from PIL import Image
from torch import Tensor, nn

from neuclip.errors import UserError, nearest
from neuclip.model.device import Precision

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]

MAX_LOG_SCALE = math.log(100.0)
"""open_clip's bound, a temperature of 0.01."""

_LISTING = "python -c 'import open_clip; print(*open_clip.list_models())'"

OWN_CONFIGS = Path(__file__).parent / "model_configs"
open_clip.add_model_config(OWN_CONFIGS)


@dataclass(frozen=True)
class Clip:
    """A model with its transforms and tokenizer.

    Attributes:
        name: as in `build_clip`.
        towers: called with images [batch, 3, height, width] and tokens [batch, length]; returns
            open_clip's dict: `image_features` and `text_features` [batch, dim], `logit_scale`, and
            `logit_bias` if the model has one.
        train_transform: random transform of training images.
        eval_transform: deterministic transform.
        tokenize: texts to tokens.
        embed_dim: width of the embeddings.
        precision: arithmetic of the towers.
    """

    name: str
    towers: nn.Module
    train_transform: Transform
    eval_transform: Transform
    tokenize: Tokenize
    embed_dim: int
    precision: Precision

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.precision == "amp_bf16":
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def logit_scale(self) -> float:
        """1 / temperature."""
        scale = self.towers.logit_scale
        assert isinstance(scale, Tensor)
        return float(scale.detach().exp())

    @property
    def image_size(self) -> int:
        """Longer side of the image tower's input, in pixels."""
        size = cast(int | tuple[int, int], self.towers.visual.image_size)  # type: ignore[union-attr]
        return max(size) if isinstance(size, tuple) else size

    @property
    def input_dtype(self) -> torch.dtype:
        """Data type of the image tower's input."""
        return torch.bfloat16 if self.precision == "bf16" else torch.get_default_dtype()


def model_names() -> list[str]:
    """The models that can be built by name."""
    return open_clip.list_models()


def build_clip(
    name: str,
    precision: Precision,
    device: torch.device,
    init: dict[str, float] | None = None,
    patch_dropout: float | None = None,
) -> Clip:
    """Builds a model with random weights.

    Args:
        name: a model of open_clip or `model_configs`, or `local-dir:` and the path of a Hugging
            Face repository on disk.
        precision: arithmetic of the towers.
        device: where the parameters are.
        init: initial `temperature`, and `logit_bias` for losses that learn one.
        patch_dropout: fraction of patches dropped in training; none: as in the model's
            configuration.

    Raises:
        UserError: unknown model (names the nearest), files that are not on this machine, or patch
            dropout for a model that has none.
    """
    if name not in model_names() and not name.startswith("local-dir:"):
        raise UserError(f"unknown model {name!r}; {nearest(name, model_names(), _LISTING)}")
    init = init or {}
    keywords: dict[str, Any] = {}
    if "temperature" in init:
        keywords["init_logit_scale"] = -math.log(init["temperature"])
    if "logit_bias" in init:
        keywords["init_logit_bias"] = init["logit_bias"]
    if patch_dropout is not None:
        keywords["force_patch_dropout"] = patch_dropout
    lowered = "bf16" if precision == "bf16" else "fp32"
    try:
        with _quiet():
            towers, train_transform, eval_transform = open_clip.create_model_and_transforms(
                name, precision=lowered, device=device, output_dict=True, **keywords
            )
            tokenize = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ImportError, ValueError) as error:
        raise UserError(
            f"model {name!r} needs files that are not on this machine (its text tower or tokenizer "
            f"comes from a hub): {str(error).splitlines()[0]}"
        ) from None
    if patch_dropout and not _drops_patches(towers):
        raise UserError(
            f"--force-patch-dropout {patch_dropout:g}: the image tower of {name} "
            f"({type(towers.visual).__name__}) has no patch dropout; remove the flag"
        )
    config = open_clip.get_model_config(name)
    assert config is not None
    return Clip(
        name=name,
        towers=towers,
        train_transform=cast(Transform, train_transform),
        eval_transform=cast(Transform, eval_transform),
        tokenize=tokenize,
        embed_dim=int(config["embed_dim"]),
        precision=precision,
    )


def _drops_patches(towers: nn.Module) -> bool:
    visual = cast(nn.Module, towers.visual)
    return any("PatchDropout" in type(module).__name__ for module in visual.modules())


def init_for(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The `init` of `build_clip` for towers that load these weights: a bias if they contain one.

    Losses that learn a bias keep it in the towers, as open_clip does.
    """
    return {"logit_bias": 0.0} if any(key.endswith("logit_bias") for key in weights) else {}


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """open_clip's ImageNet class names by class index, and its templates with `{c}`."""
    templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return list(open_clip.IMAGENET_CLASSNAMES), templates


def clamp_logit_scale(towers: nn.Module) -> None:
    """Clamps the temperature to [0.01, 1], as open_clip does after each step."""
    scale = towers.logit_scale
    assert isinstance(scale, Tensor)
    with torch.no_grad():
        scale.clamp_(0, MAX_LOG_SCALE)


@contextmanager
def _quiet() -> Generator[None]:
    """Suppresses open_clip's warning, on the root logger, that the weights are random."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
