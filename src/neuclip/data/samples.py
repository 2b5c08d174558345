"""What a sample is, what can be wrong with one, and how its parts are decoded."""

import io
import json
from dataclasses import dataclass
from typing import Literal

from PIL import Image, UnidentifiedImageError

DamageKind = Literal[
    "image",
    "image_missing",
    "caption_missing",
    "caption_empty",
    "caption_encoding",
    "caption_json",
    "class",
    "shard",
]


@dataclass(frozen=True)
class Damage:
    """A sample, or a shard from some point on, that cannot be used.

    Attributes:
        shard: path of the shard.
        key: key of the sample; empty where the whole shard is meant.
        kind: what is wrong, as a word to count by.
        detail: what is wrong, in words.
    """

    shard: str
    key: str
    kind: DamageKind
    detail: str

    def __str__(self) -> str:
        where = f"{self.shard}, sample {self.key}" if self.key else self.shard
        return f"{where}: {self.kind}: {self.detail}"


class SampleError(Exception):
    """A sample that cannot be used; `damage` says why."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(str(damage))
        self.damage = damage


@dataclass(frozen=True)
class RawSample:
    """A decoded sample: the image is RGB, the class index that of an evaluation split's `.cls`."""

    key: str
    image: Image.Image
    caption: str
    class_index: int | None


class Unusable(Exception):
    """A part of a sample that cannot be used, before it is known whose part it is."""

    def __init__(self, kind: DamageKind, detail: str) -> None:
        super().__init__(detail)
        self.kind: DamageKind = kind
        self.detail = detail


def decode_image(content: bytes) -> Image.Image:
    """The RGB picture in an image file; raises `Unusable`."""
    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except UnidentifiedImageError as error:
        raise Unusable("image", f"no known image format ({len(content)} bytes)") from error
    except Exception as error:  # on damaged files decoders raise nearly everything
        raise Unusable("image", f"{type(error).__name__}: {error}") from error


def caption_of_json(text: str, key: str) -> str:
    """The text under `key` in a JSON object; raises `Unusable`."""
    try:
        record = json.loads(text)
    except ValueError as error:
        raise Unusable("caption_json", f"no JSON: {error}") from error
    caption = record.get(key) if isinstance(record, dict) else None
    if caption is None:
        raise Unusable("caption_missing", f"the .json has no {key!r}")
    if not isinstance(caption, str):
        raise Unusable("caption_json", f"{key!r} in the .json is no text")
    return caption
