"""open_clip's towers, transforms and tokenizers behind one small face; nothing else imports it.

Models are built from their configuration files: nothing is downloaded. The temperature stays where
open_clip keeps it (`logit_scale`, its logarithm), so checkpoints load in open_clip unchanged.
"""

import logging
import math
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor, nn

from neuclip.errors import UserError
from neuclip.methods import nearest

Precision = Literal["fp32", "amp_bf16", "bf16"]
Transform = Callable[[Image.Image], Tensor]
Tokenize = Callable[[list[str]], Tensor]

MAX_LOG_SCALE = math.log(100.0)
"""open_clip's bound: the temperature stays at or above 0.01."""

OWN_CONFIGS = Path(__file__).parent / "model_configs"
open_clip.add_model_config(OWN_CONFIGS)


@dataclass(frozen=True)
class Clip:
    """A model with what belongs to it."""

    name: str
    towers: nn.Module
    """Called with images and tokens; returns open_clip's dict (`image_features`, `text_features`,
    `logit_scale` and perhaps `logit_bias`)."""
    train_transform: Transform
    eval_transform: Transform
    tokenize: Tokenize
    embed_dim: int
    precision: Precision

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The arithmetic of the forward pass."""
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
        """Longer side in pixels of what the image tower takes."""
        size = cast(int | tuple[int, int], self.towers.visual.image_size)  # type: ignore[union-attr]
        return max(size) if isinstance(size, tuple) else size

    @property
    def input_dtype(self) -> torch.dtype:
        """What the image tower takes."""
        return torch.bfloat16 if self.precision == "bf16" else torch.get_default_dtype()


def model_names() -> list[str]:
    """All models that can be built."""
    return open_clip.list_models()


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device to compute on.

    Raises:
        UserError: CUDA was asked for and is not there.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this machine or this build of torch has no CUDA; use cpu")
    if torch.cuda.device_count() == 1 and "SLURM_PROCID" in os.environ:
        return torch.device("cuda", 0)  # --gpus-per-task: each process sees its own alone
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are "
            "visible; start at most one process per GPU"
        )
    return torch.device("cuda", local_rank)


def choose_precision(wanted: Precision | Literal["auto"], device: torch.device) -> Precision:
    """`auto` is amp_bf16 on a GPU that has bfloat16, and fp32 elsewhere."""
    if wanted != "auto":
        return wanted
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "amp_bf16" if bf16 else "fp32"


def build_clip(
    name: str,
    precision: Precision,
    device: torch.device,
    init: dict[str, float] | None = None,
    patch_dropout: float | None = None,
) -> Clip:
    """Builds a model with fresh weights.

    Args:
        name: an open_clip model, glyph-tiny, or `local-dir:` and a Hugging Face repository on disk.
        precision: arithmetic of the towers.
        device: where the parameters live.
        init: first `temperature`, and `logit_bias` for losses that learn one.
        patch_dropout: share of an image's patches left out in training; none: the model's own.

    Raises:
        UserError: unknown model (names the nearest), one whose parts are not on this machine, or
            one without patches to leave out.
    """
    if name not in model_names() and not name.startswith("local-dir:"):
        raise UserError(f"unknown model {name!r}; {nearest(name, model_names())}")
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
            f"model {name!r} needs parts that are not on this machine (its text tower or tokenizer "
            f"comes from a hub): {str(error).splitlines()[0]}"
        ) from None
    if patch_dropout and not _drops_patches(towers):
        raise UserError(
            f"--force-patch-dropout {patch_dropout:g}: the image tower of {name} "
            f"({type(towers.visual).__name__}) leaves no patches out; remove the flag"
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
    """The `init` of `build_clip` for towers that take these weights: a bias if they have one.

    Losses that learn a bias keep it in the towers; its value comes with the weights.
    """
    return {"logit_bias": 0.0} if any(key.endswith("logit_bias") for key in weights) else {}


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """open_clip's class names of ImageNet by class index, and its templates with `{c}`."""
    templates = [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    return list(open_clip.IMAGENET_CLASSNAMES), templates


def clamp_logit_scale(towers: nn.Module) -> None:
    """Keeps the temperature in [0.01, 1], as open_clip does after each step."""
    scale = towers.logit_scale
    assert isinstance(scale, Tensor)
    with torch.no_grad():
        scale.clamp_(0, MAX_LOG_SCALE)


class Encoder:
    """The towers as judges see them: unit-norm float32 embeddings, without gradient.

    Args:
        clip: the model.
        device: where it lives; inputs are moved there.
    """

    def __init__(self, clip: Clip, device: torch.device) -> None:
        self._clip = clip
        self._device = device

    @property
    def device(self) -> torch.device:
        """Where the towers are, and the embeddings."""
        return self._device

    @property
    def transform(self) -> Transform:
        """The transform of evaluation images."""
        return self._clip.eval_transform

    @torch.no_grad()
    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch dim"]:
        """Embeddings of transformed images."""
        images = images.to(self._device, self._clip.input_dtype, non_blocking=True)
        return self._encode(self._clip.towers.encode_image, images)

    @torch.no_grad()
    def encode_text(self, tokens: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch dim"]:
        """Embeddings of tokens."""
        return self._encode(self._clip.towers.encode_text, tokens.to(self._device))

    @property
    def tokenize(self) -> Tokenize:
        """Texts to tokens [texts, length]; no bound method, which would carry the model along."""
        return self._clip.tokenize

    def _encode(self, tower: Any, inputs: Tensor) -> Tensor:  # noqa: ANN401  open_clip's method
        was_training = self._clip.towers.training
        self._clip.towers.eval()
        try:
            with self._clip.autocast(self._device):
                features: Tensor = tower(inputs)
        finally:
            self._clip.towers.train(was_training)
        return nn.functional.normalize(features.float(), dim=-1)


# What an export needs of open_clip ---------------------------------------------------------------


def model_config(name: str) -> dict[str, Any]:
    """An architecture as open_clip's configuration files state it: `embed_dim`, `vision_cfg`, ...

    Args:
        name: as `build_clip` takes it.
    """
    config = open_clip.get_model_config(name)
    assert config is not None
    return config


def is_published(name: str) -> bool:
    """Whether open_clip itself knows a model of this name."""
    return not name.startswith("local-dir:") and not (OWN_CONFIGS / f"{name}.json").is_file()


def preprocessing(clip: Clip) -> dict[str, Any]:
    """How pictures are made ready: `size`, `mean`, `std`, `interpolation`, `resize_mode`, ..."""
    return dict(clip.towers.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Vocabulary:
    """What a byte-pair tokenizer is made of.

    Attributes:
        numbers: number of every token; those of the start and the end of a text are the last two.
        merges: pairs of tokens, in the order in which they are merged.
    """

    numbers: dict[str, int]
    merges: list[tuple[str, str]]


def vocabulary(clip: Clip) -> Vocabulary | None:
    """The vocabulary of CLIP's own tokenizer; none where a model has another one."""
    tokenizer = clip.tokenize
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        return None
    ranks = cast("dict[tuple[str, str], int]", tokenizer.bpe_ranks)
    return Vocabulary(dict(tokenizer.encoder), sorted(ranks, key=ranks.__getitem__))


def save_tokenizer(clip: Clip, folder: Path) -> None:
    """Writes the files of a tokenizer that came from a hub; CLIP's own needs none."""
    if vocabulary(clip) is None:
        clip.tokenize.save_pretrained(folder)  # type: ignore[attr-defined]


@contextmanager
def _quiet() -> Generator[None]:
    """open_clip warns on the root logger that weights are random: that is what was asked for."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
