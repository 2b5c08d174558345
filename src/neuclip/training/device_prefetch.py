"""Groups micro-batches into steps, and copies them to the device ahead of the step."""

from collections.abc import Iterator
from itertools import islice

import torch

from neuclip.data.batch import Batch


class DevicePrefetcher:
    """Groups micro-batches into steps.

    The only batch of a step is copied to the device on a separate stream, while the step before
    still runs. Several micro-batches stay on the host until each is encoded, so that the device
    holds the images of one.

    Args:
        accum_freq: micro-batches per step.
        device: the device of the towers.
    """

    def __init__(self, accum_freq: int, device: torch.device) -> None:
        self._accum_freq, self._device = accum_freq, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next_step(self, batches: Iterator[Batch]) -> list[Batch]:
        """Returns the micro-batches of the next step; an empty list at the end."""
        step = list(islice(batches, self._accum_freq))
        return [self._copied(step[0])] if len(step) == 1 else step

    def _copied(self, batch: Batch) -> Batch:
        if self._copies is None:
            return batch.inputs_to(self._device)
        with torch.cuda.stream(self._copies):
            copy = batch.inputs_to(self._device)
        step = torch.cuda.current_stream(self._device)
        step.wait_stream(self._copies)
        for tensor in copy.inputs.values():
            tensor.record_stream(step)  # the copy stream allocated its memory
        return copy
