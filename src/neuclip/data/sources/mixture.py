"""Several sources as one, with an upsampling factor for each."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from neuclip.data.order import Layout, SourceSpan
from neuclip.data.samples import Damage, Sample
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, quantity


class Mixture(Source):
    """Concatenated sources. The factors act on the order of visits: see `neuclip.data.order`.

    A factor of 2 visits every sample twice per round; 0.5 visits half of the samples, different
    ones each round. Samples are not copied: positions and ids stay unique.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        factors: Sequence[float],
        *,
        ids_are_keys: bool = False,
    ) -> None:
        """Joins the sources.

        Args:
            sources: at least one source.
            factors: visits per sample and round, for each source; above 0.
            ids_are_keys: keep the sources' ids instead of numbering all samples.
        """
        self._sources, self._ids_are_keys = tuple(sources), ids_are_keys
        starts = np.cumsum([0, *(len(source) for source in sources)])
        self._ends, self._starts = starts[1:], starts[:-1].tolist()
        spans = tuple(
            replace(_span(source), factor=float(factor))
            for source, factor in zip(sources, factors, strict=True)
        )
        ends = [
            source.layout.ends + start for source, start in zip(sources, self._starts, strict=True)
        ]
        self.layout = Layout(np.concatenate(ends), spans)
        blocks = np.cumsum([0, *(span.blocks for span in spans)])
        self._block_ends, self._block_starts = blocks[1:], blocks[:-1].tolist()
        self.damage: tuple[Damage, ...] = tuple(d for source in sources for d in source.damage)
        self.has_captions = any(source.has_captions for source in sources)
        self.opened = "; ".join(source.opened for source in sources if source.opened)
        self.unused = tuple(line for source in sources for line in source.unused)
        self.shuffle_window = max(source.shuffle_window for source in sources)

    def _content(self, position: int) -> Sample[bytes]:
        number = self._number(position)
        return self._sources[number].content(position - self._starts[number])

    def _texts(self, position: int) -> Sample[None]:
        number = self._number(position)
        return self._sources[number].texts(position - self._starts[number])

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Where a sample is stored in its source, and its key."""
        number = self._number(position)
        return self._sources[number].locate(position - self._starts[number])

    def file_of(self, position: int) -> str | Path:
        """The file of a sample in its source."""
        number = self._number(position)
        return self._sources[number].file_of(position - self._starts[number])

    def first_captions(self, samples: int = 20) -> list[tuple[str, ...]]:
        """The captions of the first samples of every source."""
        return [found for source in self._sources for found in source.first_captions(samples)]

    def files(self) -> Iterator[str | Path]:
        """The files of all sources, in order."""
        return (file for source in self._sources for file in source.files())

    def sample_id(self, position: int) -> int:
        """The id of a sample: its key, or its position in the mixture."""
        if not self._ids_are_keys:
            return position
        number = self._number(position)
        return self._sources[number].sample_id(position - self._starts[number])

    def expect(self, blocks: Sequence[int]) -> None:
        """Announces to each source its blocks among those that will be read next."""
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


def _span(source: Source) -> SourceSpan:
    (span,) = source.layout.spans
    return span


def parse_factors(text: str, sources: int) -> list[float]:
    """The factors in `--train-data-upsampling-factors`, one per source.

    Args:
        text: numbers joined by `::`.
        sources: number of sources.

    Raises:
        UserError: a factor is not a number above 0, or there is not one per source.
    """
    flag = f"--train-data-upsampling-factors {text}"
    try:
        factors = [float(part) for part in text.split("::")]
    except ValueError:
        raise UserError(f"{flag}: expected numbers joined by '::', for example 1::2") from None
    if len(factors) != sources:
        raise UserError(
            f"{flag}: {quantity(len(factors), 'factor')} for {quantity(sources, 'source')}; "
            "--train-data needs one source per factor, joined by '::'"
        )
    if not all(0 < factor <= 1_000_000 for factor in factors):
        raise UserError(f"{flag}: a factor must be above 0 (to skip a source, leave it out)")
    return factors
