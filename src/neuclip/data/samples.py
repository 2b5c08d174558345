"""What a sample is, what can be wrong with one, and how its parts are decoded."""

import json
from dataclasses import dataclass
from typing import Literal

from PIL import Image

DamageKind = Literal[
    "image",
    "image_missing",
    "image_truncated",
    "image_too_large",
    "caption_missing",
    "caption_empty",
    "caption_encoding",
    "caption_json",
    "class",
    "duplicate_key",
    "member_name",
    "member_type",
    "shard",
    "shard_changed",
]
INDEX_KINDS: frozenset[DamageKind] = frozenset(
    ("duplicate_key", "member_name", "member_type", "shard")
)
"""What a scan of the shards finds, once; all else shows when a sample is read, each time."""

_CAPTION_LENGTH = 4096  # characters; the longest token of open_clip's vocabulary has 25


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
    """A decoded sample: an RGB image; class index and metadata from a split's `.cls`, `.npy`."""

    key: str
    image: Image.Image
    caption: str
    class_index: int | None
    metadata: bytes | None = None


class Unusable(Exception):
    """A part of a sample that cannot be used, before it is known whose part it is."""

    def __init__(self, kind: DamageKind, detail: str) -> None:
        super().__init__(detail)
        self.kind: DamageKind = kind
        self.detail = detail


def bounded_caption(text: str) -> str:
    """A caption without surrounding space; what no model reads of a very long one is left out.

    Tokenizers cut at some 77 tokens, but only after all the work: seconds for a megabyte.
    """
    text = text.strip()
    if len(text) > _CAPTION_LENGTH:
        # Space first: a tokenizer drops it, and words may follow after much of it.
        text = " ".join(text.split(None, _CAPTION_LENGTH)[:_CAPTION_LENGTH])[:_CAPTION_LENGTH]
    return text


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
