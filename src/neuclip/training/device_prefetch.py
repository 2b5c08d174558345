"""What each step is fed: its micro-batches, on the device by the time they are needed."""

from collections.abc import Iterator
from itertools import islice

import torch

from neuclip.data.batch import Batch


class Feed:
    """Takes micro-batches together to steps.

    A step's only batch is copied to the device on a stream of its own, underneath the work of the
    step before, which the host does not wait for. Of several, each is copied when it is its turn,
    so that the device holds the pictures of one.

    Args:
        accum_freq: micro-batches per step.
        device: where they are needed.
    """

    def __init__(self, accum_freq: int, device: torch.device) -> None:
        self._accum_freq, self._device = accum_freq, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next_step(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next step; none at the end."""
        step = list(islice(batches, self._accum_freq))
        return [self._copied(step[0])] if len(step) == 1 else step

    def _copied(self, batch: Batch) -> Batch:
        if self._copies is None:
            return batch.inputs_to(self._device)
        with torch.cuda.stream(self._copies):
            copy = batch.inputs_to(self._device)
        step = torch.cuda.current_stream(self._device)
        step.wait_stream(self._copies)
        for tensor in (copy.images, copy.tokens):
            tensor.record_stream(step)  # its memory is the other stream's
        return copy
