"""Tar shards of JPEGs that are as large and as slow to decode as photographs."""

import io
import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

from neuclip.data.shard_writer import write_shards

WORDS = (
    *("a", "an", "the", "of", "on", "in", "with", "photo", "picture", "view", "red", "small"),
    *("old", "wooden", "street", "house", "cat", "dog", "woman", "man", "car", "boat", "river"),
    *("mountain", "sunset", "table", "flowers", "vintage", "summer", "city", "market", "kitchen"),
)


def photograph(side: int, chance: np.random.Generator) -> bytes:
    """A JPEG of quality 95 with the 1/f spectrum of natural images."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1 / side
    channels = []
    shared = chance.normal(size=(side, side))
    for _ in range(3):  # the channels of natural images correlate
        noise = shared + 0.25 * chance.normal(size=(side, side))
        field = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.5, s=(side, side))
        channels.append((field - field.mean()) / field.std())
    pixels = (128 + 50 * np.stack(channels, axis=-1)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def make_shards(
    folder: Path, samples: int, side: int, per_shard: int = 500, different: int = 200
) -> float:
    """Writes the shards; returns the mean size of a JPEG in bytes."""
    chance, words = np.random.default_rng(0), random.Random(0)
    # Making an image takes longer than decoding it, so some images repeat with new captions.
    images = [photograph(side, chance) for _ in range(min(samples, different))]

    def pairs():
        for number in range(samples):
            caption = " ".join(words.choices(WORDS, k=words.randint(5, 20)))
            yield (
                f"{number:08d}",
                {
                    "jpg": images[number % len(images)],
                    "txt": caption.encode(),
                    "json": json.dumps({"caption": caption, "key": f"{number:08d}"}).encode(),
                },
            )

    write_shards(folder, pairs(), per_shard)
    return sum(map(len, images)) / len(images)
