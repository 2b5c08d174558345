"""The newest embeddings of both sides, first in, first out: what prototypes are renewed from."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from neuclip.parallel import collectives
from neuclip.parallel.collectives import Slice

NOBODY = -1
"""In place of a sample id: whose embedding it is was not told."""


class EmbeddingRing(nn.Module):
    """A ring of slots, shared out over ranks.

    Slot numbers run over the whole ring; this rank holds those of its slice. Row 0 keeps text
    embeddings (candidates of image anchors), row 1 image embeddings. `owners` has the sample id of
    each slot's pair: [1, owned].

    Args:
        size: slots over all ranks.
        dim: width of the embeddings.
        shard: the slots this rank keeps; none: `collectives.owned_slice(size)`.
    """

    slots: Tensor
    owners: Tensor

    def __init__(self, size: int, dim: int, shard: Slice | None = None) -> None:
        super().__init__()
        self.size = size
        self.owned = collectives.owned_slice(size) if shard is None else shard
        self.written = 0
        self.register_buffer("slots", torch.zeros(2, len(self.owned), dim))
        self.register_buffer("owners", torch.full((1, len(self.owned)), NOBODY))

    @property
    def filled(self) -> int:
        """Slots that hold an embedding."""
        return min(self.written, self.size)

    @torch.no_grad()
    def push(
        self, candidates: Float[Tensor, "2 batch dim"], owners: Int64[Tensor, " batch"] | None
    ) -> list[slice]:
        """Writes the embeddings of all ranks over the oldest; returns the local rows written.

        Args:
            candidates: texts, images.
            owners: the sample ids of their pairs.
        """
        batch = candidates.shape[1]
        count = min(batch, self.size)
        written: list[slice] = []
        for first, rows in self.window(self.written + batch - count, count):
            start = batch - count + first
            taken = slice(start, start + (rows.stop - rows.start))
            self.slots[:, rows] = candidates[:, taken]
            self.owners[:, rows] = NOBODY if owners is None else owners[taken]
            written.append(rows)
        self.written += batch
        return written

    def window(self, first: int, count: int) -> list[tuple[int, slice]]:
        """This rank's part of `count` slots from number `first` on, going round the ring.

        Returns:
            Pieces (position within the window, local rows): slices, for an index tensor would have
            to be copied to the device at every step.
        """
        pieces: list[tuple[int, slice]] = []
        position = 0
        while position < count:
            number = (first + position) % self.size
            length = min(count - position, self.size - number)
            start = max(number, self.owned.start)
            stop = min(number + length, self.owned.stop)
            if start < stop:
                rows = slice(start - self.owned.start, stop - self.owned.start)
                pieces.append((position + start - number, rows))
            position += length
        return pieces
