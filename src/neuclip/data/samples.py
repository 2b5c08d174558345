"""A sample, and what can be wrong with one."""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from neuclip.errors import printable

DamageKind = Literal[
    "image",
    "image_missing",
    "image_truncated",
    "image_too_large",
    "caption_missing",
    "caption_empty",
    "caption_encoding",
    "caption_json",
    "caption_type",
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
"""Found once, when a shard is indexed; the other kinds are found each time a sample is read."""

ImageT = TypeVar("ImageT")
_OtherT = TypeVar("_OtherT")


@dataclass(frozen=True)
class Sample(Generic[ImageT]):
    """A sample; its image is the content of an image file, or what a decoder makes of it.

    Attributes:
        key: name of the sample in its source.
        image: the image.
        captions: the captions, as they will be tokenized; empty if the sample has none.
        class_index: class index, in evaluation splits.
        metadata: content of the `.npy` file, in evaluation splits.
    """

    key: str
    image: ImageT
    captions: tuple[str, ...]
    class_index: int | None = None
    metadata: bytes | None = None

    @property
    def caption(self) -> str:
        """The first caption; empty if the sample has none."""
        return self.captions[0] if self.captions else ""

    def with_image(self, image: _OtherT) -> "Sample[_OtherT]":
        """The sample with its image in another form."""
        return Sample(self.key, image, self.captions, self.class_index, self.metadata)


@dataclass(frozen=True)
class Damage:
    """A corrupt sample, or a shard that is corrupt from some point on.

    Attributes:
        shard: path or address of the shard.
        key: key of the sample; empty for a whole shard.
        kind: category, to count by.
        detail: explanation.
    """

    shard: str
    key: str
    kind: DamageKind
    detail: str

    def __str__(self) -> str:
        where = f"{self.shard}, sample {printable(self.key)}" if self.key else self.shard
        return f"{where}: {self.kind}: {printable(self.detail, 300)}"


class SampleError(Exception):
    """A corrupt sample; `damage` gives the reason."""

    def __init__(self, damage: Damage) -> None:
        super().__init__(str(damage))
        self.damage = damage


class Unusable(Exception):
    """A corrupt part of a sample. `Source` adds the sample's name: see `SampleError`."""

    def __init__(self, kind: DamageKind, detail: str) -> None:
        super().__init__(detail)
        self.kind: DamageKind = kind
        self.detail = detail
