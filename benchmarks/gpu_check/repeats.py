"""Timings with their spread: on a card or a machine that others use too, the noise is visible."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of a call, to the end of its work on the device."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def summary(milliseconds: Sequence[float]) -> dict[str, float]:
    """Their median, and their range over it: the noise."""
    middle = statistics.median(milliseconds)
    spread = (max(milliseconds) - min(milliseconds)) / middle if middle else 0.0
    return {"milliseconds": round(middle, 4), "spread": round(spread, 3)}


def matmul_ceiling(device: str, dtype: torch.dtype, size: int, repeats: int = 8) -> float:
    """Floating-point operations a second of a square matrix product, the best of some.

    It is what model FLOP utilisation is counted against: the card's own rate, not its data sheet's.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: left @ right, device) for _ in range(repeats + 2)][2:]
    return 2 * size**3 / (min(times) / 1e3)
