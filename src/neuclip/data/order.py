"""The order in which an epoch visits the samples, and all other random choices in reading.

Everything is a pure function of (seed, epoch, place). Nothing depends on worker processes, ranks or
history, so any place in any epoch can be reached without replaying earlier ones.

Samples are stored in blocks (a shard, a row group of a table). Without a window, an epoch is one
shuffle of all samples. With a window of k blocks, the blocks are shuffled, and then the samples
within each k consecutive blocks: the blocks read at a time are few, and known in advance.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from neuclip.data.distinct import Distinct

Positions = NDArray[np.int64]

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_BLOCKS, _SAMPLES, _EXTRAS, _DEALT = 1, 2, 3, 4  # purpose; a SeedSequence ignores a final 0
_KEPT_WINDOWS = 2  # a batch may extend over two


@dataclass(frozen=True)
class SourceSpan:
    """The consecutive blocks of a layout that come from one source.

    Attributes:
        name: the user's name of the source.
        blocks: number of blocks.
        samples: number of samples.
        factor: visits per sample and round; 1.5: all samples once, and half of them once more.
    """

    name: str
    blocks: int
    samples: int
    factor: float = 1.0

    @property
    def full_visits(self) -> int:
        """Visits that every sample gets in a round."""
        return int(self.factor)

    @property
    def extra_visits(self) -> int:
        """Samples that get one more visit in a round; different ones each round."""
        return round((self.factor - self.full_visits) * self.samples)

    @property
    def visits(self) -> int:
        """Visits in a round."""
        return self.full_visits * self.samples + self.extra_visits


@dataclass(frozen=True)
class Layout:
    """The blocks that samples are stored in.

    Attributes:
        ends: [blocks] block b holds the positions from `ends[b - 1]` (or 0) to `ends[b]`.
        spans: the sources of the blocks, in order.
    """

    ends: Positions
    spans: tuple[SourceSpan, ...]

    @classmethod
    def of(cls, name: str, sizes: Iterable[int]) -> "Layout":
        """The layout of one source, from the number of samples in each block."""
        ends = np.cumsum(np.fromiter(sizes, dtype=np.int64), dtype=np.int64)
        return cls(ends, (SourceSpan(name, len(ends), int(ends[-1]) if len(ends) else 0),))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def visits(self) -> int:
        """Length of a round, in which every sample gets the visits of its source's factor."""
        return sum(span.visits for span in self.spans)

    def digest(self, window: int, length: int | None) -> str:
        """Digest of everything but the seed that decides the order of an epoch.

        Args:
            window: blocks shuffled together.
            length: samples in an epoch; None: a round.
        """
        rest = [window, length or self.visits, [(span.samples, span.factor) for span in self.spans]]
        content = self.ends.astype("<i8").tobytes() + repr(rest).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    @cached_property
    def starts(self) -> Positions:
        """[blocks] first position of each block."""
        return np.concatenate([np.zeros(1, dtype=np.int64), self.ends[:-1]])

    def block(self, position: int) -> int:
        """The block that contains a position."""
        return int(np.searchsorted(self.ends, position, side="right"))


@dataclass(frozen=True)
class _Visit:
    """A block in a round: all of its samples, or `take` of them; `size` is their number."""

    block: int
    take: int | None
    size: int


@dataclass(frozen=True)
class _Round:
    """The windows of a round: window w covers the places from `ends[w - 1]` to `ends[w]`."""

    windows: list[list[_Visit]]
    ends: Positions


