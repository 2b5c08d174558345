"""Some captions with the five pictures that the model finds for them: numbers one can look at."""

import base64
import io
from collections.abc import Callable

import torch
from PIL import Image

from neuclip.evaluation.interfaces import EncodedSplit, first_of_each
from neuclip.evaluation.results import Gallery, Picture, Query, Retrieved

RETRIEVED = 5


def make_gallery(
    split: str,
    encoded: EncodedSplit,
    picture: Callable[[int], Image.Image],
    *,
    queries: int = 8,
    thumbnail: int = 64,
    seed: int = 0,
) -> Gallery:
    """Draws captions at random (not chosen by success) and retrieves pictures for them.

    Args:
        split: Name of the split.
        encoded: Its features.
        picture: Decodes the picture of a sample by its position in the split's index.
        queries: How many captions, at most.
        thumbnail: Longest side of the pictures, in pixels.
        seed: Seed of the draw.
    """
    images, texts = first_of_each(encoded.image_groups), first_of_each(encoded.text_groups)
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:queries]
    scores = encoded.text_features[texts[drawn]] @ encoded.image_features[images].T
    best = scores.to("cpu").topk(min(RETRIEVED, len(images)), dim=1)

    def shown(sample: int) -> Picture:
        image = picture(int(encoded.sample_ids[sample]))
        return Picture(encoded.keys[sample], encoded.captions[sample], _png(image, thumbnail))

    found: list[Query] = []
    for text, values, groups in zip(drawn, best.values, best.indices, strict=True):
        own = int(texts[text])
        right = set(encoded.image_groups[encoded.text_groups == text].tolist())
        results = [
            Retrieved(shown(int(images[group])), float(score), int(group) in right)
            for score, group in zip(values, groups, strict=True)
        ]
        found.append(Query(encoded.captions[own], shown(own), results))
    return Gallery(split, seed, found)


def _png(picture: Image.Image, side: int) -> str:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
