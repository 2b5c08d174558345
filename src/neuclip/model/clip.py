"""open_clip's towers, transforms and tokenizers.

Models are built from their architecture; nothing is downloaded. The temperature is kept as
open_clip does, in `logit_scale` = log(1 / temperature), so checkpoints load in open_clip unchanged.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from neuclip.errors import UserError, printable
from neuclip.method.notation import LOGIT_SCALE_BOUNDS
from neuclip.model.architecture import (
    LOCAL,
    REPOSITORY_CONFIG,
    Architecture,
    find_architecture,
)
from neuclip.model.device import Precision

Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]

META = torch.device("meta")
"""The device of towers that have shapes and no values."""


@dataclass(frozen=True)
class Clip:
    """A model with its transforms and tokenizer.

    Attributes:
        architecture: what the towers were built from.
        towers: called with images [batch, 3, height, width] and tokens [batch, length]; returns
            open_clip's dict: `image_features` and `text_features` [batch, dim], `logit_scale`, and
            `logit_bias` if the model has one.
        train_transform: random transform of training images.
        eval_transform: deterministic transform.
        tokenize: texts to tokens.
        embed_dim: width of the embeddings.
        precision: arithmetic of the towers.
    """

    architecture: Architecture
    towers: nn.Module
    train_transform: Transform
    eval_transform: Transform
    tokenize: Tokenize
    embed_dim: int
    precision: Precision

    @property
    def name(self) -> str:
        """The name of the architecture."""
        return self.architecture.name

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The type of most activations under autocast; none without autocast."""
        return {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(self.precision)

    @property
    def logit_scale(self) -> float:
        """1 / temperature."""
        scale = self.towers.logit_scale
        assert isinstance(scale, Tensor)
        return float(scale.detach().exp())

    @property
    def image_size(self) -> int:
        """Longer side of the image tower's input, in pixels."""
        size = cast(int | Sequence[int], self.towers.visual.image_size)  # type: ignore[union-attr]
        return size if isinstance(size, int) else max(size)

    @property
    def input_dtype(self) -> torch.dtype:
        """Data type of the image tower's input."""
        return torch.bfloat16 if self.precision == "bf16" else torch.get_default_dtype()

    def image_format(self, device: torch.device) -> torch.memory_format:
        """The memory layout of images: channels last, except where torch cannot train with it.

        On a CPU, torch writes outside of its memory in the backward pass of a 1 x 1 convolution
        with a stride that reads the image itself (MobileCLIP's first layer).
        """
        if device.type == "cpu" and self._skips_pixels:
            return torch.contiguous_format
        return torch.channels_last

    @cached_property
    def _skips_pixels(self) -> bool:
        return any(
            isinstance(layer, nn.Conv2d)
            and layer.in_channels == 3
            and layer.kernel_size == (1, 1)
            and max(layer.stride) > 1
            for layer in self.towers.modules()
        )


def build_clip(
    architecture: str | Architecture,
    precision: Precision,
    device: torch.device,
    init: dict[str, float] | None = None,
    patch_dropout: float | None = None,
    *,
    pretrained_image: bool = False,
) -> Clip:
    """Builds a model with random weights.

    Args:
        architecture: what to build, or its name as in `find_architecture`.
        precision: arithmetic of the towers.
        device: where the parameters are.
        init: initial `temperature`, and `logit_bias` for losses that learn one.
        patch_dropout: fraction of patches dropped in training; none: as in the model's
            configuration.
        pretrained_image: take timm's weights of the image tower, which are in the hub's cache.

    Raises:
        UserError: unknown model (names the nearest), files that are not on this machine, or patch
            dropout for a model that has none.
    """
    if isinstance(architecture, str):
        architecture = find_architecture(architecture)
    init = init or {}
    keywords: dict[str, Any] = {}
    if "temperature" in init:
        keywords["init_logit_scale"] = -math.log(init["temperature"])
    if "logit_bias" in init:
        keywords["init_logit_bias"] = init["logit_bias"]
    if patch_dropout is not None:
        keywords["force_patch_dropout"] = patch_dropout
    if pretrained_image:
        keywords["pretrained_image"] = True
    with _building(architecture, hub=architecture.takes_known_files and not pretrained_image):
        tokenize = _tokenizer(architecture)
        towers, train_transform, eval_transform = _create(architecture, precision, device, keywords)
    if patch_dropout and not _drops_patches(towers):
        raise UserError(
            f"--force-patch-dropout {patch_dropout:g}: the image tower of {architecture.name} "
            f"({type(towers.visual).__name__}) has no patch dropout; remove the flag"
        )
    return Clip(
        architecture=architecture,
        towers=towers,
        train_transform=cast(Transform, train_transform),
        eval_transform=cast(Transform, eval_transform),
        tokenize=tokenize,
        embed_dim=int(architecture.config["embed_dim"]),
        precision=precision,
    )


def towers_without_values(architecture: Architecture) -> nn.Module:
    """The towers on the meta device: their weights have shapes, and take no memory.

    Raises:
        UserError: open_clip cannot build them.
    """
    with _building(architecture, hub=architecture.takes_known_files):
        return _create(architecture, "fp32", META, {})[0]


@contextmanager
def _building(architecture: Architecture, *, hub: bool) -> Generator[None]:
    """Turns what open_clip raises into messages; keeps it from the hub unless that is allowed."""
    try:
        with _quiet(), nullcontext() if hub else _without_hub():
            yield
    except (OSError, RuntimeError, ImportError, ValueError, MemoryError) as error:
        raise _not_built(architecture, error) from None
    except (TypeError, AssertionError, ArithmeticError, LookupError, AttributeError) as error:
        if architecture.known:
            raise
        raise _not_built(architecture, error) from None


def _create(
    architecture: Architecture, precision: Precision, device: torch.device, keywords: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Towers and transforms. open_clip builds them from a repository without weights."""
    if architecture.resized is not None:
        keywords["force_image_size"] = architecture.resized  # towers of timm need it said
    with TemporaryDirectory(prefix="neuclip-") as folder:
        tree = {"model_cfg": architecture.config, "preprocess_cfg": architecture.all_preprocessing}
        (Path(folder) / REPOSITORY_CONFIG).write_text(json.dumps(tree), encoding="utf-8")
        # open_clip builds on the CPU, and moves the towers to the device at the end.
        with META if device == META else nullcontext():
            return open_clip.create_model_and_transforms(
                f"{LOCAL}{folder}",
                load_weights=False,
                precision="bf16" if precision == "bf16" else "fp32",
                device=device,
                output_dict=True,
                **keywords,
            )


def _tokenizer(architecture: Architecture) -> Tokenize:
    text = architecture.config["text_cfg"]
    length = text.get("context_length")
    folder = architecture.repository
    if folder is not None and (folder / REPOSITORY_CONFIG).is_file():
        return open_clip.get_tokenizer(f"{LOCAL}{folder}", context_length=length)
    if architecture.known:
        return open_clip.get_tokenizer(architecture.name, context_length=length)
    keywords = text.get("tokenizer_kwargs") or {}
    if length is not None:
        keywords = {**keywords, "context_length": length}
    files = text.get("hf_tokenizer_name")
    if files:
        if folder is not None and any((folder / name).is_file() for name in _TOKENIZER_FILES):
            files = str(folder)  # transformers' own repository
        mode = text.get("tokenizer_mode")
        return HFTokenizer(files, tokenizer_mode=mode, **keywords)
    return open_clip.SimpleTokenizer(**keywords)


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


def _not_built(architecture: Architecture, error: Exception) -> UserError:
    name = architecture.name
    why = printable(str(error) or type(error).__name__, 200)
    config = architecture.config
    hub = [str(config[part].get(key, "")) for part, key in _HUB_PARTS]
    if any(hub[:2]) or hub[2].startswith("hf") or architecture.known:
        return UserError(
            f"model {name!r} needs files that are not on this machine (a tower or the tokenizer "
            f"comes from a hub, and nothing is downloaded): {why}"
        )
    size = architecture.resized
    which = "this configuration" if size is None else f"it with --force-image-size {size}"
    return UserError(f"model {name!r}: open_clip cannot build {which}: {why}")


_HUB_PARTS = (
    ("text_cfg", "hf_model_name"),
    ("text_cfg", "hf_tokenizer_name"),
    ("vision_cfg", "timm_model_name"),
)


def fits_as_designed(clip: Clip) -> bool:
    """Whether open_clip's towers without a forced image size have weights of the same shapes."""
    if clip.architecture.resized is None:
        return True
    designed = replace(clip.architecture, resized=None)
    other = towers_without_values(designed).state_dict()
    return all(
        other[name].shape == value.shape
        for name, value in clip.towers.state_dict().items()
        if name in other
    )


def augmented(clip: Clip, settings: Mapping[str, Any]) -> Clip:
    """The model with another random transform of its training images.

    Args:
        clip: the model.
        settings: by the names of open_clip's AugmentationCfg; only those that are not none.
    """
    own = cast(dict[str, Any], clip.towers.visual.preprocess_cfg)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        # It counts color_jitter and gray_scale_prob as unused although it has applied them.
        warnings.filterwarnings("ignore", "Unused augmentation cfg items")
        transform = image_transform_v2(PreprocessCfg(**own), is_train=True, aug_cfg=dict(settings))
    return replace(clip, train_transform=cast(Transform, transform))


def _drops_patches(towers: nn.Module) -> bool:
    visual = cast(nn.Module, towers.visual)
    return any("PatchDropout" in type(module).__name__ for module in visual.modules())


def init_for(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The `init` of `build_clip` for towers that load these weights: a bias if they contain one.

    Losses that learn a bias keep it in the towers, as open_clip does.
    """
    return {"logit_bias": 0.0} if any(key.endswith("logit_bias") for key in weights) else {}


def clip_tokenizer() -> Tokenize:
    """CLIP's own tokenizer: byte pairs, and a context of 77 tokens."""
    return open_clip.SimpleTokenizer()


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """open_clip's ImageNet class names by class index, and its templates with `{c}`."""
    templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return list(open_clip.IMAGENET_CLASSNAMES), templates


def clamp_logit_scale(towers: nn.Module, bounds: tuple[float, float] = LOGIT_SCALE_BOUNDS) -> None:
    """Clamps 1 / temperature to its bounds."""
    scale = towers.logit_scale
    assert isinstance(scale, Tensor)
    with torch.no_grad():
        scale.clamp_(math.log(bounds[0]), math.log(bounds[1]))


@contextmanager
def _without_hub() -> Generator[None]:
    """Refuses requests to the hub: open_clip, timm and transformers take what is on this machine.

    A configuration from elsewhere may name towers, tokenizers and weights of any repository.
    """
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Generator[None]:
    """Suppresses open_clip's warning, on the root logger, that the weights are random."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
