"""A sample, what can be wrong with one, and what a source holds besides its samples."""

from dataclasses import dataclass, field
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
    "label",
    "hard_negative",
    "pair_weight",
    "duplicate_key",
    "member_name",
    "member_size",
    "member_type",
    "shard",
    "shard_changed",
]
INDEX_KINDS: frozenset[DamageKind] = frozenset(
    ("duplicate_key", "member_name", "member_size", "member_type", "shard")
)
"""Found once, when a shard is indexed; the other kinds are found each time a sample is read."""

ImageT = TypeVar("ImageT")
_OtherT = TypeVar("_OtherT")


@dataclass(frozen=True)
class Annotations:
    """What a sample says of its pair besides the captions.

    Attributes:
        caption_weights: how likely each caption is drawn, in proportion; empty: all alike.
        label: the label as a text; empty if the sample has none.
        negatives: hard negative captions.
        pair_weight: weight of the pair in the loss.
    """

    caption_weights: tuple[float, ...] = ()
    label: str = ""
    negatives: tuple[str, ...] = ()
    pair_weight: float = 1.0


NO_ANNOTATIONS = Annotations()


@dataclass(frozen=True)
class Sample(Generic[ImageT]):
    """A sample; its image is the content of an image file, or what a decoder makes of it.

    Attributes:
        key: name of the sample in its source.
        image: the image.
        captions: the captions, as they will be tokenized; empty if the sample has none.
        class_index: class index, in evaluation splits.
        metadata: content of the `.npy` file, in evaluation splits.
        annotations: what the flags ask for besides: label, hard negatives, weights.
    """

    key: str
    image: ImageT
    captions: tuple[str, ...]
    class_index: int | None = None
    metadata: bytes | None = None
    annotations: Annotations = NO_ANNOTATIONS

    @property
    def caption(self) -> str:
        """The first caption; empty if the sample has none."""
        return self.captions[0] if self.captions else ""

    def with_image(self, image: _OtherT) -> "Sample[_OtherT]":
        """The sample with its image in another form."""
        return Sample(
            self.key, image, self.captions, self.class_index, self.metadata, self.annotations
        )


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

    def __post_init__(self) -> None:
        # They hold text of files, and go to the terminal, to logs and to an HTML page.
        for name, length in (("shard", 4096), ("key", 200), ("detail", 300)):
            object.__setattr__(self, name, printable(getattr(self, name), length))

    def __str__(self) -> str:
        where = f"{self.shard}, sample {self.key}" if self.key else self.shard
        return f"{where}: {self.kind}: {self.detail}"


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


UnusedKind = Literal[
    "ending",
    "hidden",
    "repeated",
    "alone",
    "link_broken",
    "link_repeated",
    "special",
    "unreadable",
]

_REASONS: dict[UnusedKind, str] = {
    "ending": "unknown ending",
    "hidden": "hidden, or of macOS",
    "repeated": "second of its kind in a sample",
    "alone": "without the rest of a sample",
    "link_broken": "link that leads nowhere",
    "link_repeated": "link to a folder that is read already",
    "special": "not a regular file",
    "unreadable": "cannot be opened",
}
_EXAMPLES = 5


@dataclass
class Tally:
    """Counts the files or tar members of a source, and those that are not read.

    Attributes:
        unit: what is counted, such as members.
        total: all of them.
        numbers: those that are not read, by kind.
        examples: some names or endings, by kind.
    """

    unit: str
    total: int = 0
    numbers: dict[UnusedKind, int] = field(default_factory=dict[UnusedKind, int])
    examples: dict[UnusedKind, list[str]] = field(default_factory=dict[UnusedKind, list[str]])

    def add(self, kind: UnusedKind, example: str, number: int = 1) -> None:
        """Counts something that is not read.

        Args:
            kind: why.
            example: its name or ending; the first few different ones are kept.
            number: how many it stands for.
        """
        self.numbers[kind] = self.numbers.get(kind, 0) + number
        kept = self.examples.setdefault(kind, [])
        if len(kept) < _EXAMPLES:
            example = printable(example)
            if example not in kept:
                kept.append(example)

    def merge(self, other: "Tally") -> None:
        """Adds the counts of another part of the source."""
        self.total += other.total
        for kind, number in other.numbers.items():
            self.numbers[kind] = self.numbers.get(kind, 0) + number
            kept = self.examples.setdefault(kind, [])
            new = [example for example in other.examples.get(kind, ()) if example not in kept]
            kept += new[: _EXAMPLES - len(kept)]

    def lines(self) -> tuple[str, ...]:
        """What is not read, in one line per reason, most of it first."""
        return tuple(
            f"{number:,} of {self.total:,} {self.unit}, {_REASONS[kind]} ({self._shown(kind)})"
            for kind, number in sorted(self.numbers.items(), key=lambda item: -item[1])
        )

    def _shown(self, kind: UnusedKind) -> str:
        """Some examples of one kind."""
        examples = self.examples[kind]
        more = ", ..." if len(examples) == _EXAMPLES and self.numbers[kind] > _EXAMPLES else ""
        return ", ".join(examples) + more
