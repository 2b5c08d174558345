"""How fast one core makes batches, stage by stage, and how many worker processes that asks for."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from neuclip.data.batch import Tokenize, Transform
from neuclip.data.damage import DamageLog
from neuclip.data.decode import Decode
from neuclip.data.samples import SampleError, Unusable
from neuclip.data.sources.source import Source, sample_error
from neuclip.errors import UserError

STAGES: tuple[str, ...] = ("read", "decode", "transform", "tokenize")

_ADVICE = {
    "read": "storage: faster or nearer disks, larger shards, or a smaller --shuffle-window",
    "decode": "decoding: smaller JPEGs (neuclip decodes at reduced scale unless --full-decode)",
    "transform": "resizing and cropping: smaller pictures in the shards",
    "tokenize": "tokenizing: shorter captions",
}


@dataclass(frozen=True)
class Speed:
    """What one core needs for a sample.

    Attributes:
        samples: how many were timed.
        seconds: mean seconds per sample, by stage in the order of `STAGES`.
        damaged: samples that could not be read, in words; they are not timed.
    """

    samples: int
    seconds: dict[str, float]
    damaged: str

    @property
    def total(self) -> float:
        """Seconds per sample of all stages."""
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """The stage that takes longest."""
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def advice(self) -> str:
        """What would make the slowest stage faster."""
        return _ADVICE[self.limit]

    def workers(self, samples_per_second: float) -> int:
        """Worker processes, each with a core of its own, that keep up with a rate."""
        return max(1, math.ceil(samples_per_second * self.total))


@dataclass(frozen=True)
class Stages:
    """The parts of a loader, one for each stage after reading."""

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
    """Time each stage on samples drawn at random, in the order in which they lie.

    Args:
        source: what is read.
        stages: what is done with it.
        samples: how many samples to time; all, if there are fewer.
        seed: of the draw.
        clock: in seconds.

    Raises:
        UserError: no sample could be read.
    """
    chance = np.random.default_rng(seed)
    drawn = np.sort(chance.choice(len(source), min(samples, len(source)), replace=False))
    sums, log, done = np.zeros(len(STAGES)), DamageLog(), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker process
    try:
        _time_one(source, stages, int(drawn[0]), clock, DamageLog())  # imports and tables
        for position in drawn.tolist():
            times = _time_one(source, stages, position, clock, log)
            if times is not None:
                sums += np.diff(times)
                done += 1
    finally:
        torch.set_num_threads(threads)
    if not done:
        raise UserError(f"none of {len(drawn)} samples tried could be read: {log.summary()}")
    means = dict(zip(STAGES, (sums / done).tolist(), strict=True))
    return Speed(done, means, log.summary())


def _time_one(
    source: Source, stages: Stages, position: int, clock: Callable[[], float], log: DamageLog
) -> list[float] | None:
    """Readings of the clock around the stages; none for a damaged sample, which goes to the log."""
    times = [clock()]
    try:
        content = source.content(position)
        times.append(clock())
        image = stages.decode(content.image)
    except SampleError as error:
        log.add([error.damage])
        return None
    except Unusable as error:
        shard, key = source.locate(position)
        log.add([sample_error(str(shard), key, error).damage])
        return None
    times.append(clock())
    stages.transform(image)
    times.append(clock())
    stages.tokenize([content.caption])
    times.append(clock())
    return times
