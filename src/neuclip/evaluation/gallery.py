"""Example retrievals: some captions, each with the five images that the model retrieves."""

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
    decode: Callable[[int], Image.Image],
    *,
    queries: int = 8,
    thumbnail: int = 64,
    seed: int = 0,
) -> Gallery:
    """Draws captions at random (regardless of success) and retrieves images for them.

    Args:
        split: name of the split.
        encoded: its features.
        decode: returns the image at a position of the split's index.
        queries: largest number of captions.
        thumbnail: longest side of the images, in pixels.
        seed: seed of the draw.
    """
    images, texts = first_of_each(encoded.image_groups), first_of_each(encoded.text_groups)
    drawn = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:queries]
    scores = encoded.text_features[texts[drawn]] @ encoded.image_features[images].T
    best = scores.to("cpu").topk(min(RETRIEVED, len(images)), dim=1)

    def shown(sample: int) -> Picture:
        image = decode(int(encoded.sample_ids[sample]))
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


def _png(image: Image.Image, side: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
