"""Times the sections of a step without waiting for the device."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch

OTHER = "other"


class StepTimer:
    """Adds up the time of each section; a nested section pauses the one around it.

    On CUDA it records events, and reads them only in `seconds` and `shares`.

    Args:
        device: the device of the sections' work.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._open: list[str] = [OTHER]
        self.reset()

    def reset(self) -> None:
        """Starts a new period."""
        self._marks = []
        self._mark(self._open[-1])

    @contextmanager
    def section(self, name: str) -> Generator[None]:
        """Adds the time of a `with` block to a section."""
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1])

    def seconds(self) -> dict[str, float]:
        """Seconds in each section since `reset`. Waits for the device."""
        self._mark(OTHER)
        if self._cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for (name, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            seconds[name] = seconds.get(name, 0.0) + self._between(start, stop)
        return seconds

    def shares(self) -> dict[str, float]:
        """Fraction of the time since `reset` in each section. Waits for the device."""
        seconds = self.seconds()
        total = sum(seconds.values())
        return {name: value / total for name, value in seconds.items()} if total > 0 else {}

    def _mark(self, name: str) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    @staticmethod
    def _between(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
        if isinstance(start, torch.cuda.Event):
            assert isinstance(stop, torch.cuda.Event)
            return start.elapsed_time(stop) / 1000
        assert not isinstance(stop, torch.cuda.Event)
        return stop - start