class Order:
    """The order in which epochs visit the samples of a layout.

    Attributes:
        length: visits in an epoch.
        round_length: visits in a round: those of the layout, or fewer without duplicates.
        window: blocks shuffled together; 0: all.
        seed: seed of the run.
    """

    def __init__(
        self,
        layout: Layout,
        seed: int,
        *,
        length: int | None = None,
        window: int = 0,
        distinct: Distinct | None = None,
    ) -> None:
        """Sets up the order; by default, an epoch is one round of the layout.

        Args:
            layout: the blocks of the source.
            seed: seed of the run.
            length: visits in an epoch.
            window: blocks shuffled together; 0: all.
            distinct: deals visits to batches without duplicates. Without a window, a round then
                has only the visits that fit.

        Raises:
            UserError: there are no batches without duplicates.
        """
        self.layout, self.seed, self.window = layout, seed, window
        self._distinct = distinct
        self.round_length = layout.visits
        if distinct is not None and not window:
            every_visit = self._visited(0, 0, self._visits())
            self.round_length = distinct.most_batches(every_visit) * distinct.batch
        self.length = self.round_length if length is None else length
        self._plain = all(span.factor == 1 for span in layout.spans)
        self._epoch: tuple[int, Positions] | None = None
        self._rounds: dict[tuple[int, int], _Round] = {}
        self._shuffled: dict[tuple[int, int, int], Positions] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_epoch": None, "_rounds": {}, "_shuffled": {}}

    def positions(self, epoch: int, start: int, stop: int) -> Positions:
        """The samples at the places `start` to `stop` of an epoch."""
        if not self.window:
            return self._full_epoch(epoch)[start:stop].copy()
        parts: list[Positions] = []
        while start < stop:
            number, window, first, last = self._window_at(epoch, start)
            shuffled = self._samples(epoch, number, window)
            parts.append(shuffled[start - first : min(stop, last) - first])
            start = min(stop, last)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def substitute(self, epoch: int, place: int, attempt: int) -> int:
        """A replacement for a corrupt sample, from the same window."""
        number = draw(self.seed, epoch, place, attempt)
        if not self.window:
            return number % self.layout.samples
        blocks = self._blocks_of(epoch, *self._window_at(epoch, place)[:2])
        ends = np.cumsum(self.layout.ends[blocks] - self.layout.starts[blocks])
        offset = number % int(ends[-1])
        which = int(np.searchsorted(ends, offset, side="right"))
        return int(self.layout.ends[blocks[which]]) - (int(ends[which]) - offset)

    def blocks_ahead(self, epoch: int, place: int) -> list[int]:
        """The blocks of the window at a place and of the next window, in order of use."""
        if not self.window:
            return list(range(len(self.layout.ends)))
        number, window, _, last = self._window_at(epoch, place)
        following = (epoch, last) if last < self.length else (epoch + 1, 0)
        then = self._window_at(*following)[:2]
        blocks = [*self._blocks_of(epoch, number, window), *self._blocks_of(following[0], *then)]
        return list(dict.fromkeys(blocks))

    def window_end(self, epoch: int, place: int) -> int:
        """The place at which the next window begins."""
        return self._window_at(epoch, place)[3] if self.window else self.length

    def _full_epoch(self, epoch: int) -> Positions:
        if self._epoch is None or self._epoch[0] != epoch:
            if self._distinct is not None:
                self._epoch = epoch, self._distinct_epoch(epoch, self._distinct)
                return self._epoch[1]
            visits = self.layout.visits
            order = epoch_order(visits, self.length, self.seed, epoch)
            if not self._plain:
                for number in range(-(-self.length // visits)):
                    part = order[number * visits : (number + 1) * visits]
                    part[:] = self._visited(epoch, number, self._visits())[part]
            self._epoch = epoch, order
        return self._epoch[1]

    def _distinct_epoch(self, epoch: int, distinct: Distinct) -> Positions:
        rounds = [
            distinct.dealt(
                self._visited(epoch, number, self._visits()),
                self.round_length // distinct.batch,
                self._bits(epoch, number, _DEALT).random_raw,
            )
            for number in range(-(-self.length // self.round_length))
        ]
        return np.concatenate(rounds)[: self.length]

    def _window_at(self, epoch: int, place: int) -> tuple[int, int, int, int]:
        """Round and window of a place, and the first and last place of the window."""
        number, rest = divmod(place, self.layout.visits)
        before = place - rest
        ends = self._round(epoch, number).ends
        window = int(np.searchsorted(ends, rest, side="right"))
        first = before + (int(ends[window - 1]) if window else 0)
        return number, window, first, before + int(ends[window])

    def _blocks_of(self, epoch: int, number: int, window: int) -> list[int]:
        return [visit.block for visit in self._round(epoch, number).windows[window]]

    def _round(self, epoch: int, number: int) -> _Round:
        found = self._rounds.get((epoch, number))
        if found is None:
            visits = self._visits()
            keys = self._bits(epoch, number, _BLOCKS).random_raw(len(visits))
            shuffled = [visits[index] for index in np.argsort(keys, kind="stable").tolist()]
            windows = [
                shuffled[start : start + self.window]
                for start in range(0, len(shuffled), self.window)
            ]
            ends = np.cumsum([sum(visit.size for visit in window) for window in windows])
            found = _Round(windows, ends)
            _remember(self._rounds, (epoch, number), found)
        return found

    def _samples(self, epoch: int, number: int, window: int) -> Positions:
        found = self._shuffled.get((epoch, number, window))
        if found is None:
            visited = self._visited(epoch, number, self._round(epoch, number).windows[window])
            bits = self._bits(epoch, number, _SAMPLES, 1 + window)
            if self._distinct is None:
                found = visited[np.argsort(bits.random_raw(len(visited)), kind="stable")]
            else:
                ends = self._round(epoch, number).ends
                place = number * self.layout.visits + (int(ends[window - 1]) if window else 0)
                found = self._distinct.dealt_from(visited, place, bits.random_raw)
            _remember(self._shuffled, (epoch, number, window), found)
        return found

    def _visits(self) -> list[_Visit]:
        """The visits of a round, in the order of the blocks."""
        sizes = (self.layout.ends - self.layout.starts).tolist()
        visits: list[_Visit] = []
        block = 0
        for span in self.layout.spans:
            seen = 0
            for size in sizes[block : block + span.blocks]:
                visits += [_Visit(block, None, size)] * (span.full_visits if size else 0)
                # The extra visits are spread evenly over the blocks, and their sum is exact.
                take = span.extra_visits * (seen + size) // max(span.samples, 1)
                take -= span.extra_visits * seen // max(span.samples, 1)
                if take:
                    visits.append(_Visit(block, take, take))
                seen += size
                block += 1
        return visits

    def _visited(self, epoch: int, number: int, visits: Sequence[_Visit]) -> Positions:
        """The samples that visits cover, in storage order."""
        parts: list[Positions] = []
        for visit in visits:
            start, end = int(self.layout.starts[visit.block]), int(self.layout.ends[visit.block])
            inside = np.arange(start, end, dtype=np.int64)
            if visit.take is not None:
                bits = self._bits(epoch, number, _EXTRAS, 1 + visit.block)
                chosen = np.argsort(bits.random_raw(end - start), kind="stable")[: visit.take]
                inside = inside[np.sort(chosen)]
            parts.append(inside)
        return np.concatenate(parts)

    def _bits(self, epoch: int, number: int, *what: int) -> np.random.PCG64:
        return np.random.PCG64(np.random.SeedSequence([self.seed, epoch, 1 + number, *what]))


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Adds an entry to a cache of `_KEPT_WINDOWS` entries."""
    if len(known) >= _KEPT_WINDOWS:
        del known[next(iter(known))]
    known[key] = value


def epoch_order(samples: int, length: int, seed: int, epoch: int) -> Positions:
    """[length] the samples that an epoch visits, in order.

    The epoch consists of shuffles of all samples, cut at `length`: no sample is repeated before all
    have been visited.

    Args:
        samples: number of samples.
        length: visits in the epoch.
        seed: seed of the run, not negative.
        epoch: index of the epoch, from 0.
    """
    # Raw bits instead of Generator.permutation: numpy guarantees them across versions.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    rounds = -(-length // samples)
    shuffles = [np.argsort(bits.random_raw(samples), kind="stable") for _ in range(rounds)]
    return np.concatenate(shuffles)[:length].astype(np.int64, copy=False)


def draw(seed: int, epoch: int, position: int, attempt: int = 0) -> int:
    """A random 64-bit number for one place in one epoch: seeds transforms, picks replacements."""
    place = struct.pack("<4q", seed, epoch, position, attempt)
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little")
