"""Several sources as one, each visited as often as its factor says."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from neuclip.data.order import Layout, Part
from neuclip.data.samples import Damage
from neuclip.data.sources.source import Content, Source
from neuclip.errors import UserError


class Mixture(Source):
    """Sources one behind the other; the factors are for the order (see `neuclip.data.order`).

    A factor of 2 visits every sample twice in a round, 0.5 half of the samples, others in each
    round. It does not copy a sample: positions and ids stay those of the sources, one behind the
    other.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        factors: Sequence[float],
        *,
        ids_are_keys: bool = False,
    ) -> None:
        """A mixture.

        Args:
            sources: at least one.
            factors: visits per round, for each source; above 0.
            ids_are_keys: take the sources' ids as they are, instead of numbering all samples.
        """
        self._sources, self._ids_are_keys = tuple(sources), ids_are_keys
        starts = np.cumsum([0, *(len(source) for source in sources)])
        self._ends, self._starts = starts[1:], starts[:-1].tolist()
        parts = tuple(
            replace(_single(source), factor=float(factor))
            for source, factor in zip(sources, factors, strict=True)
        )
        ends = [
            source.layout.ends + start for source, start in zip(sources, self._starts, strict=True)
        ]
        self.layout = Layout(np.concatenate(ends), parts)
        blocks = np.cumsum([0, *(part.blocks for part in parts)])
        self._block_ends, self._block_starts = blocks[1:], blocks[:-1].tolist()
        self.damage: tuple[Damage, ...] = tuple(d for source in sources for d in source.damage)
        self.shuffle_window = max(source.shuffle_window for source in sources)

    def content(self, position: int) -> Content:
        """One sample as it is stored; see `Source.content`."""
        number = self._number(position)
        return self._sources[number].content(position - self._starts[number])

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Where a sample lies in its source, and its key."""
        number = self._number(position)
        return self._sources[number].locate(position - self._starts[number])

    def files(self) -> Iterator[str | Path]:
        """Those of the sources, one behind the other."""
        return (file for source in self._sources for file in source.files())

    def sample_id(self, position: int) -> int:
        """The id of a sample: its key, or its position in the whole."""
        if not self._ids_are_keys:
            return position
        number = self._number(position)
        return self._sources[number].sample_id(position - self._starts[number])

    def expect(self, blocks: Sequence[int]) -> None:
        """Tells every source of its blocks."""
        by_source: list[list[int]] = [[] for _ in self._sources]
        for block in blocks:
            number = int(np.searchsorted(self._block_ends, block, side="right"))
            by_source[number].append(block - self._block_starts[number])
        for source, own in zip(self._sources, by_source, strict=True):
            source.expect(own)

    def close(self) -> None:
        """Closes the sources."""
        for source in self._sources:
            source.close()

    def _number(self, position: int) -> int:
        return int(np.searchsorted(self._ends, position, side="right"))


def _single(source: Source) -> Part:
    (part,) = source.layout.parts
    return part


def parse_factors(text: str, sources: int) -> list[float]:
    """The numbers of `--train-data-upsampling-factors`, joined by `::`.

    Raises:
        UserError: they are no numbers above 0, or not one for each source.
    """
    flag = f"--train-data-upsampling-factors {text}"
    try:
        factors = [float(part) for part in text.split("::")]
    except ValueError:
        raise UserError(f"{flag}: expected numbers joined by '::', for example 1::2") from None
    if len(factors) != sources:
        raise UserError(
            f"{flag}: {len(factors)} factor(s) for {sources} source(s); --train-data must name as "
            "many, joined by '::'"
        )
    if not all(0 < factor <= 1_000_000 for factor in factors):
        raise UserError(f"{flag}: a factor must be above 0 (leave out what is not to be read)")
    return factors
