"""Batches without duplicates: no two samples of one component (`neuclip.data.groups`) in a batch.

The visits of a round are sorted by component, components in random order, and dealt to M batches
like cards: visit k goes to batch k mod M. M visits in a row go to M batches, so a component of at
most M visits never meets itself. Then the batches are shuffled. Of a larger component a round
visits M samples, different ones each epoch; M is the largest number of full batches that is left.

With a window of blocks, visits stay in their window: they are dealt to its batches. A component
with more visits than the window has full batches meets itself there, and so may two samples in the
one batch that extends over two windows.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neuclip.errors import UserError, quantity

Positions = NDArray[np.int64]
Draw = Callable[[int], NDArray[np.uint64]]
"""Returns random 64-bit numbers."""


@dataclass(frozen=True, eq=False)
class Distinct:
    """How visits are dealt to batches.

    Attributes:
        components: [samples] the component of each sample.
        batch: pairs per step over all ranks.
    """

    components: Positions
    batch: int

    @cached_property
    def digest(self) -> str:
        """Digest of everything that decides the order."""
        content = self.components.astype("<i8").tobytes() + repr(self.batch).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    def most_batches(self, visits: Positions) -> int:
        """The largest number of full batches without duplicates.

        Args:
            visits: the samples of a round, as often as it visits them.

        Raises:
            UserError: there are fewer components than pairs in a batch.
        """
        sizes = self._sizes(visits)
        if len(sizes) < self.batch:
            raise UserError(
                f"--no-duplicates: the data have {quantity(len(sizes), 'group')} of equal "
                f"captions, images or labels, and a batch of {self.batch} pairs needs as many: "
                "lower --batch-size, or use --false-negatives mask instead"
            )
        low, high = 1, len(visits) // self.batch
        while low < high:
            middle = (low + high + 1) // 2
            fits = int(np.minimum(sizes, middle).sum()) >= middle * self.batch
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @property
    def largest(self) -> int:
        """Number of samples of the largest component."""
        return int(np.unique(self.components, return_counts=True)[1].max())

    def dealt(self, visits: Positions, batches: int, draw: Draw) -> Positions:
        """[batches * batch] A round as batches without duplicates.

        Args:
            visits: the samples of the round, as often as it visits them.
            batches: at most `most_batches(visits)`.
            draw: random numbers of the round.
        """
        visits = visits[self._by_component(visits, draw)]
        own = self.components[visits]
        starts = np.flatnonzero(np.append(True, own[1:] != own[:-1]))
        number = np.arange(len(own)) - np.repeat(starts, np.diff(np.append(starts, len(own))))
        visits = visits[number < batches]
        kept = np.argsort(draw(len(visits)), kind="stable")[: batches * self.batch]
        rows = visits[np.sort(kept)].reshape(self.batch, batches)
        return rows[:, np.argsort(draw(batches), kind="stable")].T.reshape(-1)

    def dealt_from(self, visits: Positions, place: int, draw: Draw) -> Positions:
        """[visits] The visits of a window, in an order with as few duplicates as it allows.

        Args:
            visits: the samples of the window.
            place: the place of the first of them in the epoch, which decides where batches end.
            draw: random numbers of the window.
        """
        number = (place + np.arange(len(visits))) // self.batch
        number -= number[0]
        starts = np.flatnonzero(np.append(True, number[1:] != number[:-1]))
        row = np.arange(len(visits)) - starts[number]
        turn = np.argsort(draw(len(starts)), kind="stable")[number]
        order = np.empty_like(visits)
        order[np.lexsort((turn, row))] = visits[self._by_component(visits, draw)]
        return order

    def repeats(self, order: Positions, place: int = 0) -> int:
        """Number of visits in a batch that holds their component already.

        Args:
            order: the samples of consecutive places.
            place: the first of these places.
        """
        number = (place + np.arange(len(order))) // self.batch
        pairs = np.stack([number, self.components[order]])
        return len(order) - np.unique(pairs, axis=1).shape[1]

    def _by_component(self, visits: Positions, draw: Draw) -> Positions:
        """The order that puts components together, in random order, and shuffles each."""
        found, inverse = np.unique(self.components[visits], return_inverse=True)
        chance = draw(len(found))[inverse]
        return np.lexsort((draw(len(visits)), inverse, chance))

    def _sizes(self, visits: Positions) -> Positions:
        return np.unique(self.components[visits], return_counts=True)[1]
