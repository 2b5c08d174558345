"""Some samples of a source as a source of their own."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neuclip.data.order import Layout
from neuclip.data.samples import Damage, Sample
from neuclip.data.sources.source import ImageT, Source


class Part(Source):
    """Some samples of a source, under new positions. The blocks stay those of the source.

    Args:
        source: the source.
        positions: [samples] positions in the source, ascending.
        damage: what of the source's damage belongs to this part.
        ids_are_keys: keep the source's ids instead of numbering the samples.
    """

    def __init__(
        self,
        source: Source,
        positions: NDArray[np.int64],
        *,
        damage: tuple[Damage, ...] = (),
        ids_are_keys: bool = False,
    ) -> None:
        self._source, self._positions, self._ids_are_keys = source, positions, ids_are_keys
        ends = np.searchsorted(positions, source.layout.ends).astype(np.int64)
        until = [0, *ends.tolist()]
        last = np.cumsum([span.blocks for span in source.layout.spans]).tolist()
        first = [0, *last[:-1]]
        spans = tuple(
            replace(span, samples=until[stop] - until[start])
            for span, start, stop in zip(source.layout.spans, first, last, strict=True)
        )
        self.layout = Layout(ends, spans)
        self.damage = damage
        self.shuffle_window = source.shuffle_window
        self.opened, self.unused = source.opened, source.unused
        self.has_captions = source.has_captions
        self.selection = hashlib.sha256(positions.astype("<i8").tobytes()).digest()

    def _content(self, position: int) -> Sample[bytes]:
        return self._source.content(int(self._positions[position]))

    def _texts(self, position: int) -> Sample[None]:
        return self._source.texts(int(self._positions[position]))

    def read_with(self, position: int, decode: Callable[[bytes], ImageT]) -> Sample[ImageT]:
        """Reads one sample from the source and decodes its image."""
        return self._source.read_with(int(self._positions[position]), decode)

    def locate(self, position: int) -> tuple[str | Path, str]:
        """Where a sample is stored in the source, and its key."""
        return self._source.locate(int(self._positions[position]))

    def file_of(self, position: int) -> str | Path:
        """The file of a sample in the source."""
        return self._source.file_of(int(self._positions[position]))

    def sample_id(self, position: int) -> int:
        """The id of a sample: its key, or its position in this part."""
        if not self._ids_are_keys:
            return position
        return self._source.sample_id(int(self._positions[position]))

    def expect(self, blocks: Sequence[int]) -> None:
        """Announces to the source the blocks that will be read next."""
        self._source.expect(blocks)

    def close(self) -> None:
        """Closes the source."""
        self._source.close()
