"""Samples that share a caption, an image file or a label, and the false negatives they make.

Counted among the samples read, which are chosen at random: the share of pairs of samples that are
false negatives of each other is then right on average for the whole source, and with it the number
expected in a batch. The number of samples with a twin is larger in the whole source.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations

from neuclip.data.groups import KINDS, NO_GROUP, text_id
from neuclip.data.samples import Sample

BATCHES = (64, 256, 1024)
"""Batch sizes of the report."""
POOL = 8192
"""Size of the pool of `neuclip_pool`, for the report."""


@dataclass
class Duplicates:
    """The ids of the samples read.

    Attributes:
        ids: of each sample its first caption, image file and label, as in `neuclip.data.groups`.
    """

    ids: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])

    def add(self, sample: Sample[int]) -> None:
        """Adds a sample whose image is the id of its file."""
        label = sample.annotations.label
        self.ids.append((text_id(sample.caption), sample.image, text_id(label)))

    def sharing(self, kind: int) -> int:
        """Number of samples that share their id of a kind (an index of `KINDS`) with another."""
        return sum(count for count in self._counts(kind).values() if count > 1)

    def distinct(self, kind: int) -> int:
        """Number of different ids of a kind."""
        return len(self._counts(kind))

    def given(self, kind: int) -> int:
        """Number of samples with an id of a kind."""
        return sum(self._counts(kind).values())

    @property
    def largest_share(self) -> float:
        """Size of the largest group of any kind, as a fraction of the samples."""
        most = max((max(self._counts(kind).values(), default=0) for kind in range(3)), default=0)
        return most / max(1, len(self.ids))

    @property
    def pair_share(self) -> float:
        """The share of pairs of samples that agree in any kind."""
        pairs = 0
        for size in (1, 2, 3):  # pairs that agree in any kind, by inclusion and exclusion
            for kinds in combinations(range(len(KINDS)), size):
                agree = sum(count * (count - 1) // 2 for count in self._counts(*kinds).values())
                pairs += agree if size % 2 else -agree
        return pairs / max(1, len(self.ids) * (len(self.ids) - 1) // 2)

    def expected(self, batch: int) -> float:
        """Expected number of pairs in a batch that are false negatives of each other."""
        return self.pair_share * batch * (batch - 1) / 2

    def _counts(self, *kinds: int) -> Counter[tuple[int, ...]]:
        """How many samples have the same ids of these kinds; samples without one do not count."""
        chosen = (tuple(ids[kind] for kind in kinds) for ids in self.ids)
        return Counter(own for own in chosen if NO_GROUP not in own)


def duplicate_facts(found: Duplicates) -> Iterator[tuple[str, str]]:
    """Lines about duplicates, as pairs of name and value."""
    samples = len(found.ids)
    if samples < 2:
        return
    for kind, name in enumerate(KINDS):
        if found.given(kind):
            yield f"equal {name}s", _shared(found, kind)
    if not found.pair_share:
        yield "false negatives", "none among the samples read"
        return
    batches = ", ".join(f"{_number(found.expected(size))} in {size:,}" for size in BATCHES)
    yield (
        "false negatives",
        f"expected pairs in a batch: {batches}; for each sample in a pool of {POOL:,}: "
        f"{_number(found.pair_share * POOL)}",
    )
    room = int(1 / found.largest_share)
    yield (
        "what helps",
        "training pushes such pairs apart: --false-negatives mask leaves them out of the loss, "
        f"--no-duplicates out of the batches (every sample fits in batches of up to {room:,})",
    )


def _shared(found: Duplicates, kind: int) -> str:
    sharing, given, distinct = found.sharing(kind), found.given(kind), found.distinct(kind)
    name = KINDS[kind]
    if name == "label" and distinct == 1 and given > 1:
        return (
            f"all {given:,} are equal: every pair would be a false negative of every other; name "
            "another column with --label-key"
        )
    if name == "label" and sharing == 0:
        return f"none, all {given:,} differ: --label-key changes nothing"
    if sharing == 0:
        return f"none among {given:,} read"
    return f"{sharing:,} of {given:,} read share theirs with another ({distinct:,} different)"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
