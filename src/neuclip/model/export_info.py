"""Facts about a model that an export needs: configuration, preprocessing, tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import open_clip

from neuclip.model.clip import OWN_CONFIGS, Clip


def model_config(name: str) -> dict[str, Any]:
    """The content of open_clip's configuration file: `embed_dim`, `vision_cfg`, `text_cfg`, ...

    Args:
        name: as in `build_clip`.
    """
    config = open_clip.get_model_config(name)
    assert config is not None
    return config


def is_published(name: str) -> bool:
    """Whether open_clip ships a model of this name."""
    return not name.startswith("local-dir:") and not (OWN_CONFIGS / f"{name}.json").is_file()


def preprocessing(clip: Clip) -> dict[str, Any]:
    """The preprocessing of images: `size`, `mean`, `std`, `interpolation`, `resize_mode`, ..."""
    return dict(clip.towers.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of a byte-pair tokenizer.

    Attributes:
        numbers: token to its number; the start and the end of a text are the last two.
        merges: pairs of tokens, in the order of merging.
    """

    numbers: dict[str, int]
    merges: list[tuple[str, str]]


def vocabulary(clip: Clip) -> Vocabulary | None:
    """The vocabulary of CLIP's own tokenizer; none if the model has another tokenizer."""
    tokenizer = clip.tokenize
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        return None
    ranks = cast("dict[tuple[str, str], int]", tokenizer.bpe_ranks)
    return Vocabulary(dict(tokenizer.encoder), sorted(ranks, key=ranks.__getitem__))


def save_tokenizer(clip: Clip, folder: Path) -> None:
    """Writes the files of a Hugging Face tokenizer; CLIP's own needs none."""
    if vocabulary(clip) is None:
        clip.tokenize.save_pretrained(folder)  # type: ignore[attr-defined]
