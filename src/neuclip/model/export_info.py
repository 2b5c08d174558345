"""Facts about a model that an export needs: configuration, preprocessing, tokenizer."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import open_clip
from open_clip.transform import PreprocessCfg

from neuclip.model.clip import Clip

DEFAULT_PREPROCESSING = asdict(PreprocessCfg())
"""What open_clip does with images where nothing else is asked for."""


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
