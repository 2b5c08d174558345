"""Times how fast one core makes batches, stage by stage, and computes the workers needed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from neuclip.data.batch import Tokenize, Transform
from neuclip.data.damage import DamageLog
from neuclip.data.decode import Decode
from neuclip.data.samples import SampleError
from neuclip.data.sources.source import Source
from neuclip.errors import UserError, quantity

STAGES: tuple[str, ...] = ("read", "decode", "transform", "tokenize")

_ADVICE = {
    "read": "use a faster or local disk, larger shards, or a smaller --shuffle-window",
    "decode": "store smaller JPEGs (they are decoded at reduced scale unless --full-decode is set)",
    "transform": "store smaller images",
    "tokenize": "shorten the captions",
}


@dataclass(frozen=True)
class Speed:
    """The time that one core takes for a sample.

    Attributes:
        samples: number of samples timed.
        seconds: mean seconds per sample, by stage in the order of `STAGES`.
        corrupt: counts of the corrupt samples, which are not timed; empty if there are none.
    """

    samples: int
    seconds: dict[str, float]
    corrupt: str

    @property
    def total(self) -> float:
        """Seconds per sample of all stages."""
        return sum(self.seconds.values())

    @property
    def slowest(self) -> str:
        """The stage that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def advice(self) -> str:
        """How to speed up the slowest stage."""
        return _ADVICE[self.slowest]

    def workers(self, samples_per_second: float) -> int:
        """Number of worker processes, with one core each, that reach a rate in samples/s."""
        return max(1, math.ceil(samples_per_second * self.total))


@dataclass(frozen=True)
class Stages:
    """What a loader does with a sample after reading."""

    decode: Decode
    transform: Transform
    tokenize: Tokenize


def bench(
    source: Source,
    stages: Stages,
    samples: int,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Times each stage on random samples, in storage order.

    Args:
        source: the source to read.
        stages: the stages after reading.
        samples: number of samples to time, at most all.
        seed: seed of the random choice.
        clock: current time in seconds.

    Raises:
        UserError: no sample could be read.
    """
    chance = np.random.default_rng(seed)
    drawn = np.sort(chance.choice(len(source), min(samples, len(source)), replace=False))
    sums, log, done = np.zeros(len(STAGES)), DamageLog(), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker process
    try:
        _time_one(source, stages, int(drawn[0]), clock, DamageLog())  # warm-up: imports and tables
        for position in drawn.tolist():
            times = _time_one(source, stages, position, clock, log)
            if times is not None:
                sums += np.diff(times)
                done += 1
    finally:
        torch.set_num_threads(threads)
    if not done:
        raise UserError(
            f"none of {quantity(len(drawn), 'sample')} tried could be read: {log.summary()}"
        )
    means = dict(zip(STAGES, (sums / done).tolist(), strict=True))
    return Speed(done, means, log.summary())


def _time_one(
    source: Source, stages: Stages, position: int, clock: Callable[[], float], log: DamageLog
) -> list[float] | None:
    """Times before, between and after the stages; None for a corrupt sample, which is logged."""
    times = [clock()]

    def decode(content: bytes) -> Image.Image:
        times.append(clock())
        return stages.decode(content)

    try:
        sample = source.read_with(position, decode)
    except SampleError as error:
        log.add([error.damage])
        return None
    times.append(clock())
    stages.transform(sample.image)
    times.append(clock())
    stages.tokenize([sample.caption])
    times.append(clock())
    return times
